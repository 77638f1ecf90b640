"""A running server under load: Poisson arrivals of streamed completions, and the times of their tokens.

A client like any other: HTTP only, so it measures any server with OpenAI's /v1/completions that takes token ids.

    TTFT  from sending a request to its first token
    TPOT  from the first token to the last, by the tokens after the first
    ITL   between two chunks of a stream
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from octavo.bench.report import Result, emit, machine, percentiles, table
from octavo.bench.workloads import TOKEN_ID_LIMIT, uniform
from octavo.core.errors import ConfigError

COLUMNS = {"metric": "milliseconds", "mean": "mean", "p50": "p50", "p90": "p90", "p99": "p99"}


@dataclass
class Timing:
    """One request as its client saw it; moments in seconds of a monotonic clock."""

    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.sent

    @property
    def tpot(self) -> float:
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        return np.diff(self.chunks).tolist()


def run(namespace: argparse.Namespace) -> int:
    """`octavo bench serve`; 1 when a request failed."""
    result, errors = asyncio.run(_measure(namespace))
    metrics = [{"metric": name, **result[f"{name.lower()}_ms"]} for name in ("TTFT", "TPOT", "ITL", "E2E")]
    print(
        f"{result['completed']:,} requests in {result['seconds']:.2f} s, {result['failed']} failed: "
        f"{result['requests_per_s']:.2f} requests/s, {result['output_tokens_per_s']:,.0f} out tok/s, "
        f"{result['total_tokens_per_s']:,.0f} total tok/s"
    )
    print(table(COLUMNS, metrics))
    for error in errors[:3]:
        print(f"failed: {error}")
    emit(result, namespace.output_json)
    return 1 if errors else 0


async def _measure(namespace: argparse.Namespace) -> tuple[Result, list[str]]:
    base_url = namespace.base_url or f"http://{namespace.host}:{namespace.port}"
    key = namespace.api_key or os.environ.get("OCTAVO_API_KEY")
    async with httpx.AsyncClient(
        base_url=base_url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(None, connect=30.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    ) as client:
        model = namespace.model_flag or namespace.model or await _first_model(client)
        workload = uniform("serve", namespace.num_prompts, namespace.input_len, namespace.output_len)
        prompts = workload.prompts(min(TOKEN_ID_LIMIT, namespace.token_id_limit), namespace.seed)
        bodies = [
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": namespace.output_len,
                "temperature": namespace.temperature,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for prompt in prompts
        ]
        began = time.perf_counter()
        timings = await _send_all(client, bodies, namespace)
        seconds = time.perf_counter() - began
    load = {
        "model": model,
        "base_url": base_url,
        "input_len": namespace.input_len,
        "output_len": namespace.output_len,
        "request_rate": namespace.request_rate if math.isfinite(namespace.request_rate) else "inf",
        "max_concurrency": namespace.max_concurrency,
    }
    summary = summarise(timings, namespace.input_len, seconds)
    errors = [timing.error for timing in timings if timing.error is not None]
    return {"benchmark": "serve", **load, **summary, **machine()}, errors


async def _first_model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, LookupError, ValueError) as error:
        raise ConfigError(f"no model at {client.base_url}: {error!r}; start a server or give --base-url") from None


async def _send_all(
    client: httpx.AsyncClient, bodies: list[dict[str, Any]], namespace: argparse.Namespace
) -> list[Timing]:
    """Sends each body at its moment, waiting for a free place where the concurrency is limited."""
    gaps = np.random.default_rng(namespace.seed).exponential(1 / namespace.request_rate, len(bodies))
    places = asyncio.Semaphore(namespace.max_concurrency or len(bodies))

    async def send(body: dict[str, Any], delay: float) -> Timing:
        await asyncio.sleep(delay)
        async with places:
            return await stream_completion(client, body)

    moments = np.cumsum(gaps) - gaps[0]
    return await asyncio.gather(*(send(body, float(m)) for body, m in zip(bodies, moments, strict=True)))


async def stream_completion(client: httpx.AsyncClient, body: dict[str, Any]) -> Timing:
    """Sends one request and notes when its chunks come. Failures are in `error`."""
    timing = Timing(sent=time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                timing.error = f"HTTP {response.status_code}: {response.text[:200]}"
                return timing
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    _note(timing, json.loads(line[6:]))
    except (httpx.HTTPError, ValueError) as error:
        timing.error = repr(error)
    if timing.error is None and not (timing.chunks and timing.output_tokens):
        timing.error = "the stream ended without tokens or usage"
    return timing


def _note(timing: Timing, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        timing.error = str(chunk["error"])
    elif chunk.get("choices"):
        timing.chunks.append(time.perf_counter())
    if chunk.get("usage"):
        timing.output_tokens = chunk["usage"]["completion_tokens"]


def summarise(timings: list[Timing], input_len: int, seconds: float) -> Result:
    """Counts, rates and percentiles in milliseconds of the requests that succeeded."""
    good = [timing for timing in timings if timing.error is None]
    tokens = sum(timing.output_tokens for timing in good)
    return {
        "completed": len(good),
        "failed": len(timings) - len(good),
        "seconds": round(seconds, 4),
        "requests_per_s": round(len(good) / seconds, 3),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / seconds, 2),
        "total_tokens_per_s": round((tokens + input_len * len(good)) / seconds, 2),
        "ttft_ms": percentiles([timing.ttft for timing in good], 1e3),
        "tpot_ms": percentiles([timing.tpot for timing in good if timing.output_tokens > 1], 1e3),
        "itl_ms": percentiles([gap for timing in good for gap in timing.itl], 1e3),
        "e2e_ms": percentiles([timing.chunks[-1] - timing.sent for timing in good], 1e3),
    }
