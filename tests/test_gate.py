"""The command gate: what it prints and exits with, and the prediction that it takes without data."""

import copy
import json
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import memsyn
from memsyn import Memory
from memsyn.cli.inputs import read_batches
from memsyn.comparing.prediction import TIMES, predict
from tests import story
from tests.commands import call

DATA = ("--model", "tests.story:build", "--data", "inputs.safetensors")


@pytest.fixture(scope="module")
def shipped() -> tuple[story.Classifier, Memory]:
    model = story.trained()
    return model, story.remembered(model)


@pytest.fixture
def old(shipped: tuple[story.Classifier, Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> story.Classifier:
    """The shipped model; its memory, its weights and requests are in the working folder."""
    monkeypatch.chdir(tmp_path)
    model, memory = shipped
    memory.save("memory")
    save_file(model.state_dict(), "old.safetensors")
    save_file({"inputs": story.requests()}, "inputs.safetensors")
    return copy.deepcopy(model)


def saved(model: nn.Module, name: str = "new.safetensors") -> str:
    save_file(model.state_dict(), name)
    return name


def as_json(*arguments: Any, code: int) -> dict[str, Any]:
    result = call("gate", *arguments, "--json", code=code)
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_a_careless_training_is_refused_by_the_name_of_its_cause(old: story.Classifier) -> None:
    story.learn(old, lr=1e-4)
    state = saved(old)
    output = call("gate", "memory", state, *DATA, code=2).output
    assert re.match(
        r"Broken\. \d+\.\d% of 400 samples give the same answer \(95% interval \d+\.\d% to \d+\.\d%\); at least ",
        output,
    )
    assert (
        "The cause: 2 running statistics moved (the first is body.1.running_mean), as those of BatchNorm do in train"
        in output
    )
    assert "With the old ones put back, 100.0% give the same answer" in output
    facts = as_json("memory", state, *DATA, code=2)
    assert facts["verdict"] == "broken"
    assert facts["predicted"] is None
    assert (facts["min_agreement"], facts["max_change"]) == (0.97, 0.05)
    assert facts["comparison"]["moved_statistics"] == ["body.1.running_mean", "body.1.running_var"]
    assert facts["comparison"]["with_old_statistics"]["agreement"] == 1.0
    # Without data, statistics cannot be judged.
    output = call("gate", "memory", state, code=1).output
    assert output.startswith("Cannot say. From the memory alone, outputs on the old data are predicted to change by 0.")
    assert "2 running statistics moved (the first is body.1.running_mean), which the prediction does not see" in output


def test_a_protected_training_passes(old: story.Classifier) -> None:
    memory = Memory.load("memory", like=old)
    story.learn(old, memory)
    state = saved(old)
    assert call("gate", "memory", state, *DATA).output.startswith("Safe. 100.0% of 400 samples give the same answer")
    assert as_json("memory", state, *DATA, code=0)["comparison"]["num_samples"] == 400
    assert as_json("memory", state, *DATA, "--max-change", "0.01", code=2)["verdict"] == "broken"
    assert as_json("memory", state, *DATA, "--min-agreement", "0.995", code=1)["verdict"] == "cannot say"
    measured = as_json("memory", state, *DATA, code=0)["comparison"]["mean_change"]
    facts = as_json("memory", state, code=1)
    assert facts["verdict"] == "at risk"
    assert facts["predicted"]["upper"] == pytest.approx(TIMES * facts["predicted"]["change"])
    assert as_json("memory", state, "--max-change", "0.5", code=0)["verdict"] == "safe"
    assert facts["comparison"] is None
    assert facts["predicted"]["change"] == pytest.approx(measured, rel=0.25)
    assert max(facts["predicted"]["layers"], key=facts["predicted"]["layers"].get) == "body.0"
    assert as_json("memory", state, "--max-change", "0.01", code=2)["verdict"] == "broken"


def test_a_memory_without_an_anchor_needs_the_old_weights(old: story.Classifier) -> None:
    data = [story.points(story.OLD, 200, seed=4)[0]]
    factors = memsyn.measure(old, data, estimator="kronecker", progress=False)
    Memory.empty().consolidate(old, factors).save("directions")
    for arguments in ((), DATA):
        error = call("gate", "directions", "old.safetensors", *arguments, code=1).stderr
        assert "holds directions alone, and no anchor (the old weights): give the old model or its state_dict" in error
        assert (
            call("gate", "directions", "old.safetensors", "--reference", "old.safetensors", *arguments).exit_code == 0
        )
    with torch.no_grad():
        old.body[0].weight += 1
    error = call("gate", "directions", "old.safetensors", "--reference", saved(old), code=1).stderr
    assert "the reference is not the model that was measured: 1 parameters differ, the first is body.0.weight" in error


def test_what_cannot_predict_says_what_to_give(old: story.Classifier) -> None:
    whole = Memory.load("memory")
    replace(whole, directions=None).save("importance")
    error = call("gate", "importance", "old.safetensors", code=1).stderr
    assert "the memory holds no directions, which predict the change of outputs: compare on data" in error
    factors = memsyn.measure(old, [story.requests(50)], estimator="inputs", progress=False)
    replace(whole, directions=None, history=whole.history[:1]).consolidate(old, factors).save("inputs")
    error = call("gate", "inputs", "old.safetensors", code=1).stderr
    assert "second moments of inputs alone, which do not predict" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "old.safetensors"], "none does not exist"),
        (["memory", "none"], "none does not exist"),
        (["memory", "old.safetensors", "--data", "inputs.safetensors"], "--data and --model belong together"),
        (["memory", "old.safetensors", "--model", "tests.story:build"], "--data and --model belong together"),
        (["memory", "old.safetensors", *DATA, "--kind", "labels"], "kind must be auto, classes"),
        (["memory", "old.safetensors", *DATA, "--min-agreement", "1"], "min_agreement must be from 0 to below 1"),
        (["memory", "old.safetensors", *DATA[2:], "--model", "tests.story"], "--model must be package.module:build"),
        (["memory", "old.safetensors", *DATA[2:], "--model", "tests.story:no"], "failed: AttributeError"),
        (["memory", "old.safetensors", *DATA[2:], "--model", "no_such.module:no"], "failed: ModuleNotFoundError"),
        (["memory", "old.safetensors", *DATA[2:], "--model", "tests.story:requests"], "must return a torch.nn.Module"),
        (["memory", "old.safetensors", *DATA[:3], "old.safetensors"], "must hold tensors with one first dimension"),
        (["memory", "old.safetensors", *DATA[:3], "none.jsonl"], "none.jsonl could not be read"),
        (["memory", "inputs.safetensors", *DATA], "inputs.safetensors lacks 13 tensors of 13"),
    ],
)
def test_errors_exit_with_1(old: story.Classifier, arguments: list[str], message: str) -> None:
    assert_one_line(call("gate", *arguments, code=1), message)


