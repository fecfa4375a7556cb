"""How far two measurements of importance and directions differ: the reasons for the limits of `memsyn diff`.

For each sequence a network learns the first task, and is measured twice: on other samples of the same data, on half of
the classes, after one more epoch, and after it learned the next task. Prints the rank correlation, the share of
importance that moved, and the overlap of directions of each pair.
"""

import argparse
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsyn
from memsyn.values.comparison import diff
from memsyn_bench.sequences.sequences import find_sequence
from memsyn_bench.task import Task

SEQUENCES = ("scripts5", "split-fashion", "words5", "emoji8-scratch")
MOST = 500
"""The most samples of a measurement."""

Measured = tuple[memsyn.Importance, memsyn.KroneckerFactors]


class OneHead(nn.Module):
    """A network's logits for one of its tasks."""

    def __init__(self, network: nn.Module, task: int) -> None:
        super().__init__()
        self.network, self.task = network, task

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.network(x, self.task)
        return logits


def learn(network: nn.Module, task: Task, index: int, epochs: int, generator: torch.Generator) -> None:
    """Train on one task by Adam."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(task.train_images), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(task.train_images[rows], index), task.train_labels[rows]).backward()
            optimizer.step()
    network.eval()


def measured(network: nn.Module, x: Tensor, task: int) -> Measured:
    """The importance and the factors of a network on a task's images."""
    model, batches = OneHead(network, task), list(x.split(64))
    importance = memsyn.measure(model, batches, progress=False)
    factors = memsyn.measure(model, batches, estimator="kronecker", progress=False)
    return importance, factors


def pairs(name: str, seed: int) -> Iterator[tuple[str, Measured, Measured]]:
    """What was changed, and the measurements before and after."""
    sequence, generator = find_sequence(name), torch.Generator().manual_seed(seed)
    tasks = sequence.load(sequence.sizes[0])[:3]
    network = sequence.build(tasks, generator)
    first = tasks[0]
    learn(network, first, 0, 5, generator)
    order = torch.randperm(len(first.train_images), generator=torch.Generator().manual_seed(1))
    x, y = first.train_images[order], first.train_labels[order]
    for count in (50, 100, 200, 500):
        if 2 * count <= len(x):
            one, other = (measured(network, part, 0) for part in (x[:count], x[count : 2 * count]))
            yield f"{count} other samples", one, other
    count = min(MOST, len(x) // 2)
    start = measured(network, x[:count], 0)
    yield "test images", start, measured(network, first.test_images[:count], 0)
    yield "half of the classes", start, measured(network, x[y < len(first.class_names) // 2][:count], 0)
    learn(network, first, 0, 1, generator)
    yield "one more epoch", start, measured(network, x[:count], 0)
    learn(network, tasks[1], 1, 5, generator)
    yield "after the next task", start, measured(network, x[:count], 0)
    yield "the next task", start, measured(network, tasks[1].train_images[:count], 1)


def main() -> None:
    """Print a line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", nargs="+", default=SEQUENCES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore", memsyn.SlowParametersWarning)
    for name in options.sequences:
        for what, one, other in pairs(name, options.seed):
            found, directions = diff(one[0], other[0]), diff(one[1], other[1])
            numbers = f"{found.rank_correlation or 0:.3f} {found.shifted or 0:.3f} {directions.overlap or 0:.3f}"
            print(f"{name} {what}: {numbers} {found.extent} {directions.extent}", flush=True)


if __name__ == "__main__":
    main()
