"""Reading and writing of memsyn files: one safetensors file each, nothing pickled.

Owns the format, its checksum and its version, and the checks on the way in. A file holds tensors named
`<group>/<parameter>` and one metadata entry, `memsyn`, a JSON object: kind, format, version of memsyn, checksum, and
what the caller gave. Must not know what the tensors mean.

The rule of formats: a memsyn reads every format up to its own, and refuses a newer one. `FORMAT` is raised when what an
older memsyn would read is not what was meant. Within a format, entries of the header and fields of its records may be
added, never removed; a reader ignores those that it does not know, and those that were added have defaults.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from importlib.metadata import version
from types import ModuleType
from typing import Any, BinaryIO, Final, TypeVar, get_type_hints

import torch
from torch import Tensor

from memsyn.errors import MemoryFileError, MissingFileError
from memsyn.storage import atomic_files
from memsyn.storage.safetensors_header import MAX_HEADER, Place, arranged, header_bytes, laid_out, parse

FORMAT: Final = 1
"""What is written; see the rule above."""

IMPORTANCE: Final = "importance"
MEMORY: Final = "memory"

_PREFIX: Final = "sha256:"
_BLANK: Final = _PREFIX + "0" * 64
_CHUNK: Final = 2**20
"""How many weights are looked at together."""
_BAD_INPUT: Final = (
    OSError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
)
"""What Python and torch raise on a file that is not as it should be."""

Groups = dict[str, dict[str, Tensor]]
Record = TypeVar("Record")


def write(
    path: str | os.PathLike[str],
    kind: str,
    header: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write a file atomically, tensor by tensor.

    A local one through a temporary file beside it, fsync, rename, fsync of the folder: a crash leaves the old file or
    the new one, whole. One at a URL is written to a local temporary file, then uploaded: object stores (`s3://`,
    `gs://`) show the old one until all of the new one has arrived; a server without that (`sftp://`, `ftp://`) may be
    left with half a file, which does not load. The checksum is the SHA-256 of all bytes of the file with the
    checksum's own digits set to zero. Memory needed: one tensor's, if it is not contiguous on the CPU.

    Raises:
        MemoryFileError: it cannot be written, or holds what could not be read again; an old file stays whole.
    """
    tensors = {f"{group}/{name}": tensor for group, members in groups.items() for name, tensor in members.items()}
    entry = {
        **header,
        "kind": kind,
        "format": FORMAT,
        "memsyn": version("memsyn"),
        "groups": {group: list(members) for group, members in groups.items()},  # in the model's order
        "checksum": _BLANK,
    }
    try:
        places = arranged(path, tensors)
        head = header_bytes(path, json.dumps(entry, sort_keys=True, allow_nan=False), places)
        with _where(path).replaced(path) as file:
            digest = hashlib.sha256(head)
            file.write(head)
            for key, _, _ in places:
                _check_dtype(path, key, tensors[key].dtype)
                for piece in _pieces(tensors[key]):
                    _check_values(path, key, piece)
                    data = _bytes_of(piece)
                    digest.update(data)
                    file.write(data)
            file.seek(head.index(_BLANK.encode()))
            file.write(f"{_PREFIX}{digest.hexdigest()}".encode())
    except MemoryFileError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # of the disk, of a name, of moving a tensor to the CPU
        raise MemoryFileError(
            f"{path} could not be written: {error}. A file that was there before is whole."
        ) from error


def read(path: str | os.PathLike[str], kind: str | None = None) -> tuple[dict[str, Any], Groups]:
    """Read and check a file, in one pass: version, kind, names, shapes, checksum, finite values.

    Memory needed: that of the tensors, and some 50 bytes for each of the header's, whatever is in the file.

    Args:
        path: the file, or its URL.
        kind: what it must be, `IMPORTANCE` or `MEMORY`; None for either.

    Returns:
        Its header, and its tensors by group and parameter name, on the CPU.

    Raises:
        MemoryFileError: anything is not as it must be; says what.
    """
    try:
        with _where(path).opened(path) as (file, size):
            head, header, places = _read_header(path, file, size)
            _check_header(path, header, kind)
            digest = hashlib.sha256(head.replace(header["checksum"].encode(), _BLANK.encode(), 1))
            tensors = {place.key: _read_tensor(path, place, file, digest) for place in places}
        if header["checksum"] != f"{_PREFIX}{digest.hexdigest()}":
            raise MemoryFileError(
                f"{path} is damaged: its checksum is not that of its content. Restore it from a copy."
            )
        for key, tensor in tensors.items():
            _check_dtype(path, key, tensor.dtype)
            for piece in _pieces(tensor):
                _check_values(path, key, piece)
        return header, _grouped(path, header["groups"], tensors)
    except MemoryFileError:
        raise
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist.") from None
    except _BAD_INPUT as error:
        raise MemoryFileError(f"{path} could not be read: {type(error).__name__}: {error}.") from error


