"""tune(train): choose a strength without any old data.

Owns the search. The caller trains the model and scores it on the new task.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from memsyn.errors import OptionError, StrengthWarning
from memsyn.progress import progress_bar

DROP: Final = 0.2
STRENGTH_DECAY: Final = 0.5
BUDGET: Final = 11
"""As in De Lange et al.: a fifth of the reachable score may be lost; each strength is half of the last; ten at most."""


@dataclass(frozen=True)
class Trial:
    """One training."""

    strength: float
    score: float


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`."""

    strength: float
    """The largest strength tried that leaves the new task learnable; the smallest tried if none does."""
    reachable: float
    """The score without protection."""
    trials: tuple[Trial, ...]
    """All trainings in their order; the first is without protection."""


def tune(
    train: Callable[[float], float],
    *,
    start: float,
    drop: float = DROP,
    decay: float = STRENGTH_DECAY,
    budget: int = BUDGET,
    progress: bool = True,
) -> Tuned:
    """The largest strength with which the new task can still be learned; no data of the old tasks are needed.

    First the model is trained without protection, which gives the score A that the new task can reach. Then the
    strength is lowered from `start` until the score is at least (1 - drop) A (De Lange et al., TPAMI 2021, "stability
    decay").

    Args:
        train: strength -> score. It trains a fresh copy of the model on the new task under `protect` with that strength
            (0 means no protection), and returns a score on held-out data of the new task; higher is better.
        start: the highest strength, where the search begins.
        drop: the share of the reachable score that may be lost, from 0 to below 1.
        decay: the ratio of each strength to the one before, between 0 and 1.
        budget: how often to call `train` at most, the first call without protection included; at least 2.
        progress: show a progress bar.

    Returns:
        The strength, the reachable score, and all trials. There is a warning if no strength tried is small enough.

    Raises:
        OptionError: an option is out of its range, or a score is not a positive number.

    Example:
        >>> import memsyn
        >>> memsyn.tune(lambda strength: 1 / (1 + strength), start=8.0, drop=0.25, progress=False).strength
        0.25
    """
    if not (math.isfinite(start) and start > 0):
        raise OptionError(f"start must be a positive strength, got {start}.")
    if not 0 <= drop < 1:
        raise OptionError(f"drop must be from 0 to below 1, got {drop}.")
    if not 0 < decay < 1:
        raise OptionError(f"decay must be between 0 and 1, got {decay}.")
    if budget < 2:
        raise OptionError(f"budget must be at least 2, one training without protection and one with it; got {budget}.")
    trials: list[Trial] = []
    with progress_bar(None, "tuning", total=budget, unit="training", shown=progress) as bar:

        def run(strength: float) -> float:
            score = float(train(strength))
            if not math.isfinite(score):
                raise OptionError(f"train({strength:g}) gave {score}: a score must be a finite number.")
            trials.append(Trial(strength, score))
            bar.update()
            bar.set_postfix_str(f"strength {strength:g}: {score:.4g}")
            return score

        reachable = run(0.0)
        if reachable <= 0:
            raise OptionError(f"without protection the score is {reachable:g}: it must be positive, higher is better.")
        strength = start
        while run(strength) < (1 - drop) * reachable:
            if len(trials) == budget:
                warnings.warn(
                    f"with strength {strength:g}, the smallest of {budget - 1} tried, the new task still reaches only "
                    f"{trials[-1].score:.4g} of {reachable:.4g}. Start lower, or allow a larger budget or drop.",
                    StrengthWarning,
                    stacklevel=2,
                )
                break
            strength *= decay
    return Tuned(strength, reachable, tuple(trials))
