"""Training loops as people write them: what comes and goes, is moved, saved, copied and compiled under protection."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import memsyn
from tests.training import a_task, assert_close, train

FORMS = ["gradient", "proximal"]


def pulled(parameter: Tensor, gradient: Tensor, anchor: Tensor, omega: Tensor, form: str) -> Tensor:
    """After one step of SGD with a learning rate of 0.1 and strength 1."""
    k = 2 * 0.1 * omega
    if form == "gradient":
        return parameter - 0.1 * gradient - k * (parameter - anchor)
    return (parameter - 0.1 * gradient + k * anchor) / (1 + k)


# What comes and goes


@pytest.mark.parametrize("form", FORMS)
def test_a_head_without_a_gradient_does_not_drift(form: str) -> None:
    model, memory, data, _ = a_task()
    with torch.no_grad():
        model[2].weight.add_(0.1)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    memsyn.protect(optimizer, model, memory, strength=1.0, form=form)
    head = copy.deepcopy(model[2].state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        model[0](data).sum().backward()
        optimizer.step()
    assert all(torch.equal(model[2].state_dict()[name], value) for name, value in head.items())


@pytest.mark.parametrize("form", FORMS)
def test_layers_frozen_and_unfrozen_later(form: str) -> None:
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    model[0].requires_grad_(False)
    optimizer = SGD(model[2].parameters(), lr=0.1)
    other = SGD(twin.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=1.0, form=form)
    memsyn.protect(other, twin, memory, strength=1.0, form=form)
    twin[0].requires_grad_(False)
    train(model, optimizer, data, targets, 3)
    train(twin, other, data, targets, 3)
    model[0].requires_grad_(True)
    twin[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters()})  # as gradual unfreezing does
    train(model, optimizer, data, targets, 3)
    train(twin, other, data, targets, 3)
    assert_close(model, twin)
    assert not torch.equal(model[0].weight.detach(), memory.anchor["0.weight"])


@pytest.mark.parametrize("form", FORMS)
def test_parameters_that_are_taken_out_of_the_optimizer(form: str) -> None:
    model, memory, data, targets = a_task()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, strength=1.0, form=form)
    train(model, optimizer, data, targets, 2)
    before = handle.value()
    optimizer.param_groups[0]["params"] = list(model[2].parameters())
    body = copy.deepcopy(model[0].state_dict())
    train(model, optimizer, data, targets, 2)
    assert all(torch.equal(model[0].state_dict()[name], value) for name, value in body.items())
    assert 0 < handle.value() != before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("later", [False, True])
def test_a_head_that_grows_keeps_its_old_rows_and_leaves_the_new_ones_free(form: str, later: bool) -> None:
    model, memory, data, _ = a_task()
    optimizer = SGD(model.parameters(), lr=0.1)
    if later:
        memsyn.protect(optimizer, model, memory, strength=1.0, form=form)
    head = nn.Linear(6, 5).double()
    with torch.no_grad():
        head.weight[:3], head.bias[:3] = model[2].weight + 0.5, model[2].bias - 0.5
    model[2] = head
    optimizer.param_groups[0]["params"] = list(model.parameters())
    if not later:
        with (
            pytest.warns(memsyn.GrownParametersWarning, match=r"2\.weight \(3 to 5 rows\)"),
            pytest.warns(memsyn.MovedWeightsWarning, match=r"2\.weight"),
        ):
            memsyn.protect(optimizer, model, memory, strength=1.0, form=form)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    F.cross_entropy(model(data), torch.randint(5, (20,))).backward()
    optimizer.step()
    for name, parameter in head.named_parameters():
        gradient, anchor, omega = parameter.grad, memory.anchor[f"2.{name}"], memory.importance[f"2.{name}"]
        if form == "gradient":  # which is in it already
            assert torch.allclose(parameter, before[name] - 0.1 * gradient, rtol=1e-9)
            gradient = gradient.clone()
            gradient[:3] -= 2 * omega * (before[name][:3] - anchor)
        assert torch.allclose(parameter[:3], pulled(before[name][:3], gradient[:3], anchor, omega, form), rtol=1e-9)
        assert torch.allclose(parameter[3:], before[name][3:] - 0.1 * gradient[3:], rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_grown_head_under_adam(form: str) -> None:
    model, memory, data, _ = a_task()
    model[2] = nn.Linear(6, 5).double()
    optimizer = Adam(model.parameters(), lr=0.01)
    with pytest.warns(memsyn.GrownParametersWarning), pytest.warns(memsyn.MovedWeightsWarning, match=r"2\.weight"):
        handle = memsyn.protect(optimizer, model, memory, form=form, strength=1e3)
    new = model[2].weight.detach()[3:].clone()
    for _ in range(200):
        train(model, optimizer, data, torch.full((20,), 4))
    assert float((model[2].weight.detach()[:3] - memory.anchor["2.weight"]).abs().mean()) < 0.1
    assert float((model[2].weight.detach()[3:] - new).abs().mean()) > 0.2
    assert handle.report().layers["2"] >= 0


def test_a_reshaped_parameter_is_an_error_that_names_it() -> None:
    model, memory, _, _ = a_task()
    for head in (nn.Linear(6, 2), nn.Linear(7, 3)):
        model[2] = head
        with pytest.raises(memsyn.MismatchError, match=r"reshaped: 2.weight \(expected \(3, 6\), the model has"):
            memsyn.protect(SGD(model.parameters(), lr=0.1), model, memory)


def test_a_parameter_that_is_reshaped_later_is_an_error_that_names_it() -> None:
    model, memory, data, _ = a_task()
    optimizer = SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory)
    model[2] = nn.Linear(6, 2).double()
    optimizer.param_groups[0]["params"] = list(model.parameters())
    model(data).sum().backward()
    with pytest.raises(memsyn.MismatchError, match=r"reshaped: 2.weight \(expected \(3, 6\), the model has \(2, 6\)\)"):
        optimizer.step()


def test_what_was_removed_or_added_before_is_said() -> None:
    model, memory, data, _ = a_task()
    model[2] = nn.Sequential(nn.Linear(6, 2)).double()
    optimizer = SGD(model.parameters(), lr=0.1)
    with (
        pytest.warns(memsyn.LostParametersWarning, match=r"2.weight, 2.bias"),
        pytest.warns(memsyn.NewParametersWarning, match=r"2.0.weight, 2.0.bias") as caught,
    ):
        handle = memsyn.protect(optimizer, model, memory)
    assert {warning.filename for warning in caught} == {__file__}
    model(data).sum().backward()
    optimizer.step()
    assert handle.value() > 0


@pytest.mark.parametrize("form", FORMS)
def test_tied_weights_are_pulled_once(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    data = torch.randn(6, 4, dtype=torch.float64)
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [data], progress=False))
    with torch.no_grad():
        model[0].weight.add_(0.1)
    before = model[0].weight.detach().clone()
    optimizer = SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=1.0, form=form)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    anchor, omega = memory.anchor["0.weight"], memory.importance["0.weight"]
    assert torch.allclose(model[2].weight, pulled(before, torch.zeros(()), anchor, omega, form), rtol=1e-12)


# What is moved, saved, copied and compiled


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_is_moved_after_protect(form: str) -> None:
    """Here to another precision: as for another device, new tensors take the place of the old."""
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    model.float()
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=1.0, form=form)
    memsyn.protect(other, twin, memory, strength=1.0, form=form)
    model.double()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        mine.data.copy_(its.data)
    train(model, optimizer, data, targets, 3)
    train(twin, other, data, targets, 3)
    assert_close(model, twin)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_training_goes_on_from_a_checkpoint(form: str, kind: type[Optimizer]) -> None:
    model, memory, data, targets = a_task()
    optimizer = kind(model.parameters(), lr=0.05)
    handle = memsyn.protect(optimizer, model, memory, strength=0.7, form=form)
    train(model, optimizer, data, targets, 3)
    saved = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "protection": handle.state_dict()}
    torch.save(state, saved)
    train(model, optimizer, data, targets, 3)

    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed, _, _, _ = a_task()
    again = kind(resumed.parameters(), lr=0.05)
    stand_in = memsyn.Memory.empty().consolidate(resumed, memsyn.measure(resumed, [data], progress=False))
    second = memsyn.protect(again, resumed, stand_in)
    resumed.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    second.load_state_dict(state["protection"])
    assert (second.strength, second.form) == (0.7, form)
    train(resumed, again, data, targets, 3)
    assert_close(resumed, model)
    assert second.value() == handle.value() > 0


def test_a_state_that_is_none() -> None:
    model, memory, _, _ = a_task()
    handle = memsyn.protect(SGD(model.parameters(), lr=0.1), model, memory)
    with pytest.raises(memsyn.OptionError, match="expected the state of a Protection, got the keys lr, momentum"):
        handle.load_state_dict({"lr": 1, "momentum": 0})
    with pytest.raises(memsyn.OptionError, match="strength must be finite"):
        handle.load_state_dict({**handle.state_dict(), "strength": -1.0})
    bad = {name: tensor[..., :1] for name, tensor in memory.anchor.items()}
    with pytest.raises(memsyn.MismatchError, match=r"reshaped: 0.weight"):
        handle.load_state_dict({**handle.state_dict(), "anchor": bad, "importance": bad})


def test_protecting_does_not_touch_the_memory() -> None:
    model, memory, data, targets = a_task()
    before = copy.deepcopy((memory.anchor, memory.importance))
    model.float()
    optimizer = SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, importance_dtype=torch.bfloat16)
    train(model, optimizer, data.float(), targets, 2)
    for mine, its in zip((memory.anchor, memory.importance), before, strict=True):
        assert all(torch.equal(mine[name], its[name]) and mine[name].dtype == its[name].dtype for name in its)


def test_a_copy_of_the_model_is_free_and_trains() -> None:
    model, memory, data, targets = a_task()
    optimizer = SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=1e6)
    twin = copy.deepcopy(model)
    train(twin, SGD(twin.parameters(), lr=0.1), data, targets, 3)
    train(model, optimizer, data, targets, 3)
    moved = [float((p.detach() - memory.anchor[n]).norm()) for n, p in twin.named_parameters()]
    held = [float((p.detach() - memory.anchor[n]).norm()) for n, p in model.named_parameters()]
    assert min(moved) > 100 * max(held)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["model", "step"])
def test_compiled_training(form: str, what: str) -> None:
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    memsyn.protect(other, twin, memory, strength=1.0, form=form)
    compiled = torch.compile(model, backend="eager")
    memsyn.protect(optimizer, compiled if what == "model" else model, memory, strength=1.0, form=form)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(data), targets).backward()
        optimizer.step()

    run = torch.compile(step, backend="eager") if what == "step" else lambda: train(compiled, optimizer, data, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        for _ in range(3):
            run()
    train(twin, other, data, targets, 3)
    assert_close(model, twin)


# What is said


@pytest.mark.parametrize("form", FORMS)
def test_a_report_is_its_definition(form: str) -> None:
    model, memory, data, targets = a_task()
    optimizer = SGD(model.parameters(), lr=0.03, momentum=0.5)
    handle = memsyn.protect(optimizer, model, memory, strength=20.0, form=form)
    start = handle.report()
    assert (start.penalty, start.bound) == (0.0, 0.0)
    train(model, optimizer, data, targets, 5)
    found = handle.report()
    moved = {name: p.detach() - memory.anchor[name] for name, p in model.named_parameters()}
    omega = memory.importance
    layers = {"0": 0.0, "2": 0.0}
    for name, distance in moved.items():
        layers[name[0]] += float((omega[name] * distance.abs()).sum())
    stiff = sum(int((2 * 20.0 * 0.03 / 0.5 * value > 1).sum()) for value in omega.values())
    assert found.penalty == pytest.approx(handle.value(), rel=1e-12)
    assert found.layers == pytest.approx(layers, rel=1e-9)
    assert found.bound == pytest.approx(sum(layers.values()), rel=1e-9)
    assert found.held == stiff / sum(value.numel() for value in omega.values())
    assert 0 < found.held < 1


def test_the_bound_holds_for_small_moves() -> None:
    """The mean change of the squared norm, on the data measured, is at most sum Omega |theta - theta*|."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = torch.randn(20, 4, dtype=torch.float64)
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [data], progress=False))
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory)
    optimizer.step()
    before = model(data).detach().square().sum(1)
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(memory.anchor[name] + 1e-5 * torch.randn_like(parameter))
        change = float((model(data).detach().square().sum(1) - before).abs().mean())
        assert 0 < change <= handle.report().bound * 1.001
