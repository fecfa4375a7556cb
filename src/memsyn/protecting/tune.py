"""tune(train): choose a strength without any old data.

Owns the search. The caller trains the model and scores it on the new task.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from memsyn.errors import OptionError, StrengthWarning
from memsyn.progress import progress_bar
from memsyn.protecting.strength import Relative, checked_strength

DROP: Final = 0.2
STRENGTH_DECAY: Final = 0.5
BUDGET: Final = 11
"""As in De Lange et al.: a fifth of the reachable score may be lost; each strength is half of the last; ten at most."""


Strength = TypeVar("Strength", float, Relative)
"""What `protect` takes as strength."""


@dataclass(frozen=True)
class Trial(Generic[Strength]):
    """One training."""

    strength: Strength
    score: float


@dataclass(frozen=True)
class Tuned(Generic[Strength]):
    """The result of `tune`."""

    strength: Strength
    """The largest strength tried that leaves the new task learnable; the smallest tried if none does."""
    reachable: float
    """The score without protection."""
    trials: tuple[Trial[Strength], ...]
    """All trainings in their order; the first is without protection."""


def tune(
    train: Callable[[Strength], float],
    *,
    start: Strength,
    drop: float = DROP,
    decay: float = STRENGTH_DECAY,
    budget: int = BUDGET,
    progress: bool = True,
) -> Tuned[Strength]:
    """The largest strength with which the new task can still be learned; no data of the old tasks are needed.

    First the model is trained without protection, which gives the score A that the new task can reach. Then the
    strength is lowered from `start` until the score is at least (1 - drop) A (De Lange et al., TPAMI 2021, "stability
    decay"). Strengths are in the unit of `start`, and `protect` takes the one that is found as it is.

    Args:
        train: strength -> score. It trains a fresh copy of the model on the new task under `protect` with that strength
            (0 means no protection), and returns a score on held-out data of the new task; higher is better.
        start: the highest strength, where the search begins. For a memory of importance `Relative(1.0)`, a hundred
            times the default of `protect`, or a number, lambda; for a memory of directions a number, c.
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
        >>> memsyn.tune(lambda s: 1 / (1 + s.value), start=memsyn.Relative(1.0), drop=0.25, progress=False).strength
        Relative(value=0.25)
        >>> memsyn.tune(lambda strength: 1 / (1 + strength), start=8.0, drop=0.25, progress=False).strength
        0.25
    """
    value = start.value if isinstance(start, Relative) else checked_strength(start)
    if not value:
        raise OptionError(f"start must be a positive strength, got {start}.")
    if not 0 <= drop < 1:
        raise OptionError(f"drop must be from 0 to below 1, got {drop}.")
    if not 0 < decay < 1:
        raise OptionError(f"decay must be between 0 and 1, got {decay}.")
    if budget < 2:
        raise OptionError(f"budget must be at least 2, one training without protection and one with it; got {budget}.")
    trials: list[Trial[Strength]] = []
    with progress_bar(range(budget), "tuning", total=budget, unit="training", shown=progress) as bar:

        def run(value: float) -> float:
            strength = _as_given(start, value)
            score = float(train(strength))
            if not math.isfinite(score):
                raise OptionError(f"train({_words(strength)}) gave {score}: a score must be a finite number.")
            trials.append(Trial(strength, score))
            bar.update()
            bar.set_postfix_str(f"strength {_words(strength)}: {score:.4g}")
            return score

        reachable = run(0.0)
        if reachable <= 0:
            raise OptionError(f"without protection the score is {reachable:g}: it must be positive, higher is better.")
        while run(value) < (1 - drop) * reachable:
            if len(trials) == budget:
                warnings.warn(
                    f"with strength {_words(trials[-1].strength)}, the smallest of {budget - 1} tried, the new task "
                    f"still reaches only {trials[-1].score:.4g} of {reachable:.4g}. Start lower, or allow a larger "
                    "budget or drop.",
                    StrengthWarning,
                    stacklevel=2,
                )
                break
            value *= decay
    return Tuned(trials[-1].strength, reachable, tuple(trials))


def _as_given(start: Strength, value: float) -> Strength:
    """A strength in the unit of `start`."""
    return Relative(value) if isinstance(start, Relative) else value


def _words(strength: float | Relative) -> str:
    return f"Relative({strength.value:g})" if isinstance(strength, Relative) else f"{strength:g}"
