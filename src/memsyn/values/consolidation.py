"""The value Consolidation: one entry of a memory's history.

Owns what is recorded: when, from how many samples, by which rule and versions, at which weights.
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
from memsyn.sharding.exchange import first_process, text_told_by
from memsyn.sharding.parts import one_sharded

MERGED: Final = "merge"
"""The rule of entries that came from another memory by `Memory.merge`."""


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
    """The name that `consolidate` was given."""
    memsyn: str | None = None
    """The version of memsyn that consolidated."""
    torch: str | None = None
    """The version of torch that consolidated."""
    fingerprint: str | None = None
    """Of the anchor: SHA-256 over its names, dtypes, shapes and bytes; see `memsyn.fingerprint`."""

    @classmethod
    def now(cls, anchor: Mapping[str, Tensor], **what: Any) -> Consolidation:
        """An entry with the present time and versions; the time is that of the first process if weights are sharded."""
        when, like = datetime.now(timezone.utc).isoformat(timespec="seconds"), one_sharded(anchor.values())
        return cls(
            when=when if like is None else text_told_by(first_process(like), when, like),
            memsyn=version("memsyn"),
            torch=str(torch.__version__),
            fingerprint=fingerprint(anchor),
            **what,
        )
