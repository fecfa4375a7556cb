"""Synthetic scenes of true triples <subject, predicate, object>: two drawings of `emoji8` put on one sheet of paper.

Owns how a scene is composed. Which triples there are, and the vectors of their texts, lies in the `facts` pack.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from memsyn_bench.data.drawings import load_emoji8, resize
from memsyn_bench.data.facts import FACTS_PACK, read_manifest
from memsyn_bench.task import Task

SCENE_SIDE = 64
"""Pixels a side of a scene as it is composed."""
COPIES = 2
"""Scenes of each triple from one training studio's drawings; each has its own random places."""
PLAY = 4
"""Each drawing is moved at random by at most so many pixels in each direction."""
SCENE_SEED = 0
"""Seed of the places: the scenes are part of the sequence, the same for every seed of a run."""
PLACES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "left of": ((30, 17, 1), (30, 17, 33)),
    "above": ((30, 1, 17), (30, 33, 17)),
    "bigger than": ((40, 1, 1), (20, 43, 43)),
}
"""Predicate -> (side, top, left) of the subject's drawing and of the object's."""


def load_scenes(size: int, pack: Path = FACTS_PACK) -> list[Task]:
    """Return four tasks of 40 triples, each over eight objects of one task of `emoji8`; synthetic.

    A class is a triple such as "cat left of boar"; its vector is MiniLM-L6's of that text, (384,), of length 1. A scene
    shows both objects as one studio drew them; the studios of the test are held out, as in `emoji8`.

    Raises:
        MemsynError: a file of a pack is missing or is not the one the manifest describes.
    """
    manifest, vectors = read_manifest(pack)
    objects = {task.name: task for task in load_emoji8(SCENE_SIDE)}
    generator = torch.Generator().manual_seed(SCENE_SEED)
    parts = vectors["scenes"].split([len(scenes["facts"]) for scenes in manifest["scenes"]])
    return [
        _scenes_task(objects[scenes["name"]], scenes["facts"], part, size, generator)
        for scenes, part in zip(manifest["scenes"], parts, strict=True)
    ]


def _scenes_task(
    task: Task, triples: list[dict[str, str]], vectors: Tensor, size: int, generator: torch.Generator
) -> Task:
    assert task.train_families is not None
    names = {name: label for label, name in enumerate(task.class_names)}
    images: dict[str, list[Tensor]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    families: list[int] = []
    for label, triple in enumerate(triples):
        both = (names[triple["subject"]], names[triple["object"]])
        for split, copies in (("train", COPIES), ("test", 1)):
            pixels, owners = getattr(task, f"{split}_images"), getattr(task, f"{split}_labels")
            first, second = ((owners == owner).nonzero().flatten().tolist() for owner in both)
            # Both have all the studios, in the same order.
            for one, other in zip(first, second, strict=True):
                for _ in range(copies):
                    images[split].append(compose(pixels[one], pixels[other], triple["predicate"], generator))
                    labels[split].append(label)
                if split == "train":
                    families += [int(task.train_families[one])] * copies
    return Task(
        name=task.name,
        class_names=tuple(triple["text"] for triple in triples),
        train_images=resize(torch.stack(images["train"]), size),
        train_labels=torch.tensor(labels["train"]),
        test_images=resize(torch.stack(images["test"]), size),
        test_labels=torch.tensor(labels["test"]),
        train_families=torch.tensor(families),
        class_vectors=vectors,
    )


def compose(subject: Tensor, thing: Tensor, predicate: str, generator: torch.Generator) -> Tensor:
    """Put two drawings, ink (3, 64, 64), on one sheet as the predicate says; where both have ink, the darker counts.

    Each is up to `PLAY` pixels out of its place of `PLACES`, drawn from `generator`, and stays on the sheet.
    """
    sheets = []
    for drawing, (side, top, left) in zip((subject, thing), PLACES[predicate], strict=True):
        play = torch.randint(-PLAY, PLAY + 1, (2,), generator=generator).tolist()
        top, left = (min(max(place + by, 0), SCENE_SIDE - side) for place, by in zip((top, left), play, strict=True))
        small = resize(drawing.unsqueeze(0), side)[0]
        sheets.append(F.pad(small, (left, SCENE_SIDE - side - left, top, SCENE_SIDE - side - top)))
    return torch.maximum(*sheets)
