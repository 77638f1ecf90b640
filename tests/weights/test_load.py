from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from octavo.core.errors import ConfigError, UnsupportedModel
from octavo.core.facts import ModelFacts, RopeFacts
from octavo.formats import GGUFFile, locate, read_facts
from octavo.quant import Stored
from octavo.weights import load_weights
from octavo.weights.gguf_names import hf_name
from octavo.weights.load import restore_rope_order


class Recorder:
    """A model that copies what it is given."""

    def __init__(self, **parameters: Tensor) -> None:
        self.loaded: dict[str, Tensor] = {}
        self.parameters = parameters
        self.finished = 0

    def load_weight(self, name: str, tensor: Stored) -> None:
        whole = tensor[(slice(None),) * len(tensor.shape)]
        assert isinstance(whole, Tensor)
        assert name not in self.loaded
        self.loaded[name] = whole.clone()

    def slots(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        return ((name, tuple(tensor.shape)) for name, tensor in self.parameters.items())

    def finish_loading(self) -> None:
        self.finished += 1

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.parameters.items())


def facts(path: Path, files: Any = "safetensors", architecture: str = "llama") -> ModelFacts:
    return ModelFacts(
        path=str(path), files=files, architecture=architecture, vocab_size=32, hidden_size=64, num_layers=1,
        num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, max_position=128, norm_eps=1e-5,
        rope=RopeFacts(), windows=(None,),
    )  # fmt: skip


def load(model: Recorder, of: ModelFacts, load_format: Any = "auto", seed: int = 0, **options: Any) -> None:
    load_weights(model, of, load_format=load_format, seed=seed, **options)


def weights(count: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    return {f"w{i}": torch.randn(i + 1, 3, generator=generator).to(dtypes[i % 3]) for i in range(count)}


@pytest.mark.parametrize("shards", [1, 2])
def test_safetensors(tmp_path: Path, shards: int) -> None:
    expected = weights()
    if shards == 1:
        save_file(expected, tmp_path / "model.safetensors")
    else:
        weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(expected)}
        for part in set(weight_map.values()):
            save_file({n: t for n, t in expected.items() if weight_map[n] == part}, tmp_path / part)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = Recorder()
    told: list[tuple[str, int, int]] = []
    load(model, facts(tmp_path), progress=lambda *step: told.append(step))
    assert model.loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert model.loaded[name].dtype == tensor.dtype
        assert torch.equal(model.loaded[name], tensor)
    assert model.finished == 1
    assert told == [("tensors", done, 5) for done in range(1, 6)]


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_file({"w.qweight": torch.zeros(2, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"w\.qweight has dtype I32"):
        load(Recorder(), facts(tmp_path))


def test_missing_files_and_wrong_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="load_format dummy"):
        load(Recorder(), facts(tmp_path, "none"))
    with pytest.raises(ConfigError, match="load_format is gguf"):
        load(Recorder(), facts(tmp_path), "gguf")


def reorder_as_llama_cpp(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """What its converter does to q and k: the two halves of each head interleaved."""
    half = rows.shape[0] // heads // 2
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(half):
            for part in range(2):
                out[head * 2 * half + 2 * i + part] = rows[head * 2 * half + part * half + i]
    return out


@pytest.mark.parametrize("shape", [(64, 5), (32,)])
@pytest.mark.parametrize("heads", [2, 4])
def test_rope_order_is_restored(shape: tuple[int, ...], heads: int) -> None:
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    reordered = torch.from_numpy(reorder_as_llama_cpp(rows, heads))
    assert torch.equal(restore_rope_order(reordered, heads), torch.from_numpy(rows))


def test_rope_order_of_rows_that_do_not_divide() -> None:
    with pytest.raises(UnsupportedModel, match="10 rows"):
        restore_rope_order(torch.zeros(10, 2), 4)


def write_gguf(path: Path, architecture: str, tensors: dict[str, NDArray[Any]]) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        if tensor.dtype == np.uint8:
            writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gguf(architecture: str, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    hidden, kv = (
        random.standard_normal((64, 64)).astype(np.float32),
        random.standard_normal((32, 64)).astype(np.float32),
    )
    bias = random.standard_normal(32).astype(np.float32)
    q, k, b = hidden, kv, bias
    if architecture == "llama":
        q, k, b = (reorder_as_llama_cpp(x, heads) for x, heads in ((q, 4), (k, 2), (b, 2)))
    quantized = gguf.quants.quantize(hidden, gguf.GGMLQuantizationType.Q8_0)
    tensors: dict[str, NDArray[Any]] = {
        "token_embd.weight": kv.astype(np.float16),
        "rope_freqs.weight": bias,
        "blk.0.attn_q.weight": q,
        "blk.0.attn_k.weight": k,
        "blk.0.attn_k.bias": b,
        "blk.0.attn_v.weight": kv,
        "blk.0.attn_output.weight": quantized,
        "output_norm.weight": bias,
    }
    model = Recorder()
    told: list[tuple[str, int, int]] = []
    path = write_gguf(tmp_path / "m.gguf", architecture, tensors)
    load(model, facts(path, "gguf", architecture), progress=lambda *step: told.append(step))
    expected = {
        "model.embed_tokens.weight": kv.astype(np.float16),
        "model.layers.0.self_attn.q_proj.weight": hidden,
        "model.layers.0.self_attn.k_proj.weight": kv,
        "model.layers.0.self_attn.k_proj.bias": bias,
        "model.layers.0.self_attn.v_proj.weight": kv,
        "model.layers.0.self_attn.o_proj.weight": gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q8_0),
        "model.norm.weight": bias,
    }
    assert model.loaded.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(model.loaded[name].numpy(), array, err_msg=name)
    assert model.finished == 1
    assert told[-1] == ("tensors", 8, 8)


def test_gguf_with_an_unknown_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UnsupportedModel, match="ffn_gate_exps"):
        load(Recorder(), facts(path, "gguf"))


def test_gguf_with_an_unsupported_format(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", {"output.weight": np.zeros((2, 2), np.int32)})
    with pytest.raises(UnsupportedModel, match=r"m\.gguf: tensor output\.weight: .*I32"):
        load(Recorder(), facts(path, "gguf"))


@pytest.mark.parametrize(
    "name", ["blk.x.attn_q.weight", "blk.0.attn_q", "blk.0.token_embd.weight", "attn_q.weight", "v"]
)
def test_names_of_no_place(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="is not one of"):
        hf_name(name)


def test_names_match_those_of_the_reference_table() -> None:
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    names = ["input_layernorm", "post_attention_layernorm", *(f"mlp.{m}_proj" for m in ("gate", "up", "down"))]
    names += [f"self_attn.{m}" for m in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    for name in ["model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.2.{n}" for n in names)]:
        stored = table.get_name(name)
        assert hf_name(f"{stored}.weight") == f"{name}.weight"


def test_the_embedded_model_equals_the_reference() -> None:
    path = locate(None)
    shapes: dict[str, tuple[int, ...]] = {}

    class KeepsOneBlock(Recorder):
        def load_weight(self, name: str, tensor: Stored) -> None:
            shapes[name] = tuple(tensor.shape)
            if name.startswith("model.layers.29."):
                super().load_weight(name, tensor)

    model = KeepsOneBlock()
    load(model, read_facts(path))
    assert len(shapes) == 272
    assert shapes["model.embed_tokens.weight"] == (49152, 576)
    file = GGUFFile(path)
    for stored, name, heads in [("attn_q", "q_proj", 9), ("attn_k", "k_proj", 3), ("attn_v", "v_proj", 0)]:
        tensor = file.tensors[f"blk.29.{stored}.weight"]
        raw = np.frombuffer(file.data(tensor), np.uint8).reshape(tensor.shape[0], -1)
        values = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.type]))
        loaded = model.loaded[f"model.layers.29.self_attn.{name}.weight"]
        assert torch.equal(loaded, restore_rope_order(values, heads) if heads else values)


