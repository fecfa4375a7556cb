"""repair(model, memory) -> Repaired: the least way back, for a model that forgot.

Owns the search for how much is put back, and the result. The closed form is in `shrinkage`. Must not change the user's
model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from memsyn.adapters import has_adapters, speaks_of_adapters
from memsyn.comparing.compare import compare
from memsyn.comparing.old_model import anchor_of
from memsyn.comparing.prediction import predict
from memsyn.comparing.shrinkage import Shrink, shrinkages
from memsyn.comparing.verdict import MAX_CHANGE, Comparison
from memsyn.errors import MismatchError, OptionError
from memsyn.measuring.model_copy import check_measurable, model_copy
from memsyn.measuring.objectives import Forward
from memsyn.parameters import (
    canonical_name,
    fitted,
    layer_of,
    named_parameters,
    same_values,
    statistics,
)
from memsyn.values.directions import Directions, consolidated
from memsyn.values.display import counted, percent, printable
from memsyn.values.factors import BOTH, KroneckerFactors
from memsyn.values.memory import Memory, check_fit, warn_of_lost

CLOSE_PREDICTED: Final = 1e-6
CLOSE_MEASURED: Final = 0.02
"""How far below `max_change` the search may end, relative to it: of a prediction and of a measurement."""

FARTHEST: Final = 1e30
"""A lambda at which only changes of no importance at all are left."""

STEP: Final = math.log(10)
"""By how much the logarithm of lambda goes on until it is on both sides of the bound."""

MOST: Final = 60
"""Halvings, if the change is a step of lambda and comes no closer to the bound."""

ModelOrWeights = nn.Module | Mapping[str, Tensor]
"""A model, or its weights by name."""


@final
@dataclass(frozen=True, eq=False)
class Repaired:
    """The least way back. Made by `repair`.

    Attributes:
        weights: name -> repaired values, of the parameters and statistics that differ from the model's alone. Load them
            with `model.load_state_dict(repaired.weights, strict=False)`, of a wrapped model (DistributedDataParallel,
            torch.compile, AveragedModel) into the model inside: strict=False leaves out other names without a word.
        kept: layer that has moved -> the share of its change that stays, ||D'|| / ||D||. With `learned` it may be above
            1: where the new task needs both, more of one weight makes up for what is taken from another.
        statistics: names of the statistics that are put back, such as running means.
        max_change: the bound.
        predicted: the predicted relative change of the outputs on the old data, before and after, as `memsyn gate`
            gives it without data; None if it cannot be predicted.
        measured: the comparisons with the old model on the batches, before and after; None without batches.
        learned: the predicted relative change of the new task's outputs by the repair; None without `learned`, and if
            statistics are put back, which the prediction does not see.
    """

    weights: dict[str, Tensor] = field(repr=False)
    kept: dict[str, float]
    statistics: tuple[str, ...]
    max_change: float
    predicted: tuple[float, float] | None = None
    measured: tuple[Comparison, Comparison] | None = field(default=None, repr=False)
    learned: float | None = None

    def __str__(self) -> str:
        changes = [] if self.predicted is None else [("are predicted to change", *self.predicted)]
        if self.measured is not None:
            before, after = self.measured
            changes.insert(0, ("change", before.mean_change, after.mean_change))
        how, first, last = changes[0]
        words = [
            f"Outputs on the old data {how} by {percent(last)} in place of {percent(first)}; at most "
            f"{percent(self.max_change)} is allowed."
        ]
        if not self.weights:
            return (
                f"Nothing to repair. Outputs on the old data {how} by {percent(first)}; at most "
                f"{percent(self.max_change)} is allowed."
            )
        if self.measured is not None:
            before, after = self.measured
            words.append(f"The same answer: {percent(after.agreement)} in place of {percent(before.agreement)}.")
        if self.learned is not None:
            words.append(f"Outputs of the new task are predicted to change by {percent(self.learned)}.")
        if self.statistics:
            words.append(
                f"{counted(len(self.statistics), 'running statistic')} put back, the first is "
                f"{printable(self.statistics[0])}. The new task was learned with others: test it, and train its head "
                "again with freeze_statistics=True if it needs that."
            )
        lines = [" ".join(words)]
        least = sorted(self.kept.items(), key=lambda item: item[1])
        if least:
            shares = [f"{printable(layer)} {percent(share)}" for layer, share in least]
            more = f" and {len(shares) - 8} more" if len(shares) > 8 else ""
            lines.append(f"What stays of the change, by layer: {', '.join(shares[:8])}{more}.")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The numbers as a dict for JSON, without the weights. The keys are stable."""
        return {
            "max_change": self.max_change,
            "repaired": sorted(self.weights),
            "kept": self.kept,
            "statistics": list(self.statistics),
            "predicted": None if self.predicted is None else dict(zip(_SIDES, self.predicted, strict=True)),
            "measured": None
            if self.measured is None
            else {side: own.to_json() for side, own in zip(_SIDES, self.measured, strict=True)},
            "learned": self.learned,
        }


