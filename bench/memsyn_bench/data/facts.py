"""The `facts` pack: people and their actions, drawn by several studios, and the vectors of texts that describe them.

Owns reading the pack (`packs/facts/`, built by `tools/build_facts.py`) and how its facts are split into tasks.
Knows nothing of networks or training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from memsyn_bench.data.drawings import normalise, resize
from memsyn_bench.data.sheets import read_cells, read_file
from memsyn_bench.task import Task, deal_out

FACTS_PACK = Path(__file__).parent / "packs" / "facts"
VECTORS = "vectors.safetensors"


def load_facts(size: int, pack: Path = FACTS_PACK) -> list[Task]:
    """Return all facts in four tasks, their actions split at random by a fixed seed.

    A class is a fact <subject, action>, such as "a woman juggling"; its vector is MiniLM-L6's of that text, (384,), of
    length 1. It is drawn by 2 to 4 training sets, and tested on the two sets of a family held out. All facts of an
    action are of one task: apart, they teach each other, and little is forgotten (docs/log.md). Images
    are `size` x `size` pixels (the pack holds 64; more is interpolated).

    Raises:
        MemsynError: a file of the pack is missing or is not the one the manifest describes.
    """
    manifest, _ = read_manifest(pack)
    whole = joined(load_kinds(size, pack))
    action_of = [fact["action"] for kind in manifest["kinds"] for fact in kind["facts"]]
    tasks = []
    for index, chosen in enumerate(deal_out(sorted(set(action_of))), start=1):
        labels = torch.tensor([label for label, action in enumerate(action_of) if action in chosen])
        tasks.append(subset(whole, labels, name=f"Facts {index}"))
    return tasks


def load_kinds(size: int, pack: Path = FACTS_PACK) -> list[Task]:
    """Return the same facts in four tasks by the kind of action, see `load_facts`.

    Raises:
        MemsynError: a file of the pack is missing or is not the one the manifest describes.
    """
    manifest, vectors = read_manifest(pack)
    parts = vectors["facts"].split([len(kind["facts"]) for kind in manifest["kinds"]])
    return [
        _kind_task(kind, part, manifest["rows"], pack, size)
        for kind, part in zip(manifest["kinds"], parts, strict=True)
    ]


def load_sports_in_use(size: int) -> list[Task]:
    """Return the tasks of `load_facts`, with the facts of sports in use.

    Raises:
        MemsynError: a file of the pack is missing or is not the one the manifest describes.
    """
    kinds = {kind["name"]: kind for kind in read_manifest()[0]["kinds"]}
    sports = [fact["text"] for fact in kinds["Sports"]["facts"]]
    return [
        replace(task, classes_in_use=tuple(label for label, text in enumerate(task.class_names) if text in sports))
        for task in load_facts(size)
    ]


def read_manifest(pack: Path = FACTS_PACK) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the manifest, and the vectors of the texts of its `facts` and `scenes`, (texts, 384) in its order.

    Raises:
        MemsynError: a file is missing, or the vectors are not those that the manifest describes.
    """
    manifest: dict[str, Any] = json.loads(read_file(pack / "manifest.json"))
    return manifest, load_safetensors(read_file(pack / VECTORS, sha256=manifest["vectors"]))


def _kind_task(kind: dict[str, Any], vectors: Tensor, rows: list[dict[str, Any]], pack: Path, size: int) -> Task:
    texts = tuple(fact["text"] for fact in kind["facts"])
    cells = read_cells(pack / kind["sheet"], sha256=kind["sha256"], num_rows=len(rows), num_columns=len(texts))
    cells = cells.contiguous()
    families = sorted({row["family"] for row in rows})
    chosen: dict[str, list[tuple[int, int, int]]] = {"train": [], "test": []}
    for number, (row, lacking) in enumerate(zip(rows, kind["lacking"], strict=True)):
        family, absent = families.index(row["family"]), set(lacking)
        chosen[row["split"]] += [(number, label, family) for label in range(len(texts)) if label not in absent]
    train, test = (torch.tensor(chosen[split]).T for split in ("train", "test"))
    return Task(
        name=kind["name"],
        class_names=texts,
        train_images=resize(normalise(cells[train[0], train[1]]), size),
        train_labels=train[1].clone(),
        test_images=resize(normalise(cells[test[0], test[1]]), size),
        test_labels=test[1].clone(),
        train_families=train[2].clone(),
        class_vectors=vectors,
    )


def joined(tasks: Sequence[Task]) -> Task:
    """One task of all the classes, in order."""
    first = [sum(len(task.class_names) for task in tasks[:index]) for index in range(len(tasks))]

    def all_of(name: str) -> Tensor:
        return torch.cat([getattr(task, name) for task in tasks])

    return Task(
        name="all",
        class_names=tuple(name for task in tasks for name in task.class_names),
        train_images=all_of("train_images"),
        train_labels=torch.cat([task.train_labels + before for task, before in zip(tasks, first, strict=True)]),
        test_images=all_of("test_images"),
        test_labels=torch.cat([task.test_labels + before for task, before in zip(tasks, first, strict=True)]),
        train_families=all_of("train_families"),
        class_vectors=all_of("class_vectors"),
    )


def subset(task: Task, classes: Tensor, *, name: str) -> Task:
    """The task of some of the classes, int64 (C,), in that order."""
    assert task.train_families is not None
    assert task.class_vectors is not None
    place = torch.full((len(task.class_names),), -1)
    place[classes] = torch.arange(len(classes))
    train, test = place[task.train_labels] >= 0, place[task.test_labels] >= 0
    return Task(
        name=name,
        class_names=tuple(task.class_names[label] for label in classes.tolist()),
        train_images=task.train_images[train],
        train_labels=place[task.train_labels[train]],
        test_images=task.test_images[test],
        test_labels=place[task.test_labels[test]],
        train_families=task.train_families[train],
        class_vectors=task.class_vectors[classes],
    )
