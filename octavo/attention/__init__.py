"""Attention over a paged KV cache: `plan` once per step and group, `attend` once per layer.

Start with `batch` (what a step looks like to layers), then `backend` (the Protocol), then `reference`. Does not own the
cache's memory or block tables (`worker`), nor which tokens run (`scheduler`).
"""

from __future__ import annotations

import torch

from octavo.attention.backend import AttentionBackend, AttnSpec, HeadNorms, Rotation, attn_specs
from octavo.attention.batch import Batch, KVCache
from octavo.attention.cpu import CpuAttention
from octavo.attention.reference import ReferenceAttention
from octavo.core.errors import UnsupportedModel
from octavo.kernels import Kernels
from octavo.kernels.cpu import build

CPU = torch.device("cpu")

__all__ = [
    "AttentionBackend",
    "AttnSpec",
    "Batch",
    "HeadNorms",
    "KVCache",
    "Rotation",
    "attn_specs",
    "load_backend",
]


def load_backend(
    kernels: Kernels,
    specs: tuple[AttnSpec, ...],
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> AttentionBackend:
    """The backend for layers of these specs; UnsupportedModel with the reason where none can run them."""
    backend: AttentionBackend = ReferenceAttention(kernels)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        from octavo.attention.cuda import CudaAttention

        fast = CudaAttention(kernels, specs, device, dtype)
        if not any(fast.supports(spec) for spec in specs):
            backend = fast
    elif device.type == "cpu" and build.available() is None:
        backend = CpuAttention(kernels, specs)
    for spec in specs:
        if reason := backend.supports(spec):
            raise UnsupportedModel(f"attention of this model cannot run: {reason}")
    return backend
