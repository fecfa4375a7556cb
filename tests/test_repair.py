"""repair: the least way back, from its definition as a minimiser, on small models in float64."""

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import memsyn
from memsyn import Memory
from memsyn.comparing.prediction import predict
from memsyn.comparing.shrinkage import RIDGE
from memsyn.values.directions import Directions, consolidated
from tests import story
from tests.commands import call

State = dict[str, Tensor]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def inputs(seed: int, count: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, 5, dtype=torch.float64, generator=generator)
    return mixed @ torch.randn(5, 5, dtype=torch.float64, generator=generator)


def remembered(model: nn.Module, data: Tensor, **options: Any) -> Memory:
    memory = Memory.empty().consolidate(model, memsyn.measure(model, [data], progress=False))
    factors = memsyn.measure(model, [data], estimator="kronecker", progress=False)
    return memory.consolidate(model, factors, **options)


def moved(model: nn.Module, size: float = 0.3, seed: int = 1) -> nn.Module:
    new, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return new


def learned_by(model: nn.Module, data: Tensor) -> memsyn.KroneckerFactors:
    return memsyn.measure(model, [data], estimator="kronecker", progress=False)


def change_of(memory: Memory, model: nn.Module, weights: State) -> float:
    return predict(memory, {**model.state_dict(), **weights}).change


def weights_of(model: nn.Module) -> State:
    return {name: values.clone() for name, values in model.state_dict().items()}


@pytest.fixture
def forgot() -> tuple[nn.Module, nn.Module, Memory]:
    """The old model, the new one, and the memory of the old data."""
    old = network()
    return old, moved(old), remembered(old, inputs(2), rank=None)


# The definition


