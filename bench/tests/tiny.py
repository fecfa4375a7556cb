"""A sequence that runs in moments: three tasks of three kinds of noise, and a network of some thousand weights."""

from dataclasses import replace

import torch

from memsyn_bench.sequences.networks import MultiHead, SmallConvNet
from memsyn_bench.sequences.sequences import SEQUENCES, TaskSequence
from memsyn_bench.task import Task

NUM_TASKS = 3


def load(size):
    return [make_task(index, size) for index in range(NUM_TASKS)]


def make_task(index, size):
    generator = torch.Generator().manual_seed(index)
    kinds = torch.rand(3, 3, size, size, generator=generator)
    labels = torch.arange(3).repeat(8)
    images = (kinds[labels] + 0.5 * torch.rand(24, 3, size, size, generator=generator)).clamp(0, 2)
    return Task(f"noise {index + 1}", ("a", "b", "c"), images[:12], labels[:12], images[12:], labels[12:])


def build(tasks, generator):
    backbone = SmallConvNet(widths=(8, 8, 8, 16))
    model = MultiHead(backbone, backbone.num_features, head_sizes=[3] * len(tasks))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.4, 0.4, generator=generator)
    return model


def augment(images, generator):
    return images + 0.1 * torch.rand(images.shape, generator=generator)


SEQUENCE = TaskSequence(summary="three kinds of noise", sizes=(8,), load=load, build=build, augment=augment)
ADAPTATION = replace(SEQUENCE, scorings=("multi-head", "in-use", "other-classes"))
FACTS = replace(SEQUENCE, scorings=("retrieval",))
"""For what is said of results: of its scores none is computed."""


def register(monkeypatch):
    """For results of runs of these names."""
    for name in ("tiny", "facts", "facts-kinds", "facts-scenes", "adaptation-x"):
        sequence = ADAPTATION if name.startswith("adaptation") else FACTS if name.startswith("facts") else SEQUENCE
        monkeypatch.setitem(SEQUENCES.entries, name, sequence)
