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


def read_file(path: Path) -> bytes:
    """Return what is in a file of a pack.

    Raises:
        MemsynError: it is missing.
    """
    if not path.is_file():
        raise MemsynError(f"{path.parent.name}: {path} is missing; reinstall memsyn")
    return path.read_bytes()


def read_cells(path: Path, *, sha256: str, num_rows: int, num_columns: int) -> Tensor:
    """Return a sheet's cells, (num_rows, num_columns, 3, size, size) uint8.

    Raises:
        MemsynError: the file is missing, or its SHA-256 is not the one that its manifest says.
    """
    sheet = read_file(path)
    found = hashlib.sha256(sheet).hexdigest()
    if found != sha256:
        raise MemsynError(
            f"{path.parent.name}: {path} has sha256 {found}, the manifest says {sha256}; "
            "the file is damaged or from another version; reinstall memsyn"
        )
    with Image.open(io.BytesIO(sheet)) as image:
        pixels = np.array(image.convert("RGB"))
    height, width, _ = pixels.shape
    cells = pixels.reshape(num_rows, height // num_rows, num_columns, width // num_columns, 3)
    return torch.from_numpy(cells).permute(0, 2, 4, 1, 3)
