"""A task: what is learned and what is tested, and how its training part is split once more to choose a strength.

Owns no data. Knows nothing of networks or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

HELD_OUT = 5
"""One training image in so many is for validation where no family can be held out."""


@dataclass(frozen=True)
class Task:
    """One task: its images, (N, ...), and int64 labels (N,).

    Drawings and letters are (N, channels, size, size) float32 with white at 0 and black at 2. Where there are families
    (studios, fonts), training and test images show the same classes and come from different ones.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    train_families: Tensor | None = None
    """Whose each training image is, int64 (N,); None where that is not known."""
    class_vectors: Tensor | None = None
    """Where the classes lie in an embedding space, float32 (classes, D); None where there is none."""
    classes_in_use: tuple[int, ...] | None = None
    """The labels that the network meets in use, where that is not all of them."""

    def uses(self, labels: Tensor) -> Tensor:
        """Whether each label is of a class in use, bool."""
        if self.classes_in_use is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return torch.isin(labels, torch.tensor(self.classes_in_use))


def deal_out(names: Sequence[str]) -> list[list[str]]:
    """Four tasks' shares of the names, at random by a fixed seed: part of the sequence, the same for every run."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    return [[names[place] for place in part.tolist()] for part in order.tensor_split(4)]


def validation_split(task: Task, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split the training images in two: the places, sorted, of those to train on and of those to validate on.

    As the test is on a family never seen, so is the validation, where there is a family that has every class and at
    most half of the images, and without which every class is left: one of these, drawn by `seed`. Else a fifth of each
    class (rounded up, never all of it) is drawn by `seed`. No test image is looked at.
    """
    generator = torch.Generator().manual_seed(seed)
    families = _families_to_hold_out(task)
    if families:
        assert task.train_families is not None
        family = families[int(torch.randint(len(families), (), generator=generator))]
        held = task.train_families == family
    else:
        held = torch.zeros(len(task.train_labels), dtype=torch.bool)
        for label in task.train_labels.unique():
            places = (task.train_labels == label).nonzero().flatten()
            num = min(-(-len(places) // HELD_OUT), len(places) - 1)
            held[places[torch.randperm(len(places), generator=generator)[:num]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _families_to_hold_out(task: Task) -> list[int]:
    if task.train_families is None:
        return []
    num_classes = len(task.train_labels.unique())

    def fits(held: Tensor) -> bool:
        whole = all(len(task.train_labels[part].unique()) == num_classes for part in (held, ~held))
        return whole and 2 * int(held.sum()) <= len(held)

    return [int(family) for family in task.train_families.unique() if fits(task.train_families == family)]


def for_validation(task: Task, seed: int = 0) -> Task:
    """The task as a strength is chosen on: trained on one part of its training images, tested on the other."""
    train, validation = validation_split(task, seed)
    return replace(
        task,
        train_images=task.train_images[train],
        train_labels=task.train_labels[train],
        test_images=task.train_images[validation],
        test_labels=task.train_labels[validation],
        train_families=None if task.train_families is None else task.train_families[train],
    )