@pytest.mark.parametrize(
    "arguments", [[], ["memory"], ["memory", "new", "--max-chnge", "1"], ["a", "b", "--max-change", "x"]]
)
def test_wrong_usage_does_not_read_as_forgotten(arguments: list[str]) -> None:
    result = call("gate", *arguments, code=1)
    assert "Usage:" in result.output


def test_weights_must_be_those_of_the_model(old: story.Classifier) -> None:
    state = old.state_dict()
    save_file({**state, "other.weight": torch.ones(2)}, "more")
    assert "more holds, and the model does not, 1 tensors" in call("gate", "memory", "more", *DATA, code=1).stderr
    save_file({**state, "old.bias": torch.ones(3)}, "reshaped")
    assert "reshaped reshapes 1 tensors of 13" in call("gate", "memory", "reshaped", *DATA, code=1).stderr


def test_a_memory_of_another_model_is_an_error(old: story.Classifier) -> None:
    other = nn.Sequential(OrderedDict(first=nn.Linear(6, 3)))
    importance = memsyn.measure(other, [story.requests(9)], progress=False)
    Memory.empty().consolidate(other, importance).save("other")
    assert_one_line(call("gate", "other", "old.safetensors", *DATA, code=1), "of another architecture")


BAD_MODELS = """
import torch
from torch import nn
from tests import story

class Noisy(story.Classifier):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5)

class Batchwise(story.Classifier):
    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(0)

class Summed(story.Classifier):
    def forward(self, x):
        return super().forward(x).sum(0)

class Named(story.Classifier):
    def forward(self, x):
        return super().forward(x).argmax(1)

class Grown(story.Classifier):
    def __init__(self):
        super().__init__()
        self.old = nn.Linear(story.WIDTH, story.OLD + 2)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Noisy",
            "batch 0: the old model gives other outputs for the same batch when it is run again, so a comparison",
        ),
        ("Batchwise", "batch 0: the old model gives another output for 2 samples alone than in their batch"),
        ("Summed", "batch 0: the output's first dimension must be the samples"),
        ("Named", "the output is torch.int64"),
        ("Grown", "old.weight has 10 rows in the model and 8 in the memory: a part of the model has grown"),
    ],
)
def test_models_without_a_comparison_are_one_line(old: story.Classifier, name: str, message: str) -> None:
    Path("bad_models.py").write_text(BAD_MODELS)
    if name == "Grown":
        old.old = nn.Linear(story.WIDTH, story.OLD + 2)
    arguments = ("--model", f"bad_models:{name}", "--data", "inputs.safetensors")
    assert_one_line(call("gate", "memory", saved(old), *arguments, code=1), message)


def assert_one_line(result: Any, message: str) -> None:
    """Of text, on stderr."""
    assert message in result.stderr
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)


def test_data_that_the_model_cannot_take_are_one_line(old: story.Classifier) -> None:
    save_file({"inputs": torch.zeros(0, 6)}, "empty.safetensors")
    Path("empty.jsonl").touch()
    save_file({"inputs": torch.zeros(3, 7)}, "wide.safetensors")
    save_file({"inputs": torch.full((3, 6), torch.nan)}, "nan.safetensors")
    for path, message in (
        ("empty.safetensors", "there are no samples: the loader is empty"),
        ("empty.jsonl", "there are no samples: the loader is empty"),
        ("wide.safetensors", "batch 0: the model failed on it"),
        ("nan.safetensors", "batch 0, sample 0: an output of the old model is NaN or infinite"),
    ):
        result = call("gate", "memory", "old.safetensors", *DATA[:3], path, code=1)
        assert_one_line(result, message)


def test_the_working_folder_holds_models(old: story.Classifier, tmp_path: Path) -> None:
    Path("my_models.py").write_text("from tests.story import Classifier\nclass Zoo:\n    small = Classifier\n")
    found = as_json(
        "memory", "old.safetensors", "--model", "my_models:Zoo.small", "--data", "inputs.safetensors", code=0
    )
    assert found["comparison"]["agreement"] == 1.0


# Data


def read(path: str) -> Any:
    batches = read_batches(Path(path))
    return torch.cat(batches) if isinstance(batches[0], Tensor) else batches


def test_data_come_in_three_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = torch.arange(300.0).reshape(150, 2)
    save_file({"any": x}, "a.safetensors")
    np.savez("b.npz", x=x.numpy())
    Path("c.jsonl").write_text("\n".join(map(json.dumps, x.tolist())) + "\n\n")
    for path in ("a.safetensors", "b.npz", "c.jsonl"):
        assert torch.equal(read(path), x)
        assert [len(batch) for batch in read_batches(Path(path))] == [64, 64, 22]
    Path("d.jsonl").write_text('{"input_ids": [1, 2], "attention_mask": [1, 0]}\n' * 3)
    (batch,) = read("d.jsonl")
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "input_ids": (torch.int64, (3, 2)),
        "attention_mask": (torch.int64, (3, 2)),
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "[1, [2]]\n"),
        ("b.jsonl", '[1, 2]\n{"x": 1}\n'),
        ("c.jsonl", '{"x": [1]}\n{"x": [1], "y": [1]}\n'),
        ("d.jsonl", '"text"\n'),
        ("e.jsonl", "[1, 2\n"),
        ("f.npz", "no archive"),
        ("g.safetensors", "no tensors"),
    ],
)
def test_data_that_cannot_be_read(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(memsyn.BatchError, match=r"could not be read: .*Give inputs as safetensors, \.npz, or \.jsonl"):
        read_batches(tmp_path / name)


def test_samples_of_other_shapes_are_in_batches_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[1, 2]\n[3, 4]\n[5]\n[6, 7.5]\n")
    assert [batch.tolist() for batch in read_batches(path)] == [[[1, 2], [3, 4]], [[5]], [[6, 7.5]]]
    assert {batch.dtype for batch in read_batches(path)} == {torch.float32}
    path.write_text('{"x": [1], "y": [1]}\n{"x": [1], "y": [1, 2]}\n{"y": [3, 4], "x": [1]}\n')
    assert [{name: own.tolist() for name, own in batch.items()} for batch in read_batches(path)] == [
        {"x": [[1]], "y": [[1]]},
        {"x": [[1], [1]], "y": [[1, 2], [3, 4]]},
    ]
    path.write_text('{"x": [1]}\n{"y": [1]}\n')
    with pytest.raises(memsyn.BatchError, match=r"sample 2 has the keys \['y'\], the first has \['x'\]"):
        read_batches(path)


@pytest.mark.parametrize("content", ["", "1\n2\n"])
def test_data_without_samples_or_features(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    if content:
        assert read_batches(tmp_path / "a.jsonl")[0].tolist() == [1, 2]
        return
    assert read_batches(tmp_path / "a.jsonl") == []


# The prediction


def test_the_prediction_is_exact_for_one_output() -> None:
    """One layer, one output: sqrt(E (y' - y)^2 / E y^2)."""
    torch.manual_seed(0)
    old, x = nn.Linear(4, 1).double(), torch.randn(50, 4, dtype=torch.float64)
    memory = Memory.empty().consolidate(old, memsyn.measure(old, [x], progress=False))
    factors = memsyn.measure(old, [x], estimator="kronecker", progress=False)
    memory = memory.consolidate(old, factors, rank=None)
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.weight += 0.1
        new.bias -= 0.2
    y, z = old(x).detach(), new(x).detach()
    found = predict(memory, new.state_dict())
    assert found.change == pytest.approx(float(((z - y).square().mean() / y.square().mean()).sqrt()), rel=1e-9)
    assert found.layers == pytest.approx({"weight": found.change})
    assert predict(memory, new.state_dict(), old.state_dict()).change == pytest.approx(found.change)
    assert predict(memory, old.state_dict()).change == 0.0
    assert predict(memory, old.state_dict()).verdict(0.0).answer == "safe"
    assert found.verdict(found.upper).answer == "safe"
    assert [found.verdict(own).answer for own in (found.upper * 0.999, found.change)] == ["at risk"] * 2
    assert found.verdict(found.change * 0.999).answer == "broken"


@pytest.mark.parametrize("kind", ["head", "tokens", "convolution", "norm", "pooling"])
def test_the_length_of_outputs_is_measured_however_the_model_ends(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "head": (nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)), (40, 4)),
        "tokens": (nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 3, bias=False)), (40, 5, 4)),
        "convolution": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2)), (40, 2, 6, 6)),
        "norm": (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6)), (40, 4)),
        "pooling": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(4)), (40, 2, 6, 6)),
    }
    model, shape = layers[kind]
    model, x = model.double(), torch.randn(*shape, dtype=torch.float64)
    memory = Memory.empty()
    for part in (x[:30], x[30:]):  # two tasks count the same, however many samples they have
        factors = memsyn.measure(model, part.split(7), estimator="kronecker", progress=False)
        memory = memory.consolidate(model, factors)
    memory.save(tmp_path / "m")
    for own in (memory, Memory.load(tmp_path / "m")):
        assert own.directions is not None
        expected = [float(model(part).detach().square().flatten(1).sum(1).mean()) for part in (x[:30], x[30:])]
        assert own.directions.squared_outputs == pytest.approx(sum(expected) / 2, rel=1e-12)
        assert predict(own, model.state_dict(), model.state_dict()).change == 0.0


