"""Local files: read in one pass, replaced whole or not at all.

Owns atomicity, durability, and what killed writers left behind. Must not know what is in a file.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from memsyn.errors import MemoryFileError


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """A file to be read from its start, and its size in bytes.

    Raises:
        OSError: it cannot be opened, or is a folder, a device or a pipe.
    """
    _check_regular(Path(path))
    with open(path, "rb") as file:
        yield file, os.fstat(file.fileno()).st_size


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to be written, which takes the place of `path`, whole, when the block ends; not if it raises.

    A temporary file beside it, fsync, rename, fsync of the folder. A crash leaves the old file or the new one; what a
    killed writer left is removed by the next one. A link is followed, and an old file's mode kept.

    Raises:
        OSError: it cannot be written; an old file is as it was.
        MemoryFileError: the new file is in its place, but may not survive a power cut.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    _check_regular(path)
    if path.exists():
        os.close(os.open(path, os.O_WRONLY))  # may it be written? A rename does not ask
    _remove_leftovers(path)
    file = _temporary(path)
    try:
        with file:
            with suppress(OSError):  # there is no old file, or no modes on its file system
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)  # while the lock is held
    finally:
        with suppress(OSError):
            os.unlink(file.name)
    _sync_folder(path)


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        kind = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(kind, os.strerror(kind) if path.is_dir() else "Not a regular file", str(path))


def _temporary(path: Path) -> BinaryIO:
    """A new file beside `path`, locked for as long as it is open."""
    while True:
        file = open(path.with_name(f".{_stem(path)}.{secrets.token_hex(8)}.tmp"), "xb")  # noqa: SIM115
        with suppress(OSError):  # where there are no locks, leftovers stay
            _lock(file.fileno(), wait=True)
        if os.path.exists(file.name):
            return file
        file.close()  # between its creation and its lock, another writer took it for a leftover


def _stem(path: Path) -> str:
    """Its name, shortened so that 22 more bytes fit."""
    return path.name.encode(errors="surrogateescape")[:200].decode(errors="ignore")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writers that were killed: nobody holds a lock on theirs."""
    pattern = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9a-f]{{16}}\.tmp")
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):
        with suppress(OSError):
            handle = os.open(path.parent / name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                _lock(handle, wait=False)
                os.unlink(path.parent / name)
            finally:
                os.close(handle)


def _lock(handle: int, *, wait: bool) -> None:
    import fcntl  # not on Windows, where memsyn can measure and protect, but not save

    fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync_folder(path: Path) -> None:
    try:
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise MemoryFileError(
                f"{path} is written and whole, but its folder could not be synced ({error}): a power cut may bring the "
                "old file back. Save again."
            ) from error
