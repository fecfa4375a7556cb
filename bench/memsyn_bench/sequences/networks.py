"""The benchmark's own networks: three small backbones, and a backbone with one head for each task or with one for all.

Only plain layers (Conv2d, GroupNorm, ReLU, Linear, torch's Transformer), so that importance is measured exactly and
fast. Owns no data and no training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

WIDTHS = (48, 96, 192, 256)
NUM_GROUPS = 8


class SmallConvNet(nn.Module):
    """Four blocks of 3x3 convolution, GroupNorm and ReLU with pooling between them: (N, C, S, S) -> (N, 256).

    A global average ends the network, so every side S >= 8 works. 0.65M weights; C is `num_channels`.

    It has GroupNorm and not BatchNorm. BatchNorm's running statistics are no parameters, so no importance protects
    them. They drift with each new task unless they are frozen. GroupNorm (Wu and He, ECCV 2018) keeps no statistics,
    treats each sample alone and is the same function in training and in use.

    Example:
        >>> SmallConvNet()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 256])
    """

    num_features: int

    def __init__(self, widths: Sequence[int] = WIDTHS, *, num_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        num_inputs = num_channels
        for width in widths:
            # The normalisation follows directly and has a shift of its own: the convolution needs no bias.
            layers.append(nn.Conv2d(num_inputs, width, kernel_size=3, padding=1, bias=False))
            layers += [nn.GroupNorm(NUM_GROUPS, width), nn.ReLU(), nn.MaxPool2d(2)]
            num_inputs = width
        layers[-1] = nn.AdaptiveAvgPool2d(1)
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.num_features = num_inputs

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, (N, num_features), of images (N, C, S, S)."""
        features: Tensor = self.layers(images)
        return features


def perceptron(width: int = 256) -> nn.Sequential:
    """784 inputs and two layers with ReLU, (N, 784) -> (N, width); 256 is the width of the official MAS demo."""
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


class WordTransformer(nn.Module):
    """Two layers of a Transformer over letters, and the mean of their outputs: int64 (N, L) -> (N, 64).

    Args:
        num_letters: how many different numbers there are.
        length: L, the letters of each word.
    """

    num_features = 64

    def __init__(self, num_letters: int = 27, length: int = 16) -> None:
        super().__init__()
        width = self.num_features
        self.letters, self.places = nn.Embedding(num_letters, width), nn.Embedding(length, width)
        layers = (nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in range(2))
        self.layers = nn.Sequential(*layers)

    def forward(self, words: Tensor) -> Tensor:
        """Return the features, (N, 64), of words (N, L)."""
        letters: Tensor = self.letters(words) + self.places.weight
        features: Tensor = self.layers(letters)
        return features.mean(1)


@torch.no_grad()
def draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights and biases of all its Linear and Conv2d anew, from `generator`.

    Uniform in +-1/sqrt(f) as torch does, f the number of inputs of one output. Other layers stay as they are.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            layer.weight.uniform_(-bound, bound, generator=generator)
            if layer.bias is not None:
                layer.bias.uniform_(-bound, bound, generator=generator)


class MultiHead(nn.Module):
    """A backbone shared by all tasks and one linear head for each: `model(images, task)` -> that head's logits.

    `backbone` maps a batch to features (N, num_features); `head_sizes` are the tasks' numbers of classes.

    Example:
        >>> model = MultiHead(SmallConvNet(), 256, head_sizes=[40, 40])
        >>> model(torch.zeros(2, 3, 32, 32), 1).shape
        torch.Size([2, 40])
    """

    def __init__(self, backbone: nn.Module, num_features: int, *, head_sizes: Sequence[int]) -> None:
        super().__init__()
        # `body` is in the names of parameters, so in memory files and checkpoints: another name would not fit them.
        self.body = backbone
        self.heads = nn.ModuleList(nn.Linear(num_features, size) for size in head_sizes)

    def forward(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Return the logits of one task's head, (N, classes), or with no task of all heads side by side."""
        return self.classify(self.body(inputs), task)

    def classify(self, features: Tensor, task: int | None = None) -> Tensor:
        """The same for features (N, num_features)."""
        if task is None:
            return torch.cat([head(features) for head in self.heads], dim=1)
        logits: Tensor = self.heads[task](features)
        return logits

    def place_of(self, task: int) -> tuple[int, int]:
        """The head of a task's classes, and the row of its first class there."""
        return task, 0


class SharedHead(nn.Module):
    """A backbone and one linear head for all tasks, of the same classes; `model(images, task)` ignores the task.

    Example:
        >>> model = SharedHead(perceptron(), 256, num_classes=10)
        >>> model(torch.zeros(2, 784), 3).shape
        torch.Size([2, 10])
    """

    def __init__(self, backbone: nn.Module, num_features: int, *, num_classes: int) -> None:
        super().__init__()
        self.body = backbone
        self.heads = nn.ModuleList([nn.Linear(num_features, num_classes)])

    def forward(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Return the logits, (N, num_classes), the same for every task."""
        return self.classify(self.body(inputs), task)

    def classify(self, features: Tensor, task: int | None = None) -> Tensor:
        """The same for features (N, num_features)."""
        logits: Tensor = self.heads[0](features)
        return logits

    def place_of(self, task: int) -> tuple[int, int]:
        """The head of a task's classes, and the row of its first class there."""
        return 0, 0


class OneHead(nn.Module):
    """A backbone and one linear head over the classes of all tasks: each task has classes of its own.

    `model(images)` gives the logits of all classes, (N, C), in the order of the tasks. `model(images, task)` gives the
    same logits, rolled so that the task's own classes come first: its labels count from 0.

    Example:
        >>> model = OneHead(perceptron(), 256, class_counts=[2, 3])
        >>> images = torch.rand(4, 784)
        >>> torch.equal(model(images, 1), model(images)[:, [2, 3, 4, 0, 1]])
        True
    """

    def __init__(self, backbone: nn.Module, num_features: int, *, class_counts: Sequence[int]) -> None:
        super().__init__()
        self.body = backbone
        self.heads = nn.ModuleList([nn.Linear(num_features, sum(class_counts))])
        self.first_classes = [sum(class_counts[:task]) for task in range(len(class_counts))]

    def forward(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Return the logits of all classes, (N, C); those of the task come first, if it is given."""
        return self.classify(self.body(inputs), task)

    def classify(self, features: Tensor, task: int | None = None) -> Tensor:
        """The same for features (N, num_features)."""
        logits: Tensor = self.heads[0](features)
        return logits if task is None else logits.roll(-self.first_classes[task], dims=1)

    def place_of(self, task: int) -> tuple[int, int]:
        """The head of a task's classes, and the row of its first class there."""
        return 0, self.first_classes[task]


Network = MultiHead | SharedHead | OneHead
"""What learns a sequence: a backbone, and a head for each task or one for all."""
