"""6DS, the facts of the paper's embedding experiment, read from a folder. It does not come with memsyn-bench.

<subject, predicate, object> facts in photographs (Elhoseiny, Cohen, Chang, Price and Elgammal 2017, "Sherlock: Scalable
Fact Learning in Images", AAAI; facts of three words, or of fewer). We know of no layout that it is published in; what
is read lies beside the data sets of `memsyn_bench.data.paper8`:

    6ds/       facts.csv  vectors.safetensors  and the images, anywhere below

`facts.csv` begins with the line `image,subject,predicate,object,split`. Image is a path below `6ds`; predicate and
object may be empty; split is train or test. An image of several facts has several lines, each a sample of its own. A
further column, `task`, names the task that a fact is learned in, in the order in which tasks first appear; without it
the facts are dealt out to four tasks at random, by a fixed seed.

`vectors.safetensors` holds the embedding of each fact's text, float32 (D,), under that text: its words with spaces
between. The pixels of pictures already read are kept in `prepared/`, as those of the other data sets are.

Owns this layout.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from memsyn import MemsynError
from memsyn_bench.data.paper8 import FOLDER_VARIABLE, Picture, data_folder, prepared
from memsyn_bench.task import Task, deal_out

CSV_COLUMNS = ("image", "subject", "predicate", "object", "split")


def load_6ds(size: int, root: Path | None = None) -> list[Task]:
    """Return the facts task by task, images (N, 3, S, S) uint8 in 0..255; a picture's middle, S is `size`.

    `root` is the folder that MEMSYN_PAPER8 names, or `data/paper8`.

    Raises:
        MemsynError: a file or an image is missing, a line is not as `memsyn_bench.data.sixds` tells, a fact has no
            vector, or its lines name several tasks.
    """
    root = data_folder() if root is None else root
    folder = root / "6ds"
    rows = _read_rows(folder / "facts.csv")
    vectors = _read_vectors(folder / "vectors.safetensors", sorted({row["fact"] for row in rows}))
    tasks = []
    for name, facts in _tasks_of(rows, folder / "facts.csv").items():
        own = [row for row in rows if row["fact"] in facts]
        train, test = (
            prepared(
                [Picture(folder / row["image"], facts.index(row["fact"])) for row in own if row["split"] == split],
                size,
                root,
                f"6ds-{split}",
            )
            for split in ("train", "test")
        )
        tasks.append(Task(name, tuple(facts), *train, *test, class_vectors=torch.stack([vectors[f] for f in facts])))
    return tasks


def _read_rows(path: Path) -> list[dict[str, str]]:
    """The lines of `facts.csv`, each with its `fact`."""
    if not path.is_file():
        raise MemsynError(
            f"6ds: {path} is missing. Get the data from its authors and write the file as memsyn_bench.data.sixds "
            f"tells, or name another place in the environment variable {FOLDER_VARIABLE}."
        )
    rows = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file, restval="")
            lacking = [name for name in CSV_COLUMNS if name not in (lines.fieldnames or ())]
            if lacking:
                raise MemsynError(
                    f"6ds: {path} has no column {', '.join(lacking)}. Write it as memsyn_bench.data.sixds tells."
                )
            for row in lines:
                wrong = _what_is_wrong(row, path.parent)
                if wrong:
                    raise MemsynError(f"6ds: {path}, line {lines.line_num}: {wrong}. See memsyn_bench.data.sixds.")
                row["fact"] = " ".join(row[name] for name in ("subject", "predicate", "object") if row[name])
                rows.append(row)
    except UnicodeDecodeError as error:
        raise MemsynError(f"6ds: {path} is not UTF-8 ({error}). Save it so.") from error
    if not rows:
        raise MemsynError(f"6ds: {path} holds no facts. Write it as memsyn_bench.data.sixds tells.")
    return rows


def _what_is_wrong(row: dict[str, str], folder: Path) -> str:
    """The first mistake in a line; empty if there is none."""
    image = Path(row["image"])
    if None in row:
        return "it has more values than columns"
    if row["split"] not in ("train", "test"):
        return f"split must be train or test, got {row['split']!r}"
    if not row["subject"]:
        return "it has no subject"
    if row.get("task") == "":
        return "it names no task, and other lines may"
    if image.is_absolute() or ".." in image.parts:
        return f"an image must be a path below {folder}, got {row['image']}"
    return "" if (folder / image).is_file() else f"there is no image {folder / image}"


def _read_vectors(path: Path, facts: Sequence[str]) -> dict[str, Tensor]:
    try:
        vectors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MemsynError(f"6ds: {path} cannot be read: {error}. Write it as memsyn_bench.data.sixds tells.") from error
    lacking = [fact for fact in facts if fact not in vectors]
    if lacking:
        raise MemsynError(f"6ds: {path} has no vector of {lacking[0]!r}, nor of {len(lacking) - 1} more. Add them.")
    shapes = {tuple(vectors[fact].shape) for fact in facts}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise MemsynError(f"6ds: the vectors of {path} must be (D,), all of one D; they are {sorted(shapes)}.")
    return {fact: vectors[fact].to(torch.float32) for fact in facts}


def _tasks_of(rows: Sequence[dict[str, str]], path: Path) -> dict[str, list[str]]:
    """By task its facts, in alphabetical order; every task must have images to train on and to test on."""
    facts = sorted({row["fact"] for row in rows})
    if "task" in rows[0]:
        task_of: dict[str, str] = {}
        for row in rows:
            if task_of.setdefault(row["fact"], row["task"]) != row["task"]:
                raise MemsynError(f"6ds: {path} has {row['fact']!r} in {task_of[row['fact']]} and in {row['task']}.")
        tasks = {name: [fact for fact in facts if task_of[fact] == name] for name in dict.fromkeys(task_of.values())}
    else:
        tasks = {f"Facts {number}": sorted(part) for number, part in enumerate(deal_out(facts), start=1) if part}
    for name, own in tasks.items():
        for split in ("train", "test"):
            if not any(row["fact"] in own and row["split"] == split for row in rows):
                raise MemsynError(f"6ds: {path} has no line to {split} of the facts of {name}. Add some.")
    return tasks
