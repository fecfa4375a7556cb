"""Values in checkpoints of torch.distributed.checkpoint: each process writes and reads its own parts.

Owns the entries of a value in a checkpoint, and reads them without being told their shapes. Must not know parameters or
models. Torch keeps the names and shapes in a pickled file, `.metadata`; the values and our header are tensors. A memory
at `memory` in the dict that is saved has the entries

    memory.memsyn                the header: the JSON of a file's metadata, as bytes
    memory.anchor/0.weight       the tensors, named as in a file
    memory.importance/0.weight
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from memsyn.errors import MemoryFileError, MissingFileError
from memsyn.storage.reading_and_writing import Groups, by_key, check_header, checked_groups, entry_text
from memsyn.storage.safetensors_header import parse

HEADER: Final = "memsyn"
"""The entry that holds the header."""

Allocate = Callable[[Mapping[str, Any], str, torch.Size, torch.dtype], Tensor]
"""(header, `<group>/<parameter>`, shape, dtype) -> a tensor without values, sharded or whole."""


def checkpoint_entries(
    kind: str, header: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The entries of a value in a checkpoint: its tensors as they are, and the header."""
    text = entry_text(kind, header, groups, {})
    return {HEADER: torch.tensor(list(text.encode()), dtype=torch.uint8), **by_key(kind, groups)}


def read_checkpoint(
    folder: str | os.PathLike[str], key: str | None, kind: str, allocate: Allocate
) -> tuple[dict[str, Any], Groups]:
    """Read a value from a checkpoint. Each process reads what it holds; no process talks to another.

    Args:
        folder: the checkpoint.
        key: where the value is in the dict that was saved, such as `memory`; "" if it is the dict; None to look for it.
        kind: the kind that is expected.
        allocate: makes the tensors that are filled.

    Raises:
        MissingFileError: there is no such checkpoint.
        MemoryFileError: it cannot be read, or does not hold the value.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
        known = {name: own for name, own in entries.items() if isinstance(own, TensorStorageMetadata)}
    except FileNotFoundError:
        raise MissingFileError(f"{folder} is no checkpoint of torch.distributed.checkpoint.") from None
    except Exception as error:  # a damaged pickle can make torch raise anything
        raise MemoryFileError(f"{folder} could not be read: {type(error).__name__}: {error}.") from error
    place = _place(folder, key, known)
    try:
        text = _filled(folder, {place + HEADER: torch.empty(known[place + HEADER].size, dtype=torch.uint8)})
        header = parse(bytes(text[place + HEADER].tolist()).decode())
        check_header(folder, header, kind)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise MemoryFileError(f"{folder}: {place}{HEADER} is no header of memsyn: {error}.") from error
    names = [name for name in known if name.startswith(place) and name != place + HEADER and "/" in name]
    empty = {
        name: allocate(header, name.removeprefix(place), known[name].size, known[name].properties.dtype)
        for name in names
        if "." not in name.removeprefix(place).partition("/")[0]
    }
    tensors = {name.removeprefix(place): tensor for name, tensor in _filled(folder, empty).items()}
    return header, checked_groups(folder, header, tensors)


def _place(folder: object, key: str | None, known: Mapping[str, Any]) -> str:
    """What stands in front of a value's entries, `memory.` or nothing.

    Raises:
        MemoryFileError: the checkpoint holds no such value, or several.
    """
    places = sorted(name.removesuffix(HEADER) for name in known if name == HEADER or name.endswith(f".{HEADER}"))
    chosen = places if key is None else [place for place in places if place == (f"{key}." if key else "")]
    if len(chosen) != 1:
        keys = ", ".join(repr(place.removesuffix(".")) for place in places) or "none"
        raise MemoryFileError(
            f"{folder}: expected one value of memsyn{'' if key is None else f' at {key!r}'}; it holds some at: {keys}. "
            "Save value.state_dict() with torch.distributed.checkpoint, and say which one is meant with key=."
        )
    return chosen[0]


def _filled(folder: str | os.PathLike[str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the values that the checkpoint has for them, in-place.

    Raises:
        MemoryFileError: it cannot be read.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    # The steps of `torch.distributed.checkpoint.load` for one process: what it holds decides what it reads.
    try:
        reader, planner = FileSystemReader(folder), DefaultLoadPlanner()
        known = reader.read_metadata()
        planner.set_up_planner(tensors, known, is_coordinator=True)
        reader.set_up_storage_reader(known, is_coordinator=True)
        plan = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])[0]
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except Exception as error:
        raise MemoryFileError(f"{folder} could not be read: {type(error).__name__}: {error}.") from error
    return tensors
