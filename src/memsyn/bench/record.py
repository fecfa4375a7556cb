"""`results.jsonl`: what a run found, a line at a time.

Owns the lines' form, their appending (whole, flushed, on the disk) and the reading of a file that was cut off. A
`run` record, with settings and versions, comes first and again with each continuation; a `strength` record says how a
method's strength was chosen; the others are `task` records.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from memsyn.bench.settings import Settings
from memsyn.errors import MemsynError

FILE = "results.jsonl"


@dataclass(frozen=True)
class TaskRecord:
    """What one method and seed reached with one more task."""

    method: str
    seed: int
    task: int
    """Counted from 0."""
    name: str
    accuracies: tuple[float, ...]
    """On the test images of tasks 0 to `task`, in percent."""
    loss: float
    """Mean cross-entropy over the steps of the last epoch, without the penalty."""
    penalty: float
    """lambda sum Omega (theta - theta*)^2 after the last step."""
    seconds: float
    """Training, measuring and evaluating, by the clock."""
    fingerprint: str
    """Of the settings."""
    strength: float | None
    """What the method's own loss was multiplied by; None for methods that have none."""
    kept_bytes: int
    """Of the tensors that the method keeps from this task to the next, beside the model."""
    working_bytes: int
    """Of the tensors that it held while it learned the task, beside the model and its optimizer."""
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By the name of a scoring, what the other ones of the sequence say of tasks 0 to `task`, in percent."""

    @property
    def key(self) -> tuple[str, int, int]:
        """What the record is of; two of the same key hold the same numbers."""
        return self.method, self.seed, self.task


@dataclass(frozen=True)
class StrengthRecord:
    """What a method's strength was chosen from; see `memsyn.bench.strengths`."""

    method: str
    strength: float
    """The one chosen."""
    candidates: tuple[float, ...]
    scores: tuple[float, ...]
    """Of each candidate: mean validation accuracy on the first two tasks after the second, in percent."""
    fingerprint: str
    """Of the settings."""


Results = dict[str, dict[int, list[TaskRecord]]]
"""Method -> seed -> one record a task."""


def append_run(path: Path, settings: Settings) -> None:
    """Say with which settings and versions the lines after this one are made."""
    versions = {"memsyn": version("memsyn"), "torch": version("torch"), "python": platform.python_version()}
    _append(
        path,
        {
            "kind": "run",
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "settings": asdict(settings),
            "fingerprint": settings.fingerprint,
            "versions": versions,
            "platform": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),  # the last digits depend on it, and with them the accuracies a little
        },
    )


def append_task(path: Path, record: TaskRecord) -> None:
    """Add what one task came to."""
    _append(path, {"kind": "task", **asdict(record)})


def append_strength(path: Path, record: StrengthRecord) -> None:
    """Add how a strength was chosen."""
    _append(path, {"kind": "strength", **asdict(record)})


def read_records(path: Path, settings: Settings) -> list[TaskRecord]:
    """The task records of a file; see `read_all`."""
    return read_all(path, settings)[0]


def read_all(path: Path, settings: Settings) -> tuple[list[TaskRecord], list[StrengthRecord]]:
    """The records of a file, oldest first; none if there is no file. A last line that was cut off is left out.

    Raises:
        MemsynError: a line is not ours, or the file holds results of other settings.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records, choices = [], []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            kind = entry.pop("kind")
            if kind == "run":
                _check_settings(path, entry["settings"], settings)
            elif kind == "strength":
                choices.append(StrengthRecord(**_with_tuples(entry, "candidates", "scores")))
            else:
                scores = {name: tuple(values) for name, values in entry.pop("scores").items()}
                records.append(TaskRecord(**_with_tuples(entry, "accuracies"), scores=scores))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise MemsynError(
                f"{path}, line {number} is no record of memsyn bench. Use another --out, or remove the folder."
            ) from None
    return records, choices


def _with_tuples(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {**entry, **{name: tuple(entry[name]) for name in names}}


def _check_settings(path: Path, found: Mapping[str, Any], settings: Settings) -> None:
    expected = asdict(settings)
    differences = [
        f"{name} is {found.get(name)} there and {expected.get(name)} here"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise MemsynError(
            f"{path.parent} holds results of other settings: {', '.join(differences)}. Use another --out, or remove "
            "the folder."
        )


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    """Write one whole line, and before it cut off what an earlier process left of a line."""
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
