"""Reads and writes memsyn files: one safetensors file each, nothing pickled.

Owns the format, its checksum and version, and the checks of what is read. Must not know parameters or models. A file
holds tensors named `<group>/<parameter>` and one metadata entry `memsyn`, a JSON object with the kind, the format, the
version of memsyn, the checksum, and the caller's own entries:

    importance file    sum/0.weight            the sum over samples of |gradient|, not divided
    memory file        importance/0.weight     Omega, the mean over samples
                       anchor/0.weight         theta*, the weights at the last consolidation
                       statistics/1.running_mean   buffers at the last consolidation; no group if there are none
                       input_values/0.weight   and the other groups of `values.directions.GROUPS`
    factors file       moments/inputs/0.weight and the other sums of `KroneckerFactors`

Callers say `importance` for both; `_stored_name` translates. Format 1 wrote `importance/` for the sum too.

The rule of formats: each memsyn reads every format up to its own and refuses a newer one. `FORMAT` is raised when an
older memsyn would misread the file. Within a format, entries of the header and fields of its records may be added,
never removed; a reader ignores entries it does not know, and added ones have defaults.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import MISSING, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar, get_type_hints

import torch
from torch import Tensor

from memsyn.errors import MemoryFileError, MissingFileError
from memsyn.sharding.exchange import first_process, is_first, pieces_on_first, text_told_by
from memsyn.sharding.parts import local_part, one_sharded
from memsyn.storage.atomic_files import open_file, replace_file
from memsyn.storage.safetensors_header import (
    MAX_HEADER,
    StoredTensor,
    arranged,
    header_bytes,
    laid_out,
    num_bytes,
    parse,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

FORMAT: Final = 2
"""The format that is written; see the rule above."""

IMPORTANCE: Final = "importance"
MEMORY: Final = "memory"
FACTORS: Final = "factors"

_SUM: Final = "sum"
_ANCHOR: Final = "anchor"
STATISTICS: Final = "statistics"
MOMENTS: Final = "moments"

_COMPUTED: Final = frozenset(
    [_SUM, IMPORTANCE, _ANCHOR, "remainder", MOMENTS, "diagonal"]
    + [f"{side}_{part}" for side in ("input", "output") for part in ("values", "rest", "vectors")]
)
"""The groups whose tensors are computed with."""
_COMPUTED_TYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_PREFIX: Final = "sha256:"
_BLANK: Final = _PREFIX + "0" * 64
"""What stands in the header while the checksum is computed."""
_MAX_GROUPS: Final = 64
"""Far more than any kind of file has."""
_CHUNK: Final = 2**20
"""How many weights are checked, hashed and written at a time."""
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
"""What Python and torch raise on a damaged or hostile file."""

Groups = dict[str, dict[str, Tensor]]
"""Group -> parameter name -> tensor."""
Record = TypeVar("Record")
Plain = TypeVar("Plain")


def write(
    path: str | os.PathLike[str],
    kind: str,
    header: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write a file atomically, tensor by tensor.

    A local file is written to a temporary file beside it, synced and renamed: a crash leaves the old file or the new
    one, whole. A file at a URL is written to a local temporary file, then uploaded: object stores (`s3://`, `gs://`)
    show the old file until the new one has arrived completely; a server without that (`sftp://`, `ftp://`) may be left
    with half a file, which does not load. Memory needed: a copy of one tensor, if it is not contiguous on the CPU.

    If a tensor is sharded, all processes must call it together. The first process writes the file; the others send it
    their parts, in pieces, and raise its error if it fails. No tensor is gathered, and the bytes are those that one
    process would write.

    Args:
        path: the file, or its URL.
        kind: `IMPORTANCE`, `MEMORY`, or another.
        header: the caller's entries of the metadata.
        groups: the tensors. The group `importance` holds sums in a file of kind `IMPORTANCE`, means in others.

    Raises:
        MemoryFileError: the file cannot be written, or holds tensors that no file may hold; an old file stays whole.
        ModelError: tensors are cut between different processes.
    """
    tensors = by_key(kind, groups)
    like = one_sharded(tensors.values())
    # The checksum stands inside the bytes it covers. So the file is hashed with a blank in its place:
    #   written and hashed   ..."checksum": "sha256:0000...0000"...tensors
    #   then overwritten     ..."checksum": "sha256:9f3c...51aa"...
    # A reader puts the blank back before it hashes.
    try:
        stored = arranged(path, tensors)
        for each in stored:
            _check_dtype(path, each.key, each.dtype)
        head = header_bytes(path, {"memsyn": entry_text(kind, header, groups, {"checksum": _BLANK})}, stored)
    except ValueError as error:
        raise _not_written(path, error) from error
    pieces = ((key, piece) for key, _, _ in stored for piece in pieces_on_first(tensors[key], _CHUNK))
    if like is None:
        with _writing(path), _replace(path) as file:
            _fill(path, file, head, pieces)
    elif is_first(like):
        _write_for_all(path, head, pieces, like)
    else:
        _told(first_process(like), None, like)  # whether the file is open
        for _ in pieces:
            pass
        _told(first_process(like), None, like)


