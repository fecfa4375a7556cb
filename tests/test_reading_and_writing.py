"""Files: atomic, checked, never pickled, and errors that say what is wrong."""

import ast
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch.distributed.tensor import distribute_tensor

import memsyn
from memsyn.storage import reading_and_writing, safetensors_header
from tests import golden
from tests.sealing import put_together, sealed, taken_apart

IMPORTANCE = memsyn.Importance({"a.w": torch.arange(6.0).reshape(2, 3), "a.b": torch.ones(2)}, 4, {"a.w": "rule"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    IMPORTANCE.save(tmp_path / "it.safetensors")
    return tmp_path / "it.safetensors"


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: object) -> None:
    """Write the file anew with other content and a right checksum."""
    entry, header, data = taken_apart(path.read_bytes())
    if tensors is not None:
        _, header, data = taken_apart(save(tensors, {"memsyn": "{}"}))
    path.write_bytes(put_together({**entry, **changes}, header, data))


def test_any_safetensors_reader_reads_it(path: Path) -> None:
    tensors = load_file(path)
    assert set(tensors) == {"sum/a.w", "sum/a.b"}
    assert torch.equal(tensors["sum/a.w"], IMPORTANCE.sums["a.w"])


def test_the_same_content_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    IMPORTANCE.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    header = path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]]
    assert json.loads(json.loads(header)["__metadata__"]["memsyn"])["format"] == 2


def test_no_flipped_bit_loads(path: Path) -> None:
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(whole)):
            place = bit // 8
            os.pwrite(file.fileno(), bytes([whole[place] ^ 1 << bit % 8]), place)
            with pytest.raises(memsyn.MemoryFileError):
                memsyn.Importance.load(path)
            os.pwrite(file.fileno(), whole[place : place + 1], place)
    assert path.read_bytes() == whole
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
        memsyn.MemoryFileError,
        match=rf"is truncated, or longer than it was: expected {len(whole)} bytes, got {len(whole) - 3}",
    ):
        memsyn.Importance.load(path)
    path.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(memsyn.MemoryFileError, match=r"is damaged: its checksum does not match its content"):
        memsyn.Importance.load(path)
    path.write_bytes(b"PK\x03\x04" * 40)
    with pytest.raises(memsyn.MemoryFileError, match=r"truncated, or was not written by memsyn"):
        memsyn.Importance.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(memsyn.MemoryFileError, match=r"was not written by memsyn: it has no memsyn metadata"):
        memsyn.Importance.load(path)
    save_file({"w": torch.ones(2)}, path, {"memsyn": "[1]"})
    with pytest.raises(memsyn.MemoryFileError, match=r"its memsyn metadata is not a JSON object"):
        memsyn.Importance.load(path)
    save_file({"w": torch.ones(2)}, path, {"memsyn": "{}"})
    with pytest.raises(memsyn.MemoryFileError, match=r"its metadata has no format number"):
        memsyn.Importance.load(path)
    with pytest.raises(memsyn.MemoryFileError, match=r"Is a directory"):
        memsyn.Importance.load(tmp_path)


