"""`results.jsonl`: the results of a run, one JSON object a line. docs/benchmark.md says what every field means.

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

from memsyn import MemsynError, OptionError
from memsyn_bench.optimizers import ADAM
from memsyn_bench.settings import Settings

RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True)
class TaskRecord:
    """What one method and seed reached with one more task."""

    method: str
    seed: int
    task: int
    """The place of the task in the sequence, from 0."""
    name: str
    accuracies: tuple[float, ...]
    """Accuracy on the test images of tasks 0 to `task`, in percent."""
    loss: float
    """Mean cross-entropy over the steps of the last epoch, without the penalty."""
    penalty: float
    """lambda sum Omega (theta - theta*)^2 after the last step."""
    seconds: float
    """Training, measuring and evaluating, by the clock."""
    fingerprint: str
    """The fingerprint of the settings."""
    strength: float | None
    """The factor of the method's own loss; None if the method has no strength."""
    kept_bytes: int
    """Bytes of the tensors that the method keeps from this task to the next, beside the model."""
    working_bytes: int
    """Bytes of the tensors that the method held while it learned the task, beside the model and its optimizer."""
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The sequence's other scorings by name: scores of tasks 0 to `task`, in percent."""
    plasticity: Mapping[str, float] = field(default_factory=dict)
    """Of `memsyn_bench.running.plasticity`, in percent; older lines and most sequences have none."""

    @property
    def key(self) -> tuple[str, int, int]:
        """Method, seed and task: two records of the same key hold the same numbers."""
        return self.method, self.seed, self.task


@dataclass(frozen=True)
class StrengthRecord:
    """How a method's strength was chosen; see `memsyn_bench.running.strengths`."""

    method: str
    strength: float
    """The chosen strength."""
    candidates: tuple[float, ...]
    scores: tuple[float, ...]
    """For each candidate the mean validation accuracy on the first `num_tasks` tasks after the last of them, in %."""
    fingerprint: str
    """The fingerprint of the settings."""
    num_tasks: int = 3
    """All tasks of the sequence; in older files, which do not say it, the first three."""


@dataclass(frozen=True)
class Run:
    """What a file of results holds."""

    settings: Settings
    num_tasks: int
    """The length of the sequence; if the file does not say it, the number of tasks in its records."""
    machines: tuple[str, ...]
    """Versions, platform and threads of the start, and of each continuation that differs."""
    records: tuple[TaskRecord, ...]
    choices: tuple[StrengthRecord, ...]


Results = dict[str, dict[int, list[TaskRecord]]]
"""Method -> seed -> one record a task."""

_Lines = tuple[list[dict[str, Any]], list[TaskRecord], list[StrengthRecord]]


def append_run(path: Path, settings: Settings, num_tasks: int) -> None:
    """Write the settings and versions that the next lines are made with, and the number of tasks."""
    versions = {"memsyn": version("memsyn"), "torch": version("torch"), "python": platform.python_version()}
    _append(
        path,
        {
            "kind": "run",
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "settings": settings.recorded(),
            "num_tasks": num_tasks,
            "fingerprint": settings.fingerprint,
            "versions": versions,
            "platform": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "threads": torch.get_num_threads(),  # the last digits depend on it, and with them the accuracies a little
        },
    )


def _processor() -> str:
    """The processor's name where the system tells it, and the instructions that torch's kernels use."""
    capability = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {capability}"


def append_task(path: Path, record: TaskRecord) -> None:
    """Write the result of one task."""
    entry = {"kind": "task", **asdict(record)}
    if not record.plasticity:
        del entry["plasticity"]
    _append(path, entry)


def append_strength(path: Path, record: StrengthRecord) -> None:
    """Write how a strength was chosen."""
    _append(path, {"kind": "strength", **asdict(record)})


def read_all(path: Path, settings: Settings) -> tuple[list[TaskRecord], list[StrengthRecord]]:
    """The records of a file, oldest first; none if there is no file. A last line that was cut off is left out.

    Raises:
        MemsynError: it cannot be read, a line is not ours, or the file holds results of other settings.
    """
    advice = "Use another --out, or remove the folder."
    if not path.exists():
        return [], []
    runs, records, choices = _read_lines(path, advice)
    for run in runs:
        _check_settings(path, run["settings"], settings)
    fingerprints = {record.fingerprint for record in records} | {choice.fingerprint for choice in choices}
    if not fingerprints <= {settings.fingerprint}:
        raise MemsynError(f"{path} holds results of other settings, and does not say of which. {advice}")
    return records, choices


def read_run(path: Path) -> Run:
    """Read a file of results, with the settings that the file names.

    Raises:
        MemsynError: it cannot be read, a line is not ours, there is no `run` record, or there are several that differ
            in their settings.
    """
    advice = "Leave the file out, or make it again with `memsyn-bench run`."
    runs, records, choices = _read_lines(path, advice)
    if not runs:
        raise MemsynError(f"{path} does not say with which settings it was made. {advice}")
    try:
        settings = Settings(**runs[0]["settings"])
    except (TypeError, OptionError) as error:
        raise MemsynError(f"{path} has settings that this version does not know: {error} {advice}") from error
    if any(run["settings"] != runs[0]["settings"] for run in runs):
        raise MemsynError(f"{path} holds runs of several settings. {advice}")
    return Run(
        settings,
        max([run.get("num_tasks", 0) for run in runs] + [record.task + 1 for record in records]),
        tuple(dict.fromkeys(map(_machine, runs))),
        tuple(records),
        tuple(choices),
    )


def _machine(run: Mapping[str, Any]) -> str:
    """The versions, platform and threads of a `run` record, in words."""
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    processor = [run["processor"]] if "processor" in run else []  # older files do not say it
    threads = f"{run['threads']} thread{'s' * (run['threads'] != 1)}"
    return ", ".join([versions, run["platform"], *processor, threads])


def _read_lines(path: Path, advice: str) -> _Lines:
    """All whole lines: `run` records as they are, the others as values."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MemsynError(f"{path} cannot be read: {error.strerror}. {advice}") from error
    runs, records, choices = [], [], []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            kind = entry.pop("kind")
            if kind == "run":
                runs.append(_whole(entry))
            elif kind == "strength":
                choices.append(StrengthRecord(**_with_tuples(entry, "candidates", "scores")))
            else:
                scores = {name: tuple(values) for name, values in entry.pop("scores").items()}
                records.append(TaskRecord(**_with_tuples(entry, "accuracies"), scores=scores))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise MemsynError(f"{path}, line {number} is no record of memsyn-bench. {advice}") from None
    return runs, records, choices


def _whole(run: dict[str, Any]) -> dict[str, Any]:
    """The `run` record, if it has all fields that are read."""
    missing = {"settings", "versions", "platform", "threads"} - run.keys()
    if missing:
        raise KeyError(*missing)
    return run


def _with_tuples(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {**entry, **{name: tuple(entry[name]) for name in names}}


def _check_settings(path: Path, found: Mapping[str, Any], settings: Settings) -> None:
    found, expected = {"optimizer": ADAM, **found}, asdict(settings)
    others = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
    if others:
        differences = [f"{name} is {found.get(name)} there and {expected.get(name)} here" for name in others]
        options = [f"--{name.replace('_', '-')} {found[name]}" for name in others if name in found]
        raise MemsynError(
            f"{path.parent} holds results of other settings: {', '.join(differences)}. Use another --out; or continue "
            f"them with {' '.join(options)}."
        )


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    """Write one whole line; first remove the part of a line that an earlier process may have left."""
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
