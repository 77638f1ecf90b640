"""How ranks share a model: communicators, layouts, frames from process to process.

Start with `layout` (which part of a matrix a rank holds), then `comm`, whose sums on GPUs `peer_memory` speeds up. Does
not own number formats (`quant`), the layers that use both (`layers`) or which sizes work (`config.parallel`).
"""

from __future__ import annotations

from octavo.parallel.comm import ALONE, Comm, Links, Pipe, Single, connect, join_store, open_store
from octavo.parallel.layout import Column, Heads, Layout, Replicated, Row, Slice, Vocabulary
from octavo.parallel.peer_memory import Rows

__all__ = [
    "ALONE",
    "Column",
    "Comm",
    "Heads",
    "Layout",
    "Links",
    "Pipe",
    "Replicated",
    "Row",
    "Rows",
    "Single",
    "Slice",
    "Vocabulary",
    "connect",
    "join_store",
    "open_store",
]
