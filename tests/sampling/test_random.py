"""The counter-based random numbers: exact values, and that they look random along every axis."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.kernels.reference_sampling import _uniform, gumbel, random_bits, uniform

MASK = 2**32 - 1


def scalar_bits(seed: int, position: int, token: int) -> int:
    """The module's definition in Python integers."""

    def mix(x: int) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D) & MASK
        x = ((x ^ x >> 15) * 0x846CA68B) & MASK
        return x ^ x >> 16

    k0, k1 = 0x9E3779B9, 0x85EBCA6B
    for word in (seed & MASK, seed >> 32 & MASK, position & MASK, position >> 32 & MASK):
        k0, k1 = mix(k0 ^ word), mix(k1 ^ word)
    x = ((mix(token) ^ k0) * 0xCC9E2D51) & MASK
    x ^= x >> 16
    x = ((x + k1) * 0x1B873593) & MASK
    signed = x - 2**32 if x >= 2**31 else x
    return signed ^ signed >> 15


def test_bits_follow_the_definition() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345]
    positions = [0, 1, 2**31, 2**40 + 5, 17, 4095]
    tokens = [0, 1, 2, 49151, 151935, 2**31 - 1]
    bits = random_bits(torch.tensor(seeds), torch.tensor(positions), torch.tensor(tokens))
    for i, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert bits[i].tolist() == [scalar_bits(seed, position, token) for token in tokens]


def test_reference_values() -> None:
    bits = random_bits(torch.tensor([0, 42, -7]), torch.tensor([0, 1000, 3]), torch.tensor([0, 1, 49151]))
    assert bits.tolist() == [
        [71889168, 1977004586, 906909400],
        [309587802, 442324594, 261040015],
        [2128308148, 987292392, 1155090058],
    ]


def test_uniform_stays_inside_its_interval_at_the_ends() -> None:
    ends = _uniform(torch.tensor([0, 1, 2**31 - 1], dtype=torch.int32))
    assert ends.tolist() == [2.0**-32, 3 * 2.0**-32, 1 - 2.0**-24]


def test_batch_composition_does_not_matter() -> None:
    tokens = torch.arange(1000)
    together = gumbel(torch.arange(9), torch.arange(9) * 5, tokens)
    for row in range(9):
        assert torch.equal(gumbel(torch.tensor([row]), torch.tensor([row * 5]), tokens)[0], together[row])
    assert torch.equal(gumbel(torch.arange(9), torch.arange(9) * 5, tokens[[700, 3]]), together[:, [700, 3]])


def axes() -> dict[str, torch.Tensor]:
    n = 1 << 16
    one, many = torch.tensor([5]), torch.arange(n)
    return {
        "tokens": random_bits(one, one, many)[0],
        "positions": random_bits(one.expand(n), many, one)[:, 0],
        "seeds": random_bits(many, one.expand(n), one)[:, 0],
        "high words": random_bits(many << 32, many << 32, one)[:, 0],
        "square": random_bits(torch.arange(256), torch.arange(256), torch.arange(256)).flatten(),
    }


@pytest.mark.parametrize("axis", ["tokens", "positions", "seeds", "high words", "square"])
def test_statistics_along_each_axis(axis: str) -> None:
    bits = axes()[axis].to(torch.int64)
    n = len(bits)
    for shift in (0, 8, 16, 23):
        expected = n / 256
        chi2 = float(((torch.bincount(bits >> shift & 255, minlength=256) - expected) ** 2).sum() / expected)
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255), (shift, chi2)
    u = bits.double() / 2**31 - 0.5
    assert abs(float(u.mean())) < 5 / math.sqrt(12 * n)
    for lag in (1, 2, 3, 16, 256):
        assert abs(float((u[lag:] * u[:-lag]).mean()) * 12) < 5 / math.sqrt(n), lag


def test_neighbouring_rows_are_independent() -> None:
    tokens = torch.arange(1 << 16)
    rows = torch.cat(
        [
            random_bits(torch.tensor([0, 1, 2, 3]), torch.zeros(4, dtype=torch.int64), tokens),
            random_bits(torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2, 3]), tokens),
        ]
    )
    u = rows.double() / 2**31 - 0.5
    correlation = (u @ u.T) * 12 / u.shape[1] - torch.eye(len(u), dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / math.sqrt(u.shape[1])
    for a in range(len(rows)):
        for b in range(a):
            cells = (rows[a] >> 27).to(torch.int64) * 16 + (rows[b] >> 27).to(torch.int64)
            expected = u.shape[1] / 256
            chi2 = float(((torch.bincount(cells, minlength=256) - expected) ** 2).sum() / expected)
            assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def test_gumbel_is_gumbel() -> None:
    noise = gumbel(torch.arange(16), torch.arange(16), torch.arange(1 << 14)).double().flatten()
    assert noise.isfinite().all()
    assert abs(float(noise.mean()) - 0.57722) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    for x in (-1.5, 0.0, 2.0, 8.0):
        expected = math.exp(-math.exp(-x))
        spread = math.sqrt(expected * (1 - expected) / len(noise))
        assert abs(float((noise <= x).double().mean()) - expected) < 5 * spread


def test_extremes_are_finely_spaced() -> None:
    u = uniform(torch.arange(64), torch.arange(64), torch.arange(1 << 14)).flatten()
    smallest = u.sort().values[:64]
    assert len(set(smallest.tolist())) == 64
    assert float(smallest[0]) < 2.0**-18
