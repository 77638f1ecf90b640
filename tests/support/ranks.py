"""The ranks of an engine as threads of one process, joined by gloo as processes would be."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist

from octavo.config.engine import EngineConfig
from octavo.config.parallel import Place, place_of
from octavo.core.plan import Masks, Plan, StepResult, decode_plan, encode_plan
from octavo.parallel import connect
from octavo.worker import Step, Worker


@dataclass
class Pending:
    step: Future[Step | None]

    def result(self) -> StepResult:
        step = self.step.result()
        assert step is not None
        return step.result()


class Ranks:
    """An Executor whose ranks run in threads; `workers` are in the order of ranks."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        store = dist.HashStore()  # type: ignore[attr-defined]
        parallel = config.parallel
        places = [place_of(rank, parallel.tensor, parallel.pipeline) for rank in range(parallel.ranks)]
        self._threads = [ThreadPoolExecutor(1, f"rank {rank}") for rank in range(len(places))]

        def connected(place: Place) -> Worker:
            return Worker(config, connect(place, store, torch.device("cpu")))

        made = [thread.submit(connected, place) for thread, place in zip(self._threads, places, strict=True)]
        self.workers = [future.result() for future in made]

    def load(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        for loaded in [t.submit(w.load) for t, w in zip(self._threads, self.workers, strict=True)]:
            loaded.result()

    def warm_up(self) -> None:
        """Nothing is recorded between ranks of a CPU."""

    def launch(self, plan: Plan) -> Callable[[Masks | None], Pending]:
        frame = encode_plan(plan)
        forwards = [
            thread.submit(worker.forward, decode_plan(frame))
            for thread, worker in zip(self._threads, self.workers, strict=True)
        ]

        def sample(masks: Masks | None) -> Pending:
            def one(rank: int) -> Step | None:
                worker, forward = self.workers[rank], forwards[rank].result()
                return worker.sample(forward, masks) if worker.samples else worker.expect(forward)

            steps = [thread.submit(one, rank) for rank, thread in enumerate(self._threads)]
            return Pending(steps[0])

        return sample

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()
