"""Packs of small pictures that lie beside the code: sheets of cells in rows and columns, and their checksums.

Owns reading a pack's files. Knows nothing of tasks.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memsyn import MemsynError


def read_file(path: Path, *, sha256: str | None = None) -> bytes:
    """Return the content of a file of a pack; `sha256` is the one that the pack's manifest says.

    Raises:
        MemsynError: the file is missing, or its SHA-256 is another.
    """
    if not path.is_file():
        raise MemsynError(f"{path.parent.name}: {path} is missing; reinstall memsyn-bench")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise MemsynError(
            f"{path.parent.name}: {path} has sha256 {found}, the manifest says {sha256}; "
            "the file is damaged or from another version; reinstall memsyn-bench"
        )
    return content


def read_cells(path: Path, *, sha256: str, num_rows: int, num_columns: int) -> Tensor:
    """Return a sheet's cells, (num_rows, num_columns, 3, size, size) uint8.

    Raises:
        MemsynError: the file is missing, or its SHA-256 is not the one that its manifest says.
    """
    with Image.open(io.BytesIO(read_file(path, sha256=sha256))) as image:
        pixels = np.array(image.convert("RGB"))
    height, width, _ = pixels.shape
    cells = pixels.reshape(num_rows, height // num_rows, num_columns, width // num_columns, 3)
    return torch.from_numpy(cells).permute(0, 2, 4, 1, 3)
