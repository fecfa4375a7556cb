"""Files at a URL, by fsspec (the extra `remote`): read in one pass, replaced by an upload.

Owns all use of fsspec, and turns whatever its file systems raise into OSError. Must not know what is in a file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from memsyn.errors import MemoryFileError
from memsyn.storage import atomic_files


@contextmanager
def opened(url: str) -> Iterator[tuple[BinaryIO, int]]:
    """A remote file to be read from its start, block by block, and its size in bytes.

    Raises:
        OSError: it cannot be opened or read.
        MemoryFileError: fsspec is missing.
    """
    with _only_os_errors():
        store, path = _find(url)
        size = store.size(path)
        if size is None:
            raise OSError("its size is unknown; download it first")
        with store.open(path, "rb") as file:
            yield file, size


@contextmanager
def replaced(url: str) -> Iterator[BinaryIO]:
    """A local temporary file to be written, which is uploaded to `url`, whole, when the block ends; not if it raises.

    Raises:
        OSError: it cannot be written or uploaded.
        MemoryFileError: fsspec is missing.
    """
    with _only_os_errors():
        store, path = _find(url)
        if _is_local(store):
            with atomic_files.replaced(path) as file:
                yield file
            return
        with tempfile.NamedTemporaryFile(prefix="memsyn-") as copy:
            yield cast(BinaryIO, copy)
            copy.flush()
            with store.transaction:
                store.put_file(copy.name, path)
            sent, arrived = os.path.getsize(copy.name), store.size(path)
        if arrived != sent:
            raise OSError(f"of {sent} bytes, {arrived} arrived")


def _find(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError:
        raise MemoryFileError(f"{url} is a URL, and those need fsspec: pip install 'memsyn[remote]'.") from None
    found: tuple[Any, str] = url_to_fs(url, skip_instance_cache=True)  # others' threads share cached ones
    return found


def _is_local(store: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(store, LocalFileSystem)


@contextmanager
def _only_os_errors() -> Iterator[None]:
    """Every store has errors of its own, and fsspec an ImportError that says what to install."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
