"""A task: its training and test images, and how the training images are split again to choose a strength.

Owns no data. Knows nothing of networks or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memsyn import OptionError

HELD_OUT = 5
"""If no family can be held out, one training image in so many is for validation."""


@dataclass(frozen=True)
class Task:
    """One task: its images, (N, ...), and their labels, int64 (N,), places in `class_names`.

    Drawings and letters are (N, channels, size, size) float32 with white at 0 and black at 2. Training and test images
    show the same classes. Where there are families (studios, fonts), they come from different families.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    train_families: Tensor | None = None
    """The family of each training image, int64 (N,); None if it is not known."""
    class_vectors: Tensor | None = None
    """The classes as points of an embedding space, float32 (classes, D); None if the task has none."""
    classes_in_use: tuple[int, ...] | None = None
    """The labels that the network meets in use; None: all."""

    def uses(self, labels: Tensor) -> Tensor:
        """Whether each label is of a class in use, bool."""
        if self.classes_in_use is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return torch.isin(labels, torch.tensor(self.classes_in_use))


def check_labels(task: Task) -> None:
    """Refuse a task whose labels do not fit its images and classes.

    Raises:
        OptionError: says which and how.
    """
    for split, images, labels in (
        ("train", task.train_images, task.train_labels),
        ("test", task.test_images, task.test_labels),
    ):
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise OptionError(
                f"task {task.name}: {split}_labels must be int64 ({len(images)},), one for each image; got "
                f"{labels.dtype} {tuple(labels.shape)}."
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(task.class_names):
            raise OptionError(
                f"task {task.name}: {split}_labels must be from 0 to {len(task.class_names) - 1}, places in "
                f"class_names; got {labels.min()} to {labels.max()}."
            )


def deal_out(names: Sequence[str]) -> list[list[str]]:
    """Four tasks' shares of the names, at random by a fixed seed: part of the sequence, the same for every run."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    return [[names[place] for place in part.tolist()] for part in order.tensor_split(4)]


def validation_split(task: Task, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split the training images in two: the places, sorted, of those to train on and of those to validate on.

    Tests show families that training has not seen, and so does validation: one family is held out. It is drawn by
    `seed` from the families that have every class and at most half of the images, and whose removal leaves every class.
    If there is none, a fifth of each class (rounded up, never all of it) is drawn by `seed`. No test image is used.
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
