"""Methods that store data: rehearsal from a small buffer, and joint training, which is rehearsal of everything.

Owns the buffers, and how images are drawn from them.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from memsyn_bench.data.strata import evenly
from memsyn_bench.methods.method import Method, TaskTraining

PER_TASK = 40
"""Images that rehearsal stores of each task, as evenly over its classes as can be."""


@final
class Rehearsal(Method):
    """Beside each batch of the new task, the same loss on images of the old ones, which go through their own heads.

    From a buffer of `per_task` images a task: one batch over all old tasks a step, L = L_new + mean of its losses. With
    None everything is stored: one batch for each old task, and L = L_new + (number of old tasks) (mean of the losses),
    which is joint training; it takes as many steps as every other method, but each step sees more images.

    Images are drawn from the method's own generator, uniformly, each at most once a step, and augmented.
    """

    def __init__(self, per_task: int | None = PER_TASK) -> None:
        super().__init__()
        self._per_task = per_task

    def before_step(self, training: TaskTraining, images: Tensor) -> None:
        """Add the gradients of the old tasks' loss."""
        if self.kept:
            self._loss(training).backward()

    def _loss(self, training: TaskTraining) -> Tensor:
        """The mean loss of what is drawn, times the number of old tasks in joint training."""
        stored = [len(group["labels"]) for group in self.kept.values()]
        factor = len(stored) if self._per_task is None else 1
        num = factor * training.settings.batch_size
        chosen = torch.randperm(sum(stored), generator=training.method_generator)[:num]
        task_of = torch.arange(len(stored)).repeat_interleave(torch.tensor(stored))[chosen]
        first = torch.tensor(stored).cumsum(0) - torch.tensor(stored)
        losses = []
        for task, group in enumerate(self.kept.values()):
            own = chosen[task_of == task] - first[task]
            if len(own):
                seen = training.augment(group["images"][own], training.method_generator)
                outputs = training.model(seen, task)
                losses.append(training.loss(outputs, group["labels"][own], group.get("vectors")).sum())
        return factor * torch.stack(losses).sum() / len(chosen)

    def end(self, training: TaskTraining) -> None:
        """Store images of the task."""
        super().end(training)
        task = training.task
        num = len(task.train_labels) if self._per_task is None else self._per_task
        chosen = evenly(task.train_labels, num, training.method_generator)
        stored = {"images": task.train_images[chosen], "labels": task.train_labels[chosen]}
        if task.class_vectors is not None:
            stored["vectors"] = task.class_vectors
        self.kept = {**self.kept, f"task{training.index}": stored}
