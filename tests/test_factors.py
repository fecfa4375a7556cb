"""Kronecker factors: exact over the table of cases, the same for every batch size, and without side effects."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsyn
from memsyn.batches import model_input, take
from memsyn.measuring.objectives import output_tensor
from tests import reference
from tests.cases import CASES, Case
from tests.test_measure import NUM_SAMPLES, build

TOGETHER = {"a sample at a time by hand"}
"""Its forward pass cuts the batch itself."""


def run(case: Case) -> Any:
    def of_sample(model: nn.Module, whole: Any, k: int) -> Tensor:
        sample = take(whole, k, k + 1)
        if case.forward is not None:
            return case.forward(model, sample)
        inputs = model_input(sample)
        return output_tensor(model(**inputs) if isinstance(inputs, dict) else model(inputs))

    return of_sample


def factors(case: Case, model: nn.Module, batches: Any, estimator: str = "kronecker") -> memsyn.KroneckerFactors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", memsyn.SlowParametersWarning)
        found = memsyn.measure(model, batches, forward=case.forward, estimator=estimator, progress=False)
    assert isinstance(found, memsyn.KroneckerFactors)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))


quiet = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths", "ignore:enable_nested_tensor"
)


@quiet
@pytest.mark.parametrize("name", CASES)
def test_factors_equal_the_batch_of_one_reference(name: str) -> None:
    case = CASES[name]
    model, batch = build(case, torch.float64)
    found = factors(case, model, [batch])
    expected = reference.second_moments(*build(case, torch.float64), NUM_SAMPLES, run(case))
    for key, total in expected.items():
        if name == "weight used outside its layer" and key.endswith("/a.weight"):
            continue  # hooks on layers do not see the other use; MatrixFinder compares the sum of d x^T with autograd
        own = found.sums.get(key, total)
        if own.ndim == 3 and own.shape[1] == total.shape[1] - 1:  # the bias is not a column in all uses of the weight
            total = total[:, :-1, :-1]
        assert error(own, total) <= 1e-9, key
    # What is no matrix has the squared gradient of the same objective.
    model, batch = build(case, torch.float64)
    squares = {key: 0.0 for key in found.sums if key.startswith("diagonal/")}
    for k in range(NUM_SAMPLES):
        output = run(case)(model.eval(), batch, k).flatten()
        parameters = dict(model.named_parameters())
        names = [key.removeprefix("diagonal/") for key in squares]
        score = (output * reference.signs(k, len(output))).sum()
        grads = torch.autograd.grad(score, [parameters[n] for n in names], allow_unused=True) if names else ()
        for own, grad in zip(names, grads, strict=True):
            squares[f"diagonal/{own}"] += 0 if grad is None else grad.to_dense().square()
    for key, total in squares.items():
        zero = torch.zeros_like(found.sums[key])
        assert float((found.sums[key] - (zero + total)).norm()) <= 1e-9 * max(1e-3, float((zero + total).norm())), key


@quiet
@pytest.mark.parametrize("name", CASES)
def test_factors_do_not_depend_on_the_batch_size(name: str) -> None:
    case = CASES[name]
    model, batch = build(case, torch.float64)
    whole = factors(case, model, [batch])
    single = factors(case, model, [take(batch, k, k + 1) for k in range(NUM_SAMPLES)])
    parts = factors(case, model, [take(batch, 0, 2), take(batch, 2, 7)])
    largest = max(float(total.abs().max()) for total in whole.sums.values())
    for other in (single, parts):
        assert other.num_samples == NUM_SAMPLES
        for key in whole.sums.keys() & other.sums.keys():
            assert float((other.sums[key] - whole.sums[key]).abs().max()) <= 1e-9 * largest, key
        # A weight that a part of the batches reads in another way, or not at all, may be measured in another way.
        assert set(whole.matrices) == set(other.matrices) or name in {"experts"}


@quiet
@pytest.mark.parametrize("name", CASES)
def test_inputs_alone_are_those_of_both(name: str) -> None:
    case = CASES[name]
    model, batch = build(case, torch.float64)
    both, inputs = factors(case, model, [batch]), factors(case, model, [batch], "inputs")
    assert set(both.matrices) <= set(inputs.matrices)
    for key, total in both.sums.items():
        if key.startswith(("inputs", "positions")):
            assert error(inputs.sums[key], total) <= 1e-9, key
    assert not any(key.startswith("outputs") for key in inputs.sums)
