"""Files of memsyn made and taken apart by hand, from the definition of the format alone."""

import hashlib
import json
import re
import struct
from typing import Any

BLANK = b"sha256:" + b"0" * 64


def taken_apart(whole: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Metadata, header without it, and the tensors' bytes."""
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    return json.loads(header.pop("__metadata__")["memsyn"]), header, whole[8 + length :]


def put_together(entry: Any, header: dict[str, Any], data: bytes) -> bytes:
    """A file with the right checksum, if `entry` has one at all."""
    if isinstance(entry, dict) and "checksum" in entry:
        entry = {**entry, "checksum": BLANK.decode()}
    return sealed(json.dumps({"__metadata__": {"memsyn": json.dumps(entry, sort_keys=True)}, **header}).encode(), data)


def sealed(header: bytes, data: bytes) -> bytes:
    """A file of this header and these bytes, with the right checksum in place of the first one."""
    if BLANK not in header:  # a checkpoint has other digests before its checksum
        header = re.sub(rb"sha256:[0-9a-f]{64}", BLANK, header, count=1)
    whole = struct.pack("<Q", len(header)) + header + data
    return whole.replace(BLANK, b"sha256:" + hashlib.sha256(whole).hexdigest().encode(), 1)
