"""Traffic that drifts: does a memory with a half-life follow it, and keep what is in use better than an old one?

A network learns eight tasks together, and serves: for a week its users ask about tasks 1 to 4, for another about 5 to
8. They are those of emoji8; or, less alike, its first four, and the letters of four alphabets. An observer with a
half-life sees every request; the clock runs fast. Prints how the ranking of the backbone's weights agrees (Spearman)
with what is measured on the tasks of each week directly; then, after learning the letters of one alphabet more under
the memory of the first week, under the decayed one of the last day, and under none, the accuracy on either week's
tasks, and the difference seed by seed. Traffic and direct measures are of training drawings, accuracy is of unseen
ones.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import torch
from tqdm import tqdm

import memsyn
from memsyn.values.ranks import spearman
from memsyn_bench.data.mixed import among_drawings
from memsyn_bench.methods.method import Method
from memsyn_bench.methods.rehearsal import Rehearsal
from memsyn_bench.results.metrics import interval
from memsyn_bench.running.scoring import score
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.networks import Network
from memsyn_bench.sequences.sequences import find_sequence
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task

SIDE = 32
WEEKS = (range(4), range(4, 8))
"""The tasks that are asked about in each."""
DAYS = 7
DAY = 86400.0
HALF_LIFE = timedelta(days=2)
REQUESTS = 16
"""A day."""
DRAWINGS = 4
"""Of one task in each."""
STRENGTHS = (0.001, 0.01, 0.1)
"""As memsyn.Relative takes them."""
FIRST, DECAYED = "the first week's", "the last day's, decayed"
TRAFFIC = 900
"""What is added to the random numbers of a seed's tasks for those of its days."""


@dataclass(frozen=True)
class Found:
    """What came of one seed."""

    agreement: list[tuple[float, float]]
    """After each day, with the tasks of either week: Spearman's correlation."""
    between: float
    """That of the two weeks' tasks with each other."""
    kept: dict[str, tuple[float, float, float]]
    """By strength and memory: the accuracy on the tasks of either week, and on the new one."""


THEN = {"drawings": None, "letters": range(1, 5)}
"""What the second week is about, and of which alphabets."""


def eight(then: str) -> list[Task]:
    """The tasks of both weeks."""
    drawings, alphabets = find_sequence("emoji8").load(SIDE), THEN[then]
    return drawings if alphabets is None else [*drawings[:4], *map(letters, alphabets)]


def letters(alphabet: int) -> Task:
    """An alphabet of scripts8, as the drawings are."""
    return among_drawings(find_sequence("scripts8").load(28)[alphabet], SIDE)


def served(tasks: Sequence[Task], seed: int, epochs: int) -> Network:
    """A network that has learned the eight tasks together; it has a head for the ninth already."""
    sequence = find_sequence("emoji8")
    model = sequence.build(tasks, generator(seed, 0))
    settings, together = Settings("emoji8", SIDE, epochs=epochs), Rehearsal(per_task=None)
    lessons = [
        task_training(model, task, index, settings=settings, augment=sequence.augment, seed=seed)
        for index, task in enumerate(tasks[:8])
    ]
    for training in lessons[:-1]:
        together.end(training)
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
        patch("memsyn.live.window._elapsed", lambda: clock[0]),
        memsyn.Observer(
            model, store, rate=1.0, half_life=HALF_LIFE, room=2 * REQUESTS * DRAWINGS, interval=1e6, min_samples=1
        ) as observer,
    ):
        observer.attach()
        for week in WEEKS:
            for _ in tqdm(range(DAYS), f"seed {seed}: a week", leave=False):
                for _ in range(REQUESTS):
                    task = week[int(torch.randint(len(week), (), generator=draws))]
                    images = tasks[task].train_images
                    chosen = torch.randint(len(images), (DRAWINGS,), generator=draws)
                    with torch.inference_mode():
                        model(augment(images[chosen], draws), task)
                    clock[0] += DAY / REQUESTS
                observer.flush(600)
                found.append(observer.importance())
        stats = observer.stats()
    assert stats.measured == stats.seen == 2 * DAYS * REQUESTS * DRAWINGS, stats
    return found


def agreement(one: memsyn.Importance, other: memsyn.Importance) -> float:
    """Of the ranking of the backbone's weights."""
    ranked = [
        torch.cat([sums.flatten() for name, sums in own.sums.items() if name.startswith("body.")]).double().numpy()
        for own in (one, other)
    ]
    return spearman(*ranked)


