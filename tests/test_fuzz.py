"""Opening a stranger's file is safe: only errors of ours, nothing damaged that loads, memory bounded by its size."""

import json
import os
import random
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from memsyn import Importance, KroneckerFactors, Memory, MemoryFileError
from memsyn.storage.reading_and_writing import write
from memsyn.values.comparison import diff
from memsyn.values.memory import directions_of
from tests import golden, hostile
from tests.sealing import put_together, sealed, taken_apart

pytestmark = pytest.mark.soak


@contextmanager
def no_more_memory_than(num_bytes: int) -> Iterator[None]:
    """Beyond what the process has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "it"


def whole_files(path: Path) -> list[bytes]:
    found = []
    for kind, header, groups in hostile.sources():
        write(path, kind, header, groups)
        found.append(path.read_bytes())
    for value in (golden.importance(), golden.memory()):
        value.save(path)
        found.append(path.read_bytes())
    found += [(golden.FOLDER / f"0.1.0-{kind}.safetensors").read_bytes() for kind in ("importance", "memory")]
    return found


def loaded(path: Path, again: Path) -> list[str]:
    """What a file is taken for; that must be sound, and be written and read again."""
    kinds = []
    for kind in (Importance, Memory, KroneckerFactors):
        value = None
        with suppress(MemoryFileError):
            value = kind.load(path)
        if value is None:
            continue
        assert_sound(value)
        value.save(again)
        assert_sound(kind.load(again))
        kinds.append(kind.__name__)
    return kinds


def assert_sound(value: Importance | Memory | KroneckerFactors) -> None:
    if isinstance(value, KroneckerFactors) or (isinstance(value, Memory) and value.directions is not None):
        assert_sound_directions(value)
    if isinstance(value, (Importance, KroneckerFactors)):
        omega, counts = value.sums, [value.num_samples]
        assert value.num_samples >= 1
        assert all(isinstance(text, str) for text in (*value.quantity, *value.routes, *value.routes.values()))
    else:
        omega, counts = value.importance, [*value.counts.values(), *(entry.num_samples for entry in value.history)]
        assert {n: t.shape for n, t in value.anchor.items()} == {n: t.shape for n, t in omega.items()}
        kept = [*value.anchor.values(), *value.statistics.values()]
        assert all(tensor.is_floating_point() and bool(tensor.isfinite().all()) for tensor in kept)
        for entry in value.history:
            assert all(isinstance(text, str) for text in (entry.when, entry.rule, entry.objective, entry.magnitude))
            assert entry.decay is None or abs(entry.decay) < float("inf")
    assert all(type(number) is int and 0 <= number < 2**63 for number in counts)
    for name, tensor in omega.items():
        name.encode()
        assert tensor.is_floating_point()
        assert bool(tensor.isfinite().all())
        assert isinstance(value, KroneckerFactors) or bool((tensor >= 0).all())


def assert_sound_directions(value: Memory | KroneckerFactors) -> None:
    """What `inspect`, `diff` and `merge` compute of them is computed."""
    directions = directions_of(value)
    assert directions is not None
    for layer in directions.summary():
        assert 0 <= layer.room <= 1
        assert layer.mass > 0
    if isinstance(value, KroneckerFactors):
        assert all(layer.input_dimension >= 0 for layer in value.summary())
        assert (value + value).num_samples == 2 * value.num_samples
    found = diff(value, value)
    assert found.same
    assert all(layer.input_overlap is None or 0 <= layer.input_overlap <= 1 for layer in found.directions)


def test_damaged_and_forged_files(path: Path, soak: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # saving again is done often, and is not about the disk
    rng, whole, again = random.Random(0), whole_files(path), path.with_name("again")
    num_files, refused, taken = 24_000 if soak else 1_000, 0, 0
    path.unlink()
    with open(path, "w+b", buffering=0) as file, no_more_memory_than(2**27):
        for number in tqdm(range(num_files), "files fuzzed"):
            source = rng.choice(whole)
            keeps_checksum = number % 3 == 0
            content = hostile.damaged(rng, source, rng.choice(whole)) if keeps_checksum else hostile.forged(rng, source)
            file.seek(0)
            file.truncate()
            file.write(content)
            kinds = loaded(path, again)
            assert not kinds or not keeps_checksum or content in whole
            taken += bool(kinds)
            refused += not kinds
    tqdm.write(f"{num_files} files: {refused} refused, {taken} sound and loaded")
    assert refused > num_files / 2
    assert taken > num_files / 50  # so the forged checksums are right, and the checks behind them are reached
    assert {entry.name for entry in path.parent.iterdir()} <= {"it", "again"}


GROUPS = {1: "importance", 2: "sum"}
"""Format -> the group of an importance file's sums."""


