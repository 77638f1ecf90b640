"""How ranks share a model: communicators, and layouts that say which part of a matrix a rank holds.

Does not own number formats (`quant`) or the layers that use both (`layers`).
"""

from __future__ import annotations

from octavo.parallel.comm import Comm, Single
from octavo.parallel.layout import Column, Heads, Layout, Replicated, Row, Slice

__all__ = ["Column", "Comm", "Heads", "Layout", "Replicated", "Row", "Single", "Slice"]
