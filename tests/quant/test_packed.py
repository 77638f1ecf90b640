"""Schemes that keep weights quantized, inside the layers that use them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.attention.reference import ReferenceAttention
from octavo.config.resolve import INT8_BITS, KEPT_BITS
from octavo.core.errors import ConfigError, UnsupportedModel
from octavo.kernels import load
from octavo.kernels.compile import BuildError
from octavo.kernels.cpu import quant_linear
from octavo.layers import Build, Embedding, Linear
from octavo.parallel import Column, Comm, Heads, Layout, Replicated, Row, Single
from octavo.quant import Blocks, Scheme
from octavo.quant.gguf_blocks import block_of
from octavo.weights.gguf_types import dequantize

if quant_linear.available() is not None:
    pytest.skip("no C compiler here", allow_module_level=True)

from octavo.kernels.cpu.quant_linear import Packed
from octavo.quant.gguf import FORMATS, GGUF
from octavo.quant.int8 import Int8

HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
"""Where a block has its 16-bit floats; elsewhere at 0."""


class Rank(Single):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def build(scheme: Scheme, comm: Comm | None = None, dtype: torch.dtype = torch.float32) -> Build:
    kernels = load("cpu")
    backend = ReferenceAttention(kernels)
    return Build(dtype, torch.device("cpu"), kernels, backend, (), (), comm or Single(), scheme)


def blocks(type_name: str, rows: int, columns: int, seed: int = 0) -> Blocks:
    """Random codes; random scales that are powers of two, so that products of them are exact in 16 bits."""
    size, nbytes = block_of(type_name)
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows * columns // size, nbytes), dtype=np.uint8)
    for at in HALVES.get(type_name, (0,)):
        data[:, at : at + 2] = (2.0 ** -random.integers(5, 9, (len(data), 1))).astype(np.float16).view(np.uint8)
    return Blocks(type_name, torch.from_numpy(data.reshape(rows, -1)))


def values(stored: Tensor | Blocks) -> Tensor:
    if isinstance(stored, Tensor):
        return stored
    return dequantize(stored.data.numpy().tobytes(), stored.type, stored.shape)


def exact(count: int, columns: int) -> Tensor:
    """Activations that lose nothing to 8 bits."""
    integers = torch.randint(-127, 128, (count, columns // 32, 32), generator=torch.Generator().manual_seed(5))
    integers[..., 7] = 127
    return (integers.float() / 64).view(count, columns)


def loaded(layer: Linear, tensors: Mapping[str, Tensor | Blocks], bias: Tensor | None = None) -> Linear:
    slots = layer.slots()
    for part, stored in tensors.items():
        slots[part, "weight"](stored)
        if bias is not None:
            slots[part, "bias"](bias)
    layer.finish()
    return layer


def check(layer: Linear, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("type_name", sorted(FORMATS | KEPT_BITS))
def test_memory_is_what_is_planned(type_name: str) -> None:
    packed = GGUF().pack(blocks(type_name, 64, 512), torch.float32)
    assert isinstance(packed, Packed)
    assert packed.data.nbytes * 8 == 64 * 512 * KEPT_BITS[type_name]
    rounded = Int8().pack(torch.ones(64, 512), torch.float32)
    assert isinstance(rounded, Packed)
    assert rounded.data.nbytes * 8 == 64 * 512 * INT8_BITS


@pytest.mark.parametrize("type_name", sorted(FORMATS))
@pytest.mark.parametrize("count", [1, 7])
def test_products_with_a_files_blocks(type_name: str, count: int) -> None:
    stored = blocks(type_name, 40, 512)
    layer = loaded(Linear(512, Replicated({"out": 40}), build(GGUF())), {"out": stored})
    check(layer, exact(count, 512), values(stored))
    assert [(name, t.dtype) for name, t in layer.tensors().items()] == [("weight", torch.uint8)]


@pytest.mark.parametrize("type_name", sorted(FORMATS))
def test_weights_take_little_more_memory_than_in_the_file(type_name: str) -> None:
    stored = blocks(type_name, 64, 512)
    layer = loaded(Linear(512, Replicated({"out": 64}), build(GGUF())), {"out": stored})
    assert sum(t.nbytes for t in layer.tensors().values()) <= stored.data.nbytes * 1.28


def test_many_rows_are_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.quant.gguf._CHUNK", 32 * 64)
    stored = blocks("Q4_0", 101, 64)
    check(loaded(Linear(64, Replicated({"out": 101}), build(GGUF())), {"out": stored}), exact(3, 64), values(stored))


@pytest.mark.parametrize(
    ("types", "held"),
    [
        (("Q4_1", "Q4_1", "Q4_1"), ["weight"]),
        (("Q4_K", "Q4_1", "Q6_K"), ["weight.0", "weight.1"]),
        (("Q4_0", "Q8_0", "Q4_0"), ["weight.0", "weight.1", "weight.2"]),
        (("F32", "F32", "Q5_0"), ["weight.0", "weight.1"]),
    ],
)
def test_a_fused_linear_of_several_formats(types: tuple[str, ...], held: list[str]) -> None:
    parts: dict[str, Tensor | Blocks] = {}
    for i, (part, rows) in enumerate({"q": 32, "k": 16, "v": 16}.items()):
        generator = torch.Generator().manual_seed(i)
        floats = torch.randn(rows, 256, generator=generator)
        parts[part] = floats if types[i] == "F32" else blocks(types[i], rows, 256, i)
    bias = torch.arange(64.0)
    layer = Linear(256, Heads(2, 1, 16), build(GGUF()), bias=True)
    slots = layer.slots()
    for part in reversed(parts):
        slots[part, "weight"](parts[part])
    for part, at in {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}.items():
        slots[part, "bias"](bias[at])
    layer.finish()
    assert [name for name in layer.tensors() if name != "bias"] == held
    check(layer, exact(5, 256), torch.cat([values(part) for part in parts.values()]), bias)


@pytest.fixture
def without_q4_min(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of all kernels those of Q4_1 and Q4_K do not compile."""
    compiled = quant_linear.Kernels.product

    def product(self: quant_linear.Kernels, format: quant_linear.Format) -> int:
        if format is quant_linear.Format.Q4_MIN:
            raise BuildError("cc failed on quant_formats.c: no such instruction")
        return compiled(self, format)

    monkeypatch.setattr(quant_linear.Kernels, "product", product)
    quant_linear.multiplies.cache_clear()
    yield
    quant_linear.multiplies.cache_clear()


