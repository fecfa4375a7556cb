"""What Kronecker factors cost: measuring them over an ordinary pass, and a projected training step over the bare one.

In one run and in turn: the ordinary forward and backward pass of the same batches, `measure` with the estimators
`inputs` and `kronecker`, and `mas` beside them; then a training step without protection, and with the projected form
for each rank and number of steps between two projections; then a report of such a handle. Prints Markdown tables: the
median of the ratios over the rounds, the smallest and the largest, and how many numbers a memory keeps for each weight.

Processor time is measured, not time: what else the machine does then counts little. Run it with OMP_NUM_THREADS=1,
since threads that wait for one another spend processor time.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

import memsyn
from models import SUBJECTS

ESTIMATORS = ("inputs", "kronecker", "mas")
NUM_STEPS = 20
STEPS = {"mlp": 64, "vit-tiny": 32}
"""Subject -> the batch size of a training step."""


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def ratios(found: dict[str, list[float]], base: str) -> dict[str, str]:
    """Median, smallest and largest ratio to the base of the same round."""
    words = {}
    for name, own in found.items():
        each = [one / other for one, other in zip(own, found[base], strict=True)]
        words[name] = f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"
    return words


def ordinary_pass(model: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        model.zero_grad()
        model(batch).square().sum().backward()


def measuring(names: list[str], rounds: int, num_batches: int) -> None:
    print("| model | inputs | both | importance |\n|---|---|---|---|")
    for name in names:
        subject = SUBJECTS[name]
        model = subject.model().eval()
        batches = [subject.batch() for _ in range(num_batches)]
        actions: dict[str, Callable[[], object]] = {"ordinary": partial(ordinary_pass, model, batches)}
        for estimator in ESTIMATORS:
            actions[estimator] = partial(memsyn.measure, model, batches, estimator=estimator, progress=False)
        found = rounds_of(actions, rounds, f"measuring {name}")
        words = ratios(found, "ordinary")
        print(f"| {subject.title} | {' | '.join(words[e] for e in ESTIMATORS)} |")


def rounds_of(actions: Mapping[str, Callable[[], object]], rounds: int, title: str) -> dict[str, list[float]]:
    for action in actions.values():
        action()
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in tqdm(range(rounds), title, leave=False):
        for name, action in actions.items():
            found[name].append(seconds(action))
    return found


def stepping(names: list[str], rounds: int, ranks: list[int | None], everies: list[int]) -> None:
    print("\n| model, batch | rank | " + " | ".join(f"every {k}" for k in everies) + " | numbers a weight |")
    print("|---|---|" + "---|" * len(everies) + "---|")
    for name in names:
        subject = SUBJECTS[name]
        size = STEPS.get(name, 32)
        model = subject.model()
        batch = subject.batch()
        batch = torch.cat([batch] * -(-size // len(batch)))[:size]
        factors = memsyn.measure(model, [subject.batch() for _ in range(4)], estimator="kronecker", progress=False)
        for rank in ranks:
            memory = memsyn.Memory.empty().consolidate(model, factors, rank=rank)
            assert memory.directions is not None
            actions = {"bare": training(deepcopy(model), batch, None, 1)}
            for every in everies:
                actions[str(every)] = training(deepcopy(model), batch, memory, every)
            words = ratios(rounds_of(actions, rounds, f"steps of {name}"), "bare")
            kept = memory.directions.num_numbers() / sum(p.numel() for p in model.parameters())
            cells = " | ".join(words[str(every)] for every in everies)
            print(f"| {subject.title}, {size} | {rank or 'all'} | {cells} | {kept:.2f} |")


def reporting(names: list[str], rounds: int) -> None:
    print("\n| a report, model, batch | bare step, ms | report, ms | over the step | before a projection, ms |")
    print("|---|---|---|---|---|")
    for name in names:
        subject = SUBJECTS[name]
        model, twin = subject.model(), subject.model()
        batch = torch.cat([subject.batch()] * 2)[: STEPS[name]]
        factors = memsyn.measure(model, [subject.batch() for _ in range(2)], estimator="kronecker", progress=False)
        memory = memsyn.Memory.empty().consolidate(model, factors)
        actions: dict[str, Callable[[], object]] = {"bare": training(twin, batch, None, 1, 1)}
        for word, every in (("report", 1), ("waiting", 10**6)):
            own = deepcopy(model)
            optimizer = Adam(own.parameters(), lr=1e-4)
            handle = memsyn.protect(optimizer, own, memory, every=every)
            own(batch).square().mean().backward()
            optimizer.step()
            actions[word] = handle.report
        found = rounds_of(actions, rounds, f"reports of {name}")
        ms = {word: f"{1000 * statistics.median(own):.1f}" for word, own in found.items()}
        print(
            f"| {subject.title.rpartition(',')[0]}, {STEPS[name]} | {ms['bare']} | {ms['report']} | "
            f"{ratios(found, 'bare')['report']} | {ms['waiting']} |"
        )


def training(
    model: nn.Module, batch: Tensor, memory: memsyn.Memory | None, every: int, num: int = NUM_STEPS
) -> Callable[[], None]:
    """Some steps of Adam, twice as many as wait for a projection by default."""
    optimizer = Adam(model.parameters(), lr=1e-4)
    if memory is not None:
        memsyn.protect(optimizer, model, memory, every=every)

    def steps() -> None:
        for _ in range(num):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["mlp", "vit-tiny", "resnet18", "efficientnet", "lstm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--every", type=int, nargs="*", default=[1, 10, 100])
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 0], help="0: all")
    parser.add_argument("--only", choices=("measuring", "stepping", "reporting"))
    given = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    if given.only in (None, "measuring"):
        measuring(given.names, given.rounds, given.batches)
    names = [name for name in given.names if name in STEPS]
    if given.only in (None, "stepping"):
        stepping(names, given.rounds, [rank or None for rank in given.ranks], given.every)
    if given.only in (None, "reporting"):
        reporting(names, given.rounds)


if __name__ == "__main__":
    main()
