"""Operands of GPU tests."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Normal values on the GPU."""
    return (torch.randn(shape, device="cuda") * scale).to(dtype)
