"""Choosing samples evenly over the classes.

Owns the one order that buffers and validation splits are cut from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ranks_in_classes(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Shuffle, and number each class's samples 0, 1, 2, ...: the rank of every sample, (N,) for labels (N,)."""
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels[order]
    counted = F.one_hot(shuffled).cumsum(0).gather(1, shuffled.unsqueeze(1)).squeeze(1) - 1
    ranks = torch.empty_like(counted)
    ranks[order] = counted
    return ranks


def evenly(labels: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """The places of `num` samples, all if there are fewer, drawn so that classes differ by one sample at most."""
    ranks = ranks_in_classes(labels, generator)
    order = torch.randperm(len(labels), generator=generator)
    return order[ranks[order].argsort(stable=True)[:num]]
