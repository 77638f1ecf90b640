"""Octavo serves large language models.

`LLM` runs a model in this process, `AsyncLLM` in one of its own; the command line is `octavo.cli`. Names are imported
when first used, so that `import octavo` costs nothing and leaves torch unimported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.config import EngineArgs
    from octavo.core.errors import ConfigError, EngineDead, InvalidRequest, OctavoError, UnsupportedModel
    from octavo.core.params import SamplingParams
    from octavo.core.params import StructuredOutputs as StructuredOutputsParams
    from octavo.frontend import AsyncLLM, CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from octavo.llm import LLM

__version__ = "0.1.0"

_HOMES = {
    "octavo.config": ("EngineArgs",),
    "octavo.core.errors": ("ConfigError", "EngineDead", "InvalidRequest", "OctavoError", "UnsupportedModel"),
    "octavo.core.params": ("SamplingParams", "StructuredOutputs"),
    "octavo.frontend": ("AsyncLLM", "CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"),
    "octavo.llm": ("LLM",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_ALIASES = {"StructuredOutputsParams": "StructuredOutputs"}
"""vLLM's names of what is called otherwise here."""

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "EngineArgs",
    "EngineDead",
    "InvalidRequest",
    "Logprob",
    "OctavoError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "UnsupportedModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    own = _ALIASES.get(name, name)
    if own not in _HOME_OF:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[own]), own)


def __dir__() -> list[str]:
    return sorted(__all__)
