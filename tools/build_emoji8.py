"""Build the `emoji8` pack: eight tasks of forty objects, each object drawn by six or seven studios.

Fetches pinned icon packages with `npm pack`, renders them and writes the pack to
`bench/memsyn_bench/data/packs/emoji8/`. What is left over goes, training studios only, to
`build/emoji8/pretrain.npz` for `pretrain_emoji8.py`. The same packages, renderer and Pillow
give the same bytes. Needs npm, resvg-py and pillow.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT / "bench" / "memsyn_bench" / "data" / "packs" / "emoji8"
BUILD = ROOT / "build" / "emoji8"
SIZE = 64  # pixels a side of one drawing
NUM_OBJECTS = 40  # objects in one task
MIN_PRETRAIN_STUDIOS = 3  # a left-over object drawn by fewer training studios is not pretrained on

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Studio:
    """One studio's set: the package it comes in, which side of the split it is on, and its licence."""

    name: str
    package: str  # npm package@version
    sha256: str  # of the package's archive
    family: str  # near twins share one; a family is never on both sides of the split
    split: str  # "train" or "test"
    title: str
    licence: str
    attribution: str
    optional: bool = False  # an object may lack this studio's drawing

    @property
    def archive(self) -> str:
        """The file name `npm pack` gives the package."""
        return self.package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"


STUDIOS = (
    Studio(
        "twemoji",
        "@iconify-json/twemoji@1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "twemoji",
        "train",
        "Twemoji",
        "CC-BY-4.0",
        "Copyright Twitter, Inc and other contributors; https://github.com/jdecked/twemoji",
    ),
    Studio(
        "noto",
        "@iconify-json/noto@1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "noto",
        "train",
        "Noto Emoji",
        "Apache-2.0",
        "Copyright Google Inc; https://github.com/googlefonts/noto-emoji",
    ),
    Studio(
        "noto-v1",
        "@iconify-json/noto-v1@1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "noto",
        "train",
        "Noto Emoji (v1)",
        "Apache-2.0",
        "Copyright Google Inc; https://github.com/googlefonts/noto-emoji",
    ),
    Studio(
        "emojione",
        "@iconify-json/emojione@1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "emojione",
        "train",
        "Emoji One (Colored), 2.3",
        "CC-BY-4.0",
        "Emoji One, kept by EmojiTwo; https://github.com/EmojiTwo/emojitwo",
    ),
    Studio(
        "fluent-emoji",
        "@iconify-json/fluent-emoji@1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "fluent",
        "test",
        "Fluent Emoji",
        "MIT",
        "Copyright (c) Microsoft Corporation; https://github.com/microsoft/fluentui-emoji",
    ),
    Studio(
        "fluent-emoji-flat",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "fluent",
        "test",
        "Fluent Emoji Flat",
        "MIT",
        "Copyright (c) Microsoft Corporation; https://github.com/microsoft/fluentui-emoji",
    ),
    Studio(
        "fxemoji",
        "@iconify-json/fxemoji@1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "fxemoji",
        "train",
        "Firefox OS Emoji",
        "Apache-2.0",
        "Copyright Mozilla; https://github.com/mozilla/fxemoji",
        optional=True,
    ),
)
# The studio whose metadata names the objects and files them into categories.
NAMING_STUDIO = "noto"
TASKS = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
GENDER = re.compile(r"^(person|people|man|men|woman|women)-")
SKIN_TONE = re.compile(r"(^|-)(light|medium-light|medium|medium-dark|dark)-skin")


def fetch_package(studio: Studio, cache: Path) -> dict[str, Any]:
    """Return the package's JSON files by stem, packing it into `cache` if it is not there; checks the sum."""
    archive = cache / studio.archive
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", studio.package]
        subprocess.run(command, cwd=cache, check=True, capture_output=True)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != studio.sha256:
        raise SystemExit(f"{archive}: expected sha256 {studio.sha256}, found {found}; delete it, run again")
    files: dict[str, Any] = {}
    with tarfile.open(archive) as tar:
        for stem in ("icons", "metadata"):
            member = tar.extractfile(f"package/{stem}.json")
            if member is None:
                raise SystemExit(f"{archive}: package/{stem}.json is not a file")
            files[stem] = json.load(member)
    return files


