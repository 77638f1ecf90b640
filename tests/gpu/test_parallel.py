"""Ranks on GPUs: sums over peers' memory and NCCL's, and whole engines.

Two ranks may share one GPU for the sums, which torch allows for tests and NCCL does not; all else needs two GPUs. Ranks
are processes of this file, `python tests/gpu/test_parallel.py WHAT ...`, so that what waits forever can be killed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.config.parallel import place_of
from octavo.parallel import Rows, connect, join_store, open_store, peer_memory
from octavo.parallel.comm import HOST, dist
from octavo.parallel.peer_memory import OVERLAP, PeerMemory, share

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(not GPUS, reason="needs a GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
ROOT = Path(__file__).parents[2]
SECONDS = 55.0
Reduce = Callable[[Tensor], Tensor | None]
WIDTH, MOST = 1032, 700
COUNTS = (1, 300, 2, MOST, 17)
"""Rows: less and more than programs, so that these count different numbers of calls."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REPLAYS = 100
SHARED_REPLAYS = 5
"""On one GPU, which gives ranks that wait for each other turns of milliseconds."""


def run_ranks(*arguments: list[str], seconds: float = SECONDS, overlap: bool = False) -> list[str]:
    """The last line that each process says, one a list of arguments; all are killed after `seconds`."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, OVERLAP: str(int(overlap))}
    processes = [
        subprocess.Popen([sys.executable, __file__, *given], env=env, stdout=subprocess.PIPE, text=True)
        for given in arguments
    ]
    until = time.monotonic() + seconds
    try:
        said = [process.communicate(timeout=max(until - time.monotonic(), 0.1))[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes)
        return [words.strip().rpartition("\n")[2] for words in said]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_sums_over_peers_memory_of_one_gpu() -> None:
    store = open_store()
    ranks = [["peers", str(rank), str(store.port)] for rank in range(2)]
    assert run_ranks(*ranks, overlap=True) == ["freed", "equal"]


@two_gpus
@pytest.mark.parametrize("most", [0, MOST], ids=["nccl", "peers"])
def test_sums_and_joins_of_two_gpus(most: int) -> None:
    store = open_store()
    ranks = [["links", str(rank), str(store.port), str(most)] for rank in range(2)]
    assert run_ranks(*ranks) == ["equal", "equal"]


@two_gpus
def test_two_gpus_generate_what_one_does(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.gpu.test_engine import SHAPE
    from tests.support.tiny import SHAPE as TINY
    from tests.support.tiny import save

    torch.manual_seed(7)
    save(LlamaForCausalLM(LlamaConfig(**(TINY | SHAPE | {"initializer_range": 0.06}))).double(), tmp_path)
    one, *others = (
        json.loads(run_ranks(["engine", str(tmp_path), tensor, pipeline], seconds=200)[0])
        for tensor, pipeline in (("1", "1"), ("2", "1"), ("1", "2"))
    )
    for found in others:
        differing = [key for key in one if one[key] != found[key]]
        assert len(differing) <= 1, f"{len(differing)} of {len(one)} sequences differ"


def tensors(rows: int, dtype: torch.dtype, ranks: int) -> list[Tensor]:
    """The same of every rank [rows, WIDTH], on every rank."""
    generator = torch.Generator(device="cuda").manual_seed(rows)
    return list(torch.randn((ranks, rows, WIDTH), generator=generator, device="cuda").to(dtype))


def capture(work: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        graph.capture_begin(capture_error_mode="thread_local")
        results = work()
        graph.capture_end()
    return graph, results


def check_sums(
    reduce: Reduce, rank: int, dtype: torch.dtype, counts: tuple[int, ...] = COUNTS, replays: int = REPLAYS
) -> None:
    """Eager and replayed, against torch's sums of both ranks' tensors, bit by bit."""
    given = [tensors(count, dtype, 2) for count in counts]
    for own in given:
        got = reduce(own[rank].clone())
        assert got is not None
        assert torch.equal(got, own[0] + own[1]), f"{len(own[0])} rows of {dtype}"
    fixed = [torch.empty_like(own[rank]) for own in given]

    def work() -> list[Tensor]:
        found = []
        for x in fixed:
            got = reduce(x.clone())
            assert got is not None
            found.append(got)
        return found

    graph, results = capture(work)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(replays):
        for x, own in zip(fixed, given, strict=True):
            x.copy_(own[rank] * (i + 1))
        graph.replay()
        for got, own in zip(results, given, strict=True):
            wrong += (got != own[0] * (i + 1) + own[1] * (i + 1)).sum()
    assert int(wrong) == 0, f"{int(wrong)} values of replays of {dtype}"


def check_norm(add_norm: Callable[..., tuple[Tensor, Tensor] | None], rank: int, dtype: torch.dtype) -> None:
    """The sum with residual and RMSNorm, in a graph, against torch's in float64."""
    gain = tensors(1, dtype, 1)[0][0]
    for count in COUNTS:
        first, second, residual = tensors(count, dtype, 3)
        own = (first, second)[rank]
        stream = (first.double() + second.double() + residual.double()).to(dtype)
        poison = torch.full((2, count, WIDTH), torch.nan, dtype=dtype, device="cuda")
        del poison

        def work(own: Tensor = own, residual: Tensor = residual) -> list[Tensor]:
            made = add_norm(own, residual, gain, 1e-5)
            assert made is not None
            return list(made)

        graph, (normed, total) = capture(work)
        graph.replay()
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(total, stream, rtol=4 * ulp, atol=4 * ulp)
        exact = torch.nn.functional.rms_norm(total.double(), (WIDTH,), gain.double(), 1e-5)
        torch.testing.assert_close(normed.double(), exact, rtol=4 * ulp, atol=4 * ulp)


