"""The header of a safetensors file: written from tensors, and parsed back with every offset checked.

Owns the rules of https://github.com/huggingface/safetensors#format. Must not open a file. The importance of a
Linear(3, 2) in float32 takes 552 bytes; each tensor starts where the one before ends:

    bytes 0 to 7       00 02 00 00 00 00 00 00: the header's length, 64 bits, little-endian, here 512
    bytes 8 to 519     the header: JSON without line breaks, with spaces at its end up to a multiple of 8
                       {"__metadata__": {"memsyn": "{...}"},
                        "sum/0.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                        "sum/0.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}}
    bytes 520 to 527   sum/0.bias: offset 0 is the first byte after the header
    bytes 528 to 551   sum/0.weight
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
"""The dtypes that a file may hold, by their names in safetensors."""

_CODES: Final = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER: Final = 100_000_000
"""Bytes; the safetensors package reads no longer header."""
_MAX_DIMENSIONS: Final = 64
"""The most that torch computes with."""


class StoredTensor(NamedTuple):
    """One tensor as the header describes it; `key` is `<group>/<parameter>`."""

    key: str
    dtype: torch.dtype
    shape: list[int]


def arranged(path: object, tensors: Mapping[str, Tensor]) -> list[StoredTensor]:
    """The order of the tensors in the file, so that each is aligned: wide dtypes first, then by name."""
    for key, tensor in tensors.items():
        if tensor.dtype not in _CODES or tensor.layout is not torch.strided:
            raise MemoryFileError(
                f"{path} cannot hold {key}, which is {tensor.dtype} and {tensor.layout}; a file holds dense tensors of "
                f"{', '.join(str(dtype) for dtype in DTYPES.values())}."
            )
    keys = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    return [StoredTensor(key, tensors[key].dtype, list(tensors[key].shape)) for key in keys]


def header_bytes(path: object, metadata: Mapping[str, str], stored: list[StoredTensor]) -> bytes:
    """The bytes before the tensors: the header's length, then the header with its metadata."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for each in stored:
        end = start + num_bytes(each)
        header[each.key] = {"dtype": _CODES[each.dtype], "shape": each.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # Spaces up to a multiple of 8, so that the tensors are aligned: 13 bytes get 3, since -13 % 8 is 3.
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise MemoryFileError(
            f"{path} would need a header of {len(text)} bytes; at most {MAX_HEADER} are allowed. Save fewer tensors."
        )
    return struct.pack("<Q", len(text)) + text


def parse(text: str) -> Any:
    """Strict JSON: no key twice in an object, no NaN or infinity, only text that can be encoded as UTF-8."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("an object has a key twice")
        for name, value in pairs:
            # JSON may hold half of a surrogate pair, such as "\ud800". Python reads it, but cannot print or write it.
            (f"{name}{value}" if isinstance(value, str) else name).encode()
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, object_pairs_hook=once, parse_constant=refuse)


def laid_out(path: object, header: Mapping[str, Any]) -> tuple[list[StoredTensor], int]:
    """The tensors of a header in the order of their bytes, and the offset at which the last one ends."""
    stored, end = [], 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, stop) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if (
            dtype is None
            or len(shape) > _MAX_DIMENSIONS
            or any(type(length) is not int or not 0 <= length < 2**63 for length in shape)
        ):
            raise MemoryFileError(
                f"{path}: {key} has dtype {entry['dtype']!r:.40} and shape {shape!r:.80}; expected one of "
                f"{', '.join(DTYPES)}, and at most {_MAX_DIMENSIONS} lengths. Restore it from a copy."
            )
        each = StoredTensor(key, dtype, list(shape))
        if type(stop) is not int or start != end or stop - end != num_bytes(each):
            raise MemoryFileError(
                f"{path}: {key} should take {num_bytes(each)} bytes from {end} on; its offsets are {start!r:.40} and "
                f"{stop!r:.40}. Restore it from a copy."
            )
        stored.append(each)
        end = stop
    return stored, end


def num_bytes(stored: StoredTensor) -> int:
    """The length of a tensor in a file."""
    return math.prod(stored.shape) * stored.dtype.itemsize
