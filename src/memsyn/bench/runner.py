"""run(settings, methods, ...): every method and seed through every task, with a way back after an interruption.

Owns the run folder, the order of things in it and the progress bar. What a method does is in `learners`.

For each task, in this order: the memory file, the line in `results.jsonl`, the checkpoint. Whenever the process dies,
the next one goes on from the checkpoint, and a line that is already there is not written twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NoReturn, final

import torch
from torch import nn
from tqdm import tqdm

from memsyn import Memory, MemsynError, OptionError
from memsyn.bench.checkpoint import load_checkpoint, save_checkpoint
from memsyn.bench.learners import METHODS, accuracy, train
from memsyn.bench.record import FILE, Results, TaskRecord, append_run, append_task, read_records
from memsyn.bench.sequences import SEQUENCES
from memsyn.bench.settings import Settings


def run(settings: Settings, *, methods: Sequence[str], num_seeds: int, out: Path) -> Results:
    """Run seeds 0 to `num_seeds` - 1 of every method, or what of it `out` does not hold yet.

    A seed changes the heads, the batches and the augmentation, the same way for every method; the order of tasks is
    the sequence's own. Prints a row of the accuracy matrix after each task.

    Raises:
        OptionError: an unknown sequence, size or method, or no seed.
        MemsynError: `out` cannot be made or holds results of other settings, or the training diverged.
    """
    check_options(settings, methods, num_seeds)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MemsynError(f"the folder {out} cannot be made: {error}. Use another --out.") from error
    pairs = [(method, seed) for seed in range(num_seeds) for method in methods]
    runner = _Runner(settings, out)
    num_todo = sum(runner.num_todo(*pair) for pair in pairs)
    if num_todo:
        append_run(out / FILE, settings)
    with tqdm(total=num_todo * settings.epochs, unit="epoch", disable=None if num_todo else True) as bar:
        for pair in pairs:
            runner.finish(*pair, bar)
    return {method: {seed: runner.records_of(method, seed) for seed in range(num_seeds)} for method in methods}


def check_options(settings: Settings, methods: Sequence[str], num_seeds: int) -> None:
    """Refuse what cannot be run, before anything is loaded.

    Raises:
        OptionError: says what there is.
    """
    if settings.sequence not in SEQUENCES:
        raise OptionError(f"the sequence must be one of {', '.join(SEQUENCES)}; got {settings.sequence!r}.")
    sizes = SEQUENCES[settings.sequence].sizes
    if settings.size not in sizes:
        raise OptionError(f"size must be one of {', '.join(map(str, sizes))}; got {settings.size}.")
    for method in methods:
        if method not in METHODS:
            raise OptionError(f"methods must be of {', '.join(METHODS)}, with commas between; got {method!r}.")
    if len(set(methods)) != len(methods):
        raise OptionError(f"methods holds one twice: {', '.join(methods)}.")
    if num_seeds < 1:
        raise OptionError(f"seeds must be at least 1, got {num_seeds}.")


@final
class _Runner:
    """The tasks, and what of the results is there."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self.out = settings, out
        self.records = {record.key: record for record in read_records(out / FILE, settings)}
        self.sequence = SEQUENCES[settings.sequence]
        self.tasks = self.sequence.load(settings.size)

    def records_of(self, method: str, seed: int) -> list[TaskRecord]:
        """What one method and seed reached so far, task by task."""
        keys = [(method, seed, index) for index in range(len(self.tasks))]
        return [self.records[key] for key in keys if key in self.records]

    def num_todo(self, method: str, seed: int) -> int:
        return len(self.tasks) - len(self.records_of(method, seed))

    def finish(self, method: str, seed: int, bar: tqdm[NoReturn]) -> None:
        """Learn the tasks that one method and seed have not learned yet."""
        checkpoint = self.out / f"{method}-seed{seed}.checkpoint.safetensors"
        num_todo = self.num_todo(method, seed)
        if num_todo:
            model = self.sequence.build(self.tasks, generator(seed, 0))
            memory, first = load_checkpoint(checkpoint, model, fingerprint=self.settings.fingerprint)
            if first:
                tqdm.write(f"{method}, seed {seed}: continues after task {first} of {len(self.tasks)}")
            # The last line may be ahead of the checkpoint: then that task is learned again.
            bar.total = (bar.total or 0) + (len(self.tasks) - first - num_todo) * self.settings.epochs
            for index in range(first, len(self.tasks)):
                memory = self._learn(model, memory, method, seed, index, bar)
                if index + 1 < len(self.tasks):
                    save_checkpoint(
                        checkpoint, model, memory, num_tasks=index + 1, fingerprint=self.settings.fingerprint
                    )
                tqdm.write(matrix_row(self.records[method, seed, index], len(self.tasks)))
        checkpoint.unlink(missing_ok=True)

    def _learn(
        self, model: nn.Module, memory: Memory, method: str, seed: int, index: int, bar: tqdm[NoReturn]
    ) -> Memory:
        """Learn one task and write down what came of it; returns what is remembered."""
        task, start = self.tasks[index], time.perf_counter()
        bar.set_description(f"{method}, seed {seed}, task {index + 1}/{len(self.tasks)} {task.name}")
        training = train(
            model,
            task,
            index,
            method=METHODS[method],
            memory=memory,
            settings=self.settings,
            augment=self.sequence.augment,
            generator=generator(seed, index + 1),
            after_epoch=bar.update,
        )
        loss = fmean(training.losses[-math.ceil(len(task.train_labels) / self.settings.batch_size) :])
        if not math.isfinite(loss):
            raise MemsynError(
                f"the loss of {method}, seed {seed}, is {loss} in task {index + 1}, {task.name}: the training "
                "diverged. Use a smaller --strength or --lr, with another --out."
            )
        memory = METHODS[method].end(model, task, index, memory)
        if memory.importance:
            memory.save(self.out / f"{method}-seed{seed}.memsyn.safetensors")
        record = TaskRecord(
            method=method,
            seed=seed,
            task=index,
            name=task.name,
            accuracies=tuple(accuracy(model, seen, j) for j, seen in enumerate(self.tasks[: index + 1])),
            loss=loss,
            penalty=training.penalty,
            seconds=time.perf_counter() - start,
            fingerprint=self.settings.fingerprint,
        )
        if record.key not in self.records:
            append_task(self.out / FILE, record)
            self.records[record.key] = record
        return memory


def generator(seed: int, stage: int) -> torch.Generator:
    """The random numbers of one stage of one seed: 0 the heads, t + 1 task t; no stage depends on the one before."""
    return torch.Generator().manual_seed(1000 * seed + stage)


def matrix_row(record: TaskRecord, num_tasks: int) -> str:
    """One row of the accuracy matrix: percent on every task so far."""
    accuracies = " ".join(f"{value:5.1f}" for value in record.accuracies)
    place = f"{record.method}, seed {record.seed}, after {record.task + 1}/{num_tasks} {record.name}"
    return f"{place:<48} {accuracies}"
