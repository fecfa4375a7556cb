"""memsyn's `MASPlugin` beside Avalanche's own, in Avalanche's loop: accuracy and time on Split-Fashion-MNIST.

Runs in an environment of its own, since Avalanche needs torchvision: pip install '.[avalanche]' ./bench.
Five tasks of two classes, a head for each, 512 hidden units, 4,000 images and two epochs a task, Adam.
"""

import argparse
import json
import time
import warnings
from typing import Any

import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils.classification_dataset import (
    _make_taskaware_tensor_classification_dataset as as_dataset,
)
from avalanche.models import MultiTaskModule
from avalanche.training.plugins import MASPlugin as Theirs
from avalanche.training.supervised import Naive
from torch import Tensor, nn

from memsyn.integrations.avalanche import MASPlugin
from memsyn_bench.data.fashion import load_split_fashion

PLUGINS = {"none": None, "Avalanche": Theirs, "memsyn": MASPlugin}


class Heads(MultiTaskModule):  # type: ignore[misc]
    """One hidden layer, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(512, 2) for _ in range(5))

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """Run the head of a task."""
        output: Tensor = self.heads[task_label](self.body(x))
        return output

    def forward(self, x: Tensor, task_labels: Any) -> Tensor:
        """A batch is of one task."""
        return self.forward_single_task(x, task_labels if isinstance(task_labels, int) else int(task_labels[0]))


class Timed:
    """Adds up the seconds that a plugin spends after experiences."""

    def __init__(self, plugin: Any) -> None:
        self.seconds, run = 0.0, plugin.after_training_exp

        def timed(*given: Any, **named: Any) -> None:
            start = time.perf_counter()
            run(*given, **named)
            self.seconds += time.perf_counter() - start

        plugin.after_training_exp = timed


def accuracy_of(name: str, strength: float, seed: int, size: int) -> dict[str, float]:
    """Train on all tasks. Returns the mean accuracy over all tasks in the end, the forgetting, and seconds."""
    torch.manual_seed(seed)
    tasks = load_split_fashion(28)
    model = Heads()
    kind = PLUGINS[name]
    plugin = None if kind is None else kind(lambda_reg=strength, alpha=0.5)
    timed = None if plugin is None else Timed(plugin)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), 1e-3),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=size,
        train_epochs=2,
        plugins=[] if plugin is None else [plugin],
        evaluator=None,
    )
    data = [as_dataset(own.train_images[:4000], own.train_labels[:4000], task_labels=k) for k, own in enumerate(tasks)]
    learned, start = [], time.perf_counter()

    def right(k: int) -> float:
        with torch.no_grad():
            output = model.eval()(tasks[k].test_images, k)
        return float((output.argmax(1) == tasks[k].test_labels).float().mean())

    benchmark = with_classes_timeline(with_task_labels(benchmark_from_datasets(train=data)))
    for k, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        learned.append(right(k))
    end = [right(k) for k in range(5)]
    return {
        "accuracy": sum(end) / 5,
        "forgetting": sum(before - after for before, after in zip(learned[:-1], end[:-1], strict=True)) / 4,
        "learned": sum(learned) / 5,
        "seconds": time.perf_counter() - start,
        "measuring": 0.0 if timed is None else timed.seconds,
    }


def main() -> None:
    """Run one plugin at each strength, and print a line of JSON for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plugin", choices=list(PLUGINS))
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.1, 1.0, 10.0, 100.0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64])
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for size in options.sizes:
        for strength in options.strengths if options.plugin != "none" else [0.0]:
            for seed in range(options.seeds):
                found = accuracy_of(options.plugin, strength, seed, size)
                run = {"plugin": options.plugin, "lambda": strength, "batch": size, "seed": seed}
                print(json.dumps(run | found), flush=True)


if __name__ == "__main__":
    main()
