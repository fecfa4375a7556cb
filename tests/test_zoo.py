"""Exactness on models that other people wrote, measured as a user would: with the model and a batch, and no more."""

import importlib
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsyn
from memsyn.engine.routes import BY_SAMPLE
from tests import reference
from tests.zoo import ZOO, Specimen

KEY_BIASES = frozenset({"*.key.bias", "*.k_proj.bias"})
"""A softmax takes no notice of them: their gradients are zero in exact arithmetic, where no rotation is in between."""


def need(package: str) -> None:
    """Skip where the package is missing; in CI, fail."""
    if os.environ.get("CI"):
        importlib.import_module(package)
    else:
        pytest.importorskip(package, reason=f"{package} is missing: make install brings it")


def build(specimen: Specimen, attention: str | None) -> tuple[nn.Module, Any]:
    for package in specimen.packages:
        need(package)
    torch.manual_seed(0)
    return specimen.model(attention).to(specimen.dtype), specimen.batch()


def num_samples(batch: Tensor | Mapping[str, Tensor]) -> int:
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def truth(specimen: Specimen, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    def run(model: nn.Module, batch: Any, k: int) -> Tensor:
        if isinstance(batch, Tensor):
            return specimen.counted(model(batch[k : k + 1]), batch)
        sample = {key: value[k : k + 1] for key, value in batch.items()}  # padded as it is among the others
        output = model(**sample) if specimen.forward is None else specimen.forward(model, sample)
        return specimen.counted(output, sample)

    return reference.importance(model, batch, num_samples(batch), run)


def matching(names: Iterable[str], patterns: frozenset[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


@pytest.mark.filterwarnings("default::memsyn.SlowParametersWarning")
@pytest.mark.parametrize(
    ("name", "attention"), [(name, attention) for name, specimen in ZOO.items() for attention in specimen.attentions]
)
def test_measure_equals_the_batch_of_one_reference(name: str, attention: str | None) -> None:
    specimen = ZOO[name]
    model, batch = build(specimen, attention)
    expected = truth(specimen, model, batch)
    largest = max(float(value.norm()) for value in expected.values())
    idle = {name for name, value in expected.items() if float(value.norm()) <= 1e-9 * largest}
    assert idle == matching(idle, specimen.idle | KEY_BIASES)
    importance = memsyn.measure(model, [batch], forward=specimen.forward, progress=False)
    found = reference.errors(importance.mean(), expected)
    assert importance.num_samples == num_samples(batch)
    assert {name: error for name, error in found.items() if not error <= specimen.error} == {}
    slow = {name for name, route in importance.routes.items() if route == BY_SAMPLE}
    assert slow == matching(slow, specimen.slow)
