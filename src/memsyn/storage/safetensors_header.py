"""Where tensors lie in a safetensors file: what its header says, in both directions.

Owns the rules of https://github.com/huggingface/safetensors#format: tensors follow each other without gaps. Must not
open a file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from memsyn.errors import MemoryFileError

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a tensor may be, by safetensors' names."""

_CODES: Final = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER: Final = 100_000_000
"""Bytes, at most; safetensors reads no longer ones."""
_MAX_DIMENSIONS: Final = 64
"""As many as torch computes with."""


class Place(NamedTuple):
    """One tensor of a file; they lie one after the other."""

    key: str
    dtype: torch.dtype
    shape: list[int]


def arranged(path: object, tensors: Mapping[str, Tensor]) -> list[Place]:
    """Where tensors go, so that each is aligned: wide dtypes first, then by name, as safetensors has them."""
    for key, tensor in tensors.items():
        if tensor.dtype not in _CODES or tensor.layout is not torch.strided:
            raise MemoryFileError(
                f"{path} cannot hold {key}, which is {tensor.dtype} and {tensor.layout}; a file holds dense tensors of "
                f"{', '.join(str(dtype) for dtype in DTYPES.values())}."
            )
    keys = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    return [Place(key, tensors[key].dtype, list(tensors[key].shape)) for key in keys]


def header_bytes(path: object, entry: str, places: list[Place]) -> bytes:
    """What stands before the tensors: the header's length, and the header with the metadata `entry`."""
    header: dict[str, Any] = {"__metadata__": {"memsyn": entry}}
    start = 0
    for place in places:
        end = start + num_bytes(place)
        header[place.key] = {"dtype": _CODES[place.dtype], "shape": place.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise MemoryFileError(
            f"{path} would need a header of {len(text)} bytes, and {MAX_HEADER} are the most: too many tensors."
        )
    return struct.pack("<Q", len(text)) + text


def parse(text: str) -> Any:
    """JSON in which nothing is said twice, no number is infinite, and names are what Unicode can write."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice in an object")
        for name, value in pairs:
            (f"{name}{value}" if isinstance(value, str) else name).encode()
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)


def laid_out(path: object, header: Mapping[str, Any]) -> tuple[list[Place], int]:
    """The tensors of a header in the order of their bytes, and where the last one ends."""
    places, end = [], 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if (
            dtype is None
            or len(shape) > _MAX_DIMENSIONS
            or any(type(length) is not int or not 0 <= length < 2**63 for length in shape)
        ):
            raise MemoryFileError(f"{path}: {key} is of dtype {entry['dtype']!r:.40} and shape {shape!r:.80}.")
        place = Place(key, dtype, list(shape))
        if type(stop) is not int or start != end or stop - end != num_bytes(place):
            raise MemoryFileError(
                f"{path}: {key} should take {num_bytes(place)} bytes from {end} on; its offsets are {start!r:.40} and "
                f"{stop!r:.40}."
            )
        places.append(place)
        end = stop
    return places, end


def num_bytes(place: Place) -> int:
    """How long a tensor is in a file."""
    return math.prod(place.shape) * place.dtype.itemsize
