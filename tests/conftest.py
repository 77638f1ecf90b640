"""Chosen before any test module is imported: without a GPU, Triton's kernels run under its interpreter.

And SIGINT interrupts, here and in processes of tests, also where the shell that started them in the background said
otherwise.
"""

from __future__ import annotations

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
signal.signal(signal.SIGINT, signal.default_int_handler)
