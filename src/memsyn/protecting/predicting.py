"""The predicted change of outputs on the remembered data, while a memory is protected.

Owns which weights count as the old ones. Keeps a copy of them only if a prediction is possible and the memory's anchor
does not hold them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, final

import torch
from torch import Tensor, nn

from memsyn.errors import MismatchError, OptionError
from memsyn.parameters import canonical_name, fitted
from memsyn.protecting.statistics import WatchedStatistics
from memsyn.sharding.exchange import gathered, placed_like
from memsyn.sharding.parts import is_sharded, local_part
from memsyn.values.directions import Directions
from memsyn.values.memory import Memory
from memsyn.values.relative_change import NO_LENGTH, RelativeChange, relative_change, why_unknown
from memsyn.weights_in_effect import parameters_by_name, weights_by_name

OldWeights = nn.Module | Mapping[str, Tensor]
"""The model that was measured, or its weights by name."""

CURE: Final = "compare on data: memsyn.compare(model, old_model, batches)."


@final
@dataclass(frozen=True, eq=False)
class ChangePredictor:
    """Predicts the relative change of outputs between the weights that were measured and those of now.

    Attributes:
        directions: those that are protected, of parameters that the model has.
        before: parameter -> its values when it was measured.
        squared_outputs: E ||y||^2 on the measured data.
        unknown: why nothing can be predicted, and what to do; empty if it can.
    """

    directions: Directions = field(default_factory=Directions)
    before: Mapping[str, Tensor] = field(default_factory=dict)
    squared_outputs: float = 0.0
    unknown: str = ""

    @torch.no_grad()
    def change(self, weights: Mapping[str, Tensor]) -> RelativeChange:
        """The predicted change for these weights, if nothing is unknown."""
        known = self.directions.only(weights.keys())
        found = known.predicted_change(_Gathered(self.before), _Gathered(weights))
        return relative_change(found, self.squared_outputs)


@final
class _Gathered(Mapping[str, Tensor]):
    """Weights of which each is gathered from all processes when it is asked for: one at a time is whole."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        found = self._weights[name]
        return gathered(found) if is_sharded(found) else found

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class Watched(NamedTuple):
    """What a handle looks at beside the weights that it protects."""

    statistics: WatchedStatistics
    predictor: ChangePredictor


def of_another_memory() -> ChangePredictor:
    """After the state of another memory was loaded."""
    return ChangePredictor(unknown=f"the state that was loaded is of another memory. Protect with that one, or {CURE}")


@torch.no_grad()
def change_predictor(memory: Memory, whole: Memory, model: nn.Module, reference: OldWeights | None) -> ChangePredictor:
    """What predicts the change of a model's outputs while it is protected.

    The old value of each parameter is taken from the reference, the anchor or the model as it is, whichever is as the
    excerpts of the last consolidation say.

    Args:
        memory: what is protected, under the model's names.
        whole: the memory with what `only` and `exclude` leave out: its last layer may tell how long the outputs are.
        model: the model as it is when protection begins.
        reference: the old weights, as `protect` takes them.

    Raises:
        OptionError: the reference is something else.
        MismatchError: the reference is not the model that was measured.
    """
    given = {} if reference is None else _given(reference, whole)
    why = why_unknown(memory.directions)
    if memory.directions is None or whole.directions is None or why:
        also = " and consolidate that too" if memory.importance else ""
        return ChangePredictor(unknown=f"{why}. Measure with estimator='kronecker'{also}, or {CURE}")
    parameters = weights_by_name(model, whole.names)
    found: dict[str, Tensor] = {}
    for source in (given, whole.anchor, parameters):
        moved = set(whole.directions.moved(source))
        found |= {n: source[n].detach() for n in whole.directions.names() - found.keys() - moved if n in source}
    directions = memory.directions.only(parameters)
    lost = sorted(directions.names() - found.keys())
    if lost:
        return ChangePredictor(
            unknown=f"{len(lost)} parameters (the first is {lost[0]}) had moved since the last consolidation when "
            "protection began. Give the weights from then: protect(..., reference=old_state_dict)."
        )
    squared_outputs = whole.directions.squared_outputs
    if squared_outputs is None:
        return ChangePredictor(unknown=f"{NO_LENGTH}. Measure the factors again, or {CURE}")
    own = {local_part(p).untyped_storage().data_ptr() for p in model.parameters()}

    places = parameters_by_name(model, whole.names)

    def kept(name: str) -> Tensor:
        placed = placed_like(found[name], places[name]) if is_sharded(places[name]) else found[name]
        return placed.clone() if local_part(placed).untyped_storage().data_ptr() in own else placed

    before = {name: kept(name) for name in sorted(directions.names())}
    return ChangePredictor(directions, before, squared_outputs)


def _given(reference: OldWeights, memory: Memory) -> dict[str, Tensor]:
    """The weights of a reference under the memory's names, after a check that they are those that were measured."""
    if isinstance(reference, nn.Module):
        values: dict[str, Tensor] = dict(weights_by_name(reference, memory.names))
    elif isinstance(reference, Mapping) and all(isinstance(value, Tensor) for value in reference.values()):
        values = {canonical_name(name): value for name, value in reference.items()}
    else:
        raise OptionError(
            f"reference must be the model that was measured, or its state_dict; got a {type(reference).__name__}."
        )
    names = fitted(memory.names, values, stacklevel=5).names
    values |= {name: values[new] for name, new in names.items() if new in values}
    moved = [] if memory.directions is None else memory.directions.moved(values)
    if moved:
        raise MismatchError(
            f"the reference is not the model that was measured: {len(moved)} parameters differ, the first is "
            f"{moved[0]}. Give the weights at the last consolidation."
        )
    return values
