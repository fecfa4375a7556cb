"""The relative change of outputs on the remembered data, as the directions of a memory predict it.

Owns its unit, and the reasons why a memory does not tell it. Must not know where the weights come from.
"""

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

from memsyn.values.directions import Directions

NO_LENGTH: Final = (
    "the memory does not tell how long the outputs are: they are zero, or a part of it was made by an earlier memsyn"
)


class RelativeChange(NamedTuple):
    """sqrt(E ||y' - y||^2 / E ||y||^2) of the outputs; infinite if a weight is NaN or infinite.

    Attributes:
        whole: of all layers together, as if their effects did not cancel.
        layers: layer -> the same for the change of this layer alone.
    """

    whole: float
    layers: dict[str, float]


def relative_change(changes: Mapping[str, float], squared_outputs: float) -> RelativeChange:
    """The relative change, from E ||y' - y||^2 by layer (`Directions.predicted_change`) and E ||y||^2."""

    def root(change: float) -> float:
        return math.sqrt(max(0.0, change) / squared_outputs) if math.isfinite(change) else math.inf

    return RelativeChange(root(sum(changes.values())), {layer: root(change) for layer, change in changes.items()})


def why_unknown(directions: Directions | None) -> str:
    """Why a memory does not tell a relative change, whatever the weights are; empty if it may tell one."""
    if directions is None:
        return "the memory holds no directions, which predict the change of outputs"
    if directions.layers and all(own.outputs is None for own in directions.layers.values()):
        return "the memory holds second moments of inputs alone, which do not predict the change of outputs"
    return ""
