"""Files: atomic, checked, never pickled, and errors that say what is wrong."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import memsyn
from memsyn import storage

IMPORTANCE = memsyn.Importance({"a.w": torch.arange(6.0).reshape(2, 3), "a.b": torch.ones(2)}, 4, {"a.w": "rule"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    IMPORTANCE.save(tmp_path / "it.safetensors")
    return tmp_path / "it.safetensors"


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: object) -> None:
    """Write the file anew with other content and a right checksum."""
    with open(path, "rb") as file:
        entry = {**storage._read_header(path, file), **changes, "checksum": storage._BLANK}
    save_file(tensors or load_file(path), path, {"memsyn": json.dumps(entry, sort_keys=True)})
    storage._seal(path)


def test_any_safetensors_reader_reads_it(path: Path) -> None:
    tensors = load_file(path)
    assert set(tensors) == {"importance/a.w", "importance/a.b"}
    assert torch.equal(tensors["importance/a.w"], IMPORTANCE.sums["a.w"])


def test_the_same_content_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    IMPORTANCE.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    header = path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]]
    assert json.loads(json.loads(header)["__metadata__"]["memsyn"])["format"] == 1


def test_no_flipped_bit_loads(path: Path) -> None:
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(memsyn.MemoryFileError):
            memsyn.Importance.load(path)
    path.write_bytes(whole)
    assert memsyn.Importance.load(path).num_samples == 4


def test_no_truncated_file_loads(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(memsyn.MemoryFileError, match=r"it.safetensors"):
            memsyn.Importance.load(path)


def test_messages(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    with pytest.raises(memsyn.MemoryFileError, match=r"none.safetensors does not exist"):
        memsyn.Memory.load(tmp_path / "none.safetensors")
    path.write_bytes(whole[:-3])
    with pytest.raises(
        memsyn.MemoryFileError, match=rf"is truncated: expected {len(whole)} bytes, got {len(whole) - 3}"
    ):
        memsyn.Importance.load(path)
    path.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(memsyn.MemoryFileError, match=r"is damaged: its checksum is not that of its content"):
        memsyn.Importance.load(path)
    path.write_bytes(b"PK\x03\x04" * 40)
    with pytest.raises(memsyn.MemoryFileError, match=r"truncated, or was not written by memsyn"):
        memsyn.Importance.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(memsyn.MemoryFileError, match=r"was not written by memsyn: it has no memsyn metadata"):
        memsyn.Importance.load(path)
    save_file({"w": torch.ones(2)}, path, {"memsyn": "[1]"})
    with pytest.raises(memsyn.MemoryFileError, match=r"its memsyn metadata is no object"):
        memsyn.Importance.load(path)
    save_file({"w": torch.ones(2)}, path, {"memsyn": "{}"})
    with pytest.raises(memsyn.MemoryFileError, match=r"its metadata names no format"):
        memsyn.Importance.load(path)
    with pytest.raises(memsyn.MemoryFileError, match=r"Is a directory"):
        memsyn.Importance.load(tmp_path)


def test_a_newer_format_says_to_upgrade(path: Path) -> None:
    rewrite(path, format=2, memsyn="9.9")
    with pytest.raises(
        memsyn.MemoryFileError, match=r"format 2, written by memsyn 9.9; .* up to format 1. Upgrade memsyn"
    ):
        memsyn.Importance.load(path)


def test_an_importance_is_no_memory(path: Path) -> None:
    with pytest.raises(memsyn.MemoryFileError, match=r"is of kind 'importance'; expected 'memory'"):
        memsyn.Memory.load(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (-1.0, "holds negative values")],
)
def test_values_are_checked(path: Path, value: float, message: str) -> None:
    rewrite(path, {"importance/a.w": torch.tensor([0.5, value]), "importance/a.b": torch.ones(2)})
    with pytest.raises(memsyn.MemoryFileError, match=f"importance/a.w .*{message}"):
        memsyn.Importance.load(path)


def test_tensors_that_the_metadata_does_not_name_are_refused(path: Path) -> None:
    rewrite(path, {"elsewhere/a.w": torch.ones(2)})
    with pytest.raises(memsyn.MemoryFileError, match=r"its tensors are not those that its metadata names"):
        memsyn.Importance.load(path)


def test_odd_metadata_is_refused(path: Path) -> None:
    rewrite(path, groups=3)
    with pytest.raises(memsyn.MemoryFileError, match=r"could not be read: TypeError"):
        memsyn.Importance.load(path)


def test_what_could_not_be_loaded_is_not_saved(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(memsyn.MemoryFileError, match=r"importance/w holds NaN"):
        memsyn.Importance({"w": torch.tensor([float("nan")])}, 1).save(path)
    assert path.read_bytes() == before


def test_a_file_replaced_while_it_is_read_is_not_mixed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(*args: object) -> dict[str, object]:
        (IMPORTANCE + IMPORTANCE).save(path)
        return real(*args)  # type: ignore[arg-type]

    real = storage._read_tensors
    monkeypatch.setattr(storage, "_read_tensors", replaced)
    with pytest.raises(memsyn.MemoryFileError, match=r"was replaced while it was read: read it again"):
        memsyn.Importance.load(path)


def test_headers_and_tensors_must_fit(path: Path) -> None:
    rewrite(path, num_samples="many")
    with pytest.raises(memsyn.MemoryFileError, match=r"is not as memsyn writes it: ValueError"):
        memsyn.Importance.load(path)
    anchor = {"w": torch.ones(3, 1)}
    memsyn.Memory(anchor, {"w": torch.ones(1, 3)}).save(path)
    with pytest.raises(memsyn.MemoryFileError, match=r"is not as memsyn writes it: MismatchError"):
        memsyn.Memory.load(path)
    memsyn.Memory(anchor, {}).save(path)
    with pytest.raises(memsyn.MemoryFileError, match=r"w is missing in the importance"):
        memsyn.Memory.load(path)


def test_the_order_of_the_model_is_kept(path: Path) -> None:
    assert list(memsyn.Importance.load(path).sums) == ["a.w", "a.b"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(memsyn.MemoryFileError, match=r"could not be written: .*No space left.*is whole"):
        (IMPORTANCE + IMPORTANCE).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_others_may_read_a_file_if_the_umask_lets_them(path: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(memsyn.MemoryFileError, match=r"could not be written: .*No such file or directory"):
        IMPORTANCE.save(tmp_path / "no" / "it.safetensors")


def test_nothing_in_the_package_unpickles() -> None:
    sources = Path(memsyn.__file__).parent.rglob("*.py")
    words = ("torch.load", "torch.save")
    found = {(source.name, word) for source in sources for word in words if word in source.read_text()}
    assert {name for name, _ in found} == {"convert.py"}  # plain tensors of other code
    code = (Path(memsyn.__file__).parent / "convert.py").read_text()
    assert code.count("torch.load(") == code.count("weights_only=True)") == 1
    assert not any("import pickle" in source.read_text() for source in Path(memsyn.__file__).parent.rglob("*.py"))
