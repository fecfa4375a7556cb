"""Consolidation against its formulas, and whether a memory fits a model."""

import pytest
import torch
from torch import nn

import memsyn


def model_with(weight: float, bias: float) -> nn.Module:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, weight)
    nn.init.constant_(model.bias, bias)
    return model


def importance(weight: float, bias: float, count: int) -> memsyn.Importance:
    return memsyn.Importance({"weight": torch.tensor([[weight * count]]), "bias": torch.tensor([bias * count])}, count)


@pytest.mark.parametrize(
    ("rule", "decay", "weight", "bias"),
    [
        ("sum", None, 6.0, 7.0),
        ("mean", None, (2 * 10 + 4 * 30) / 40, (5 * 10 + 2 * 30) / 40),
        ("ema", None, 3.0, 3.5),
        ("ema", 0.9, 0.9 * 2 + 0.1 * 4, 0.9 * 5 + 0.1 * 2),
        ("max", None, 4.0, 5.0),
    ],
)
def test_rules(rule: str, decay: float | None, weight: float, bias: float) -> None:
    first = memsyn.Memory.empty().consolidate(model_with(1, 2), importance(2, 5, 10), rule=rule, decay=decay)
    assert (first.importance["weight"].item(), first.importance["bias"].item()) == (2.0, 5.0)
    assert (first.anchor["weight"].item(), first.anchor["bias"].item()) == (1.0, 2.0)
    second = first.consolidate(model_with(3, 4), importance(4, 2, 30), rule=rule, decay=decay)
    assert second.importance["weight"].item() == pytest.approx(weight)
    assert second.importance["bias"].item() == pytest.approx(bias)
    assert (second.anchor["weight"].item(), second.anchor["bias"].item()) == (3.0, 4.0)
    assert first.anchor["weight"].item() == 1.0
    assert second.num_samples == 40
    assert [(entry.num_samples, entry.rule) for entry in second.history] == [(10, rule), (30, rule)]


def test_the_anchor_does_not_follow_the_model() -> None:
    model = model_with(1, 2)
    memory = memsyn.Memory.empty().consolidate(model, importance(2, 5, 10))
    nn.init.zeros_(model.weight)
    assert memory.anchor["weight"].item() == 1.0


def test_parameters_of_one_side_only_are_kept() -> None:
    """A weight frozen later keeps its importance; one that is new comes in."""
    model = model_with(1, 2)
    old = memsyn.Importance({"weight": torch.ones(1, 1)}, 1)
    new = memsyn.Importance({"bias": torch.full((1,), 7.0)}, 1)
    memory = memsyn.Memory.empty().consolidate(model, old).consolidate(model, new, rule="mean")
    assert (memory.importance["weight"].item(), memory.importance["bias"].item()) == (1.0, 7.0)
    assert list(memory.anchor) == ["weight", "bias"]


def test_a_mean_weights_each_parameter_by_its_own_samples() -> None:
    model = model_with(1, 2)
    memory = memsyn.Memory.empty().consolidate(model, memsyn.Importance({"weight": torch.ones(1, 1)}, 1000))
    for value in (1.0, 3.0):
        late = memsyn.Importance({"bias": torch.tensor([value * 10])}, 10)
        memory = memory.consolidate(model, late, rule="mean")
    assert memory.importance["bias"].item() == 2.0
    assert memory.counts == {"weight": 1000, "bias": 20}


def test_unlike_quantities_are_not_folded() -> None:
    model = model_with(1, 2)
    memory = memsyn.Memory.empty().consolidate(model, importance(1, 1, 1))
    other = memsyn.Importance({"weight": torch.ones(1, 1)}, 1, magnitude="square")
    with pytest.raises(memsyn.MismatchError, match=r"holds abs of squared_l2_norm, the importance square of"):
        memory.consolidate(model, other)
    with pytest.raises(memsyn.OptionError, match=r"at least one sample, got num_samples=0"):
        memsyn.Importance({}, 0)


