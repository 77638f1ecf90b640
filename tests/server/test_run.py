from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from octavo.core.errors import ConfigError
from octavo.server import bind, serve, url_of
from tests.server.echo import EchoBackend
from tests.server.live import SETTINGS

ROOT = Path(__file__).parents[2]
SERVER = """
import asyncio
from octavo.server import bind, serve
from tests.server.echo import EchoBackend
from tests.server.live import SETTINGS

sock = bind("127.0.0.1", 0)
backend = EchoBackend()

async def start():
    print("loading", flush=True)
    await asyncio.sleep({load_seconds})
    return backend

try:
    serve(sock, start, SETTINGS, on_ready=lambda backend, url: print(url, flush=True))
finally:
    print("closed" if backend.closed else "never started", flush=True)
"""


def run(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_a_busy_port_is_named() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*--port"):
            bind("127.0.0.1", port)


def test_an_impossible_host_is_named() -> None:
    with pytest.raises(ConfigError, match=r"203\.0\.113\.7"):
        bind("203.0.113.7", 0)
    for host in ("no such host", "a" * 100):
        with pytest.raises(ConfigError, match="--host"):
            bind(host, 0)


def test_what_the_start_raises_comes_through() -> None:
    async def start() -> EchoBackend:
        raise ConfigError("too little memory")

    sock = bind("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="too little memory"):
        serve(sock, start, SETTINGS)
    assert sock.fileno() == -1, "the port is free again"


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")])
def test_the_url_is_one_to_connect_to(host: str, shown: str) -> None:
    with bind(host, 0) as sock:
        assert url_of(sock) == f"http://{shown}:{sock.getsockname()[1]}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_quietly(number: signal.Signals) -> None:
    """An idle connection and an endless stream are open; the stream is told after the grace of 0.2 s."""
    with run(SERVER.format(load_seconds=0)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        url = process.stdout.readline().strip()
        with (
            httpx.Client() as client,
            client.stream("POST", f"{url}/v1/completions", json={"prompt": "HANG", "stream": True}) as stream,
            socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))),
        ):
            lines = stream.iter_lines()
            assert next(lines).startswith("data:")
            process.send_signal(number)
            assert any("shutting down" in line for line in lines)
        out, err = process.communicate(timeout=10)
    assert (out, err, process.returncode) == ("closed\n", "", 0)


def test_a_signal_while_loading_ends_it_quietly() -> None:
    with run(SERVER.format(load_seconds=60)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (out, err, process.returncode) == ("never started\n", "", 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_dead_engine_ends_it_after_its_clients_have_heard(stream: bool) -> None:
    with run(SERVER.format(load_seconds=0)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        url = process.stdout.readline().strip()
        with httpx.Client() as client:
            answer = client.post(f"{url}/v1/completions", json={"prompt": "DIE now", "stream": stream})
            assert "the engine has stopped: out of luck" in answer.text
            out, err = process.communicate(timeout=10)
    assert out == "closed\n"
    assert err.endswith("octavo.core.errors.EngineDead: out of luck\n")
    assert process.returncode == 1


def test_importing_leaves_torch_unimported() -> None:
    code = "import sys, octavo.server; print('torch' in sys.modules, 'transformers' in sys.modules)"
    with run(code) as process:
        out, err = process.communicate(timeout=30)
    assert (out, err) == ("False False\n", "")
