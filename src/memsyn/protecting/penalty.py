"""The arithmetic of protection: the loss term, its gradient, and its proximal step.

Owns the formulas, as plain functions on tensors. Must not know optimizers. Works on a bucket of weights at a time, so
that the temporary tensors stay small, whatever the size of the model.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from memsyn.errors import OptionError, ProtectionError
from memsyn.parameters import Patterns, only_those, wide_dtype
from memsyn.protecting import compiled
from memsyn.sharding.exchange import part_beside
from memsyn.sharding.parts import any_sharded, is_sharded, reshard
from memsyn.sharding.sums import summed_over_parts
from memsyn.torch_private import (
    foreach_add,
    foreach_add_,
    foreach_addcmul_,
    foreach_div,
    foreach_lerp_,
    foreach_mul,
    foreach_mul_,
    foreach_sqrt,
    foreach_sub,
)
from memsyn.values.memory import Memory, check_fit
from memsyn.weights_in_effect import parameters_by_name, weights_by_name

BUCKET: Final = 2**19
"""How many weights are updated at a time: 2 MiB of float32 for each temporary tensor."""

_LARGEST: Final = 1e36
"""Stands for 1 / 0: an infinity times a square of 0 would be NaN."""


class ProtectedWeights(NamedTuple):
    """A parameter, or the rows of it that the memory knows, with the memory's values beside it."""

    parameter: Tensor
    anchor: Tensor
    """theta*, in the dtype of all computation: float32 at least."""
    omega: Tensor


class Preconditioner(NamedTuple):
    """What an optimizer divides a gradient by: root * sqrt(squares) + eps."""

    squares: Tensor
    root: float | Tensor
    eps: float


def penalty(
    model: nn.Module, memory: Memory, *, only: Patterns | None = None, exclude: Patterns | None = None
) -> Tensor:
    """The term to add to a loss, times your strength lambda: sum Omega (theta - theta*)^2.

    Aljundi et al. 2018, Eq. 3; no factor 1/2. Parameters and rows that the memory does not know are free to change. So
    are running statistics, as BatchNorm's: keep them by `freeze_statistics`.

    Of a model under `fully_shard`, each process computes its own parts, and one sum over all processes makes the value
    whole: all must call it together. Add it to the loss of each process. Its gradient is not averaged over processes,
    since each holds the gradient of its own parts alone, so that the strength means the same as in one process.

    Args:
        model: the model of the memory.
        memory: what is protected.
        only, exclude: names or patterns of the memory's parameters that count, as `Memory.select` takes them.

    Returns:
        A scalar on the device of the parameters, differentiable; 0 for an empty memory. With adapters of PEFT it is of
        the weights in effect, differentiable with respect to the adapters; `protect` needs less memory.

    Raises:
        MismatchError: the memory is of another architecture.
        OptionError: the memory holds directions alone, which have no penalty, or a pattern matches no parameter.
        ProtectionError: a parameter of the memory has no values here (device "meta"), or is nested or sparse.

    Warns:
        RenamedParametersWarning: the memory's names differ from the model's in a known way.

    Example:
        >>> import torch, memsyn
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> memory = memsyn.Memory({"weight": torch.full((1, 1), -1.0)}, {"weight": torch.full((1, 1), 3.0)})
        >>> memsyn.penalty(model, memory)  # 3 * 2^2
        tensor(12., grad_fn=<SumBackward0>)
    """
    if memory.directions is not None and not memory.importance:
        raise OptionError(
            "the memory holds directions alone, which have no penalty: use protect, or measure 'mas' too."
        )
    memory = memory.fitted(model).select(only=only, exclude=exclude)
    check_tensors(only_those(parameters_by_name(model, memory.names), memory.importance))
    reshard(model)
    parameters = weights_by_name(model, memory.names)
    check_fit(memory.importance, parameters, "the memory", may_change=True)
    terms, likes = [], []
    for name, omega in memory.importance.items():
        if name in parameters:
            parameter = parameters[name]
            terms.append(_term(parameter, part_beside(memory.anchor[name], parameter), part_beside(omega, parameter)))
            likes.append(parameter if is_sharded(parameter) else terms[-1])
    if not terms:
        return torch.zeros((), device=next(iter(parameters.values())).device if parameters else None)
    total = torch.stack([term.to(terms[0]) for term in terms]).sum()
    if not any_sharded(likes):
        return total
    summed = summed_over_parts([term.detach() for term in terms], likes)
    return total + (torch.stack([term.to(summed[0]) for term in summed]).sum() - total.detach())


def _term(parameter: Tensor, anchor: Tensor, omega: Tensor) -> Tensor:
    """sum Omega (theta - theta*)^2 over what this process holds of a parameter, differentiable."""
    own = known_rows(parameter.to_local() if is_sharded(parameter) else parameter, omega)
    dtype = wide_dtype(own)
    moved = own.to(dtype) - anchor.to(own.device, dtype)
    return (omega.to(moved) * moved.square()).sum()


