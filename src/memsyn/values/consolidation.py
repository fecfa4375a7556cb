"""The value Consolidation: where a part of a memory comes from.

Owns what is written down of it: when, from how much, how, by which versions, at which weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Final

import torch
from torch import Tensor

from memsyn.parameters import fingerprint

MERGED: Final = "merge"
"""What stands for a rule in the history of a memory that another one was merged into."""


@dataclass(frozen=True)
class Consolidation:
    """One entry of a memory's history."""

    when: str
    """UTC, ISO 8601."""
    num_samples: int
    rule: str
    decay: float | None
    objective: str
    magnitude: str
    label: str | None = None
    """What its author called it."""
    memsyn: str | None = None
    """The version that consolidated."""
    torch: str | None = None
    """The version that consolidated."""
    fingerprint: str | None = None
    """Of the anchor: SHA-256 over its names, dtypes, shapes and bytes."""

    @classmethod
    def now(cls, anchor: Mapping[str, Tensor], **what: Any) -> Consolidation:
        """An entry for what happens at this moment, with this software."""
        return cls(
            when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            memsyn=version("memsyn"),
            torch=str(torch.__version__),
            fingerprint=fingerprint(anchor),
            **what,
        )