@contextmanager
def well_formed(path: str | os.PathLike[str]) -> Iterator[None]:
    """While open, a header or tensors that are not as they should be are the file's fault."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise MemoryFileError(f"{path} is not as memsyn writes it: {type(error).__name__}: {error}.") from error


def record(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """A dataclass from a header, by the rule of formats: unknown fields are ignored, missing ones get their defaults.

    Raises:
        ValueError: a field without a default is missing, or one is of another type, not finite, or no count.
    """
    hints, found = get_type_hints(kind), {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            value, hint = values[field.name], hints[field.name]
            if isinstance(value, bool) or not isinstance(value, hint | int if hint == float | None else hint):
                raise ValueError(f"{field.name} is {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}")
            found[field.name] = checked_count(value) if field.name.startswith("num_") else value
        elif field.default is MISSING:
            raise ValueError(f"{field.name} is missing")
    return kind(**found)


def checked_count(value: Any) -> int:
    """A number of samples from a header: from 0 to 2^63 - 1.

    Raises:
        ValueError: it is anything else.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"expected a count, got {value!r:.40}")
    return value


def _where(path: str | os.PathLike[str]) -> ModuleType:
    """The module that opens and replaces what is at a path or a URL."""
    if "://" not in str(path):
        return atomic_files
    from memsyn.storage import urls  # needs fsspec, which plain paths do not

    return urls


def _read_header(path: object, file: BinaryIO, size: int) -> tuple[bytes, dict[str, Any], list[Place]]:
    """The bytes before the tensors, the metadata in them, and the tensors they name, in the file's order."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(size - 8, MAX_HEADER):
        raise MemoryFileError(
            f"{path} is truncated, or was not written by memsyn: it has {size} bytes, and no whole safetensors header."
        )
    text = file.read(length)
    try:
        header = parse(text.decode())
        entry = parse(header.pop("__metadata__")["memsyn"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MemoryFileError(f"{path} was not written by memsyn: it has no memsyn metadata.") from None
    if not isinstance(entry, dict):
        raise MemoryFileError(f"{path} was not written by memsyn: its memsyn metadata is no object.")
    places, end = laid_out(path, header)
    if 8 + length + end != size:
        raise MemoryFileError(
            f"{path} is truncated, or longer than it was: expected {8 + length + end} bytes, got {size}. Restore it "
            "from a copy."
        )
    return start + text, entry, places


def _check_header(path: object, header: Mapping[str, Any], kind: str | None) -> None:
    written = header.get("format")
    if type(written) is not int or written < 1:
        raise MemoryFileError(f"{path} was not written by memsyn: its metadata names no format.")
    if written > FORMAT:
        raise MemoryFileError(
            f"{path} has format {written}, written by memsyn {header.get('memsyn')!s:.40}; this memsyn "
            f"({version('memsyn')}) reads up to format {FORMAT}. Upgrade memsyn to read it."
        )
    if kind is not None and header["kind"] != kind:
        raise MemoryFileError(f"{path} is of kind {header['kind']!r:.40}; expected {kind!r}.")


def _read_tensor(path: object, place: Place, file: BinaryIO, digest: Any) -> Tensor:
    """The next tensor of a file, whose bytes are added to `digest`."""
    tensor = torch.empty(place.shape, dtype=place.dtype, device="cpu")
    for piece in _pieces(tensor):
        data = _bytes_of(piece)
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise MemoryFileError(f"{path} became shorter while it was read. Read it again.")
        digest.update(data)
    return tensor


def _grouped(path: object, names: Mapping[str, list[str]], tensors: Mapping[str, Tensor]) -> Groups:
    """The tensors of a file by group, in the order of `names`, all of them and no others."""
    keys = [f"{group}/{name}" for group, members in names.items() for name in members]
    lists = all(isinstance(members, list) for members in names.values())
    if not lists or len(set(keys)) != len(keys) or set(keys) != set(tensors):
        raise MemoryFileError(f"{path}: its tensors are not those that its metadata names.")
    return {group: {name: tensors[f"{group}/{name}"] for name in members} for group, members in names.items()}


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers in order, flat, on the CPU, some at a time; no copy is made of what is contiguous there."""
    if type(tensor).__name__ == "DTensor":  # its class is slow to import
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        yield flat[start : start + _CHUNK]


def _bytes_of(piece: Tensor) -> memoryview:
    return piece.view(torch.uint8).numpy().data


def _check_dtype(path: object, key: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point and key.startswith(("importance/", "anchor/")):
        raise MemoryFileError(f"{path}: {key} is {dtype}; expected a floating point type.")


def _check_values(path: object, key: str, piece: Tensor) -> None:
    if not piece.dtype.is_floating_point:
        return
    low, high = (piece if piece.dtype.itemsize > 2 else piece.float()).aminmax()
    if not math.isfinite(low) or not math.isfinite(high):
        raise MemoryFileError(f"{path}: {key} holds NaN or infinite values; all must be finite.")
    if key.startswith("importance/") and low < 0:
        raise MemoryFileError(f"{path}: {key} holds negative values; importance is never negative.")
