"""The settings of a benchmark run: everything that changes the numbers of one method and seed.

Owns the defaults, their checks and the fingerprint by which results of other settings are told apart.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from memsyn.errors import OptionError


@dataclass(frozen=True)
class Settings:
    """What is trained and how; the same for every method and seed of a run.

    Attributes:
        sequence: a key of `memsyn.bench.sequences.SEQUENCES`.
        size: the side of the images in pixels.
        epochs: passes over a task's training images.
        batch_size: images in a step.
        lr: the learning rate of Adam, which starts afresh with each task.
        strength: lambda, the weight of the penalty in the methods that have one (Aljundi et al. 2018, Eq. 3).

    Raises:
        OptionError: a value is out of range.
    """

    sequence: str
    size: int = 32
    epochs: int = 20
    batch_size: int = 16
    lr: float = 3e-3
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name in ("size", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"lr must be finite and above 0, got {self.lr}.")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise OptionError(f"strength must be finite and not negative, got {self.strength}.")

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the settings."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