_SIDES: Final = ("before", "after")


def repair(
    model: ModelOrWeights,
    memory: Memory,
    *,
    max_change: float = MAX_CHANGE,
    learned: KroneckerFactors | None = None,
    reference: ModelOrWeights | None = None,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    max_samples: int | None = None,
) -> Repaired:
    """The least way back from forgetting: weights between the old and the new ones, so that old outputs change little.

    For each weight matrix with the change D = W_new - W_old, the repaired change is

        D' = argmin ||D' - D||_N^2 + lambda tr(S D' A D'^T)

    with the memory's A and S (see `KroneckerFactors`). ||X||_N^2 is tr(S_new X A_new X^T) with the factors of the new
    task, `learned`, and ||X||^2 without. So changes that the old outputs do not depend on stay, and with `learned` also
    more of what the new task needs. One lambda serves all layers: the smallest that keeps the change of the old outputs
    at or below `max_change`. Changes of parameters that are no matrices, or of which the memory holds an importance
    alone, are divided by 1 + lambda g, with g their mean squared gradient or importance.

    Running statistics that have moved are put back too, if the outputs change too much. The new task was learned with
    the other ones, so test it, and train its head again if it needs that. Parameters that the memory does not know,
    such as a new head, stay as they are. The model itself is not changed.

    Args:
        model: the model that forgot, or its weights by name (a state_dict).
        memory: the memory of the old data; it is not to hold the new task.
        max_change: the largest relative change of the old outputs. Without batches sqrt(E ||y' - y||^2 / E ||y||^2) as
            the memory predicts it, with batches the mean of ||y' - y|| / ||y|| as `compare` measures it.
        learned: the factors of the new task, `measure(model, new_batches, estimator="kronecker")` of the model before
            it is repaired. It then keeps far more of the new task.
        reference: the old model or its state_dict, for a memory of directions alone, which has no anchor.
        batches: inputs of the old kind, without labels, by which the change is measured; they are read about 15 times.
            Needed if the memory holds an importance alone, or second moments of inputs alone, or if the model does not
            end in a linear layer.
        forward, max_samples: as for `compare`.

    Raises:
        OptionError: an argument has a value that is not allowed, the change cannot be predicted from this memory, or no
            repair meets `max_change`.
        MismatchError: the memory, the reference or `learned` is of another model.

    Warns:
        RenamedParametersWarning, LostParametersWarning: the memory has other names, or parameters that the model lacks.

    Example:
        >>> import torch, memsyn
        >>> model, data = torch.nn.Linear(2, 1, bias=False), [torch.tensor([[2.0, 0.0], [1.0, 0.0]])]
        >>> memory = memsyn.Memory.empty()
        >>> for estimator in ("mas", "kronecker"):
        ...     found = memsyn.measure(model, data, estimator=estimator, progress=False)
        ...     memory = memory.consolidate(model, found)
        >>> before = model.weight.detach().clone()
        >>> _ = model.weight.data.mul_(2)  # the old data know the first input alone
        >>> repaired = memsyn.repair(model, memory, max_change=0.1)
        >>> ratio = repaired.weights["weight"] / before
        >>> [round(float(own), 3) for own in ratio[0]]
        [1.1, 2.0]
    """
    if isinstance(max_change, bool) or not isinstance(max_change, (int, float)) or not 0 < max_change < math.inf:
        raise OptionError(f"max_change must be a number above 0, such as 0.05; got {max_change!r}.")
    data = _checked_batches(model, batches, forward, max_samples)
    way = _Way.between(model, memory, reference, learned)
    if data is None:
        return _found(way, max_change, way.predicted, CLOSE_PREDICTED)
    assert isinstance(model, nn.Module)
    old = memory if reference is None else reference
    check_measurable(model)
    clone = model_copy(model, private=named_parameters(model))
    places = {**named_parameters(clone), **statistics(clone)}
    new = {name: values.detach().clone() for name, values in places.items()}
    # Of the user's own model, so that a forward pass that uses it is refused.
    first = compare(model, old, data, forward=forward, max_samples=max_samples, progress=False)

    def measured(weights: Mapping[str, Tensor]) -> Comparison:
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(weights.get(name, new[name]))
        return compare(clone, old, data, forward=forward, max_samples=max_samples, progress=False)

    def change(weights: Mapping[str, Tensor]) -> float:
        return (measured(weights) if weights else first).mean_change

    found = _found(way, max_change, change, CLOSE_MEASURED)
    return replace(found, measured=(first, measured(found.weights) if found.weights else first))


