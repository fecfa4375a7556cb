"""The `emoji8` pack: eight tasks of forty objects, learned from some studios' drawings, tested on another's.

Owns reading the pack beside it (`emoji8/`, built by `tools/build_emoji8.py`), its checksums, and the
augmentation of drawings. Knows nothing of networks or training.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load as load_safetensors
from torch import Tensor

from memsyn.errors import MemsynError

PACK = Path(__file__).parent / "emoji8"
WEIGHTS = "pretrained.safetensors"


@dataclass(frozen=True)
class Task:
    """One task: its images, (N, 3, size, size) float32 with white at 0 and black at 2, and int64 labels (N,).

    Training and test drawings show the same objects and come from different studios.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def normalise(pixels: Tensor) -> Tensor:
    """Return pixels (N, 3, S, S) in 0..255 as ink: white 0, black 2, so that zero padding is white paper."""
    return (255.0 - pixels.to(torch.float32)) / 127.5


def resize(images: Tensor, size: int) -> Tensor:
    """Return images (N, 3, S, S) at (N, 3, size, size), each pixel the mean of the area it covers."""
    return images if images.shape[-1] == size else F.interpolate(images, (size, size), mode="area")


def load_emoji8(size: int, pack: Path = PACK) -> list[Task]:
    """Return the eight tasks at `size` x `size` pixels (the pack holds 64), in the pack's order.

    Each has 40 objects, 2 test drawings of each by the studios held out, and 4 or 5 training drawings. The
    sheets are checked against the manifest's SHA-256.

    Raises:
        MemsynError: a file of the pack is missing or is not the one the manifest describes.
    """
    manifest = json.loads(_read(pack / "manifest.json"))
    return [_load_task(entry, manifest, pack, size) for entry in manifest["tasks"]]


def load_pretrained(pack: Path = PACK) -> dict[str, Tensor]:
    """Return the state of a `SmallConvNet` pretrained on other objects by the training studios, float32.

    Raises:
        MemsynError: the file is missing.
    """
    return load_safetensors(_read(pack / WEIGHTS))


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise MemsynError(f"emoji8: {path} is missing; reinstall memsyn")
    return path.read_bytes()


def _load_task(entry: dict[str, Any], manifest: dict[str, Any], pack: Path, size: int) -> Task:
    sheet = _read(pack / entry["sheet"])
    found = hashlib.sha256(sheet).hexdigest()
    if found != entry["sha256"]:
        raise MemsynError(
            f"emoji8: {pack / entry['sheet']} has sha256 {found}, the manifest says {entry['sha256']}; "
            "the file is damaged or from another version; reinstall memsyn"
        )
    with Image.open(io.BytesIO(sheet)) as image:
        pixels = np.array(image.convert("RGB"))
    side, studios, objects = manifest["size"], manifest["studios"], entry["objects"]
    cells = pixels.reshape(len(studios), side, len(objects), side, 3).transpose(0, 2, 4, 1, 3)
    chosen: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    for row, studio in enumerate(studios):
        lacking = set(entry["lacking"].get(studio["name"], ()))
        chosen[studio["split"]] += [(row, label) for label, name in enumerate(objects) if name not in lacking]
    tensors = {}
    for split, places in chosen.items():
        rows, labels = np.array(places).T
        tensors[split] = normalise(resize(torch.from_numpy(cells[rows, labels]).to(torch.float32), size))
        tensors[split + "_labels"] = torch.from_numpy(labels.astype(np.int64))
    return Task(
        name=entry["name"],
        class_names=tuple(objects),
        train_images=tensors["train"],
        train_labels=tensors["train_labels"],
        test_images=tensors["test"],
        test_labels=tensors["test_labels"],
    )


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (N, 3, S, S), white at 0, each moved and recoloured at random; the input is left alone.

    Each image is turned by up to 15 degrees, scaled by 0.8 to 1.2 (each axis by another 10%) and shifted by up
    to 10% of its side; its ink is scaled, each colour by another 20%, and the colours mix a little. No mirror
    images: left and right tell some objects apart (arrows, hands). All randomness is drawn from `generator`.
    """
    num, device = images.shape[0], images.device
    if num == 0:
        return images.clone()

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(num, *shape, generator=generator, device=device) * (high - low) + low

    angle = uniform(-0.26, 0.26)
    scale = torch.exp(uniform(-0.2, 0.2)[:, None] + uniform(-0.1, 0.1, 2))
    shift = uniform(-0.2, 0.2, 2)  # in half sides, the unit of affine_grid
    cos, sin = torch.cos(angle), torch.sin(angle)
    turn = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    theta = torch.cat([turn * scale[:, :, None], shift[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid.to(images.dtype), padding_mode="zeros", align_corners=False)
    # Ink is multiplied, so that white paper stays white; a mixing of the channels turns the hue a little.
    gain = uniform(0.7, 1.3, 1, 1, 1) * uniform(0.8, 1.2, 3, 1, 1)
    mix = torch.eye(3, device=device) + uniform(-0.1, 0.1, 3, 3)
    mixed = torch.einsum("nij,njhw->nihw", mix, moved)
    return (mixed * gain).clamp(0.0, 2.0)