def test_a_newer_format_says_to_upgrade(path: Path) -> None:
    rewrite(path, format=3, memsyn="9.9")
    with pytest.raises(
        memsyn.MemoryFileError, match=r"format 3, written by memsyn 9.9; .* up to format 2. Upgrade memsyn"
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
    rewrite(path, {"sum/a.w": torch.tensor([0.5, value]), "sum/a.b": torch.ones(2)})
    with pytest.raises(memsyn.MemoryFileError, match=f"sum/a.w .*{message}"):
        memsyn.Importance.load(path)


def test_a_sum_and_a_mean_have_different_names(tmp_path: Path) -> None:
    """Format 1 called both `importance/`: a file of it loads, and is written again in format 2."""
    old = golden.FOLDER / "0.1.0-importance.safetensors"
    assert {key.partition("/")[0] for key in load_file(old)} == {"importance"}
    memsyn.Importance.load(old).save(tmp_path / "it")
    assert {key.partition("/")[0] for key in load_file(tmp_path / "it")} == {"sum"}
    golden.memory().save(tmp_path / "it")
    assert {key.partition("/")[0] for key in load_file(tmp_path / "it")} == {"importance", "anchor"}


@pytest.mark.parametrize("written", [1, 2])
def test_other_groups_of_an_importance_file_keep_their_names(written: int, tmp_path: Path) -> None:
    """Stores of an observer and checkpoints hold some: they go on from files of both formats."""
    path, tensors = tmp_path / "it", {"w": torch.ones(2)}
    groups = {"importance": tensors, "remainder": {"w": -torch.ones(2)}, "3": tensors}
    reading_and_writing.write(path, "importance", {}, groups)
    if written == 1:
        whole, blank = taken_apart(path.read_bytes()), {"importance": ["w"], "remainder": ["w"], "3": ["w"]}
        header = {key.replace("sum/", "importance/"): place for key, place in whole[1].items()}
        path.write_bytes(put_together({**whole[0], "format": 1, "groups": blank}, header, whole[2]))
    found = reading_and_writing.read(path, "importance")[1]
    assert set(found) == {"importance", "remainder", "3"}
    assert_same(found["remainder"], groups["remainder"])


def test_a_mean_in_an_importance_file_of_format_2_is_refused(path: Path) -> None:
    tensors = {"importance/a.w": torch.ones(2), "importance/a.b": torch.ones(2)}
    rewrite(path, tensors, groups={"importance": ["a.w", "a.b"]})
    with pytest.raises(memsyn.MemoryFileError, match=r"of format 2 holds a group importance; expected sum"):
        memsyn.Importance.load(path)
    rewrite(path, tensors | {"sum/a.w": torch.ones(2)}, groups={"importance": ["a.w", "a.b"], "sum": ["a.w"]})
    with pytest.raises(memsyn.MemoryFileError, match=r"of format 2 holds a group importance; expected sum"):
        memsyn.Importance.load(path)


def test_tensors_that_the_metadata_does_not_name_are_refused(path: Path) -> None:
    rewrite(path, {"elsewhere/a.w": torch.ones(2)})
    with pytest.raises(memsyn.MemoryFileError, match=r"its tensors are not those that its metadata names"):
        memsyn.Importance.load(path)


def test_odd_metadata_is_refused(path: Path) -> None:
    rewrite(path, groups=3)
    with pytest.raises(memsyn.MemoryFileError, match=r"its tensors are not those that its metadata names"):
        memsyn.Importance.load(path)


def test_what_could_not_be_loaded_is_not_saved(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(memsyn.MemoryFileError, match=r"sum/w holds NaN"):
        memsyn.Importance({"w": torch.tensor([float("nan")])}, 1).save(path)
    assert path.read_bytes() == before


def test_a_file_replaced_while_it_is_read_is_not_mixed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replaced(*args: object) -> torch.Tensor:
        (IMPORTANCE + IMPORTANCE).save(path)
        return real(*args)  # type: ignore[arg-type]

    real = reading_and_writing._read_tensor
    monkeypatch.setattr(reading_and_writing, "_read_tensor", replaced)
    old, new = memsyn.Importance.load(path), memsyn.Importance.load(path)
    assert (old.num_samples, new.num_samples) == (4, 8)
    assert torch.equal(2 * old.sums["a.w"], new.sums["a.w"])


def test_a_file_cut_off_while_it_is_read_does_not_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*args: object) -> torch.Tensor:
        os.truncate(path, path.stat().st_size // 2)
        return real(*args)  # type: ignore[arg-type]

    real = reading_and_writing._read_tensor
    monkeypatch.setattr(reading_and_writing, "_read_tensor", cut)
    rewrite(path, {"sum/a.w": torch.ones(2**17), "sum/a.b": torch.ones(2)})  # more than is read ahead
    with pytest.raises(memsyn.MemoryFileError, match=r"became shorter while it was read. Read it again"):
        memsyn.Importance.load(path)


def test_headers_and_tensors_must_fit(path: Path) -> None:
    rewrite(path, num_samples="many")
    with pytest.raises(memsyn.MemoryFileError, match=r"is not as memsyn writes it: ValueError"):
        memsyn.Importance.load(path)
    anchor = {"w": torch.ones(3, 1)}
    facts = {"history": [], "counts": {}}
    reading_and_writing.write(path, "memory", facts, {"anchor": anchor, "importance": {"w": torch.ones(1, 3)}})
    with pytest.raises(memsyn.MemoryFileError, match=r"is not as memsyn writes it: MismatchError"):
        memsyn.Memory.load(path)
    reading_and_writing.write(path, "memory", facts, {"anchor": anchor, "importance": {}})
    with pytest.raises(memsyn.MemoryFileError, match=r"w is missing in the importance"):
        memsyn.Memory.load(path)


def test_what_could_not_be_read_again_is_not_written(path: Path) -> None:
    before = path.read_bytes()
    ones = {"w": torch.ones(2)}
    with pytest.raises(memsyn.OptionError, match=r"num_samples must be a whole number below 2\^63, got 2\.0"):
        memsyn.Importance(ones, 2.0)  # type: ignore[arg-type]
    with pytest.raises(memsyn.OptionError, match=r"num_samples must be a whole number below 2\^63"):
        memsyn.Importance(ones, 10**25)
    with pytest.raises(memsyn.OptionError, match=r"the memory's counts: w is 2\.0; expected a count"):
        memsyn.Memory(ones, ones, (), {"w": 2.0}).save(path)  # type: ignore[dict-item]
    with pytest.raises(memsyn.MismatchError, match="w is missing in the importance"):
        memsyn.Memory(ones, {}).save(path)
    assert path.read_bytes() == before
    memsyn.Importance(ones, np.int64(5)).save(path)  # type: ignore[arg-type]
    assert memsyn.Importance.load(path).num_samples == 5


def test_a_name_as_long_as_names_may_be(path: Path) -> None:
    for name in ("a" * 255, "ä" * 127):
        memsyn.Importance({"w": torch.ones(2)}, 1).save(path.with_name(name))
        assert memsyn.Importance.load(path.with_name(name)).num_samples == 1


def test_the_order_of_the_model_is_kept(path: Path) -> None:
    assert list(memsyn.Importance.load(path).sums) == ["a.w", "a.b"]


def test_nothing_in_the_package_unpickles_a_file() -> None:
    loaders = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for source in Path(memsyn.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                assert not loaders & {alias.name.split(".")[0] for alias in node.names}, source.name
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in loaders, source.name
                assert node.module != "torch" or "load" not in {alias.name for alias in node.names}, source.name
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".load", ".load_object_list")):
                unpickles = ast.unparse(node.func).startswith(("torch.", "np.", "numpy."))
                said = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                safe = said.get("weights_only") == "True" or said.get("allow_pickle") == "False"
                assert safe or not unpickles, f"{source.name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Attribute):  # these pickle: collectives of objects, and their like
                assert not node.attr.endswith(("_object_list", "gather_object", "_unpickle")), source.name
            elif isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False", source.name


@pytest.mark.parametrize("file", sorted(golden.FOLDER.iterdir()), ids=lambda file: file.stem)
def test_what_every_version_wrote_loads(file: Path) -> None:
    kind = file.stem.rpartition("-")[2]
    if kind == "importance":
        loaded, expected = memsyn.Importance.load(file), golden.importance()
        assert_same(loaded.sums, expected.sums)
        assert (loaded.num_samples, loaded.routes, loaded.quantity) == (4, expected.routes, expected.quantity)
    else:
        memory, wanted = memsyn.Memory.load(file), golden.memory()
        assert_same(memory.anchor, wanted.anchor)
        assert_same(memory.importance, wanted.importance)
        assert memory.counts == wanted.counts
        assert [(e.when, e.num_samples, e.rule, e.decay) for e in memory.history] == [
            (e.when, e.num_samples, e.rule, e.decay) for e in wanted.history
        ]


@pytest.mark.parametrize("kind", ["importance", "memory"])
def test_the_bytes_of_this_version_are_the_golden_ones(kind: str, tmp_path: Path) -> None:
    getattr(golden, kind)().save(tmp_path / "it")
    assert (tmp_path / "it").read_bytes() == (golden.FOLDER / f"{golden.LATEST}-{kind}.safetensors").read_bytes()


def test_the_format_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    golden.memory().save(tmp_path / "it")
    whole = (tmp_path / "it").read_bytes()
    assert sealed(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]], whole[-56:]) == whole
    assert save(load_file(tmp_path / "it"), {"memsyn": json.dumps(taken_apart(whole)[0], sort_keys=True)}) == whole