def test_bad_options() -> None:
    memory, model = memsyn.Memory.empty(), model_with(1, 2)
    with pytest.raises(memsyn.OptionError, match=r"rule must be one of sum, mean, ema, max; got 'average'"):
        memory.consolidate(model, importance(1, 1, 1), rule="average")
    with pytest.raises(memsyn.OptionError, match=r"decay is only for rule='ema'; got decay=0.5 with rule='sum'"):
        memory.consolidate(model, importance(1, 1, 1), decay=0.5)
    with pytest.raises(memsyn.OptionError, match=r"decay must be from 0 to 1, got 1.5"):
        memory.consolidate(model, importance(1, 1, 1), rule="ema", decay=1.5)


def test_a_memory_of_another_architecture_names_every_difference(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [torch.ones(2, 2)], progress=False))
    memory.save(tmp_path / "m.safetensors")
    other = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    message = r"lacks 1.weight, 1.bias; reshaped: 0.weight \(expected \(3, 2\), the model has \(2, 2\)\), 0.bias"
    with pytest.raises(memsyn.MismatchError, match=message):
        memsyn.Memory.load(tmp_path / "m.safetensors", like=other)
    with pytest.raises(memsyn.MismatchError, match=message):
        memory.consolidate(other, memsyn.measure(other, [torch.ones(2, 2)], progress=False))
    with pytest.raises(memsyn.MismatchError, match="the importance is of another architecture"):
        memsyn.Memory.empty().consolidate(other, memsyn.measure(model, [torch.ones(2, 2)], progress=False))


def test_load_with_and_without_a_model(tmp_path) -> None:
    model = model_with(1, 2).double()
    memory = memsyn.Memory.empty().consolidate(model, importance(2, 5, 10), rule="ema", decay=0.25)
    memory.save(tmp_path / "m.safetensors")
    for found in (
        memsyn.Memory.load(tmp_path / "m.safetensors"),
        memsyn.Memory.load(tmp_path / "m.safetensors", like=model),
    ):
        assert (found.history, found.counts) == (memory.history, {"weight": 10, "bias": 10})
        assert found.anchor["weight"].dtype == torch.float64
        assert all(torch.equal(found.anchor[name], value) for name, value in memory.anchor.items())
        assert all(torch.equal(found.importance[name], value) for name, value in memory.importance.items())
    assert memory.summary()[0].num_weights == 1


def test_new_parameters_are_free_and_said_so(tmp_path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2)})
    found = memsyn.measure(model, [torch.ones(3, 2)], forward=lambda m, x: m["body"](x), progress=False)
    memory = memsyn.Memory.empty().consolidate(model, found)
    memory.save(tmp_path / "m.safetensors")
    grown = nn.ModuleDict({"body": model["body"], "head": nn.Linear(2, 2)})
    with pytest.warns(
        memsyn.NewParametersWarning, match=r"2 parameters .* stay free to change: head.weight, head.bias"
    ):
        memsyn.Memory.load(tmp_path / "m.safetensors", like=grown)
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1)
    with pytest.warns(memsyn.NewParametersWarning, match=r"head.weight") as caught:
        memsyn.protect(optimizer, grown, memory)
    assert caught[0].filename == __file__
    grown["head"].requires_grad_(False)
    memory.check(grown)  # what cannot change needs no warning
    memsyn.Memory.empty().check(grown)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_and_wrapped_models_have_the_same_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [torch.ones(3, 2)], progress=False))
    wrappers = [nn.DataParallel(model), torch.compile(model), nn.Sequential(torch.compile(model[0]))]
    for wrapped in wrappers:
        assert float(memsyn.penalty(wrapped, memory).detach()) == 0.0
    importance = memsyn.measure(torch.compile(model), [torch.ones(3, 2)], progress=False)
    assert set(importance.sums) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("rule", ["sum", "mean", "ema", "max"])
