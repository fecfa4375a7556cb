"""The one training loop, and the methods: what each does around a task.

Owns what happens to a model while it learns one task. Must not know runs, folders or other tasks' data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from memsyn import Memory, Protection, measure, protect
from memsyn.bench.settings import Settings
from memsyn.bench.tasks import Task

MEASURE_BATCH = 64
"""Images in one pass of measuring or evaluating: it changes the speed and nothing else."""


@dataclass(frozen=True)
class Method:
    """What a method does before and after a task; the training loop is the same for all.

    Attributes:
        summary: one line for `memsyn bench list`.
        begin: (optimizer, model, memory, settings) -> the protection of this task's optimizer, if any.
        end: (model, task, index of the task, memory) -> what is remembered from here on.
    """

    summary: str
    begin: Callable[[Optimizer, nn.Module, Memory, Settings], Protection | None]
    end: Callable[[nn.Module, Task, int, Memory], Memory]


def _protect(optimizer: Optimizer, model: nn.Module, memory: Memory, settings: Settings) -> Protection | None:
    return protect(optimizer, model, memory, strength=settings.strength) if memory.importance else None


def _remember(model: nn.Module, task: Task, index: int, memory: Memory) -> Memory:
    """Add the importance over the task's training images, through its head, and move the anchor."""

    def through_head(model: nn.Module, images: Tensor) -> Tensor:
        logits: Tensor = model(images, index)
        return logits

    importance = measure(model, task.train_images.split(MEASURE_BATCH), forward=through_head, progress=False)
    return memory.consolidate(model, importance, rule="sum")


METHODS: dict[str, Method] = {
    "finetune": Method(
        summary="train on each task and protect nothing: how much is forgotten without help",
        begin=lambda optimizer, model, memory, settings: None,
        end=lambda model, task, index, memory: memory,
    ),
    "mas": Method(
        summary="Memory Aware Synapses (Aljundi et al. 2018): importances of all tasks so far are summed",
        begin=_protect,
        end=_remember,
    ),
}
"""What `--methods` takes."""


@dataclass(frozen=True)
class Training:
    """What came of training one task."""

    losses: list[float]
    """The cross-entropy of each step, without the penalty."""
    penalty: float
    """lambda sum Omega (theta - theta*)^2 after the last step."""


def train(
    model: nn.Module,
    task: Task,
    index: int,
    *,
    method: Method,
    memory: Memory,
    settings: Settings,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    generator: torch.Generator,
    after_epoch: Callable[[], object],
) -> Training:
    """Train `model` on one task through its head: cross-entropy, a fresh Adam, all parameters.

    The other heads get no gradient, so Adam leaves them alone. Batches and augmentation are drawn from `generator`.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    protection = method.begin(optimizer, model, memory, settings)
    losses = []
    model.train()
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(task.train_labels), generator=generator).split(settings.batch_size):
            images = augment(task.train_images[chosen], generator)
            loss = F.cross_entropy(model(images, index), task.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        after_epoch()
    return Training(losses, protection.value() if protection else 0.0)


@torch.inference_mode()
def accuracy(model: nn.Module, task: Task, index: int) -> float:
    """The share of the task's test images that its own head names rightly, in percent."""
    model.eval()
    batches = zip(task.test_images.split(MEASURE_BATCH), task.test_labels.split(MEASURE_BATCH), strict=True)
    num_right = sum(int((model(images, index).argmax(dim=1) == labels).sum()) for images, labels in batches)
    return 100 * num_right / len(task.test_labels)