def test_a_memory_that_does_not_tell_the_length_predicts_nothing() -> None:
    model = nn.Linear(4, 2)
    factors = memsyn.measure(model, [torch.ones(3, 4)], estimator="kronecker", progress=False)
    memory = Memory.empty().consolidate(model, factors)
    assert memory.directions is not None
    earlier = replace(memory, directions=replace(memory.directions, squared_outputs=None))
    for own in (earlier, earlier.consolidate(model, factors)):
        with pytest.raises(memsyn.OptionError, match=r"does not tell how long .*Measure the factors again"):
            predict(own, model.state_dict(), model.state_dict())


def test_the_prediction_is_the_change_of_a_linear_network() -> None:
    """With as many samples as there are random signs to average, it is sqrt(E ||y' - y||^2 / E ||y||^2)."""
    torch.manual_seed(0)
    old, x = nn.Linear(6, 5).double(), torch.randn(20_000, 6, dtype=torch.float64)
    memory = Memory.empty().consolidate(old, memsyn.measure(old, [x], estimator="kronecker", progress=False), rank=None)
    new = nn.Linear(6, 5).double()
    y, z = old(x).detach(), new(x).detach()
    expected = float(((z - y).square().sum(1).mean() / y.square().sum(1).mean()).sqrt())
    assert predict(memory, new.state_dict(), old.state_dict()).change == pytest.approx(expected, rel=0.02)


