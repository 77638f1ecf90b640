"""Products with packed weights against the same arithmetic in plain torch, for every format and instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.kernels.cpu import build, quant_linear
from octavo.kernels.cpu.quant_linear import COLUMNS, PANEL, Format, Packed, linear, norm_linear, pack, rows, stack
from octavo.kernels.reference import rms_norm, silu_mul

if quant_linear.available() is not None:
    pytest.skip("no C compiler here", allow_module_level=True)

CPUINFO = Path("/proc/cpuinfo")
HASWELL = CPUINFO.exists() and {"avx2", "fma", "f16c"} <= set(CPUINFO.read_text().split())
TARGETS = {"native": build.NATIVE, "base": (), "haswell": ("-march=haswell",)}
ROWS = [1, 2, 3, 4, 5, 8, 14, 64, 70]
SHAPES = [(1, 32), (16, 64), (17, 96), (100, 576)]


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compiles for it; `linear` and `rows` use that."""
    if request.param == "haswell" and not HASWELL:
        pytest.skip("this processor has no AVX2")
    kernels = quant_linear.Kernels(TARGETS[request.param])
    monkeypatch.setattr(quant_linear, "_kernels", lambda: kernels)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(before)


def matrix(format: Format, outs: int, columns: int, seed: int = 0) -> tuple[Packed, Tensor]:
    """A random one, and its values in float64. The extreme codes occur together, where sums are largest."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**format.bits, (outs, columns), generator=generator).to(torch.uint8)
    codes[0] = 2**format.bits - 1
    codes[-1, ::2] = 0
    groups = columns // format.group
    scales = (torch.rand(outs, groups, generator=generator) * 0.02 - 0.01).half()
    values = (codes.double() - format.zero) * scales.double().repeat_interleave(format.group, 1)
    minima = None
    if format.has_min:
        minima = (torch.randn(outs, groups, generator=generator) * 0.01).half()
        values += minima.double().repeat_interleave(format.group, 1)
    return pack(format, codes, scales, minima), values


def activations(count: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Multiples of a block's finer step, and away from the middle between two of its coarse ones; some stand out.

    The first block is the largest of its row.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (count, columns // COLUMNS, COLUMNS)
    coarse = torch.randint(-126, 127, shape, generator=generator)
    coarse[torch.rand(shape[:2], generator=generator) < 0.3] //= 12
    near = coarse + torch.randint(-32, 33, shape, generator=generator) / 128
    near[..., 3] = 127
    near[0, 0] = 127
    near[-1, -1, ::2] = -127
    steps = torch.exp2(torch.randint(-9, 3, (count, shape[1], 1), generator=generator).float())
    steps[:, 0] = 16
    return (near * steps).view(count, columns).to(dtype)


def rounded(x: Tensor, fine: bool) -> Tensor:
    """What the kernel multiplies instead of x, in float64.

    Integers times 1 / 127 of a block's largest, or 1 / 128 of that: if `fine`, or if the largest is 14 times the root
    mean square of its row.
    """
    blocks = x.double().view(x.shape[0], -1, COLUMNS)
    most = blocks.abs().amax(2, keepdim=True)
    step = torch.where(most > 0, most, 1) / 127
    exact = (blocks / step * 128).round() / 128
    stands_out = most**2 > 14**2 * blocks.square().mean((1, 2), keepdim=True)
    return (torch.where(stands_out | fine, exact, (exact + 2**-9).round()) * step).view(x.shape)


@pytest.mark.parametrize("dtype", quant_linear.DTYPES)
@pytest.mark.parametrize("format", list(Format))
def test_products_are_those_of_the_rounded_activations(format: Format, dtype: torch.dtype, target: str) -> None:
    for outs, columns in SHAPES:
        weight, values = matrix(format, outs, columns)
        bias = torch.linspace(-3, 3, outs).to(dtype)
        for count in ROWS:
            x = activations(count, columns, dtype)
            out = torch.full((count, outs + 5), 7, dtype=dtype)
            linear(x, weight, bias, out[:, 2 : outs + 2])
            with_ = rounded(x, quant_linear.fine(format))
            expected = with_ @ values.T + bias.double()
            tolerance = 2**-20 if dtype == torch.float32 else 2**-8
            size = with_.abs() @ values.abs().T + bias.double().abs()
            error = ((out[:, 2 : outs + 2].double() - expected).abs() / size).max()
            assert error < tolerance, (outs, columns, count)
            assert bool((out[:, :2] == 7).all())
            assert bool((out[:, outs + 2 :] == 7).all())


@pytest.mark.parametrize("format", list(Format))
def test_rounding_activations_costs_less_than_a_percent(format: Format) -> None:
    weight, values = matrix(format, 64, 1536)
    x = torch.randn(32, 1536, generator=torch.Generator().manual_seed(2))
    out = torch.empty(32, 64)
    linear(x, weight, None, out)
    exact = x.double() @ values.T
    assert (out - exact).norm() / exact.norm() < 0.008


@pytest.mark.parametrize("format", list(Format))
def test_rows_are_the_values_of_the_matrix(format: Format, target: str) -> None:
    weight, values = matrix(format, 37, 96)
    index = torch.tensor([36, 0, 15, 16, 16, 31])
    expected = values[index].float()
    torch.testing.assert_close(rows(weight, index, torch.float32), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(rows(weight, index, torch.bfloat16), rows(weight, index, torch.float32).bfloat16())


@pytest.mark.parametrize("format", [Format.Q4_MIN, Format.Q8])
def test_one_row_is_the_same_in_any_company(format: Format, target: str) -> None:
    weight, _ = matrix(format, 48, 320)
    x = torch.randn(70, 320, generator=torch.Generator().manual_seed(3))
    alone = torch.empty(70, 48)
    for i in range(70):
        linear(x[i : i + 1], weight, None, alone[i : i + 1])
    for count in (9, 70):
        together = torch.empty(count, 48)
        linear(x[:count], weight, None, together)
        assert torch.equal(together, alone[:count])


def test_threads_do_not_change_the_result() -> None:
    weight, _ = matrix(Format.Q6_16, 100, 576)
    x = torch.randn(70, 576, generator=torch.Generator().manual_seed(4))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.empty(70, 100))
        linear(x, weight, None, results[-1])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_blocks_of_zeros_and_values_that_are_not_finite(target: str) -> None:
    weight, _ = matrix(Format.Q8, 16, 64)
    x = torch.zeros(4, 64)
    x[1, 40], x[2, 40], x[3, 5] = 1e-35, torch.inf, torch.nan
    out = torch.empty(4, 16)
    linear(x, weight, None, out)
    assert bool((out[0] == 0).all())
    assert bool((out[1].abs() < 1e-34).all())
    assert not bool(out[2:].isfinite().any())


@pytest.mark.parametrize("format", list(Format))
def test_stacked_matrices(format: Format) -> None:
    matrices = [matrix(format, outs, 64, seed) for seed, outs in enumerate((PANEL, 2 * PANEL, 5))]
    both = stack([packed for packed, _ in matrices])
    x = activations(3, 64, torch.float32)
    out = torch.empty(3, both.outs)
    linear(x, both, None, out)
    parts = []
    for packed, _ in matrices:
        parts.append(torch.empty(3, packed.outs))
        linear(x, packed, None, parts[-1])
    assert torch.equal(out, torch.cat(parts, 1))


@pytest.mark.parametrize("dtype", quant_linear.DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_norm_before_and_gate_after(added: bool, gated: bool, dtype: torch.dtype, target: str) -> None:
    outs, columns = (64, 96) if gated else (37, 96)
    for format in (Format.Q4_MIN, Format.Q8):
        weight, values = matrix(format, outs, columns)
        for count in (1, 7, 66):
            generator = torch.Generator().manual_seed(count)
            x, residual = torch.randn(2, count, columns, generator=generator).to(dtype).unbind()
            norm = torch.rand(columns, generator=generator).to(dtype)
            bias = torch.linspace(-1, 1, outs).to(dtype)
            out, stream = norm_linear(x, residual if added else None, (norm, 1e-5), weight, bias, gated)
            assert torch.equal(stream, x + residual if added else x)
            normalised = rounded(rms_norm(stream.double(), norm.double(), 1e-5), quant_linear.fine(format))
            expected = normalised @ values.T + bias.double()
            if gated:
                expected = silu_mul(expected)
            error = (out.double() - expected).norm() / expected.norm()
            assert out.shape == expected.shape
            assert error < (1e-4 if dtype == torch.float32 else 4e-3), (format, count)
