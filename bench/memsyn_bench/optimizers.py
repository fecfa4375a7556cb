"""The optimizers by name: what `--optimizer` takes.

Owns how each is made, and its default learning rate relative to Adam's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from memsyn_bench.extras import import_extra

ADAM = "adam"


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer that tasks can be learned with.

    Attributes:
        words: what it is called in sentences.
        make: (parameters, learning rate) -> a new one.
        lr_factor: its default learning rate is that of the sequence, which is meant for Adam, times this. Chosen on
            validation data of first tasks; the measurements are in docs/benchmark.md.
    """

    words: str
    make: Callable[[Iterable[nn.Parameter], float], Optimizer]
    lr_factor: float


def _lion(parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    package = import_extra("lion_pytorch", purpose="--optimizer lion", install="memsyn-bench[lion]")
    lion: Optimizer = package.Lion(parameters, lr=lr)
    return lion


OPTIMIZERS: dict[str, OptimizerEntry] = {
    ADAM: OptimizerEntry("Adam", lambda parameters, lr: torch.optim.Adam(parameters, lr=lr), 1.0),
    "adamw": OptimizerEntry(
        "AdamW with weight decay 0.01",
        lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01),
        1.0,
    ),
    "sgd": OptimizerEntry(
        "SGD with momentum 0.9", lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9), 5.0
    ),
    "rmsprop": OptimizerEntry("RMSprop", lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr), 0.1),
    "lion": OptimizerEntry("Lion", _lion, 0.1),
}
