"""How a network is scored on the tasks it has learned: with the task given, with one head for all, or without the task.

Owns the scorings by name, and their accuracies. Knows no training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from memsyn import OptionError
from memsyn_bench.running.retrieval import EVALUATION_BATCH, retrieval, retrieval_of_classes, retrieval_over_all
from memsyn_bench.task import Task

Answers = Callable[[nn.Module, Tensor, int, Sequence[Task]], Tensor]
"""(model, images of task j, j, tasks so far) -> logits; the right class is at the label's place."""


def _of_own_head(model: nn.Module, images: Tensor, index: int, tasks: Sequence[Task]) -> Tensor:
    logits: Tensor = model(images, index)
    return logits


def _of_own_classes(model: nn.Module, images: Tensor, index: int, tasks: Sequence[Task]) -> Tensor:
    return model(images, index)[:, : len(tasks[index].class_names)]  # type: ignore[no-any-return]


def _of_shared_head(model: nn.Module, images: Tensor, index: int, tasks: Sequence[Task]) -> Tensor:
    logits: Tensor = model(images)
    return logits


def _of_all_heads(model: nn.Module, images: Tensor, index: int, tasks: Sequence[Task]) -> Tensor:
    num_classes = sum(len(task.class_names) for task in tasks)
    before = sum(len(task.class_names) for task in tasks[:index])
    # Rolled, so that the task's own classes come first and its labels stay as they are.
    return model(images)[:, :num_classes].roll(-before, dims=1)  # type: ignore[no-any-return]


@torch.inference_mode()
def score(model: nn.Module, tasks: Sequence[Task], kind: str) -> tuple[float, ...]:
    """Score the tasks learned so far by the scoring of that name, in percent.

    `model(images, j)` gives the logits of task j, (N, its classes); `model(images)` the logits of the one head, or of
    all heads side by side. The model is left in eval mode.

    Raises:
        OptionError: an unknown kind, or the model does not have the heads for it.
    """
    if kind not in SCORINGS:
        raise OptionError(f"scoring must be one of {', '.join(SCORINGS)}; got {kind!r}.")
    model.eval()
    return SCORINGS[kind](model, tasks)


def _accuracies(
    answers: Answers, model: nn.Module, tasks: Sequence[Task], *, joined: bool = False
) -> tuple[float, ...]:
    """For each task the share of its test images classified correctly; `joined`: among the classes of all tasks."""
    return tuple(
        100 * float(_named_rightly(answers, model, tasks, index, joined=joined).double().mean())
        for index in range(len(tasks))
    )


def _of_classes(model: nn.Module, tasks: Sequence[Task], *, in_use: bool) -> tuple[float, ...]:
    """The same with the task given, for the images of the classes in use only, or of the others."""
    values = []
    for index, task in enumerate(tasks):
        right = _named_rightly(_of_own_head, model, tasks, index, joined=False)
        values.append(100 * float(right[task.uses(task.test_labels) == in_use].double().mean()))
    return tuple(values)


def _named_rightly(answers: Answers, model: nn.Module, tasks: Sequence[Task], index: int, *, joined: bool) -> Tensor:
    """For each test image of a task whether it is classified correctly, (N,) bool."""
    task, right = tasks[index], []
    num_classes = sum(len(task.class_names) for task in (tasks if joined else [task]))
    for images, labels in zip(
        task.test_images.split(EVALUATION_BATCH), task.test_labels.split(EVALUATION_BATCH), strict=True
    ):
        logits = answers(model, images, index, tasks)
        if logits.shape[1] != num_classes:
            raise OptionError(
                f"this scoring of task {task.name} needs {num_classes} outputs, and the model gives "
                f"{logits.shape[1]}. Choose one of {', '.join(SCORINGS)} that fits its heads."
            )
        right.append(logits.argmax(dim=1) == labels)
    return torch.cat(right)


SCORINGS: dict[str, Callable[[nn.Module, Sequence[Task]], tuple[float, ...]]] = {
    "multi-head": partial(_accuracies, _of_own_head),
    "domain-incremental": partial(_accuracies, _of_shared_head),
    "task-given": partial(_accuracies, _of_own_classes),
    "class-incremental": partial(_accuracies, _of_all_heads, joined=True),
    "in-use": partial(_of_classes, in_use=True),
    "other-classes": partial(_of_classes, in_use=False),
    "retrieval": retrieval,
    "retrieval-over-all": retrieval_over_all,
    "retrieval-in-use": partial(retrieval_of_classes, in_use=True),
    "retrieval-other-classes": partial(retrieval_of_classes, in_use=False),
}
"""By name, (model, tasks so far) -> percents, one for each task (retrieval-over-all: one for all).

multi-head: the task is given. domain-incremental: all tasks have the same classes and one head. task-given: the classes
of all tasks have one head, and the class is one of the given task's. class-incremental: the task is not given, and the
class is one of those of all tasks so far (van de Ven and Tolias 2019). in-use: the task is given, and only images of
classes in use count; other-classes: only the others. `memsyn_bench.running.retrieval` has those of embeddings."""
