"""Checkpoints of models in safetensors: read one tensor at a time, and written one tensor at a time.

Owns files and Hugging Face folders that are larger than memory. Must not know parameters. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memsyn.errors import MemoryFileError, MissingFileError
from memsyn.storage.atomic_files import check_regular, replace_file
from memsyn.storage.safetensors_header import StoredTensor, arranged, header_bytes, num_bytes

INDEX: Final = "model.safetensors.index.json"
"""The file of a Hugging Face folder that says which shard holds a tensor."""

WHOLE: Final = "model.safetensors"


@final
class StoredWeights(Mapping[str, Tensor]):
    """A state_dict in a file of safetensors, or in a Hugging Face folder of one file or several shards.

    A tensor is read when it is asked for, and not kept.

    Args:
        path: the file or folder.

    Raises:
        MissingFileError: there is no such file, or no safetensors in the folder.
        MemoryFileError: a file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._files: dict[str, Any] = {}
        for file in _files_of(self._path):
            try:
                check_regular(file)
                opened: Any = safe_open(file, framework="pt")
                self._files |= dict.fromkeys(opened.keys(), opened)
            except (SafetensorError, OSError, RuntimeError, ValueError) as error:
                raise MemoryFileError(
                    f"{file} could not be read as safetensors: {error}. Other formats: load the model and save it with "
                    "safetensors.torch.save_model."
                ) from error

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._files[name].get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"StoredWeights({str(self._path)!r}, {len(self)} tensors)"

    def like(self, name: str) -> Tensor:
        """A tensor of the same shape and dtype without values; nothing is read."""
        part = self._files[name].get_slice(name)
        # No row is read: of (4096, 4096) this is (0, 4096).
        dtype = part[:0].dtype if part.get_shape() else self[name].dtype
        return torch.empty(part.get_shape(), dtype=dtype, device="meta")


def _files_of(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        MissingFileError, MemoryFileError: there are none, or a shard is missing.
    """
    if not path.is_dir():
        if not path.exists():
            raise MissingFileError(f"{path} does not exist.")
        return [path]
    index = path / INDEX
    if not index.exists():
        files = [path / WHOLE] if (path / WHOLE).exists() else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise MissingFileError(
                f"the folder {path} holds {len(files)} files of safetensors and no {INDEX}: expected {WHOLE}, or "
                "shards with their index. Save the model with save_pretrained."
            )
        return files
    try:
        check_regular(index)
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [path / Path(name).name for name in dict.fromkeys(names)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise MemoryFileError(f"{index} could not be read: {type(error).__name__}: {error}.") from error
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        raise MissingFileError(f"{index} names {len(missing)} files that do not exist, the first is {missing[0]}.")
    return files


def write_weights(path: Path, like: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file of safetensors atomically; one tensor is in memory at a time.

    Args:
        path: the file.
        like: name -> a tensor of the same shape and dtype, which may be on the device `meta`.
        tensors: the tensors, in any order.

    Raises:
        MemoryFileError: the file cannot be written; an old file stays whole.
    """
    stored = arranged(path, like)
    head = header_bytes(path, {"format": "pt"}, stored)
    starts, end = dict[str, int](), len(head)
    for each in stored:
        starts[each.key], end = end, end + num_bytes(each)
    try:
        with replace_file(path) as file:
            file.write(head)
            file.truncate(end)
            for name, tensor in tensors:
                expected = StoredTensor(name, like[name].dtype, list(like[name].shape))
                assert expected == StoredTensor(name, tensor.dtype, list(tensor.shape))
                file.seek(starts.pop(name))
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        raise MemoryFileError(
            f"{path} could not be written: {error}. A file that was there before is whole."
        ) from error
    assert not starts
