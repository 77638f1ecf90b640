"""Seconds from the start of `octavo serve` to the first token of a streamed chat answer.

    python -m benchmarks.first_token [--runs 5] [--cold] [-- SERVE ARGUMENTS]

A server is a new process each time; the request goes out as soon as its port accepts connections. `--cold` gives each
one an empty folder for compiled kernels. Prints each run, with the seconds of the same request sent once more, and the
medians.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection

HOST = "127.0.0.1"
POLL = 0.01
LINE = "port {:.2f} s, first token {:.2f} s, answer {:.2f} s; second request {:.2f} s"
LIMIT = 60.0
"""Seconds that a server may take to accept connections."""
BODY = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 12,
    "temperature": 0,
    "stream": True,
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(POLL)
    raise SystemExit(f"octavo serve did not accept connections on port {port}; exit code {server.poll()}")


def _ask(port: int) -> tuple[float, float]:
    """time.monotonic() at the first piece of content, and at the end."""
    connection = HTTPConnection(HOST, port, timeout=LIMIT)
    connection.request("POST", "/v1/chat/completions", json.dumps(BODY), {"Content-Type": "application/json"})
    response = connection.getresponse()
    first = None
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if not data.startswith(b"{"):
            continue
        choices = json.loads(data).get("choices")
        if first is None and choices and choices[0]["delta"].get("content"):
            first = time.monotonic()
    connection.close()
    if first is None:
        raise SystemExit(f"no token came: status {response.status}")
    return first, time.monotonic()


def _run(arguments: list[str], environment: dict[str, str]) -> tuple[float, float, float, float]:
    """Seconds from the start to the open port, the first token, the answer's end; seconds of the second request."""
    port = _free_port()
    command = [sys.executable, "-m", "octavo.cli", "serve", "--host", HOST, "--port", str(port), *arguments]
    began = time.monotonic()
    server = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
    try:
        _wait(server, port)
        opened = time.monotonic()
        first, end = _ask(port)
        again = time.monotonic()
        _, last = _ask(port)
    finally:
        server.terminate()
        server.wait(LIMIT)
    return opened - began, first - began, end - began, last - again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("arguments", nargs="*")
    given = parser.parse_args()
    found = []
    for _ in range(given.runs):
        with tempfile.TemporaryDirectory() as folder:
            found.append(_run(given.arguments, {"OCTAVO_CACHE": folder} if given.cold else {}))
        print(LINE.format(*found[-1]), flush=True)
    print("medians:", LINE.format(*map(statistics.median, zip(*found, strict=True))))


if __name__ == "__main__":
    main()
