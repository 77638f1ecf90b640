"""Compiling and caching of the C kernels."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.kernels import compile, load, reference
from octavo.kernels.cpu import build

SOURCE = '__attribute__((visibility("default"))) int answer(void) { return %d; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sources and an empty cache."""
    monkeypatch.setattr(compile, "HERE", tmp_path)
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    compile.identity.cache_clear()
    yield tmp_path
    compile.identity.cache_clear()


def compiled(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache" / "kernels").iterdir())


needs_compiler = pytest.mark.skipif(next(compile._compilers(), None) is None, reason="needs a C compiler")


@needs_compiler
def test_compiles_once_and_serves_without_a_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "a.c").write_text(SOURCE % 42)
    library = build.library(("a.c",))
    assert library.answer() == 42
    assert build.library(("a.c",)) is library
    assert len(compiled(sources)) == 1
    monkeypatch.setattr(compile, "_compilers", lambda: iter(()))
    monkeypatch.setattr(build, "_loaded", {})
    assert build.library(("a.c",)).answer() == 42


@needs_compiler
def test_changed_sources_headers_and_flags_make_another_library(sources: Path) -> None:
    (sources / "a.c").write_text(SOURCE % 1)
    assert build.library(("a.c",)).answer() == 1
    (sources / "a.c").write_text(SOURCE % 2)
    (sources / "b.h").write_text("")
    compile.identity.cache_clear()
    assert build.library(("a.c",)).answer() == 2
    assert build.library(("a.c",), ("-O1",)).answer() == 2
    assert len(compiled(sources)) == 3


@needs_compiler
def test_threads_share_one_library(sources: Path) -> None:
    (sources / "a.c").write_text(SOURCE % 7)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(build.library(("a.c",)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1


@needs_compiler
def test_a_source_that_does_not_compile(sources: Path) -> None:
    (sources / "bad.c").write_text("int f(void) { return missing; }\n")
    for _ in range(2):
        with pytest.raises(build.BuildError, match="missing"):
            build.library(("bad.c",))
    assert compiled(sources) == []


def test_without_a_compiler_the_reference_serves_and_the_log_says_so(
    sources: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in build.FLOAT:
        (sources / name).write_text("")
    monkeypatch.setenv("PATH", str(sources))
    monkeypatch.setenv("CC", "no-such-compiler")
    build.available.cache_clear()
    with caplog.at_level(logging.WARNING, "octavo"):
        assert load("cpu") is reference
        assert load("cpu") is reference
    build.available.cache_clear()
    assert len(caplog.records) == 1
    assert "install gcc or clang" in caplog.text
