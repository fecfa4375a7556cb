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


def local_importance(
    model: nn.Module,
    batch: object,
    num_samples: int,
    run: Callable[[nn.Module, object, int], object],
    activations: dict[str, Callable[[Tensor], Tensor]],
) -> dict[str, Tensor]:
    """Omega = 1/N sum_k |d sum y^2 / d theta| of each layer alone, y = phi(layer(a)) with its inputs a held.

    A layer is a module with parameters of its own; `activations` says by name what phi follows it, nothing by default.
    """
    model.eval()
    layers = {name: m for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    names = {id(p): name for name, p in model.named_parameters()}
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for k in range(num_samples):
        calls: list[tuple[str, tuple[object, ...]]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda m, args, name=name, calls=calls: calls.append((name, args)))
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            run(model, batch, k)
        for hook in hooks:
            hook.remove()
        own = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for name, args in calls:
            parameters = list(layers[name].parameters(recurse=False))
            held = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]
            y = activations.get(name, lambda z: z)(layers[name](*held))
            for parameter, gradient in zip(parameters, torch.autograd.grad((y**2).sum(), parameters), strict=True):
                own[names[id(parameter)]] += gradient
        for name, gradient in own.items():
            totals[name] += gradient.abs()
    return {name: total / num_samples for name, total in totals.items()}
