"""Locks that keep all but one writer from a file for as long as that writer lives.

Owns the lock files. Must not know what is in a file, nor when it is written.

Who writes `traffic.safetensors` holds a lock on `.traffic.safetensors.lock` beside it, since the file itself is
replaced. The lock is POSIX's (`fcntl.lockf`): the kernel releases it when the process ends, also by `kill -9`, and a
fork does not inherit it. Those of `flock` are shared with forks: a fork would keep the store of a dead service locked.
Two properties of POSIX locks need care:

    one process can lock a file twice            so `_HELD` says what this process has locked
    closing any handle of the file unlocks it    so a file in `_HELD` is never opened again
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from typing import Final, final

from memsyn.errors import MemoryFileError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ModuleNotFoundError:
    msvcrt = None  # type: ignore[assignment]

_HELD: Final[dict[str, int | None]] = {}
"""Lock file, or URL -> its handle; None for a URL. Of this process."""
_GUARD = threading.Lock()


@final
class WriterLocks:
    """The locks of one writer, for several files."""

    def __init__(self) -> None:
        self._process_id = os.getpid()
        self._names: list[str] = []

    def hold(self, path: str | os.PathLike[str]) -> None:
        """Lock a file until `release`. A file that this writer has locked, or that cannot be locked, is let pass.

        Two writers at one URL are found if they are in one process. A file cannot be locked if its folder is full or
        may not be written, or if its file system has no locks.

        Raises:
            MemoryFileError: another writer has locked it.
        """
        name = _lock_file(str(path))
        if name in self._names:
            return
        with _GUARD:
            try:
                handle = _locked(name)
            except BlockingIOError:
                raise MemoryFileError(
                    f"{path} is in use: another observer, in this process or in another, writes to it. Close that one, "
                    "or give this one a store of its own: each replica needs one, for example with its number in the "
                    "name."
                ) from None
            except OSError:
                return
            _HELD[name] = handle
            self._names.append(name)

    def release(self) -> None:
        """Unlock all files; in a fork this does nothing."""
        if self._process_id != os.getpid():
            return
        with _GUARD:
            while self._names:
                name = self._names.pop()
                _remove(name, _HELD.pop(name, None))


def _lock_file(path: str) -> str:
    """The lock file of a path, whatever links lead to it; a URL stands for itself."""
    if "://" in path:
        return path
    folder, name = os.path.split(os.path.realpath(path))
    # 200 bytes of the name: a dot and ".lock" are added, and a name may have 255 bytes.
    return os.path.join(folder, f".{os.fsdecode(os.fsencode(name)[:200])}.lock")


def _locked(name: str) -> int | None:
    """A handle of a lock file, locked; None for a URL.

    Raises:
        BlockingIOError: another writer has locked it.
        OSError: it cannot be opened or locked.
    """
    if name in _HELD:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), name)
    if "://" in name:
        return None
    while True:
        _refuse_own(name)
        # Neither a link nor a pipe with this name is followed or waited for.
        flags = 0 if fcntl is None else os.O_NOFOLLOW | os.O_NONBLOCK
        handle = os.open(name, os.O_RDWR | os.O_CREAT | flags, 0o666)
        try:
            _lock(handle)
            # Its last holder may have removed it after it was opened here. Then others will lock a new file.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(name)):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _refuse_own(name: str) -> None:
    """Refuse a lock file that this process has locked under another name, as a mount or a hard link gives it."""
    with suppress(FileNotFoundError):
        found = os.stat(name)
        if any(handle is not None and os.path.samestat(found, os.fstat(handle)) for handle in _HELD.values()):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), name)


def _lock(handle: int) -> None:
    try:
        if fcntl is not None:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):  # the systems differ
            raise BlockingIOError(error.errno, error.strerror, None) from None
        raise


def _remove(name: str, handle: int | None) -> None:
    """Remove a lock file, and unlock it after that; another's file of this name stays."""
    if handle is None:
        return
    if fcntl is None:  # Windows removes no file that is open, and so none that another writer has locked
        os.close(handle)
        with suppress(OSError):
            os.unlink(name)
        return
    with suppress(OSError):
        if os.path.samestat(os.fstat(handle), os.stat(name)):
            os.unlink(name)
    os.close(handle)


def _forget() -> None:
    """In a fork: the locks are the parent's. Closing its copies of the handles does not unlock them."""
    global _GUARD
    _GUARD = threading.Lock()
    for handle in _HELD.values():
        if handle is not None:
            os.close(handle)
    _HELD.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)
