"""Where a memory comes from: what is written down, what old and newer files hold, and which weights it belongs to."""

import copy
from datetime import datetime, timedelta, timezone
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import memsyn
from memsyn.parameters import fingerprint
from memsyn.storage.reading_and_writing import MEMORY, read, write


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture
def path(model, tmp_path):
    memory = memsyn.Memory.empty().consolidate(model, measured(model, 5), label="faces")
    memory.save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def measured(model: nn.Module, num_samples: int) -> memsyn.Importance:
    data = torch.randn(num_samples, 3, generator=torch.Generator().manual_seed(num_samples))
    return memsyn.measure(model, [data], progress=False)


def rewrite(path, **changes) -> None:
    """Write the file anew, with its last consolidation changed; `...` takes a field away."""
    header, groups = read(path, MEMORY)
    entry = {**header["history"][-1], **changes}
    history = [*header["history"][:-1], {key: value for key, value in entry.items() if value is not ...}]
    write(path, MEMORY, {"history": history, "counts": header["counts"]}, groups)


def test_every_consolidation_is_written_down(model, path) -> None:
    first = memsyn.Memory.load(path, like=model)
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight += 1
    second = first.consolidate(model, measured(model, 7), rule="ema", decay=0.25)
    assert second.history[0] == first.history[0]
    one, two = second.history
    assert (one.num_samples, one.rule, one.decay, one.label) == (5, "sum", None, "faces")
    assert (two.num_samples, two.rule, two.decay, two.label) == (7, "ema", 0.25, None)
    for entry, at in ((one, weights), (two, model.state_dict())):
        assert (entry.objective, entry.magnitude) == ("squared_l2_norm", "abs")
        assert (entry.memsyn, entry.torch) == (version("memsyn"), torch.__version__)
        assert entry.fingerprint == fingerprint(at)
        age = datetime.now(timezone.utc) - datetime.fromisoformat(entry.when)
        assert timedelta(0) <= age < timedelta(minutes=5)
    assert one.fingerprint != two.fingerprint


def test_the_fingerprint_is_that_of_the_anchor_in_the_file(path) -> None:
    anchor = {name.removeprefix("anchor/"): t for name, t in load_file(path).items() if name.startswith("anchor/")}
    assert memsyn.Memory.load(path).history[0].fingerprint == fingerprint(anchor)


def test_a_file_of_the_first_version_loads(path) -> None:
    rewrite(path, label=..., memsyn=..., torch=..., fingerprint=...)
    (entry,) = memsyn.Memory.load(path).history
    assert set(read(path)[0]["history"][0]) == {"when", "num_samples", "rule", "decay", "objective", "magnitude"}
    assert (entry.num_samples, entry.label, entry.memsyn, entry.torch, entry.fingerprint) == (5, None, None, None, None)


def test_what_a_newer_version_adds_is_left_out(path) -> None:
    rewrite(path, weather="rain")
    (entry,) = memsyn.Memory.load(path).history
    assert (entry.label, entry.num_samples) == ("faces", 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": ...}, "rule is missing"),
        ({"label": 7}, "label is 7"),
        ({"fingerprint": True}, "fingerprint is True"),
    ],
)
def test_an_odd_history_is_refused(path, changes, message) -> None:
    rewrite(path, **changes)
    with pytest.raises(memsyn.MemoryFileError, match=f"is not as memsyn writes it: ValueError: .*{message}"):
        memsyn.Memory.load(path)


def test_a_whole_number_is_a_decay(path, model) -> None:
    rewrite(path, rule="ema", decay=1)
    assert memsyn.Memory.load(path).history[0].decay == 1


def test_a_label_is_text(model) -> None:
    with pytest.raises(memsyn.OptionError, match=r"label must be text, got 3"):
        memsyn.Memory.empty().consolidate(model, measured(model, 5), label=3)