def forge(path: Path, tensors: dict[str, object], data: bytes = bytes(8), written: int = 2, **changes: object) -> None:
    """An importance file with the right checksum; the tensors' names begin with `sum/`, which format 1 has not."""
    tensors = {name.replace("sum/", f"{GROUPS[written]}/"): place for name, place in tensors.items()}
    names = [name.removeprefix(f"{GROUPS[written]}/") for name in tensors]
    entry = {
        "checksum": "", "format": written, "groups": {GROUPS[written]: names}, "kind": "importance", "magnitude": "abs",
        "memsyn": "0.1.0", "num_samples": 3, "objective": "o", "routes": {}, **changes,
    }  # fmt: skip
    path.write_bytes(put_together(entry, tensors, data))


def tensor(*offsets: object, dtype: object = "F32", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FORGED = {
    "overlap": ({"sum/a": tensor(0, 4), "sum/b": tensor(0, 4)}, "should take 4 bytes from 4 on"),
    "inside": (
        {"sum/a": tensor(0, 8, shape=[2]), "sum/b": tensor(4, 8)},
        "should take 4 bytes from 8 on",
    ),
    "gap": ({"sum/a": tensor(4, 8)}, "should take 4 bytes from 0 on; its offsets are 4 and 8"),
    "before the start": ({"sum/a": tensor(-4, 8, shape=[3])}, "should take 12 bytes from 0 on"),
    "backwards": ({"sum/a": tensor(8, 0, shape=[2])}, "should take 8 bytes from 0 on"),
    "too short": ({"sum/a": tensor(0, 8)}, "should take 4 bytes from 0 on"),
    "too long": ({"sum/a": tensor(0, 2**40, shape=[2**38])}, r"is truncated.*expected 109951162\d+ bytes"),
    "overflow": ({"sum/a": tensor(0, 8, shape=[2**62, 4])}, "should take 73786976294838206464 bytes"),
    "floats": ({"sum/a": tensor(0, 8.0, shape=[2])}, "should take 8 bytes"),
    "negative": ({"sum/a": tensor(0, 8, shape=[-1, -2])}, r"has dtype 'F32' and shape \[-1, -2\]"),
    "true": ({"sum/a": tensor(0, 8, shape=[True, 2])}, r"shape \[True, 2\]"),
    "dimensions": ({"sum/a": tensor(0, 8, shape=[2] + [1] * 64)}, "shape"),
    "unknown dtype": ({"sum/a": tensor(0, 8, dtype="F7")}, "has dtype 'F7'"),
    "integers": ({"sum/a": tensor(0, 8, dtype="I64")}, "is torch.int64; expected a floating point type"),
    "no integers": (
        {"sum/a": tensor(0, 8, shape=[2]), "sum/b": tensor(8, 8, shape=[0, 3], dtype="I64")},
        "is torch.int64; expected a floating point type",
    ),
    "no object": ({"sum/a": 3}, "could not be read: TypeError"),
    "no dtype": ({"sum/a": {"shape": [2], "data_offsets": [0, 8]}}, "could not be read: KeyError"),
    "other names": ({"elsewhere/a": tensor(0, 8, shape=[2])}, "are not those that its metadata names"),
    "surrogate": ({"sum/\ud800": tensor(0, 8, shape=[2])}, "has no memsyn metadata"),
}


@pytest.mark.parametrize("written", GROUPS)
@pytest.mark.parametrize("case", FORGED)
def test_forged_headers(case: str, written: int, path: Path) -> None:
    tensors, message = FORGED[case]
    forge(path, tensors, written=written)
    with no_more_memory_than(2**27), pytest.raises(MemoryFileError, match=message):
        Importance.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": {"sum": ["a", "a"]}}, "are not those that its metadata names"),
        ({"groups": {}}, "are not those that its metadata names"),
        ({"groups": {"sum": "a"}}, "are not those that its metadata names"),
        ({"groups": {"importance": ["a"]}}, "are not those that its metadata names"),
        ({"format": 1}, "is not as memsyn writes it: KeyError: 'importance'"),
        ({"format": True}, "has no format number"),
        ({"format": 0}, "has no format number"),
        ({"format": 3}, "has format 3"),
        ({"kind": ["importance"]}, r"is of kind \['importance'\]; expected 'importance'"),
        ({"num_samples": 0}, "is not as memsyn writes it: ValueError: num_samples is 0; expected a count from 1"),
        ({"routes": []}, r"is not as memsyn writes it: TypeError: routes is \[\]; expected an object"),
        ({"decay": float("nan")}, "has no memsyn metadata"),
        ({"checksum": ["sha256:"]}, "could not be read: AttributeError"),
    ],
)
def test_forged_metadata(change: dict[str, object], message: str, path: Path) -> None:
    forge(path, {"sum/a": tensor(0, 8, shape=[2])})
    assert Importance.load(path).num_samples == 3
    entry, header, data = taken_apart(path.read_bytes())
    text = json.dumps({"__metadata__": {"memsyn": json.dumps({**entry, **change})}, **header})
    path.write_bytes(sealed(text.encode(), data))
    with pytest.raises(MemoryFileError, match=message):
        Importance.load(path)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}"]
)
def test_headers_that_are_no_json(text: bytes, path: Path) -> None:
    path.write_bytes(sealed(text, b""))
    with pytest.raises(MemoryFileError, match="has no memsyn metadata"):
        Importance.load(path)


