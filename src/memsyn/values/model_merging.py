"""merge_models(models, memories): one set of weights from several fine-tuned ones, by what each of them relies on.

Owns the merged value of one layer, and the order of layers. Must not know files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from memsyn.errors import MismatchError, OptionError
from memsyn.parameters import wide_dtype
from memsyn.values.directions import Directions, LayerDirections
from memsyn.values.memory import Memory

RESIDUAL: Final = 1e-5
"""The relative residual at which the conjugate gradients stop."""
MOST_STEPS: Final = 200

LayerWeights = dict[str, Tensor]
"""The parameters of one layer by name, in a wide dtype: a weight, and its bias if the two are one matrix."""


def merge_models(models: Sequence[Mapping[str, Tensor]], memories: Sequence[Memory]) -> dict[str, Tensor]:
    """Merge models that were fine-tuned from one base: each keeps what it relies on, as far as the others let it.

    With Kronecker factors in all memories, the merged weight W minimises the summed predicted change of all models,
    sum_t tr(S_t (W - W_t) A_t (W - W_t)^T), by conjugate gradients from the plain mean. Directions that no model relies
    on stay at the mean. With second moments of inputs alone this is RegMean (Jin et al. 2023). With importances it is
    the weighted mean sum_t Omega_t W_t / sum_t Omega_t, as mode-IMM with another importance (Lee et al. 2017).

    A tensor that one model alone has, such as its head, is taken from it. Tensors in no memory, such as running means,
    are averaged; of whole numbers the first model's are taken.

    Args:
        models: the state_dicts. Only one layer at a time is read, so that they may be lazy.
        memories: the memory of each model, measured at its weights.

    Returns:
        The merged state_dict, in the dtypes of the models.

    Raises:
        OptionError: fewer than two models, another number of memories, or memories that hold nothing of one kind.
        MismatchError: a memory is of another model, or of other weights than its model has; or shapes differ.

    Example:
        >>> import torch, memsyn
        >>> def remembered(model, data):
        ...     return memsyn.Memory.empty().consolidate(model, memsyn.measure(model, data, progress=False))
        >>> models = [torch.nn.Linear(2, 1, bias=False) for _ in range(2)]
        >>> for model, weight in zip(models, ([2.0, 1.0], [1.0, 4.0])):
        ...     _ = model.weight.data.copy_(torch.tensor([weight]))
        >>> data = torch.eye(2)  # the first model has met the first input alone, the second model the second
        >>> memories = [remembered(model, [data[t : t + 1]]) for t, model in enumerate(models)]
        >>> memsyn.merge_models([model.state_dict() for model in models], memories)
        {'weight': tensor([[2., 4.]])}
    """
    return dict(merged_tensors(models, memories))


def merged_tensors(models: Sequence[Mapping[str, Tensor]], memories: Sequence[Memory]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `merge_models` one by one, in the order of the first model; one layer is in memory at a time."""
    by_directions = _check(models, memories)
    names = dict.fromkeys(name for model in models for name in model)
    biases = {weight: bias for weight, bias in _biases(memories).items() if bias in names} if by_directions else {}
    weights = {bias: weight for weight, bias in biases.items()}
    waiting: LayerWeights = {}
    for name in names:
        if name not in waiting:
            weight = weights.get(name, name)
            layer = [weight, biases[weight]] if weight in biases else [weight]
            waiting |= _merged_layer(layer, models, memories, by_directions)
        yield name, waiting.pop(name)


def _check(models: Sequence[Mapping[str, Tensor]], memories: Sequence[Memory]) -> bool:
    """Whether all memories hold directions.

    Raises:
        OptionError, MismatchError: as `merge_models` says.
    """
    if len(models) < 2 or len(models) != len(memories):
        raise OptionError(
            f"expected two or more models and a memory of each, got {len(models)} models and {len(memories)} memories."
        )
    for index, (model, memory) in enumerate(zip(models, memories, strict=True)):
        if not memory.names & model.keys():
            raise MismatchError(
                f"memory {index} and model {index} have no parameter in common: the memory is of another model, or its "
                "names differ. memsyn convert --rename gives it other names."
            )
    if all(memory.directions is not None for memory in memories):
        return True
    if all(memory.importance for memory in memories):
        return False
    raise OptionError(
        "the memories hold nothing of one kind: some have an importance alone, others second moments alone. Measure "
        "all of them with one estimator."
    )


def _biases(memories: Sequence[Memory]) -> dict[str, str]:
    """Weight -> the bias that is a column of its matrix."""
    found: dict[str, str] = {}
    for memory in memories:
        for own in memory.directions.layers.values() if memory.directions is not None else ():
            if own.matrix.bias is not None:
                found[own.matrix.weight] = own.matrix.bias
    return found