def peers(rank: int, port: int) -> str:
    """Two ranks on one GPU, of which rank 0 has shared memory before; rank 1 leaves first."""
    device, store = torch.device("cuda", 0), join_store(HOST, port)
    torch.cuda.set_device(device)
    if rank == 0:
        peer_memory._catch_up(1, device)
    memory: PeerMemory | None = None
    for dtype in DTYPES:
        memory = share(dist.PrefixStore(str(dtype), store), rank, 2, device, Rows(MOST, WIDTH, dtype))
        assert memory is not None
        check_sums(memory.all_reduce, rank, dtype, replays=SHARED_REPLAYS)
        check_norm(memory.add_norm, rank, dtype)
    assert memory is not None
    shifted = [x.flatten()[3 : 3 + WIDTH].view(1, WIDTH) for x in tensors(2, dtype, 2)]
    summed = memory.all_reduce(shifted[rank])
    assert summed is not None
    assert torch.equal(summed, shifted[0] + shifted[1])
    for declined in (torch.ones(1, WIDTH, dtype=torch.float64), torch.ones(1, 3), torch.ones(MOST + 1, WIDTH)):
        assert memory.all_reduce(declined.to(device)) is None
    torch.cuda.synchronize()
    if rank == 1:
        store.set("leaving", b"1")
        return "equal"
    store.get("leaving")
    return survive(memory)


def survive(memory: PeerMemory) -> str:
    """A replay of sums that nobody else makes ends when it is given up."""
    x = torch.ones(4, WIDTH, device="cuda")
    graph, _ = capture(lambda: [y for _ in range(8) if (y := memory.all_reduce(x)) is not None])
    graph.replay()
    assert not torch.cuda.current_stream().query(), "nobody answers"
    memory.abort()
    torch.cuda.synchronize()
    return "freed"


def links(rank: int, port: int, most: int) -> str:
    device, store = torch.device("cuda", rank), join_store(HOST, port)
    torch.cuda.set_device(device)
    for dtype in DTYPES:
        sums = Rows(most, WIDTH, dtype) if most else None
        made = connect(place_of(rank, 2, 1), dist.PrefixStore(str(dtype), store), device, sums=sums)
        assert len(made.groups) == (2 if most else 1), "whether memory is shared"
        check_sums(made.comm.all_reduce, rank, dtype, (*COUNTS, 2 * MOST))
        if most:
            check_norm(made.comm.add_norm, rank, dtype)
        else:
            (x,) = tensors(3, dtype, 1)
            assert made.comm.add_norm(x, x, x[0], 1e-5) is None
    halves = [x.view(8, -1) for x in tensors(256, dtype, 2)]
    graph, (joined,) = capture(lambda: [made.comm.all_gather(halves[rank])])
    graph.replay()
    assert torch.equal(joined, torch.cat(halves, -1))
    assert torch.equal(made.comm.all_gather(halves[rank]), joined)
    torch.cuda.synchronize()
    return "equal"


def engine(folder: str, tensor: int, pipeline: int) -> str:
    """What the ranks generate with all sizes recorded, as JSON; the process must end by itself afterwards."""
    from octavo.engine import Engine
    from octavo.engine.executor import executor_for
    from tests.gpu.test_engine import requests, take
    from tests.support.tiny import tiny_config

    config = tiny_config(
        Path(folder), dtype="float32", device="cuda", max_num_seqs=12, max_num_batched_tokens=256,
        num_gpu_blocks_override=400, max_model_len=512, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline,
    )  # fmt: skip
    made = Engine(config, executor=executor_for(config))
    made.load()
    made.warm_up()
    for request in requests():
        made.add(request)
    found: dict[str, tuple[list[int], list[object]]] = {}
    while made.has_work():
        for delta in made.step():
            take(found, delta)
    made.close()
    return json.dumps({key: tokens for key, (tokens, _) in found.items()})


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    match what:
        case "peers":
            answer = peers(int(rest[0]), int(rest[1]))
        case "links":
            answer = links(int(rest[0]), int(rest[1]), int(rest[2]))
        case _:
            answer = engine(rest[0], int(rest[1]), int(rest[2]))
    print(answer, flush=True)
    if what != "engine":
        os._exit(0)