def objective(
    name: str, old: Directions, new: Directions | None, change: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """||D' - D||_N^2 and tr(S D' A D'^T), written out with whole matrices, for a weight with its bias column."""
    own = old.layers[name]
    a, s = (side.dense()[0] for side in (own.inputs, own.outputs))
    away = kept - change
    need = (s @ kept @ a @ kept.T).trace() * own.scales[0] * own.scales[1]
    if new is None:
        return away.square().sum(), need
    other = new.layers[name]
    b, t = (side.dense()[0] + RIDGE * torch.eye(side.width) for side in (other.inputs, other.outputs))
    return (t @ away @ b @ away.T).trace() * other.scales[0] * other.scales[1], need


@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize("rank", [None, 1])
def test_no_other_weights_within_the_bound_are_nearer(
    forgot: tuple[nn.Module, nn.Module, Memory], *, is_learned: bool, rank: int | None
) -> None:
    """Karush-Kuhn-Tucker: one lambda makes the gradient zero in all layers, and the bound is met with equality."""
    old, new, _ = forgot
    memory = remembered(old, inputs(2), rank=rank)
    factors = learned_by(new, inputs(3)) if is_learned else None
    found = memsyn.repair(new, memory, max_change=0.1, learned=factors)
    assert change_of(memory, new, found.weights) == pytest.approx(0.1, rel=1e-5)
    assert found.predicted is not None
    assert found.predicted[1] == pytest.approx(0.1, rel=1e-5)
    assert found.predicted[0] == pytest.approx(change_of(memory, new, {}))
    assert memory.directions is not None
    learned = None if factors is None else consolidated(Directions(), factors, (0.0, 1.0), rank)
    multipliers = []
    for key in memory.directions.layers:
        names = (key, key.replace("weight", "bias"))

        def column(weights: State, names: tuple[str, str] = names) -> Tensor:
            parts = [weights[name] - old.state_dict()[name] for name in names]
            return torch.cat([parts[0], parts[1].unsqueeze(1)], 1)

        kept = column(found.weights).requires_grad_()
        away, need = objective(key, memory.directions, learned, column(new.state_dict()), kept)
        of_away, of_need = (torch.autograd.grad(own, kept)[0] for own in (away, need))
        multiplier = -float((of_away * of_need).sum() / of_need.square().sum())
        assert torch.allclose(of_away, -multiplier * of_need, rtol=1e-6, atol=1e-9 * float(of_away.abs().max()))
        multipliers.append(multiplier)
    assert multipliers[0] > 0
    assert multipliers[0] == pytest.approx(multipliers[1], rel=1e-6)


def test_a_generic_optimiser_finds_the_same() -> None:
    """One layer; LBFGS on the Lagrangian's penalty form with the multiplier that the repair implies."""
    torch.manual_seed(0)
    old, data = nn.Linear(4, 3, bias=False).double(), inputs(2)[:, :4]
    memory, new = remembered(old, data, rank=None), moved(old)
    found = memsyn.repair(new, memory, max_change=0.2)
    assert memory.directions is not None
    change = new.weight.detach() - old.weight.detach()
    kept = found.weights["weight"] - old.weight.detach()
    own = memory.directions.layers["weight"]
    a, s = own.inputs.dense()[0], own.outputs.dense()[0]
    of_need = 2 * own.scales[0] * own.scales[1] * s @ kept @ a
    multiplier = float((2 * (change - kept) * of_need).sum() / of_need.square().sum())
    best = torch.zeros_like(change).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [best], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        away, need = objective("weight", memory.directions, None, change, best)
        total = away + multiplier * need
        total.backward()
        return total

    for _ in range(5):
        optimizer.step(loss)
    assert torch.allclose(best.detach(), kept, atol=1e-4)


def test_what_the_old_data_do_not_use_stays_and_what_the_new_task_does_not_use_returns() -> None:
    old = nn.Linear(4, 2, bias=False).double()
    data = torch.eye(4, dtype=torch.float64)
    memory, new = remembered(old, data[:2]), moved(old)  # the first two inputs
    changes = new.weight.detach() - old.weight.detach()
    found = memsyn.repair(new, memory, max_change=0.01)
    kept = found.weights["weight"] - old.weight.detach()
    assert torch.allclose(kept[:, 2:], changes[:, 2:], rtol=1e-12)
    assert (kept[:, :2].abs() < changes[:, :2].abs()).all()
    # The new task uses inputs 1 and 3, not 0: the change of input 0 goes first.
    found = memsyn.repair(new, memory, max_change=0.05, learned=learned_by(new, data[[1, 3]]))
    kept = found.weights["weight"] - old.weight.detach()
    shares = (kept / changes)[0]
    assert shares[0] < shares[1] / 2
    assert shares[2:].tolist() == pytest.approx([1.0, 1.0])


def test_with_learned_the_new_outputs_change_less() -> None:
    """Old data in inputs 0 to 2, new data in 2 to 4."""
    old, data = network(), inputs(3) * torch.tensor([0, 0, 1, 1, 1])
    memory, new = remembered(old, inputs(2) * torch.tensor([1, 1, 1, 0, 0]), rank=None), moved(old, 0.1)
    factors = learned_by(new, data)
    outputs = []
    for learned in (None, factors):
        found = memsyn.repair(new, memory, max_change=0.05, learned=learned)
        repaired = copy.deepcopy(new)
        repaired.load_state_dict(found.weights, strict=False)
        y, z = new(data).detach(), repaired(data).detach()
        outputs.append(float((z - y).square().sum().sqrt() / y.square().sum().sqrt()))
    assert outputs[1] < 0.9 * outputs[0]
    assert found.learned == pytest.approx(outputs[1], rel=0.5)
    assert f"Outputs of the new task are predicted to change by {found.learned:.1%}" in str(found)


def test_the_bound_is_monotone_and_units_do_not_matter(forgot: tuple[nn.Module, nn.Module, Memory]) -> None:
    old, new, memory = forgot
    least, kept = math.inf, []
    for bound in (0.2, 0.1, 0.01, 1e-4):
        found = memsyn.repair(new, memory, max_change=bound)
        distance = sum(float((found.weights[n] - w).square().sum()) for n, w in old.state_dict().items())
        assert distance < least
        least = distance
        kept.append(found.kept)
    assert all(0 < share < 1 for own in kept for share in own.values())
    assert kept[0]["0"] > kept[-1]["0"]
    # Outputs in other units: the last layer of old and new model times 10.
    scaled = [copy.deepcopy(own) for own in (old, new)]
    with torch.no_grad():
        for own in scaled:
            for parameter in own[2].parameters():
                parameter *= 10
    rescaled = memsyn.repair(scaled[1], remembered(scaled[0], inputs(2), rank=None), max_change=0.1)
    assert rescaled.predicted is not None
    assert rescaled.predicted[0] == pytest.approx(memsyn.repair(new, memory, max_change=0.1).predicted[0], rel=1e-6)


def test_float32_and_a_truncated_memory_meet_the_bound() -> None:
    torch.manual_seed(0)
    old = nn.Sequential(nn.Conv2d(2, 20, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(80, 5))
    data = torch.randn(90, 2, 4, 4)
    memory, new = remembered(old, data, rank=4), moved(old, 0.1)
    for learned in (None, learned_by(new, torch.randn(50, 2, 4, 4))):
        found = memsyn.repair(new, memory, max_change=0.05, learned=learned)
        assert change_of(memory, new, found.weights) == pytest.approx(0.05, rel=1e-4)
        assert {own.dtype for own in found.weights.values()} == {torch.float32}


def test_an_embedding_is_repaired_token_by_token() -> None:
    torch.manual_seed(0)
    old = nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    memory, new = remembered(old, torch.arange(4).repeat(3).view(-1, 2), rank=None), moved(old)
    for learned in (None, learned_by(new, torch.arange(3, 7).view(-1, 1))):
        found = memsyn.repair(new, memory, max_change=0.05, learned=learned)
        kept = (found.weights["0.weight"] - old[0].weight).norm(dim=1) / (new[0].weight - old[0].weight).norm(dim=1)
        assert kept[4:].tolist() == pytest.approx([1.0] * 5)
        assert (kept[:3] < 0.95).all() or learned is not None
        assert change_of(memory, new, found.weights) == pytest.approx(0.05, rel=1e-5)


# What is put back, and what stays


def test_statistics_come_back_and_a_new_head_stays() -> None:
    model = story.trained()
    memory = story.remembered(model)
    careless = copy.deepcopy(model)
    story.learn(careless)
    before = weights_of(careless)
    learned = memsyn.measure(
        careless,
        [story.points(story.NEW, 300, seed=5, shift=6.0)[0]],
        estimator="kronecker",
        forward=lambda own, x: own.new_answers(x),
        progress=False,
    )
    found = memsyn.repair(careless, memory, max_change=0.05, learned=learned)
    assert found.statistics == ("body.1.running_mean", "body.1.running_var")
    assert found.learned is None
    assert "test it, and train its head again with freeze_statistics=True if it needs that" in str(found)
    assert not any(name.startswith(("new.", "old.")) for name in found.weights)
    assert all(torch.equal(own, before[name]) for name, own in careless.state_dict().items())
    assert "2 running statistics put back, the first is body.1.running_mean." in str(found)
    assert re.search(r"What stays of the change, by layer: body\.\d", str(found))
    repaired = copy.deepcopy(careless)
    repaired.load_state_dict(found.weights, strict=False)
    data = [story.requests()]
    assert memsyn.compare(careless, memory, data, progress=False).verdict().answer == "broken"
    # The prediction is to second order, and the change is large: the measured change is not far from the bound.
    assert memsyn.compare(repaired, memory, data, progress=False).mean_change < 0.15
    assert memsyn.compare(repaired, memory, data, progress=False).agreement > 0.97
    # Measured on data, the bound holds.
    found = memsyn.repair(careless, memory, max_change=0.05, learned=learned, batches=data)
    assert found.measured is not None
    assert 0.04 < found.measured[1].mean_change <= 0.05
    assert found.measured[1].verdict(max_change=0.06).answer == "safe"
    assert found.measured[0].mean_change == memsyn.compare(careless, memory, data, progress=False).mean_change
    assert str(found).startswith(f"Outputs on the old data change by {found.measured[1].mean_change:.1%} in place of ")


def test_statistics_alone_are_put_back_if_that_is_enough() -> None:
    model = story.trained()
    memory = story.remembered(model)
    careless = copy.deepcopy(model)
    with torch.no_grad():
        careless.body[1].running_mean += 3
    for batches in (None, [story.requests()]):
        found = memsyn.repair(careless, memory, batches=batches)
        assert found.weights.keys() == {"body.1.running_mean"}
        assert torch.equal(found.weights["body.1.running_mean"], model.body[1].running_mean)
        assert found.kept == {}


def test_a_parameter_without_dimensions_is_repaired() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.tensor(1.0)), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.scale * x)

    torch.manual_seed(0)
    old = Scaled().double()
    memory, new = remembered(old, inputs(2)), moved(old)
    for learned in (None, learned_by(new, inputs(3))):
        found = memsyn.repair(new, memory, max_change=0.1, learned=learned)
        ends = sorted([1.0, new.scale.item()])
        assert ends[0] < found.weights["scale"].item() < ends[1]
        assert change_of(memory, new, found.weights) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("has_data", [False, True])
