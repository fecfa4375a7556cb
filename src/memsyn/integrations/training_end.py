"""What the callbacks of all trainers do when training ends: measure, and consolidate.

Owns which estimators continue a memory, and the group of the processes that a trainer has started.
"""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn

from memsyn import Estimator, Forward, Memory, measure


def extended(
    memory: Memory,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: str | Estimator | None,
    forward: Forward | None = None,
    max_samples: int | None,
    progress: bool,
) -> Memory:
    """The memory with what was measured on `batches`, by one consolidation for each estimator."""
    for chosen in _estimators(memory) if estimator is None else [estimator]:
        found = measure(
            model,
            batches,
            estimator=chosen,
            forward=forward,
            max_samples=max_samples,
            group=dist.group.WORLD if dist.is_available() and dist.is_initialized() else None,
            progress=progress,
        )
        memory = memory.consolidate(model, found)
    return memory


def _estimators(memory: Memory) -> list[str]:
    """Those that measure what the memory holds: importance, directions or both; importance for an empty memory."""
    chosen = ["mas"] if memory.importance or memory.directions is None else []
    if memory.directions_quantity is not None:
        inputs_alone = memory.directions_quantity[1] == "second moments of inputs"
        chosen.append("inputs" if inputs_alone else "kronecker")
    return chosen
