"""The one training loop.

Owns what happens to a model while it learns one task; what a method adds is in `methods`. Must not know runs, folders
or other tasks' data.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from memsyn_bench.losses import Loss, cross_entropy
from memsyn_bench.methods.method import Augment, Method, TaskTraining, frozen
from memsyn_bench.optimizers import OPTIMIZERS
from memsyn_bench.sequences.networks import Network
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task

OWN_STAGE = 500
"""Added to a task's stage for the random numbers of the method, so that batches do not depend on the method."""


def generator(seed: int, stage: int) -> torch.Generator:
    """The random numbers of one stage of one seed: 0 the heads, t + 1 task t; no stage depends on the one before."""
    return torch.Generator().manual_seed(1000 * seed + stage)


def task_training(
    model: Network,
    task: Task,
    index: int,
    *,
    settings: Settings,
    augment: Augment,
    seed: int,
    loss: Loss = cross_entropy,
) -> TaskTraining:
    """A task about to be learned, with a fresh optimizer over all parameters and the random numbers of (seed, task)."""
    return TaskTraining(
        model=model,
        task=task,
        index=index,
        optimizer=OPTIMIZERS[settings.optimizer].make(model.parameters(), settings.lr),
        settings=settings,
        augment=augment,
        loss=loss,
        generator=generator(seed, index + 1),
        method_generator=generator(seed, OWN_STAGE + index + 1),
    )


@dataclass(frozen=True)
class TrainingResult:
    """The result of training one task."""

    losses: list[float]
    """The task's loss in each step, without what the method adds."""
    penalty: float
    """lambda sum Omega (theta - theta*)^2 after the last step."""
    num_bytes: int
    """Bytes that the method holds after the last step, beside the model and its optimizer."""


def train(training: TaskTraining, method: Method, after_epoch: Callable[[], object]) -> TrainingResult:
    """Train on one task through its head: its mean loss, and what the method adds. The caller calls `method.end`.

    The other heads get no gradient of the task's loss, so the optimizer leaves them alone. Batches and augmentation
    come from `training.generator`. In the first `warmup` epochs the backbone is frozen.
    """
    model, task, settings, optimizer = training.model, training.task, training.settings, training.optimizer
    method.begin(training)
    losses = []
    model.train()
    for epoch in range(settings.epochs):
        with frozen(model.body) if epoch < settings.warmup else nullcontext():
            order = torch.randperm(len(task.train_labels), generator=training.generator)
            for chosen in order.split(settings.batch_size):
                images = training.augment(task.train_images[chosen], training.generator)
                outputs = method.loss_outputs(training, model(images, training.index))
                loss = training.loss(outputs, task.train_labels[chosen], task.class_vectors).mean()
                optimizer.zero_grad()
                loss.backward()
                method.before_step(training, images)
                optimizer.step()
                method.after_step(training)
                losses.append(loss.item())
        after_epoch()
    return TrainingResult(losses, method.penalty(), method.num_bytes())
