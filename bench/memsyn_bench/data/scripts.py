"""The `scripts8` pack: the letters of eight alphabets, learned from some families of fonts, tested on others.

Owns reading the pack (`packs/scripts8/`, built by `tools/build_scripts8.py`). Knows no networks or training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from memsyn_bench.data.drawings import normalise, resize
from memsyn_bench.data.sheets import read_cells, read_file
from memsyn_bench.task import Task

SCRIPTS8_PACK = Path(__file__).parent / "packs" / "scripts8"


def load_scripts8(size: int, pack: Path = SCRIPTS8_PACK) -> list[Task]:
    """Return the eight tasks, images (N, 1, size, size) (the pack holds 28), in the pack's order.

    A class is a letter: Latin 26, Greek 24, Cyrillic 32 (small ones), Hebrew 27, Arabic 30, Devanagari 34, Bengali 32,
    Thai 46. Each is drawn by 10 to 23 fonts to train on, and by 5 to 9 of other families to test on. The sheets
    are checked against the manifest's SHA-256.

    Raises:
        MemsynError: a file of the pack is missing or is not the one the manifest describes.
    """
    manifest = json.loads(read_file(pack / "manifest.json"))
    return [_script_task(entry, pack, size) for entry in manifest["tasks"]]


def _script_task(entry: dict[str, Any], pack: Path, size: int) -> Task:
    fonts, letters = entry["fonts"], entry["letters"]
    cells = read_cells(pack / entry["sheet"], sha256=entry["sha256"], num_rows=len(fonts), num_columns=len(letters))
    families = sorted({font["family"] for font in fonts})
    of_row = torch.tensor([families.index(font["family"]) for font in fonts])
    for_training = torch.tensor([font["split"] == "train" for font in fonts])
    labels = torch.arange(len(letters))
    train, test = (
        normalise(resize(cells[rows, :, :1].flatten(0, 1).to(torch.float32), size))
        for rows in (for_training, ~for_training)
    )
    return Task(
        name=entry["name"],
        class_names=tuple(letters),
        train_images=train,
        train_labels=labels.repeat(int(for_training.sum())),
        test_images=test,
        test_labels=labels.repeat(int((~for_training).sum())),
        train_families=of_row[for_training].repeat_interleave(len(letters)),
    )
