"""Local files: read in one pass, replaced completely or not at all.

Owns atomic and durable writing, and removes the temporary files of killed writers. Must not know what is in a file.

Temporary files are locked, so that a writer can tell a dead writer's file from a living one's. While two processes
write `m.safetensors`, and after a third one was killed, the folder holds

    m.safetensors                             the old file, complete
    .m.safetensors.1f0c9a7be2d4365a.tmp       locked by the first writer: left alone
    .m.safetensors.77ab01c2d9e8f034.tmp       locked by the second writer: left alone
    .m.safetensors.c05e9d3b6a1f2487.tmp       not locked, its writer is dead: the next writer removes it

Windows has no such locks, but neither removes nor renames a file that is open. So a writer closes its file before it
renames it there, and a temporary file is a leftover if nobody has written to it for a day.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from memsyn.errors import MemoryFileError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEFT_FOR: Final = 86_400.0
"""Without locks: the seconds after which a temporary file to which nobody writes is a leftover."""


@contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file for reading; gives the file and its size in bytes.

    Raises:
        OSError: the file cannot be opened, or is a folder, a device or a pipe.
    """
    check_regular(path)
    with open(path, "rb") as file:
        yield file, os.fstat(file.fileno()).st_size


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file for writing; it becomes `path` when the block ends without an error.

    The temporary file lies beside `path`: fsync, rename, fsync of the folder. A crash leaves the old file or the new
    one. A symbolic link is followed, and the old file's mode is kept. Windows has no fsync of folders, and refuses to
    replace a file that somebody is reading.

    Raises:
        OSError: the file cannot be written; an old file is as it was.
        MemoryFileError: the new file is in its place, but may not survive a power cut.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    check_regular(path)
    if path.exists():
        # A rename does not need the permission to write the old file, so ask for it here.
        os.close(os.open(path, os.O_WRONLY))
    _remove_leftovers(path)
    file = _temporary(path)
    try:
        with file:
            with suppress(OSError):  # no old file, or a file system without modes
                os.chmod(file.name, stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            # While the file is still locked. Otherwise another writer may take it for a leftover and remove it.
            os.replace(file.name, path)
    finally:
        with suppress(OSError):
            os.unlink(file.name)
    # After a power cut, the folder may still hold the old name if only the file was synced.
    _sync_folder(path)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse a folder, a device or a pipe, which would be read for ever; a missing file passes.

    Raises:
        OSError: says which.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(kind, os.strerror(kind) if path.is_dir() else "Not a regular file", str(path))


def _temporary(path: Path) -> BinaryIO:
    """A new file beside `path`, locked for as long as it is open."""
    while True:
        file = open(path.with_name(f".{_stem(path)}.{secrets.token_hex(8)}.tmp"), "xb")  # noqa: SIM115
        with suppress(OSError):  # on a file system without locks nothing is removed either
            _lock(file.fileno(), wait=True)
        if os.path.exists(file.name):
            return file
        file.close()  # another writer removed it between creation and lock: try another name


def _stem(path: Path) -> str:
    """The file's name, cut to 200 bytes: ".", ".", 16 digits and ".tmp" are added, and a name may have 255 bytes."""
    return path.name.encode(errors="surrogateescape")[:200].decode(errors="ignore")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed writers: those that no process has locked."""
    pattern = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9a-f]{{16}}\.tmp")
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):
        with suppress(OSError):
            _remove_if_left(path.parent / name)


def _remove_if_left(path: Path) -> None:
    """Remove a temporary file whose writer is dead.

    Raises:
        OSError: its writer lives.
    """
    if fcntl is None:
        if time.time() - os.lstat(path).st_mtime > LEFT_FOR:
            os.unlink(path)
        return
    # A pipe with this name must not make `open` wait, and a link must not be followed.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        _lock(handle, wait=False)
        os.unlink(path)
    finally:
        os.close(handle)


def _lock(handle: int, *, wait: bool) -> None:
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync_folder(path: Path) -> None:
    if fcntl is None:  # Windows opens no folder
        return
    try:
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # raised by file systems that cannot sync folders
            raise MemoryFileError(
                f"{path} is written completely, but its folder could not be synced ({error}): after a power cut the "
                "old file may be back. Save again."
            ) from error
