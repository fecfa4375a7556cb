"""Reading and writing of memsyn files: one safetensors file each, nothing pickled.

Owns the format, its checksum and its version, and the checks on the way in. A file holds tensors named
`<group>/<parameter>` and one metadata entry, `memsyn`, a JSON object: kind, format, version of memsyn, checksum, and
what the caller gave. Must not know what the tensors mean.
"""

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memsyn.errors import MemoryFileError

FORMAT: Final = 1
"""Raised when an older memsyn could not read a newer file; older files stay readable."""

IMPORTANCE: Final = "importance"
MEMORY: Final = "memory"

_PREFIX: Final = "sha256:"
_BLANK: Final = _PREFIX + "0" * 64
_CHUNK: Final = 2**20

Groups = dict[str, dict[str, Tensor]]


def write(
    path: str | os.PathLike[str],
    kind: str,
    header: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write a file atomically: a temporary file beside it, fsync, rename, fsync of the folder.

    A crash leaves the old file or the new one, whole. The checksum is the SHA-256 of all bytes of the file with the
    checksum's own digits set to zero.

    Raises:
        MemoryFileError: it cannot be written, or holds what could not be read again; an old file stays whole.
    """
    path = Path(path)
    tensors = {
        f"{group}/{name}": _checked(path, f"{group}/{name}", tensor.detach().cpu().contiguous())
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    entry = {
        **header,
        "kind": kind,
        "format": FORMAT,
        "memsyn": version("memsyn"),
        "groups": {group: list(members) for group, members in groups.items()},  # in the model's order
        "checksum": _BLANK,
    }
    try:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode  # as the user's umask has it, which save_file does not heed
            save_file(tensors, temporary, {"memsyn": json.dumps(entry, sort_keys=True)})
            temporary.chmod(mode)
            _seal(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise MemoryFileError(
            f"{path} could not be written: {error}. A file that was there before is whole."
        ) from error


def read(path: str | os.PathLike[str], kind: str | None = None) -> tuple[dict[str, Any], Groups]:
    """Read and check a file: version, kind, checksum, finite values.

    Args:
        path: the file.
        kind: what it must be, `IMPORTANCE` or `MEMORY`; None for either.

    Returns:
        Its header, and its tensors by group and parameter name, on the CPU.

    Raises:
        MemoryFileError: anything is not as it must be; says what.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            header = _read_header(path, file)
            _check_header(path, header, kind)
            if _checksum(file, header["checksum"]) != header["checksum"]:
                raise MemoryFileError(
                    f"{path} is damaged: its checksum is not that of its content. Restore it from a copy."
                )
            groups = _read_tensors(path, header["groups"])
            if os.stat(path).st_ino != os.fstat(file.fileno()).st_ino:
                raise MemoryFileError(f"{path} was replaced while it was read: read it again.")
    except MemoryFileError:
        raise
    except FileNotFoundError:
        raise MemoryFileError(f"{path} does not exist.") from None
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise MemoryFileError(f"{path} could not be read: {type(error).__name__}: {error}.") from error
    return header, groups


@contextmanager
def well_formed(path: str | os.PathLike[str]) -> Iterator[None]:
    """While open, a header or tensors that are not as they should be are the file's fault."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise MemoryFileError(f"{path} is not as memsyn writes it: {type(error).__name__}: {error}.") from error


def _read_tensors(path: Path, names: Mapping[str, Sequence[str]]) -> Groups:
    """The tensors of a file by group, in the order of `names`, all of them and no others."""
    groups: Groups = {group: {} for group in names}
    with safe_open(path, framework="pt") as tensors:
        if {f"{group}/{name}" for group in names for name in names[group]} != set(tensors.keys()):
            raise MemoryFileError(f"{path}: its tensors are not those that its metadata names.")
        for group in names:
            for name in names[group]:
                key = f"{group}/{name}"
                groups[group][name] = _checked(path, key, tensors.get_tensor(key))
    return groups


def _read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= size - 8:
        raise MemoryFileError(
            f"{path} is truncated, or was not written by memsyn: it has {size} bytes, and no whole safetensors header."
        )
    try:
        header = json.loads(file.read(length))
        entry = json.loads(header["__metadata__"]["memsyn"])
    except (ValueError, KeyError, TypeError):
        raise MemoryFileError(f"{path} was not written by memsyn: it has no memsyn metadata.") from None
    if not isinstance(entry, dict):
        raise MemoryFileError(f"{path} was not written by memsyn: its memsyn metadata is no object.")
    end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise MemoryFileError(
            f"{path} is truncated: expected {8 + length + end} bytes, got {size}. Restore it from a copy."
        )
    return entry


def _check_header(path: Path, header: Mapping[str, Any], kind: str | None) -> None:
    if not isinstance(header.get("format"), int):
        raise MemoryFileError(f"{path} was not written by memsyn: its metadata names no format.")
    if header["format"] > FORMAT:
        raise MemoryFileError(
            f"{path} has format {header['format']}, written by memsyn {header.get('memsyn')}; this memsyn "
            f"({version('memsyn')}) reads up to format {FORMAT}. Upgrade memsyn to read it."
        )
    if kind is not None and header["kind"] != kind:
        raise MemoryFileError(f"{path} is of kind {header['kind']!r}; expected {kind!r}.")


def _checked(path: Path, key: str, tensor: Tensor) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise MemoryFileError(f"{path}: {key} holds NaN or infinite values; all must be finite.")
    if key.startswith("importance/") and bool((tensor < 0).any()):
        raise MemoryFileError(f"{path}: {key} holds negative values; importance is never negative.")
    return tensor


def _seal(path: Path) -> None:
    """Put the checksum in its place, and the bytes on the disk."""
    with open(path, "r+b") as file:
        checksum = _checksum(file, _BLANK)
        file.seek(_place(file, _BLANK))
        file.write(checksum.encode())
        file.flush()
        os.fsync(file.fileno())


def _checksum(file: BinaryIO, written: str) -> str:
    """SHA-256 of a file, with the digits of the checksum `written` in it counted as zeros."""
    place, digest = _place(file, written), hashlib.sha256()
    file.seek(0)
    digest.update(file.read(place))
    digest.update(_BLANK.encode())
    file.seek(place + len(_BLANK))
    for chunk in iter(lambda: file.read(_CHUNK), b""):
        digest.update(chunk)
    return _PREFIX + digest.hexdigest()


def _place(file: BinaryIO, checksum: str) -> int:
    """Where in a file its checksum stands: once, in the header."""
    file.seek(0)
    length = struct.unpack("<Q", file.read(8))[0]
    return 8 + file.read(length).index(checksum.encode())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
