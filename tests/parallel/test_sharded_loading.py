"""Each rank holds its slice of what one rank alone would hold, from every kind of file, and its share of the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.attention import attn_specs, load_backend
from octavo.config.kv import kv_groups
from octavo.config.parallel import place_of, rank_parameters, shard_of, stage_layers
from octavo.core.errors import ConfigError
from octavo.core.facts import ModelFacts, RopeFacts
from octavo.formats.gguf import GGUFFile
from octavo.kernels import load as load_kernels
from octavo.kernels.cpu import build as compiled
from octavo.models import Model, build_model
from octavo.quant import Dense, Scheme
from octavo.weights import load_weights

CPU = torch.device("cpu")
FACTS = ModelFacts(
    path="", files="none", architecture="qwen3", vocab_size=250, hidden_size=64, num_layers=3, num_heads=8,
    num_kv_heads=2, head_dim=16, intermediate_size=256, max_position=64, norm_eps=1e-5, rope=RopeFacts(rotary_dim=16),
    windows=(None,) * 3, qk_norm=True, qkv_bias=True, output_bias=True,
)  # fmt: skip


class Member:
    """A rank that never speaks to the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, x: Tensor) -> Tensor:
        raise AssertionError

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        raise AssertionError

    def all_gather(self, x: Tensor) -> Tensor:
        raise AssertionError


def model_of(
    facts: ModelFacts,
    rank: int = 0,
    tensor: int = 1,
    pipeline: int = 1,
    scheme: Scheme | None = None,
    dtype: torch.dtype = torch.float32,
    load_format: Any = "auto",
) -> Model:
    place = place_of(rank, tensor, pipeline)
    kernels, groups, scheme = load_kernels("cpu"), kv_groups(facts), scheme or Dense()
    model = build_model(
        facts,
        dtype=dtype,
        device=CPU,
        kernels=kernels,
        attention=load_backend(kernels, attn_specs(shard_of(facts, tensor), 16)),
        groups=groups,
        block_size=16,
        scheme=scheme,
        comm=Member(place.shard, tensor),
        layers=stage_layers(facts, pipeline)[place.stage],
    )
    load_weights(model, facts, load_format=load_format, seed=3, keep=scheme.keeps)
    return model


def rows_of(name: str, facts: ModelFacts, shard: int, size: int, whole: Tensor) -> Tensor:
    """The slice that a rank must hold, worked out from the meaning of the tensor."""

    def run(tensor: Tensor, dim: int = 0) -> Tensor:
        return tensor.chunk(size, dim)[shard]

    if ".qkv." in name:
        q, k, v = torch.split(whole, [facts.q_size, facts.kv_size, facts.kv_size])
        if size > facts.num_kv_heads:
            head = shard * facts.num_kv_heads // size
            return torch.cat([run(q), *(torch.split(part, facts.head_dim)[head] for part in (k, v))])
        return torch.cat([run(q), run(k), run(v)])
    if ".gate_up." in name:
        return torch.cat([run(part) for part in whole.chunk(2)])
    if name.endswith((".out.weight", ".down.weight")):
        return run(whole, 1)
    if name.startswith(("embed", "head")):
        return run(whole)
    return whole


def check_ranks(facts: ModelFacts, whole: Model, rank_model: Callable[[int, int, int], Model]) -> None:
    full = dict(whole.tensors())
    for tensor, pipeline in ((2, 1), (4, 1), (1, 3), (2, 2)):
        seen = set()
        for rank in range(tensor * pipeline):
            place = place_of(rank, tensor, pipeline)
            for name, held in rank_model(rank, tensor, pipeline).tensors():
                expected = rows_of(name, facts, place.shard, tensor, full[name])
                assert torch.equal(held, expected), f"{name} of rank {rank} of {tensor} x {pipeline}"
                seen.add(name)
        assert seen == set(full), "every tensor is held by a rank"


def test_dummy_weights_do_not_depend_on_the_ranks() -> None:
    def made(rank: int, tensor: int, pipeline: int) -> Model:
        return model_of(FACTS, rank, tensor, pipeline, load_format="dummy")

    check_ranks(FACTS, made(0, 1, 1), made)


def test_safetensors(tmp_path: Path) -> None:
    facts = msgspec.structs.replace(FACTS, path=str(tmp_path), files="safetensors", tie_embeddings=True)
    generator = torch.Generator().manual_seed(0)
    slots = model_of(msgspec.structs.replace(facts, files="none"), load_format="dummy").slots()
    save_file({n: torch.randn(s, generator=generator) for n, s in slots}, tmp_path / "model.safetensors")
    check_ranks(facts, model_of(facts), lambda *at: model_of(facts, *at))