def test_a_head_with_more_rows_keeps_the_importance_of_the_old_ones(rule: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [torch.ones(4, 2)], progress=False))
    grown = nn.Sequential(model[0], nn.Linear(3, 4))
    found = memsyn.measure(grown, [torch.ones(4, 2)], progress=False)
    both = memory.consolidate(grown, found, rule=rule)
    for name in ("1.weight", "1.bias"):
        twin = memsyn.Memory({name: memory.anchor[name]}, {name: memory.importance[name]}, memory.history, {name: 4})
        old = memsyn.Importance({name: found.sums[name][:2]}, 4)
        expected = twin.consolidate(Named(name, memory.anchor[name]), old, rule=rule).importance[name]
        assert torch.equal(both.importance[name][:2], expected)
        assert torch.equal(both.importance[name][2:], found.mean()[name][2:])
        assert torch.equal(both.anchor[name], dict(grown.named_parameters())[name])
    grown[1].requires_grad_(False)  # nothing new is measured of it
    kept = memory.consolidate(grown, memsyn.measure(grown, [torch.ones(4, 2)], progress=False), rule=rule)
    assert torch.equal(kept.importance["1.weight"][:2], memory.importance["1.weight"])
    assert not kept.importance["1.weight"][2:].any()


class Named(nn.Module):
    """A model of one parameter, by a name with a dot in it."""

    def __init__(self, name: str, value: torch.Tensor) -> None:
        super().__init__()
        layer, _, own = name.partition(".")
        self.add_module(layer, nn.Module())
        self.get_submodule(layer).register_parameter(own, nn.Parameter(value.clone()))


def test_what_a_model_has_lost_is_left_out_with_a_warning() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [torch.ones(4, 2)], progress=False))
    body = model[:1]
    with pytest.warns(memsyn.LostParametersWarning, match=r"2 parameters of the memory are no.*1.weight, 1.bias"):
        after = memory.consolidate(body, memsyn.measure(body, [torch.ones(4, 2)], progress=False))
    assert list(after.importance) == ["0.weight", "0.bias"]
    assert list(memory.importance) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_mean_does_not_overflow() -> None:
    model = nn.Linear(1, 1, bias=False)
    large = memsyn.Importance({"weight": torch.full((1, 1), 1e38)}, 10**6)
    memory = memsyn.Memory.empty().consolidate(model, large)
    omega = memory.importance["weight"] * 1e5
    memory = memsyn.Memory(memory.anchor, {"weight": omega}, memory.history, memory.counts)
    other = memsyn.Importance({"weight": torch.full((1, 1), 3e38)}, 1)
    found = memory.consolidate(model, other, rule="mean").importance["weight"]
    assert float(found) == pytest.approx((1e37 * 10**6 + 3e38) / (10**6 + 1), rel=1e-6)


@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
def test_what_was_measured_says_to_which_weights_it_belongs(tmp_path, estimator: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    with memsyn.Observer(model, tmp_path / "own.safetensors", rate=1.0, estimator=estimator) as observer:
        observer.observe(torch.randn(64, 3))
        assert observer.flush()
        found = observer.factors() if estimator == "kronecker" else observer.importance()
    memory = memsyn.Memory.empty().consolidate(model, found)
    memory.save(tmp_path / "memory.safetensors")
    loaded = memsyn.Memory.load(tmp_path / "memory.safetensors")
    unknown = memsyn.measure(model, [torch.randn(5, 3)], estimator=estimator, progress=False)
    assert found.matches(model)
    assert memory.matches(model)
    assert loaded.matches(model)
    assert not unknown.matches(model), "measure keeps no fingerprint"
    assert not memory.renamed({"0.weight": "first.weight"}).matches(model)
    assert not memsyn.Memory.empty().matches(model)
    assert not memory.matches(model[0]), "it lacks parameters"
    assert memory.matches(nn.Sequential(*model, nn.Linear(2, 2))), "others may be there"
    for moved in (model[2].bias, model[1].running_mean):
        before = moved.detach().clone()
        moved.data[0] += 1
        assert not found.matches(model)
        assert not loaded.matches(model)
        moved.data.copy_(before)
        assert found.matches(model)
