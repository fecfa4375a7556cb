"""Plain dicts: ours there and back, those of Avalanche and of the official code, and nothing that can run code."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import memsyn
from memsyn.values.conversion import EXPORTS, is_plain, read_plain, write_plain

DATA = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def official(model: nn.Module, batch_size: int) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
    """What the official code leaves behind: a running mean of |gradient of the batch's sum|, keyed by parameter."""
    params = {p: {"omega": torch.zeros_like(p).detach(), "init_val": p.detach().clone()} for p in model.parameters()}
    for index, batch in enumerate(DATA.split(batch_size)):
        grads = torch.autograd.grad(model(batch).square().sum(), list(params))
        for entry, grad in zip(params.values(), grads, strict=True):
            before = entry["omega"] * index * batch_size
            entry["omega"] = (before + grad.abs()) / ((index + 1) * batch_size)
    return params


class ParamData:
    """Stands for Avalanche's class of that name."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data


class Plugin:
    """Stands for Avalanche's MAS plugin: the mean over batches of |gradient of the batch's mean|, by name."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.params = {n: ParamData(p.detach().clone()) for n, p in model.named_parameters()}
        self.importance = {n: ParamData(torch.zeros_like(p)) for n, p in self.params_data().items()}
        batches = DATA.split(batch_size)
        for batch in batches:
            grads = torch.autograd.grad(model(batch).norm(dim=1).pow(2).mean(), list(model.parameters()))
            for own, grad in zip(self.importance.values(), grads, strict=True):
                own.data += grad.abs() / len(batches)

    def params_data(self) -> dict[str, torch.Tensor]:
        return {name: own.data for name, own in self.params.items()}


def export(whose: str, tmp_path, monkeypatch, **names: object):
    """Run the two lines that the error gives."""
    monkeypatch.chdir(tmp_path)
    exec("\n".join(EXPORTS[whose]), {"torch": torch, **names})
    return tmp_path / "plain.pt"


def as_official(model, batch_size, tmp_path, monkeypatch):
    model.reg_params = {**official(model, batch_size), "lambda": 1}
    return export("official", tmp_path, monkeypatch, model=model)


def as_avalanche(model, batch_size, tmp_path, monkeypatch):
    return export("avalanche", tmp_path, monkeypatch, plugin=Plugin(model, batch_size))


@pytest.mark.parametrize(("whose", "write"), [("official", as_official), ("avalanche", as_avalanche)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_other_code_measured(model, tmp_path, monkeypatch, whose, write, batch_size) -> None:
    path = write(model, batch_size, tmp_path, monkeypatch)
    exact = batch_size == 1
    memory, structure = read_plain(path, num_samples=6, exact=exact)
    assert structure == whose
    again = memsyn.measure(model, DATA.split(batch_size), batched=not exact, progress=False)
    expected = memsyn.Memory.empty().consolidate(model, again)
    for name, omega in expected.importance.items():
        assert torch.allclose(memory.importance[name], omega, rtol=1e-5, atol=1e-7)
        assert torch.equal(memory.anchor[name], expected.anchor[name])
    (entry,) = memory.history
    assert (entry.num_samples, entry.rule, memory.counts) == (6, "convert", expected.counts)
    assert entry.fingerprint == expected.history[0].fingerprint
    assert memory.quantity == again.quantity  # so the two can be folded
    assert memory.consolidate(model, again).num_samples == 12
    memory.save(tmp_path / "m.safetensors")
    assert memsyn.Memory.load(tmp_path / "m.safetensors", like=model).history == memory.history
    if not exact:
        with pytest.raises(memsyn.MismatchError, match=r"holds abs of the batch mean of squared_l2_norm"):
            memory.consolidate(model, memsyn.measure(model, [DATA], progress=False))


def test_avalanche_importance_alone_by_name_or_by_task(tmp_path) -> None:
    weights = {"a.w": torch.tensor([1.0, 2.0]).half()}
    for plain in (weights, {0: weights}, {"importance": weights}):
        torch.save(plain, tmp_path / "p.pt")
        importance, _ = read_plain(tmp_path / "p.pt", num_samples=4)
        assert importance.sums["a.w"].tolist() == [4.0, 8.0]
        assert importance.sums["a.w"].dtype == torch.float32
        assert (importance.num_samples, importance.quantity) == (4, ("squared_l2_norm", "abs of the batch mean"))
    torch.save({0: weights, 3: weights}, tmp_path / "p.pt")
    with pytest.raises(memsyn.MemoryFileError, match=r"holds 2 tasks \(0, 3\).*take the last task"):
        read_plain(tmp_path / "p.pt", num_samples=4)


def test_a_memory_there_and_back(model, tmp_path) -> None:
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [DATA], progress=False), label="one")
    memory = memory.consolidate(model, memsyn.measure(model, [DATA], progress=False), rule="ema")
    write_plain(tmp_path / "m.pt", memory)
    plain = torch.load(tmp_path / "m.pt", weights_only=True)
    assert torch.equal(plain["importance"]["0.weight"], memory.importance["0.weight"])
    assert torch.equal(plain["anchor"]["0.weight"], model[0].weight)
    found, structure = read_plain(tmp_path / "m.pt")
    assert (structure, found.history, found.counts) == ("memsyn", memory.history, memory.counts)
    for mine, other in ((memory.anchor, found.anchor), (memory.importance, found.importance)):
        assert list(mine) == list(other)
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


