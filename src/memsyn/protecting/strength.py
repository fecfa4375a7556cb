"""The value Relative: a strength that means the same whatever the scale of the importance.

Owns the default strength of memsyn and its reason. How a strength acts is in `protect`.
"""

import math
import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Final, final

import torch

from memsyn.errors import MismatchError, OptionError, StrengthWarning
from memsyn.values.memory import RULES, Memory

DEFAULT: Final = 0.01
"""The relative strength unless told: chosen on three sequences of tasks (docs/decisions.md)."""

LARGEST: Final = 1e37


@final
@dataclass(frozen=True)
class Relative:
    """A strength in units of the mean importance of one task: lambda = value T / mean(Omega).

    The mean is over the weights that have any importance, so that neither unused rows of a table nor dead units count.
    T is how many tasks' worth of importance the memory holds: what the rules of its consolidations make of importances
    of one, so with `sum` as many as there were, and 1 with `mean`, `max` and `ema`. Whatever multiplies Omega (the
    scale of the outputs, the objective) drops out, and the pull of one task stays what it was when others come; where
    each has a head of its own, it grows by about the share of the weights that are heads. A memory made by hand,
    without a history, counts as one task. The paper's own lambda is a plain number.

    Attributes:
        value: positive, or 0 for no protection; 0.01 unless told, which is the default of `protect`.

    Raises:
        OptionError: the value is negative or not finite.

    Example:
        >>> import torch, memsyn
        >>> memory = memsyn.Memory({"weight": torch.zeros(3)}, {"weight": torch.tensor([0.0, 2.0, 4.0])})
        >>> memsyn.Relative(0.75).of(memory)  # 0.75 / 3
        0.25
    """

    value: float = DEFAULT

    def __post_init__(self) -> None:
        checked(self.value)

    def of(self, memory: Memory) -> float:
        """The paper's lambda with this memory; 0, with a warning, if none of its weights has any importance.

        Raises:
            MismatchError: an importance is not finite.
        """
        total, count = 0.0, 0
        for name, omega in memory.importance.items():
            own = float(omega.sum(dtype=torch.promote_types(omega.dtype, torch.float32)))
            if not math.isfinite(own):
                raise MismatchError(f"the importance of {name} is not finite: measure it again.")
            total += own
            count += int(omega.count_nonzero())
        if not total:
            warnings.warn("no weight of the memory has any importance: nothing is protected.", StrengthWarning, 3)
            return 0.0
        return self.value * _num_tasks(memory) * count / total


def _num_tasks(memory: Memory) -> float:
    """What the rules of the memory's consolidations make of importances of one."""
    found, one, num_samples = torch.ones(()), torch.ones(()), 0
    for entry in memory.history:
        if num_samples and entry.rule in RULES:
            found = RULES[entry.rule](found, one, num_samples, entry.num_samples, entry.decay or 0.0)
        num_samples += entry.num_samples
    return float(found)


def checked(strength: object) -> float:
    """A strength as it must be: finite, not negative.

    Raises:
        OptionError: it is not.
    """
    if isinstance(strength, bool) or not isinstance(strength, Real):
        raise OptionError(f"strength must be a number or memsyn.Relative(...), got {strength!r}.")
    strength = float(strength)
    if not (math.isfinite(strength) and strength >= 0):
        raise OptionError(f"strength must be finite and not negative, got {strength}.")
    if strength > LARGEST:
        raise OptionError(f"strength must be at most {LARGEST:g}, for it is used in float32; got {strength}.")
    return strength
