"""run(settings, methods, ...): every method and seed through every task; an interrupted run can be continued.

Owns the run folder, the order of things in it and the progress bar. What a method does is in `methods`.

For each task, in this order: the memory file, the line in `results.jsonl`, the checkpoint. Whenever the process dies,
the next one continues from the checkpoint, and a line that is already there is not written twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NoReturn, final

from tqdm import tqdm

from memsyn import MemsynError, OptionError
from memsyn_bench.losses import cross_entropy
from memsyn_bench.methods.method import Method
from memsyn_bench.methods.registry import METHODS, new_method
from memsyn_bench.running.checkpoint import load_checkpoint, save_checkpoint
from memsyn_bench.running.examples import EXAMPLES_FILE, add_examples
from memsyn_bench.running.plasticity import plasticity
from memsyn_bench.running.record import (
    RESULTS_FILE,
    Results,
    TaskRecord,
    append_run,
    append_strength,
    append_task,
    read_all,
)
from memsyn_bench.running.scoring import SCORINGS, score
from memsyn_bench.running.strengths import choose_strength, num_trainings
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.networks import Network
from memsyn_bench.sequences.sequences import find_sequence
from memsyn_bench.settings import OWN, Settings, training_words


def run(settings: Settings, *, methods: Sequence[str], num_seeds: int, out: Path) -> Results:
    """Run seeds 0 to `num_seeds` - 1 of every method, or the part of them that `out` does not hold yet.

    A seed changes the heads, the batches and the augmentation, the same way for every method; the order of tasks is
    fixed. Prints how the methods are trained, and a row of the accuracy matrix after each task.

    If the sequence learns an embedding, `examples.json` beside the results holds the texts that seed 0 finds for some
    images (`memsyn_bench.running.examples`).

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
        append_run(out / RESULTS_FILE, settings, len(runner.tasks))
        tqdm.write(training_words(settings))
    with tqdm(total=num_todo * settings.epochs, unit="epoch", disable=None if num_todo else True) as bar:
        for pair in pairs:
            runner.finish(*pair, bar)
    return {method: {seed: runner.records_of(method, seed) for seed in range(num_seeds)} for method in methods}


def check_options(settings: Settings, methods: Sequence[str], num_seeds: int) -> None:
    """Refuse what cannot be run, before anything is loaded.

    Raises:
        OptionError: says what there is.
    """
    sequence = find_sequence(settings.sequence)
    if settings.size not in sequence.sizes:
        raise OptionError(f"size must be one of {', '.join(map(str, sequence.sizes))}; got {settings.size}.")
    for scoring in sequence.scorings:
        if scoring not in SCORINGS:
            raise OptionError(
                f"the scorings of {settings.sequence} must be of {', '.join(SCORINGS)}; got {scoring!r}. Change its "
                "TaskSequence."
            )
    for method in methods:
        if method not in METHODS:
            raise OptionError(f"methods must be of {', '.join(METHODS)}, separated by commas; got {method!r}.")
        if METHODS[method].classifies and sequence.loss is not cross_entropy:
            fitting = ", ".join(name for name, entry in METHODS.usable()[0].items() if not entry.classifies)
            raise OptionError(
                f"{method} takes outputs for logits of classes, and {settings.sequence} learns an embedding. "
                f"Choose methods of {fitting}."
            )
    if len(set(methods)) != len(methods):
        raise OptionError(f"methods holds one twice: {', '.join(methods)}.")
    if num_seeds < 1:
        raise OptionError(f"seeds must be at least 1, got {num_seeds}.")


