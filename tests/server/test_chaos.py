"""500 aborted, disconnected and malformed requests against a real engine leave nothing behind and disturb nobody."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.config import EngineArgs
from octavo.frontend import AsyncLLM
from octavo.server import ServerSettings, bind, url_of
from octavo.server.run import Stop, serve_app
from tests.frontend.tiny import EOS, VOCAB, byte_tokenizer
from tests.support.tiny import write_tiny

SEQS = 12
STREAMS = [{"prompt": f"stream {i} begins here", "seed": i, "temperature": 0.9, "max_tokens": 150} for i in range(8)]
CHAOS = 500
MALFORMED: list[bytes] = [
    b"{", b"[]", b'{"prompt": 5}', b'{"prompt": "x", "typo": 1}', b'{"prompt": "x", "temperature": "hot"}',
    b'{"prompt": "\xff"}', b'{"prompt": []}', b'{"prompt": [999999]}', b'{"prompt": "x", "n": 1000000}',
    json.dumps({"prompt": "long " * 1000}).encode(), b'{"prompt": "x", "max_tokens": 100000}', b"\x00" * 100,
]  # fmt: skip


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[AsyncLLM, str]]:
    write_tiny("mixed", tmp_path, vocab_size=VOCAB, eos_token_id=EOS, max_position_embeddings=256)
    monkeypatch.setattr("octavo.frontend.async_llm.open_tokenizer", lambda args, facts: byte_tokenizer())
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = EngineArgs(
        model=str(tmp_path), dtype="float64", device="cpu", block_size=4, max_num_seqs=SEQS, max_model_len=256,
        max_num_batched_tokens=64, num_gpu_blocks_override=3 * 130,
    )  # fmt: skip
    llm = await AsyncLLM.start(args)
    stop, ready, sock = Stop(), asyncio.Event(), bind("127.0.0.1", 0)
    settings = ServerSettings(served_model_names=("tiny",), shutdown_grace=0.1)
    serving = asyncio.create_task(serve_app(sock, llm, settings, stop, on_ready=ready.set))
    await ready.wait()
    yield llm, url_of(sock)
    stop.ask()
    await serving
    await llm.shutdown()


async def stream_text(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    text = ""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True, "ignore_eos": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    return text


async def streams(url: str) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return await asyncio.gather(*(stream_text(client, body) for body in STREAMS))


async def leave_stream(client: httpx.AsyncClient, rng: random.Random) -> None:
    """Reads a few chunks of a stream, or none, and hangs up."""
    body = {"prompt": "gone soon", "max_tokens": 200, "n": rng.choice([1, 2]), "stream": True, "ignore_eos": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.aiter_lines()
        for _ in range(rng.randrange(6)):
            await anext(lines)


async def leave_waiting(client: httpx.AsyncClient, rng: random.Random) -> None:
    """Hangs up on an answer that has not come."""
    body = {"prompt": [rng.randrange(256) for _ in range(40)], "max_tokens": 200, "ignore_eos": True}
    with pytest.raises(httpx.TimeoutException):
        await client.post("/v1/completions", json=body, timeout=httpx.Timeout(5, read=rng.uniform(0.001, 0.2)))


async def send_nonsense(client: httpx.AsyncClient, rng: random.Random) -> None:
    response = await client.post("/v1/completions", content=rng.choice(MALFORMED))
    assert 400 <= response.status_code < 500
    assert response.json()["error"]["message"]


async def hang_up_early(client: httpx.AsyncClient, rng: random.Random) -> None:
    """Closes the connection inside the request."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 30\r\n\r\n"
    request = head + b'{"prompt": "x", "max_tokens": '
    _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(request[: rng.randrange(1, len(request))])
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def disturb(url: str) -> None:
    rng = random.Random(0)
    kinds = (leave_stream, leave_waiting, send_nonsense, hang_up_early)
    gate = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def one(kind: Any, seed: int) -> None:
            async with gate:
                await kind(client, random.Random(seed))

        await asyncio.gather(*(one(rng.choice(kinds), i) for i in range(CHAOS)))


async def idle(llm: AsyncLLM) -> None:
    while llm.stats.running or llm.stats.waiting or llm.stats.kv_blocks_used:
        await asyncio.sleep(0)


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def test_chaos_leaves_nothing_and_disturbs_nobody(server: tuple[AsyncLLM, str]) -> None:
    llm, url = server
    undisturbed = await streams(url)
    assert len(set(undisturbed)) == len(STREAMS)
    await idle(llm)
    engine = llm.engine_pid
    tasks = len(asyncio.all_tasks())
    files = open_files(os.getpid()), open_files(engine)

    disturbed, _ = await asyncio.gather(streams(url), disturb(url))
    assert disturbed == undisturbed

    async with asyncio.timeout(30):
        await idle(llm)
        while len(asyncio.all_tasks()) > tasks or open_files(os.getpid()) > files[0]:
            await asyncio.sleep(0.01)  # connections that the server is still closing
    assert open_files(engine) == files[1]

    most = 0
    bodies = [body | {"max_tokens": 20} for body in STREAMS] + [{"prompt": "more", "max_tokens": 20}] * 8
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        work = asyncio.gather(*(stream_text(client, body) for body in bodies))
        while not work.done():
            most = max(most, llm.stats.running)
            await asyncio.sleep(0)
    assert most == SEQS, "a row was lost"