class Drawings:
    """One studio's drawings by object name, rendered when asked for."""

    def __init__(self, icons: dict[str, Any]) -> None:
        self._icons = icons
        # Sets hyphenate differently ("beatingheart"), so a drawing is looked up without hyphens.
        names = [*icons["icons"], *icons.get("aliases", {})]
        self._names = {name.replace("-", ""): name for name in sorted(names)}

    def __contains__(self, name: str) -> bool:
        return name.replace("-", "") in self._names

    def render(self, name: str) -> Pixels:
        """Return the drawing as (SIZE, SIZE, 3) pixels on white; a drawing that is not square is centred."""
        name, flip = self._names[name.replace("-", "")], False
        aliases = self._icons.get("aliases", {})
        while name in aliases:
            flip ^= bool(aliases[name].get("hFlip", False))
            name = aliases[name]["parent"]
        icon = self._icons["icons"][name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self._icons.get("width", 16))
        height = icon.get("height", self._icons.get("height", 16))
        # preserveAspectRatio's default (xMidYMid meet) scales the view box into the square and centres it.
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
        with Image.open(io.BytesIO(bytes(png))) as image:
            pixels = np.array(image.convert("RGB"))
        if pixels.shape != (SIZE, SIZE, 3):
            raise SystemExit(f"{name}: rendered to {pixels.shape}, expected {(SIZE, SIZE, 3)}")
        return pixels[:, ::-1].copy() if flip else pixels


def thin(drawings: dict[str, npt.NDArray[np.float64]], num_objects: int) -> list[str]:
    """Return the names of the `num_objects` objects that look least alike, sorted.

    `drawings[name]` is (studios, pixels). Two objects are as far apart as their closest drawings by one
    studio (mean squared difference). While too many are left, the closest pair is found, and of the two the one
    whose next neighbour is nearer is dropped (the later name if they tie).
    """
    names = sorted(drawings)
    stack = np.stack([drawings[name] for name in names])
    distance = np.full((len(names), len(names)), np.inf)
    for i in range(len(names)):
        distance[i] = ((stack - stack[i]) ** 2).mean(axis=2).min(axis=1)
        distance[i, i] = np.inf
    left = list(range(len(names)))
    while len(left) > num_objects:
        among = distance[np.ix_(left, left)]
        first, second = divmod(int(among.argmin()), len(left))
        next_first, next_second = np.sort(among[first])[1], np.sort(among[second])[1]
        dropped = first if (next_first, -first) < (next_second, -second) else second
        del left[dropped]
    return [names[i] for i in left]


