"""GGUF's tensor names become those of Hugging Face checkpoints, for the llama-like architectures."""

from __future__ import annotations

import re

from octavo.core.errors import UnsupportedModel

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight")
"""Rotary frequencies: read with the facts, or recomputed."""


def hf_name(name: str) -> str | None:
    """The checkpoint's name for GGUF tensor `name`, None for one that no model needs. UnsupportedModel if unknown."""
    if _IGNORED.fullmatch(name):
        return None
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is not None:
        layer, module, key = match.groups()
        table, prefix = (_MODEL, "") if layer is None else (_BLOCK, f"model.layers.{layer}.")
        if module in table:
            return f"{prefix}{table[module]}.{key}"
    raise UnsupportedModel(f"GGUF tensor {name!r} is not one of a llama, qwen2 or qwen3 model")
