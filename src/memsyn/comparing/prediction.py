"""The verdict without data: what a memory's directions predict for the outputs on the data it remembers.

Owns the verdict of a prediction, and when it cannot decide. Must not run models.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from torch import Tensor

from memsyn.comparing.old_model import anchor_of
from memsyn.comparing.verdict import (
    AT_RISK,
    BROKEN,
    CANNOT_SAY,
    MAX_CHANGE,
    SAFE,
    Verdict,
    check_thresholds,
    finite_or_none,
)
from memsyn.errors import MismatchError, OptionError
from memsyn.parameters import fitted, same_values
from memsyn.values.display import counted, percent, printable
from memsyn.values.memory import Memory
from memsyn.values.relative_change import NO_LENGTH, relative_change, why_unknown

BASE_LAYER: Final = "base_layer"
"""The part of a name that PEFT gives the weights around which there are adapters."""

_ON_DATA: Final = "compare on data, with --model and --data"

GIVE_ALL: Final = "Give all old weights as reference: then only what moved since counts"
"""What to do about weights that the memory does not know."""

TIMES: Final = 6.3
"""Nine in ten of 97 checkpoints of four networks had a measured change of at most this many times the predicted one.

The factors take positions and layers as independent, so that predictions are too small (docs/prediction.md).
"""


@final
@dataclass(frozen=True)
class Prediction:
    """What the change of weights is predicted to do, to second order.

    Attributes:
        change: sqrt(E ||y' - y||^2 / E ||y||^2) of the outputs on the remembered data; infinite if a weight is.
        layers: layer -> the same for the change of this layer alone.
        moved_statistics: names of statistics with other values than the memory's. The prediction does not see them.
        unseen: names of other weights that moved, or may have moved, and that the memory holds no directions of.
    """

    change: float
    layers: dict[str, float]
    moved_statistics: tuple[str, ...]
    unseen: tuple[str, ...] = ()

    @property
    def upper(self) -> float:
        """The change that nine in ten measurements do not exceed: 6.3 times the predicted one."""
        return TIMES * self.change

    def verdict(self, max_change: float = MAX_CHANGE) -> Verdict:
        """Whether the weights may ship.

        broken: the predicted change is above `max_change`, or a weight is not finite. cannot say: statistics or unseen
        weights moved. safe: 6.3 times the predicted change is at or below `max_change`. at risk: all else.

        Raises:
            OptionError: the threshold is out of range.
        """
        check_thresholds(0.0, max_change)
        largest = max(self.layers, key=lambda layer: self.layers[layer])
        sentence = (
            f"From the memory alone, outputs on the old data are predicted to change by {percent(self.change)}; at "
            f"most {percent(max_change)} is allowed. Measured changes are larger: nine in ten are at most {TIMES:g} "
            f"times the prediction, here {percent(self.upper)}. Most of the change is by {printable(largest)}. This is "
            "an estimate, without data: whether answers stay the same was not tested."
        )
        if self.change > max_change or not math.isfinite(self.change):
            return Verdict(BROKEN, sentence)
        if self.moved_statistics:
            return Verdict(
                CANNOT_SAY,
                f"{sentence} {len(self.moved_statistics):,} running statistics moved (the first is "
                f"{printable(self.moved_statistics[0])}), which the prediction does not see: compare on data, or load "
                "the old ones with model.load_state_dict(memory.statistics, strict=False).",
            )
        if self.unseen:
            return Verdict(CANNOT_SAY, f"{sentence} {self.words_of_unseen()} {GIVE_ALL}, or {_ON_DATA}.")
        if self.upper > max_change:
            return Verdict(AT_RISK, f"{sentence} To know, {_ON_DATA}.")
        return Verdict(SAFE, sentence)

    def words_of_unseen(self) -> str:
        """What the prediction does not see beside statistics; empty if there is nothing."""
        if not self.unseen:
            return ""
        return (
            f"{counted(len(self.unseen), 'tensor')} of the new weights (the first is {printable(self.unseen[0])}) "
            "moved or may have moved. The memory holds no directions of them, so the prediction does not see them."
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers as a dict for JSON; None stands for what is infinite."""
        layers = {layer: finite_or_none(change) for layer, change in self.layers.items()}
        return {
            "change": finite_or_none(self.change),
            "upper": finite_or_none(self.upper),
            "layers": layers,
            "moved_statistics": list(self.moved_statistics),
            "unseen": list(self.unseen),
        }


def predict(memory: Memory, state: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None) -> Prediction:
    """Predict the relative change of the outputs on the remembered data, for new weights.

    sqrt(sum_l tr(S_l D_l A_l D_l^T) / E ||y||^2), with D_l the change of layer l (see `Memory.predicted_change`).

    Args:
        memory: a memory with directions.
        state: the new weights, by name.
        reference: the old weights; by default the memory's anchor.

    Raises:
        OptionError: the memory does not hold what it takes.
        MismatchError: a weight is missing, or the new weights are of a model with adapters that are not merged.
    """
    directions, unknown = memory.directions, why_unknown(memory.directions)
    if directions is None or unknown:
        also = " and consolidate that too" if directions is None else ""
        raise OptionError(f"{unknown}: {_ON_DATA}; or measure with estimator='kronecker'{also}.")
    _check_merged(state, directions.names())
    before = anchor_of(memory) if reference is None else dict(reference)
    names = fitted(directions.names(), before, stacklevel=3).names
    old = {**before, **{name: before[new] for name, new in names.items() if new in before}}
    stale = directions.moved(old)
    if stale:
        raise MismatchError(
            f"the reference is not the model that was measured: {len(stale)} parameters differ, the first is "
            f"{stale[0]}. Give the weights at the last consolidation."
        )
    scale = directions.squared_outputs
    if scale is None:
        raise OptionError(f"{NO_LENGTH}. Measure the factors again, or {_ON_DATA}.")
    known = fitted(memory.names, state, stacklevel=3)
    after = dict(state) | {name: state[new] for name, new in known.names.items() if new in state}
    directions.check(after)
    changes = memory.predicted_change(state, before)
    moved = [
        name
        for name, values in memory.statistics.items()
        if not same_values(values, state.get(known.own(name) if known.names else name, values.new_empty(0)))
    ]
    seen = directions.names() | directions.free | memory.statistics.keys()
    unseen = _unseen(after, old, seen | set(known.names.values()), may_be_new=reference is not None)
    return Prediction(*relative_change(changes, scale), tuple(moved), unseen)


def _check_merged(state: Mapping[str, Tensor], names: Collection[str]) -> None:
    """Refuse the state_dict of a model with adapters of PEFT: its base weights have not moved, and outputs have.

    `0.weight` is `base_model.model.0.base_layer.weight` there. A memory of the adapters themselves has other names.

    Raises:
        MismatchError: says how to merge them.
    """
    plain = {name: name.replace(f"{BASE_LAYER}.", "") for name in state if BASE_LAYER in name.split(".")}
    wrapped = [name for name, own in plain.items() if any(f".{own}".endswith(f".{known}") for known in names)]
    if wrapped:
        raise MismatchError(
            f"the weights are of a model with adapters of PEFT ({wrapped[0]} is one): the memory holds the weights in "
            "effect. Give those: model.merge_and_unload().state_dict()."
        )


def _unseen(
    after: Mapping[str, Tensor], before: Mapping[str, Tensor], seen: Collection[str], *, may_be_new: bool
) -> tuple[str, ...]:
    """The weights that moved, and that are not among those that are seen.

    Args:
        after, before: the new and the old weights.
        seen: names.
        may_be_new: whether a weight that `before` lacks is new. Else it may have been frozen when the memory was made.
    """
    found = []
    for name, values in after.items():
        if name in seen or not values.is_floating_point():
            continue
        old = before.get(name)
        moved = not may_be_new if old is None else not same_values(old, values[: len(old)] if old.ndim else values)
        # A tied weight has several names, of which the memory holds one.
        if moved and not any(o in seen and same_values(values, own) for o, own in after.items() if own is not values):
            found.append(name)
    return tuple(found)
