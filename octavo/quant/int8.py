"""Float weights rounded to 8 bits when they are loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.cpu import quant_linear
from octavo.kernels.cpu.quant_linear import COLUMNS, Format, Packed
from octavo.quant.blocks import Blocks
from octavo.quant.packed import PackedScheme


class Int8(PackedScheme):
    """Scheme: symmetric integers with a scale for each 32 columns of a row, 8.5 bits a weight."""

    def pack(self, tensor: Tensor | Blocks, dtype: torch.dtype) -> Packed | Tensor:
        assert isinstance(tensor, Tensor)
        if tensor.shape[1] % COLUMNS:
            return tensor.to(dtype, copy=True)
        return quant_linear.stack([quantize(rows.float()) for rows in torch.split(tensor, 4096)])


def quantize(weight: Tensor) -> Packed:
    """weight [out, in] float32: codes -127..127 times max |w| / 127 of their block, rounded to float16."""
    blocks = weight.view(weight.shape[0], -1, COLUMNS)
    scales = (blocks.abs().amax(2) / 127).half()
    steps = torch.where(scales > 0, scales, torch.inf).float()
    codes = (blocks / steps[..., None]).round_().clamp_(-127, 127).add_(128).to(torch.uint8)
    return quant_linear.pack(Format.Q8, codes.view(weight.shape), scales, None)
