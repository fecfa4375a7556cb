"""Forged stores of an observer, with right checksums: it goes on from the same sums, or beside the file, and writes."""

import random
import resource
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memsyn
from memsyn.live.segment_files import SegmentFiles
from memsyn.live.window import Window
from memsyn.storage.reading_and_writing import IMPORTANCE
from memsyn.storage.writer_locks import WriterLocks
from tests.forgeries import forgeries
from tests.large import peak_of
from tests.sealing import put_together, taken_apart

pytestmark = pytest.mark.soak

DAY = 86_400.0
NOW = 20_000 * DAY
WINDOWS: dict[str, dict[str, timedelta]] = {
    "all": {},
    "last": {"last": timedelta(days=7)},
    "half-life": {"half_life": timedelta(days=1)},
}
CANNOT_BE_TOLD = (
    "sum/", "fingerprint", "objective", "magnitude", "routes", "memsyn",
    "observed.at", "observed.window", "observed.first", "observed.last",
    "observed.buckets.0.first", "observed.buckets.0.last", "observed.buckets.1.first", "observed.buckets.1.last",
    "observed.buckets.0.total", "observed.buckets.1.total", "observed.buckets.0.weight",
    "observed.buckets.0.num_samples", "19998/", "20000/",
)  # fmt: skip
"""Where another value may be right too: sums, times within a bucket, and text. A checksum is no signature."""

LOCKS = WriterLocks()
"""One writer: these tests open a store again and again."""


def sums(value: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([value, 2.0]), "b": torch.tensor([1.0])}


def opened(store: Path, given: dict[str, timedelta]) -> tuple[SegmentFiles, Window]:
    files, window = SegmentFiles(store, ["a model", given == {}], LOCKS, IMPORTANCE), Window(**given)
    files.open(None, window, {name: torch.zeros_like(own) for name, own in sums(0).items()})
    return files, window


def write(files: SegmentFiles, window: Window, at: float) -> None:
    """Add two samples, and write the file."""
    window.add(sums(5.0), 2, 8.0, at)
    header, groups, count = window.saved(at)
    held = memsyn.Importance(groups.pop("importance"), count, {"w": "rule"})
    files.write(None, held, header, groups)


def a_store(store: Path, given: dict[str, timedelta]) -> bytes:
    files, window = opened(store, given)
    window.add(sums(1.0), 3, 4.0, NOW - 2 * DAY)
    write(files, window, NOW)
    return store.read_bytes()


def told(window: Window) -> Any:
    return [(vars(bucket.header), [own.tolist() for own in bucket.sums.totals().values()]) for bucket in window.buckets]


@pytest.mark.parametrize("kind", WINDOWS)
def test_forged_stores(kind: str, soak: bool, tmp_path: Path) -> None:
    given, store, outcomes = WINDOWS[kind], tmp_path / "traffic.safetensors", Counter[str]()
    whole = a_store(store, given)
    expected = told(opened(store, given)[1])
    every = list(forgeries(whole))
    for forgery in every if soak else random.Random(1).sample(every, len(every) // 20):
        store.write_bytes(forgery.content)
        files, window = opened(store, given)
        found = told(window)
        outcome = "same" if found == expected else "beside" if not found else "other"
        assert outcome != "other" or forgery.field.startswith(CANNOT_BE_TOLD), (forgery, found)
        write(files, window, NOW + 60)
        others = [path for path in tmp_path.glob("[!.]*") if path != store]
        assert len(others) == (outcome == "beside"), forgery
        assert outcome != "beside" or store.read_bytes() == forgery.content
        for path in others:
            assert memsyn.Importance.load(path).num_samples == 2
            path.unlink()
        outcomes[outcome] += 1
    print(f"\nstores, {kind}: {dict(outcomes)}")


def test_a_date_that_is_none_does_not_stop_an_observer(tmp_path: Path) -> None:
    store = tmp_path / "traffic.safetensors"
    entry, header, data = taken_apart(a_store(store, {}))
    entry["observed"]["buckets"][0]["first"] = 1e300
    store.write_bytes(put_together(entry, header, data))
    files, window = opened(store, {})
    write(files, window, NOW)
    (written,) = set(tmp_path.glob("[!.]*")) - {store}
    assert memsyn.Importance.load(written).num_samples == 2


def test_many_buckets_take_no_memory(tmp_path: Path) -> None:
    """20,000 of them: their tensors are read, and refused."""
    store = tmp_path / "traffic.safetensors"
    given = WINDOWS["last"]
    entry, header, _data = taken_apart(a_store(store, given))
    width, count = 7 * DAY / 7, 20_000
    first = dict(entry["observed"]["buckets"][0])
    places = [int(NOW / DAY) - count + 1 + index for index in range(count)]
    entry["observed"]["buckets"] = [
        {**first, "place": place, "first": place * width, "last": place * width} for place in places
    ]
    own = {name: place for name, place in header.items() if name.startswith("sum/")}
    size = sum(end - start for start, end in (place["data_offsets"] for place in own.values()))
    names = [name.removeprefix("sum/") for name in own]
    entry["groups"] = {"sum": names, **{str(place): names for place in places}}
    found, parts = {}, []
    for index, group in enumerate(["sum", *map(str, places)]):
        end = index * size
        for name in names:
            length = own[f"sum/{name}"]["data_offsets"][1] - own[f"sum/{name}"]["data_offsets"][0]
            found[f"{group}/{name}"] = {**own[f"sum/{name}"], "data_offsets": [end, end + length]}
            end += length
        parts.append(bytes(size))
    store.write_bytes(put_together(entry, found, b"".join(parts)))
    LOCKS.release()
    code = f"from tests.test_forged_stores import peak; peak({str(store)!r})"
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    print(f"\n{store.stat().st_size / 1e6:.1f} MB with {count} buckets: {peak / 1e6:.0f} MB more")
    assert peak < 50 * store.stat().st_size


def peak(store: str) -> None:
    """Print the bytes by which memory grew while a store was opened."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    (_, window), highest, _ = peak_of(partial(opened, Path(store), WINDOWS["last"]))
    assert not window.buckets
    print(highest - before)
