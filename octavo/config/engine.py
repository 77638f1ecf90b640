"""The resolved configuration: every value concrete, frozen, the same object for frontend, engine and workers.

`EngineArgs` (args.py) is what a user typed; `resolve` (resolve.py) turns it, with the facts about model and
device, into an `EngineConfig` and a list of decisions with reasons. Nothing mutates a config afterwards.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from octavo.config.kv import KVGroup
from octavo.core.facts import DeviceFacts, ModelFacts


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    block_size: int
    num_blocks: int
    """Pages in the pool, the padding page 0 included."""
    prefix_caching: bool
    dtype: str
    groups: tuple[KVGroup, ...]

    @property
    def kv_tokens(self) -> int:
        """Tokens of plain full-attention sequences that fit at once."""
        return (self.num_blocks - 1) // len(self.groups) * self.block_size


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    overlap: Literal[0, 1]
    """Steps launched before the previous one's tokens have reached the host."""
    stages: int = 1
    """Stages of a pipeline: so many plans are on their way at a time, each with rows of its own."""

    @property
    def depth(self) -> int:
        """Steps that stay in flight while the next one is planned; it may continue the oldest of them."""
        return self.stages - 1 + self.overlap


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True):
    tensor: int = 1
    """Ranks that share each layer."""
    pipeline: int = 1
    """Stages of layers."""
    backend: Literal["mp", "ray"] = "mp"
    """What runs the ranks beside rank 0: processes of this machine, or Ray's actors on any."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelFacts
    tokenizer: str | None = None
    """Where the tokenizer's files are; None without one."""
    device: DeviceFacts
    dtype: str
    load_format: Literal["auto", "safetensors", "gguf", "dummy"]
    quantization: Literal["auto", "none", "native", "int8"] = "none"
    """auto: native where the kernels for it can be had, else none."""
    seed: int
    cache: CacheConfig
    scheduler: SchedulerConfig
    parallel: ParallelConfig


class Decision(msgspec.Struct, frozen=True):
    """One resolved setting and why it is what it is; logged once at start."""

    name: str
    value: str
    reason: str
