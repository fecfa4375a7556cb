"""The `emoji8` pack: eight tasks of forty objects, learned from some studios' drawings, tested on another's.

Owns reading the pack (`packs/emoji8/`, built by `tools/build_emoji8.py`), its checksums, and the
augmentation of drawings. Knows nothing of networks or training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_safetensors
from torch import Tensor

from memsyn_bench.data.sheets import read_cells, read_file
from memsyn_bench.task import Task

EMOJI8_PACK = Path(__file__).parent / "packs" / "emoji8"
WEIGHTS = "pretrained.safetensors"
NUM_SMALL = 10
"""Objects of each task of `emoji32`."""


def normalise(pixels: Tensor) -> Tensor:
    """Return pixels (N, 3, S, S) in 0..255 as ink: white 0, black 2, so that zero padding is white paper."""
    return (255.0 - pixels.to(torch.float32)) / 127.5


def resize(images: Tensor, size: int) -> Tensor:
    """Return images (N, C, S, S) at (N, C, size, size): each pixel the mean of the area it covers, or interpolated."""
    if images.shape[-1] == size:
        return images
    if images.shape[-1] > size:
        return F.interpolate(images, (size, size), mode="area")
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def load_emoji8(size: int, pack: Path = EMOJI8_PACK) -> list[Task]:
    """Return the eight tasks at `size` x `size` pixels (the pack holds 64; more is interpolated), in the pack's order.

    Each has 40 objects, 2 test drawings of each by the studios held out, and 4 or 5 training drawings. The
    sheets are checked against the manifest's SHA-256.

    Raises:
        MemsynError: a file of the pack is missing or is not the one the manifest describes.
    """
    manifest = json.loads(read_file(pack / "manifest.json"))
    return [_emoji_task(entry, manifest, pack, size) for entry in manifest["tasks"]]


def load_emoji32(size: int, pack: Path = EMOJI8_PACK) -> list[Task]:
    """Return the objects of `emoji8` as 32 tasks of ten, 20 test drawings each.

    A fixed seed deals the objects out over all eight tasks, so that no task is harder than another by its place.

    Raises:
        MemsynError: a file of the pack is missing or is not the one the manifest describes.
    """
    whole = load_emoji8(size, pack)
    objects = [(task, label) for task in whole for label in range(len(task.class_names))]
    order = torch.randperm(len(objects), generator=torch.Generator().manual_seed(0))
    return [
        _task_of_objects(f"objects {number}", [objects[place] for place in part.tolist()])
        for number, part in enumerate(order.split(NUM_SMALL), start=1)
    ]


def _task_of_objects(name: str, objects: Sequence[tuple[Task, int]]) -> Task:
    """One task of objects, each a label of a task: the drawings object by object."""
    trained = [(task, (task.train_labels == label).nonzero().flatten()) for task, label in objects]
    tested = [(task, (task.test_labels == label).nonzero().flatten()) for task, label in objects]

    def labels(places: Sequence[tuple[Task, Tensor]]) -> Tensor:
        return torch.arange(len(places)).repeat_interleave(torch.tensor([len(own) for _, own in places]))

    return Task(
        name=name,
        class_names=tuple(task.class_names[label] for task, label in objects),
        train_images=torch.cat([task.train_images[own] for task, own in trained]),
        train_labels=labels(trained),
        test_images=torch.cat([task.test_images[own] for task, own in tested]),
        test_labels=labels(tested),
        train_families=torch.cat([f[own] for task, own in trained if (f := task.train_families) is not None]),
    )


def load_pretrained(pack: Path = EMOJI8_PACK) -> dict[str, Tensor]:
    """Return the state of a `SmallConvNet` pretrained on other objects by the training studios, float32.

    Raises:
        MemsynError: the file is missing.
    """
    return load_safetensors(read_file(pack / WEIGHTS))


def _emoji_task(entry: dict[str, Any], manifest: dict[str, Any], pack: Path, size: int) -> Task:
    studios, objects = manifest["studios"], entry["objects"]
    cells = read_cells(pack / entry["sheet"], sha256=entry["sha256"], num_rows=len(studios), num_columns=len(objects))
    families = sorted({studio["family"] for studio in studios})
    chosen: dict[str, list[tuple[int, int, int]]] = {"train": [], "test": []}
    for row, studio in enumerate(studios):
        lacking, family = set(entry["lacking"].get(studio["name"], ())), families.index(studio["family"])
        chosen[studio["split"]] += [(row, label, family) for label, x in enumerate(objects) if x not in lacking]
    train, test = (torch.tensor(chosen[split]).T for split in ("train", "test"))
    return Task(
        name=entry["name"],
        class_names=tuple(objects),
        train_images=normalise(resize(cells[train[0], train[1]].to(torch.float32), size)),
        train_labels=train[1].clone(),
        test_images=normalise(resize(cells[test[0], test[1]].to(torch.float32), size)),
        test_labels=test[1].clone(),
        train_families=train[2].clone(),
    )


def move(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (N, C, S, S), paper at 0, each moved at random; the input is left alone.

    Each image is turned by up to 15 degrees, scaled by 0.8 to 1.2 (each axis by another 10%) and shifted by up
    to 10% of its side. No mirror images: left and right tell some things apart (arrows, hands, letters). All
    randomness is drawn from `generator`.
    """
    num, device = images.shape[0], images.device
    if num == 0:
        return images.clone()
    angle = _uniform(num, -0.26, 0.26, generator, device)
    scale = torch.exp(
        _uniform(num, -0.2, 0.2, generator, device)[:, None] + _uniform((num, 2), -0.1, 0.1, generator, device)
    )
    shift = _uniform((num, 2), -0.2, 0.2, generator, device)  # in half sides, the unit of affine_grid
    cos, sin = torch.cos(angle), torch.sin(angle)
    turn = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    theta = torch.cat([turn * scale[:, :, None], shift[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), padding_mode="zeros", align_corners=False)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (N, 3, S, S), white at 0, each moved and recoloured at random; the input is left alone.

    Moved as `move` does; then its ink is scaled, each colour by another 20%, and the colours mix a little. All
    randomness is drawn from `generator`.
    """
    num, device = images.shape[0], images.device
    moved = move(images, generator)
    # Ink is multiplied, so that white paper stays white; a mixing of the channels turns the hue a little.
    gain = _uniform((num, 1, 1, 1), 0.7, 1.3, generator, device) * _uniform((num, 3, 1, 1), 0.8, 1.2, generator, device)
    mix = torch.eye(3, device=device) + _uniform((num, 3, 3), -0.1, 0.1, generator, device)
    mixed = torch.einsum("nij,njhw->nihw", mix, moved)
    return (mixed * gain).clamp(0.0, 2.0)


def _uniform(
    shape: int | tuple[int, ...], low: float, high: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    return torch.rand(shape, generator=generator, device=device) * (high - low) + low