def check_tensors(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that cannot be compared with an anchor.

    Raises:
        ProtectionError: a parameter has no values (device "meta"), or is nested or sparse.
    """
    for name, parameter in parameters.items():
        if parameter.is_nested or parameter.layout != torch.strided:
            kind = "nested tensor" if parameter.is_nested else f"tensor of layout {parameter.layout}"
            raise ProtectionError(
                f"{name} is a {kind}, and only dense parameters are protected: make it dense, or leave it out of the "
                "memory."
            )
        if parameter.is_meta:
            raise ProtectionError(
                f'{name} has no values: it is on the device "meta". Protect after the weights are loaded, without '
                "offloading."
            )


def check_placed(tensor: Tensor, parameter: Tensor, name: str) -> None:
    """Refuse a gradient, or an optimizer's state, that is cut in another way than its sharded parameter.

    Raises:
        ProtectionError: names the parameter.
    """
    if not is_sharded(tensor) or not is_sharded(parameter) or tensor.placements != parameter.placements:
        raise ProtectionError(
            f"{name} is placed as {getattr(parameter, 'placements', 'whole')}, and its gradient or its state in the "
            f"optimizer as {getattr(tensor, 'placements', 'whole')}: redistribute it before the step, or leave "
            f"the parameter free: exclude={name!r}."
        )


def known_rows(parameter: Tensor, held: Tensor) -> Tensor:
    """The rows of a parameter, or of its gradient, that the memory holds: all but those added since.

    A head that had 10 classes and has 12 now: (12, 64) beside a memory of (10, 64) gives parameter[:10].
    """
    return parameter if parameter.shape == held.shape else parameter[: len(held)]


@torch.no_grad()
def distances(protected: Iterable[ProtectedWeights]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """theta - theta* and Omega, bucket by bucket, each with the index of its parameter in `protected`."""
    for index, weights in enumerate(protected):
        for theta, anchor, omega in _split(*weights):
            wide, wide_anchor, wide_omega = (_wide(part, theta, anchor) for part in (theta, anchor, omega))
            yield index, wide - wide_anchor, wide_omega


@torch.no_grad()
def add_gradients_(
    gradients: Sequence[Tensor],
    protected: Sequence[ProtectedWeights],
    factors: Sequence[float],
    scale: Tensor | None = None,
) -> None:
    """gradient += scale * factor * 2 Omega (theta - theta*), in place; half precision is rounded once.

    Args:
        gradients: one per parameter, of its shape.
        protected: the parameters, with anchors and importance.
        factors: one per parameter: the strength.
        scale: by which a GradScaler has scaled the gradients; None for 1.
    """
    items = [(gradient, *weights) for gradient, weights in zip(gradients, protected, strict=True)]
    done = set()
    if scale is None and _num_weights(items) >= compiled.SMALLEST:
        done = compiled.add_gradients_in_c_(items, [2 * factor for factor in factors])
    for bucket in _buckets(items, done):
        grads, thetas, anchors, omegas = (list(parts) for parts in zip(*(parts for _, parts in bucket), strict=True))
        moved = list(foreach_sub(_all_wide(thetas, thetas, anchors), _all_wide(anchors, thetas, anchors)))
        if scale is not None:
            foreach_mul_(moved, scale.to(moved[0].device))
        wide = _all_wide(grads, thetas, anchors)
        twice = [2 * factors[index] for index, _ in bucket]
        foreach_addcmul_(wide, moved, _all_wide(omegas, thetas, anchors), twice)
        _copy_back(grads, wide)


@torch.no_grad()
def pull_(
    protected: Sequence[ProtectedWeights],
    factors: Sequence[float | Tensor],
    preconditioners: Sequence[Preconditioner] | None,
) -> None:
    """theta <- (theta + k theta*) / (1 + k), k = 2 factor Omega / (root sqrt(v) + eps): the proximal step, in place.

    This is the minimum over x of factor Omega (x - theta*)^2 + 1/2 (root sqrt(v) + eps) (x - theta)^2, so that no
    factor is too large. A weight at its anchor, or without importance, stays bit for bit.

    Args:
        protected: the parameters, with anchors and importance.
        factors: one per parameter: the strength times the size of a step.
        preconditioners: one per parameter; None: the divisor is 1.
    """
    # A factor of 0 moves nothing, and would make 1 / k infinite. A factor on a device is not compared with 0, since the
    # comparison would wait for the device.
    moving = [index for index, factor in enumerate(factors) if isinstance(factor, Tensor) or factor]
    protected, factors = [protected[i] for i in moving], [factors[i] for i in moving]
    preconditioners = preconditioners and [preconditioners[i] for i in moving]
    items, offsets, scales = _divisors(protected, factors, preconditioners)
    done = compiled.pull_in_c_(items, offsets, scales) if _num_weights(items) >= compiled.SMALLEST else set()
    for thetas, anchors, shares in _shares(items, offsets, scales, done):
        # (theta + k theta*) / (1 + k) lies between theta and theta*, at the share k / (1 + k) of the way:
        #   theta 1, theta* 0, k 3: share 0.75, and theta becomes 0.25
        #   k 0: share 0, theta stays bit for bit; k infinite: share 1, theta becomes theta* bit for bit
        wide = _all_wide(thetas, thetas, anchors)
        foreach_lerp_(wide, _all_wide(anchors, thetas, anchors), shares)
        _copy_back(thetas, wide)


@torch.no_grad()
def num_held(
    protected: Sequence[ProtectedWeights],
    factors: Sequence[float | Tensor],
    preconditioners: Sequence[Preconditioner] | None,
) -> int:
    """How many weights `pull_` would bring more than half of the way to their anchor: k > 1."""
    parts = (share for *_, shares in _shares(*_divisors(protected, factors, preconditioners)) for share in shares)
    return sum(int((share > 0.5).sum()) for share in parts)


def _divisors(
    protected: Sequence[ProtectedWeights],
    factors: Sequence[float | Tensor],
    preconditioners: Sequence[Preconditioner] | None,
) -> tuple[list[tuple[Tensor, ...]], list[float | Tensor], list[float | Tensor]]:
    """Per parameter (theta, anchor, Omega[, v]), offset and scale, so that 1 / k = (offset + scale sqrt(v)) / Omega."""
    inverse = [_half_inverse(factor) for factor in factors]
    if preconditioners is None:
        return list(protected), inverse, [0.0] * len(protected)
    items: list[tuple[Tensor, ...]] = [(*p, own.squares) for p, own in zip(protected, preconditioners, strict=True)]
    both = list(zip(preconditioners, inverse, strict=True))
    return items, [own.eps * one for own, one in both], [own.root * one for own, one in both]


def _half_inverse(factor: float | Tensor) -> float | Tensor:
    """0.5 / factor, at most `_LARGEST`."""
    if isinstance(factor, Tensor):
        return (0.5 / factor).clamp_max(_LARGEST)
    return min(0.5 / factor, _LARGEST) if factor else _LARGEST


def _shares(
    items: Sequence[tuple[Tensor, ...]],
    offsets: Sequence[float | Tensor],
    scales: Sequence[float | Tensor],
    done: Collection[int] = (),
) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
    """Per bucket parts of parameters, of anchors, and k / (1 + k) = Omega / (Omega + offset + scale sqrt(v))."""
    for bucket in _buckets(items, done):
        thetas, anchors, omegas, *squares = (list(parts) for parts in zip(*(parts for _, parts in bucket), strict=True))
        wide, own = _all_wide(omegas, thetas, anchors), [offsets[index] for index, _ in bucket]
        if squares:
            divisors = list(foreach_sqrt(_all_wide(squares[0], thetas, anchors)))
            divisors = _with(foreach_mul, divisors, [scales[index] for index, _ in bucket])
            divisors = _with(foreach_add, divisors, own)
            foreach_add_(divisors, wide)
        else:
            divisors = _with(foreach_add, wide, own)
        # Not as k / (1 + k): if k overflows, this is infinity / infinity, so NaN. Here the share is 1.
        yield thetas, anchors, list(foreach_div(wide, divisors))


def _with(operation: Callable[..., Any], tensors: list[Tensor], numbers: Sequence[float | Tensor]) -> list[Tensor]:
    """A foreach operation of each tensor with its number.

    A number is a tensor if an optimizer keeps its learning rate or its step count on a device (`capturable=True`). The
    foreach operations take no list of such scalars, so each is expanded to its tensor's shape.
    """
    if not any(isinstance(number, Tensor) for number in numbers):
        return list(operation(tensors, list(numbers)))
    like = zip(numbers, tensors, strict=True)
    return list(operation(tensors, [torch.as_tensor(n, dtype=t.dtype, device=t.device).expand_as(t) for n, t in like]))


def _wide(tensor: Tensor, theta: Tensor, anchor: Tensor) -> Tensor:
    """A tensor beside its parameter, in the anchor's dtype: itself if it is there already."""
    return tensor.to(theta.device, anchor.dtype)


def _all_wide(tensors: Sequence[Tensor], thetas: Sequence[Tensor], anchors: Sequence[Tensor]) -> list[Tensor]:
    return [_wide(*parts) for parts in zip(tensors, thetas, anchors, strict=True)]


def _copy_back(tensors: Sequence[Tensor], wide: Sequence[Tensor]) -> None:
    """Results in wide precision, rounded once; nothing to do where `_wide` gave the tensor itself."""
    for tensor, found in zip(tensors, wide, strict=True):
        if tensor is not found:
            tensor.copy_(found)


def _num_weights(items: Sequence[tuple[Tensor, ...]]) -> int:
    return sum(item[0].numel() for item in items)


def _split(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, in parts of at most `BUCKET` numbers."""
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
    """Parts of all items but those in `done`, as many at a time as fill a bucket, each with the index of its item.

    With room for 100 numbers, items of 30, 250 and 10 make the buckets [30], [100], [100], [50, 10].
    """
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