def by_key(kind: str, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`<group>/<parameter>` -> tensor, as a file of this kind names them."""
    return {
        f"{_stored_name(kind, group)}/{name}": tensor
        for group, members in groups.items()
        for name, tensor in members.items()
    }


def entry_text(
    kind: str, header: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]], more: Mapping[str, Any]
) -> str:
    """The metadata of a file as JSON.

    Raises:
        ValueError: the header holds what JSON does not.
    """
    entry = {
        **header,
        "kind": kind,
        "format": FORMAT,
        "memsyn": version("memsyn"),
        "groups": {_stored_name(kind, group): list(members) for group, members in groups.items()},  # the model's order
        **more,
    }
    return json.dumps(entry, sort_keys=True, allow_nan=False)


def _fill(path: object, file: BinaryIO, head: bytes, pieces: Iterator[tuple[str, Tensor]]) -> None:
    """Write the header, the tensors, and the checksum of both."""
    digest = hashlib.sha256(head)
    file.write(head)
    for key, piece in pieces:
        _check_values(path, key, piece)
        data = _bytes_of(piece)
        digest.update(data)
        file.write(data)
    file.seek(head.index(_BLANK.encode()))
    file.write(f"{_PREFIX}{digest.hexdigest()}".encode())


def _write_for_all(
    path: str | os.PathLike[str], head: bytes, pieces: Iterator[tuple[str, Tensor]], like: DTensor
) -> None:
    """Write a file in the first process; whatever fails, the others are told, and none waits for ever.

    Raises:
        MemoryFileError: the file cannot be written.
    """
    own, opened = first_process(like), False
    error: MemoryFileError | None = None
    try:
        with _writing(path), _replace(path) as file:
            opened = True
            _told(own, None, like)
            _fill(path, file, head, pieces)
    except MemoryFileError as failure:
        error = failure
    if opened:
        for _ in pieces:  # the others go on sending what is left
            pass
    _told(own, error, like)


def _told(rank: int, error: MemoryFileError | None, like: DTensor) -> None:
    """Tell all processes whether the first one has failed.

    Raises:
        MemoryFileError: it has.
    """
    said = text_told_by(rank, "" if error is None else str(error), like)
    if said:
        raise error or MemoryFileError(said)


@contextmanager
def _writing(path: object) -> Iterator[None]:
    """In this block, what writing raises becomes an error about the file."""
    try:
        yield
    except MemoryFileError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # the disk, a name, or moving a tensor to the CPU failed
        raise _not_written(path, error) from error


def _not_written(path: object, error: Exception) -> MemoryFileError:
    return MemoryFileError(f"{path} could not be written: {error}. A file that was there before is whole.")


def read(
    path: str | os.PathLike[str], kind: str | None = None, *, mapped: bool = False
) -> tuple[dict[str, Any], Groups]:
    """Read and check a file, in one pass: format, kind, names, shapes, checksum, finite values.

    Memory needed: the tensors' own, and about 50 bytes for each byte of the header, whatever is in the file.

    Args:
        path: the file, or its URL.
        kind: the kind that is expected; None for any.
        mapped: leave the tensors of a local file on the disk: a page is read when it is used, and given up when memory
            is needed. The file must not be cut short while they are in use.

    Returns:
        The header, and the tensors by group and parameter name, on the CPU. The groups are named as `write` takes them.

    Raises:
        MemoryFileError: the file is missing, damaged, of another kind or of a newer format; says which.
    """
    with _readable(path):
        with _open(path) as (file, size):
            head, header, stored = _read_header(path, file, size)
            check_header(path, header, kind)
            digest = hashlib.sha256(head.replace(header["checksum"].encode(), _BLANK.encode(), 1))
            if mapped and "://" not in str(path):
                tensors = _mapped_tensors(file, len(head), stored, digest)
            else:
                tensors = {each.key: _read_tensor(path, each, file, digest) for each in stored}
        if header["checksum"] != f"{_PREFIX}{digest.hexdigest()}":
            raise MemoryFileError(
                f"{path} is damaged: its checksum does not match its content. Restore it from a copy."
            )
        # Values are checked after the checksum, so that damage is reported as damage and not as a NaN.
        return header, checked_groups(path, header, tensors)


def read_entry(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a file, without its tensors: neither these nor the checksum are checked.

    Raises:
        MemoryFileError: the file is missing, cannot be read, or has no metadata of memsyn.
    """
    with _readable(path), _open(path) as (file, size):
        return _read_header(path, file, size)[1]


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """In this block, what reading a file raises becomes an error about the file."""
    try:
        yield
    except MemoryFileError:
        raise
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist.") from None
    except _BAD_INPUT as error:
        raise MemoryFileError(f"{path} could not be read: {type(error).__name__}: {error}.") from error


@contextmanager
def well_formed(path: str | os.PathLike[str]) -> Iterator[None]:
    """In this block, what Python raises on unexpected headers or tensors becomes an error about the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise MemoryFileError(f"{path} is not as memsyn writes it: {type(error).__name__}: {error}.") from error


def record(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """A dataclass from a header, by the rule of formats: unknown fields are ignored, missing ones get their defaults.

    Raises:
        ValueError: a field without a default is missing, or a field has another type, is not finite, or is not a count.
    """
    hints, found = get_type_hints(kind), {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            value, hint = values[field.name], hints[field.name]
            # In Python, `isinstance(True, int)` holds, so a bool would pass as a number.
            if isinstance(value, bool) or not isinstance(value, hint | int if hint == float | None else hint):
                raise ValueError(f"{field.name} is {value!r:.40}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{field.name} is {value}")
            found[field.name] = checked_count(value, field.name) if field.name.startswith("num_") else value
        elif field.default is MISSING:
            raise ValueError(f"{field.name} is missing")
    return kind(**found)


def checked_count(value: Any, what: str, least: int = 0) -> int:
    """A number of samples from a header, from `least` to 2^63 - 1; `what` names its field.

    Raises:
        ValueError: the value is anything else.
    """
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{what} is {value!r:.40}; expected a count from {least} to 2^63 - 1")
    return value


def checked(kind: type[Plain], value: Any, what: str) -> Plain:
    """A value from a header that must be of this type alone: text, a list or an object; `what` names its field.

    Raises:
        TypeError: it is of another type.
    """
    if type(value) is not kind:
        expected = {str: "text", list: "a list", dict: "an object", bool: "true or false"}[kind]
        raise TypeError(f"{what} is {value!r:.40}; expected {expected}")
    return value


def checked_texts(value: Any, what: str) -> dict[str, str]:
    """Text by name, from a header.

    Raises:
        TypeError: it is something else.
    """
    return {name: checked(str, text, f"{what}.{name}") for name, text in checked(dict, value, what).items()}


def _stored_name(kind: object, group: str, written: int = FORMAT) -> str:
    """The name in a file for a caller's group.

    kind of file   caller's group   format 1      format 2
    importance     importance       importance    sum
    memory         importance       importance    importance
    any            any other        unchanged     unchanged
    """
    return _SUM if written >= 2 and kind == IMPORTANCE and group == IMPORTANCE else group


def _open(path: str | os.PathLike[str]) -> AbstractContextManager[tuple[BinaryIO, int]]:
    if "://" not in str(path):
        return open_file(path)
    from memsyn.storage.urls import open_url  # needs fsspec, which plain paths do not

    return open_url(str(path))


def _replace(path: str | os.PathLike[str]) -> AbstractContextManager[BinaryIO]:
    if "://" not in str(path):
        return replace_file(path)
    from memsyn.storage.urls import replace_url

    return replace_url(str(path))


def _read_header(path: object, file: BinaryIO, size: int) -> tuple[bytes, dict[str, Any], list[StoredTensor]]:
    """The bytes before the tensors, the metadata in them, and the tensors they describe, in the file's order."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    # The length is not trusted: a damaged file must not make `read` ask for terabytes.
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
        raise MemoryFileError(f"{path} was not written by memsyn: its memsyn metadata is not a JSON object.")
    stored, end = laid_out(path, header)
    if 8 + length + end != size:
        raise MemoryFileError(
            f"{path} is truncated, or longer than it was: expected {8 + length + end} bytes, got {size}. Restore it "
            "from a copy."
        )
    return start + text, entry, stored


def check_header(path: object, header: Mapping[str, Any], kind: str | None) -> None:
    """Check the format, the kind and the number of groups that the metadata tell.

    Raises:
        MemoryFileError: says which is not as expected.
    """
    written = header.get("format")
    if type(written) is not int or written < 1:
        raise MemoryFileError(f"{path} was not written by memsyn: its metadata has no format number.")
    if written > FORMAT:
        raise MemoryFileError(
            f"{path} has format {written}, written by memsyn {header.get('memsyn')!s:.40}; this memsyn "
            f"({version('memsyn')}) reads up to format {FORMAT}. Upgrade memsyn to read it."
        )
    groups = header.get("groups")
    if isinstance(groups, dict) and len(groups) > _MAX_GROUPS:  # before its tensors are made
        raise MemoryFileError(f"{path} has {len(groups)} groups of tensors; expected at most {_MAX_GROUPS}.")
    if kind is not None and header["kind"] != kind:
        raise MemoryFileError(f"{path} is of kind {header['kind']!r:.40}; expected {kind!r}.")


def _read_tensor(path: object, stored: StoredTensor, file: BinaryIO, digest: Any) -> Tensor:
    """The next tensor of a file; its bytes are added to `digest`."""
    tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
    for piece in pieces_on_first(tensor, _CHUNK):
        data = _bytes_of(piece)
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise MemoryFileError(f"{path} became shorter while it was read. Read it again.")
        digest.update(data)
    return tensor


def _mapped_tensors(file: BinaryIO, start: int, stored: list[StoredTensor], digest: Any) -> dict[str, Tensor]:
    """The tensors of a file as views of its bytes on the disk; the bytes are added to `digest`."""
    # Private pages: nothing is written back to the file. torch warns of buffers that are read-only.
    whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    found = {}
    for each in stored:
        count = math.prod(each.shape)
        flat = torch.frombuffer(whole, dtype=each.dtype, count=count, offset=start) if count else torch.empty(0)
        found[each.key] = flat.to(each.dtype).reshape(each.shape)
        start += num_bytes(each)
        for piece in pieces_on_first(found[each.key], _CHUNK):
            digest.update(_bytes_of(piece))
    return found


def checked_groups(path: object, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Groups:
    """The tensors of a file or checkpoint by the caller's group names; of sharded ones this process checks its part.

    Raises:
        MemoryFileError: a tensor has a dtype or values that no file may hold, or is not among those of the header.
    """
    for key, tensor in tensors.items():
        _check_dtype(path, key, tensor.dtype)
        for piece in pieces_on_first(local_part(tensor), _CHUNK):
            _check_values(path, key, piece)
    return _grouped(path, header, tensors)


def _grouped(path: object, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Groups:
    """The tensors of a file by the caller's group names, in the order of the header, all of them and no others."""
    names = header.get("groups")
    if not isinstance(names, dict) or not all(isinstance(members, list) for members in names.values()):
        names = {}
    keys = [f"{group}/{name}" for group, members in names.items() for name in members]
    if "groups" not in header or len(set(keys)) != len(keys) or set(keys) != set(tensors):
        raise MemoryFileError(f"{path}: its tensors are not those that its metadata names.")
    sums = _stored_name(header.get("kind"), IMPORTANCE, header["format"])
    if sums != IMPORTANCE and IMPORTANCE in names:
        raise MemoryFileError(
            f"{path}: an importance file of format {header['format']} holds a group {IMPORTANCE}; expected {sums}."
        )
    return {
        IMPORTANCE if group == sums else group: {name: tensors[f"{group}/{name}"] for name in members}
        for group, members in names.items()
    }


def _bytes_of(piece: Tensor) -> memoryview:
    return piece.view(torch.uint8).numpy().data


def _check_dtype(path: object, key: str, dtype: torch.dtype) -> None:
    group = key.partition("/")[0]
    # torch stores float8, but computes next to nothing with it. Buffers are only kept and compared.
    if group in _COMPUTED and dtype not in _COMPUTED_TYPES:
        names = ", ".join(map(str, _COMPUTED_TYPES))
        raise MemoryFileError(f"{path}: {key} is {dtype}; expected a floating point type to compute with: {names}.")
    if group == STATISTICS and not dtype.is_floating_point:
        raise MemoryFileError(f"{path}: {key} is {dtype}; expected a floating point type.")


def _check_values(path: object, key: str, piece: Tensor) -> None:
    if not piece.dtype.is_floating_point:
        return
    # float8 has no `aminmax`. Conversion to float32 is exact.
    low, high = (piece if piece.dtype.itemsize > 2 else piece.float()).aminmax()
    if not math.isfinite(low) or not math.isfinite(high):
        raise MemoryFileError(f"{path}: {key} holds NaN or infinite values; all must be finite.")
    if key.startswith((f"{_SUM}/", f"{IMPORTANCE}/")) and low < 0:
        raise MemoryFileError(f"{path}: {key} holds negative values; importance is never negative.")
