"""How many threads compute on a CPU, and where.

A thread for each physical core that the process may use, tied to it: an untied one that wakes up after a pause may land
on a busy core and hold up all others for milliseconds. The calling thread stays free, so nothing that it starts
inherits a single core. OMP_NUM_THREADS lowers the number; with fewer threads than cores, or with OMP_PROC_BIND, nothing
is tied here.
"""

from __future__ import annotations

import ctypes
import os

import torch

from octavo.config.device import available_cores, physical_cpus
from octavo.kernels.cpu import build


def set_up(rank: int = 0, ranks: int = 1) -> int:
    """Sizes and ties the teams of the calling thread, one of `ranks` equals of this machine; returns their size."""
    cpus = physical_cpus()
    share = max(min(len(cpus), available_cores()) // ranks, 1)
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    threads = min(share, int(given)) if given.isdigit() and int(given) else share
    torch.set_num_threads(threads)
    mine = cpus[rank * share : rank * share + threads]
    whole = threads * ranks == len(cpus) and threads > 1
    if whole and "OMP_PROC_BIND" not in os.environ and build.available() is None:
        build.library(build.FLOAT).pin((ctypes.c_int32 * threads)(*mine), ctypes.c_int64(threads))
    return threads
