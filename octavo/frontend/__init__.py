"""Frontend: from a prompt to tokens for the engine, and from token deltas back to text.

Owns: validation and tokenizing (`inputs`), detokenizing, stop strings and results (`process`, `outputs`), the engine
process (`launch`) and its messages (`client`), starting up (`startup`) and the asynchronous API over them
(`async_llm`). Does not own HTTP (`server`) or anything that computes; importing it leaves torch unimported. Names are
imported when first used: `launch` comes before all else. Start at `async_llm`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.frontend.async_llm import AsyncLLM
    from octavo.frontend.inputs import InputProcessor, Prompt
    from octavo.frontend.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from octavo.frontend.process import OutputProcessor

_HOMES = {
    "async_llm": ("AsyncLLM",),
    "inputs": ("InputProcessor", "Prompt"),
    "outputs": ("CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"),
    "process": ("OutputProcessor",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncLLM",
    "CompletionOutput",
    "InputProcessor",
    "Logprob",
    "OutputProcessor",
    "Prompt",
    "RequestMetrics",
    "RequestOutput",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
