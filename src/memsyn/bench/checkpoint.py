"""Where a sequence of tasks was when it was last whole: one file, written after each task.

Holds the model's weights and the memory together, so that they are always of the same task. The optimizer is fresh
with every task and the random numbers are drawn from (seed, task): neither needs saving.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from torch import nn

from memsyn import Consolidation, Memory, MemsynError
from memsyn.storage import read, record, write

KIND = "checkpoint"


def save_checkpoint(path: Path, model: nn.Module, memory: Memory, *, num_tasks: int, fingerprint: str) -> None:
    """Write the state after `num_tasks` tasks, atomically.

    Raises:
        MemoryFileError: it cannot be written; the one before it stays.
    """
    header = {
        "num_tasks": num_tasks,
        "fingerprint": fingerprint,
        "history": [asdict(entry) for entry in memory.history],
        "counts": memory.counts,
    }
    write(
        path,
        KIND,
        header,
        {"model": model.state_dict(), "anchor": memory.anchor, "importance": memory.importance},
    )


def load_checkpoint(path: Path, model: nn.Module, *, fingerprint: str) -> tuple[Memory, int]:
    """Put the weights into `model`; returns the memory and how many tasks it has learned. No file: none learned.

    Raises:
        MemoryFileError: the file is damaged.
        MemsynError: it is of other settings.
    """
    if not path.exists():
        return Memory.empty(), 0
    header, groups = read(path, KIND)
    if header["fingerprint"] != fingerprint:
        raise MemsynError(f"{path} is of other settings. Use another --out, or remove the folder.")
    model.load_state_dict(groups["model"])
    history = tuple(record(Consolidation, entry) for entry in header["history"])
    return Memory(groups["anchor"], groups["importance"], history, header["counts"]), header["num_tasks"]
