"""The value Relative: a strength that has the same effect whatever the scale of the importance.

Owns the default strength and the checks of a strength. How a strength acts is in `protect`.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Final, final

import torch
from torch import Tensor

from memsyn.errors import MismatchError, OptionError, StrengthWarning
from memsyn.sharding.parts import local_part
from memsyn.sharding.sums import summed_over_parts
from memsyn.values.factors import BOTH, INPUTS_ALONE
from memsyn.values.memory import RULES, Memory

DEFAULT: Final = 0.01
"""The relative strength by default: chosen on three sequences of tasks (docs/decisions.md)."""

LARGEST: Final = 1e37
"""The largest absolute strength: protection computes in float32."""


@final
@dataclass(frozen=True)
class Relative:
    """A strength in units of the mean importance of one task: lambda = value T / mean(Omega).

    The mean is over the weights with an importance above 0, so that unused rows of a table and dead units do not count.
    T is the number of tasks whose importance the memory holds: the number of consolidations with rule `sum`, 1 with
    `mean`, `max` and `ema`. Any factor of Omega (the scale of the outputs, the objective) cancels. The pull towards one
    task stays the same when other tasks are added. If each task has its own head, it grows by about the heads' share of
    the weights. A memory without a history, made by hand, counts as one task. A plain number in place of `Relative` is
    lambda as in the paper.

    Attributes:
        value: positive, or 0 for no protection. The default 0.01 is also the default of `protect`.

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
        checked_strength(self.value)

    def of(self, memory: Memory) -> float:
        """The paper's lambda for this memory; 0, with a warning, if no weight has any importance.

        Of a memory that is sharded between processes, all must call it together.

        Raises:
            MismatchError: an importance is not finite.
        """
        total, count = 0.0, 0
        for name, (own, important) in _sums(memory.importance).items():
            if not math.isfinite(own):
                raise MismatchError(f"the importance of {name} is not finite: measure it again.")
            total += own
            count += int(important)
        if not total:
            warnings.warn("no weight of the memory has any importance: nothing is protected.", StrengthWarning, 3)
            return 0.0
        return self.value * _num_tasks(memory) * count / total


def _sums(importance: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Parameter -> the sum of its importance, and how many numbers are not zero; over all processes."""
    found = []
    for part in (local_part(omega) for omega in importance.values()):
        total = part.sum(dtype=torch.promote_types(part.dtype, torch.float32))
        found.append(torch.stack([total.double(), part.count_nonzero().double()]))
    sums = summed_over_parts(found, list(importance.values()))
    return dict(zip(importance, (own.tolist() for own in sums), strict=True))


def _num_tasks(memory: Memory) -> float:
    """T: the memory's consolidations, applied to an importance of 1 each. Rule `sum`, three times: 1 + 1 + 1 = 3."""
    found, one, num_samples = torch.ones(()), torch.ones(()), 0
    for entry in (entry for entry in memory.history if entry.magnitude not in (BOTH, INPUTS_ALONE)):
        if num_samples and entry.rule in RULES:
            found = RULES[entry.rule](found, one, num_samples, entry.num_samples, entry.decay or 0.0)
        num_samples += entry.num_samples
    return float(found)


def checked_strength(strength: object) -> float:
    """A strength as a float.

    Raises:
        OptionError: it is not a number, or is negative, not finite or above `LARGEST`.
    """
    if isinstance(strength, bool) or not isinstance(strength, Real):
        raise OptionError(f"strength must be a number or memsyn.Relative(...), got {strength!r}.")
    strength = float(strength)
    if not (math.isfinite(strength) and strength >= 0):
        raise OptionError(f"strength must be finite and not negative, got {strength}.")
    if strength > LARGEST:
        raise OptionError(f"strength must be at most {LARGEST:g}, since it is used in float32; got {strength}.")
    return strength