def test_nothing_is_done_below_the_bound(forgot: tuple[nn.Module, nn.Module, Memory], *, has_data: bool) -> None:
    old, new, memory = forgot
    found = memsyn.repair(new, memory, max_change=50.0, batches=[inputs(2)] if has_data else None)
    assert found.weights == {}
    assert found.kept == {"0": 1.0, "2": 1.0}
    assert str(found).startswith("Nothing to repair. Outputs on the old data ")
    assert memsyn.repair(old, memory).predicted == (0.0, 0.0)


def test_models_and_memory_stay_as_they_are(forgot: tuple[nn.Module, nn.Module, Memory]) -> None:
    old, new, memory = forgot
    new.train()
    states = [weights_of(own) for own in (old, new)]
    kept = {group: {n: t.clone() for n, t in own.items()} for group, own in memory.groups().items()}
    memsyn.repair(new, memory, max_change=0.05, batches=[inputs(2)], reference=old)
    assert new.training
    for own, state in zip((old, new), states, strict=True):
        assert all(torch.equal(values, state[name]) for name, values in own.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in own.parameters())
    assert all(torch.equal(t, kept[group][n]) for group, own in memory.groups().items() for n, t in own.items())


def test_measured_on_data_an_importance_is_enough(forgot: tuple[nn.Module, nn.Module, Memory]) -> None:
    """D / (1 + lambda Omega), weight by weight, and the measured change at the bound."""
    old, new, memory = forgot
    alone = replace(memory, directions=None)
    found = memsyn.repair(new, alone, max_change=0.1, batches=[inputs(2)])
    assert found.predicted is None
    assert found.measured is not None
    assert 0.098 <= found.measured[1].mean_change <= 0.1
    before = old.state_dict()
    ratios = [
        ((new.state_dict()[n] - before[n]) / (found.weights[n] - before[n]) - 1) / omega
        for n, omega in memory.importance.items()
    ]
    strengths = torch.cat([own.flatten() for own in ratios])
    assert torch.allclose(strengths, strengths.mean().expand_as(strengths), rtol=1e-6)


