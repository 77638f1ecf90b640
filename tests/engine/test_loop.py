"""The loop behind the wire: what it sends, and when, by a clock of the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from octavo.core.params import SamplingParams
from octavo.core.request import Add, Delta, FromEngine, Outputs, Request, Shutdown, ToEngine
from octavo.engine import Engine, loop
from tests.frontend.fake_engine import EchoEngine


class Whole(EchoEngine):
    """Tells nothing before a request's end; each step takes 0.1 s of the clock."""

    now = 1000.0

    def step(self) -> list[Delta]:
        self.now += 0.1
        return [delta for delta in super().step() if delta.finish_reason is not None]

    def prepare_vocabulary(self) -> None:
        pass


class Script:
    """A wire over which one request comes, and Shutdown once it has been answered."""

    def __init__(self, engine: Whole, request: Request) -> None:
        self.engine = engine
        self.coming: list[ToEngine] = [Add([request])]
        self.sent: list[tuple[float, list[Delta], int]] = []
        """When, and of the statistics how many were running."""

    def quiet(self, seconds: float) -> bool:
        return False

    def drain(self, *, block: bool) -> list[ToEngine]:
        coming, self.coming = self.coming, []
        return coming or ([Shutdown()] if block else [])

    def send(self, message: FromEngine) -> None:
        assert isinstance(message, Outputs)
        self.sent.append((self.engine.now, message.deltas, message.stats.running))


def test_statistics_leave_while_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Whole()
    wire = Script(engine, Request("a", [1], SamplingParams(max_tokens=20), 0.0, whole=True))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: engine.now))
    loop.run(cast(Engine, engine), cast(loop.Wire, wire))
    times, deltas, running = zip(*wire.sent, strict=True)
    assert [round(at - 1000, 1) for at in times] == [0.1, 0.6, 1.1, 1.6, 2.0]
    assert [len(told) for told in deltas] == [0, 0, 0, 0, 1]
    assert running == (1, 1, 1, 1, 0)
