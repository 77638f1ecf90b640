"""Frontend: from a prompt to tokens for the engine, and from token deltas back to text.

Owns: validation and tokenizing (`inputs`), detokenizing, stop strings and results (`process`, `outputs`), the engine
process and its messages (`client`), starting up (`startup`) and the asynchronous API over them (`async_llm`). Does
not own HTTP (`server`) or anything that computes; importing it leaves torch unimported. Start at `async_llm`.
"""

from octavo.frontend.async_llm import AsyncLLM
from octavo.frontend.inputs import InputProcessor, Prompt
from octavo.frontend.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from octavo.frontend.process import OutputProcessor

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