@pytest.mark.usefixtures("without_q4_min")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_format_that_does_not_compile_is_expanded_and_the_log_says_so(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {"q": blocks("Q4_1", 32, 256, 1), "k": blocks("Q8_0", 16, 256, 2), "v": blocks("Q4_K", 16, 256, 3)}
    with caplog.at_level(logging.WARNING, "octavo"):
        layer = loaded(Linear(256, Heads(2, 1, 16), build(GGUF(), dtype=dtype)), parts)
    assert [tensor.dtype for tensor in layer.tensors().values()] == [dtype, torch.uint8, dtype]
    assert [record.message for record in caplog.records] == [
        "no kernels for Q4_MIN weights, they are expanded to floats: cc failed on quant_formats.c: no such instruction"
    ]
    x, weight = exact(5, 256), torch.cat([values(part) for part in parts.values()])
    if dtype == torch.float32:
        check(layer, x, weight)
    else:
        y = layer(x.to(dtype)).double()
        assert (y - x.double() @ weight.double().T).norm() < 0.01 * y.norm()


@pytest.mark.usefixtures("without_q4_min")
def test_an_embedding_whose_format_does_not_compile() -> None:
    stored = blocks("Q4_1", 40, 64)
    embedding = Embedding(40, 64, build(GGUF()))
    for load_ in embedding.slots().values():
        load_(stored)
    embedding.finish()
    torch.testing.assert_close(embedding(torch.tensor([3, 39, 0])), values(stored)[[3, 39, 0]])


def test_parts_that_end_within_a_panel_stay_apart() -> None:
    parts = {"gate": blocks("Q4_1", 24, 64, 1), "up": blocks("Q4_1", 24, 64, 2)}
    layer = loaded(Linear(64, Column({"gate": 24, "up": 24}), build(GGUF())), parts)
    assert len(layer.tensors()) == 2
    check(layer, exact(2, 64), torch.cat([values(part) for part in parts.values()]))


@pytest.mark.parametrize(("layout", "type_name"), [(Column({"out": 64}), "Q4_K"), (Row({"out": 64}), "Q8_0")])
def test_ranks_hold_their_share(layout: Layout, type_name: str) -> None:
    stored, x = blocks(type_name, 64, 512), exact(3, 512)
    layers = [loaded(Linear(512, layout, build(GGUF(), Rank(r, 2))), {"out": stored}) for r in range(2)]
    if layout.partial:
        result = sum(layer(half) for layer, half in zip(layers, x.chunk(2, 1), strict=True))
    else:
        result = torch.cat([layer(x) for layer in layers], 1)
    expected = x @ values(stored).T
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_ranks_do_not_cut_blocks() -> None:
    layer = Linear(256, Row({"out": 16}), build(GGUF(), Rank(0, 2)))
    with pytest.raises(ConfigError, match=r"Q4_K, blocks of 256.*size of 1, or"):
        layer.slots()["out", "weight"](blocks("Q4_K", 16, 256))


def test_wrong_shapes_are_refused() -> None:
    layer = Linear(64, Replicated({"out": 16}), build(GGUF()))
    with pytest.raises(UnsupportedModel, match=r"\[16, 32\]"):
        layer.slots()["out", "weight"](blocks("Q4_0", 16, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_and_its_head(dtype: torch.dtype) -> None:
    stored = blocks("Q8_0", 50, 64)
    embed = Embedding(50, 64, build(GGUF(), dtype=dtype))
    loaded(embed, {"": stored})
    tokens = torch.tensor([49, 0, 17, 17])
    assert torch.equal(embed(tokens), values(stored)[tokens].to(dtype))
    x = exact(3, 64).to(dtype)
    expected = x.float() @ values(stored).T
    torch.testing.assert_close(
        embed.project(x).float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2
    )


def test_int8_is_within_a_step_of_the_weights() -> None:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    weight[3, :32], weight[5] = 0, weight[5] * 1e-3
    embed = Embedding(70, 96, build(Int8()))
    loaded(embed, {"": weight})
    held = embed(torch.arange(70))
    steps = weight.view(70, 3, 32).abs().amax(2, keepdim=True) / 127
    assert bool(((held - weight).view(70, 3, 32).abs() <= 0.51 * steps + 127 * steps * 2**-11 + 1e-7).all())
    x = exact(5, 96)
    torch.testing.assert_close(embed.project(x), x @ held.T, rtol=1e-4, atol=1e-4)


def test_int8_of_columns_that_do_not_divide_is_float() -> None:
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    layer = loaded(Linear(40, Replicated({"out": 8}), build(Int8())), {"out": weight})
    assert torch.equal(layer.tensors()["weight"], weight)


def test_after_norm_equals_its_steps() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    layer = Linear(32, Column({"gate": 32, "up": 32}), build(Int8()))
    loaded(layer, {"gate": weight[:32], "up": weight[32:]})
    kernels = load("cpu")
    x, residual, norm = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(3)).unbind()
    for before in (None, residual):
        result, stream = layer.after_norm(x, before, (norm[0], 1e-5), gated=True)
        total = x if before is None else x + before
        expected = kernels.silu_mul(layer(kernels.rms_norm(total, norm[0], 1e-5)))
        torch.testing.assert_close(stream, total)
        assert (result - expected).norm() < 1e-3 * expected.norm()
