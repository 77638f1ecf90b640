"""What the executor of several ranks does with its peers, here made-up ones; those that run are in test_processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.config.engine import EngineConfig
from octavo.core.errors import EngineDead, OctavoError
from octavo.core.params import SamplingParams
from octavo.core.plan import Plan
from octavo.core.request import Request
from octavo.engine import Engine, InlineExecutor
from octavo.engine.ranks import OnDeath, Peers, RanksExecutor
from octavo.kernels.cpu import build
from octavo.worker import Worker
from octavo.worker.frames import Start
from tests.support.tiny import tiny_config, write_tiny


class Nobody(Peers):
    """No peers; tells what would be done to some."""

    cause_seconds = 0.0

    def __init__(self, config: EngineConfig, on_death: OnDeath) -> None:
        super().__init__(0, on_death)
        self.start = Start(0, config, ("", 0), "", (0, 1))
        self.store = None
        self.done: list[str] = []

    def _write(self, frame: bytes, check: Callable[[], None]) -> None:
        if "release" in self.done:
            raise ValueError("operation forbidden on released memoryview object")

    def _await_end(self) -> None:
        self.done.append("wait")

    def _kill(self) -> None:
        self.done.append("kill")

    def _release(self) -> None:
        self.done.append("release")


def engine_of(config: EngineConfig, on_death: OnDeath | None = None) -> tuple[Engine, RanksExecutor, Nobody]:
    executor = RanksExecutor(config, Nobody, on_death)
    engine = Engine(config, executor=executor)
    engine.load()
    peers = executor._peers
    assert isinstance(peers, Nobody)
    return engine, executor, peers


def request(name: str = "a") -> Request:
    return Request(name, [3, 1, 2], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), 0.0)


def test_the_failure_of_rank_0_ends_all_at_once_and_stays_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny("full", tmp_path)
    heard: list[OctavoError] = []
    engine, executor, peers = engine_of(tiny_config(tmp_path), heard.append)

    def fail(plan: Plan) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(executor._worker, "forward", fail)
    engine.add(request())
    reason = r"^rank 0 failed: RuntimeError\('no memory'\)$"
    for _ in range(3):
        with pytest.raises(EngineDead, match=reason):
            engine.step()
    assert [str(error) for error in heard] == ["rank 0 failed: RuntimeError('no memory')"]
    assert peers.done == ["kill"], "peers that cannot go on are not waited for"
    engine.close()
    assert peers.done == ["kill", "kill", "release"]


def test_a_death_is_raised_anew_each_time(tmp_path: Path) -> None:
    peers = Nobody(tiny_config(write(tmp_path)), lambda error: None)
    death = EngineDead("rank 1 died")
    peers.fall(death)
    peers.fall(EngineDead("rank 0 failed"))
    raised = []
    for _ in range(2):
        with pytest.raises(EngineDead, match=r"^rank 1 died$") as caught:
            peers.check()
        raised.append(caught.value)
    assert death.__traceback__ is None, "it would hold on to frames"
    assert raised[0] is not raised[1]


@pytest.mark.skipif(build.available() is not None, reason="needs a C compiler")
def test_a_rank_without_peers_records_its_steps(tmp_path: Path) -> None:
    """As Ray runs one rank."""
    config = tiny_config(write(tmp_path), dtype="float32")
    engine, executor, _ = engine_of(config)
    worker = Worker(config)
    alone = Engine(config, executor=InlineExecutor(config, worker))
    alone.load()
    assert tokens(engine) == tokens(alone)
    assert executor._worker._decode is not None
    assert executor._worker._decode._steps.keys() == worker._decode._steps.keys()  # type: ignore[union-attr]
    assert executor._worker._decode._steps
    engine.close()
    alone.close()


def write(folder: Path) -> Path:
    write_tiny("full", folder)
    return folder


def tokens(engine: Engine) -> list[int]:
    engine.add(request())
    found: list[int] = []
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            found += delta.token_ids
    return found
