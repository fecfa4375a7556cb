"""The settings of a benchmark run: everything that changes the numbers of one method and seed.

Owns the defaults, their checks and the fingerprint by which results of other settings are told apart.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from memsyn import OptionError
from memsyn_bench.optimizers import ADAM, OPTIMIZERS

OWN, CHOSEN = "own", "chosen"


@dataclass(frozen=True)
class Settings:
    """What is trained and how; the same for every method and seed of a run.

    Attributes:
        sequence: a name that `memsyn_bench.sequences.sequences.find_sequence` knows.
        size: the side of the images in pixels.
        epochs: passes over a task's training images.
        batch_size: images in a step.
        lr: the learning rate of the optimizer, which starts afresh with each task.
        warmup: the number of first epochs in which only heads are trained.
        strength: a number for every method that has a strength; "own": each method's default; "chosen": what the
            protocol of `memsyn_bench.running.strengths` finds on validation data, method by method.
        optimizer: a name of `memsyn_bench.optimizers.OPTIMIZERS`.

    Raises:
        OptionError: a value is out of range.
    """

    sequence: str
    size: int
    epochs: int = 20
    batch_size: int = 16
    lr: float = 3e-3
    warmup: int = 0
    strength: float | str = OWN
    optimizer: str = ADAM

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", float(self.lr))  # 1 and 1.0 have one fingerprint
        for name in ("size", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise OptionError(f"lr must be finite and above 0, got {self.lr}.")
        if not 0 <= self.warmup <= self.epochs:
            raise OptionError(f"warmup must be from 0 to the {self.epochs} epochs, got {self.warmup}.")
        if self.optimizer not in OPTIMIZERS:
            raise OptionError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}.")
        if isinstance(self.strength, str):
            if self.strength not in (OWN, CHOSEN):
                raise OptionError(f"strength must be a number, {OWN} or {CHOSEN}; got {self.strength!r}.")
        elif not (math.isfinite(self.strength) and self.strength >= 0):
            raise OptionError(f"strength must be finite and not negative, got {self.strength}.")

    def recorded(self) -> dict[str, Any]:
        """The settings as files hold them. Adam is left out: older files and fingerprints are without optimizer."""
        values = asdict(self)
        return {name: value for name, value in values.items() if (name, value) != ("optimizer", ADAM)}

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the settings."""
        text = json.dumps(self.recorded(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def parse_strength(text: str) -> float | str:
    """A strength as `Settings` takes it: a number, or the text if it is no number."""
    try:
        return float(text)
    except ValueError:
        return text


def training_words(settings: Settings) -> str:
    """One sentence: how every method of a run is trained."""
    warmup = f", in the first {settings.warmup} heads alone" if settings.warmup else ""
    optimizer = OPTIMIZERS[settings.optimizer].words
    epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs} epochs"
    return (
        f"{epochs} a task{warmup}, {optimizer}, lr {settings.lr:g}, batch size {settings.batch_size}, "
        f"{_strength_words(settings.strength)}."
    )


def _strength_words(strength: float | str) -> str:
    words = {OWN: "each method's own strength", CHOSEN: "strengths chosen on validation data"}
    return words[strength] if isinstance(strength, str) else f"strength {strength:g}"
