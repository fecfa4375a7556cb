"""The arithmetic of protection: the loss term, its gradient, and its proximal step.

Owns the formulas, as plain functions on parameters and lists. Must not know optimizers. Works on a bucket of numbers
at a time, so that nothing is ever held but the parameters, the anchor and the importance.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from memsyn.parameters import named_parameters, wide_dtype
from memsyn.protecting import compiled
from memsyn.values.memory import Memory, check_fit

BUCKET: Final = 2**19
"""How many weights are worked on at once: 2 MiB of float32 for each thing computed of them."""

_MOST: Final = 1e36
"""What takes the place of 1 / 0: infinity times a square of 0 would be NaN."""


class Held(NamedTuple):
    """A parameter, or those of its rows that the memory knows, and what the memory holds of it."""

    parameter: Tensor
    anchor: Tensor
    omega: Tensor


class Preconditioner(NamedTuple):
    """What an optimizer divides a gradient by: root * sqrt(squares) + eps."""

    squares: Tensor
    root: float | Tensor
    eps: float


def penalty(model: nn.Module, memory: Memory) -> Tensor:
    """The term to add to a loss, times your strength lambda: sum Omega (theta - theta*)^2.

    Aljundi et al. 2018, Eq. 3; no factor 1/2. Parameters, or rows of them, that the memory does not know are free.

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
    check_fit(memory.importance, parameters, "the memory", may_change=True)
    terms = []
    for name, omega in memory.importance.items():
        if name in parameters:
            parameter = known_rows(parameters[name], omega)
            dtype = wide_dtype(parameter)
            moved = parameter.to(dtype) - memory.anchor[name].to(parameter.device, dtype)
            terms.append((omega.to(moved) * moved.square()).sum())
    if not terms:
        return torch.zeros((), device=next(iter(parameters.values())).device if parameters else None)
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


def known_rows(parameter: Tensor, held: Tensor) -> Tensor:
    """What of a parameter, or of its gradient, the memory holds: all but the rows it has grown by."""
    return parameter if parameter.shape == held.shape else parameter[: len(held)]