def test_the_prediction_of_an_average_of_weights_grows_in_proportion() -> None:
    """(1 - share) old + share new: the change of each weight is share times as large, and so is that of each output."""
    torch.manual_seed(0)
    old, new = (nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)).double() for _ in range(2))
    with torch.no_grad():
        new[1].weight.add_(0.3)
    memory = Memory.empty().consolidate(
        old, memsyn.measure(old, [torch.randn(40, 4).double()], estimator="kronecker", progress=False), rank=2
    )
    whole = predict(memory, new.state_dict(), old.state_dict())
    for share in (0.01, 0.3, 2.0):
        mixed = {name: value.lerp(new.state_dict()[name], share) for name, value in old.state_dict().items()}
        found = predict(memory, mixed, old.state_dict())
        assert found.change == pytest.approx(share * whole.change, rel=1e-9)
        assert found.layers == pytest.approx({layer: share * own for layer, own in whole.layers.items()}, rel=1e-9)
    assert whole.change == pytest.approx(sum(own**2 for own in whole.layers.values()) ** 0.5, rel=1e-12)
    assert min(whole.layers.values()) > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_broken(old: story.Classifier, value: float) -> None:
    with torch.no_grad():
        old.body[0].weight[0, 0] = value
    state = saved(old)
    assert call("gate", "memory", state, code=2).output.startswith("Broken. From the memory alone, outputs on the old ")
    facts = as_json("memory", state, code=2)["predicted"]
    assert (facts["change"], facts["layers"]["body.0"], facts["layers"]["old"]) == (None, None, 0.0)
    call("compare", "memory", state, "--html", "page.html")
    assert "<strong>any amount</strong> predicted change" in Path("page.html").read_text()
    assert as_json("memory", state, *DATA, code=2)["comparison"]["mean_change"] is None
    call("compare", "memory", state, *DATA, "--html", "page.html", "--png", "png")
    assert "Do not ship: " in Path("page.html").read_text()


