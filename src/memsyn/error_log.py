"""What goes wrong in an observer, and what it loses: counted, and logged once per kind and minute.

Owns the lines in the logger "memsyn". No call here raises, whatever the error's own text or a log handler does.
"""

import logging
import math
import os
import threading
import time
from contextlib import suppress
from typing import Any, Final, final

from memsyn.values.display import counted, printable

LINE_EVERY: Final = 60.0
"""Seconds between two lines of one kind."""

LONGEST_LINE: Final = 500
"""The most characters of a message in the log. They may be a request's."""


@final
class ErrorLog:
    """The errors of an observer, their number, the last one, and what was lost.

    A line has its text, and for formatters that write JSON these fields of the record: `event` (`error`, or what else
    happened), `error_type` (the class), `store`, `suppressed` (lines of this kind that were left out since the last
    one) and the event's own counts.

    Attributes:
        num_errors: of any kind.
        last: class and message of the last error.
        num_lost: samples that had waited and were dropped, and sums that could not be stored; set to 0 by each flush.
    """

    def __init__(self, store: str | os.PathLike[str]) -> None:
        self.num_errors = self.num_lost = 0
        self.last: str | None = None
        self._store = str(store)
        self._lock = threading.Lock()
        self._lines: dict[str, tuple[float, int, int]] = {}
        """Kind -> when its last line was written, by `time.monotonic`; how many were left out since; their level."""
        self._totals: dict[str, int] = {}

    def note(self, error: BaseException) -> None:
        """Count an error; called from any thread."""
        kind = type(error).__name__
        text = f"{kind}: {_text(error)}"
        with self._lock:
            self.num_errors += 1
            self.last = text
        self.event("error", f"an observer goes on serving, but something failed: {text}", error_type=kind)

    def event(self, event: str, message: str, level: int = logging.WARNING, **fields: Any) -> None:
        """Log what happened, unless the last line of its kind is younger than a minute."""
        kind, now = str(fields.get("error_type", event)), time.monotonic()
        with self._lock:
            since, suppressed, _ = self._lines.get(kind, (-math.inf, 0, level))
            is_due = now - since >= LINE_EVERY
            self._lines[kind] = (now, 0, level) if is_due else (since, suppressed + 1, level)
        if is_due:
            more = f" ({suppressed:,} more of this kind since the last such line)" if suppressed else ""
            self._write(level, printable(message)[:LONGEST_LINE] + more, {"event": event, **fields}, suppressed)

    def grown(self, event: str, total: int, message: str) -> None:
        """Log by how much a count has grown since the last line about it; `message` holds `{}` for the samples."""
        more = total - self._totals.get(event, 0)
        if more:
            if time.monotonic() - self._lines.get(event, (-math.inf,))[0] < LINE_EVERY:
                return
            self._totals[event] = total
            self.event(event, message.format(counted(more, "sample")), count=more)

    def end(self) -> None:
        """Say how many lines were left out and not counted in a later line."""
        with self._lock:
            lines, self._lines = self._lines, {}
        for kind, (_, suppressed, level) in lines.items():
            if suppressed:
                self._write(level, f"{kind}: {suppressed:,} more until the end", {"event": kind}, suppressed)

    def _write(self, level: int, text: str, fields: dict[str, Any], suppressed: int) -> None:
        with suppress(Exception):  # a handler or a filter of the service may fail
            more = {**fields, "store": self._store, "suppressed": suppressed}
            logging.getLogger("memsyn").log(level, "%s", text, extra=more)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as other:
        return f"its text cannot be had ({type(other).__name__})"
