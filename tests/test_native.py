"""Finding the native library, choosing its instructions, and doing without it."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

import memsyn
from memsyn import native
from memsyn.kernels import outer_products
from tests.levels import LEVELS_HERE, level, native_is, needs_library, threads_are

__all__ = ["level"]


def importance() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 7))
    return memsyn.measure(model, [torch.randn(4, 3, 8, 8)], progress=False).mean()


@pytest.mark.skipif(sys.platform == "win32", reason="not built on Windows")
@pytest.mark.skipif(os.environ.get(native.VARIABLE) == "off", reason="switched off")
def test_the_library_is_there_wherever_a_compiler_is() -> None:
    if shutil.which(os.environ.get("CC", "cc")):
        assert native.native_level() in native.LEVELS, "python hatch_build.py compiles it"


@needs_library
def test_without_a_choice_the_highest_level_is_used() -> None:
    with native_is(""):
        assert native.native_level() == LEVELS_HERE[-1]


def test_a_chosen_level_is_used(level: str) -> None:
    assert native.native_level() == level


def test_switched_off_there_is_no_library() -> None:
    with native_is("off"):
        assert native.native_library() is None
        assert native.native_level() is None


def test_an_unknown_level_is_refused() -> None:
    with native_is("sse"), pytest.raises(memsyn.OptionError, match=r"must be off, generic, avx2.*got 'sse'"):
        native.native_library()


@needs_library
def test_a_level_of_another_processor_is_refused() -> None:
    other = next(level for level in reversed(native.LEVELS) if level not in LEVELS_HERE)
    with (
        native_is(other),
        pytest.raises(memsyn.OptionError, match=rf"{other}.*this processor lacks these instructions"),
    ):
        native.native_library()


@pytest.mark.parametrize("broken", ["absent", "junk", "empty", "another library", "a folder"])
def test_a_library_that_does_not_load_is_none(broken: str, tmp_path: Path) -> None:
    with native_is("off"):
        expected = importance()
    path = tmp_path / "libmemsyn.so"
    if broken == "junk":
        path.write_bytes(b"\x7fELF and no more")
    elif broken == "empty":
        path.touch()
    elif broken == "another library":
        import _ctypes

        path = Path(_ctypes.__file__)
    elif broken == "a folder":
        path.mkdir()
    with native_is("", path):
        assert native.native_library() is None
        assert native.native_level() is None
        found = importance()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@needs_library
def test_a_library_of_another_interface_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with native_is(""):
        assert native.native_library() is None


def test_a_measurement_uses_it_and_finds_the_same(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    add = outer_products.add_native_products

    def counted(*arguments: object) -> None:
        calls.append(1)
        add(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(outer_products, "add_native_products", counted)
    found = importance()
    assert len(calls) >= 2
    calls.clear()
    with native_is("off"):
        expected = importance()
    assert not calls
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


# How it is built


hatch_build = pytest.importorskip("hatch_build", reason="needs hatchling: pip install hatchling")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler: apt install gcc")


@pytest.mark.parametrize(
    ("command", "reason"), [("no-such-compiler", "no-such-compiler"), ("false", "false"), ("cc 'x", "quot")]
)
def test_without_a_compiler_that_works_there_is_a_reason_and_no_file(
    command: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", command)
    monkeypatch.delenv(native.VARIABLE, raising=False)
    path = tmp_path / "libmemsyn.so"
    path.write_bytes(b"an old library")
    assert reason in str(hatch_build.compile_library(path))
    assert not path.exists()


def test_it_is_not_compiled_where_it_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "off")
    assert hatch_build.compile_library(tmp_path / "libmemsyn.so") == "MEMSYN_NATIVE is off"
    monkeypatch.delenv(native.VARIABLE)
    monkeypatch.setattr(sys, "platform", "win32")
    assert hatch_build.compile_library(tmp_path / "libmemsyn.so") == "it is not built on Windows"
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_a_compiler_without_openmp_gives_a_library_of_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, path = tmp_path / "compiler", tmp_path / "libmemsyn.so"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc -O0 "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    assert hatch_build.compile_library(path) is None
    with threads_are(2), native_is("", path):
        assert native.native_library() is None
    with threads_are(1), native_is("", path):
        library = native.native_library()
        assert library is not None
        assert not library.memsyn_has_threads()
        found = importance()
    with native_is("off"):
        torch.testing.assert_close(found, importance(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("system", "tag"),
    [
        ("linux-x86_64", "py3-none-linux_x86_64"),
        ("macosx-11.0-arm64", "py3-none-macosx_11_0_arm64"),
        ("macosx-10.13-universal2", "py3-none-macosx_10_13_arm64"),
    ],
)
def test_the_tag_names_the_system_and_no_abi_of_python(system: str, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_platform", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert hatch_build.wheel_tag() == tag
