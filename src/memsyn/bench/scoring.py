"""How a network is asked about the tasks it has learned: with the task told, with one head for all, or not told.

Owns the three ways and their accuracies. Knows no training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from memsyn.bench.tasks import Task
from memsyn.errors import OptionError

BATCH = 64
"""Images in one forward pass: it changes the speed and nothing else."""

Answers = Callable[[nn.Module, Tensor, int, Sequence[Task]], Tensor]
"""(model, images of task j, j, tasks so far) -> logits in which the label is the right one."""


def _of_own_head(model: nn.Module, images: Tensor, index: int, tasks: Sequence[Task]) -> Tensor:
    logits: Tensor = model(images, index)
    return logits


def _of_shared_head(model: nn.Module, images: Tensor, index: int, tasks: Sequence[Task]) -> Tensor:
    logits: Tensor = model(images)
    return logits


def _of_all_heads(model: nn.Module, images: Tensor, index: int, tasks: Sequence[Task]) -> Tensor:
    num_classes = sum(len(task.class_names) for task in tasks)
    before = sum(len(task.class_names) for task in tasks[:index])
    # Rolled, so that the task's own classes come first and its labels stay as they are.
    return model(images)[:, :num_classes].roll(-before, dims=1)  # type: ignore[no-any-return]


SCORINGS: dict[str, Answers] = {
    "multi-head": _of_own_head,
    "domain-incremental": _of_shared_head,
    "class-incremental": _of_all_heads,
}
"""By name: the task is told; all tasks have the same classes and one head; the class is to be found among those of all
tasks so far, the task not told (van de Ven and Tolias 2019)."""


@torch.inference_mode()
def accuracies(model: nn.Module, tasks: Sequence[Task], kind: str) -> list[float]:
    """Return, for each of the tasks learned so far, the share of its test images named rightly, in percent.

    `model(images, j)` gives the logits of task j, (N, its classes); `model(images)` those of the one head, or of all
    heads side by side. The model is left in eval mode.

    Raises:
        OptionError: an unknown kind, or one that the model has not the heads for.
    """
    if kind not in SCORINGS:
        raise OptionError(f"scoring must be one of {', '.join(SCORINGS)}; got {kind!r}.")
    model.eval()
    return [_accuracy(model, tasks, index, kind) for index in range(len(tasks))]


def _accuracy(model: nn.Module, tasks: Sequence[Task], index: int, kind: str) -> float:
    task, num_right = tasks[index], 0
    asked = tasks if kind == "class-incremental" else [task]
    num_classes = sum(len(task.class_names) for task in asked)
    for images, labels in zip(task.test_images.split(BATCH), task.test_labels.split(BATCH), strict=True):
        logits = SCORINGS[kind](model, images, index, tasks)
        if logits.shape[1] != num_classes:
            raise OptionError(
                f"{kind} scoring of task {task.name} needs {num_classes} outputs, and the model gives "
                f"{logits.shape[1]}. Score it as one of {', '.join(other for other in SCORINGS if other != kind)}."
            )
        num_right += int((logits.argmax(dim=1) == labels).sum())
    return 100 * num_right / len(task.test_labels)
