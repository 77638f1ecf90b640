"""Who runs the plans: the seam between the engine's loop and its workers.

Owns the Protocol and the executor of one rank in the engine's own process; `ranks` has that of several. Decides
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from octavo.config.engine import EngineConfig
from octavo.core.errors import ConfigError, OctavoError
from octavo.core.plan import Masks, Plan, StepResult

if TYPE_CHECKING:
    from octavo.worker import Worker

Progress = Callable[[str, int, int], None]


class Sampled(Protocol):
    def result(self) -> StepResult:
        """Waits for the step's tokens."""
        ...


Sample = Callable[[Masks | None], Sampled]


class Executor(Protocol):
    """Runs plans on all ranks, in order."""

    def load(self, progress: Progress | None = None) -> None: ...

    def warm_up(self) -> None:
        """Compiles and captures ahead of time what steps would otherwise prepare when they first need it."""
        ...

    def launch(self, plan: Plan) -> Sample:
        """Launches the forward pass; calling the result launches sampling, under masks or none."""
        ...

    def close(self) -> None:
        """Ends what the executor has started. Safe to call twice."""
        ...


def executor_for(config: EngineConfig, on_death: Callable[[OctavoError], None] | None = None) -> Executor:
    """The executor of the configuration's ranks; `on_death` hears of the death of one that is another process.

    Raises ConfigError when the backend is not installed.
    """
    if config.parallel.ranks == 1 and config.parallel.backend == "mp":
        return InlineExecutor(config)
    from octavo.engine.ranks import RanksExecutor

    if config.parallel.backend == "ray":
        if find_spec("ray") is None:
            raise ConfigError(
                "--distributed-executor-backend is 'ray', which is not installed: pip install 'ray>=2.40'"
            )
        from octavo.engine.ray import Actors

        return RanksExecutor(config, Actors, on_death)
    from octavo.engine.processes import Processes

    return RanksExecutor(config, Processes, on_death)


class InlineExecutor:
    """One rank, in this process."""

    def __init__(self, config: EngineConfig, worker: Worker | None = None) -> None:
        if worker is None:
            from octavo.worker import Worker

            worker = Worker(config)
        self._worker = worker

    def load(self, progress: Progress | None = None) -> None:
        self._worker.load(progress)

    def warm_up(self) -> None:
        self._worker.warm_up()

    def launch(self, plan: Plan) -> Sample:
        forward = self._worker.forward(plan)
        return lambda masks: self._worker.sample(forward, masks)

    def close(self) -> None:
        """Nothing was started."""
