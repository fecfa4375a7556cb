"""Forged files with right checksums, made by rule: each field and each tensor, each with every hostile value."""

import copy
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.sealing import put_together, taken_apart

NUMBERS: list[Any] = [0, -1, 1, 7, 0.5, 1e300, -1e300, 2**53 + 1, 2**63 - 1, 2**63, 2**70, 10**400]
OTHERS: list[Any] = [
    None,
    True,
    False,
    "",
    "x",
    "1",
    "\x1b[2J",
    [],
    {},
    [1],
    {"a": 1},
    [[]],
    float("nan"),
    float("inf"),
]
"""JSON has no NaN and no infinity; Python writes and reads them."""

DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "I64": 8, "I32": 4,
    "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
"""Code of safetensors -> bytes a number."""

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "U8": torch.uint8}


class Forgery(NamedTuple):
    """A file, and what was changed in it: the path of a field, or of a tensor, and how."""

    field: str
    how: str
    content: bytes

    def __str__(self) -> str:
        return f"{self.field}: {self.how}"


def forgeries(whole: bytes) -> Iterator[Forgery]:
    """All forgeries of a file."""
    yield from forged_fields(whole)
    yield from forged_tensors(whole)


def forged_fields(whole: bytes) -> Iterator[Forgery]:
    """Each field of the metadata with every hostile value, and without it; each key under another name."""
    entry, header, data = taken_apart(whole)
    for path in _paths(entry):
        if path == ("checksum",):
            continue
        for value in [*NUMBERS, *OTHERS]:
            if type(value) is not type(_at(entry, path)) or value != _at(entry, path):
                yield Forgery(_name(path), f"{value!r:.40}", put_together(_with(entry, path, value), header, data))
        yield Forgery(_name(path), "is missing", put_together(_with(entry, path), header, data))
        if isinstance(_at(entry, path[:-1]), dict):
            other = _with(entry, path)
            _at(other, path[:-1])["elsewhere"] = copy.deepcopy(_at(entry, path))
            yield Forgery(_name(path), "has another name", put_together(other, header, data))


def forged_tensors(whole: bytes) -> Iterator[Forgery]:
    """Each tensor in every dtype and many shapes, with hostile numbers; and without it, or with another one."""
    entry, header, data = taken_apart(whole)
    for key, place in header.items():
        start, end = place["data_offsets"]
        for dtype, size in DTYPES.items():
            if dtype != place["dtype"]:
                count = (end - start) / size
                if count == int(count):
                    yield _placed(
                        entry, header, data, key, {**place, "dtype": dtype, "shape": [int(count)]}, "bytes as"
                    )
        for how, content, dtype, shape in _values(place, data[start:end]):
            yield _replaced(entry, header, data, key, content, {"dtype": dtype, "shape": shape}, how)
        yield _replaced(entry, header, data, key, None, {}, "is missing")


def _values(place: dict[str, Any], content: bytes) -> Iterator[tuple[str, bytes, str, list[int]]]:
    """How, and the bytes, dtype and shape of a tensor in place of another."""
    code, shape = place["dtype"], place["shape"]
    if code not in TYPES:
        return
    dtype = TYPES[code]
    tensor = (
        torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)
    )
    for other, own in TYPES.items():
        if own != dtype:
            yield f"converted to {other}", _bytes(tensor.to(own)), other, shape
    count = math.prod(shape)
    shapes: list[list[int]] = [
        [],
        [1],
        [count],
        [*shape, 1],
        [1, *shape],
        shape[::-1],
        [0],
        [0, *shape[1:]],
        [count, 0],
        [3],
    ]
    for own in shapes:
        if own != shape:
            flat = tensor.flatten().repeat(1 + math.prod(own) // max(1, count)) if count else torch.ones(math.prod(own))
            yield f"of shape {own}", _bytes(flat[: math.prod(own)].to(dtype)), code, own
    if not tensor.is_floating_point():
        return
    wide = tensor.double()
    for how, number in [
        ("nan", float("nan")), ("inf", float("inf")), ("-inf", -float("inf")), ("-1", -1.0), ("-0", -0.0),
        ("tiny", 1e-45), ("largest", torch.finfo(dtype).max), ("0", 0.0),
    ]:  # fmt: skip
        if count:
            first = wide.clone().flatten()
            first[0] = number
            yield f"first is {how}", _bytes(first.reshape(shape).to(dtype)), code, shape
            yield f"all are {how}", _bytes(torch.full(shape, number, dtype=dtype)), code, shape
    if count:
        yield "negative", _bytes(-tensor), code, shape
        yield "reversed", _bytes(tensor.flatten().flip(0).reshape(shape)), code, shape


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _placed(entry: Any, header: Any, data: bytes, key: str, place: Any, how: str) -> Forgery:
    content = put_together(entry, {**header, key: place}, data)
    return Forgery(key, f"{how} {place['dtype']}", content)


def _replaced(
    entry: dict[str, Any], header: dict[str, Any], data: bytes, key: str, content: bytes | None, place: Any, how: str
) -> Forgery:
    """The file with other bytes for one tensor, or without it; all others move."""
    parts, found, end = [], {}, 0
    for name, own in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = own["data_offsets"]
        part: bytes | None = data[start:stop]
        if name == key:
            part, own = content, {**own, **place}
        if part is not None:
            found[name] = {**own, "data_offsets": [end, end + len(part)]}
            end += len(part)
            parts.append(part)
    if content is None:
        group, _, name = key.partition("/")
        entry = {**entry, "groups": {g: [n for n in m if (g, n) != (group, name)] for g, m in entry["groups"].items()}}
    return Forgery(key, how, put_together(entry, found, b"".join(parts)))


def _paths(node: Any, start: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield (*start, key)
        yield from _paths(node[key], (*start, key))


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


MISSING = object()


def _with(entry: Any, path: tuple[Any, ...], value: Any = MISSING) -> Any:
    """A copy with another value at a path; without a value, it is left out."""
    found = copy.deepcopy(entry)
    parent = _at(found, path[:-1])
    if value is MISSING:
        del parent[path[-1]]
    else:
        parent[path[-1]] = copy.deepcopy(value)
    return found


def _name(path: tuple[Any, ...]) -> str:
    return json.dumps(path)[1:-1].replace('"', "").replace(", ", ".")
