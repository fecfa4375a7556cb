"""The native library at each level of instructions that this machine has."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from memsyn import native


@contextmanager
def native_is(value: str, library: Path = native.LIBRARY) -> Iterator[None]:
    """MEMSYN_NATIVE has this value (a level, `off`, or "" for none), and the library lies at this path."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(native.VARIABLE, value)
        patched.setattr(native, "LIBRARY", library)
        native.native_library.cache_clear()
        try:
            yield
        finally:
            native.native_library.cache_clear()


@contextmanager
def threads_are(count: int) -> Iterator[None]:
    """Torch has this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _levels() -> list[str]:
    library = native.native_library()
    if library is None:
        return []
    found = [level for level in native.LEVELS if library.memsyn_choose(level.encode()) is not None]
    native.native_library.cache_clear()
    return found


LEVELS_HERE = _levels()

needs_library = pytest.mark.skipif(
    not LEVELS_HERE, reason="needs the native library: python hatch_build.py compiles it"
)


@pytest.fixture(params=LEVELS_HERE or [pytest.param("", marks=needs_library)])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level in turn."""
    with native_is(request.param):
        yield request.param