def _merged_layer(
    names: Sequence[str], models: Sequence[Mapping[str, Tensor]], memories: Sequence[Memory], by_directions: bool
) -> LayerWeights:
    """The merged tensors of one layer, in the dtypes of the models."""
    holders = [index for index, model in enumerate(models) if any(name in model for name in names)]
    held = [{name: models[index][name] for name in names if name in models[index]} for index in holders]
    first = {name: tensor for own in reversed(held) for name, tensor in own.items()}
    for name, tensor in ((name, tensor) for own in held for name, tensor in own.items()):
        if tensor.shape != first[name].shape:
            raise MismatchError(
                f"{name} has the shapes {tuple(first[name].shape)} and {tuple(tensor.shape)} in two models: only "
                "models of one architecture can be merged. If the layer is a head of each model's own, give it a name "
                "of its own in each."
            )
    if len(holders) == 1 or not all(tensor.is_floating_point() for tensor in first.values()):
        return first
    wide = [{name: tensor.to(wide_dtype(tensor)) for name, tensor in own.items()} for own in held]
    mean = {name: torch.stack([own[name] for own in wide if name in own]).mean(0) for name in first}
    for own, index in zip(held, holders, strict=True):
        _check_weights(memories[index], own, index)
    known = [memories[index] for index in holders]
    merged = _by_directions(wide, known, mean) if by_directions else _by_importance(wide, known, mean)
    return {name: value.to(first[name].dtype) for name, value in merged.items()}


def _check_weights(memory: Memory, weights: Mapping[str, Tensor], index: int) -> None:
    """Refuse a memory that was measured at other weights."""
    kept = {name: memory.anchor[name] for name in weights if name in memory.anchor}
    moved = [name for name, own in kept.items() if not torch.equal(own, weights[name].to(own))]
    if memory.directions is not None:
        moved += memory.directions.moved(weights)
    if moved:
        raise MismatchError(
            f"{moved[0]} has other values in model {index} than in memory {index}: the memory is of other weights. "
            "Give models and memories in the same order, or measure this model as it is."
        )


def _by_importance(held: Sequence[LayerWeights], memories: Sequence[Memory], mean: LayerWeights) -> LayerWeights:
    """sum_t Omega_t W_t / sum_t Omega_t; the plain mean where no Omega is above 0."""
    omegas = [{name: memory.importance[name] for name in mean if name in memory.importance} for memory in memories]
    return {name: _weighted_mean(name, held, omegas, own) for name, own in mean.items()}


def _weighted_mean(
    name: str, held: Sequence[LayerWeights], weights: Sequence[Mapping[str, Tensor]], mean: Tensor
) -> Tensor:
    pairs = [
        (own[name], by[name].to(mean)) for own, by in zip(held, weights, strict=True) if name in by and name in own
    ]
    total = sum((by for _, by in pairs), torch.zeros_like(mean))
    return torch.where(total > 0, sum((by * own for own, by in pairs), torch.zeros_like(mean)) / total, mean)


def _by_directions(held: Sequence[LayerWeights], memories: Sequence[Memory], mean: LayerWeights) -> LayerWeights:
    """The minimum of the summed predicted change: of matrices by conjugate gradients, of others a weighted mean."""
    found = [memory.directions or Directions() for memory in memories]
    forms = [[own for own in each.layers.values() if own.matrix.weight in mean] for each in found]
    squares = [
        {name: each.diagonal[name].squares * each.diagonal[name].scale for name in mean if name in each.diagonal}
        for each in found
    ]
    merged = {name: _weighted_mean(name, held, squares, own) for name, own in mean.items()}
    if not any(forms):
        return merged
    return _least_change(held, forms, mean)


def _least_change(
    held: Sequence[LayerWeights], forms: Sequence[Sequence[LayerDirections]], mean: LayerWeights
) -> LayerWeights:
    """The W that solves sum_t M_t W = sum_t M_t W_t, by conjugate gradients from the mean."""

    def pull(x: LayerWeights) -> LayerWeights:
        products = [own.gradient(x) for model in forms for own in model]
        return {name: sum((p[name] for p in products if name in p), torch.zeros_like(x[name])) for name in x}

    x = dict(mean)
    residual = {name: torch.zeros_like(own) for name, own in mean.items()}
    for own, model in zip(held, forms, strict=True):
        away = {name: own[name] - mean[name] if name in own else torch.zeros_like(mean[name]) for name in mean}
        for form in model:
            for name, value in form.gradient(away).items():
                residual[name] = residual[name] + value
    direction, square = residual, _dot(residual, residual)
    enough = RESIDUAL**2 * square
    for _ in range(MOST_STEPS):
        if not square > enough:
            break
        product = pull(direction)
        step = square / _dot(direction, product)
        x = {name: x[name] + step * direction[name] for name in x}
        residual = {name: residual[name] - step * product[name] for name in x}
        square, before = _dot(residual, residual), square
        direction = {name: residual[name] + square / before * direction[name] for name in x}
    return x


def _dot(a: LayerWeights, b: LayerWeights) -> float:
    return sum(float((a[name] * b[name]).sum(dtype=torch.float64)) for name in a)
