"""The verdict without data: what a memory's directions predict for the outputs on the data it remembers.

Owns the unit of the prediction, and when it cannot decide. Must not run models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from memsyn.comparing.old_model import anchor_of
from memsyn.comparing.verdict import BROKEN, CANNOT_SAY, MAX_CHANGE, SAFE, Verdict, check_thresholds, percent
from memsyn.errors import MismatchError, OptionError
from memsyn.parameters import fitted, same_values
from memsyn.values.display import printable
from memsyn.values.memory import Memory


@final
@dataclass(frozen=True)
class Prediction:
    """What the change of weights is predicted to do, to second order.

    Attributes:
        change: sqrt(E ||y' - y||^2 / E ||y||^2) of the outputs on the remembered data.
        layers: layer -> the same for the change of this layer alone.
        moved_statistics: names of statistics with other values than the memory's. The prediction does not see them.
    """

    change: float
    layers: dict[str, float]
    moved_statistics: tuple[str, ...]

    def verdict(self, max_change: float = MAX_CHANGE) -> Verdict:
        """Whether the weights may ship: safe or broken by the threshold, cannot say if statistics moved.

        Raises:
            OptionError: the threshold is out of range.
        """
        check_thresholds(0.0, max_change)
        largest = max(self.layers, key=lambda layer: self.layers[layer])
        sentence = (
            f"From the memory alone, outputs on the old data are predicted to change by {percent(self.change)}; at "
            f"most {percent(max_change)} is allowed. Most of the change is by {printable(largest)}. This is an "
            "estimate, without data: whether answers stay the same was not tested."
        )
        if self.change > max_change:
            return Verdict(BROKEN, sentence)
        if self.moved_statistics:
            return Verdict(
                CANNOT_SAY,
                f"{sentence} {len(self.moved_statistics):,} running statistics moved (the first is "
                f"{printable(self.moved_statistics[0])}), which the prediction does not see: compare on data, or load "
                "the old ones with model.load_state_dict(memory.statistics, strict=False).",
            )
        return Verdict(SAFE, sentence)

    def to_json(self) -> dict[str, Any]:
        """The numbers as a dict for JSON."""
        return {"change": self.change, "layers": self.layers, "moved_statistics": list(self.moved_statistics)}


def predict(memory: Memory, state: Mapping[str, Tensor], reference: Mapping[str, Tensor] | None = None) -> Prediction:
    """Predict the relative change of the outputs on the remembered data, for new weights.

    sqrt(sum_l tr(S_l D_l A_l D_l^T) / E ||y||^2), with D_l the change of layer l (see `Memory.predicted_change`).

    Args:
        memory: a memory with directions.
        state: the new weights, by name.
        reference: the old weights; by default the memory's anchor.

    Raises:
        OptionError: the memory does not hold what it takes.
        MismatchError: a weight is missing.
    """
    directions = memory.directions
    if directions is None:
        raise OptionError(
            "the memory holds no directions, which predict the change of outputs: compare on data, with --model and "
            "--data; or measure with estimator='kronecker' and consolidate that too."
        )
    if directions.layers and all(own.outputs is None for own in directions.layers.values()):
        raise OptionError(
            "the memory holds second moments of inputs alone, which do not predict the change of outputs: compare on "
            "data, with --model and --data; or measure with estimator='kronecker'."
        )
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
        raise OptionError(
            "the memory does not tell how long the outputs are: they are zero, or a part of it was made by an earlier "
            "memsyn. Measure the factors again, or compare on data, with --model and --data."
        )
    changes = memory.predicted_change(state, before)
    known = fitted(memory.names, state, stacklevel=3)
    moved = [
        name
        for name, values in memory.statistics.items()
        if not same_values(values, state.get(known.own(name) if known.names else name, values.new_empty(0)))
    ]
    layers = {layer: math.sqrt(max(0.0, change) / scale) for layer, change in changes.items()}
    return Prediction(math.sqrt(max(0.0, sum(changes.values())) / scale), layers, tuple(moved))