def test_an_importance_there_and_back(tmp_path) -> None:
    importance = memsyn.Importance({"w": torch.tensor([3.0, 6.0])}, 3, {"w": "rule"}, "my own", "square")
    write_plain(tmp_path / "i.pt", importance)
    assert torch.load(tmp_path / "i.pt", weights_only=True)["importance"]["w"].tolist() == [1.0, 2.0]
    found, _ = read_plain(tmp_path / "i.pt")
    assert found.sums["w"].tolist() == [3.0, 6.0]
    assert (found.num_samples, found.quantity) == (3, ("my own", "square"))
    for options in ({"num_samples": 3}, {"exact": True}):
        with pytest.raises(memsyn.OptionError, match=r"i.pt itself says how it was measured: leave num_samples and ex"):
            read_plain(tmp_path / "i.pt", **options)


def test_samples_must_be_said(tmp_path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "p.pt")
    with pytest.raises(memsyn.OptionError, match=r"p.pt does not say on how many samples .*num_samples \(--samples\)"):
        read_plain(tmp_path / "p.pt")
    with pytest.raises(memsyn.OptionError, match=r"num_samples must be a whole number.*; got 0"):
        read_plain(tmp_path / "p.pt", num_samples=0)


def test_the_docs_give_the_same_lines() -> None:
    text = (Path(__file__).parents[1] / "docs" / "commands.md").read_text()
    assert all(line in text for lines in EXPORTS.values() for line in lines)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_model_is_refused_and_never_run(model, tmp_path, legacy) -> None:
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    model.reg_params = official(model, 2)
    for thing in (model, {"w": Trap()}):
        torch.save(thing, tmp_path / "p.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(memsyn.MemoryFileError, match=r"p\.pt holds objects \((torch\.nn|posix mkdir)") as caught:
            read_plain(tmp_path / "p.pt", num_samples=6)
        assert all(line in str(caught.value) for lines in EXPORTS.values() for line in lines)
    assert not (tmp_path / "ran").exists()


def test_the_old_format_of_torch_is_read(tmp_path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "p.pt", _use_new_zipfile_serialization=False)
    assert read_plain(tmp_path / "p.pt", num_samples=2)[0].sums["w"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ([torch.ones(1)], "holds no dict of tensors"),
        ({}, "holds no dict of tensors"),
        ({nn.Parameter(torch.ones(1)): torch.ones(1)}, "holds tensors without their parameters' names"),
        ({"w": 3}, "holds something else than a dense tensor of real numbers as w"),
        ({"w": torch.ones(2, dtype=torch.int64)}, "dense tensor of real numbers as w"),
        ({"w": torch.ones(2).to_sparse()}, "dense tensor of real numbers as w"),
        ({"w": torch.ones(2, device="meta")}, "dense tensor of real numbers as w"),
        ({"w": torch.ones(1).expand(10**12)}, r"p.pt has \d+ bytes and holds tensors of more"),
        (dict.fromkeys(map(str, range(100)), torch.ones(100)), "holds tensors of more"),
        ({"w": torch.tensor([0.5, -1.0])}, "w holds negative values, .* a model's state_dict"),
        ({0: torch.ones(1)}, "something else where tensors by name should be"),
        ({"importance": 3}, "something else where tensors by name should be"),
        ({"importance": {"w": torch.ones(1)}, "params": {}}, "w is missing in the anchor in .*p.pt"),
        ({"importance": {"w": torch.ones(1)}, "anchor": {"w": torch.ones(2)}}, r"w is \(2,\) in the anchor"),
        ({"w": {"omega": torch.ones(1)}}, "real numbers as w"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # of torch 2.14
def test_other_structures_are_refused(tmp_path, plain, message) -> None:
    torch.save(plain, tmp_path / "p.pt")
    with pytest.raises((memsyn.MemoryFileError, memsyn.MismatchError), match=message):
        read_plain(tmp_path / "p.pt", num_samples=2)


def test_views_of_one_storage_are_read(tmp_path) -> None:
    flat = torch.arange(5.0)
    torch.save({"a": flat[:2], "b": flat[1:3]}, tmp_path / "p.pt")
    importance, _ = read_plain(tmp_path / "p.pt", num_samples=1)
    importance.save(tmp_path / "i")
    assert memsyn.Importance.load(tmp_path / "i").sums["b"].tolist() == [1.0, 2.0]
    plain = {"importance": {"a": flat[:2], "b": flat[1:3]}, "params": {"a": flat[:2], "b": flat[1:3]}}
    torch.save(plain, tmp_path / "p.pt")
    read_plain(tmp_path / "p.pt", num_samples=1)[0].save(tmp_path / "m")
    assert memsyn.Memory.load(tmp_path / "m").anchor["b"].tolist() == [1.0, 2.0]


def test_parameters_as_keys_have_no_names(model, tmp_path) -> None:
    torch.save(official(model, 1), tmp_path / "p.pt")
    with pytest.raises(memsyn.MemoryFileError, match=r"without their parameters' names(.|\n)*model.reg_params\[p\]"):
        read_plain(tmp_path / "p.pt", num_samples=6)


def test_damaged_files(tmp_path) -> None:
    path = tmp_path / "p.pt"
    with pytest.raises(memsyn.MemoryFileError, match=r"p.pt does not exist"):
        read_plain(path)
    torch.save({"w": torch.ones(64)}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(memsyn.MemoryFileError, match=r"could not be read by torch"):
            read_plain(path, num_samples=1)


def test_a_history_that_is_none_is_refused(tmp_path) -> None:
    weights = {"w": torch.ones(1)}
    plain = {"importance": weights, "anchor": weights, "counts": {"w": 1}, "history": [{"when": "now"}]}
    torch.save(plain, tmp_path / "p.pt")
    with pytest.raises(memsyn.MemoryFileError, match=r"is not as memsyn writes it: ValueError"):
        read_plain(tmp_path / "p.pt")


def test_an_export_that_cannot_be_written(tmp_path) -> None:
    with pytest.raises(memsyn.MemoryFileError, match=r"i.pt could not be written: .*No such file.*is whole"):
        write_plain(tmp_path / "none" / "i.pt", memsyn.Importance({"w": torch.ones(1)}, 1))


def test_whose_file_it_is_shows_in_its_first_bytes(tmp_path, model) -> None:
    memsyn.Importance({"w": torch.ones(1)}, 1).save(tmp_path / "i")
    torch.save(copy.deepcopy(model.state_dict()), tmp_path / "p")
    torch.save({"w": torch.ones(1)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert [is_plain(tmp_path / name) for name in ("i", "p", "old", "none")] == [False, True, True, False]
    assert not is_plain("memory://i")
