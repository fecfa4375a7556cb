"""Sequences of tasks that the benchmarks of protection learn, and how.

    split-fashion      Fashion-MNIST in five tasks of two classes, a head each, an MLP 784-256-256, one epoch a task
    permuted-fashion   ten tasks, each of 20,000 images of Fashion-MNIST with the pixels in another order; one head
    emoji8             the eight tasks of `memsyn-bench run emoji8`, with 5 epochs a task

Fashion-MNIST is read from the folder of Debian's package dataset-fashion-mnist.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from tqdm import tqdm

import memsyn
from memsyn_bench.data.drawings import augment, load_emoji8
from memsyn_bench.data.fashion import load_permuted_fashion, load_split_fashion
from memsyn_bench.sequences.networks import MultiHead
from memsyn_bench.sequences.sequences import pretrained_network
from memsyn_bench.task import Task


@dataclass(frozen=True)
class Part:
    """One task."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    head: int


@dataclass(frozen=True)
class Problem:
    """Tasks, and how they are learned."""

    parts: Sequence[Part]
    build: Callable[[torch.Generator], nn.Module]
    epochs: int
    batch_size: int
    learning_rates: dict[str, float]
    augment: Callable[[Tensor, torch.Generator], Tensor]

    def optimizer(self, name: str, parameters: Any, factor: float = 1.0) -> Optimizer:
        """SGD with momentum, Adam or AdamW at this problem's learning rate, times a factor."""
        lr = factor * self.learning_rates[name]
        makers: dict[str, Callable[..., Optimizer]] = {"sgd": partial(SGD, momentum=0.9), "adam": Adam, "adamw": AdamW}
        return makers[name](parameters, lr=lr)


@dataclass
class Course:
    """What came of learning the tasks one after the other."""

    accuracy: list[list[float]] = field(default_factory=list)
    """After each task, of each task so far."""
    reports: list[memsyn.Report | None] = field(default_factory=list)
    """At the end of each task, of its protection."""
    strengths: list[float] = field(default_factory=list)
    """Lambda in each task."""


class Scaled(nn.Module):
    """A network whose outputs are multiplied by a constant."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, images: Tensor, head: int) -> Tensor:
        logits: Tensor = self.factor * self.network(images, head)
        return logits


def perceptron(head_sizes: list[int], generator: torch.Generator) -> nn.Module:
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    backbone = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    return MultiHead(backbone, 256, head_sizes=head_sizes)


def parts_of(tasks: Sequence[Task], *, one_head: bool = False) -> list[Part]:
    return [
        Part(task.train_images, task.train_labels, task.test_images, task.test_labels, 0 if one_head else head)
        for head, task in enumerate(tasks)
    ]


def split_fashion() -> Problem:
    rates = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3}
    parts = parts_of(load_split_fashion(28))
    return Problem(parts, partial(perceptron, [2] * 5), 1, 64, rates, lambda batch, generator: batch)


def permuted_fashion() -> Problem:
    rates = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3}
    parts = parts_of(load_permuted_fashion(28), one_head=True)
    return Problem(parts, partial(perceptron, [10]), 1, 64, rates, lambda batch, generator: batch)


def emoji8() -> Problem:
    tasks = load_emoji8(32)
    rates = {"sgd": 0.03, "adam": 3e-3, "adamw": 3e-3}
    return Problem(parts_of(tasks), partial(pretrained_network, tasks), 5, 16, rates, augment)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "split-fashion": split_fashion,
    "permuted-fashion": permuted_fashion,
    "emoji8": emoji8,
}


def lines_of(out: Path, keys: Sequence[dict[str, Any]], run: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """For each key its line in the file `out`, where there is none yet the result of `run(**key)`, which goes there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    def line_of(key: dict[str, Any]) -> dict[str, Any] | None:
        return next((line for line in lines if key.items() <= line.items()), None)

    for key in tqdm([key for key in keys if line_of(key) is None], unit="run"):
        lines.append(key | run(**key))
        with out.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
    return [line for key in keys if (line := line_of(key)) is not None]


Guard = Callable[[Optimizer, nn.Module, memsyn.Memory], memsyn.Protection]


def through_head(index: int, model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images, index)
    return logits


def learn(
    problem: Problem,
    optimizer_name: str,
    protect: Guard | None,
    seed: int,
    *,
    lr_factor: float = 1.0,
    logit_factor: float = 1.0,
    max_samples: int = 2000,
) -> Course:
    """All tasks in turn, importances summed between them; ends early if a weight is not finite."""
    generator = torch.Generator().manual_seed(seed)
    model = Scaled(problem.build(generator), logit_factor)
    memory, course = memsyn.Memory.empty(), Course()
    for index, part in enumerate(problem.parts):
        optimizer = problem.optimizer(optimizer_name, model.parameters(), lr_factor)
        handle = protect(optimizer, model, memory) if protect and memory.importance else None
        for _ in range(problem.epochs):
            for chosen in torch.randperm(len(part.labels), generator=generator).split(problem.batch_size):
                optimizer.zero_grad()
                logits = model(problem.augment(part.images[chosen], generator), part.head)
                F.cross_entropy(logits, part.labels[chosen]).backward()
                optimizer.step()
        course.reports.append(handle.report() if handle else None)
        course.strengths.append(handle.strength if handle else 0.0)
        with torch.inference_mode():
            course.accuracy.append(
                [
                    float((model(own.test_images, own.head).argmax(1) == own.test_labels).float().mean())
                    for own in problem.parts[: index + 1]
                ]
            )
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            break
        if protect:
            importance = memsyn.measure(
                model,
                part.images.split(200),
                forward=partial(through_head, part.head),
                max_samples=max_samples,
                progress=False,
            )
            memory = memory.consolidate(model, importance)
    return course
