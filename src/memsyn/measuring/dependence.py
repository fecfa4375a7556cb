"""What an objective must depend on: the weights of the clone it was asked of, through paths that autograd sees.

Owns refusing objectives that say nothing of the weights, or of others than those that are measured.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from memsyn.errors import ModelError, OutputError


class ConstantError(OutputError):
    """The objective does not depend on any weight."""


def check_dependence(values: Tensor, own: Iterable[nn.Parameter]) -> None:
    """The objective must depend on the clone it was asked of, and not on the user's model."""
    if values.requires_grad:
        _check_graph(values)
        strays = torch.autograd.grad(values.sum(), list(own), retain_graph=True, allow_unused=True)
        if any(stray is not None for stray in strays):
            raise ModelError(
                "the forward pass uses your model itself in place of the one it is given: in forward=lambda model, "
                "batch: ..., use that model; in a module, a hook or a patched method, use self in place of a name "
                "from outside."
            )
    else:
        raise OutputError(
            "the model's output has no gradient with respect to any trainable parameter. Does its forward run "
            "under torch.no_grad(), detach the output, or skip the trainable part?"
        )


def check_cached(values: Tensor, cached: Mapping[str, Tensor]) -> None:
    """What was once computed of weights and kept is a constant in the clone: it must not be used."""
    if cached:
        grads = torch.autograd.grad(values.sum(), list(cached.values()), retain_graph=True, allow_unused=True)
        used = [name for name, grad in zip(cached, grads, strict=True) if grad is not None]
        if used:
            raise ModelError(
                f"{', '.join(used)} was computed of weights before the forward pass and kept; how much those weights "
                "matter through it cannot be measured. Compute it in the forward pass, or register it as a parameter."
            )


def _check_graph(values: Tensor) -> None:
    """Reentrant checkpoints hide their parameters from autograd.grad."""
    seen, nodes = set(), [values.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise ModelError(
                "the forward pass uses reentrant checkpoints, whose parameters cannot be measured: call "
                "torch.utils.checkpoint with use_reentrant=False."
            )
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]


def check_not_constant(values: Tensor, parameters: Mapping[str, nn.Parameter], whole: float) -> None:
    """A squared norm that no weight can change has only rounding for a gradient."""
    least, size = 1e-9 * float(values.detach().abs().sum()), 0.0
    for parameter in sorted(parameters.values(), key=Tensor.numel):
        size = math.hypot(size, whole * float(parameter.detach().norm()))
        if size >= least:
            return
    if size > 0:
        raise ConstantError(
            "the squared norm of the output is the same whatever the weights are, as of outputs that were normalised, "
            "so it says nothing about their importance. Measure an earlier output: forward=lambda model, batch: ..."
        )
