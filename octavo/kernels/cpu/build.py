"""Compiles the C sources of this package at first use and loads them.

`library` runs the system's compiler (`$CC`, cc, gcc or clang) once per content of the sources, flags and processor; the
result is kept in `$OCTAVO_CACHE` or ~/.cache/octavo, whence later processes load it without a compiler. Owns no
kernels: modules beside this one declare the functions that they call.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch  # noqa: F401  before any library here, so that both use one OpenMP runtime

logger = logging.getLogger("octavo")

HERE = Path(__file__).parent
FLOAT = ("linear_float.c", "attention.c", "elementwise.c", "sampling.c", "run.c")
"""Sources of the kernels for float weights, one library."""
NATIVE = ("-march=native",)
BASE = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
THREADS = (("-fopenmp",), ())
"""Tried in turn: a compiler without OpenMP makes kernels that run on one thread."""

LIBRARY = "library.so"

_lock = threading.RLock()
_loaded: dict[str, ctypes.CDLL] = {}
_failed: dict[str, BuildError] = {}


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message says why and what would help."""


def library(sources: Sequence[str], flags: Sequence[str] = NATIVE) -> ctypes.CDLL:
    """The library made of `sources`, names of files beside this one, for the target that `flags` name.

    Compiles at the first call ever, loads at the first call of the process. Safe to call from several threads and
    processes. Raises BuildError, always the same one for the same arguments.
    """
    key = _key(tuple(sources), tuple(flags))
    with _lock:
        if key in _failed:
            raise _failed[key]
        if key not in _loaded:
            try:
                _loaded[key] = _load(key, tuple(sources), tuple(flags))
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


def cache_dir() -> Path:
    """Where libraries are kept; a folder of this user under the system's temporary one if the home is not writable."""
    root = os.environ.get("OCTAVO_CACHE") or Path.home() / ".cache" / "octavo"
    path = Path(root).expanduser() / "kernels"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    return _private_dir()


@functools.cache
def _private_dir() -> Path:
    """A new folder that only this process uses: files in a shared one could be someone else's."""
    return Path(tempfile.mkdtemp(prefix="octavo-"))


def _load(key: str, sources: tuple[str, ...], flags: tuple[str, ...]) -> ctypes.CDLL:
    path = cache_dir() / f"{Path(sources[0]).stem}-{key}.so"
    if not path.exists():
        _compile(path, sources, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}; delete it to compile it again") from error


def _compile(path: Path, sources: tuple[str, ...], flags: tuple[str, ...]) -> None:
    """Compiles aside and renames the result to `path`, so that nobody loads half of it."""
    compiler = next(_compilers(), None)
    if compiler is None:
        raise BuildError("no C compiler found; install gcc or clang, or name one in the environment variable CC")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        errors = ""
        for threads in THREADS:
            found = _run([*compiler, *BASE, *flags, *threads], sources, Path(folder))
            if not found:
                break
            errors = errors or found
        else:
            raise BuildError(f"{' '.join(compiler)} failed on {', '.join(sources)}: {errors[:2000]}")
        os.replace(Path(folder) / LIBRARY, path)
    if not threads:
        logger.warning("%s has no OpenMP: CPU kernels will use one thread", compiler[0])
    logger.info("compiled CPU kernels %s in %.1f s", path.name, time.monotonic() - began)


def _run(command: list[str], sources: tuple[str, ...], folder: Path) -> str:
    """Compiles the sources side by side and links them to LIBRARY in `folder`; returns what went wrong."""
    objects = [str(folder / f"{source}.o") for source in sources]
    steps = [[*command, "-c", str(HERE / source), "-o", to] for source, to in zip(sources, objects, strict=True)]
    link = [*command, "-shared", *objects, "-o", str(folder / LIBRARY), "-lm"]
    for together in (steps, [link]):
        try:
            running = [subprocess.Popen(step, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for step in together]
        except OSError as error:
            return f"cannot run {command[0]}: {error}"
        errors = [process.communicate()[1].decode(errors="replace").strip() for process in running]
        if any(process.returncode for process in running):
            return "\n".join(error for error in errors if error) or "no message"
    return ""


def _compilers() -> Iterator[list[str]]:
    """Commands that start a C compiler, the user's choice first."""
    chosen = os.environ.get("CC", "").split()
    for command in ([chosen] if chosen else []) + [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found is not None:
            yield [found, *command[1:]]


@functools.cache
def _key(sources: tuple[str, ...], flags: tuple[str, ...]) -> str:
    """Names a library by all that it is made from and for."""
    digest = hashlib.sha256()
    for part in (*BASE, *flags, sys.platform, platform.machine(), _processor()):
        digest.update(part.encode() + b"\0")
    for path in [HERE / source for source in sources] + sorted(HERE.glob("*.h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            found.setdefault(name.strip(), value.strip())
    return repr(sorted(found.items()))
