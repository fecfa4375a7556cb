"""Pictures of one colour each, by their class, and a stand-in for torchvision."""

import sys
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import nn

COLOURS = ((250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0))
"""Of the pictures of class 0, 1, 2 and 3; then again from the first."""


def paint(path, label, size=(40, 30)):
    """A picture of one colour, by its class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[label % 4]).save(path, quality=95)
    return path


def colours_match(images, labels):
    """Whether each picture's middle has the colour of its class, up to what JPEG changes."""
    middle = images[:, :, images.shape[2] // 2, images.shape[3] // 2].int()
    expected = torch.tensor([COLOURS[label % 4] for label in labels.tolist()])
    return (middle - expected).abs().max() < 30


@pytest.fixture
def torchvision(monkeypatch):
    """A stand-in that has one network: its features are the mean colours after normalisation."""
    models = ModuleType("torchvision.models")

    def get_model(name, weights):
        assert weights == "DEFAULT"
        if name == "alexnet":
            last = nn.Sequential(nn.Dropout(), nn.Linear(3, 1000))
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
        if name == "squeezenet":
            return nn.Conv2d(3, 4, 1)
        raise ValueError(f"Unknown model {name}")

    models.get_model = get_model
    package = ModuleType("torchvision")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
