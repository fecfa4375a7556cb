"""The nightly job: learn a new section without forgetting what users relied on today; then serve it, or refuse it.

Adds up what the replicas observed, folds the sum into the memory, and trains protected by the memory. Then the old and
the new version answer yesterday's requests, without labels. Unless the verdict is "safe", the old version stays and the
exit code is 1. If it is, the new version replaces the old one, which is kept beside it, and the replicas are told to
reload; the exit code is 2 if one did not.
"""

import argparse
import json
import sys
import warnings
from functools import reduce
from http.client import HTTPConnection, HTTPException
from operator import add
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import safe_open

import memsyn
from memsyn_bench.data.drawings import normalise
from model import FILE, Served, drawings, grown, load, save
from train import learn, num_right, optimizer_of
from users import YESTERDAY


def observed(folder: Path, served: Served) -> memsyn.Importance:
    """The importance that all replicas measured at this version; the folder holds stores of other versions, too."""
    mark = memsyn.fingerprint(served.network)
    stores = [memsyn.Importance.load(path) for path in sorted(folder.glob("traffic-*.safetensors"))]
    stores = [store for store in stores if store.fingerprint == mark]
    if not stores:
        raise SystemExit(f"no replica has observed version {served.version} in {folder}: serve it first.")
    found = reduce(add, stores)
    print(f"traffic of version {served.version}: {found.num_samples} samples from {len(stores)} replicas")
    return found


def remembered(folder: Path, served: Served) -> memsyn.Memory:
    """The memory of this version: half the earlier importance, half today's. It may be made again."""
    before = folder / f"memory-{served.version - 1}.safetensors"
    memory = memsyn.Memory.empty()
    if before.exists():
        with warnings.catch_warnings():  # it is the memory of the version before: other weights, and one head fewer
            warnings.simplefilter("ignore", memsyn.MovedWeightsWarning)
            warnings.simplefilter("ignore", memsyn.NewParametersWarning)
            memory = memsyn.Memory.load(before, like=served.network)
    label = f"traffic of version {served.version}"
    memory = memory.consolidate(served.network, observed(folder, served), rule="ema", label=label)
    memory.save(folder / f"memory-{served.version}.safetensors")
    return memory


def asked(folder: Path, served: Served) -> tuple[list[dict[str, Any]], list[str]]:
    """Yesterday's requests in batches of one section each, and the section of each request. Labels are not read."""
    with safe_open(folder / YESTERDAY, framework="pt") as file:
        sections = json.loads(file.metadata()["sections"])
        pixels, places = file.get_tensor("pixels"), file.get_tensor("places")
    batches: list[dict[str, Any]] = []
    segments: list[str] = []
    for place, section in enumerate(sections):
        images = normalise(pixels[places == place])
        batches += [{"inputs": part, "task": served.head(section)} for part in images.split(32)]
        segments += [section] * len(images)
    return batches, segments


def show_accuracy(folder: Path, old: Served, new: Served) -> None:
    """For readers alone: simulated users know what they drew. Nothing is decided by it."""
    with safe_open(folder / YESTERDAY, framework="pt") as file:
        if "labels" not in file.keys():  # noqa: SIM118
            return
        sections = json.loads(file.metadata()["sections"])
        pixels, places, labels = (file.get_tensor(name) for name in ("pixels", "places", "labels"))
    for place, section in enumerate(sections):
        own, head = places == place, old.head(section)
        counts = [num_right(v.network, head, normalise(pixels[own]), labels[own]) for v in (old, new)]
        print(f"  {section}: {counts[0]} of {int(own.sum())} right before, {counts[1]} now")


def is_safe(folder: Path, old: Served, new: Served, min_agreement: float, max_change: float) -> bool:
    """Whether the new version may be served, by both versions' answers to yesterday's requests."""
    batches, segments = asked(folder, old)
    comparison = memsyn.compare(new.network, old.network, batches, segments=segments, progress=False)
    verdict = comparison.verdict(min_agreement, max_change)
    print(comparison)
    show_accuracy(folder, old, new)
    print(verdict)
    return verdict.answer == "safe"


def tell(url: str) -> bool:
    """Have a replica reload; returns whether it did."""
    where = urlsplit(url)
    connection = HTTPConnection(str(where.hostname), where.port, timeout=60)
    try:
        connection.request("POST", "/reload")
        response = connection.getresponse()
        print(f"{url}: {response.read().decode()}")
        return response.status == 200
    except (OSError, HTTPException) as error:
        print(f"{url} does not answer ({error}): start it again, and it serves the new version.")
        return False
    finally:
        connection.close()


def main() -> int:
    """One night; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/serve"))
    parser.add_argument("--learn", required=True, help="the section to learn")
    parser.add_argument("--reload", nargs="*", default=[], metavar="URL", help="of the replicas")
    parser.add_argument("--min-agreement", type=float, default=0.97, help="the least share of same answers")
    parser.add_argument("--max-change", type=float, default=0.05, help="the largest relative change of outputs")
    parser.add_argument("--strength", type=float, default=10.0, help="of the protection, as memsyn.Relative takes it")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-4, help="of the body")
    given = parser.parse_args()
    torch.set_num_threads(1)
    old = load(given.folder / FILE)
    if given.learn in old.sections:
        raise SystemExit(f"version {old.version} knows {given.learn} already: learn another section.")
    task = drawings(old.side)[given.learn]
    new = grown(old, given.learn, task.class_names, seed=old.version)
    memory = remembered(given.folder, old)
    optimizer = optimizer_of(new.network, given.lr)
    with warnings.catch_warnings():  # the new head is free, as it should be
        warnings.simplefilter("ignore", memsyn.NewParametersWarning)
        memsyn.protect(optimizer, new.network, memory, strength=memsyn.Relative(given.strength))
    head = new.head(given.learn)
    learn(new.network, {head: (task.train_images, task.train_labels)}, optimizer, epochs=given.epochs, seed=old.version)
    right = num_right(new.network, head, task.test_images, task.test_labels)
    print(f"version {new.version} has learned {given.learn}: {right} of {len(task.test_labels)} unseen drawings right")
    if not is_safe(given.folder, old, new, given.min_agreement, given.max_change):
        print(
            f"REFUSED: version {old.version} goes on. Try a larger --strength, fewer --epochs or a smaller --lr; or "
            "allow more by --min-agreement and --max-change."
        )
        return 1
    save(old, given.folder / f"model-{old.version}.safetensors")
    save(new, given.folder / FILE)
    print(f"accepted: version {new.version} is served.")
    failed = [url for url in given.reload if not tell(url)]
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