def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    raw = gguf.quants.quantize(np.ones((512, 1024), np.float32), gguf.GGMLQuantizationType.Q8_0)
    path = write_gguf(tmp_path / "m.gguf", "llama", {f"blk.{i}.ffn_up.weight": raw for i in range(6)})

    class Forgetful(Recorder):
        def load_weight(self, name: str, tensor: Stored) -> None:
            assert tensor.shape == (512, 1024)

    tracemalloc.start()
    try:
        load(Forgetful(), facts(path, "gguf"))
        assert tracemalloc.get_traced_memory()[1] < 3 * 512 * 1024 * 4
    finally:
        tracemalloc.stop()


def dummy(seed: int, *names: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = Recorder(**{name: torch.empty(300, 50, dtype=dtype) for name in names})
    load(model, facts(Path("nowhere"), "none"), "dummy", seed)
    return model.loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dummy_is_uniform_within_its_bound(dtype: torch.dtype) -> None:
    for tensor in dummy(0, "a", "norm", dtype=dtype).values():
        values = tensor.double()
        assert values.abs().max() <= 1.004e-3  # the bound, rounded to bfloat16
        assert values.max() > 0.99e-3
        assert values.min() < -0.99e-3
        assert abs(values.mean()) < 2e-5
        assert values.std().item() == pytest.approx(1e-3 / 3**0.5, rel=0.02)


def test_dummy_depends_on_seed_and_name_only() -> None:
    first, again, other = dummy(0, "a", "b"), dummy(0, "b", "a"), dummy(1, "a", "b")
    assert torch.equal(first["a"], again["a"])
    assert torch.equal(first["b"], again["b"])
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], other["a"])