@final
class _Runner:
    """The tasks of a run, and the results so far."""

    def __init__(self, settings: Settings, out: Path) -> None:
        self.settings, self.out = settings, out
        records, choices = read_all(out / RESULTS_FILE, settings)
        self.records = {record.key: record for record in records}
        self.choices = {choice.method: choice for choice in choices}
        self.sequence = find_sequence(settings.sequence)
        self.tasks = self.sequence.tasks(settings.size)

    def records_of(self, method: str, seed: int) -> list[TaskRecord]:
        """The records of one method and seed so far, task by task."""
        keys = [(method, seed, index) for index in range(len(self.tasks))]
        return [self.records[key] for key in keys if key in self.records]

    def num_todo(self, method: str, seed: int) -> int:
        return len(self.tasks) - len(self.records_of(method, seed))

    def finish(self, method: str, seed: int, bar: tqdm[NoReturn]) -> None:
        """Learn the tasks that one method and seed have not learned yet."""
        checkpoint = self.out / f"{method}-seed{seed}.checkpoint.safetensors"
        num_todo = self.num_todo(method, seed)
        if num_todo:
            strength = self.strength_of(method, bar)
            learner = new_method(method, strength)
            model = self.sequence.network(self.tasks, generator(seed, 0))
            first = load_checkpoint(checkpoint, model, learner, fingerprint=self.settings.fingerprint)
            if first:
                tqdm.write(f"{method}, seed {seed}: continues after task {first} of {len(self.tasks)}")
            # The last line may be ahead of the checkpoint: then that task is learned again.
            bar.total = (bar.total or 0) + (len(self.tasks) - first - num_todo) * self.settings.epochs
            for index in range(first, len(self.tasks)):
                self._learn(model, learner, strength, method, seed, index, bar)
                if index + 1 < len(self.tasks):
                    save_checkpoint(
                        checkpoint, model, learner, num_tasks=index + 1, fingerprint=self.settings.fingerprint
                    )
                tqdm.write(matrix_row(self.records[method, seed, index], len(self.tasks)))
        checkpoint.unlink(missing_ok=True)

    def strength_of(self, method: str, bar: tqdm[NoReturn]) -> float | None:
        """The factor of a method's own loss. If it is still to be chosen, it is chosen now and written down."""
        own, wanted = METHODS[method].strength, self.settings.strength
        if own is None or wanted == OWN:
            return own
        if not isinstance(wanted, str):
            return wanted
        if method not in self.choices:
            bar.total = (bar.total or 0) + num_trainings(len(self.tasks)) * self.settings.epochs
            bar.set_description(f"{method}, choosing its strength")
            choice = choose_strength(method, self.sequence, self.tasks, self.settings, bar.update)
            append_strength(self.out / RESULTS_FILE, choice)
            self.choices[method] = choice
            tqdm.write(f"{method}: strength {choice.strength:g} of {', '.join(f'{c:g}' for c in choice.candidates)}")
        return self.choices[method].strength

    def _learn(
        self,
        model: Network,
        learner: Method,
        strength: float | None,
        method: str,
        seed: int,
        index: int,
        bar: tqdm[NoReturn],
    ) -> None:
        """Learn one task and write its record."""
        task, start, settings = self.tasks[index], time.perf_counter(), self.settings
        bar.set_description(f"{method}, seed {seed}, task {index + 1}/{len(self.tasks)} {task.name}")
        sequence = self.sequence
        training = task_training(
            model, task, index, settings=settings, augment=sequence.augment, seed=seed, loss=sequence.loss
        )
        result = train(training, learner, after_epoch=bar.update)
        loss = fmean(result.losses[-math.ceil(len(task.train_labels) / settings.batch_size) :])
        if not math.isfinite(loss):
            raise MemsynError(
                f"the loss of {method}, seed {seed}, is {loss} in task {index + 1}, {task.name}: the training "
                "diverged. Use a smaller --strength or --lr, with another --out."
            )
        learner.end(training)
        if learner.memory.names:
            learner.memory.save(self.out / f"{method}-seed{seed}.memsyn.safetensors")
        first, *others = [(kind, score(model, self.tasks[: index + 1], kind)) for kind in sequence.scorings]
        record = TaskRecord(
            method=method,
            seed=seed,
            task=index,
            name=task.name,
            accuracies=first[1],
            loss=loss,
            penalty=result.penalty,
            seconds=time.perf_counter() - start,
            fingerprint=settings.fingerprint,
            strength=strength,
            kept_bytes=learner.num_bytes(),
            working_bytes=result.num_bytes,
            scores=dict(others),
            plasticity=plasticity(model, task.train_images, index, learner.memory)
            if sequence.records_plasticity
            else {},
        )
        if task.class_vectors is not None and seed == 0 and index in (0, len(self.tasks) - 1):
            add_examples(self.out / EXAMPLES_FILE, model, self.tasks[0], method, last=index > 0)
        if record.key not in self.records:
            append_task(self.out / RESULTS_FILE, record)
            self.records[record.key] = record


def matrix_row(record: TaskRecord, num_tasks: int) -> str:
    """One row of the accuracy matrix: percent on every task so far."""
    accuracies = " ".join(f"{value:5.1f}" for value in record.accuracies)
    place = f"{record.method}, seed {record.seed}, after {record.task + 1}/{num_tasks} {record.name}"
    return f"{place:<48} {accuracies}"
