"""Importing torch without what only tracing needs: a quarter of the time that it takes.

`torch._meta_registrations` describes in Python what shapes operators give, for torch.compile and fake tensors, and
brings decompositions of hundreds of operators along. Nothing that computes on tensors with memory asks for them.
"""

from __future__ import annotations

import sys
from types import ModuleType

TRACING = "torch._meta_registrations"


def import_torch() -> None:
    """Imports torch, if it is not there yet, leaving TRACING to whoever imports that."""
    if "torch" in sys.modules:
        return
    sys.modules[TRACING] = ModuleType(TRACING)
    try:
        import torch  # noqa: F401
    finally:
        del sys.modules[TRACING]
