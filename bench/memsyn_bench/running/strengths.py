"""How strengths are chosen: for every method alike, on held-out training data of the whole sequence.

Owns the protocol. It never looks at test data: they are removed from the tasks first. A choice on the first tasks alone
would not do: after three tasks there is little forgetting to see (`benchmarks/strength_protocols.py` has the numbers).
So a method that has a strength is compared at a strength that nobody knows when the first task is learned.
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
SEED = 998
"""The seed of the split, and of its trainings; the seeds of runs start at 0."""


def num_trainings(num_tasks: int) -> int:
    """The number of trainings that one method's choice takes, in a sequence of `num_tasks` tasks."""
    return 1 + len(DECADES) * (num_tasks - 1)


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
    """Try each candidate on all tasks; the best by mean validation accuracy on them after the last one.

    The first task is learned once: no method's strength acts on it. Among equals the largest wins. A training that
    diverges counts as 0%.

    Raises:
        OptionError: the method has no strength, or there are fewer than two tasks.
    """
    tried = candidates(method)
    if not tried:
        raise OptionError(f"{method} has no strength to choose.")
    if len(tasks) < 2:
        raise OptionError(f"a strength is chosen on two tasks at least; there is {len(tasks)}.")
    held = [for_validation(task, SEED) for task in tasks]
    model = sequence.network(held, generator(SEED, 0))

    def learn(index: int, learner: Method) -> bool:
        augment, loss = sequence.augment, sequence.loss
        training = task_training(model, held[index], index, settings=settings, augment=augment, seed=SEED, loss=loss)
        losses = train(training, learner, after_epoch).losses
        if not math.isfinite(losses[-1]):
            return False
        if index + 1 < len(held) or learner.merges:  # what the last task leaves behind is not needed, and may be dear
            learner.end(training)
        return True

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
    best = max(range(len(tried)), key=lambda index: (scores[index], tried[index]))
    return StrengthRecord(method, tried[best], tried, tuple(scores), settings.fingerprint, num_tasks=len(tasks))
