"""How strengths are chosen: for every method alike, on held-out training data of the first tasks.

Owns the protocol. It never looks at test data: they are removed from the tasks first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from memsyn import OptionError
from memsyn_bench.methods.method import Method
from memsyn_bench.methods.registry import METHODS, new_method
from memsyn_bench.running.record import StrengthRecord
from memsyn_bench.running.scoring import score
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.sequences import TaskSequence
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task, for_validation

DECADES = range(-3, 4)
"""Candidates are a method's own default strength times these powers of ten."""
NUM_TASKS = 3
"""The number of first tasks that are used, if there are as many: after two there is little forgetting to see."""
SEEDS = (998, 999)
"""Seeds of the splits that a score is a mean over, and of their trainings; the seeds of runs start at 0."""


def num_trainings(num_tasks: int) -> int:
    """The number of trainings that one method's choice takes, in a sequence of `num_tasks` tasks."""
    return len(SEEDS) * (1 + len(DECADES) * (min(num_tasks, NUM_TASKS) - 1))


def candidates(method: str) -> tuple[float, ...]:
    """The strengths that are tried, over decades; none for a method that has none."""
    default = METHODS[method].strength
    return () if default is None else tuple(default * 10.0**power for power in DECADES)


def choose_strength(
    method: str,
    sequence: TaskSequence,
    tasks: Sequence[Task],
    settings: Settings,
    after_epoch: Callable[[], object] = lambda: None,
) -> StrengthRecord:
    """Try each candidate on the first three tasks; the best by mean validation accuracy on them after the last one.

    A score is a mean over two splits. In each the first task is learned once: no method's strength acts on it. Among
    equals the largest wins. A training that diverges counts as 0%.

    Raises:
        OptionError: the method has no strength, or there are fewer than two tasks.
    """
    tried = candidates(method)
    if not tried:
        raise OptionError(f"{method} has no strength to choose.")
    if len(tasks) < 2:
        raise OptionError(f"a strength is chosen on two tasks at least; there is {len(tasks)}.")
    of_splits = [_scores(method, sequence, tasks[:NUM_TASKS], settings, seed, after_epoch) for seed in SEEDS]
    scores = tuple(fmean(of_split) for of_split in zip(*of_splits, strict=True))
    best = max(range(len(tried)), key=lambda index: (scores[index], tried[index]))
    return StrengthRecord(method, tried[best], tried, scores, settings.fingerprint)


def _scores(
    method: str,
    sequence: TaskSequence,
    tasks: Sequence[Task],
    settings: Settings,
    seed: int,
    after_epoch: Callable[[], object],
) -> list[float]:
    """Each candidate's mean validation accuracy on the tasks, in percent: with one seed's split and trainings."""
    held = [for_validation(task, seed) for task in tasks]
    model = sequence.network(held, generator(seed, 0))

    def learn(index: int, learner: Method) -> bool:
        augment, loss = sequence.augment, sequence.loss
        training = task_training(model, held[index], index, settings=settings, augment=augment, seed=seed, loss=loss)
        losses = train(training, learner, after_epoch).losses
        if not math.isfinite(losses[-1]):
            return False
        if index + 1 < len(held) or learner.merges:  # what the last task leaves behind is not needed, and may be dear
            learner.end(training)
        return True

    tried = candidates(method)
    first = new_method(method, tried[0])
    if not learn(0, first):
        raise OptionError(f"the first task cannot be learned: its loss is not finite at lr {settings.lr:g}. Lower it.")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    scores = []
    for strength in tried:
        model.load_state_dict(weights)
        learner = new_method(method, strength)
        learner.load(first.memory, first.kept)
        learned = all(learn(index, learner) for index in range(1, len(held)))
        scores.append(fmean(score(model, held, sequence.scorings[0])) if learned else 0.0)
    return scores