@torch.no_grad()
def distances(held: Sequence[Held]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Per bucket and parameter in it: which of `held`, theta - theta*, and Omega, in wide precision."""
    for index, item in enumerate(held):
        for parts in _split(*item):
            theta, anchor, omega = (_wide(part, item.parameter) for part in parts)
            yield index, theta - anchor, omega


@torch.no_grad()
def add_gradients_(
    gradients: Sequence[Tensor], held: Sequence[Held], factors: Sequence[float], scale: Tensor | None = None
) -> None:
    """gradient += scale * factor * 2 Omega (theta - theta*), in place; rounded once if in half precision.

    Args:
        gradients: one per parameter, of its shape.
        held: the parameters, with anchors and importance.
        factors: one per parameter: the strength.
        scale: by which a GradScaler has scaled the gradients, if it has.
    """
    items = [(gradient, *item) for gradient, item in zip(gradients, held, strict=True)]
    done = compiled.add_gradients_(items, [2 * factor for factor in factors]) if scale is None else set()
    for bucket in _buckets(items, done):
        grads, thetas, anchors, omegas = (list(parts) for parts in zip(*(parts for _, parts in bucket), strict=True))
        moved = list(torch._foreach_sub(_all_wide(thetas, thetas), _all_wide(anchors, thetas)))
        if scale is not None:
            torch._foreach_mul_(moved, scale.to(moved[0].device))
        wide = _all_wide(grads, thetas)
        torch._foreach_addcmul_(wide, moved, _all_wide(omegas, thetas), [2 * factors[index] for index, _ in bucket])
        _give_back(grads, wide)


@torch.no_grad()
def pull_(
    held: Sequence[Held], factors: Sequence[float | Tensor], preconditioners: Sequence[Preconditioner] | None
) -> None:
    """theta <- (theta + k theta*) / (1 + k), k = 2 factor Omega / (root sqrt(v) + eps): the proximal step, in place.

    It minimises factor Omega (x - theta*)^2 + 1/2 (root sqrt(v) + eps) (x - theta)^2 over x, so no factor is too large;
    and it leaves exactly alone a weight at its anchor, or one of no importance.

    Args:
        held: the parameters, with anchors and importance.
        factors: one per parameter: the strength times the size of a step.
        preconditioners: one per parameter; without them, the divisor is 1.
    """
    moving = [index for index, factor in enumerate(factors) if isinstance(factor, Tensor) or factor]
    held, factors = [held[i] for i in moving], [factors[i] for i in moving]
    preconditioners = preconditioners and [preconditioners[i] for i in moving]
    items, offsets, scales = _divisors(held, factors, preconditioners)
    done = compiled.pull_(items, offsets, scales)
    for thetas, anchors, shares in _shares(items, offsets, scales, done):
        wide = _all_wide(thetas, thetas)
        torch._foreach_lerp_(wide, _all_wide(anchors, thetas), shares)
        _give_back(thetas, wide)


@torch.no_grad()
def num_held(
    held: Sequence[Held], factors: Sequence[float | Tensor], preconditioners: Sequence[Preconditioner] | None
) -> int:
    """How many weights a step, as of `pull_`, brings more than half of the way to their anchor: k > 1."""
    parts = (share for *_, shares in _shares(*_divisors(held, factors, preconditioners)) for share in shares)
    return sum(int((share > 0.5).sum()) for share in parts)


def _divisors(
    held: Sequence[Held], factors: Sequence[float | Tensor], preconditioners: Sequence[Preconditioner] | None
) -> tuple[list[tuple[Tensor, ...]], list[float | Tensor], list[float | Tensor]]:
    """Per parameter (theta, anchor, Omega and v if any), offset and scale: 1 / k = (offset + scale sqrt(v)) / Omega."""
    inverse = [
        (0.5 / f).clamp_max(_MOST) if isinstance(f, Tensor) else min(0.5 / f, _MOST) if f else _MOST for f in factors
    ]
    if preconditioners is None:
        return list(held), inverse, [0.0] * len(held)
    items: list[tuple[Tensor, ...]] = [(*item, own.squares) for item, own in zip(held, preconditioners, strict=True)]
    both = list(zip(preconditioners, inverse, strict=True))
    return items, [own.eps * one for own, one in both], [own.root * one for own, one in both]


def _shares(
    items: Sequence[tuple[Tensor, ...]],
    offsets: Sequence[float | Tensor],
    scales: Sequence[float | Tensor],
    done: Collection[int] = (),
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Per bucket parts of parameters, of anchors, and k / (1 + k) = Omega / (Omega + offset + scale sqrt(v))."""
    for bucket in _buckets(items, done):
        thetas, anchors, omegas, *squares = (list(parts) for parts in zip(*(parts for _, parts in bucket), strict=True))
        wide, own = _all_wide(omegas, thetas), [offsets[index] for index, _ in bucket]
        if squares:
            divisors = list(torch._foreach_sqrt(_all_wide(squares[0], thetas)))
            divisors = _with(torch._foreach_mul, divisors, [scales[index] for index, _ in bucket])
            divisors = _with(torch._foreach_add, divisors, own)
            torch._foreach_add_(divisors, wide)
        else:
            divisors = _with(torch._foreach_add, wide, own)
        yield thetas, anchors, list(torch._foreach_div(wide, divisors))


def _with(operation: Callable[..., Any], tensors: list[Tensor], numbers: Sequence[float | Tensor]) -> list[Tensor]:
    """Each with its number, which is a tensor where an optimizer keeps its learning rate or its steps on a device."""
    if not any(isinstance(number, Tensor) for number in numbers):
        return list(operation(tensors, list(numbers)))
    like = zip(numbers, tensors, strict=True)
    return list(operation(tensors, [torch.as_tensor(n, dtype=t.dtype, device=t.device).expand_as(t) for n, t in like]))


def _wide(tensor: Tensor, beside: Tensor) -> Tensor:
    return tensor.to(beside.device, wide_dtype(beside))


def _all_wide(tensors: Sequence[Tensor], beside: Sequence[Tensor]) -> list[Tensor]:
    return [_wide(tensor, other) for tensor, other in zip(tensors, beside, strict=True)]


def _give_back(tensors: Sequence[Tensor], wide: Sequence[Tensor]) -> None:
    """What was computed in wide precision, rounded once."""
    for tensor, found in zip(tensors, wide, strict=True):
        if tensor is not found:
            tensor.copy_(found)


def _split(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, in parts of a bucket's size."""
    first = tensors[0]
    if first.numel() <= BUCKET:
        yield tensors
        return
    if all(tensor.is_contiguous() for tensor in tensors):
        parts = [tensor.view(-1).split(BUCKET) for tensor in tensors]
    else:
        parts = [tensor.split(max(1, BUCKET * len(first) // first.numel())) for tensor in tensors]
    yield from zip(*parts, strict=True)


def _buckets(
    items: Sequence[tuple[Tensor, ...]], done: Collection[int]
) -> Iterator[list[tuple[int, tuple[Tensor, ...]]]]:
    """Parts of all items but those done, as many at a time as fill a bucket, with the place of their item."""
    bucket: list[tuple[int, tuple[Tensor, ...]]] = []
    size = 0
    for index, item in ((index, item) for index, item in enumerate(items) if index not in done):
        for parts in _split(*item):
            if bucket and size + parts[0].numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append((index, parts))
            size += parts[0].numel()
    if bucket:
        yield bucket
