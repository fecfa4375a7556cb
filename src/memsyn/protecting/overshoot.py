"""Whether the pull towards the anchor throws weights beyond it, further in each step.

Owns the look at single weights of an optimizer whose step is not known: whether the gradient form holds cannot be said
before. Must not know optimizers.
"""

from collections.abc import Sequence
from typing import Final, final

import torch
from torch import Tensor

from memsyn.protecting.penalty import ProtectedWeights

WATCHED: Final = 16
"""Of each parameter, so many of its most important weights are watched: they diverge first."""

GROWTH: Final = 1.1
"""A weight that is thrown to the other side of its anchor must be so many times as far from it as before."""

IN_A_ROW: Final = 3
"""After so many throws in a row it diverges."""

NORMALISED_STEPS: Final = 10.0
"""An optimizer that normalises its steps goes to and fro by some learning rates: nearer than this is no divergence."""


@final
class Overshoot:
    """The most important weights of some parameters, and how often in a row each was thrown beyond its anchor."""

    def __init__(self, protected: Sequence[ProtectedWeights]) -> None:
        self._protected = [
            (own, own.omega.reshape(-1).topk(min(WATCHED, own.omega.numel())).indices.to(own.parameter.device))
            for own in protected
        ]
        self._before = self._distances()
        self._counts = torch.zeros_like(self._before, dtype=torch.long)

    def _distances(self) -> Tensor:
        moved = [
            own.parameter.detach().reshape(-1)[index].to(own.anchor.dtype)
            - own.anchor.reshape(-1)[index.to(own.anchor.device)].to(own.parameter.device)
            for own, index in self._protected
        ]
        return torch.cat([part.to(moved[0]) for part in moved])

    def diverges(self, rate: float) -> bool:
        """Look at the weights once more, before a step with this learning rate."""
        now = self._distances()
        thrown = (now * self._before < 0) & (now.abs() > GROWTH * self._before.abs())
        self._counts = torch.where(thrown, self._counts + 1, 0)
        self._before = now
        far = now.abs() > NORMALISED_STEPS * rate
        return bool(((self._counts >= IN_A_ROW) & far).any()) or not bool(now.isfinite().all())
