"""The engine's process imports torch without what only tracing needs, and can import that later."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from octavo.engine.lean import TRACING, import_torch
import_torch()
import torch, octavo.worker
assert TRACING not in sys.modules
assert "torch._refs" not in sys.modules
assert torch.ones(2, 3).softmax(-1).sum().item() == 2
import torch._meta_registrations as tracing
assert tracing is sys.modules[TRACING] is torch._meta_registrations
assert callable(tracing.activate_meta)
import_torch()
assert sys.modules[TRACING] is tracing
"""


def test_torch_computes_and_what_was_left_out_comes_later() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
