"""A server's chat completions, asked one thing at a time and read as they stream.

Owns the HTTP side of `octavo chat`: what is sent, how answers and errors are read. Not what is shown, nor the history.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import httpx
import msgspec

from octavo.cli.session import Answer
from octavo.core.errors import ConfigError, OctavoError

Message = Mapping[str, str]

_TIMEOUT = httpx.Timeout(10.0, read=None)
"""An answer may take as long as it takes: the one who waits can end it."""


class ServerError(OctavoError):
    """What the server said instead of an answer; `code` as in its error object."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class Listener(Protocol):
    """Takes an answer piece by piece."""

    def think(self, text: str) -> None: ...
    def say(self, text: str) -> None: ...


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """What older servers call `reasoning`."""


class _Choice(msgspec.Struct):
    delta: _Delta
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Error(msgspec.Struct):
    message: str
    code: str | int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _Refusal(msgspec.Struct):
    error: _Error


class _Card(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Card]


class ChatServer:
    """A server that answers at `url`, and the model asked for. Made by `connect`."""

    def __init__(self, http: httpx.Client, url: str, model: str) -> None:
        self.url, self.model = url, model
        self._http = http

    def ask(self, messages: Sequence[Message], settings: Mapping[str, Any], listener: Listener) -> Answer:
        """The answer to `messages`; `settings` are further fields of the request.

        Ctrl-C ends the answer, whose finish_reason is then "abort". Raises ServerError.
        """
        answer = Answer()
        usage = {"include_usage": True, "continuous_usage_stats": True}  # an answer that is cut short is counted too
        body = {**settings, "model": self.model, "messages": messages, "stream": True, "stream_options": usage}
        begin = time.monotonic()
        try:
            with self._http.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _refusal(response)
                for chunk in _chunks(response.iter_lines()):
                    _take(chunk, answer, listener, begin)
        except KeyboardInterrupt:
            answer.finish_reason = "abort"
        except httpx.HTTPError as error:
            raise _silent(self.url, error) from None
        return answer


def _take(chunk: _Chunk, answer: Answer, listener: Listener, begin: float) -> None:
    if chunk.error is not None:
        raise ServerError(chunk.error.message, _code(chunk.error))
    if chunk.usage is not None:
        answer.num_tokens = chunk.usage.completion_tokens
    for choice in chunk.choices:
        answer.finish_reason = choice.finish_reason or answer.finish_reason
        thought = choice.delta.reasoning or choice.delta.reasoning_content or ""
        said = choice.delta.content or ""
        if thought or said:
            answer.last = time.monotonic() - begin
            answer.first = answer.first or answer.last
        if thought:
            answer.reasoning += thought
            listener.think(thought)
        if said:
            answer.text += said
            listener.say(said)


def _chunks(lines: Iterable[str]) -> Iterator[_Chunk]:
    """The chunks of a stream of server-sent events."""
    for line in lines:
        name, _, data = line.partition(":")
        if name == "data" and (data := data.strip()) != "[DONE]":
            yield _decode(data, _Chunk)


T = TypeVar("T")


def _decode(data: str | bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ServerError(f"the server does not speak OpenAI's API: {error}") from None


def _refusal(response: httpx.Response) -> ServerError:
    try:
        error = _decode(response.content, _Refusal).error
    except ServerError:
        return ServerError(f"the server answers {response.status_code} {response.reason_phrase}")
    return ServerError(error.message, _code(error))


def _code(error: _Error) -> str | None:
    return None if error.code is None else str(error.code)


def _silent(url: str, error: Exception) -> ServerError:
    return ServerError(f"no answer from {url}: {error or type(error).__name__}")


@contextmanager
def connect(url: str, key: str | None, model: str | None, *, trust_env: bool = True) -> Iterator[ChatServer]:
    """A server whose API is under `url`, with or without /v1; `model` None takes the first that it serves.

    `trust_env` lets the environment name a proxy. Raises ConfigError when the server does not answer or refuses `key`.
    """
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        http = httpx.Client(base_url=base, headers=headers, timeout=_TIMEOUT, trust_env=trust_env)
    except (httpx.InvalidURL, UnicodeEncodeError) as error:
        raise ConfigError(f"cannot ask {base}: {error}") from None
    with http:
        try:
            served = _models(http, base)
        except ServerError as error:
            raise ConfigError(f"cannot chat: {error}") from None
        if model is None and not served:
            raise ConfigError(f"cannot chat: {base} serves no model")
        yield ChatServer(http, base, model if model is not None else served[0])


def _models(http: httpx.Client, url: str) -> list[str]:
    try:
        response = http.get("models", timeout=10)
    except httpx.HTTPError as error:
        raise _silent(url, error) from None
    if response.status_code != 200:
        raise _refusal(response)
    return [card.id for card in _decode(response.content, _Models).data]