def test_what_a_later_version_adds_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "it"
    golden.memory().save(path)
    history = [{**entry, "mood": "good"} for entry in taken_apart(path.read_bytes())[0]["history"]]
    rewrite(path, history=history, weather="fine")
    assert memsyn.Memory.load(path).history == golden.memory().history


def test_a_field_that_was_added_later_gets_its_default() -> None:
    @dataclass
    class Entry:
        when: str
        num_samples: int
        label: str | None = None

    assert reading_and_writing.record(Entry, {"when": "now", "num_samples": 3, "new": 1}) == Entry("now", 3)
    with pytest.raises(ValueError, match="when is missing"):
        reading_and_writing.record(Entry, {"num_samples": 3})


HOSTILE_COUNTS = [-1, 2**63, 10**40, 1.0, True, "4", None, [4]]


@pytest.mark.parametrize("value", HOSTILE_COUNTS)
def test_counts_are_counts(value: object, path: Path) -> None:
    rewrite(path, num_samples=value)
    with pytest.raises(
        memsyn.MemoryFileError, match=r"is not as memsyn writes it: ValueError: num_samples is .*; expected a count"
    ):
        memsyn.Importance.load(path)
    golden.memory().save(path)
    rewrite(path, counts={"layer.weight": value})
    with pytest.raises(
        memsyn.MemoryFileError,
        match=r"is not as memsyn writes it: ValueError: counts\.layer\.weight is .*; expected a count",
    ):
        memsyn.Memory.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_samples", value) for value in HOSTILE_COUNTS),
        ("decay", "x"),
        ("decay", True),
        ("rule", 3),
        ("when", None),
    ],
)
def test_a_history_of_other_types_is_refused(field: str, value: object, path: Path) -> None:
    golden.memory().save(path)
    history = taken_apart(path.read_bytes())[0]["history"]
    rewrite(path, history=[{**history[0], field: value}])
    with pytest.raises(memsyn.MemoryFileError, match=r"is not as memsyn writes it: ValueError"):
        memsyn.Memory.load(path)