# What must never be called safe


def frozen_then_trained(old: story.Classifier) -> story.Classifier:
    """The memory is made while the body is frozen; then the body moves. Writes the memory and the weights."""
    old.body.requires_grad_(False)
    story.remembered(old).save("memory")
    old.body.requires_grad_(True)
    with torch.no_grad():
        old.body[3].weight += torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    saved(old)
    return old


def test_weights_that_were_frozen_when_the_memory_was_made(old: story.Classifier) -> None:
    shipped = copy.deepcopy(old)
    new = frozen_then_trained(old)
    facts = as_json("memory", "new.safetensors", *DATA, code=1)
    assert facts["verdict"] == "cannot say"
    assert (
        "outputs depend on tensors that the reference does not hold (6 are not held, the first is body.0.weight)"
        in (facts["sentence"])
    )
    assert facts["comparison"]["agreement"] == 1.0
    assert facts["comparison"]["depends_on_taken"] is True
    assert as_json("memory", "new.safetensors", *DATA, "--reference", "old.safetensors", code=2)["verdict"] == "broken"
    page = call("gate", "memory", "new.safetensors", *DATA, "--html", "page.html", code=1)
    assert page.exit_code == 1
    assert "Outputs depend on weights whose old values are not known." in Path("page.html").read_text(encoding="utf-8")
    # Frozen still: then they have not moved.
    new.body.requires_grad_(False)
    found = memsyn.compare(new, Memory.load("memory"), [story.requests()], progress=False)
    assert not found.depends_on_taken
    assert memsyn.compare(shipped, Memory.load("memory"), [story.requests()], progress=False).depends_on_taken


def test_a_new_head_that_the_memory_does_not_hold_does_not_count(old: story.Classifier) -> None:
    memory = Memory.load("memory").select(exclude="new.*")
    with torch.no_grad():
        old.new.weight += 1
    found = memsyn.compare(old, memory, [story.requests()], progress=False)
    assert found.taken == ("new.weight", "new.bias")
    assert not found.depends_on_taken
    assert found.verdict().answer == "safe"


