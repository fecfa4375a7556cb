"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017) in sequences of tasks: split, and with permuted pixels.

Owns the tasks, and where Debian's package dataset-fashion-mnist keeps the four files. Knows no networks or training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from memsyn_bench.data.mnist import IdxImages, in_pairs, read_idx_images
from memsyn_bench.task import Task

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    ("T-shirt/top", "Trouser"),
    ("Pullover", "Dress"),
    ("Coat", "Sandal"),
    ("Shirt", "Sneaker"),
    ("Bag", "Ankle boot"),
)
NUM_PERMUTED = 20_000
"""Training images of each permuted task, the first ones."""
NUM_LONG, LONG_TRAIN, LONG_TEST = 30, 6_000, 2_000
"""The tasks of the long permuted sequence, and the images of each to train and to test on, the first ones."""


def load_split_fashion(size: int, folder: Path = FASHION_FOLDER) -> list[Task]:
    """Return five tasks of two classes, 12,000 training and 2,000 test images (N, 784) each; `size` is 28.

    Raises:
        MemsynError: a file is missing.
    """
    return in_pairs(CLASSES, _read_images(folder))


def load_permuted_fashion(size: int, folder: Path = FASHION_FOLDER) -> list[Task]:
    """Return ten tasks of ten classes, 20,000 training and 10,000 test images (N, 784) each; `size` is 28.

    In the first task the pixels are as they were; in each other they are in an order of its own, always the same.

    Raises:
        MemsynError: a file is missing.
    """
    images, labels, test_images, test_labels = _read_images(folder)
    return _permuted(images[:NUM_PERMUTED], labels[:NUM_PERMUTED], test_images, test_labels, num_tasks=10)


def load_permuted_fashion_30(size: int, folder: Path = FASHION_FOLDER) -> list[Task]:
    """Return 30 such tasks, with 6,000 training and 2,000 test images each; the first ten have the same orders.

    Raises:
        MemsynError: a file is missing.
    """
    images, labels, test_images, test_labels = _read_images(folder)
    train, test = slice(LONG_TRAIN), slice(LONG_TEST)
    return _permuted(images[train], labels[train], test_images[test], test_labels[test], num_tasks=NUM_LONG)


def _permuted(
    images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, *, num_tasks: int
) -> list[Task]:
    names = tuple(name for pair in CLASSES for name in pair)
    tasks = []
    for index in range(num_tasks):
        order = torch.randperm(784, generator=torch.Generator().manual_seed(index)) if index else torch.arange(784)
        tasks.append(Task(f"order {index + 1}", names, images[:, order], labels, test_images[:, order], test_labels))
    return tasks


def _read_images(folder: Path) -> IdxImages:
    missing = "Fashion-MNIST: {} is missing. Install Debian's package: apt install dataset-fashion-mnist"
    return read_idx_images(folder, suffix=".gz", missing=missing)