def test_a_memory_that_does_not_tell_the_length_of_outputs_needs_data() -> None:
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6)).double()
    memory, new = remembered(old, inputs(2)), moved(old)
    assert memory.directions is not None
    memory = replace(memory, directions=replace(memory.directions, squared_outputs=None))
    with pytest.raises(memsyn.OptionError, match=r"does not tell how long the outputs.*Give batches= of the old kind"):
        memsyn.repair(new, memory)
    found = memsyn.repair(new, memory, batches=[inputs(2)], max_change=0.1, learned=learned_by(new, inputs(3)))
    assert found.measured is not None
    assert 0.098 <= found.measured[1].mean_change <= 0.1
    assert found.kept.keys() == {"0", "2", "3"}


def test_inputs_alone_need_data(forgot: tuple[nn.Module, nn.Module, Memory]) -> None:
    old, new, memory = forgot
    factors = memsyn.measure(old, [inputs(2)], estimator="inputs", progress=False)
    alone = replace(memory, directions=None, history=memory.history[:1]).consolidate(old, factors)
    with pytest.raises(memsyn.OptionError, match="second moments of inputs alone"):
        memsyn.repair(new, alone)
    with pytest.raises(memsyn.OptionError, match="learned= needs a memory with directions of inputs and output"):
        memsyn.repair(new, alone, learned=learned_by(new, inputs(3)), batches=[inputs(2)])
    found = memsyn.repair(new, alone, max_change=0.1, batches=[inputs(2)])
    assert found.measured is not None
    assert 0.098 <= found.measured[1].mean_change <= 0.1


