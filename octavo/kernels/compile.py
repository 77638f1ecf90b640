"""Compiles C sources at first use and keeps the result: `compiled` names a library, which `cpu.build` loads.

Runs the system's compiler (`$CC`, cc, gcc or clang) once per content of the sources, flags and processor; the library
is kept in `$OCTAVO_CACHE` or ~/.cache/octavo, whence later processes have it without a compiler. Does not import torch,
so that kernels compile while a process does.
"""

from __future__ import annotations

import contextlib
import fcntl
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

logger = logging.getLogger("octavo")

HERE = Path(__file__).parent / "cpu"
"""Where the sources are."""
FLOAT = ("linear_float.c", "attention.c", "elementwise.c", "sampling.c", "run.c")
"""Sources of the kernels for float weights, one library."""
QUANT = ("quant_linear.c",)
"""Of what those for quantized weights share."""
FORMATS = ("quant_formats.c",)
"""Of their products, a library for each format."""
NATIVE = ("-march=native",)
BASE = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
_WRITTEN = ("-fno-tree-vectorize", "-fno-unswitch-loops")
LESS = {
    "linear_float.c": _WRITTEN,
    "attention.c": _WRITTEN,
    "elementwise.c": ("-O2",),
    "sampling.c": ("-O2",),
    "run.c": ("-O2",),
}
"""Flags of sources whose loops are vectors as they are written: the same speed, compiled in half to four fifths of the
time."""
THREADS = (("-fopenmp",), ())
"""Tried in turn: a compiler without OpenMP makes kernels that run on one thread."""

LIBRARY = "library.so"


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message says why and what would help."""


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


def compiled(sources: Sequence[str], flags: Sequence[str] = NATIVE) -> Path:
    """The library made of `sources`, names of files in HERE, for the target that `flags` name.

    Compiles at the first call ever. Safe to call from several threads and processes. Raises BuildError.
    """
    key = identity(tuple(sources), tuple(flags))
    path = cache_dir() / f"{Path(sources[0]).stem}-{key}.so"
    if not path.exists():
        with _alone(path.with_suffix(".lock")):
            if not path.exists():
                _compile(path, sources, flags)
    return path


def compile_soon(*libraries: tuple[Sequence[str], Sequence[str]]) -> None:
    """Starts `compiled` for pairs of sources and flags, side by side; who needs them waits, and hears of failures."""

    def work(sources: Sequence[str], flags: Sequence[str]) -> None:
        with contextlib.suppress(BuildError, OSError):
            compiled(sources, flags)

    for library in libraries:
        threading.Thread(target=work, args=library, name="octavo-compile", daemon=True).start()


def for_format(number: int, flags: Sequence[str] = NATIVE) -> tuple[str, ...]:
    """Flags for a library of FORMATS with the products of one, by its number in quant_linear.c."""
    return (*flags, f"-DFORMATS={1 << number}")


LIKELY = ((QUANT, NATIVE), *((FORMATS, for_format(number)) for number in (5, 1)))
"""Libraries that most GGUF files need: products of 8 bits and of 4 bits with minima (Q4_1, Q4_K)."""


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Holds a lock: threads and ranks that start together want the same library, and one of them makes it."""
    descriptor = None
    with contextlib.suppress(OSError):  # a file system without locks, or the holder has just left: makes its own
        lock.mkdir(exist_ok=True)
        descriptor = os.open(lock, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            lock.rmdir()


def _compile(path: Path, sources: Sequence[str], flags: Sequence[str]) -> None:
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


def _run(command: list[str], sources: Sequence[str], folder: Path) -> str:
    """Compiles the sources side by side and links them to LIBRARY in `folder`; returns what went wrong."""
    objects = [str(folder / f"{source}.o") for source in sources]
    steps = [
        [*command, *LESS.get(source, ()), "-c", str(HERE / source), "-o", to]
        for source, to in zip(sources, objects, strict=True)
    ]
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
def identity(sources: tuple[str, ...], flags: tuple[str, ...]) -> str:
    """Names a library by all that it is made from and for."""
    digest = hashlib.sha256()
    for part in (*BASE, repr(LESS), *flags, sys.platform, platform.machine(), _processor()):
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
