"""Lines of requests: a stream of bytes is cut into them, and none can take the memory.

Must not know what a line holds, nor where it comes from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Final, NamedTuple, final

LONGEST: Final = 2**22
"""The most bytes of a line or of a request over HTTP."""

IDLE: Final = 0.2
"""Seconds between two looks at a source that has nothing new."""


class Line(NamedTuple):
    """A line of a source; `text` is None if it is too long. It lies between two places."""

    text: bytes | None
    number: int
    start: int
    end: int


@final
class LineSplitter:
    """Cuts a stream of bytes into lines, and holds at most `LONGEST` bytes of an unfinished one."""

    def __init__(self) -> None:
        self._place = self._number = self._skipped = 0
        self._rest = b""

    def begin(self, place: int) -> None:
        """Go on with another stream, whose first byte has this place."""
        self._place, self._skipped, self._rest = place, 0, b""

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """The lines that end in the next bytes of the stream."""
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            yield self._line(self._rest + part, 1)
        self._rest += rest
        if len(self._rest) > LONGEST:
            self._skipped += len(self._rest)
            self._rest = b""

    def finish(self) -> Iterator[Line]:
        """The last line, if no line break ends it and none will."""
        if self._rest or self._skipped:
            yield self._line(self._rest, 0)

    @property
    def is_finished(self) -> bool:
        """Whether what follows the last line break is a whole JSON object: a part of one is none."""
        with suppress(ValueError, RecursionError):
            return isinstance(json.loads(self._rest), dict)
        return False

    def _line(self, text: bytes, line_break: int) -> Line:
        start, self._place = self._place, self._place + self._skipped + len(text) + line_break
        is_whole = not self._skipped and len(text) <= LONGEST
        self._number, self._skipped, self._rest = self._number + 1, 0, b""
        return Line(text if is_whole else None, self._number, start, self._place)
