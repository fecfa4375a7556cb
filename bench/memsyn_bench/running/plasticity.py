"""What may keep a network from learning more: hidden units that are dead, and directions that are taken.

Owns these two numbers. Knows no training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memsyn import Memory
from memsyn_bench.methods.penalties import MEASURE_BATCH

DEAD_UNITS, FREE_DIRECTIONS = "dead units", "free directions"


@torch.inference_mode()
def dead_units(model: nn.Module, images: Tensor, task: int) -> float | None:
    """The share of hidden units that are 0 on all images, in percent of all units; None without a ReLU.

    A unit is one channel of the output (N, C, ...) of a `nn.ReLU` or `nn.ReLU6`: dead if it is 0 everywhere. A module
    that a forward pass uses twice has twice the units. The model is left in eval mode.

    Args:
        model: called as `model(images, task)`.
        images: (N, ...), those that the task is learned from.
        task: the task's place.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        outputs.append((output != 0).transpose(0, 1).flatten(1).any(1))

    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, (nn.ReLU, nn.ReLU6))]
    model.eval()
    alive: list[Tensor] = []
    try:
        for batch in images.split(MEASURE_BATCH):
            outputs.clear()
            model(batch, task)
            alive = [old | new for old, new in zip(alive, outputs, strict=True)] if alive else list(outputs)
    finally:
        for hook in hooks:
            hook.remove()
    return 100 * (1 - float(torch.cat(alive).double().mean())) if alive else None


def free_directions(memory: Memory) -> float | None:
    """The share of directions in which more than half of a step remains, in percent; None without directions.

    The mean over the layers that the memory holds, weighted by their numbers of weights, as in memsyn's reports. A
    direction has the eigenvalues a_j of inputs and s_i of outputs, and is free if c a_j ((1 - mu) s_i + mu) < 1.
    """
    if memory.directions is None:
        return None
    layers = memory.directions.summary()
    return 100 * sum(own.room * own.num_weights for own in layers) / max(1, sum(own.num_weights for own in layers))


def plasticity(model: nn.Module, images: Tensor, task: int, memory: Memory) -> dict[str, float]:
    """Both numbers by name, in percent; one that does not exist is left out."""
    found = {DEAD_UNITS: dead_units(model, images, task), FREE_DIRECTIONS: free_directions(memory)}
    return {name: number for name, number in found.items() if number is not None}