# Names, references, shapes


def test_a_reference_stands_for_the_anchor(forgot: tuple[nn.Module, nn.Module, Memory]) -> None:
    old, new, memory = forgot
    directions = replace(memory, anchor={}, importance={}, counts={})
    expected = memsyn.repair(new, memory, max_change=0.1).weights
    with pytest.raises(memsyn.OptionError, match="holds directions alone, and no anchor"):
        memsyn.repair(new, directions)
    for reference in (old, old.state_dict()):
        for given in (new, new.state_dict()):
            found = memsyn.repair(given, directions, reference=reference, max_change=0.1)
            assert all(torch.equal(found.weights[name], own) for name, own in expected.items())
    with pytest.raises(memsyn.MismatchError, match="the reference is not the model that was measured: 4 parameters"):
        memsyn.repair(new, directions, reference=new)


def test_other_names_are_found(forgot: tuple[nn.Module, nn.Module, Memory]) -> None:
    _, new, memory = forgot
    expected = memsyn.repair(new, memory, max_change=0.1).weights
    wrapped = nn.ModuleDict({"net": new})
    with pytest.warns(memsyn.RenamedParametersWarning, match="4 of 4 parameters of the memory have other names"):
        found = memsyn.repair(wrapped, memory, max_change=0.1)
    assert found.weights.keys() == {f"net.{name}" for name in expected}
    assert all(torch.equal(found.weights[f"net.{name}"], own) for name, own in expected.items())


def test_new_rows_of_a_grown_head_stay(forgot: tuple[nn.Module, nn.Module, Memory]) -> None:
    _, new, memory = forgot
    grown = copy.deepcopy(new)
    grown[2] = nn.Linear(6, 5).double()
    with torch.no_grad():
        grown[2].weight[:3], grown[2].bias[:3] = new[2].weight, new[2].bias
    for learned in (None, learned_by(grown, inputs(3))):
        found = memsyn.repair(grown, memory, max_change=0.1, learned=learned)
        assert torch.equal(found.weights["2.weight"][3:], grown[2].weight[3:])
        assert change_of(memory, grown, found.weights) == pytest.approx(0.1, rel=1e-5)


def test_tied_weights_have_all_of_their_names() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens).tanh().mean(1))

    old = Tied().double()
    memory, new = remembered(old, torch.arange(6).view(3, 2)), moved(old)
    found = memsyn.repair(new.state_dict(), memory, max_change=0.1, learned=learned_by(new, torch.arange(6).view(3, 2)))
    assert found.weights.keys() == {"table.weight", "head.weight"}
    assert torch.equal(found.weights["table.weight"], found.weights["head.weight"])
    assert change_of(memory, new, found.weights) == pytest.approx(0.1, rel=1e-5)


def test_parameters_that_the_model_lost_are_left_out(forgot: tuple[nn.Module, nn.Module, Memory]) -> None:
    old, new, memory = forgot
    state = {name: own for name, own in new.state_dict().items() if name != "0.bias"}
    with pytest.warns(memsyn.LostParametersWarning, match="1 parameters of the memory are no longer in the model"):
        found = memsyn.repair(state, memory, max_change=0.1)
    assert found.weights.keys() == {"0.weight", "2.weight", "2.bias"}
    with pytest.raises(memsyn.MismatchError, match="of another architecture"):
        memsyn.repair(nn.ModuleDict({"other": nn.Linear(3, 2)}), memory)
    whole = {name: own for name, own in old.state_dict().items() if name != "2.bias"}
    with pytest.raises(memsyn.MismatchError, match=r"the reference lacks 1 parameters .*, the first is 2\.bias"):
        memsyn.repair(new, memory, reference=whole)


