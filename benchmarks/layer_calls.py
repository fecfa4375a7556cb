"""Python for each layer of a steady batch of `measure`: its time and the number of its calls.

For `costs_of_measuring.py`, and for a test that guards the number of calls.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import memsyn

NUM_LAYERS = 64


def batch_times(model: nn.Module, batches: list[Tensor], estimator: str = "mas") -> list[float]:
    """Seconds of each batch of a measurement: from when `measure` asks for it until it asks for the next."""
    marks: list[tuple[float, float]] = []

    def marked() -> Iterator[Tensor]:
        before = 0.0
        for batch in batches:
            if before:
                marks.append((before, time.process_time()))
            before = time.process_time()
            yield batch

    memsyn.measure(model, marked(), estimator=estimator, progress=False)
    return [after - before for before, after in marks]


def small_layers(num_layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(num_layers))).eval()


def microseconds_of_layer() -> tuple[float, float]:
    """Of a steady batch of 2 samples, for each layer: beyond the ordinary pass, and of the ordinary pass."""
    model, batch = small_layers(NUM_LAYERS), torch.ones(2, 4)
    ours = statistics.median(batch_times(model, [batch] * 60)[1:])
    plain = []
    for _ in range(60):
        start = time.process_time()
        model.zero_grad()
        model(batch).square().sum().backward()
        plain.append(time.process_time() - start)
    own = statistics.median(plain)
    return 1e6 * (ours - own) / NUM_LAYERS, 1e6 * own / NUM_LAYERS


def calls_of_layer() -> float:
    """The number of calls of Python functions for each layer of a steady batch."""
    few, many = (_calls_of_batch(small_layers(number)) for number in (8, 40))
    return (many - few) / 32


def _calls_of_batch(model: nn.Module) -> int:
    count = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    def batches() -> Iterator[Tensor]:
        for number in range(5):
            # The fourth batch: no check and no fold.
            sys.setprofile(profile if number == 3 else None)
            yield torch.ones(2, 4)

    try:
        memsyn.measure(model, batches(), progress=False)
    finally:
        sys.setprofile(None)
    return count
