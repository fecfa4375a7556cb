"""The requests of a source on their way to an observer.

Owns the order of writes (first the place in the log, then the store), the counts, and the end on a signal.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Final, final

from memsyn import MemoryFileError, MemsynError, Observer
from memsyn.batches import num_samples, take
from memsyn.sidecar.lines import LONGEST, Line
from memsyn.sidecar.log_position import LogPosition
from memsyn.sidecar.request_log import RequestLog
from memsyn.sidecar.request_streams import RequestPipe, RequestServer

MAX_QUEUED: Final = 256
"""The most samples that wait to be measured."""

MAX_SEGMENTS_READ: Final = 64
"""The most segments, as of an observer: a sender could fill the memory with more."""

STATUS: Final = 60.0
"""Seconds between two lines of counts."""

_FLUSH: Final = 1e6
"""Seconds: until a flush ends, nothing else may be shown to the observer."""

_PAUSE: Final = 0.02

Source = RequestLog | RequestPipe | RequestServer


@final
class SidecarRun:
    """Shows requests to an observer until their source ends, and keeps the counts.

    Args:
        observer: it writes its store only when it is told to.
        source: yields lines, or None while there is nothing new.
        position: of a log; None for other sources.
        parse: text -> the requests in it.
        to_inputs: request -> inputs of the model, or None if it is not to be measured.
    """

    def __init__(
        self,
        observer: Observer,
        source: Source,
        position: LogPosition | None,
        parse: Callable[[bytes], Iterator[Any]],
        to_inputs: Callable[[Any], Any],
    ) -> None:
        self._observer, self._source, self._position = observer, source, position
        self._parse, self._to_inputs = parse, to_inputs
        self._num_lines = self._num_requests = self._num_malformed = 0
        self._segments: set[str | None] = set()
        self._status_due = time.monotonic() + STATUS

    def until_end(self, interval: float) -> tuple[bool, dict[str, Any]]:
        """Measure until the source ends, or a signal ends it; returns whether nothing was lost, and all counts."""
        due = time.monotonic() + interval
        with _ending_on_signals(self._source):
            try:
                for line in self._source:
                    if line is not None and not self._take(line):
                        break
                    if time.monotonic() >= due:
                        self._store()
                        due = time.monotonic() + interval
                    self._report()
            finally:
                stored = self._store()
                if stored is None:
                    atexit.unregister(self._observer.close_at_exit)  # it would write the store, without a position
                else:
                    self._observer.close()
                facts = self.facts()
                self._source.close()
        return bool(stored), facts

    def facts(self) -> dict[str, Any]:
        """All counts, with the names of `memsyn.Stats` and of the line of counts."""
        counts = {"lines": self._num_lines, "requests": self._num_requests, "malformed": self._num_malformed}
        if isinstance(self._source, RequestServer):
            counts["refused"] = self._source.num_refused
        if isinstance(self._source, RequestLog):
            counts["bytes_left"] = self._source.num_bytes_left
        return {**counts, **vars(self._observer.stats())}

    def _take(self, line: Line) -> bool:
        """Show the requests of a line to the observer; returns whether so, or whether the end was asked for before."""
        self._num_lines += 1
        try:
            for k, (inputs, segment) in enumerate(self._inputs_of(line)):
                if not self._offer(inputs, segment, is_first=k == 0):
                    self._num_lines -= 1
                    return False
        except (Exception, SystemExit) as error:  # to_inputs is the user's: it may do anything with a line
            self._num_malformed += 1
            if self._num_malformed == 1:
                where = f"line {line.number} of this run, byte {line.start} of the source"
                note({"event": "malformed", "where": where, "reason": _reason(error), "others": "are counted"})
        # While no line was good, the options may be wrong: the next run reads these lines again.
        if self._position is not None and (self._num_requests or not self._num_malformed):
            self._position.place = line.end
        return True

    def _inputs_of(self, line: Line) -> list[tuple[Any, str | None]]:
        """The inputs of all requests in a line that are not in the store yet."""
        if line.text is None:
            raise MemsynError(f"it is longer than {LONGEST} bytes")
        found = []
        for request, segment in self._parse(line.text) if line.text.strip() else ():
            if segment not in self._segments and len(self._segments) >= MAX_SEGMENTS_READ:
                raise MemsynError(f"there are {MAX_SEGMENTS_READ} segments already")
            inputs = self._to_inputs(request)
            if inputs is not None:
                self._segments.add(segment)
                found.append((inputs, segment))
        return [(inputs, segment) for inputs, segment in found if self._is_new(segment, line)]

    def _is_new(self, segment: str | None, line: Line) -> bool:
        return self._position is None or self._position.admits(segment, line)

    def _offer(self, inputs: Any, segment: str | None, *, is_first: bool) -> bool:
        """Show a request to the observer when there is room, in parts if it is large; that of a server at once.

        If the end is asked for meanwhile, a line is shown whole or not at all; returns whether it was.
        """
        size = num_samples(inputs)
        start = 0
        while size is not None and not isinstance(self._source, RequestServer) and start < size:
            free = MAX_QUEUED - self._observer.stats().waiting
            if free > 0:
                self._observer.observe(take(inputs, start, start + free), segment=segment)
                start += free
            elif self._source.ending and is_first and not start:
                return False
            else:
                time.sleep(_PAUSE)
                self._report()
        if not start:
            self._observer.observe(inputs, segment=segment)
        self._num_requests += 1
        return True

    def _store(self) -> bool | None:
        """Write the position, then the store: killed between the two, the next run reads what the store lacks.

        Returns:
            Whether nothing was lost; None if the store must not be written, since the position was not.
        """
        position = self._position
        if position is not None and not position.is_caught_up:
            return None
        try:
            before = {} if position is None else position.write()
        except MemoryFileError as error:
            note({"event": "error", "reason": str(error)})
            return None
        stored = self._observer.flush(_FLUSH)
        if position is not None:
            position.settle(before)
        if not stored:
            note({"event": "error", "reason": str(self._observer.stats().last_error)})
        return stored

    def _report(self) -> None:
        """Print the counts if a minute has passed."""
        if time.monotonic() >= self._status_due:
            self._status_due = time.monotonic() + STATUS
            note({"event": "counts", **self.facts()})


def note(entry: dict[str, Any]) -> None:
    """Print a line of JSON to stderr."""
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    print(json.dumps({"time": when, **entry}), file=sys.stderr, flush=True)


def _reason(error: BaseException) -> str:
    """What is wrong with a line, without a word of it: others' errors may repeat what the line holds."""
    if isinstance(error, MemsynError):
        return str(error)
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON: {error.msg}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {os.path.basename(frame.filename)}:{frame.lineno}"


@contextmanager
def _ending_on_signals(source: Source) -> Iterator[None]:
    """In this block, SIGTERM and SIGINT end the source; a second one ends the process."""

    def end(number: int, _: Any) -> None:
        source.ending = True
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
