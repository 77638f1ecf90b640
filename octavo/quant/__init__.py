"""Number formats of weights: which tensors exist, how a checkpoint becomes them, how to multiply.

Does not own which part of a matrix a rank holds (`parallel`) or file formats (`formats`, `weights`).
"""

from __future__ import annotations

from octavo.quant.blocks import Blocks, Stored
from octavo.quant.choose import Quantization, scheme_for
from octavo.quant.dense import Dense
from octavo.quant.scheme import Scheme

__all__ = ["Blocks", "Dense", "Quantization", "Scheme", "Stored", "scheme_for"]