def test_a_prediction_says_what_it_does_not_see(old: story.Classifier) -> None:
    frozen_then_trained(old)
    found = as_json("memory", "new.safetensors", code=1)
    assert found["verdict"] == "cannot say"
    assert "body.0.weight" in found["predicted"]["unseen"]
    assert "6 tensors of the new weights (the first is body.0.bias) moved or may have moved" in found["sentence"]
    # With the old weights it is known which.
    found = as_json("memory", "new.safetensors", "--reference", "old.safetensors", code=1)
    assert found["predicted"]["unseen"] == ["body.3.weight"]
    call("gate", "memory", "new.safetensors", "--reference", "old.safetensors", "--html", "page.html", code=1)
    assert "Without data this cannot be told: 1 weight tensor moved or may have moved" in Path("page.html").read_text()
    assert as_json("memory", "old.safetensors", "--reference", "old.safetensors", code=0)["predicted"]["unseen"] == []


def test_a_weight_with_an_importance_alone_is_not_seen(shipped: tuple[story.Classifier, Memory]) -> None:
    model, memory = copy.deepcopy(shipped[0]), shipped[1]
    assert memory.directions is not None
    part = replace(memory, directions=memory.directions.only({"old.weight", "old.bias"}))
    assert predict(part, model.state_dict()).unseen == ()
    with torch.no_grad():
        model.body[0].weight += 1.0
    found = predict(part, model.state_dict())
    assert (found.change, found.unseen, found.verdict().answer) == (0.0, ("body.0.weight",), "cannot say")


def test_a_tied_name_is_seen(shipped: tuple[story.Classifier, Memory]) -> None:
    model, memory = shipped
    state = {**model.state_dict(), "tied.weight": model.old.weight.detach().clone()}
    assert predict(memory, state).unseen == ()
    assert predict(memory, {**state, "tied.weight": state["tied.weight"] + 1}).unseen == ("tied.weight",)


@pytest.mark.parametrize("code", [0, 2])
def test_code_of_the_model_does_not_choose_the_exit_code(old: story.Classifier, code: int) -> None:
    Path(f"script{code}.py").write_text(f"import sys\nsys.exit({code})\n")
    for command, more in (("gate", ()), ("repair", ("-o", "out"))):
        error = call(command, "memory", "old.safetensors", "--model", f"script{code}:build", *DATA[2:], *more, code=1)
        assert f"the code of --model ended the process, with exit code {code}" in error.stderr
    assert not Path("out").exists()


def test_weights_of_another_model_without_data(old: story.Classifier) -> None:
    state = old.state_dict()
    save_file({**state, "old.weight": state["old.weight"][:3].clone()}, "fewer.safetensors")
    assert "another architecture: old.weight (expected" in call("gate", "memory", "fewer.safetensors", code=1).stderr
    torch.save({"model": state}, "nested.pt")
    assert "the model has none of its parameters" in call("gate", "memory", "nested.pt", code=1).stderr
    torch.save({name: values.to_sparse() for name, values in state.items()}, "sparse.pt")
    assert "sparse.pt holds sparse tensors, the first is" in call("gate", "memory", "sparse.pt", code=1).stderr


def test_an_infinite_threshold_is_null_in_json(old: story.Classifier) -> None:
    assert as_json("memory", "old.safetensors", "--max-change", "inf", code=0)["max_change"] is None


def test_weights_that_are_not_finite_are_broken_at_any_threshold(old: story.Classifier) -> None:
    with torch.no_grad():
        old.body[0].weight[0, 0] = torch.nan
    state = saved(old)
    assert as_json("memory", state, "--max-change", "inf", code=2)["verdict"] == "broken"


def test_a_head_that_only_later_batches_use_counts(old: story.Classifier) -> None:
    memory = Memory.load("memory").select(exclude="new.*")
    with torch.no_grad():
        old.new.weight += 1
    batches = [{"x": story.requests(60), "head": head} for head in ("old", "new")]

    def forward(model: Any, batch: Any) -> Tensor:
        found = model(batch["x"]) if batch["head"] == "old" else model.new_answers(batch["x"])
        return found[:, : story.NEW]

    assert memsyn.compare(old, memory, batches, forward=forward, progress=False).depends_on_taken
    assert not memsyn.compare(old, memory, batches[:1], forward=forward, progress=False).depends_on_taken
