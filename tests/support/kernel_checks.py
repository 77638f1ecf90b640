"""Comparisons of a kernel backend with the reference, for any device: the interpreter's and the GPU's tests share them.

Expected values come from the reference in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.kernels import reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.2e-3, torch.bfloat16: 9e-3}
"""Of an element, relative: two roundings in the dtype."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised tensors hold NaN, or -1 for integers, so that what a kernel leaves out shows."""

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        return filled

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, filling(getattr(owner, name)))
        yield


def close(actual: Tensor, expected: Tensor, slack: float = 1.0) -> None:
    """`expected` is float64; elements near 0 are measured against the typical size."""
    assert actual.shape == expected.shape
    tolerance = TOLERANCE[actual.dtype] * slack
    scale = float(expected.abs().mean())
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance * scale)


class Draw:
    """Random tensors in a dtype on a device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random).to(self.device, self.dtype)

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._random).to(self.device)

    def places(self, high: int, count: int) -> Tensor:
        """Distinct ones."""
        return torch.randperm(high, generator=self._random)[:count].to(self.device)


def exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def check_norms(kernels: ModuleType, draw: Draw, rows: int, size: int) -> None:
    x, residual, weight = draw(rows, size), draw(rows, size), draw(size)
    with poisoned():
        y = kernels.rms_norm(x, weight, 1e-5)
        added, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
        heads = kernels.rms_norm(x.view(rows, 2, size // 2), weight[: size // 2], 1e-6)
    close(y, reference.rms_norm(exact(x), exact(weight), 1e-5))
    assert torch.equal(total, x + residual)
    close(added, reference.rms_norm(exact(total), exact(weight), 1e-5))
    close(heads, reference.rms_norm(exact(x).view(rows, 2, -1), exact(weight)[: size // 2], 1e-6))


def check_strided_rows(kernels: ModuleType, draw: Draw) -> None:
    wide, weight = draw(5, 200), draw(64)
    part = wide[:, 8:72]
    with poisoned():
        close(kernels.rms_norm(part, weight, 1e-5), reference.rms_norm(exact(part), exact(weight), 1e-5))
        close(kernels.silu_mul(part), reference.silu_mul(exact(part)))
        close(kernels.log_softmax(part), exact(part).log_softmax(-1), 4)


def check_silu_mul(kernels: ModuleType, draw: Draw, rows: int, size: int) -> None:
    x = draw(rows, 2 * size) * 3
    with poisoned():
        y = kernels.silu_mul(x)
    close(y, reference.silu_mul(exact(x)))


def check_embedding(kernels: ModuleType, draw: Draw, rows: int, size: int) -> None:
    table, tokens = draw(50, size), draw.ints(50, rows)
    with poisoned():
        assert torch.equal(kernels.embedding(tokens, table), table[tokens])


def check_rotation(kernels: ModuleType, draw: Draw, rows: int, pairs: int, per_token: bool) -> None:
    """Angles are float32 everywhere, so this compares with the reference in float32."""
    positions = draw.ints(100_000, rows)
    inv_freq = 1.0 / 10_000 ** (torch.arange(pairs) / pairs)
    if per_token:
        inv_freq = inv_freq * torch.linspace(0.5, 1, rows)[:, None]
    with poisoned():
        found = kernels.rotation(positions, inv_freq.to(draw.device), 1.25)
    for actual, expected in zip(found, reference.rotation(positions.cpu(), inv_freq, 1.25), strict=True):
        assert actual.shape == (rows, 1, 2 * pairs)
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-6)


def check_rope(
    kernels: ModuleType, draw: Draw, rows: int, heads: int, kv_heads: int, dim: int, width: int, norm: bool, swap: bool
) -> None:
    """`swap` lays a block's heads before its places."""
    qkv, slots = draw(rows, (heads + 2 * kv_heads) * dim), draw.places(12 * 4, rows)
    angles = torch.rand(rows, 1, width // 2) * 6
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    norms = (draw(dim), draw(dim), 1e-6) if norm else None
    shape = (2, 12, kv_heads, 4, dim) if swap else (2, 12, 4, kv_heads, dim)
    k, v = draw(*shape).transpose(2, 3) if swap else draw(*shape)
    k_exact, v_exact = exact(k).contiguous(), exact(v).contiguous()
    with poisoned():
        q = kernels.rope_norm_write_kv(qkv, heads, (cos.to(draw.device), sin.to(draw.device)), norms, k, v, slots)
    norms_exact = None if norms is None else (exact(norms[0]), exact(norms[1]), norms[2])
    turn = (cos.double(), sin.double())
    expected = reference.rope_norm_write_kv(exact(qkv), heads, turn, norms_exact, k_exact, v_exact, slots.cpu())
    close(q, expected, 2)
    close(k, k_exact, 2)
    assert torch.equal(exact(v), v_exact)


def check_top_logprobs(kernels: ModuleType, draw: Draw, rows: int, vocab: int, k: int) -> None:
    """With many equals, and with all but a few tokens forbidden in row 0."""
    logits = (draw(rows, vocab).float() * 8).round().div(4).to(draw.dtype)
    logits[0, 7:] = float("-inf")
    chosen = draw.ints(vocab, rows)
    chosen[0] = 3
    with poisoned():
        ids, logprobs, ranks = kernels.top_logprobs(logits, chosen, k)
    plain = exact(logits)
    order = plain.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    expected_ids = torch.cat((chosen.cpu()[:, None], order), 1)
    assert torch.equal(ids.cpu(), expected_ids)
    expected = plain.log_softmax(-1).gather(1, expected_ids)
    torch.testing.assert_close(logprobs.cpu().double(), expected, rtol=3e-6, atol=3e-6)
    assert torch.equal(ranks.cpu(), (plain > plain.gather(1, chosen.cpu()[:, None])).sum(-1) + 1)


def check_log_softmax(kernels: ModuleType, draw: Draw, rows: int, vocab: int) -> None:
    x = draw(rows, vocab) * 4
    with poisoned():
        close(kernels.log_softmax(x), exact(x).log_softmax(-1), 4)


def check_prepare_decode(kernels: ModuleType, device: str, size: int, groups: int) -> None:
    """Also that only the step's rows grow, and the padding row never."""
    draw = Draw(device, torch.float32)
    max_rows, block_size, padding = 2 * size, 16, 3
    rows = torch.cat((draw.places(max_rows, size), torch.full((padding,), max_rows, device=device)))
    tables = draw.ints(1000, groups, max_rows + 1, 9).int()
    tables[:, max_rows] = 0
    last_token, num_computed = draw.ints(50_000, max_rows + 1), draw.ints(9 * block_size - 1, max_rows + 1)
    num_computed[max_rows] = 0

    def run(backend: Any, device: str) -> list[Tensor]:
        state = [t.to(device, copy=True) for t in (rows, last_token, num_computed, tables)]
        total = size + padding
        tokens, positions, after = (torch.full((total,), -1, dtype=torch.int64, device=device) for _ in range(3))
        lens = torch.full((total,), -1, dtype=torch.int32, device=device)
        slots = torch.full((groups, total + 5), -1, dtype=torch.int64, device=device)[:, :total]
        for _ in range(2):
            out = {"tokens": tokens, "positions": positions, "next_positions": after, "seq_lens": lens, "slots": slots}
            backend.prepare_decode(*state, block_size, **out)
        return [t.cpu() for t in (tokens, positions, after, lens, slots, *state)]

    for actual, expected in zip(run(kernels, device), run(reference, "cpu"), strict=True):
        assert torch.equal(actual, expected)


def check_diffs(kernels: ModuleType, device: str, blocks: int, values: int) -> None:
    draw = Draw(device, torch.float32)
    tables, computed = draw.ints(99, 2, 40, 11).int(), draw.ints(99, 400)
    places, ids = draw.places(2 * 40 * 11, blocks), draw.ints(5000, blocks).int()
    rows, new = draw.places(400, values), draw.ints(5000, values)
    expected_tables, expected = tables.clone(), computed.clone()
    expected_tables.view(-1)[places] = ids
    expected[rows] = new
    kernels.apply_diffs(tables, places, ids, computed, rows, new)
    assert torch.equal(tables, expected_tables)
    assert torch.equal(computed, expected)


Knobs = dict[str, Tensor]


def knobs(rows: int, device: str, **given: Any) -> Knobs:
    """Arguments of `sample` after the logits: numbers or lists, neutral where not given."""
    neutral: dict[str, tuple[Any, torch.dtype]] = {
        "temperature": (1.0, torch.float32),
        "top_k": (0, torch.int32),
        "top_p": (1.0, torch.float32),
        "min_p": (0.0, torch.float32),
        "seed": ([(-1) ** i * (i * 0x9E3779B97F + 5) for i in range(rows)], torch.int64),
        "position": ([i * i * 3 for i in range(rows)], torch.int64),
    }
    return {
        name: torch.as_tensor(given.get(name, value), dtype=dtype).expand(rows).clone().to(device)
        for name, (value, dtype) in neutral.items()
    }


def mixed_knobs(rows: int, vocab: int, device: str, seed: int = 0) -> Knobs:
    """Every row with filters of its own, about half of them off."""
    random = torch.Generator().manual_seed(seed)

    def choose(*values: float) -> list[float]:
        return [values[i] for i in torch.randint(len(values), (rows,), generator=random).tolist()]

    return knobs(
        rows,
        device,
        temperature=choose(0.0, 0.3, 0.7, 1.0, 1.0, 2.0),
        top_k=[int(k) for k in choose(0, -1, 0, 1, 7, 50, vocab // 3, vocab - 1, vocab)],
        top_p=choose(1.0, 1.0, 1.0, 0.999, 0.9, 0.5, 0.02),
        min_p=choose(0.0, 0.0, 0.0, 0.02, 0.3, 1.0),
    )


def agreement(kernels: ModuleType, logits: Tensor, given: Knobs) -> float:
    """Share of rows with the reference's token, drawn on the CPU in float32."""
    with poisoned():
        found = kernels.sample(logits, **given)
    expected = reference.sample(logits.cpu().float(), **{name: tensor.cpu() for name, tensor in given.items()})
    return float((found.cpu() == expected).double().mean())
