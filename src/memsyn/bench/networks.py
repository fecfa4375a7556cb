"""The benchmark's networks: a small convolutional body and a body with one head for each task.

Only plain layers (Conv2d, GroupNorm, ReLU, Linear), so that importance is measured exactly and fast. Owns no
data and no training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

WIDTHS = (48, 96, 192, 256)
NUM_GROUPS = 8


class SmallConvNet(nn.Module):
    """Four blocks of 3x3 convolution, GroupNorm and ReLU with pooling between them: (N, 3, S, S) -> (N, 256).

    A global average ends the network, so every side S >= 8 works. 0.65M weights.

    GroupNorm and not BatchNorm: BatchNorm's running statistics are no parameters, so no importance protects
    them and they drift with each new task unless they are frozen; GroupNorm (Wu and He, ECCV 2018) keeps no
    statistics, treats each sample alone and is the same function in training and in use.

    Example:
        >>> SmallConvNet()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 256])
    """

    num_features: int

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        num_inputs = 3
        for width in widths:
            # The normalisation follows directly and has a shift of its own: the convolution needs no bias.
            layers.append(nn.Conv2d(num_inputs, width, kernel_size=3, padding=1, bias=False))
            layers += [nn.GroupNorm(NUM_GROUPS, width), nn.ReLU(), nn.MaxPool2d(2)]
            num_inputs = width
        layers[-1] = nn.AdaptiveAvgPool2d(1)
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.num_features = num_inputs

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, (N, num_features), of images (N, 3, S, S)."""
        features: Tensor = self.layers(images)
        return features


class MultiHead(nn.Module):
    """A body shared by all tasks and one linear head for each: `model(images, task)` -> that head's logits.

    `body` maps a batch to features (N, num_features); `head_sizes` are the tasks' numbers of classes.

    Example:
        >>> model = MultiHead(SmallConvNet(), 256, head_sizes=[40, 40])
        >>> model(torch.zeros(2, 3, 32, 32), 1).shape
        torch.Size([2, 40])
    """

    def __init__(self, body: nn.Module, num_features: int, *, head_sizes: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleList(nn.Linear(num_features, size) for size in head_sizes)

    def forward(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Return the logits of one task's head, (N, classes), or with no task of all heads side by side."""
        features = self.body(inputs)
        if task is None:
            return torch.cat([head(features) for head in self.heads], dim=1)
        logits: Tensor = self.heads[task](features)
        return logits
