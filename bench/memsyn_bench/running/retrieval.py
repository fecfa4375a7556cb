"""Texts as queries over images: how well an embedding finds the images of a fact, by mean average precision.

Owns the scores of sequences whose tasks have class vectors. Knows no training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsyn import OptionError
from memsyn_bench.task import Task

EVALUATION_BATCH = 64
"""Images in one forward pass: it changes the speed and nothing else."""


def average_precision(scores: Tensor, relevant: Tensor) -> float:
    """Return 1/R sum over the R relevant images of the precision at their rank, images ranked by falling score.

    scores (N,), relevant (N,) bool with at least one true. Ties and NaN count against: an irrelevant image stands
    before the relevant ones of the same score. So the k-th best relevant image, of score s, is at rank
    k + number of irrelevant images of score >= s.
    """
    found = scores[relevant].sort(descending=True).values
    others = (~(scores[~relevant] < found.unsqueeze(1))).sum(1)
    k = torch.arange(1, len(found) + 1)
    return float((k / (k + others)).to(torch.float64).mean())


def mean_average_precision(
    embeddings: Tensor, labels: Tensor, vectors: Tensor, *, counts: Tensor | None = None
) -> float:
    """Return the mean over the texts of their average precision among the images, in percent.

    embeddings (N, D), labels (N,), vectors (C, D). Text c ranks all images by cosine similarity; relevant are those
    of label c. A text without images does not count; of the others, those count that have an image of `counts`, (N,)
    bool, all if it is None.

    Raises:
        OptionError: no text counts.
    """
    similarities = F.normalize(vectors) @ F.normalize(embeddings).T
    asked = (labels if counts is None else labels[counts]).unique().tolist()
    if not asked:
        raise OptionError(
            "there is no image to find: a task needs images to test on, and to choose a strength several of a fact to "
            "train on. Add some."
        )
    return 100 * sum(average_precision(similarities[c], labels == c) for c in asked) / len(asked)


def retrieval(model: nn.Module, tasks: Sequence[Task]) -> tuple[float, ...]:
    """For each task so far: its texts among its own test images, mean average precision in percent.

    The model is left in eval mode.

    Raises:
        OptionError: a task has no class vectors, or the model's outputs are not as long as these.
    """
    parts = [_embedded(model, task) for task in tasks]
    return tuple(mean_average_precision(*part) for part in parts)


def retrieval_of_classes(model: nn.Module, tasks: Sequence[Task], *, in_use: bool) -> tuple[float, ...]:
    """The same for the texts of the classes in use only, or of the other classes, among all images of the task."""
    return tuple(
        mean_average_precision(*_embedded(model, task), counts=task.uses(task.test_labels) == in_use) for task in tasks
    )


def retrieval_over_all(model: nn.Module, tasks: Sequence[Task]) -> tuple[float, ...]:
    """One number: the texts of all tasks so far among the test images of all of them, as in `retrieval`."""
    embeddings, labels, vectors = zip(*(_embedded(model, task) for task in tasks), strict=True)
    before = torch.tensor([0, *(len(part) for part in vectors[:-1])]).cumsum(0).tolist()
    shifted = [own + first for own, first in zip(labels, before, strict=True)]
    return (mean_average_precision(torch.cat(embeddings), torch.cat(shifted), torch.cat(vectors)),)


@torch.inference_mode()
def _embedded(model: nn.Module, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings of the task's test images, their labels, and its texts' vectors."""
    if task.class_vectors is None:
        raise OptionError(f"task {task.name} has no class vectors to retrieve by. Score it as multi-head.")
    model.eval()
    embeddings = torch.cat([model(images) for images in task.test_images.split(EVALUATION_BATCH)])
    if embeddings.shape[1] != task.class_vectors.shape[1]:
        raise OptionError(
            f"retrieval in task {task.name} needs {task.class_vectors.shape[1]} outputs, and the model gives "
            f"{embeddings.shape[1]}. Use a network whose head gives an embedding."
        )
    return embeddings, task.test_labels, task.class_vectors