def test_what_is_said_twice_is_refused(path: Path) -> None:
    golden.importance().save(path)
    entry, header, data = taken_apart(path.read_bytes())
    text = json.dumps({"__metadata__": {"memsyn": json.dumps(entry)}, **header})
    for once, twice in (
        (r"\"num_samples\": 4", r"\"num_samples\": 4, \"num_samples\": 5"),
        ('"sum/layer.bias"', '"sum/layer.bias": 1, "sum/layer.bias"'),
    ):
        assert text.count(once) == 1
        path.write_bytes(sealed(text.replace(once, twice).encode(), data))
        with pytest.raises(MemoryFileError, match="has no memsyn metadata"):
            Importance.load(path)
    path.write_bytes(sealed(text.encode(), data))
    assert Importance.load(path).num_samples == 4


def test_names_are_no_paths(path: Path) -> None:
    """A name is only ever a key: nothing is opened by it."""
    names = ["../escaped", "/etc/passwd", "..", "", "a/b/../c", "\x00", "C:\\x"]
    Importance({name: torch.ones(2) for name in names}, 1).save(path)
    assert list(Importance.load(path).sums) == names
    assert [entry.name for entry in path.parent.iterdir()] == ["it"]
    assert [entry.name for entry in path.parent.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("bomb", ["[%s{}]", "[%s[]]", "[%s1e1]", '[%s"ab"]', "[%s999]", '["😀%s"]', '["%s\\u00e9"]'])
def test_memory_is_bounded_by_the_files_size(bomb: str, path: Path) -> None:
    """Header or metadata of a quarter of a megabyte, whatever is in it."""
    part = "a" if bomb[1] == '"' or (bomb[-2] == '"' and len(bomb) > 8) else f"{bomb[3:-1]},"
    many = bomb % (part * (2**18 // len(part)))
    for inside in (many, json.dumps(f'{{"x": {many}}}')):
        path.write_bytes(sealed(f'{{"__metadata__": {{"memsyn": {inside}}}}}'.encode(), b""))
        tracemalloc.start()
        with pytest.raises(MemoryFileError):
            Importance.load(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50 * path.stat().st_size + 2**16


@pytest.mark.parametrize("length", [0, 1, 9, 10**6, 10**8, 2**31, 2**63, 2**64 - 1])
def test_a_huge_header(length: int, path: Path) -> None:
    path.write_bytes(length.to_bytes(8, "little") + b"{" * 8)
    with no_more_memory_than(2**27), pytest.raises(MemoryFileError, match="and no whole safetensors header"):
        Importance.load(path)


def test_a_million_tensors(path: Path, soak: bool) -> None:
    num_tensors = 1_000_000 if soak else 20_000
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    forge(path, {f"sum/{number}": entry for number in range(num_tensors)}, b"")
    with no_more_memory_than(64 * path.stat().st_size + 2**27):
        assert len(Importance.load(path).sums) == num_tensors
    forge(path, {f"sum/{number}": entry for number in range(num_tensors)}, b"", groups={"sum": []})
    with pytest.raises(MemoryFileError, match="are not those that its metadata names"):
        Importance.load(path)
