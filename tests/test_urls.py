"""Files at URLs: uploaded whole, read block by block."""

import sys
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

import memsyn
from tests import golden

URL = "memory://bucket/folder/it.safetensors"


@pytest.fixture(autouse=True)
def _empty_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])


def content() -> bytes:
    return bytes(fsspec.filesystem("memory").cat_file("/bucket/folder/it.safetensors"))


@pytest.mark.parametrize("kind", ["importance", "memory"])
def test_what_is_uploaded_is_what_a_file_would_be(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    value = getattr(golden, kind)()
    value.save(URL)
    assert content() == (golden.FOLDER / f"{golden.LATEST}-{kind}.safetensors").read_bytes()
    assert list(MemoryFileSystem.store) == ["/bucket/folder/it.safetensors"]
    assert list(tmp_path.iterdir()) == []
    loaded = type(value).load(URL)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == content()


def test_larger_than_a_block() -> None:
    importance = memsyn.Importance({"w": torch.arange(3.0e6)}, 2)
    importance.save(URL)
    importance.save(URL)  # over an older one
    assert torch.equal(memsyn.Importance.load(URL).sums["w"], importance.sums["w"])


def test_a_url_of_a_local_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / f".it.{'0a' * 8}.tmp").touch()
    golden.memory().save(f"file://{tmp_path}/it")
    assert [entry.name for entry in tmp_path.iterdir()] == ["it"]  # as for any path, a killed writer's is removed
    assert memsyn.Memory.load(f"file://{tmp_path}/it").counts == golden.memory().counts
    assert memsyn.Memory.load(tmp_path / "it").counts == golden.memory().counts


def test_a_url_may_go_through_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    golden.memory().save(URL)
    assert memsyn.Memory.load(f"simplecache::{URL}").counts == golden.memory().counts


def test_an_upload_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden.importance().save(URL)
    before, write = content(), MemoryFile.write

    def breaks_off(self: MemoryFile, data: bytes) -> int:
        write(self, data[:100])
        raise RuntimeError("the line is dead")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(MemoryFile, "write", breaks_off, raising=False)
    with pytest.raises(memsyn.MemoryFileError, match=r"could not be written: RuntimeError: the line is dead.*is whole"):
        (golden.importance() + golden.importance()).save(URL)
    assert content() == before
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(memsyn.MemoryFileError, match=r"sum/w holds NaN"):
        memsyn.Importance({"w": torch.tensor([float("nan")])}, 1).save(URL)
    assert content() == before


def test_an_upload_that_does_not_arrive_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def loses_the_end(self: MemoryFileSystem, lpath: str, rpath: str) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes()[:-3])

    monkeypatch.setattr(MemoryFileSystem, "put_file", loses_the_end)
    size = len((golden.FOLDER / f"{golden.LATEST}-importance.safetensors").read_bytes())
    with pytest.raises(
        memsyn.MemoryFileError, match=rf"could not be written: {size} bytes were sent, {size - 3} arrived"
    ):
        golden.importance().save(URL)


def test_damage_is_noticed() -> None:
    golden.importance().save(URL)
    whole = content()
    for damaged, message in ((whole[:-1], "is truncated"), (whole[:-1] + b"\x01", "is damaged"), (b"", "truncated")):
        fsspec.filesystem("memory").pipe_file("/bucket/folder/it.safetensors", damaged)
        with pytest.raises(memsyn.MemoryFileError, match=rf"{URL} .*{message}"):
            memsyn.Importance.load(URL)


def test_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(memsyn.MemoryFileError, match=r"memory://no/such does not exist"):
        memsyn.Memory.load("memory://no/such")
    with pytest.raises(memsyn.MemoryFileError, match=r"no://such could not be read: .*Protocol not known: no"):
        memsyn.Memory.load("no://such")
    with pytest.raises(memsyn.MemoryFileError, match=r"no://such could not be written: .*Protocol not known: no"):
        golden.memory().save("no://such")
    monkeypatch.setattr(MemoryFileSystem, "size", lambda *args: None)
    with pytest.raises(
        memsyn.MemoryFileError, match=r"could not be read: .*the store does not say its size; download it first"
    ):
        memsyn.Memory.load(URL)


@pytest.mark.parametrize("missing", ["fsspec", "s3fs"])
def test_what_is_missing_is_named(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    modules = ["fsspec", "fsspec.core"] if missing == "fsspec" else ["s3fs"]
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    needed = (
        r"those need fsspec: pip install 'memsyn\[remote\]'" if missing == "fsspec" else "Install s3fs to access S3"
    )
    with pytest.raises(memsyn.MemoryFileError, match=needed):
        golden.memory().save("s3://bucket/it")
    with pytest.raises(memsyn.MemoryFileError, match=needed):
        memsyn.Memory.load("s3://bucket/it")
    golden.memory().save(tmp_path / "it")  # which a path does not need
    assert memsyn.Memory.load(tmp_path / "it").counts == golden.memory().counts
