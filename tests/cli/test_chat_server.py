"""`octavo chat` against servers: a live one over the scripted engine, one of its own, and ill-behaved ones."""

from __future__ import annotations

import argparse
import io
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from octavo.cli import chat, own, session
from octavo.cli.remote import ChatServer, ServerError, _models, connect
from octavo.config.args import EngineArgs
from octavo.core.errors import ConfigError, EngineDead, InvalidRequest
from octavo.server import ServerSettings
from tests.server.echo import EchoBackend
from tests.server.live import Live

ECHO = "<user>{}<assistant>"


class Heard:
    """What came, in order: reasoning in parentheses. `then` is called after each piece."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.text = ""
        self.then = then

    def think(self, text: str) -> None:
        self.text += f"({text})"
        self.then()

    def say(self, text: str) -> None:
        self.text += text
        self.then()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    server = Live(ServerSettings(served_model_names=("echo", "other"), api_keys=("secret",), shutdown_grace=0.2))
    yield server
    server.stop()


@pytest.fixture
def server(live: Live) -> Iterator[ChatServer]:
    with connect(live.url, "secret", None) as server:
        yield server


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_an_answer_streams_with_its_figures(server: ChatServer) -> None:
    heard = Heard()
    answer = server.ask(user("hello"), {}, heard)
    assert heard.text == answer.text == ECHO.format("hello")
    assert answer.num_tokens == len(ECHO.format("hello")) + 1
    assert 0 < answer.first <= answer.last
    assert answer.finish_reason == "stop"


def test_settings_are_honoured(server: ChatServer, live: Live) -> None:
    answer = server.ask(user("hello"), {"max_tokens": 5, "temperature": 0.25}, Heard())
    assert (answer.num_tokens, answer.finish_reason) == (5, "length")
    assert live.backend.requests[-1].params.temperature == 0.25


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [("x" * 5000, {}, "5"), ("hi", {"top_p": 7}, "top_p is 7"), ("FAIL", {}, "kernel panic")],
)
def test_errors_carry_the_servers_message(
    server: ChatServer, text: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ServerError, match=message):
        server.ask(user(text), settings, Heard())
    assert server.ask(user("on"), {}, Heard()).text == ECHO.format("on")


def test_ctrl_c_ends_the_answer_here_and_there(server: ChatServer, live: Live) -> None:
    def interrupt() -> None:
        if len(heard.text) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    heard = Heard(interrupt)
    answer = server.ask(user("HANG"), {}, heard)
    assert answer.finish_reason == "abort"
    assert answer.text == heard.text
    assert answer.num_tokens >= 3
    assert live.backend.idle.wait(10)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_in_v1(live: Live, suffix: str) -> None:
    with connect(live.url + suffix, "secret", None) as server:
        assert server.model == "echo"
        assert server.ask(user("x"), {}, Heard()).text


def test_a_model_is_asked_for_by_name(live: Live) -> None:
    with connect(live.url, "secret", "other") as server:
        assert server.ask(user("x"), {}, Heard()).text
    with connect(live.url, "secret", "none") as server, pytest.raises(ServerError, match="none"):
        server.ask(user("x"), {}, Heard())


def test_a_server_that_cannot_be_had_is_a_mistake_in_what_was_typed(live: Live) -> None:
    with pytest.raises(ConfigError, match="key"), connect(live.url, "wrong", None):
        pass
    for url in ("http://127.0.0.1:1", "127.0.0.1:8000"):
        with pytest.raises(ConfigError, match="no answer from"), connect(url, None, None):
            pass
    for url, key in (("http://127.0.0.1:1\n", None), (live.url, "clé")):
        with pytest.raises(ConfigError, match="cannot ask"), connect(url, key, None):
            pass


def test_what_is_no_openai_server_is_described() -> None:
    with pytest.raises(ServerError, match="does not speak"):
        _models(_transport("{}"), "http://x")
    with pytest.raises(ServerError, match="404"):
        _models(_transport("", 404), "http://x")


def _transport(body: str, status: int = 200) -> httpx.Client:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=body))
    return httpx.Client(transport=transport, base_url="http://x")


def scripted(*events: str, status: int = 200) -> ChatServer:
    body = "".join(f"data: {event}\n\n" for event in events)
    return ChatServer(_transport(body, status), "http://x", "m")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_told_apart(name: str) -> None:
    heard = Heard()
    answer = scripted(
        '{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": null}',
        f'{{"choices": [{{"delta": {{"{name}": "hm"}}}}]}}',
        '{"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]}',
        '{"choices": [], "usage": {"completion_tokens": 7}}',
        "[DONE]",
    ).ask(user("x"), {}, heard)
    assert heard.text == "(hm)yes"
    assert (answer.reasoning, answer.text, answer.num_tokens, answer.finish_reason) == ("hm", "yes", 7, "stop")


@pytest.mark.parametrize(
    ("event", "status", "message"),
    [
        ("nonsense", 200, "does not speak"),
        ('{"choices": [{"delta": 5}]}', 200, "does not speak"),
        ('{"error": {"message": "too bad", "code": 500}}', 200, "too bad"),
        ("nonsense", 502, "502 Bad Gateway"),
    ],
)
def test_ill_behaved_servers_are_described(event: str, status: int, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        scripted(event, status=status).ask(user("x"), {}, Heard())


def flags(**given: Any) -> argparse.Namespace:
    names = ("max_tokens", *session.SAMPLING, "system", "quick", "url", "key", "model_name")
    return argparse.Namespace(**dict.fromkeys(names) | given)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> EchoBackend:
    """The scripted engine in place of one that is started."""
    backend = EchoBackend()

    async def start(args: EngineArgs) -> EchoBackend:
        return backend

    monkeypatch.setattr(own, "start_engine", start)
    monkeypatch.setattr("octavo.cli.terminal.log_to_stderr", lambda *_: None)
    return backend


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_a_pipe_is_answered_line_by_line(
    engine: EchoBackend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "one\n/new\ntwo\n")
    assert chat.run(flags(system="S", temperature=0.5)) == 0
    out, err = capsys.readouterr()
    assert out == "<system>S<user>one<assistant>\n<system>S<user>two<assistant>\n"
    assert err.count("tokens/s") == 2
    assert "\x1b" not in out + err
    assert engine.requests[0].params.temperature == 0.5
    assert engine.closed


def test_a_failure_in_a_pipe_shows_in_the_exit_code(
    engine: EchoBackend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "FAIL\n/new\ntwo\n")
    assert chat.run(flags()) == 1
    out, err = capsys.readouterr()
    assert "kernel panic" in err
    assert out.endswith("<user>two<assistant>\n")


def test_one_question_from_the_command_line(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.run(flags(url=live.url, key="secret", quick="one", model_name="other")) == 0
    assert capsys.readouterr().out == ECHO.format("one") + "\n"


def test_the_key_comes_from_the_environment_too(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "secret")
    assert chat.run(flags(url=live.url, quick="one")) == 0


def test_a_dead_engine_of_its_own_ends_the_program(engine: EchoBackend) -> None:
    with pytest.raises(EngineDead, match="out of luck"):
        chat.run(flags(quick="DIE"))
    engine.dead = True
    with pytest.raises(EngineDead, match="it was told to"):
        chat.run(flags(quick="one"))


def test_a_model_without_a_template_cannot_chat(monkeypatch: pytest.MonkeyPatch, engine: EchoBackend) -> None:
    engine.chat_template = None
    with pytest.raises(ConfigError, match="octavo complete"):
        chat.run(flags(quick="one"))
    assert engine.closed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "http://127.0.0.1:1", "dtype": "float32"}, "leave out MODEL"),
        ({"url": "http://127.0.0.1:1", "model": "m"}, "leave out MODEL"),
        ({"model_name": "m"}, "--model-name is for a server that runs"),
        ({"key": "k"}, "--api-key is for a server that runs"),
    ],
)
def test_flags_that_contradict_each_other(engine: EchoBackend, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chat.run(flags(quick="one", **given))


def test_bad_sampling_values_start_nothing(engine: EchoBackend) -> None:
    with pytest.raises(InvalidRequest, match="top_p"):
        chat.run(flags(quick="one", top_p=2.0))
    assert not engine.closed
