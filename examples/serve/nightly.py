"""The nightly job: learn a new section without forgetting what users relied on today; then serve it, or refuse it.

Adds up what the replicas observed, if that is enough and their halves agree, folds the sum into the memory, and trains
protected by the memory. Then the old and the new version answer yesterday's requests, without labels. Unless the
verdict is "safe", the old version stays and the exit code is 1. If it is, the verdict is written, the new version
replaces the old one, which is kept beside it, and the replicas are told to reload; the exit code is 2 if one did not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import memsyn
from admission import SAFE, alone, beside, judge
from memsyn_bench.data.drawings import normalise
from model import FILE, Served, drawings, grown, load, save
from replicas import tell
from train import learn, num_right, optimizer_of
from users import YESTERDAY


def stored(folder: Path, served: Served) -> dict[str, memsyn.Importance]:
    """What each worker measured at this version, by the name of its store; the folder holds other versions' stores."""
    found = {}
    for path in sorted(folder.glob("traffic-*.safetensors")):
        try:
            store = memsyn.Importance.load(path)
        except memsyn.MemoryFileError as error:
            print(f"left out: {error}")
            continue
        if store.matches(served.network):
            found[path.name] = store
    return found


def observed(folder: Path, served: Served, given: argparse.Namespace) -> memsyn.Importance:
    """The importance that all replicas measured at this version, if it is enough to rely on."""
    stores = stored(folder, served)
    if not stores:
        raise SystemExit(f"no replica has observed version {served.version} in {folder}: serve it first.")
    found = reduce(add, stores.values())
    # traffic-A.safetensors and traffic-A_2.1a2b3c4d.safetensors are of one replica
    names = {name.removeprefix("traffic-").split(".")[0].split("+")[0].split("_")[0] for name in stores}
    print(f"traffic of version {served.version}: {found.num_samples} samples from {len(names)} replicas")
    if len(names) < given.min_replicas or found.num_samples < given.min_samples:
        raise SystemExit(
            f"that is too little to learn by: {given.min_samples} samples and {given.min_replicas} replicas are asked "
            f"for. Version {served.version} goes on. Wait for more requests, or lower --min-samples or --min-replicas."
        )
    if len(stores) == 1:
        print("there is one store alone: whether another half of the requests would agree is not known")
        return found
    parts = list(stores.values())
    agreement = rank_correlation(reduce(add, parts[::2]), reduce(add, parts[1::2]))
    print(f"two halves of the stores agree by {agreement:.3f} (Spearman); {given.min_converged} is asked for")
    if not agreement >= given.min_converged:
        raise SystemExit(
            f"the halves rank the weights too differently. Version {served.version} goes on. Wait for more requests, "
            "or lower --min-converged."
        )
    return found


def rank_correlation(one: memsyn.Importance, other: memsyn.Importance) -> float:
    """Spearman's, over the weights, as `memsyn diff` has it; NaN if it is not defined."""
    with tempfile.TemporaryDirectory() as folder:
        one.save(f"{folder}/one")
        other.save(f"{folder}/other")
        command = ["-c", "from memsyn.cli import app; app()", "diff", f"{folder}/one", f"{folder}/other", "--json"]
        found = json.loads(subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, check=False).stdout)
    return float("nan") if found["rank_correlation"] is None else float(found["rank_correlation"])


def remembered(folder: Path, served: Served, found: memsyn.Importance) -> memsyn.Memory:
    """The memory of this version: half the earlier importance, half today's. It may be made again.

    The earlier one is that of the version from which this one learned on, by fingerprint.
    """
    memory = memsyn.Memory.empty()
    if served.version > 1:
        memory = memory_of(folder, version_before(folder, served))
    with warnings.catch_warnings():  # it is of other weights, and of one head fewer
        warnings.simplefilter("ignore", memsyn.NewParametersWarning)
        label = f"traffic of version {served.version}"
        memory = memory.consolidate(served.network, found, rule="ema", label=label)
    memory.save(beside(folder, "memory", memsyn.fingerprint(served.network)))
    return memory