def test_a_layer_that_the_new_task_does_not_use_returns_whole() -> None:
    model = story.trained()
    memory, new = story.remembered(model), moved(model, 0.1)
    data = [story.points(story.NEW, 300, seed=5)[0]]
    learned = memsyn.measure(
        new, data, estimator="kronecker", forward=lambda own, x: own.new_answers(x), progress=False
    )
    found = memsyn.repair(new, memory, max_change=0.3, learned=learned)
    assert found.kept["old"] == 0.0
    assert torch.equal(found.weights["old.weight"], model.old.weight)
    with pytest.raises(memsyn.MismatchError, match=r"learned= does not hold old\.weight as the memory does"):
        memsyn.repair(new, memory, learned=replace(learned, routes={}))


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_change": 0}, "max_change must be a number above 0, such as 0.05; got 0"),
        ({"max_change": True}, "max_change must be a number above 0"),
        ({"max_change": math.nan}, "max_change must be a number above 0"),
        ({"forward": lambda model, batch: model(batch)}, "forward= and max_samples= say how batches are run"),
        ({"max_samples": 3}, "forward= and max_samples= say how batches are run"),
        ({"batches": iter([1])}, "batches are read several times, and a list_iterator can be read only once"),
        ({"memory": Memory.empty()}, "expected the memory of the old data, got an empty one"),
        ({"memory": 3}, "expected the memory of the old data, got a int"),
        ({"model": 3}, "expected a model, or its weights by name; got a int"),
        ({"model": {"0.weight": torch.ones(2)}, "batches": []}, "batches are run through the model: give the model"),
        ({"reference": {"0.weight": 3}}, "expected a model, or its weights by name; got a dict"),
        ({"learned": 3}, "learned must be the factors of the new task.*got int"),
        ({"learned": "inputs"}, "learned must be the factors of the new task.*got second moments of inputs"),
        ({"memory": "importance"}, "cannot be predicted: the memory holds no directions.*Give batches= of the old"),
    ],
)
def test_wrong_arguments(forgot: tuple[nn.Module, nn.Module, Memory], options: dict[str, Any], message: str) -> None:
    _, new, memory = forgot
    given: dict[str, Any] = {"model": new, "memory": memory, **options}
    if given["memory"] == "importance":
        given["memory"] = replace(memory, directions=None)
    if given.get("learned") == "inputs":
        given["learned"] = memsyn.measure(new, [inputs(3)], estimator="inputs", progress=False)
    with pytest.raises(memsyn.OptionError, match=message):
        memsyn.repair(**given)


def test_a_bound_that_cannot_be_met(forgot: tuple[nn.Module, nn.Module, Memory]) -> None:
    old, new, memory = forgot
    part = memory.select(only="0.*")
    with pytest.raises(memsyn.OptionError, match=r"max_change=0\.01 cannot be met: with all changes put back that the"):
        memsyn.repair(new, part, max_change=0.01, batches=[inputs(2)], reference=old)


def test_a_matrix_that_is_read_otherwise_is_refused(forgot: tuple[nn.Module, nn.Module, Memory]) -> None:
    _, new, memory = forgot
    learned = learned_by(new, inputs(3))
    matrices = {key: replace(own, bias=None) for key, own in learned.matrices.items()}
    sums = {name: total[:, :-1, :-1] if name.startswith("inputs/") else total for name, total in learned.sums.items()}
    with pytest.raises(memsyn.MismatchError, match=r"0\.weight is read as .* in the memory, and as .* in learned="):
        memsyn.repair(new, memory, learned=replace(learned, matrices=matrices, sums=sums))


# The command