def on_weeks(model: Network, tasks: Sequence[Task]) -> tuple[float, float, float]:
    """Accuracy on the tasks of each week, and on the new one."""
    scores = score(model, tasks, "multi-head")
    return fmean(scores[k] for k in WEEKS[0]), fmean(scores[k] for k in WEEKS[1]), scores[8]


def after_letters(model: Network, tasks: Sequence[Task], method: Method, seed: int, settings: Settings) -> Network:
    """A copy that has learned the ninth task."""
    student = copy.deepcopy(model)
    move = find_sequence("scripts8").augment
    train(task_training(student, tasks[8], 8, settings=settings, augment=move, seed=seed), method, lambda: None)
    return student


def run(seed: int, given: argparse.Namespace) -> Found:
    tasks = [*eight(given.then), letters(given.alphabet)]
    model = served(tasks, seed, given.epochs)
    truth = [direct(model, tasks, week) for week in WEEKS]
    days = observed(model, tasks, seed)
    settings = Settings("emoji8", SIDE, epochs=given.new_epochs, lr=given.lr)
    kept = {
        "before the letters": on_weeks(model, tasks),
        "none": on_weeks(after_letters(model, tasks, Method(), seed, settings), tasks),
    }
    for strength in tqdm(STRENGTHS, f"seed {seed}: letters", leave=False):
        for name, importance in ((FIRST, days[DAYS - 1]), (DECAYED, days[-1])):
            memory = memsyn.Memory.empty().consolidate(model, importance)
            method = Method(memsyn.Relative(strength).of(memory))
            method.load(memory, {})
            kept[f"{name}, {strength:g}"] = on_weeks(after_letters(model, tasks, method, seed, settings), tasks)
    by_day = [(agreement(day, truth[0]), agreement(day, truth[1])) for day in days]
    found = Found(by_day, agreement(*truth), kept)
    print(f"seed {seed}: {found}", flush=True)
    return found


def cell(values: Sequence[float], digits: int) -> str:
    """The mean, and its 95% interval."""
    own = interval(values)
    return f"{own.mean:.{digits}f} ± {own.half:.{digits}f}"


def print_tables(runs: Sequence[Found]) -> None:
    print(f"\nThe weeks' tasks agree with each other: {cell([found.between for found in runs], 3)}\n")
    print("| after day | with tasks 1-4 | with tasks 5-8 |")
    print("|---:|---:|---:|")
    for day in range(2 * DAYS):
        print(f"| {day + 1} |", *(f"{cell([found.agreement[day][w] for found in runs], 3)} |" for w in (0, 1)))
    print("\n| memory, strength | tasks 1-4 | tasks 5-8, in use | the letters |")
    print("|---|---:|---:|---:|")
    for name in runs[0].kept:
        print(f"| {name} |", *(f"{cell([found.kept[name][k] for found in runs], 1)} |" for k in range(3)))
    print("\n| decayed less first week's, strength | tasks 1-4 | tasks 5-8, in use | the letters |")
    print("|---|---:|---:|---:|")
    for strengths in (*((strength,) for strength in STRENGTHS), STRENGTHS):
        own = [[gain(found, strengths, k) for found in runs] for k in range(3)]
        print(f"| {', '.join(f'{s:g}' for s in strengths)} |", *(f"{cell(values, 1)} |" for values in own))


def gain(found: Found, strengths: Sequence[float], k: int) -> float:
    """What the decayed memory keeps more than the first week's, in one seed: the mean over strengths."""
    return fmean(found.kept[f"{DECAYED}, {s:g}"][k] - found.kept[f"{FIRST}, {s:g}"][k] for s in strengths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--then", choices=THEN, default="drawings", help="what the second week is about")
    parser.add_argument("--epochs", type=int, default=6, help="of the eight tasks together")
    parser.add_argument("--alphabet", type=int, default=0, help="of scripts8, learned in the end")
    parser.add_argument("--new-epochs", type=int, default=4, help="of the letters")
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()
    if len(given.seeds) < 2:
        parser.error("an interval needs at least two seeds.")
    if given.alphabet in (THEN[given.then] or ()):
        parser.error(f"alphabet {given.alphabet} is known already.")
    torch.set_num_threads(1)
    print_tables([run(seed, given) for seed in given.seeds])


if __name__ == "__main__":
    main()