def version_before(folder: Path, now: Served) -> Served:
    """The kept version from which this one learned on, checked."""
    if now.parent is None:
        raise SystemExit(f"version {now.version} learned on from none: there is nothing to go back to.")
    path = beside(folder, "model", now.parent)
    if not path.exists():
        raise SystemExit(f"{path}, from which version {now.version} learned on, is missing: put it back.")
    before = load(path)
    if memsyn.fingerprint(before.network) != now.parent:
        raise SystemExit(f"{path} has other weights than version {now.version} learned on from: put it back.")
    return before


def memory_of(folder: Path, served: Served) -> memsyn.Memory:
    """The memory that was made at a version's weights."""
    path = beside(folder, "memory", memsyn.fingerprint(served.network))
    if not path.exists():
        raise SystemExit(f"{path}, the memory of version {served.version}, is missing: put it back.")
    memory = memsyn.Memory.load(path)
    if not memory.matches(served.network):
        raise SystemExit(f"{path} is not the memory of version {served.version}: put the right one there.")
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


def verdict_on(folder: Path, old: Served, new: Served, given: argparse.Namespace) -> memsyn.Verdict:
    """Whether the new version may be served, by both versions' answers to yesterday's requests."""
    batches, segments = asked(folder, old)
    comparison = memsyn.compare(new.network, old.network, batches, segments=segments, progress=False)
    verdict = comparison.verdict(given.min_agreement, given.max_change)
    print(comparison)
    show_accuracy(folder, old, new)
    print(verdict)
    return verdict


def learned(old: Served, memory: memsyn.Memory, given: argparse.Namespace) -> Served:
    """The next version, which has learned a section more under the memory's protection."""
    task = drawings(old.side)[given.learn]
    new = grown(old, given.learn, task.class_names, seed=old.version)
    optimizer = optimizer_of(new.network, given.lr)
    with warnings.catch_warnings():  # the new head is free, as it should be
        warnings.simplefilter("ignore", memsyn.NewParametersWarning)
        memsyn.protect(optimizer, new.network, memory, strength=memsyn.Relative(given.strength))
    head = new.head(given.learn)
    learn(new.network, {head: (task.train_images, task.train_labels)}, optimizer, epochs=given.epochs, seed=old.version)
    right = num_right(new.network, head, task.test_images, task.test_labels)
    print(f"version {new.version} has learned {given.learn}: {right} of {len(task.test_labels)} unseen drawings right")
    return new


def night(given: argparse.Namespace) -> int:
    """One night; returns the exit code."""
    old = load(given.folder / FILE)
    if given.learn in old.sections:
        raise SystemExit(f"version {old.version} knows {given.learn} already: learn another section.")
    memory = remembered(given.folder, old, observed(given.folder, old, given))
    new = learned(old, memory, given)
    verdict = verdict_on(given.folder, old, new, given)
    if verdict.answer != SAFE:
        print(
            f"REFUSED: version {old.version} goes on. Try a larger --strength, fewer --epochs or a smaller --lr; or "
            "allow more by --min-agreement and --max-change."
        )
        return 1
    # The last line changes what is served. A night that ends before it may be run again.
    judge(given.folder, new, verdict.answer, verdict.sentence)
    save(old, beside(given.folder, "model", memsyn.fingerprint(old.network)))
    save(new, given.folder / FILE)
    print(f"accepted: version {new.version} is served.")
    failed = [url for url in given.reload if not tell(url)]
    return 2 if failed else 0


def main() -> int:
    """Read the options, and work alone in the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/serve"))
    parser.add_argument("--learn", required=True, help="the section to learn")
    parser.add_argument("--reload", nargs="*", default=[], metavar="URL", help="of the replicas")
    parser.add_argument("--min-samples", type=int, default=128, help="the least number of measured samples")
    parser.add_argument("--min-replicas", type=int, help="the least number that measured; all of --reload by default")
    parser.add_argument("--min-converged", type=float, default=0.9, help="the least agreement of halves of the stores")
    parser.add_argument("--min-agreement", type=float, default=0.97, help="the least share of same answers")
    parser.add_argument("--max-change", type=float, default=0.05, help="the largest relative change of outputs")
    parser.add_argument("--strength", type=float, default=10.0, help="of the protection, as memsyn.Relative takes it")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-4, help="of the body")
    given = parser.parse_args()
    if given.min_replicas is None:
        given.min_replicas = max(1, len(given.reload))
    torch.set_num_threads(1)
    with alone(given.folder):
        return night(given)


if __name__ == "__main__":
    sys.exit(main())
