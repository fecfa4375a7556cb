"""Files at a URL, through fsspec (the extra `remote`): read in one pass, replaced by an upload.

Owns all use of fsspec, and turns whatever its file systems raise into OSError. Must not know what is in a file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from memsyn.errors import MemoryFileError
from memsyn.storage.atomic_files import replace_file


@contextmanager
def open_url(url: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a remote file for reading, block by block; gives the file and its size in bytes.

    Raises:
        OSError: the file cannot be opened or read.
        MemoryFileError: fsspec is missing.
    """
    with _only_os_errors():
        store, path = _find(url)
        size = store.size(path)
        if size is None:
            raise OSError("the store does not say its size; download it first")
        with store.open(path, "rb") as file:
            yield file, size


@contextmanager
def replace_url(url: str) -> Iterator[BinaryIO]:
    """Open a local temporary file for writing; it is uploaded to `url` when the block ends without an error.

    Raises:
        OSError: the file cannot be written or uploaded.
        MemoryFileError: fsspec is missing.
    """
    with _only_os_errors():
        store, path = _find(url)
        if _is_local(store):
            with replace_file(path) as file:
                yield file
            return
        with tempfile.TemporaryDirectory(prefix="memsyn-") as folder:
            copy = os.path.join(folder, "upload")
            with open(copy, "wb") as file:
                yield file
            # The file is closed by now, since Windows lets nobody else open a temporary file that is open.
            with store.transaction:
                store.put_file(copy, path)
            sent, arrived = os.path.getsize(copy), store.size(path)
        if arrived != sent:
            raise OSError(f"{sent} bytes were sent, {arrived} arrived")


def _find(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError:
        raise MemoryFileError(f"{url} is a URL, and those need fsspec: pip install 'memsyn[remote]'.") from None
    # fsspec returns the same file system again for the same store, and another thread may be using it.
    found: tuple[Any, str] = url_to_fs(url, skip_instance_cache=True)
    return found


def _is_local(store: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(store, LocalFileSystem)


@contextmanager
def _only_os_errors() -> Iterator[None]:
    """In this block, the stores' own errors, and fsspec's ImportError that says what to install, become OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
