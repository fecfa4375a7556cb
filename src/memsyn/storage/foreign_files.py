"""Tensors in files that other code wrote: dicts of `torch.save`, safetensors, and .npz.

Owns that reading takes no more memory than the file's size and a little, never waits, and creates only tensors and
plain containers. Must not know what the tensors mean.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from memsyn.errors import MemoryFileError, MissingFileError
from memsyn.storage.atomic_files import check_regular, open_file

INFLATED: Final = 50_000_000
"""By how many bytes the arrays of a compressed .npz may exceed the file: a bomb of 0.8 MB holds 800 MB of zeros."""

_VIEWS: Final = 2
"""How often the bytes of a file may be in its tensors: a tied weight may be there transposed, too."""

_GLOBALS: Final = frozenset(
    [
        *("collections OrderedDict", "torch Size", "torch Tensor", "torch device", "torch.nn.parameter Parameter"),
        *("torch.storage UntypedStorage", "torch.storage TypedStorage", "torch._tensor _rebuild_from_type_v2"),
        *("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_sparse_tensor"),
        *("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"),
        *("torch.serialization _get_layout", "torch._utils _rebuild_meta_tensor_no_storage"),
    ]
)
"""What a file of tensors needs. `weights_only` allows more, such as bytearray(10**10) in 40 bytes."""

_NUM_PICKLES: Final = 5
"""In a file of before torch 1.6: a magic number, the protocol, the machine, the object, and the keys of storages."""


def load_dict(path: Path) -> Mapping[Any, Any]:
    """The dict that `torch.save` wrote, with its tensors left on the disk if the file is not of before torch 1.6.

    Raises:
        MissingFileError: there is no such file.
        MemoryFileError: the file is damaged, compressed, or holds anything but plain containers of tensors.
    """
    try:
        with open_file(path) as (file, size):
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            refused = _refused_zip(file, size) if is_zip else _refused_pickles(file, _NUM_PICKLES)
        if refused is None:
            plain = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist.") from None
    except Exception as error:  # a damaged or hostile file can make torch raise anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise MemoryFileError(f"{path} could not be read by torch ({reason}).") from error
    if refused is not None:
        raise MemoryFileError(f"{path} {refused}.")
    if not isinstance(plain, Mapping) or not plain:
        raise MemoryFileError(f"{path} holds no dict of tensors.")
    return plain


def _refused_zip(file: IO[bytes], size: int) -> str | None:
    """Why an archive of `torch.save` is not read; None if it is. Torch compresses nothing."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            return "is compressed, or its parts overlap, which torch.save does not do: save it again"
        if len(pickles) != 1 or archive.comment:
            return "is no archive of torch.save"
        with archive.open(pickles[0]) as stream:
            return _refused_pickles(stream, 1)


def _refused_pickles(stream: IO[bytes], count: int) -> str | None:
    """Why pickles are not read: they name something else than tensors. Nothing is run here."""
    for _ in range(count):
        for opcode, argument, _position in pickletools.genops(stream):
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                return f"holds objects ({opcode.name})"
            if opcode.name == "GLOBAL" and not _is_known(str(argument)):
                return f"holds objects ({argument!s:.80})"
    return None


def _is_known(name: str) -> bool:
    module, _, own = name.partition(" ")
    is_of_torch = module == "torch" and (own.endswith("Storage") or isinstance(getattr(torch, own, None), torch.dtype))
    return name in _GLOBALS or is_of_torch


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of safetensors.

    Raises:
        MissingFileError, MemoryFileError: there is no such file, or it cannot be read.
    """
    try:
        check_regular(path)
        return load_file(path)
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist.") from None
    except Exception as error:
        raise MemoryFileError(f"{path} could not be read: {error}. Give a file of safetensors.") from error


def load_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz.

    Raises:
        MissingFileError, MemoryFileError: there is no such file, it cannot be read, or is compressed by too much.
    """
    try:
        with open_file(path) as (file, size), np.load(file, allow_pickle=False) as arrays:
            needed = sum(entry.file_size for entry in arrays.zip.infolist())
            if needed <= size + INFLATED:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist.") from None
    except Exception as error:
        raise MemoryFileError(f"{path} could not be read: {error}. Give arrays of numbers, by np.savez.") from error
    raise MemoryFileError(
        f"{path} has {size} bytes, and {needed} when inflated: at most {INFLATED} more are allowed. Write it by "
        "np.savez, without compression."
    )


def check_size(path: Path, tensors: Iterable[Tensor]) -> None:
    """Refuse tensors that need more memory than their file has bytes, as a view that repeats one number does.

    Raises:
        MemoryFileError: says so.
    """
    views = {
        (own.untyped_storage().data_ptr(), own.storage_offset(), own.shape, own.stride()): own.numel()
        * own.element_size()
        for own in tensors
    }
    size = path.stat().st_size
    if sum(views.values()) > _VIEWS * size:
        raise MemoryFileError(f"{path} has {size} bytes, and holds tensors of {sum(views.values())}: save it again.")
