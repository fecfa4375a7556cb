"""Traffic that drifts: does a memory with a half-life follow it, and does it keep what is in use better than an old one?

A network learns all eight tasks of emoji8 together, and serves: for a week its users ask about tasks 1 to 4, for another
about 5 to 8. An observer with a half-life sees every request; the clock runs fast. Prints how the ranking of the body's
weights agrees (Spearman) with what is measured on the tasks of each week directly; then, after learning the letters of an
alphabet under the memory of the first week, under that of the day, and under none, the accuracy on either week's tasks.
"""

import argparse
import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

import memsyn
from memsyn.bench.drawings import resize
from memsyn.bench.learners import generator, lesson_of, train
from memsyn.bench.methods.method import Method
from memsyn.bench.methods.rehearsal import Rehearsing
from memsyn.bench.metrics import interval
from memsyn.bench.networks import Network
from memsyn.bench.scoring import score
from memsyn.bench.sequences import find_sequence
from memsyn.bench.settings import Settings
from memsyn.bench.tasks import Task
from memsyn.ledger import spearman

SIDE = 32
WEEKS = (range(4), range(4, 8))
"""The tasks that are asked about in each."""
DAYS = 7
DAY = 86400.0
HALF_LIFE = timedelta(days=2)
REQUESTS = 160
"""A day."""
TRAFFIC = 900
"""What is added to the random numbers of a seed's tasks for those of its days."""


@dataclass(frozen=True)
class Given:
    """What is compared in one seed: Spearman's correlations by day, and accuracy by memory, on either week's tasks."""

    agreement: list[tuple[float, float]]
    between: float
    kept: dict[str, tuple[float, float, float]]
    """And the accuracy on the new task."""


def letters(alphabet: int) -> Task:
    """An alphabet of scripts8, as large as the drawings are, in three colours."""
    task = find_sequence("scripts8").load(28)[alphabet]

    def widened(images: Tensor) -> Tensor:
        return resize(images, SIDE).expand(-1, 3, -1, -1).contiguous()

    return replace(task, train_images=widened(task.train_images), test_images=widened(task.test_images))


def served(tasks: Sequence[Task], seed: int, epochs: int) -> Network:
    """A network that has learned the eight tasks together; it has a head for the ninth already."""
    sequence = find_sequence("emoji8")
    model = sequence.build(tasks, generator(seed, 0))
    settings, together = Settings("emoji8", SIDE, epochs=epochs), Rehearsing(per_task=None)
    lessons = [
        lesson_of(model, task, index, settings=settings, augment=sequence.augment, seed=seed)
        for index, task in enumerate(tasks[:8])
    ]
    for lesson in lessons[:-1]:
        together.end(lesson)
    with tqdm(total=epochs, desc=f"seed {seed}: eight tasks", leave=False) as bar:
        train(lessons[-1], together, bar.update)
    return model.eval()


def direct(model: Network, tasks: Sequence[Task], week: range) -> memsyn.Importance:
    """What is measured on the tasks of a week themselves."""
    batches = [{"inputs": part, "task": k} for k in week for part in tasks[k].train_images.split(64)]
    return memsyn.measure(model, batches, progress=False)


def observed(model: Network, tasks: Sequence[Task], seed: int) -> list[memsyn.Importance]:
    """What the observer has at the end of each day."""
    augment, draws = find_sequence("emoji8").augment, generator(seed, TRAFFIC)
    clock = [1e9]
    found = []
    store = Path(tempfile.mkdtemp()) / "traffic.safetensors"
    with (
        patch("time.time", lambda: clock[0]),
        memsyn.Observer(model, store, rate=1.0, half_life=HALF_LIFE, room=2 * REQUESTS, interval=1e6) as observer,
    ):
        observer.attach()
        for week in WEEKS:
            for _ in tqdm(range(DAYS), f"seed {seed}: a week", leave=False):
                for _ in range(REQUESTS):
                    task = week[int(torch.randint(len(week), (), generator=draws))]
                    images = tasks[task].train_images
                    chosen = int(torch.randint(len(images), (), generator=draws))
                    with torch.inference_mode():
                        model(augment(images[chosen : chosen + 1], draws), task)
                    clock[0] += DAY / REQUESTS
                observer.flush(600)
                found.append(observer.importance())
        stats = observer.stats()
    assert stats.measured == stats.seen == 2 * DAYS * REQUESTS, stats
    return found


def agreement(one: memsyn.Importance, other: memsyn.Importance) -> float:
    """Of the ranking of the body's weights."""
    ranked = [
        torch.cat([total.flatten() for name, total in own.sums.items() if name.startswith("body.")]).double().numpy()
        for own in (one, other)
    ]
    return spearman(*ranked)


def on_weeks(model: Network, tasks: Sequence[Task]) -> tuple[float, float, float]:
    """Accuracy on the tasks of each week, and on the new one."""
    scores = score(model, tasks, "multi-head")
    return fmean(scores[k] for k in WEEKS[0]), fmean(scores[k] for k in WEEKS[1]), scores[8]


def run(seed: int, given: argparse.Namespace) -> Given:
    tasks = [*find_sequence("emoji8").load(SIDE), letters(given.alphabet)]
    model = served(tasks, seed, given.epochs)
    truth = [direct(model, tasks, week) for week in WEEKS]
    days = observed(model, tasks, seed)
    memories = {
        "none": None,
        "the first week's": days[DAYS - 1],
        "of the day, decayed": days[-1],
    }
    kept = {"before": on_weeks(model, tasks)}
    settings = Settings("emoji8", SIDE, epochs=given.new_epochs, lr=given.lr)
    for name, importance in tqdm(memories.items(), f"seed {seed}: letters", leave=False):
        student, method = copy.deepcopy(model), Method()
        if importance is not None:
            memory = memsyn.Memory.empty().consolidate(student, importance)
            method = Method(memsyn.Relative(given.strength).of(memory))
            method.load(memory, {})
        lesson = lesson_of(
            student, tasks[8], 8, settings=settings, augment=find_sequence("scripts8").augment, seed=seed
        )
        train(lesson, method, lambda: None)
        kept[name] = on_weeks(student, tasks)
    by_day = [(agreement(day, truth[0]), agreement(day, truth[1])) for day in days]
    return Given(by_day, agreement(*truth), kept)


def print_tables(runs: Mapping[int, Given]) -> None:
    all_given = list(runs.values())
    print(f"\nThe weeks' tasks agree with each other: {interval([g.between for g in all_given])}\n")
    print("| after day | with tasks 1-4 | with tasks 5-8 |")
    print("|---:|---:|---:|")
    for day in range(2 * DAYS):
        cells = [str(interval([g.agreement[day][week] for g in all_given])) for week in (0, 1)]
        print(f"| {day + 1} | {' | '.join(cells)} |")
    print("\n| memory | tasks 1-4 | tasks 5-8, in use | the letters |")
    print("|---|---:|---:|---:|")
    for name in all_given[0].kept:
        cells = [str(interval([g.kept[name][k] for g in all_given])) for k in range(3)]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12, help="of the eight tasks together")
    parser.add_argument("--alphabet", type=int, default=0, help="of scripts8")
    parser.add_argument("--strength", type=float, default=0.01, help="as memsyn.Relative takes it")
    parser.add_argument("--new-epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print_tables({seed: run(seed, given) for seed in given.seeds})


if __name__ == "__main__":
    main()
