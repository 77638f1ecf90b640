"""A backend that answers what a test tells it, some tokens at a time. Its vocabulary has the control tokens of a
tool and a reasoning format.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import msgspec
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from octavo.core.request import Delta, Request
from octavo.frontend.inputs import InputProcessor
from octavo.server import ServerSettings, create_app
from octavo.text import ChatTemplate, Tokenizer, load_tokenizer
from octavo.text.parsing import REASONING_FORMATS, TOOL_FORMATS
from octavo.text.pieces import BYTE_OF
from tests.frontend.tiny import EOS, tiny_config
from tests.server import echo
from tests.server.echo import EchoBackend

LAST = "{{ messages[-1].content }}{% if add_generation_prompt %}<assistant>{% endif %}"


@cache
def marker_tokenizer(tool: str, reasoning: str) -> Tokenizer:
    """Token i is byte i, 256 is <eos>, then come the markers of two formats as control tokens."""
    markers = sorted({*TOOL_FORMATS[tool].markers, *REASONING_FORMATS[reasoning].markers})
    fast = FastTokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<eos>", *markers)])
    with TemporaryDirectory() as directory:
        fast.save(str(Path(directory) / "tokenizer.json"))
        return load_tokenizer(Path(directory))


class ScriptedBackend(EchoBackend):
    """Choice c answers `answers[c]`, and then <eos>; a step has 1 to `most` tokens."""

    def __init__(
        self,
        answers: Sequence[str],
        *,
        template: str = LAST,
        formats: tuple[str, str] = ("hermes", "qwen3"),
        most: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        tokenizer = self.tokenizer = marker_tokenizer(*formats)
        size = max(tokenizer.special_ids) + 1
        self.config = tiny_config(4096, vocab_size=size)
        self.facts = self.config.model
        self.chat_template = ChatTemplate(template, tokenizer)
        self.inputs = InputProcessor(self.config, tokenizer)
        self._answers = [[*tokenizer.encode(answer, add_special_tokens=False), EOS] for answer in answers]
        self._most = most
        self._random = random.Random(seed)

    def script(self, request: Request) -> Iterator[list[Delta]]:
        assert request.params.max_tokens is not None
        left = [answer[: request.params.max_tokens] for answer in self._answers[: request.params.n]]
        while any(left):
            deltas = []
            for index, tokens in enumerate(left):
                step = min(len(tokens), self._random.randint(1, self._most))
                if step:
                    deltas.append(self._delta(request, index, tokens[:step], last=step == len(tokens)))
                    left[index] = tokens[step:]
            yield deltas

    def _delta(self, request: Request, index: int, tokens: list[int], *, last: bool) -> Delta:
        delta = Delta(request.id, index, tokens)
        if last:
            delta.finish_reason = "stop" if tokens[-1] == EOS else "length"
        if request.params.logprobs is not None:
            delta.logprobs = [echo.candidates(token, request.params.logprobs) for token in tokens]
        return delta


@asynccontextmanager
async def client_of(backend: EchoBackend, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app over `backend`."""
    app = create_app(backend, ServerSettings(served_model_names=("scripted",), **settings))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as client:
        yield client


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a streamed answer."""
    assert answer.status_code == 200, answer.text
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [msgspec.json.decode(event.removeprefix("data: ")) for event in events]


def function(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """A tool of a request."""
    shape = parameters if parameters is not None else {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "parameters": shape}}
