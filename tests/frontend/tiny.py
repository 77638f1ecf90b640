"""A tokenizer of single bytes, and configurations that need no model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from octavo.config.engine import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from octavo.config.kv import KVGroup
from octavo.core.facts import DeviceFacts, ModelFacts, RopeFacts
from octavo.text import Tokenizer, load_tokenizer
from octavo.text.pieces import BYTE_OF

EOS = 256
VOCAB = 257


@cache
def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; 256 is the special token <eos>."""
    fast = FastTokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<eos>", special=True)])
    with TemporaryDirectory() as directory:
        fast.save(str(Path(directory) / "tokenizer.json"))
        return load_tokenizer(Path(directory))


def tiny_config(
    max_model_len: int = 64, sampling_defaults: dict[str, float] | None = None, vocab_size: int = VOCAB
) -> EngineConfig:
    """A made-up model of `vocab_size` tokens."""
    model = ModelFacts(
        path="",
        files="none",
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        max_position=max_model_len,
        norm_eps=1e-5,
        rope=RopeFacts(rotary_dim=8),
        windows=(None,),
        eos_token_ids=(EOS,),
        sampling_defaults=sampling_defaults or {},
    )
    return EngineConfig(
        model=model,
        device=DeviceFacts(kind="cpu", name="none", total_memory=1, free_memory=1, native_bfloat16=False),
        dtype="float32",
        load_format="dummy",
        seed=0,
        cache=CacheConfig(
            block_size=16, num_blocks=100, prefix_caching=True, dtype="float32", groups=(KVGroup(0, (0,), None),)
        ),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=max_model_len, overlap=0),
        parallel=ParallelConfig(),
    )