def test_the_command_writes_whole_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = story.trained()
    memory = story.remembered(model)
    memory.save("memory")
    replace(memory, anchor={}, importance={}, counts={}).save("directions")
    save_file(model.state_dict(), "old.safetensors")
    save_file({"inputs": story.requests()}, "inputs.safetensors")
    story.learn(model)
    save_file(model.state_dict(), "new.safetensors")
    new_data = [story.points(story.NEW, 300, seed=5, shift=6.0)[0]]
    memsyn.measure(
        model, new_data, estimator="kronecker", forward=lambda own, x: own.new_answers(x), progress=False
    ).save("learned")
    data = ("--model", "tests.story:build", "--data", "inputs.safetensors")
    call("gate", "memory", "new.safetensors", *data, code=2)
    said = call("repair", "memory", "new.safetensors", "-o", "out.safetensors", "--learned", "learned", *data).output
    change = re.match(
        r"Outputs on the old data change by (\d\.\d)% in place of \d+\.\d%; at most 5\.0% is allowed", said
    )
    assert change is not None
    assert float(change[1]) <= 5.0
    assert said.endswith("Written to out.safetensors.\n")
    call("gate", "memory", "out.safetensors", *data, "--max-change", "0.06")
    written = load_file("out.safetensors")
    assert written.keys() == model.state_dict().keys()
    assert torch.equal(written["new.weight"], model.new.weight)
    facts = json.loads(
        call(
            "repair", "directions", "new.safetensors", "-o", "b.safetensors", "--reference", "old.safetensors",
            "--max-change", "0.007", "--json",
        ).stdout
    )  # fmt: skip
    assert facts["out"] == "b.safetensors"
    assert facts["predicted"]["after"] == pytest.approx(0.007, rel=1e-4)
    assert facts["measured"] is None
    assert facts["max_change"] == 0.007
    assert facts["learned"] is None
    assert facts["statistics"] == ["body.1.running_mean", "body.1.running_var"]
    assert set(facts["kept"]) == {"body.0", "body.1", "body.3"}
    assert set(facts["repaired"]) <= written.keys()
    predicted = call("gate", "directions", "b.safetensors", "--reference", "old.safetensors")
    assert predicted.output.startswith("Safe.")
    error = call("repair", "memory", "new.safetensors", "-o", "c", *data[:2], code=1).stderr
    assert "--data and --model belong together" in error
    error = call("repair", "memory", "new.safetensors", "-o", "c", "--max-change", "0", code=1).stderr
    assert "max_change must be a number above 0" in error
    assert not Path("c").exists()


def test_the_command_does_not_write_over_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = network().float()
    remembered(model, inputs(0).float()).save("memory")
    before = Path("memory").read_bytes()
    save_file(moved(model, size=1.0).state_dict(), "new")
    assert "-o memory is memory, which is only read" in call("repair", "memory", "new", "-o", "memory", code=1).stderr
    assert Path("memory").read_bytes() == before
    error = call("repair", "memory", "new", "-o", "nowhere/out", code=1).stderr
    assert "nowhere/out could not be written" in error
    before = Path("new").read_bytes()
    assert "-o ./new is new, which is only read" in call("repair", "memory", "new", "-o", "./new", code=1).stderr
    assert Path("new").read_bytes() == before


def test_the_command_repairs_each_copy_of_a_tied_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = network().float()
    remembered(model, inputs(0).float()).save("memory")
    state = moved(model, size=1.0).state_dict()
    save_file({**state, "again.weight": state["0.weight"].clone(), "head.weight": torch.ones(2, 6)}, "new")
    call("repair", "memory", "new", "-o", "out")
    written = load_file("out")
    assert torch.equal(written["again.weight"], written["0.weight"])
    assert not torch.equal(written["0.weight"], state["0.weight"])
    assert torch.equal(written["head.weight"], torch.ones(2, 6))


def test_a_change_of_weights_with_an_importance_alone_takes_data() -> None:
    model = network()
    memory = remembered(model, inputs(0))
    assert memory.directions is not None
    part = replace(memory, directions=memory.directions.only({"2.weight", "2.bias"}))
    new = copy.deepcopy(model)
    with torch.no_grad():
        new[0].weight += 1
    with pytest.raises(
        memsyn.OptionError, match=r"first is 0.weight\) moved or may have moved.* Give batches= of the old"
    ):
        memsyn.repair(new, part)
    repaired = memsyn.repair(new, part, batches=[inputs(0)])
    assert repaired.predicted is None
    assert repaired.measured is not None
    assert repaired.measured[1].mean_change <= 0.05 < repaired.measured[0].mean_change
