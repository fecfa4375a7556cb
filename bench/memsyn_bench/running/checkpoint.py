"""The state of a run after its last finished task: one file, written after each task.

Holds the model's weights and what the method has kept together, so that they are always of the same task. The optimizer
is fresh with every task and the random numbers are drawn from (seed, task): neither needs saving.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from memsyn import Memory, MemsynError
from memsyn.storage.reading_and_writing import read, write
from memsyn_bench.methods.method import Method

KIND = "checkpoint"
KEPT = "kept."
"""The prefix of the names of the method's own groups."""


def save_checkpoint(path: Path, model: nn.Module, method: Method, *, num_tasks: int, fingerprint: str) -> None:
    """Write the state after `num_tasks` tasks, atomically.

    Raises:
        MemoryFileError: it cannot be written; the one before it stays.
    """
    memory = method.memory
    header = {"num_tasks": num_tasks, "fingerprint": fingerprint, **memory.header()}
    kept = {KEPT + name: group for name, group in method.kept.items()}
    groups = {"model": model.state_dict(), **memory.groups(), **kept}
    write(path, KIND, header, groups)


def load_checkpoint(path: Path, model: nn.Module, method: Method, *, fingerprint: str) -> int:
    """Load the state into `model` and `method`; return the number of tasks learned, 0 if there is no file.

    Raises:
        MemoryFileError: the file is damaged.
        MemsynError: it is of other settings.
    """
    if not path.exists():
        return 0
    header, groups = read(path, KIND)
    if header["fingerprint"] != fingerprint:
        raise MemsynError(f"{path} is of other settings. Use another --out, or remove the folder.")
    model.load_state_dict(groups["model"])
    memory = Memory.from_file(path, header, groups)
    method.load(memory, {name.removeprefix(KEPT): group for name, group in groups.items() if name.startswith(KEPT)})
    num_tasks: int = header["num_tasks"]
    return num_tasks