def _checked_batches(
    model: ModelOrWeights, batches: Iterable[Any] | None, forward: Forward | None, max_samples: int | None
) -> Iterable[Any] | None:
    """The batches, which are read more than once.

    Raises:
        OptionError: they can be read once, there is no model to run, or options of data come without data.
    """
    if batches is None and (forward is not None or max_samples is not None):
        raise OptionError("forward= and max_samples= say how batches are run: give batches= too, or leave them out.")
    if batches is not None and not isinstance(model, nn.Module):
        raise OptionError("batches are run through the model: give the model itself in place of its weights.")
    if isinstance(batches, Iterator):
        raise OptionError(
            f"batches are read several times, and a {type(batches).__name__} can be read only once: give a list or a "
            "DataLoader."
        )
    return batches


@final
@dataclass(frozen=True, eq=False)
class _Way:
    """All that lies between the old and the new weights, under the model's names.

    Attributes:
        memory, before, after: the memory; the old and the new weights and statistics.
        changes: parameter that has moved -> its change in float64 on the CPU, of the rows that the memory knows.
        statistics: the old values of those that have moved.
        shrinks: what shrinks the changes.
        learned: the directions of the new task.
    """

    memory: Memory
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    changes: dict[str, Tensor]
    statistics: dict[str, Tensor]
    shrinks: list[Shrink]
    learned: Directions | None

    @classmethod
    def between(
        cls, model: ModelOrWeights, memory: Memory, reference: ModelOrWeights | None, learned: KroneckerFactors | None
    ) -> _Way:
        """Check that all are of one model, and take the differences.

        Raises:
            OptionError, MismatchError: see `repair`.
        """
        _check_merged(model, memory)
        after = _weights(model)
        memory = _under_names_of(memory, after)
        before = anchor_of(memory) if reference is None else {**memory.statistics, **_weights(reference)}
        fit = fitted(memory.names, before, "the memory", stacklevel=5)
        before |= {name: before[new] for name, new in fit.names.items() if new in before}
        directions = memory.directions or Directions()
        stale = directions.moved(before)
        if stale:
            raise MismatchError(
                f"the reference is not the model that was measured: {len(stale)} parameters differ, the first is "
                f"{stale[0]}. Give the weights at the last consolidation."
            )
        names = (memory.names - directions.free) & after.keys()
        missing = sorted(names - before.keys())
        if missing:
            raise MismatchError(
                f"the reference lacks {len(missing)} parameters that the memory holds, the first is {missing[0]}: give "
                "the whole old model, or its state_dict."
            )
        rows = directions.num_rows() | {name: len(omega) for name, omega in memory.importance.items() if omega.ndim}
        found = {name: _difference(before[name], after[name], rows.get(name)) for name in sorted(names)}
        changes = {name: change for name, change in found.items() if bool(change.any())}
        # A bias that stood still is shrunk with its weight: both are one matrix.
        for matrix in (own.matrix for own in directions.layers.values()):
            if any(name in changes for name in matrix.names):
                changes |= {name: found[name] for name in matrix.names}
        moved = {
            name: before[name]
            for name in memory.statistics
            if name in after and before[name].shape == after[name].shape and not same_values(before[name], after[name])
        }
        new = None if learned is None else _checked_learned(learned, after, directions)
        others = {name: omega for name, omega in memory.importance.items() if name not in directions.names()}
        shrinks = shrinkages(directions, others, new, changes)
        return cls(memory, before, after, changes, moved, shrinks, new)

    def predicted(self, weights: Mapping[str, Tensor]) -> float:
        """The predicted change of the old outputs.

        Raises:
            OptionError: it cannot be predicted from this memory.
        """
        try:
            found = predict(self.memory, {**self.after, **weights}, self.before)
            if self.memory.importance.keys() & set(found.unseen):
                raise OptionError(found.words_of_unseen())
            return found.change
        except OptionError as error:
            raise OptionError(
                f"the change of the old outputs cannot be predicted: {error} Give batches= of the old kind, without "
                "labels, by which it is measured."
            ) from None

    def shrunk(self, strength: float) -> dict[str, Tensor]:
        """The changes that stay, for a lambda."""
        changes = dict(self.changes)
        for shrink in self.shrinks:
            shrink(strength, changes)
        return changes

    def weights(self, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The repaired weights and statistics, those that are not the model's. A tied weight has all of its names."""
        found = {name: values.detach().to(self.after[name]).clone() for name, values in self.statistics.items()}
        for name, change in changes.items():
            values = self.after[name].detach().clone()
            known = values[: len(change)] if values.ndim else values
            old = self.before[name].detach()
            known.copy_((old[: len(change)] if old.ndim else old).to("cpu", torch.float64) + change)
            if not torch.equal(values, self.after[name].detach()):
                found[name] = values
        places = {_place(self.after[name]): values for name, values in found.items()}
        return found | {name: places[_place(own)] for name, own in self.after.items() if _place(own) in places}

    def unit(self) -> float:
        """The lambda at which both terms weigh the whole change alike."""
        directions = self.memory.directions or Directions()
        start = {**self.after, **self.weights({name: torch.zeros_like(own) for name, own in self.changes.items()})}
        need = sum(directions.predicted_change(start, self.after).values())
        known = directions.names()
        for name, omega in self.memory.importance.items():
            if name in self.changes and name not in known:
                need += float((omega.to("cpu", torch.float64) * self.changes[name].square()).sum())
        size = sum(float(own.square().sum()) for own in self.changes.values())
        if self.learned is not None:
            size = sum(self.learned.only(self.changes).predicted_change(start, self.after).values())
        return size / need if size > 0 and need > 0 else 1.0

    def lost(self, weights: Mapping[str, Tensor]) -> float | None:
        """The predicted relative change of the new task's outputs."""
        scale = None if self.learned is None else self.learned.squared_outputs
        if self.learned is None or not scale:
            return None
        changes = self.learned.only(self.changes).predicted_change(self.after, {**self.after, **weights})
        return math.sqrt(max(0.0, sum(changes.values())) / scale)


def _place(tensor: Tensor) -> tuple[int, int, torch.Size]:
    return tensor.data_ptr(), tensor.numel(), tensor.shape


def _weights(of: ModelOrWeights) -> dict[str, Tensor]:
    """Parameters and statistics by name."""
    if isinstance(of, nn.Module):
        return {**named_parameters(of), **statistics(of)}
    if not isinstance(of, Mapping) or not all(isinstance(value, Tensor) for value in of.values()):
        raise OptionError(f"expected a model, or its weights by name; got a {type(of).__name__}.")
    return {canonical_name(name): value for name, value in of.items()}


def _check_merged(model: ModelOrWeights, memory: Memory) -> None:
    """Refuse a model with adapters of PEFT: no adapters give the repaired weights in effect.

    Raises:
        OptionError: says how to merge them.
    """
    names = memory.names if isinstance(memory, Memory) else ()
    if isinstance(model, nn.Module) and has_adapters(model) and not speaks_of_adapters(model, names):
        raise OptionError(
            "the model has adapters of PEFT, and the memory holds the weights in effect. Merge the adapters first: "
            "repair(model.merge_and_unload(), ...)."
        )


def _under_names_of(memory: Memory, after: Mapping[str, Tensor]) -> Memory:
    """The memory under the model's names, without what the model has lost.

    Raises:
        OptionError: it is no memory, or empty.
        MismatchError: it is of another model.
    """
    if not isinstance(memory, Memory) or not memory.names:
        what = "an empty one" if isinstance(memory, Memory) else f"a {type(memory).__name__}"
        raise OptionError(f"expected the memory of the old data, got {what}.")
    fit = fitted(memory.names, after, stacklevel=5)
    memory = memory.renamed(fit.names | {name: fit.own(name) for name in memory.statistics if fit.names})
    check_fit(memory.importance, after, "the memory", may_change=True, stacklevel=6)
    if memory.directions is None:
        return memory
    memory.directions.check(after)
    lost = memory.directions.names() - after.keys()
    warn_of_lost(sorted(lost - memory.importance.keys()), "the memory", 6)
    return replace(memory, directions=memory.directions.only(after))


def _difference(old: Tensor, new: Tensor, rows: int | None) -> Tensor:
    """The change of the rows that are known, in float64 on the CPU."""
    known = slice(rows) if old.ndim else ...
    one, other = (side.detach()[known].to("cpu", torch.float64) for side in (old, new))
    return other - one


def _checked_learned(learned: KroneckerFactors, after: Mapping[str, Tensor], directions: Directions) -> Directions:
    """The directions of the new task.

    Raises:
        OptionError: they are no factors with both sides, or the memory has none itself.
    """
    if not isinstance(learned, KroneckerFactors) or learned.magnitude != BOTH:
        got = learned.magnitude if isinstance(learned, KroneckerFactors) else type(learned).__name__
        raise OptionError(
            f"learned must be the factors of the new task, measure(model, batches, estimator='kronecker'); got {got}."
        )
    if any(own.outputs is None for own in directions.layers.values()) or not directions.names():
        raise OptionError(
            "learned= needs a memory with directions of inputs and output gradients: measure the old data with "
            "estimator='kronecker', or leave learned= out."
        )
    fit = fitted(learned.names, after, "learned=", stacklevel=6)
    return consolidated(Directions(), learned.renamed(fit.names), (0.0, 1.0), directions.rank)


def _found(way: _Way, max_change: float, change: Callable[[Mapping[str, Tensor]], float], close: float) -> Repaired:
    """The smallest lambda that meets the bound.

    Raises:
        OptionError: none does.
    """
    everything = dict.fromkeys(sorted({layer_of(name) for name in way.changes}), 1.0)
    try:
        first: float | None = way.predicted({})
    except OptionError:
        first = None
    whole = Repaired({}, everything, (), max_change, None if first is None else (first, first))
    # A prediction does not see statistics that have moved.
    if change({}) <= max_change and not (close == CLOSE_PREDICTED and way.statistics):
        return whole
    changes = way.changes
    if change(way.weights(changes)) > max_change:
        farthest = way.shrunk(FARTHEST)
        least = change(way.weights(farthest))
        if least > max_change:
            raise OptionError(
                f"max_change={max_change:g} cannot be met: with all changes put back that the memory sees, the old "
                f"outputs still change by {percent(least)}. Give a larger max_change; or the batches are not of the "
                "kind that the memory remembers, or the outputs depend on parts that it does not hold."
            )
        strength = _smallest(lambda own: change(way.weights(way.shrunk(own))), max_change, close, way.unit())
        changes = way.shrunk(strength)
    weights = way.weights(changes)
    kept: dict[str, list[float]] = {layer: [0.0, 0.0] for layer in everything}
    for name, old in way.changes.items():
        sizes = kept[layer_of(name)]
        sizes[0] += float(changes[name].square().sum())
        sizes[1] += float(old.square().sum())
    return replace(
        whole,
        weights=weights,
        kept={layer: math.sqrt(own / old) for layer, (own, old) in kept.items() if old},
        statistics=tuple(way.statistics),
        predicted=None if first is None else (first, way.predicted(weights)),
        learned=None if way.statistics else way.lost(weights),
    )


def _smallest(change: Callable[[float], float], bound: float, close: float, unit: float) -> float:
    """The smallest lambda at which the change is at or below the bound, by bisection of its logarithm."""
    low, high = math.log(unit), math.log(unit)
    while change(math.exp(high)) > bound:
        low, high = high, high + STEP
    while low == high or change(math.exp(low)) <= bound:
        low, high = low - STEP, low
    for _ in range(MOST):
        middle = (low + high) / 2
        found = change(math.exp(middle))
        low, high = (middle, high) if found > bound else (low, middle)
        if (1 - close) * bound <= found <= bound:
            break
    return math.exp(high)
