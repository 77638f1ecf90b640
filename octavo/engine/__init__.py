"""The loop that turns requests into tokens.

Owns the joining of scheduler and executor, running ahead, failure of steps, and the engine process. Does not own policy
(`scheduler`), devices (`worker`) or text (`frontend`). Start reading at engine.py; executor.py runs its plans,
loop.py puts it behind sockets.
"""

from octavo.engine.engine import Engine
from octavo.engine.executor import Executor, InlineExecutor

__all__ = ["Engine", "Executor", "InlineExecutor"]