def choose_objects(
    packages: dict[str, dict[str, Any]], sets: dict[str, Drawings]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the objects of each task, and the left-over objects for pretraining.

    A task's candidates are its category's objects without skin tones that every studio but the optional ones
    has drawn. They are thinned by their drawings by the training studios only, at 16x16.
    """
    required = [studio.name for studio in STUDIOS if not studio.optional]
    judges = [studio.name for studio in STUDIOS if not studio.optional and studio.split == "train"]
    categories = packages[NAMING_STUDIO]["metadata"]["categories"]
    tasks: dict[str, list[str]] = {}
    for task in TASKS:
        names = [name for name in sorted(categories[task]) if not SKIN_TONE.search(name)]
        names = [name for name in names if all(name in sets[studio] for studio in required)]
        candidates = {}
        for name in names:
            small = [sets[s].render(name).reshape(16, SIZE // 16, 16, SIZE // 16, 3) for s in judges]
            candidates[name] = np.stack([s.mean(axis=(1, 3)).reshape(-1) for s in small]) / 255.0
        tasks[task] = thin(candidates, NUM_OBJECTS)
    return tasks, sorted(left_over(tasks, categories, sets))


def left_over(tasks: dict[str, list[str]], categories: dict[str, list[str]], sets: dict[str, Drawings]) -> set[str]:
    """Return the objects of all categories to pretrain on: none that a task has, under whatever name.

    Left out are skin tones, the tasks' people in another gender ("man-juggling" for "person-juggling"), objects
    that share a drawing with a task's object, and those that too few training studios have drawn.
    """

    def drawn_by(name: str) -> list[Drawings]:
        return [sets[s.name] for s in STUDIOS if s.split == "train" and name in sets[s.name]]

    objects = [name for names in tasks.values() for name in names]
    taken = {GENDER.sub("", name) for name in objects}
    taken_drawings = {drawings.render(name).tobytes() for name in objects for drawings in drawn_by(name)}
    return {
        name
        for name in {name for names in categories.values() for name in names}
        if not SKIN_TONE.search(name)
        and GENDER.sub("", name) not in taken
        and len(drawn_by(name)) >= MIN_PRETRAIN_STUDIOS
        and taken_drawings.isdisjoint(drawings.render(name).tobytes() for drawings in drawn_by(name))
    }


def write_sheet(path: Path, names: list[str], sets: dict[str, Drawings]) -> None:
    """Write one task's contact sheet: a row for each studio, a column for each object, white where none is."""
    sheet = np.full((len(STUDIOS) * SIZE, len(names) * SIZE, 3), 255, dtype=np.uint8)
    for row, studio in enumerate(STUDIOS):
        for column, name in enumerate(names):
            if name in sets[studio.name]:
                drawing = sets[studio.name].render(name)
                sheet[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE] = drawing
    Image.fromarray(sheet).save(path, lossless=True, quality=100, method=6, exact=True)


def write_pack(tasks: dict[str, list[str]], sets: dict[str, Drawings]) -> None:
    """Write the sheets and the manifest that describes them."""
    PACK.mkdir(parents=True, exist_ok=True)
    entries = []
    for task, names in tasks.items():
        path = PACK / (re.sub(r"[^a-z]+", "-", task.lower()) + ".webp")
        write_sheet(path, names, sets)
        lacking = {s.name: [n for n in names if n not in sets[s.name]] for s in STUDIOS if s.optional}
        entries.append(
            {
                "name": task,
                "sheet": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "objects": names,
                "lacking": lacking,
            }
        )
    manifest = {
        "format": 1,
        "size": SIZE,
        "layout": "a row of drawings for each studio, a column for each object, in the order given here",
        "studios": [
            {"name": s.name, "family": s.family, "split": s.split, "package": s.package, "licence": s.licence}
            for s in STUDIOS
        ],
        "tasks": entries,
    }
    (PACK / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def write_licences() -> None:
    """Write who drew what, under which licence, and what was changed."""
    lines = [
        "# Whose drawings these are",
        "",
        "The sheets in this folder hold small renderings of emoji by the studios below. Changes: a choice of "
        f"objects was rendered from SVG at {SIZE}x{SIZE} pixels, put on white and set side by side, one row for "
        "each studio in this order. `pretrained.safetensors` was trained on renderings of other objects by the "
        "same studios, those of the MIT licence left out.",
        "",
        "| row | set | package | licence | attribution |",
        "|---|---|---|---|---|",
    ]
    for row, s in enumerate(STUDIOS):
        lines.append(f"| {row} | {s.title} | npm `{s.package}` | {s.licence} | {s.attribution} |")
    lines += ["", LICENCE_NOTES]
    (PACK / "LICENSES.md").write_text("\n".join(lines), encoding="utf-8")


LICENCE_NOTES = """\
## CC-BY-4.0

Creative Commons Attribution 4.0 International, https://creativecommons.org/licenses/by/4.0/. The
drawings come without warranty; the studios do not endorse this project.

## Apache-2.0

Apache License, Version 2.0, https://www.apache.org/licenses/LICENSE-2.0; its text is this project's
own `LICENSE`.

## MIT (Fluent Emoji, Fluent Emoji Flat)

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def write_pretraining(names: list[str], sets: dict[str, Drawings]) -> None:
    """Write the left-over objects' drawings by the training studios: images (N, SIZE, SIZE, 3), labels (N,)."""
    images, labels, studios = [], [], []
    for label, name in enumerate(names):
        for studio in STUDIOS:
            if studio.split == "train" and name in sets[studio.name]:
                images.append(sets[studio.name].render(name))
                labels.append(label)
                studios.append(studio.name)
    BUILD.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        BUILD / "pretrain.npz",
        images=np.stack(images),
        labels=np.array(labels, dtype=np.int64),
        studios=np.array(studios),
        names=np.array(names),
    )


def main() -> None:
    """Build the pack and the pretraining set."""
    parser = argparse.ArgumentParser(description="Build the emoji8 pack.")
    parser.add_argument("--npm-cache", type=Path, default=BUILD / "npm", help="folder that keeps the fetched packages")
    cache: Path = parser.parse_args().npm_cache
    packages = {studio.name: fetch_package(studio, cache.resolve()) for studio in STUDIOS}
    sets = {name: Drawings(package["icons"]) for name, package in packages.items()}
    tasks, rest = choose_objects(packages, sets)
    write_pack(tasks, sets)
    write_licences()
    write_pretraining(rest, sets)
    num_bytes = sum(path.stat().st_size for path in PACK.iterdir())
    print(f"{PACK}: {num_bytes / 1e6:.2f} MB; {len(rest)} objects left over for pretraining")


if __name__ == "__main__":
    main()
