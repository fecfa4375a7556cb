"""The place in a log up to which its requests are in the store, in a file beside the store.

Owns that no request is counted twice, whenever the process is killed, and that no kill loses one. Must not read the
log. A place is a number of bytes since the beginning of the first file of the log: it goes on growing when the log is
rotated.

The place is written to `STORE.position` before the store. The file also says, of each segment with requests that are
not stored yet, where the first of them begins, and what the segment's store is now. A restart compares:

    the segment's store is as it was      it was killed before the write: the segment is read again from that request
    the segment's store is another        it was killed after the write: the segment is read from the place on
"""

from __future__ import annotations

import json
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, final
from urllib.parse import quote

from memsyn import MemoryFileError, OptionError
from memsyn.sidecar.lines import LONGEST, Line
from memsyn.storage.atomic_files import open_file, replace_file
from memsyn.storage.safetensors_header import MAX_HEADER, parse


class LogFile(NamedTuple):
    """A file of a log: what tells it from others, and the place of its first byte."""

    inode: int
    length: int
    """How many of its first bytes were summed."""
    checksum: int
    base: int


@final
class LogPosition:
    """The place in a log up to which requests are in a store, kept in a file beside the store.

    Attributes:
        place: where the next line to be measured begins.
        files: those of the log that a restart may need.

    Raises:
        OptionError: the position is of another log.
        MemoryFileError: the file cannot be read.
    """

    def __init__(self, log: Path, store: Path) -> None:
        self.path, self._log, self._store = Path(f"{store}.position"), log.absolute(), store
        self.files: list[LogFile] = []
        self._held: dict[str, int] = {}
        """Segment -> where its first request begins that is not in the store."""
        self._stored_to = 0
        """Where the requests of all other segments begin that are not in the store."""
        if self.path.exists():
            self._read()
        self.place = self.first_needed

    @property
    def first_needed(self) -> int:
        """Where reading has to begin."""
        return min([self._stored_to, *self._held.values()])

    @property
    def is_caught_up(self) -> bool:
        """Whether all lines were read again that are before the end of the last write."""
        return self.place >= self._stored_to

    def admits(self, segment: str | None, line: Line) -> bool:
        """Whether a segment's request in a line is not in the store yet; if so, it counts as waiting for it."""
        key = _key(segment)
        is_new = line.start >= self._held.get(key, self._stored_to)
        if is_new:
            self._held.setdefault(key, line.start)
        return is_new

    @property
    def end(self) -> int:
        """The first place that no line of the log had yet."""
        return max(self.place, self._stored_to)

    def write(self) -> dict[str, str]:
        """Write the place, before the store is written; returns what the stores are now, by segment.

        Raises:
            MemoryFileError: it cannot be written: then the store must not be written either.
        """
        stores = self._stores()
        first = self.first_needed
        past = [file for file, after in zip(self.files, self.files[1:], strict=False) if after.base <= first]
        self.files = [file for file in self.files if file not in past]
        content = {
            "log": str(self._log),
            "files": self.files,
            "place": self.place,
            "held": self._held,
            "stores": {key: stores.get(key) for key in self._held},
        }
        try:
            with replace_file(self.path) as file:
                file.write(json.dumps(content).encode())
        except OSError as error:
            raise MemoryFileError(
                f"{self.path} could not be written: {error}. Nothing was added to the store."
            ) from error
        return stores

    def settle(self, before: dict[str, str]) -> None:
        """After the write of the store, forget the requests that it holds now."""
        now = self._stores()
        self._stored_to = self.place
        self._held = {key: start for key, start in self._held.items() if now.get(key) == before.get(key)}

    def _read(self) -> None:
        try:
            with open_file(self.path) as (file, _):
                held = parse(file.read(LONGEST).decode())
            log, self._stored_to, stores = held["log"], int(held["place"]), held["stores"]
            self.files = [LogFile(*map(int, values)) for values in held["files"]]
            now = self._stores()
            self._held = {key: int(start) for key, start in held["held"].items() if now.get(key) == stores[key]}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise MemoryFileError(
                f"{self.path} cannot be read: {type(error).__name__}. It says which requests the store holds. Restore "
                "both from a copy, or give another --store."
            ) from error
        if log != str(self._log):
            raise OptionError(
                f"{self._store} was measured from the log {log}, not from {self._log}: give a --store for each log, "
                f'or, if the log was moved, its new path as "log" in {self.path}.'
            )

    def _stores(self) -> dict[str, str]:
        """Segment -> the checksum of its files' headers, which hold the checksums of the files.

        The files of a store are `traffic.safetensors`, `traffic+segment.safetensors`, and either with the digest of
        other settings before the end: `traffic.1a2b3c4d.safetensors`.
        """
        stem, dot, end = self._store.name.partition(".")
        pattern = re.compile(rf"{re.escape(stem)}(\+[^.]*)?(\.[0-9a-f]{{8}})?{re.escape(dot + end)}")
        found: dict[str, str] = {}
        for name in sorted(os.listdir(self._store.absolute().parent)):
            match = pattern.fullmatch(name)
            if match:
                key = match[1] or ""
                digest = _header_digest(self._store.with_name(name))
                found[key] = sha256(f"{found.get(key, '')}{name}{digest}".encode()).hexdigest()
        return found


def _key(segment: str | None) -> str:
    """A segment as it stands in the name of its file."""
    return "" if segment is None else "+" + quote(segment, safe="").replace(".", "%2E")


def _header_digest(path: Path) -> str:
    with open_file(path) as (file, _):
        length = min(int.from_bytes(file.read(8), "little"), MAX_HEADER)
        return sha256(file.read(length)).hexdigest()
