"""Facts about a model, read from its files before any weight is touched.

`formats` fills these in; `config`, `weights` and `models` read them. Pure data: paths are strings, nothing is opened.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class RopeFacts(msgspec.Struct, frozen=True):
    """Rotary position embedding: RoFormer (arXiv:2104.09864) and the published ways to stretch it.

    `kind` names the scaling; the fields that it uses are set, the others keep their neutral value.
    """

    theta: float = 10000.0
    rotary_dim: int = 0
    """Leading dimensions of a head that rotate."""
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that shapes the model and the engine around it."""

    path: str
    """The directory or the .gguf file."""
    files: Literal["safetensors", "gguf", "none"]
    """Kind of weight files; "none" when only config.json is there (dummy weights)."""
    architecture: str
    """Family, a module of octavo.models: llama, mistral, qwen2, qwen3."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    norm_eps: float
    rope: RopeFacts
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu"] = "silu"
    windows: tuple[int | None, ...]
    """Per layer: how many tokens, its own included, a token attends to; None for all."""
    dtype: str = "bfloat16"
    """The checkpoint's number format: float32, float16 or bfloat16; quantized files name their widest part."""
    formats: dict[str, int] = {}
    """Parameters by the number format that the file has them in ("Q4_K", "F32", ...); empty where it has one only."""
    eos_token_ids: tuple[int, ...] = ()
    """The union of what config, generation_config, tokenizer and GGUF metadata say ends a sequence."""
    bos_token_id: int | None = None
    sampling_defaults: dict[str, float] = {}
    """generation_config's temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens where given."""
    qk_norm: bool = False

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Weights held in memory (biases and norms included, tied head counted once)."""
        h, q, kv, m = self.hidden_size, self.q_size, self.kv_size, self.intermediate_size
        attention = h * (q + 2 * kv) + q * h + (q + 2 * kv if self.qkv_bias else 0) + (h if self.output_bias else 0)
        mlp = 3 * h * m + (2 * m + h if self.mlp_bias else 0)
        norms = 2 * h + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocab_size * h * (1 if self.tie_embeddings else 2)
        return self.num_layers * (attention + mlp + norms) + embeddings + h


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the device that a worker will use. Memory in bytes."""

    kind: Literal["cpu", "cuda"]
    name: str
    total_memory: int
    free_memory: int
    native_bfloat16: bool
    cores: int = 1
    index: int = 0
    """Which GPU, in CUDA's order."""
    count: int = 1
    """GPUs from this one on, of which each rank takes one."""
