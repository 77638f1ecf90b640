"""Ranks as actors on two nodes of a Ray cluster: the same tokens, and a clear end when one dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from octavo.config import EngineArgs
from octavo.core.errors import ConfigError, EngineDead
from octavo.core.params import SamplingParams
from octavo.engine import Engine, InlineExecutor, executor
from octavo.frontend import AsyncLLM
from octavo.worker.frames import Start
from tests.engine.test_processes import OPTIONS, descendants, generate, generate_after_a_mask, gone
from tests.support.tiny import tiny_config, write_tiny

ray = pytest.importorskip("ray")

from octavo.engine import ray as engine_ray  # noqa: E402

RAY: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
NODE: dict[str, Any] = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny("mixed", path)
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each, so that two ranks need both."""
    from ray.cluster_utils import Cluster

    home = tempfile.mkdtemp(prefix="ray-")  # short, since Ray puts sockets there
    given = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        nodes = Cluster(initialize_head=True, head_node_args=NODE | {"temp_dir": home})
        try:
            nodes.add_node(**NODE)
            nodes.wait_for_nodes()
            patch.setenv("RAY_ADDRESS", nodes.address)
            yield nodes
        finally:
            nodes.shutdown()
            shutil.rmtree(home, ignore_errors=True)


def actors() -> list[int]:
    return [p for p in descendants(os.getpid()) if Path(f"/proc/{p}/cmdline").read_bytes().startswith(b"ray::Rank")]


async def test_two_nodes_generate_the_tokens_of_one_process(cluster: Any, folder: Path) -> None:
    alone = tiny_config(folder, **OPTIONS)
    one = Engine(alone, executor=InlineExecutor(alone))
    one.load()
    wanted, masked = generate(one), generate_after_a_mask(one)
    engine = Engine(tiny_config(folder, **RAY, **OPTIONS))
    engine.load()
    assert len(actors()) == 1
    (group,) = ray.util.placement_group_table().values()
    assert set(group["bundles_to_node_id"].values()) == {node["NodeID"] for node in ray.nodes()}
    assert len(group["bundles_to_node_id"]) == 2
    assert generate(engine) == wanted
    assert generate(engine) == wanted
    assert generate_after_a_mask(engine) == masked
    pids = actors()
    engine.close()
    engine.close()
    await gone(pids)
    assert not ray.is_initialized()
    one.close()


async def test_clients_hear_of_a_killed_actor_and_nothing_is_left(cluster: Any, folder: Path) -> None:
    args = EngineArgs(model=str(folder), dtype="float64", device="cpu", skip_tokenizer_init=True, **RAY, **OPTIONS)
    llm = await AsyncLLM.start(args)

    async def consume(number: int) -> None:
        params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True, detokenize=False)
        async for _ in llm.generate({"prompt_token_ids": [number, 5, 6]}, params, str(number)):
            pass

    clients = [asyncio.create_task(consume(i)) for i in range(4)]
    while not llm.stats.running:
        await asyncio.sleep(0.01)
    (pid,) = actors()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        for error in await asyncio.gather(*clients, return_exceptions=True):
            assert isinstance(error, EngineDead)
            assert f"rank 1 (an actor on node {cluster.head_node.node_ip_address}) died" in str(error)
            assert "worker process has died" in str(error)
    await llm.shutdown()
    await gone([pid])
    ray.init(address="auto", logging_level="warning")
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} == {"REMOVED"}
    ray.shutdown()


def test_what_finds_no_place_is_refused(cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_ray, "PLACEMENT_SECONDS", 0.0)
    engine = Engine(tiny_config(folder, **RAY, pipeline_parallel_size=2, **OPTIONS))
    with pytest.raises(ConfigError, match=r"no place for 4 CPUs, one of them on [0-9.]+; of 2 in the cluster"):
        engine.load()
    assert not ray.is_initialized()


def test_a_node_without_the_model_is_named(folder: Path) -> None:
    config = tiny_config(folder, **RAY, **OPTIONS)
    moved = msgspec.structs.replace(config.model, path="/nowhere")
    start = Start(1, msgspec.structs.replace(config, model=moved), ("", 0), "10.0.0.7", (0, 1))
    code, words = engine_ray.Rank().load(msgspec.msgpack.encode(start), 0, b"")
    assert code == 2
    assert words.startswith("the model is at /nowhere, but node 10.0.0.7 has nothing there: every node")


@pytest.mark.parametrize(
    ("nodes", "order"),
    [("aabb", [0, 1, 2, 3]), ("abab", [0, 2, 1, 3]), ("baab", [0, 3, 1, 2]), ("a", [0])],
)
def test_ranks_go_node_by_node(nodes: str, order: list[int]) -> None:
    assert engine_ray.by_node(list(nodes)) == order
    ranks = [nodes[bundle] for bundle in order]
    neighbours = [engine_ray.neighbours_of(ranks, rank) for rank in range(len(ranks))]
    for node in set(nodes):
        count = nodes.count(node)
        assert [n for n, at in zip(neighbours, ranks, strict=True) if at == node] == [(i, count) for i in range(count)]


def test_without_ray_the_remedy_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'ray', which is not installed: pip install 'ray>=2\.40'"):
        Engine(tiny_config(folder, **RAY, **OPTIONS))
