"""The fused norm, rope, SiLU-mul, log-probability and batch kernels against the reference, on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from octavo.kernels import cuda
from tests.support import kernel_checks as checks
from tests.support.kernel_checks import Draw

pytestmark = pytest.mark.usefixtures("dependent")


@pytest.fixture
def draw(dtype: torch.dtype) -> Draw:
    return Draw("cuda", dtype)


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("size", [64, 200, 1024, 4096, 8192])
def test_norms(draw: Draw, rows: int, size: int) -> None:
    checks.check_norms(cuda, draw, rows, size)


def test_strided_rows(draw: Draw) -> None:
    checks.check_strided_rows(cuda, draw)


@pytest.mark.parametrize(("rows", "size"), [(1, 14336), (3, 1030), (300, 3072)])
def test_silu_mul(draw: Draw, rows: int, size: int) -> None:
    checks.check_silu_mul(cuda, draw, rows, size)


@pytest.mark.parametrize(("rows", "size"), [(1, 4096), (33, 1100)])
def test_embedding(draw: Draw, rows: int, size: int) -> None:
    checks.check_embedding(cuda, draw, rows, size)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("pairs", [12, 64])
def test_rotation(pairs: int, per_token: bool) -> None:
    checks.check_rotation(cuda, Draw("cuda", torch.float32), 40, pairs, per_token)


@pytest.mark.parametrize("rows", [1, 8, 48])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "width", "norm", "swap"),
    [
        (32, 8, 128, 128, False, False),
        (32, 8, 128, 128, False, True),
        (16, 8, 128, 128, True, False),
        (32, 8, 64, 64, False, False),
        (9, 3, 64, 64, False, True),
        (6, 2, 80, 32, True, False),
    ],
)
def test_rope(draw: Draw, rows: int, heads: int, kv_heads: int, dim: int, width: int, norm: bool, swap: bool) -> None:
    checks.check_rope(cuda, draw, rows, heads, kv_heads, dim, width, norm, swap)


def test_rope_of_many_tokens(dtype: torch.dtype) -> None:
    """A launch shape of its own: 65 or more tokens; the checks' caches have 48 places."""
    draw = Draw("cuda", dtype)
    qkv, slots = draw(300, 48 * 128), draw.places(320, 300)
    cos, sin = cuda.rotation(draw.ints(9000, 300), torch.rand(64, device="cuda"), 1.0)
    k, v = (torch.zeros(20, 16, 8, 128, dtype=dtype, device="cuda") for _ in range(2))
    k_apart, v_apart = torch.zeros_like(k), torch.zeros_like(v)
    q = cuda.rope_norm_write_kv(qkv, 32, (cos, sin), None, k, v, slots)
    parts = [slice(i, i + 50) for i in range(0, 300, 50)]
    expected = [cuda.rope_norm_write_kv(qkv[p], 32, (cos[p], sin[p]), None, k_apart, v_apart, slots[p]) for p in parts]
    assert torch.equal(q, torch.cat(expected))
    assert torch.equal(k, k_apart)
    assert torch.equal(v, v_apart)


@pytest.mark.parametrize("k", [0, 1, 5, 20])
@pytest.mark.parametrize("vocab", [300, 128_256])
def test_top_logprobs(draw: Draw, vocab: int, k: int) -> None:
    checks.check_top_logprobs(cuda, draw, 3, vocab, k)


@pytest.mark.parametrize(("rows", "vocab"), [(2, 300), (3, 151_936), (70, 5000)])
def test_log_softmax(draw: Draw, rows: int, vocab: int) -> None:
    checks.check_log_softmax(cuda, draw, rows, vocab)


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (130, 2), (1024, 1)])
def test_prepare_decode(size: int, groups: int) -> None:
    checks.check_prepare_decode(cuda, "cuda", size, groups)


@pytest.mark.parametrize(("blocks", "values"), [(0, 3), (300, 0), (5, 300)])
def test_apply_diffs(blocks: int, values: int) -> None:
    checks.check_diffs(cuda, "cuda", blocks, values)


def test_a_captured_chain_is_what_runs_eagerly(dtype: torch.dtype) -> None:
    """Every kernel reads what the one before wrote, 50 times over: a missing wait shows as a difference."""
    draw = Draw("cuda", dtype)
    weight, x = draw(1024), draw(4, 1024)
    index = torch.tensor([0, 1, 1, 0], device="cuda")

    def chain() -> Tensor:
        y, stream = cuda.rms_norm(x, weight, 1e-6), x
        for _ in range(50):
            y, stream = cuda.add_rms_norm(y, stream, weight, 1e-6)
            y = cuda.rms_norm(cuda.silu_mul(y.view(2, 2048)).view(-1, 512), weight[:512], 1e-6)
            y, stream = cuda.add_rms_norm(y.view(2, 1024), stream[:2], weight, 1e-6)
            y, stream = cuda.embedding(index, y), cuda.embedding(index, stream)
        return y

    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(5):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, expected)
