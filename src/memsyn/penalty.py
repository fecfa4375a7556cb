"""The arithmetic of protection: the loss term and its gradient.

Owns the formulas, as plain functions on parameters and dicts. Must not know optimizers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memsyn.memory import Memory, check_fit
from memsyn.parameters import named_parameters


def penalty(model: nn.Module, memory: Memory) -> Tensor:
    """The term to add to a loss, times your strength lambda: sum Omega (theta - theta*)^2.

    Aljundi et al. 2018, Eq. 3; no factor 1/2. Parameters that the memory does not know are free.

    Returns:
        A scalar, differentiable by the model's parameters, on their device; 0 for an empty memory.

    Raises:
        MismatchError: the memory is of another architecture.

    Example:
        >>> import torch, memsyn
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> memory = memsyn.Memory({"weight": torch.full((1, 1), -1.0)}, {"weight": torch.full((1, 1), 3.0)})
        >>> memsyn.penalty(model, memory)  # 3 * 2^2
        tensor(12., grad_fn=<SumBackward0>)
    """
    parameters = named_parameters(model)
    check_fit(memory.importance, parameters, "the memory")
    terms = [loss_term(parameters[name], memory.anchor[name], omega) for name, omega in memory.importance.items()]
    if not terms:
        return torch.zeros((), device=next(iter(parameters.values())).device if parameters else None)
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


def loss_term(parameter: Tensor, anchor: Tensor, omega: Tensor) -> Tensor:
    """sum Omega (theta - theta*)^2 of one parameter, in float32 at least: Omega may overflow in half precision."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    moved = parameter.to(dtype) - anchor.to(parameter.device, dtype)
    return (omega.to(moved) * moved.square()).sum()


@torch.no_grad()
def add_gradients_(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    anchors: Sequence[Tensor],
    omegas: Sequence[Tensor],
    strength: float,
) -> None:
    """gradient += 2 strength Omega (theta - theta*), for all parameters at once, in place.

    Computed in the precision of the anchors, and rounded once where a gradient is in half precision.
    """
    moved = torch._foreach_sub([p.to(a.dtype) for p, a in zip(parameters, anchors, strict=True)], list(anchors))
    sums = [gradient.to(a.dtype) for gradient, a in zip(gradients, anchors, strict=True)]
    torch._foreach_addcmul_(sums, moved, list(omegas), value=2 * strength)
    for gradient, total in zip(gradients, sums, strict=True):
        if gradient is not total:
            gradient.copy_(total)
