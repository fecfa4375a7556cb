"""What an observer logs: one line per kind and minute, with fields, whatever an error or a handler does."""

import json
import logging
from typing import Any

import pytest

from memsyn import error_log
from memsyn.error_log import ErrorLog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(error_log.time, "monotonic", lambda: now[0])
    return now


def test_one_line_per_kind_and_minute(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    log = ErrorLog("it.st")
    for second in range(180):
        clock[0] = 1000.0 + second
        for _ in range(10):
            log.note(ValueError("wrong"))
        log.note(KeyError("missing"))
    kinds = [record.__dict__["error_type"] for record in caplog.records]
    assert kinds == ["ValueError", "KeyError"] * 3
    assert [record.__dict__["suppressed"] for record in caplog.records] == [0, 0, 599, 59, 599, 59]
    assert "ValueError: wrong (599 more of this kind since the last such line)" in caplog.text
    assert (log.num_errors, log.last) == (180 * 11, "KeyError: 'missing'")
    log.end()
    assert [record.getMessage() for record in caplog.records[6:]] == [
        "ValueError: 599 more until the end",
        "KeyError: 59 more until the end",
    ]


def test_a_line_has_fields_for_json(caplog: pytest.LogCaptureFixture) -> None:
    log = ErrorLog("it.st")
    log.note(ValueError("two\nlines\x1b[31m"))
    log.grown("dropped", 7, "{} dropped.")
    log.grown("dropped", 9, "{} dropped.")
    first, second = caplog.records
    plain = {*vars(logging.makeLogRecord({})), "message"}
    fields = [{k: v for k, v in vars(record).items() if k not in plain} for record in (first, second)]
    assert json.loads(json.dumps(fields)) == [
        {"event": "error", "error_type": "ValueError", "store": "it.st", "suppressed": 0},
        {"event": "dropped", "count": 7, "store": "it.st", "suppressed": 0},
    ]
    assert first.getMessage().endswith(r"ValueError: two\nlines\x1b[31m")
    assert second.getMessage() == "7 samples dropped."


def test_dropped_samples_are_counted_over_the_minute(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    log = ErrorLog("it.st")
    for second in range(121):
        clock[0] = 1000.0 + second
        log.grown("dropped", 5 * (second + 1), "{}")
    assert [record.getMessage() for record in caplog.records] == ["5 samples", "300 samples", "300 samples"]


def test_nothing_raises(caplog: pytest.LogCaptureFixture) -> None:
    class OddError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the log's disk is full")

    def refuse(record: Any) -> bool:
        raise RuntimeError("a filter")

    log, logger, handler = ErrorLog("it.st"), logging.getLogger("memsyn"), Failing()
    log.note(OddError())
    assert log.last == "OddError: its text cannot be had (RuntimeError)"
    logger.addHandler(handler)
    try:
        log.note(ValueError("1"))
        logger.removeHandler(handler)
        logger.addFilter(refuse)
        log.note(KeyError("2"))
    finally:
        logger.removeHandler(handler)
        logger.removeFilter(refuse)
    log.note(SystemExit(3))
    assert (log.num_errors, log.last) == (4, "SystemExit: 3")
    assert "SystemExit" in caplog.text
    log.note(MemoryError("x" * 100_000))
    assert len(caplog.records[-1].getMessage()) <= 500