def test_other_weights_than_the_anchor_are_warned_of(path, model) -> None:
    memsyn.Memory.load(path, like=model)
    memsyn.Memory.load(path, like=copy.deepcopy(model).double())  # the same numbers
    with torch.no_grad():
        model[2].bias[0] = torch.nextafter(model[2].bias[0], torch.tensor(9.0))
    message = rf"1 of 4 parameters \(the first is 2.bias\) have other weights .* last consolidation of {path}"
    with pytest.warns(memsyn.MovedWeightsWarning, match=message) as caught:
        found = memsyn.Memory.load(path, like=model)
    assert caught[0].filename == __file__
    assert list(found.anchor) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_other_weights_than_the_observed_are_warned_of(tmp_path, model) -> None:
    with memsyn.Observer(model, tmp_path / "traffic.safetensors", rate=1.0) as observer:
        observer.observe(torch.randn(5, 3))
        assert observer.flush()
        observed = observer.importance()
    memsyn.Memory.empty().consolidate(model, observed)
    with torch.no_grad():
        model[2].bias[0] += 1
    memsyn.Memory.empty().consolidate(model, measured(model, 5))
    with pytest.warns(memsyn.MovedWeightsWarning, match="measured at other weights") as caught:
        memsyn.Memory.empty().consolidate(model, observed)
    assert caught[0].filename == __file__


def test_a_head_that_has_grown_is_compared_by_its_old_rows(path, model) -> None:
    grown = nn.Sequential(model[0], model[1], nn.Linear(4, 3))
    with torch.no_grad():
        grown[2].weight[:2], grown[2].bias[:2] = model[2].weight, model[2].bias
    memsyn.Memory.load(path, like=grown)
    with torch.no_grad():
        grown[2].weight[1] += 1
    with pytest.warns(memsyn.MovedWeightsWarning, match=r"1 of 4 parameters \(the first is 2.weight\)"):
        memsyn.Memory.load(path, like=grown)


def test_merged_replicas_are_one_observer_of_all_samples(model) -> None:
    data = torch.randn(12, 3, dtype=torch.float64)
    model.double()
    parts = [data[:2], data[2:7], data[7:]]
    replicas = [
        memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [part], progress=False), label=f"replica {k}")
        for k, part in enumerate(parts)
    ]
    merged = replicas[0].merge(replicas[1]).merge(replicas[2])
    whole = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [data], progress=False))
    for name, omega in whole.importance.items():
        assert torch.allclose(merged.importance[name], omega, rtol=1e-12, atol=0)
        assert torch.equal(merged.anchor[name], whole.anchor[name])
    assert (merged.num_samples, merged.counts) == (12, whole.counts)
    assert [entry.label for entry in merged.history] == ["replica 0", "replica 1", "replica 2"]
    assert [entry.rule for entry in merged.history] == ["sum", "merge", "merge"]
    assert {entry.fingerprint for entry in merged.history} == {whole.history[0].fingerprint}


def test_memories_that_cannot_be_merged(model) -> None:
    importance = measured(model, 5)
    one = memsyn.Memory.empty().consolidate(model, importance)
    with pytest.raises(memsyn.MismatchError, match=r"one consolidation each .* one has 2: .* count twice"):
        one.merge(one.consolidate(model, importance))
    with pytest.raises(memsyn.MismatchError, match=r"one has 0"):
        memsyn.Memory.empty().merge(one)
    squares = memsyn.Importance(importance.sums, 5, magnitude="square")
    with pytest.raises(memsyn.MismatchError, match=r"abs of squared_l2_norm, the other memory square of .* be merged"):
        one.merge(memsyn.Memory.empty().consolidate(model, squares))
    head = memsyn.Importance({"2.bias": importance.sums["2.bias"]}, 5)
    with pytest.raises(memsyn.MismatchError, match=r"0.weight is missing in the second memory"):
        one.merge(memsyn.Memory.empty().consolidate(model, head))
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(memsyn.MismatchError, match=r"anchors of 1 of 4 parameters differ \(the first is 0.bias\)"):
        one.merge(memsyn.Memory.empty().consolidate(model, importance))