@pytest.mark.parametrize("dtype", safetensors_header.DTYPES.values())
def test_every_dtype_survives(dtype: torch.dtype, path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randint(0, 2, (3, 5), generator=generator).to(dtype),
        "number": torch.ones(()).to(dtype),
        "nothing": torch.ones(0, 3).to(dtype),
        "transposed": torch.randint(0, 2, (3, 5), generator=generator).to(dtype).T,
    }
    reading_and_writing.write(path, "other", {}, {"some": tensors})
    assert_same(reading_and_writing.read(path)[1]["some"], tensors)
    assert_same({n.removeprefix("some/"): tensor for n, tensor in load_file(path).items()}, tensors)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        assert tensor.is_contiguous()
        assert torch.equal(tensor.double(), expected[name].double())


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse()], ids=["complex", "sparse"]
)
def test_a_tensor_that_no_file_can_hold(tensor: torch.Tensor, path: Path) -> None:
    with pytest.raises(memsyn.MemoryFileError, match=r"cannot hold sum/w, which is torch.*dense tensors of"):
        memsyn.Importance({"w": tensor}, 1).save(path)
    with pytest.raises(memsyn.MemoryFileError, match=r"sum/w is torch.int64; expected a floating point type"):
        memsyn.Importance({"w": torch.ones(2, dtype=torch.int64)}, 1).save(path)
    with pytest.raises(memsyn.MemoryFileError, match=r"could not be written: .*surrogates"):
        memsyn.Importance({"\ud800": torch.ones(2)}, 1).save(path)
    assert memsyn.Importance.load(path).num_samples == 4


def test_a_header_that_nobody_could_read_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "MAX_HEADER", 400)
    with pytest.raises(memsyn.MemoryFileError, match=r"would need a header of \d+ bytes; at most 400 are allowed"):
        IMPORTANCE.save(path)


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # of torch 2.6
def test_tensors_of_several_devices_are_one_file(path: Path) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.arange(6.0).reshape(3, 2), mesh)
        memsyn.Importance({"w": sharded}, 1).save(path)
    finally:
        torch.distributed.destroy_process_group()
    assert_same(memsyn.Importance.load(path).sums, {"w": torch.arange(6.0).reshape(3, 2)})


def test_loading_heeds_no_default_device(path: Path) -> None:
    with torch.device("meta"):
        loaded = memsyn.Importance.load(path)
    assert torch.equal(loaded.sums["a.w"], IMPORTANCE.sums["a.w"])
