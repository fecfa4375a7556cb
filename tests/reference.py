"""The slow, obviously right truth: one sample at a time, plain autograd. Never imported by the package."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def importance(
    model: nn.Module, batch: object, num_samples: int, run: Callable[[nn.Module, object, int], Tensor]
) -> dict[str, Tensor]:
    """Omega = 1/N sum_k |d ||F(x_k)||^2 / d theta|, by N backward passes; `run` gives the output of sample k."""
    model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for k in range(num_samples):
        score = (run(model, batch, k) ** 2).sum()
        gradients = torch.autograd.grad(score, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient.to_dense().abs() if gradient.is_sparse else gradient.abs()
    return {name: total / num_samples for name, total in totals.items()}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """||x - ref|| / max(||ref of the parameter||, 1e-6 ||ref of the model||), per parameter."""
    assert set(found) == set(expected)
    whole = torch.stack([value.double().norm() for value in expected.values()]).norm()
    result = {}
    for name, value in expected.items():
        scale = torch.maximum(value.double().norm(), 1e-6 * whole)
        assert found[name].shape == value.shape, name
        difference = (found[name].double() - value.double()).norm()
        result[name] = float(difference / scale) if scale > 0 else float(difference)
    return result
