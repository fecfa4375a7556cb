"""The records of runs for other tools: TensorBoard's scalars (extra `tensorboard`), MLflow's runs (extra `mlflow`).

Owns all use of the two. The numbers are those of the result files, seed by seed and task by task; finished or not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from memsyn import MemsynError
from memsyn.report.names import file_name
from memsyn_bench.extras import import_extra
from memsyn_bench.results.findings import Findings
from memsyn_bench.results.metrics import average_accuracy, forgetting
from memsyn_bench.running.record import TaskRecord

Seed = tuple[str, int, list[TaskRecord]]


def write_tensorboard(runs: Sequence[Findings], folder: Path) -> int:
    """Write scalars to `folder`/RUN/METHOD-seedN, the number of tasks learned as the step; return how many series.

    Raises:
        MemsynError: tensorboard is missing, or a series is there already.
    """
    import_extra("torch.utils.tensorboard", purpose="--tensorboard", install="memsyn-bench[tensorboard]")
    from torch.utils.tensorboard import SummaryWriter

    todo = [
        (folder / file_name(found.name) / file_name(f"{method}-seed{seed}"), records)
        for found in runs
        for method, seed, records in _seeds(found)
    ]
    for place, _ in todo:
        if place.exists():
            raise MemsynError(f"{place} is there already, and would hold everything twice. Name another folder.")
    try:
        for place, records in todo:
            with SummaryWriter(str(place)) as writer:
                for record, name, value in _scalars(records):
                    writer.add_scalar(name, value, record.task + 1)
    except OSError as error:
        raise MemsynError(f"{folder} cannot be written: {error.strerror}. Name another folder.") from error
    return len(todo)


def write_mlflow(runs: Sequence[Findings], uri: str) -> int:
    """Log one MLflow run for each method and seed, in an experiment for each run; return how many.

    Parameters are the settings, the method's strength and the seed; metrics' steps are the number of tasks learned.

    Raises:
        MemsynError: mlflow is missing, or the store at `uri` refuses.
    """
    import_extra("mlflow", purpose="--mlflow", install="memsyn-bench[mlflow]")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException

    logged = 0
    try:
        client = MlflowClient(uri, registry_uri=uri)
        for found in runs:
            name = f"memsyn {found.name}"
            known = client.get_experiment_by_name(name)
            if known and known.lifecycle_stage == "deleted":
                raise MemsynError(f"MLflow at {uri} has deleted {name!r}: restore it there, or name another store.")
            experiment = known.experiment_id if known else client.create_experiment(name)
            if client.search_runs([experiment], max_results=1):
                raise MemsynError(
                    f"MLflow at {uri} has runs of {name!r} already, and would hold everything twice. Delete its "
                    "runs, or name another store."
                )
            for method, seed, records in _seeds(found):
                parameters = {**asdict(found.run.settings), "method": method, "seed": seed}
                parameters |= {"applied_strength": records[-1].strength, "made_with": "; ".join(found.run.machines)}
                now, names = int(time.time() * 1000), dict[str, str]()
                metrics = [
                    Metric(_metric_name(name, names), value, now, record.task + 1)
                    for record, name, value in _scalars(records)
                ]
                run = client.create_run(experiment, run_name=f"{method} seed {seed}").info.run_id
                try:
                    client.log_batch(run, metrics, [Param(key, str(value)) for key, value in parameters.items()])
                except MlflowException:
                    client.set_terminated(run, "FAILED")
                    raise
                client.set_terminated(run)
                logged += 1
    except MlflowException as error:
        raise MemsynError(f"MLflow at {uri} refuses: {error}") from error
    return logged


def _seeds(found: Findings) -> list[Seed]:
    """Every method and seed of the file with its records, in order."""
    seeds: dict[tuple[str, int], dict[int, TaskRecord]] = {}
    for record in found.run.records:
        seeds.setdefault((record.method, record.seed), {})[record.task] = record
    return [(*key, [records[task] for task in sorted(records)]) for key, records in seeds.items()]


def _scalars(records: Sequence[TaskRecord]) -> Iterator[tuple[TaskRecord, str, float]]:
    """Each record with the name and value of each of its numbers."""
    names = {record.task: record.name for record in records}
    for number, record in enumerate(records, start=1):
        matrix = [earlier.accuracies for earlier in records[:number]]
        yield record, "average accuracy", average_accuracy(matrix)
        if [earlier.task for earlier in records[:number]] == list(range(number)):
            yield record, "forgetting", forgetting(matrix)
        for task, accuracy in enumerate(record.accuracies):
            yield record, f"accuracy/{names.get(task, task + 1)}", accuracy
        for scoring, values in record.scores.items():
            yield record, f"{scoring}/mean", sum(values) / len(values)
        for name in ("loss", "penalty", "seconds", "kept_bytes", "working_bytes"):
            yield record, name, float(getattr(record, name))


def _metric_name(text: str, taken: dict[str, str]) -> str:
    """Text as MLflow takes it for a metric: letters, digits and _ - . / and space; a path that leads nowhere else.

    Different texts get different names: `taken` holds the names given so far.
    """
    head, _, tail = text.partition("/")
    own = "/".join("".join(c if c.isalnum() or c in "_- " else "_" for c in part) for part in (head, tail) if part)
    while taken.setdefault(own, text) != text:
        own += "_"
    return own
