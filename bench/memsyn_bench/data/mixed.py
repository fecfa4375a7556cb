"""Tasks with little in common: drawings and alphabets in turn.

Owns how letters are made to look like drawings, drawings like letters, and how many letters there are. Knows nothing
of networks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memsyn_bench.data.drawings import load_emoji8, resize
from memsyn_bench.data.scripts import load_scripts8
from memsyn_bench.task import Task

LETTER_SIDE = 28
"""Pixels a side of a letter in its pack."""
FONTS = 5
"""Fonts that a letter is learned from: about as many as there are studios for a drawing."""
NUM_PAIRS = 4


def load_mixed8(size: int) -> list[Task]:
    """Return the first four tasks of emoji8 and the last four of scripts8, in turn; images (N, 3, size, size).

    A letter is learned from five fonts, spread evenly over those there are, and tested on all of other families.
    """
    drawings, alphabets = load_emoji8(size), load_scripts8(LETTER_SIDE)
    pairs = zip(drawings[:NUM_PAIRS], alphabets[-NUM_PAIRS:], strict=True)
    return [task for drawn, letters in pairs for task in (drawn, among_drawings(fewer(letters), size))]


def among_drawings(letters: Task, size: int) -> Task:
    """The letters in three colours, and as large as drawings are."""
    return replace(
        letters,
        train_images=as_drawings(letters.train_images, size),
        test_images=as_drawings(letters.test_images, size),
    )


def as_drawings(letters: Tensor, size: int) -> Tensor:
    """Letters (N, 1, S, S) in three colours, (N, 3, size, size)."""
    return resize(letters, size).expand(-1, 3, -1, -1).contiguous()


def as_letters(drawings: Tensor, size: int) -> Tensor:
    """Drawings (N, 3, S, S) in grey, the mean of the colours: (N, 1, size, size)."""
    return resize(drawings, size).mean(1, keepdim=True)


def fewer(letters: Task) -> Task:
    """The letters of five fonts; each font has all letters of its alphabet, one after the other."""
    assert letters.train_families is not None
    by_font = torch.arange(len(letters.train_labels)).view(-1, len(letters.class_names))
    kept = by_font[torch.linspace(0, len(by_font) - 1, FONTS).round().long()].flatten()
    return replace(
        letters,
        train_images=letters.train_images[kept],
        train_labels=letters.train_labels[kept],
        train_families=letters.train_families[kept],
    )
