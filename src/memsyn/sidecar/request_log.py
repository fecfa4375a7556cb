"""A log of requests that is read as it grows, through rotations and restarts.

Owns that each line is read once, and what is a file of the log. Must not know what a line holds, nor what is stored.
"""

from __future__ import annotations

import os
import re
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import BinaryIO, Final, final

from memsyn import MemoryFileError, OptionError
from memsyn.sidecar.lines import IDLE, Line, LineSplitter
from memsyn.sidecar.log_position import LogFile, LogPosition

_CHUNK: Final = 2**18
_HEAD: Final = 1024
"""How many of a file's first bytes tell it from another file."""


@final
class RequestLog:
    """Yields the lines of a log as `tail -F` does, from a position on, and None while there is nothing new.

    A rotated file (`requests.jsonl.1`, `requests.jsonl-20261201`) is read to its end before the file that follows it,
    also after a restart. A file that was cut is read from its beginning.

    Args:
        path: of the log; it need not exist yet, unless `once`.
        position: from where to read; knows the files, and gets to know others.
        once: end at the end of the log.

    Raises:
        OptionError: the path is a folder, a device or a pipe.
        MemoryFileError: there is no log, and `once`.
    """

    def __init__(self, path: Path, position: LogPosition, *, once: bool) -> None:
        self.ending = False
        """Set it to end after the present line."""
        self._path, self._position, self._once = path.absolute(), position, once
        self._file: BinaryIO | None = None
        self._known = LogFile(0, 0, 0, 0)
        """The file, as the position knows it."""
        self._lines = LineSplitter()
        self._is_last_look = False
        """Whether another file follows this one, so that its end is its last."""
        if path.exists() and not path.is_file():
            raise OptionError(f"--from {path} is no file. A pipe is read by --from - < {path}.")
        if once and not path.exists():
            raise MemoryFileError(f"the log {path} does not exist.")

    @property
    def num_bytes_left(self) -> int:
        """How many bytes of the present file are not measured yet; 0 when it is closed."""
        if self._file is None:
            return 0
        return os.fstat(self._file.fileno()).st_size - (self._position.place - self._known.base)

    def close(self) -> None:
        """Close the file that is being read."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __iter__(self) -> Iterator[Line | None]:
        while not self._is_ended:
            if self._file is None:
                self._open_first()
            elif self._was_cut():
                self._begin(self._file, None)
            chunk = b"" if self._file is None else self._file.read(_CHUNK)
            if chunk:
                yield from self._unless_ended(self._lines.feed(chunk))
            elif following := self._following():
                # Once its writer writes to another file, this one is complete: what comes now is the rest.
                if self._is_last_look:
                    yield from self._unless_ended(self._lines.finish())
                    self._change_to(following)
                self._is_last_look = not self._is_last_look
            elif self._once:
                yield from self._lines.finish() if self._lines.is_finished else ()
                return
            else:
                yield None
                time.sleep(IDLE)

    @property
    def _is_ended(self) -> bool:
        return self.ending and (self._position.is_caught_up or self._file is None)

    def _unless_ended(self, lines: Iterator[Line]) -> Iterator[Line]:
        for line in lines:
            if self._is_ended:
                return
            yield line

    def _open_first(self) -> None:
        """Open the file in which the position lies; if it is gone, the next of the log that is there."""
        position, found = self._position, self._found()
        place = position.place
        with suppress(FileNotFoundError):  # it was renamed just now: the next look finds it
            for known, following in zip_longest(position.files, position.files[1:]):
                end = position.end if following is None else following.base
                if following is not None and end <= place:
                    continue  # it was read to its end
                same = [path for path in found if _holds(path, known, end)]
                # Several files may begin alike: then the number of the file decides. A copy has another number.
                same = [path for path in same if found[path].st_ino == known.inode] or same
                if same:
                    return self._begin(_opened(same[-1]), known, max(place, known.base))
            if self._path in found:
                self._begin(_opened(self._path), None)

    def _begin(self, file: BinaryIO, known: LogFile | None, place: int | None = None) -> None:
        """Read a file from a place on, by default from its first byte; one that is not known becomes the last."""
        position, number = self._position, file.fileno()
        if known is None:
            length = min(_HEAD, os.fstat(number).st_size)
            known = LogFile(os.fstat(number).st_ino, length, _checksum(number, length), position.end)
            position.files.append(known)
        self._file, self._known, position.place = file, known, known.base if place is None else place
        file.seek(position.place - known.base)
        self._lines.begin(position.place)

    def _change_to(self, path: Path) -> None:
        """Go on with the next file of the log."""
        later = self._position.files[self._position.files.index(self._known) + 1 :]
        with suppress(FileNotFoundError):  # as above
            file = _opened(path)
            self.close()
            self._begin(file, next((known for known in later if _holds(path, known, known.base)), None))

    def _was_cut(self) -> bool:
        """Whether the present file no longer holds what was read from it."""
        assert self._file is not None
        known, offset, number = self._known, self._file.tell(), self._file.fileno()
        if os.fstat(number).st_size < offset or _checksum(number, known.length) != known.checksum:
            return True
        length = min(_HEAD, offset)
        if length > known.length:
            files = self._position.files
            self._known = known._replace(length=length, checksum=_checksum(number, length))
            files[files.index(known)] = self._known
        return False

    def _following(self) -> Path | None:
        """The file that follows the present one, if something was written to it."""
        if self._file is None:
            return None
        found, own = self._found(), os.fstat(self._file.fileno()).st_ino
        paths = list(found)
        after = [later for path, later in pairwise(paths) if found[path].st_ino == own]
        if own not in (status.st_ino for status in found.values()):  # it was removed: the log itself follows
            after = [path for path in paths if path == self._path]
        return after[0] if after and found[after[0]].st_size else None

    def _found(self) -> dict[Path, os.stat_result]:
        """The rotated files of the log, the oldest first, and at last the log itself."""
        rotated, found = re.compile(re.escape(self._path.name) + r"[.-]\d[\dT:._-]*"), {}
        for path in self._path.parent.iterdir():
            if path == self._path or rotated.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    found[path] = path.stat()
        files = [path for path in found if stat.S_ISREG(found[path].st_mode)]
        return {path: found[path] for path in sorted(files, key=lambda p: (p == self._path, found[p].st_mtime_ns))}


def _opened(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)


def _checksum(number: int, length: int) -> int:
    return zlib.crc32(os.pread(number, length, 0))


def _holds(path: Path, file: LogFile, end: int) -> bool:
    """Whether a path holds a file of the log, with all that was read from it up to a place."""
    with _opened(path) as own:
        size = os.fstat(own.fileno()).st_size
        return size >= max(file.length, end - file.base) and _checksum(own.fileno(), file.length) == file.checksum
