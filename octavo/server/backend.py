"""What the server needs of an engine, and what its operator may set. Owns no behaviour.

`octavo.frontend.AsyncLLM` is the real backend; the tests have a scripted one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from octavo.server.formats import check_parser_names

if TYPE_CHECKING:
    from octavo.config.engine import EngineConfig
    from octavo.core.errors import EngineDead
    from octavo.core.facts import ModelFacts
    from octavo.core.params import SamplingParams
    from octavo.core.request import Stats
    from octavo.frontend.inputs import Prompt
    from octavo.frontend.outputs import RequestOutput
    from octavo.text import ChatTemplate, Tokenizer


class Backend(Protocol):
    """A running engine. Every method is called on the event loop."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def facts(self) -> ModelFacts: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def chat_template(self) -> ChatTemplate | None: ...
    @property
    def stats(self) -> Stats: ...

    def default_params(self, max_tokens: int | None = None, **given: Any) -> SamplingParams:
        """The request's values over the model's defaults. Thread-safe. Raises InvalidRequest."""
        ...

    def generate(
        self, prompt: Prompt, params: SamplingParams, request_id: str, *, stream: bool, shown: frozenset[int]
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `AsyncLLM.generate`."""
        ...

    async def check_health(self) -> None:
        """Raises EngineDead."""
        ...

    async def death(self) -> EngineDead:
        """Waits for the engine's end, which every generator is told of, and says how it ended."""
        ...

    async def shutdown(self) -> None: ...


@dataclass(frozen=True)
class ServerSettings:
    """What an operator decides about the HTTP side. Raises ConfigError for parsers that there are not."""

    served_model_names: tuple[str, ...]
    """Names that requests may use; responses without one and /v1/models begin with the first."""
    api_keys: tuple[str, ...] = ()
    """One of them must come as bearer token on every route but /health; none asks for no key."""
    max_body_bytes: int = 8 * 2**20
    """Decoding a body of this size into millions of objects stops the event loop for about 0.1 s."""
    trust_request_chat_template: bool = False
    """Whether a request may bring its own chat template."""
    tool_call_parser: str = "auto"
    """A format of `text.parsing`; auto is what the chat template shows, none reads no calls."""
    reasoning_parser: str = "auto"
    """Likewise; none leaves reasoning in the content."""
    shutdown_grace: float = 5.0
    """Seconds that open requests have to finish once the server is told to stop."""

    def __post_init__(self) -> None:
        assert self.served_model_names, "a server has at least one model name"
        check_parser_names(self.tool_call_parser, self.reasoning_parser)
