"""Hostile bodies against a real server, while somebody else streams from it.

python -m benchmarks.hostile [--slow]

Starts `octavo serve` with the embedded model and prints, for each body, the status and size of the answer, how long it
took and the longest gap between two events of the stream meanwhile. Every body must get a 4xx of less than 16 KiB
within a second, and no gap may exceed 250 ms. Constraints that cost much and are legal may be answered with 200 and
a token. Exits 1 over a limit. `--slow` prints only what is over a limit or half of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx

from tests.server.test_hostile import CHATS, HOSTILE, chat_body
from tests.structured.test_grammar import HOSTILE as CONSTRAINTS
from tests.text.test_sandbox import LARGE_VALUES, LONG_LOOPS, LONG_TO_COMPILE

ROOT = Path(__file__).parents[1]
MAX_BYTES, MAX_SECONDS, MAX_GAP = 16_384, 1.0, 0.25
SERVER = ("--quantization", "native", "--max-model-len", "2048", "--trust-request-chat-template")
USER = [{"role": "user", "content": "a"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def bodies() -> Iterator[tuple[str, str, bytes, bool]]:
    """(name, path, body, whether it must be refused)."""
    for name, (body, _) in HOSTILE.items():
        yield name, COMPLETIONS, body, True
        yield f"{name}, chat", CHAT, body, True
    for name in CHATS:
        yield name, CHAT, chat_body(name), True
    for i, source in enumerate([*LONG_LOOPS, *LARGE_VALUES, *LONG_TO_COMPILE]):
        yield f"template {i}", CHAT, json.dumps({"messages": USER, "chat_template": source}).encode(), True
    for i, make in enumerate(CONSTRAINTS):
        wanted = {"prompt": "a", "max_tokens": 1, "structured_outputs": make()}
        with contextlib.suppress(RecursionError):
            yield f"constraint {i}", COMPLETIONS, json.dumps(wanted).encode(), False


def watch(url: str, moments: Connection) -> None:
    """Streams from the server for ever and tells the moment of each event; None where a stream begins."""
    body = {"prompt": "Once upon a time", "stream": True, "ignore_eos": True, "max_tokens": 1500}
    with httpx.Client(base_url=url, timeout=60) as client:
        while True:
            moments.send(None)
            with client.stream("POST", COMPLETIONS, json=body) as stream:
                for _ in stream.iter_raw():
                    moments.send(time.monotonic())


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The URL of a server process that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "octavo.cli", "serve", *SERVER, "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until_ready(url, process)
            yield url
        finally:
            process.terminate()


def until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """The port is bound before the model is loaded; a request waits until the server answers."""
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/health", timeout=60).raise_for_status()
            return
        time.sleep(0.05)
    raise SystemExit(f"the server ended with exit code {process.returncode}")


class Stream:
    """Somebody else's stream, read in a process of its own."""

    def __init__(self, url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._moments, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=watch, args=(url, sender), daemon=True)
        self._process.start()
        self._last: float | None = None
        self.gap(10)

    def gap(self, events: int) -> float:
        """The longest gap up to the time of this call and `events` events more."""
        began, longest = time.monotonic(), 0.0
        while events:
            moment = self._moments.recv()
            if moment is not None and self._last is not None:
                longest = max(longest, moment - self._last)
            self._last = moment
            events -= moment is not None and moment > began
        return longest

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true")
    given = parser.parse_args()
    over = 0
    worst: list[Any] = [0, 0.0, 0.0]
    row = "{:28} {:>6} {:>6} {:>7} {:>8}  {}"
    print(row.format("body", "status", "bytes", "s", "gap ms", ""))
    with served() as url, httpx.Client(base_url=url, timeout=60) as client:
        stream = Stream(url)
        count = 0
        for name, path, body, refused in bodies():
            stream.gap(1)
            began = time.perf_counter()
            answer = client.post(path, content=body)
            seconds = time.perf_counter() - began
            gap = stream.gap(2)
            status = answer.status_code
            kept = 400 <= status < 500 or (status == 200 and not refused)
            found = [len(answer.content), seconds, gap]
            shares = [value / limit for value, limit in zip(found, (MAX_BYTES, MAX_SECONDS, MAX_GAP), strict=True)]
            bad = not kept or max(shares) >= 1
            over, count = over + bad, count + 1
            worst = [max(a, b) for a, b in zip(worst, found, strict=True)]
            if not given.slow or bad or max(shares) > 0.5:
                size = len(answer.content)
                print(row.format(name, status, size, f"{seconds:.3f}", f"{gap * 1e3:.0f}", "OVER" if bad else ""))
        stream.close()
    print(f"{count} bodies, {over} over a limit; most: {worst[0]} bytes, {worst[1]:.3f} s, gap {worst[2] * 1e3:.0f} ms")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
