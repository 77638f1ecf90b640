"""Loads the libraries that `kernels.compile` makes of the C sources of this package.

Owns no kernels: modules beside this one declare the functions that they call.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Sequence

import torch  # noqa: F401  before any library here, so that both use one OpenMP runtime

from octavo.kernels.compile import (
    FLOAT,
    FORMATS,
    NATIVE,
    QUANT,
    BuildError,
    compile_soon,
    compiled,
    for_format,
    identity,
)

__all__ = [
    "FLOAT",
    "FORMATS",
    "NATIVE",
    "QUANT",
    "BuildError",
    "available",
    "compile_soon",
    "for_format",
    "library",
]

logger = logging.getLogger("octavo")

_lock = threading.RLock()
_loaded: dict[str, ctypes.CDLL] = {}
_failed: dict[str, BuildError] = {}


def library(sources: Sequence[str], flags: Sequence[str] = NATIVE) -> ctypes.CDLL:
    """The library made of `sources`, names of files beside this one, for the target that `flags` name.

    Compiles at the first call ever, loads at the first call of the process. Safe to call from several threads and
    processes. Raises BuildError, always the same one for the same arguments.
    """
    key = identity(tuple(sources), tuple(flags))
    with _lock:
        if key in _failed:
            raise _failed[key]
        if key not in _loaded:
            try:
                _loaded[key] = _load(sources, flags)
            except BuildError as error:
                _failed[key] = error
                raise
        return _loaded[key]


@functools.cache
def available() -> str | None:
    """None if the kernels for float weights can run here, otherwise the reason why not, which is also logged once."""
    try:
        library(FLOAT)
    except BuildError as error:
        logger.warning("CPU kernels are off, plain PyTorch serves instead, several times slower: %s", error)
        return str(error)
    return None


def _load(sources: Sequence[str], flags: Sequence[str]) -> ctypes.CDLL:
    path = compiled(sources, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}; delete it to compile it again") from error
