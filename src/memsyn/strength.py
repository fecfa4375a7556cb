"""The value Relative: a strength that means the same whatever the scale of the importance.

Owns the default strength of memsyn and its reason. How a strength acts is in `protect`.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Final, final

import torch

from memsyn.errors import OptionError
from memsyn.memory import Memory

DEFAULT: Final = 0.03
"""The relative strength unless told: chosen on three sequences of tasks (docs/decisions.md)."""


@final
@dataclass(frozen=True)
class Relative:
    """A strength in units of the memory's own mean importance: lambda = value / mean(Omega).

    The mean is over the weights that have any importance, so that neither unused rows of a table nor dead units count.
    Whatever multiplies Omega (the scale of the outputs, the objective, how many tasks were summed up) then drops out:
    the penalty is value * sum (Omega / mean(Omega)) (theta - theta*)^2. The paper's own lambda is a plain number.

    Attributes:
        value: positive, or 0 for no protection; 0.03 unless told, which is the default of `protect`.

    Raises:
        OptionError: the value is negative or not finite.

    Example:
        >>> import torch, memsyn
        >>> memory = memsyn.Memory({"weight": torch.zeros(3)}, {"weight": torch.tensor([0.0, 2.0, 4.0])})
        >>> memsyn.Relative(0.3).of(memory)  # 0.3 / 3
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
        return self.value * count / total if total else 0.0


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
