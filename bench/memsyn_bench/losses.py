"""The losses that are minimised while a task is learned, one value for each image.

Knows no training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(outputs (N, D), labels (N,), the task's class vectors (C, D) if it has any) -> the loss of each image, (N,)."""

SIMILARITY_TEMPERATURE = 0.05
"""The temperature T of `similarity_loss`."""


def cross_entropy(outputs: Tensor, labels: Tensor, vectors: Tensor | None) -> Tensor:
    """-log softmax(o_k)_label: the outputs are logits of the task's classes."""
    return F.cross_entropy(outputs, labels, reduction="none")


def similarity_loss(outputs: Tensor, labels: Tensor, vectors: Tensor | None) -> Tensor:
    """-log softmax(o_k . v_c / (T |v_c|) over the texts c of the task)_label, T = 0.05.

    The outputs are an embedding. Only the task's own texts are compared, so no other task's texts are needed. The
    embedding is not normalised: its length scales the loss, as with logits, and MAS differentiates the squared length.
    A loss of cosines would leave the length undetermined.
    """
    assert vectors is not None
    return F.cross_entropy(outputs @ F.normalize(vectors).T / SIMILARITY_TEMPERATURE, labels, reduction="none")
