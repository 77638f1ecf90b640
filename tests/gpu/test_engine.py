"""The engine on a GPU: graphs and running ahead change nothing, and bfloat16 agrees with float64 where it matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.core.params import SamplingParams
from octavo.core.request import Delta, Request
from octavo.engine import Engine, InlineExecutor
from octavo.worker import Worker
from tests.support.tiny import SHAPE as TINY
from tests.support.tiny import save, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
VOCAB = 512
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 1024,
    "eos_token_id": VOCAB - 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that keep the stream's scale: with larger ones rounding grows from layer to layer."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(7)
    save(LlamaForCausalLM(LlamaConfig(**(TINY | SHAPE | {"initializer_range": 0.06}))).double(), path)
    return path


def requests() -> list[Request]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_p": 0.9, "top_k": 40},
        {"temperature": 0.7, "seed": 3, "frequency_penalty": 0.5, "logprobs": 3},
        {"temperature": 1.0, "seed": 4, "n": 2},
    ]
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(20):
        length = int(torch.randint(1, 200, (1,), generator=generator))
        prompt = torch.randint(0, VOCAB - 1, (length,), generator=generator).tolist()
        params = SamplingParams(max_tokens=10 + i % 7, ignore_eos=True, **kinds[i % len(kinds)])
        made.append(Request(str(i), prompt, params, 0.0))
    return made


def run(folder: Path, *, graphs: bool, overlap: int, dtype: str = "bfloat16", device: str = "cuda") -> dict[str, Any]:
    config = tiny_config(
        folder, dtype=dtype, device=device, overlap=overlap, max_num_seqs=12, max_num_batched_tokens=256,
        num_gpu_blocks_override=400, max_model_len=512,
    )  # fmt: skip
    executor = InlineExecutor(config, Worker(config, record=graphs))
    engine = Engine(config, executor=executor)
    engine.load()
    for request in requests():
        engine.add(request)
    found: dict[str, Any] = {}
    while engine.has_work():
        for delta in engine.step():
            take(found, delta)
    engine.scheduler.check()
    return found


def take(found: dict[str, Any], delta: Delta) -> None:
    assert delta.error is None
    tokens, logprobs = found.setdefault(f"{delta.request_id}-{delta.index}", ([], []))
    tokens += delta.token_ids
    logprobs += delta.logprobs or ()


def test_graphs_and_running_ahead_change_no_token(folder: Path) -> None:
    plain = run(folder, graphs=False, overlap=0)
    assert run(folder, graphs=True, overlap=0) == plain
    ahead = run(folder, graphs=True, overlap=1)
    assert {key: tokens for key, (tokens, _) in ahead.items()}.keys() == plain.keys()
    assert sum(ahead[key][0] == plain[key][0] for key in plain) >= len(plain) - 1, "batches differ only by ties"


def test_single_precision_draws_the_tokens_of_a_cpu_in_double(folder: Path) -> None:
    exact = run(folder, graphs=False, overlap=0, dtype="float64", device="cpu")
    single = run(folder, graphs=True, overlap=1, dtype="float32")
    differing = [key for key in exact if exact[key][0] != single[key][0]]
    assert len(differing) <= 1, f"{len(differing)} of {len(exact)} sequences differ"


def test_half_precision_agrees_with_double(folder: Path) -> None:
    exact = forced(folder, dtype="float64", device="cpu")
    half = forced(folder, dtype="bfloat16", device="cuda")
    same = [a == b for (a, _), (b, _) in zip(exact, half, strict=True)]
    off = [abs(a - b) for (_, a), (_, b) in zip(exact, half, strict=True)]
    assert sum(same) >= 0.95 * len(same), f"{sum(same)} of {len(same)} best tokens are equal"
    assert sum(off) <= 0.02 * len(off), f"log-probabilities differ by {sum(off) / len(off):.4f} on average"


def forced(folder: Path, *, dtype: str, device: str) -> list[tuple[int, float]]:
    """Best token, and the log-probability of the prompt's own, at every position of some prompts."""
    config = tiny_config(folder, dtype=dtype, device=device, max_num_batched_tokens=256, num_gpu_blocks_override=400)
    engine = Engine(config, executor=InlineExecutor(config, Worker(config)))
    engine.load()
    for request in requests():
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        engine.add(Request(request.id, request.prompt_token_ids, params, 0.0))
    found: dict[str, list[tuple[int, float]]] = {}
    while engine.has_work():
        for delta in engine.step():
            assert delta.error is None
            entries = [entry for entry in delta.prompt_logprobs or () if entry is not None]
            found.setdefault(delta.request_id, []).extend((e.token_ids[1], e.logprobs[0]) for e in entries)
    return [pair for key in sorted(found) for pair in found[key]]
