"""The value Relative: a strength that means the same whatever the scale of the importance.

Owns the default strength of memsyn and its reason. How a strength acts is in `protect`.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Final, final

import torch

from memsyn.errors import OptionError
from memsyn.memory import RULES, Memory

DEFAULT: Final = 0.02
"""The relative strength unless told: chosen on three sequences of tasks (docs/decisions.md)."""


@final
@dataclass(frozen=True)
class Relative:
    """A strength in units of the mean importance of one task: lambda = value T / mean(Omega).

    The mean is over the weights that have any importance, so that neither unused rows of a table nor dead units count.
    T is how many tasks' worth of importance the memory holds: what the rules of its consolidations make of importances
    of one, so as many as there are with `sum`, and 1 with `mean`, `max` and `ema`. Whatever multiplies Omega (the scale
    of the outputs, the objective) drops out, and one more task leaves the pull of the others as it was. The paper's own
    lambda is a plain number.

    Attributes:
        value: positive, or 0 for no protection; 0.02 unless told, which is the default of `protect`.

    Raises:
        OptionError: the value is negative or not finite.

    Example:
        >>> import torch, memsyn
        >>> memory = memsyn.Memory({"weight": torch.zeros(3)}, {"weight": torch.tensor([0.0, 2.0, 4.0])})
        >>> memsyn.Relative(0.3).of(memory)  # 0.3 * 1 / 3
        0.1
    """

    value: float = DEFAULT

    def __post_init__(self) -> None:
        checked(self.value)

    def of(self, memory: Memory) -> float:
        """The paper's lambda with this memory; 0 if none of its weights has any importance."""
        held = memory.importance.values()
        total = sum(float(omega.sum(dtype=torch.float64)) for omega in held)
        count = sum(int(omega.count_nonzero()) for omega in held)
        return self.value * _num_tasks(memory) * count / total if total else 0.0


def _num_tasks(memory: Memory) -> float:
    """What the rules of the memory's consolidations make of importances of one."""
    found, one, num_samples = torch.zeros(()), torch.ones(()), 0
    for entry in memory.history:
        if num_samples == 0:
            found = one
        elif entry.rule in RULES:
            found = RULES[entry.rule](found, one, num_samples, entry.num_samples, entry.decay or 0.0)
        num_samples += entry.num_samples
    return float(found) or 1.0


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
    return strength
