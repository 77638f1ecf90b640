from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from octavo import bench
from octavo.bench import offline, report, roofline, serve, workloads
from octavo.core.errors import ConfigError, EngineDead
from octavo.core.facts import ModelFacts
from octavo.core.request import Delta, Request, Stats
from octavo.llm import LLM
from tests.frontend.fake_engine import EchoEngine
from tests.frontend.tiny import tiny_config


def parse(kind: str, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(kind, parser)
    return parser.parse_args(argv)


def json_lines(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


# Workloads


@pytest.mark.parametrize(
    ("name", "requests", "input_len", "output_len"),
    [("bs1", 1, 128, 512), ("d32", 32, 1024, 256), ("burst", 1024, 256, 256), ("long", 32, 16384, 256)],
)
def test_named_workloads(name: str, requests: int, input_len: int, output_len: int) -> None:
    workload = workloads.named(name, 0)
    assert workload.inputs == (input_len,) * requests
    assert workload.outputs == (output_len,) * requests
    assert workload.longest == input_len + output_len


def test_nano_is_uniform_and_seeded() -> None:
    nano = workloads.named("nano", 0)
    lengths = nano.inputs + nano.outputs
    assert (len(nano.inputs), len(nano.outputs)) == (256, 256)
    assert 100 <= min(lengths) < 120
    assert 1000 < max(lengths) <= 1024
    assert sum(nano.outputs) == 133_966
    assert nano == workloads.named("nano", 0) != workloads.named("nano", 1)


def test_prompts_are_seeded_ids_below_both_limits() -> None:
    workload = workloads.uniform("w", 3, 500, 1)
    small, large = workload.prompts(50, 0), workload.prompts(10**6, 0)
    assert max(map(max, small)) == 49
    assert 9_000 < max(map(max, large)) < 10_000
    assert small == workload.prompts(50, 0) != workload.prompts(50, 1)


def test_unknown_workloads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"d0.*bs1"):
        workloads.named("d0", 0)


# Reports


def test_percentiles_and_table() -> None:
    assert report.percentiles([]) == {}
    assert report.percentiles([1.0, 2.0, 3.0], 1e3) == {"mean": 2000, "p50": 2000, "p90": 2800, "p99": 2980}
    columns = {"a": "name", "b": "value", "c": "x"}
    lines = report.table(columns, [{"a": "one", "b": 12345}, {"a": "three", "b": 1.5, "c": 1234.6}])
    assert lines.splitlines() == ["name    value      x", "one    12,345      -", "three    1.50  1,235"]


def test_an_unwritable_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--output-json"):
        report.emit({"a": 1}, str(tmp_path / "missing" / "x.json"))
    assert capsys.readouterr().out == '{"a": 1}\n'


def test_kv_use() -> None:
    before = Stats(kv_tokens_held=10, kv_slots_owned=16)
    assert offline.kv_use_percent(before, Stats(kv_tokens_held=40, kv_slots_owned=56)) == 75.0
    assert offline.kv_use_percent(before, before) is None


# Roofline

LLAMA_8B = msgspec.structs.replace(
    tiny_config().model,
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    windows=(None,) * 32,
)


@pytest.mark.parametrize(
    ("name", "tokens_per_s"), [("bs1", 306), ("d32", 4847), ("d256", 8087), ("burst", 21016), ("r1k1k", 12389)]
)
def test_the_roofline_of_an_8b_model_on_an_h200(name: str, tokens_per_s: int) -> None:
    limits = roofline.known_limits("NVIDIA H200", "bfloat16")
    assert limits is not None
    workload = workloads.named(name, 0)
    seconds = roofline.roofline_seconds(LLAMA_8B, "bfloat16", workload, limits)
    assert round(sum(workload.outputs) / seconds) == tokens_per_s
    assert roofline.known_limits("NVIDIA H200", "float32") is None
    assert roofline.known_limits("AMD EPYC", "bfloat16") is None


def test_a_window_bounds_what_attention_reads() -> None:
    limits = roofline.Limits(1e15, 1e12)
    short, long = workloads.uniform("w", 4, 100, 50), workloads.uniform("w", 4, 20_000, 50)
    windowed = msgspec.structs.replace(LLAMA_8B, windows=(200,) * 32)

    def seconds(facts: ModelFacts, workload: workloads.Workload) -> float:
        return roofline.roofline_seconds(facts, "bfloat16", workload, limits)

    assert seconds(windowed, short) == seconds(LLAMA_8B, short)
    assert seconds(windowed, long) < seconds(LLAMA_8B, long)


def test_quantized_weights_are_less_to_read() -> None:
    workload = workloads.uniform("w", 1, 10, 3)
    half, quarter = (roofline.work_of(LLAMA_8B, "bfloat16", workload, size) for size in (None, 0.5))
    assert quarter.weights == half.weights / 4
    assert quarter.read == pytest.approx(3 * quarter.weights + half.kv)
    assert (quarter.operations, quarter.kv) == (half.operations, half.kv)


def test_limits_can_be_measured() -> None:
    limits = roofline.measure_limits("cpu", "float32")
    assert 1e8 < limits.flops < 1e15
    assert 1e8 < limits.bandwidth < 1e13


# Offline


class CountingEngine(EchoEngine):
    """Echoes and keeps statistics of a pool that wastes a quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.resets = 0
        self.most_at_once = 0
        self.requests: list[Request] = []

    def add(self, request: Request) -> None:
        self.requests.append(request)
        super().add(request)

    def step(self) -> list[Delta]:
        self.most_at_once = max(self.most_at_once, len(self.running))
        self.stats.kv_tokens_held += 3
        self.stats.kv_slots_owned += 4
        return super().step()

    def warm_up(self) -> None:
        pass

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def close(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> CountingEngine:
    engine = CountingEngine()
    monkeypatch.setattr(offline, "measure_limits", lambda kind, dtype: roofline.Limits(1e9, 1e9))
    monkeypatch.setattr(offline, "LLM", lambda model, **kwargs: LLM.over(engine, tiny_config(4096), None))
    return engine


def test_throughput(engine: CountingEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    argv = ["--input-len", "20", "--output-len", "5", "--num-prompts", "6", "--sequential", "--output-json", str(file)]
    assert bench.run("throughput", parse("throughput", *argv)) == 0
    out = capsys.readouterr().out
    together, one_by_one = json_lines(out)
    assert json_lines(file.read_text()) == [together, one_by_one]
    workload = workloads.uniform("w", 6, 20, 5)
    assert (together["requests"], together["input_tokens"], together["output_tokens"]) == (6, 120, 30)
    assert (together["steps"], one_by_one["steps"]) == (5, 30)
    assert one_by_one["workload"] == "custom (sequential)"
    assert (together["kv_use_percent"], together["kv_pool_tokens"]) == (75.0, 99 * 16)
    assert together["output_tokens_per_s"] == pytest.approx(30 / together["seconds"], rel=0.01)
    least = roofline.roofline_seconds(tiny_config().model, "float32", workload, roofline.Limits(1e9, 1e9))
    assert together["roofline_percent_measured"] == pytest.approx(100 * least / together["seconds"], rel=0.01)
    assert together["roofline_percent"] is None
    work = roofline.work_of(tiny_config().model, "float32", workload)
    assert together["bandwidth_percent"] == pytest.approx(100 * work.read / 1e9 / together["seconds"], rel=0.01)
    assert together["matmul_percent"] == pytest.approx(100 * work.operations / 1e9 / together["seconds"], rel=0.01)
    assert (together["measured_gb_per_s"], together["measured_tflops"]) == (1.0, 0.001)
    assert (together["tensor_parallel_size"], together["pipeline_parallel_size"]) == (1, 1)
    assert {"model", "device", "dtype", "preemptions", "total_tokens_per_s", "versions", "machine"} <= together.keys()
    heading = next(line for line in out.splitlines() if not line.startswith("{"))
    assert heading.split()[:2] == ["workload", "requests"]
    assert (engine.resets, engine.most_at_once) == (3, 6)
    assert {request.params.temperature for request in engine.requests} == {0.6}
    assert all(request.params.ignore_eos for request in engine.requests)


def test_several_ranks_have_the_limits_of_all(engine: CountingEngine) -> None:
    alone = tiny_config(4096)
    device = msgspec.structs.replace(alone.device, name="NVIDIA H200")
    parallel = msgspec.structs.replace(alone.parallel, tensor=2, pipeline=3)
    config = msgspec.structs.replace(alone, device=device, parallel=parallel, dtype="bfloat16")
    workload, limits = workloads.uniform("w", 2, 20, 5), roofline.Limits(1e9, 2e9)
    six = offline.measure(LLM.over(engine, config, None), workload, 0, 0.0, limits)
    assert (six["tensor_parallel_size"], six["pipeline_parallel_size"]) == (2, 3)
    assert (six["measured_gb_per_s"], six["measured_tflops"]) == (12.0, 0.006)

    shares = {
        ranks: offline._roofline(
            msgspec.structs.replace(config, parallel=msgspec.structs.replace(alone.parallel, tensor=ranks)),
            [workload],
            1e-7,
            limits,
        )
        for ranks in (1, 4)
    }
    for name in ("roofline_percent", "roofline_percent_measured", "bandwidth_percent", "matmul_percent"):
        assert shares[1][name] == pytest.approx(4 * shares[4][name], rel=0.01)


def test_named_workloads_of_one_run(engine: CountingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run("throughput", parse("throughput", "--workload", "bs1, d2", "--temperature", "0")) == 0
    assert [line["workload"] for line in json_lines(capsys.readouterr().out)] == ["bs1", "d2"]
    assert engine.requests[-1].params.temperature == 0


def test_a_failed_request_fails_the_benchmark(engine: CountingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[Delta]:
        ids = list(engine.running)
        engine.running.clear()
        return [Delta(*key, [], "error", error="no memory") for key in ids]

    monkeypatch.setattr(engine, "step", fail)
    with pytest.raises(EngineDead, match="warmup failed: no memory"):
        bench.run("throughput", parse("throughput"))


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_a_workload_beyond_the_context_is_refused(engine: CountingEngine, kind: str) -> None:
    with pytest.raises(ConfigError, match="5128 tokens, the context holds 4096"):
        bench.run(kind, parse(kind, "--input-len", "5000", "--output-len", "128"))
    assert engine.requests == []


def test_latency(engine: CountingEngine, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--batch-size", "3", "--input-len", "4", "--output-len", "2", "--num-iters", "4", "--num-iters-warmup", "1"]
    assert bench.run("latency", parse("latency", *argv)) == 0
    (result,) = json_lines(capsys.readouterr().out)
    assert (result["iterations"], result["batch_size"], engine.resets, len(engine.requests)) == (4, 3, 5, 15)
    assert result["p50"] <= result["p99"]


# Serve


class Server:
    """A scripted /v1/completions behind httpx's transport; request number `refuse` is refused."""

    def __init__(self, refuse: int | None = None) -> None:
        self.refuse = refuse
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.in_flight = 0
        self.most_in_flight = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.keys.append(request.headers.get("authorization"))
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        self.bodies.append(json.loads(request.content))
        if len(self.bodies) - 1 == self.refuse:
            return httpx.Response(400, json={"error": {"message": "no"}})
        return httpx.Response(200, content=self._stream(self.bodies[-1]["max_tokens"]))

    async def _stream(self, tokens: int) -> AsyncIterator[bytes]:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for _ in range(tokens):
            yield b'data: {"choices": [{"text": "x"}]}\n\n'
        yield b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\ndata: [DONE]\n\n' % tokens
        self.in_flight -= 1


@contextmanager
def behind(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    client = httpx.AsyncClient
    transport = httpx.MockTransport(server)
    monkeypatch.setattr(httpx, "AsyncClient", lambda **kwargs: client(transport=transport, **kwargs))
    yield
    monkeypatch.setattr(httpx, "AsyncClient", client)


def test_serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server()
    argv = ["--num-prompts", "8", "--input-len", "5", "--output-len", "3", "--max-concurrency", "2"]
    argv += ["--request-rate", "2000", "--api-key", "secret", "--token-id-limit", "100"]
    with behind(server, monkeypatch):
        assert bench.run("serve", parse("serve", *argv)) == 0
    (result,) = json_lines(capsys.readouterr().out)
    assert (result["completed"], result["failed"], result["output_tokens"], result["model"]) == (8, 0, 24, "tiny")
    assert result["request_rate"] == 2000
    for metric in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert 0 <= result[metric]["p50"] <= result[metric]["p99"]
    assert server.most_in_flight <= 2
    assert set(server.keys) == {"Bearer secret"}
    body = server.bodies[0]
    assert (len(body["prompt"]), body["stream"], body["ignore_eos"], body["model"]) == (5, True, True, "tiny")
    assert max(max(body["prompt"]) for body in server.bodies) < 100


def test_a_refused_request_is_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["named", "--num-prompts", "3", "--output-len", "1", "--base-url", "http://elsewhere:1"]
    with behind(Server(refuse=1), monkeypatch):
        assert bench.run("serve", parse("serve", *argv)) == 1
    out = capsys.readouterr().out
    (result,) = json_lines(out)
    assert (result["completed"], result["failed"], result["model"]) == (2, 1, "named")
    assert result["request_rate"] == "inf"
    assert (result["base_url"], result["tpot_ms"]) == ("http://elsewhere:1", {})
    assert "failed: HTTP 400" in out


def test_times_of_a_request() -> None:
    timing = serve.Timing(sent=1.0, chunks=[1.5, 2.0, 3.5], output_tokens=5)
    assert (timing.ttft, timing.tpot, timing.itl) == (0.5, 0.5, [0.5, 1.5])
    result = serve.summarise([timing, serve.Timing(error="x")], 10, 2.0)
    assert (result["total_tokens_per_s"], result["e2e_ms"]["mean"]) == (7.5, 2500)


def test_no_server_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no model at http://127\.0\.0\.1:9"):
        bench.run("serve", parse("serve", "--port", "9"))


@pytest.mark.parametrize("argv", [["--request-rate", "0"], ["--num-prompts", "0"], ["--request-rate", "nan"]])
def test_bad_flags_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("serve", *argv)
    assert argv[0] in capsys.readouterr().err


def test_the_flags_cost_no_heavy_import() -> None:
    code = (
        "import argparse, sys\n"
        "from octavo import bench\n"
        "for kind in ('throughput', 'latency', 'serve'): bench.add_arguments(kind, argparse.ArgumentParser())\n"
        "assert not {'torch', 'numpy', 'httpx', 'octavo.frontend'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
