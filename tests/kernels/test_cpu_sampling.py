"""The C draw against the reference: the same token for the same seed and position, whatever the parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.kernels import cpu, reference
from octavo.kernels.cpu import build
from octavo.kernels.reference_sampling import gumbel

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(build.available() is not None, reason="needs a C compiler"),
]


def parameters(rows: int, **given: list[float] | float) -> dict[str, Tensor]:
    kinds = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
    off = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
    made = {
        name: torch.tensor(given.get(name, off[name]), dtype=kind).expand(rows).contiguous()
        for name, kind in kinds.items()
    }
    made["seed"] = torch.randint(-(2**63), 2**63 - 1, (rows,))
    made["position"] = torch.randint(0, 2**40, (rows,))
    return made


def check(logits: Tensor, p: dict[str, Tensor], allowed: float = 0.0) -> None:
    """Equal tokens but for a share `allowed` of rows, where scores or thresholds are within rounding."""
    before = logits.clone()
    found, expected = cpu.sample(logits, **p), reference.sample(logits, **p)
    assert torch.equal(logits, before)
    differ = found != expected
    assert int(differ.sum()) <= allowed * len(found), (found, expected)


MIXES: dict[str, dict[str, list[float] | float]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "hot": {"temperature": 30.0},
    "cold": {"temperature": 1e-4},
    "top_k": {"top_k": 40},
    "top_k 1": {"top_k": 1},
    "large top_k": {"top_k": 2000},
    "top_p": {"top_p": 0.9},
    "hot top_p": {"top_p": 0.95, "temperature": 8.0},
    "small top_p": {"top_p": 1e-6},
    "top_p 0": {"top_p": 0.0},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 100, "top_p": 0.8, "min_p": 0.01, "temperature": 1.5},
}


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("vocab", [1, 5, 3001])
def test_equals_reference(mix: dict[str, list[float] | float], vocab: int) -> None:
    torch.manual_seed(vocab)
    check(torch.randn(24, vocab) * 4, parameters(24, **mix))


def test_a_batch_of_all_kinds() -> None:
    torch.manual_seed(0)
    off: dict[str, list[float] | float] = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
    rows = [off | mix for mix in MIXES.values()] * 3
    columns: dict[str, list[float] | float] = {name: [float(str(row[name])) for row in rows] for name in off}
    check(torch.randn(len(rows), 8192) * 3, parameters(len(rows), **columns))


@pytest.mark.parametrize("mix", [MIXES["plain"], MIXES["top_k"], MIXES["top_p"], MIXES["all"]])
def test_ties_and_forbidden_tokens(mix: dict[str, list[float] | float]) -> None:
    torch.manual_seed(3)
    logits = torch.randint(-3, 4, (64, 500)).float()
    logits[::2, 50:] = -float("inf")
    logits[1::4, 7:] = -float("inf")
    check(logits, parameters(64, **mix))
    check(torch.zeros(8, 100), parameters(8, **mix))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.01, 1.0, 10.0, 200.0]),
    temperature=st.floats(0.05, 20),
    top_k=st.integers(-1, 400),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.9),
)
def test_any_parameters(seed: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    torch.manual_seed(seed)
    p = parameters(8, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    check(torch.randn(8, 333) * spread, p, allowed=1 / 8)


def test_differences_are_of_rounding_only() -> None:
    """Over many draws, where the token differs at all, the scores of the two tokens are within a few float32 steps."""
    torch.manual_seed(5)
    logits, p = torch.randn(400, 2048), parameters(400)
    found, expected = cpu.sample(logits, **p), reference.sample(logits, **p)
    scores = logits - logits.amax(1, keepdim=True) + gumbel(p["seed"], p["position"], torch.arange(2048))
    gap = scores.gather(1, expected[:, None]) - scores.gather(1, found[:, None])
    assert float(gap.abs().max()) < 1e-5
    assert int((found != expected).sum()) <= 1


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_give_some_token_in_range(mix: dict[str, list[float] | float], bad: float) -> None:
    logits = torch.randn(4, 300)
    logits[0], logits[1, 5], logits[2, ::2] = bad, bad, bad
    tokens = cpu.sample(logits, **parameters(4, **mix))
    assert bool(((tokens >= 0) & (tokens < 300)).all())


def test_parameters_in_tables() -> None:
    torch.manual_seed(7)
    p, rows, logits = parameters(9, top_k=7, temperature=0.7), torch.tensor([3, 0, 8]), torch.randn(3, 200)
    p["temperature"][8] = 0
    tables, position = (p["temperature"], p["top_k"], p["top_p"], p["min_p"], p["seed"]), p["position"][:3]
    last, expected = torch.full((9,), -1), torch.full((9,), -1)
    found = cpu.sample_rows(logits, rows, *tables, position, last_token=last)
    assert torch.equal(found, reference.sample_rows(logits, rows, *tables, position, last_token=expected))
    assert torch.equal(last, expected)
    assert torch.equal(found, cpu.sample_rows(logits, rows, *tables, position))


def test_rows_of_a_wider_matrix_and_float64() -> None:
    torch.manual_seed(6)
    wide, p = torch.randn(6, 900), parameters(6, top_k=20)
    assert torch.equal(cpu.sample(wide[:, 100:800], **p), cpu.sample(wide[:, 100:800].contiguous(), **p))
    assert torch.equal(cpu.sample(wide.double(), **p), reference.sample(wide.double(), **p))


@pytest.mark.parametrize("vocab", [33, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_leave_what_their_bits_allow(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    logits = torch.randn(6, vocab, dtype=dtype)
    logits[2] = float("-inf")  # nothing is left for the grammar
    at = torch.tensor([5, 2, 0])
    bits = torch.randint(-(2**31), 2**31 - 1, (3, -(-vocab // 32)), dtype=torch.int32)
    bits[2, 1:] = 0
    allowed = (bits.repeat_interleave(32, 1) >> torch.arange(32).repeat(bits.shape[1]) & 1).bool()[:, :vocab]
    expected = logits.clone()
    for line, row in enumerate(at.tolist()):
        kept = torch.zeros(vocab, dtype=dtype) if row == 2 else logits[row]
        expected[row] = kept.masked_fill(~allowed[line], float("-inf"))
    for kernels in (cpu, reference):
        masked = logits.clone()
        kernels.apply_masks(masked, at, bits)
        assert torch.equal(masked, expected)