def write_gguf(path: Path, facts: ModelFacts, kind: gguf.GGMLQuantizationType) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    random = np.random.default_rng(0)
    h, m = facts.hidden_size, facts.intermediate_size
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(facts.num_layers):
        names = {"attn_q": (facts.q_size, h), "attn_k": (facts.kv_size, h), "attn_v": (facts.kv_size, h)}
        names |= {"attn_output": (h, facts.q_size), "ffn_gate": (m, h), "ffn_up": (m, h), "ffn_down": (h, m)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in names.items()}
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(h, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(h, np.float32))
    for name, shape in (
        {"token_embd.weight": (facts.vocab_size, h), "output.weight": (facts.vocab_size, h)} | shapes
    ).items():
        values = random.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def quantized(tmp_path: Path) -> ModelFacts:
    path = tmp_path / "m.gguf"
    facts = msgspec.structs.replace(
        FACTS, path=str(path), files="gguf", architecture="llama", num_heads=8, num_kv_heads=4, head_dim=32,
        qk_norm=False, qkv_bias=False, output_bias=False,
    )  # fmt: skip
    write_gguf(path, facts, gguf.GGMLQuantizationType.Q8_0)
    return facts


def test_gguf_expanded_to_floats(quantized: ModelFacts) -> None:
    check_ranks(quantized, model_of(quantized), lambda *at: model_of(quantized, *at))


@pytest.mark.skipif(compiled.available() is not None, reason="no C compiler")
@pytest.mark.parametrize("tensor", [2, 4])
def test_gguf_blocks_are_cut_between_blocks(quantized: ModelFacts, tensor: int) -> None:
    """Packed weights, multiplied: ranks' partial sums and outputs are those of the whole matrix's slices."""
    from octavo.quant.gguf import GGUF

    whole: Any = model_of(quantized)
    block, x = whole.blocks[1], torch.randn(5, 64)
    down_in, out_in = torch.randn(5, 256), torch.randn(5, 256)
    for rank in range(tensor):
        held: Any = model_of(quantized, rank, tensor, scheme=GGUF())
        mine = held.blocks[1]
        weight = rows_of(".qkv.", quantized, rank, tensor, block.attn.qkv.tensors()["weight"])
        assert close(mine.attn.qkv(x), x @ weight.T)
        weight = rows_of(".gate_up.", quantized, rank, tensor, block.mlp.gate_up.tensors()["weight"])
        assert close(mine.mlp.gate_up(x), x @ weight.T)
        for layer, full, inputs in ((mine.mlp.down, block.mlp.down, down_in), (mine.attn.out, block.attn.out, out_in)):
            part = inputs.chunk(tensor, 1)[rank].contiguous()
            assert close(layer(part), part @ full.tensors()["weight"].chunk(tensor, 1)[rank].T)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Activations are rounded to 8 bits."""
    return float((actual - expected).norm() / expected.norm()) < 0.02


@pytest.mark.skipif(compiled.available() is not None, reason="no C compiler")
def test_a_size_that_cuts_blocks_is_refused_with_those_that_work(quantized: ModelFacts) -> None:
    from octavo.quant.gguf import GGUF

    wide = msgspec.structs.replace(quantized, intermediate_size=192, path=quantized.path + ".wide")
    write_gguf(Path(wide.path), wide, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(ConfigError, match=r"192 inputs in Q8_0.*tensor-parallel-size of 1, 2, 3, 6, or"):
        model_of(wide, 0, 4, scheme=GGUF())


def test_gguf_reads_no_more_than_its_rows(quantized: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.weights import gguf_types

    decoded: list[int] = []
    original = gguf_types.dequantize

    def counted(data: Any, type_name: str, shape: tuple[int, ...], pool: Any = None) -> Tensor:
        decoded.append(int(np.prod(shape)))
        return original(data, type_name, shape, pool)

    monkeypatch.setattr(gguf_types, "dequantize", counted)
    model_of(quantized, 0, 4)
    total = sum(int(np.prod(t.shape)) for t in GGUFFile(quantized.path).tensors.values() if len(t.shape) == 2)
    assert sum(decoded) < 1.02 * total / 4


REPLICATED = ("norm", "attn.out.bias")
"""Tensors that every rank holds whole (the bias: rank 0), by name."""


@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_a_rank_are_its_share(tensor: int, tied: bool) -> None:
    facts = msgspec.structs.replace(FACTS, tie_embeddings=tied, num_kv_heads=8)
    whole = sum(t.numel() for name, t in model_of(facts, load_format="dummy").tensors())
    assert whole == facts.num_parameters
    for rank in range(tensor):
        held = dict(model_of(facts, rank, tensor, load_format="dummy").tensors())
        common = sum(t.numel() for name, t in held.items() if any(part in name for part in REPLICATED))
        count = sum(t.numel() for t in held.values())
        assert count - common == pytest.approx((whole - common) / tensor, rel=0.05)
        assert count <= rank_parameters(facts, tensor, 1)
    assert rank_parameters(facts, 1, 1) == whole
