"""The sequences of tasks that methods are compared on, by name.

Owns how a sequence's tasks are loaded, its network is built and its images are augmented. Knows no training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memsyn.bench.drawings import Task, augment, load_emoji8, load_pretrained
from memsyn.bench.networks import MultiHead, SmallConvNet


@dataclass(frozen=True)
class TaskSequence:
    """Tasks learned one after the other by one body with a head for each.

    Attributes:
        summary: one line for `memsyn bench list`.
        sizes: the image sides it can be had at, the first one the fastest.
        load: size -> the tasks, in their fixed order.
        build: (tasks, generator) -> the network before the first task; `network(images, task)` are logits.
        augment: (images, generator) -> the images as they are trained on.
    """

    summary: str
    sizes: tuple[int, ...]
    load: Callable[[int], list[Task]]
    build: Callable[[Sequence[Task], torch.Generator], MultiHead]
    augment: Callable[[Tensor, torch.Generator], Tensor]


def pretrained_network(tasks: Sequence[Task], generator: torch.Generator) -> MultiHead:
    """The pretrained body, and a head for each task drawn from `generator`: uniform in +-1/sqrt(features)."""
    body = SmallConvNet()
    body.load_state_dict(load_pretrained())
    model = MultiHead(body, body.num_features, head_sizes=[len(task.class_names) for task in tasks])
    draw_heads(model, generator)
    return model


@torch.no_grad()
def draw_heads(model: MultiHead, generator: torch.Generator) -> None:
    """Draw the heads' weights and biases anew, as `nn.Linear` does, but from `generator`."""
    for head in model.heads:
        assert isinstance(head, nn.Linear)
        bound = 1 / math.sqrt(head.in_features)
        head.weight.uniform_(-bound, bound, generator=generator)
        head.bias.uniform_(-bound, bound, generator=generator)


SEQUENCES: dict[str, TaskSequence] = {
    "emoji8": TaskSequence(
        summary="8 tasks of 40 emoji each, learned from four families of studios, tested on a fifth",
        sizes=(32, 64),
        load=load_emoji8,
        build=pretrained_network,
        augment=augment,
    ),
}
"""What `memsyn bench run` can run."""
