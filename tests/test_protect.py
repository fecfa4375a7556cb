"""The penalty and its gradient, against each other and in the loops people write."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsyn
from memsyn.protecting import compiled
from tests.training import files_of


def start() -> tuple[nn.Module, memsyn.Memory, Tensor, Tensor]:
    """A model whose weights have moved away from its anchor, with data to go on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = torch.randn(20, 4, dtype=torch.float64)
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [data], progress=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, memory, data, torch.randint(3, (20,))


def test_the_penalty_is_its_formula() -> None:
    model, memory, _, _ = start()
    expected = sum(
        float((memory.importance[name] * (p.detach() - memory.anchor[name]) ** 2).sum())
        for name, p in model.named_parameters()
    )
    found = memsyn.penalty(model, memory)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-12)
    assert expected > 0.01
    found.backward()
    for name, parameter in model.named_parameters():
        gradient = 2 * memory.importance[name] * (parameter - memory.anchor[name])
        assert torch.allclose(parameter.grad, gradient, rtol=1e-12)


def test_the_penalty_of_an_empty_memory_is_zero() -> None:
    model = nn.Linear(2, 1)
    assert float(memsyn.penalty(model, memsyn.Memory.empty())) == 0.0
    assert float(memsyn.penalty(nn.Identity(), memsyn.Memory.empty())) == 0.0


def test_the_penalty_names_what_does_not_fit() -> None:
    _, memory, _, _ = start()
    with pytest.raises(memsyn.MismatchError, match=r"reshaped: 0.weight \(expected \(6, 4\), the model has \(6, 5\)\)"):
        memsyn.penalty(nn.Sequential(nn.Linear(5, 6)).double(), memory)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw, one by one": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("strength", [0.0, 0.1, 2.0])
def test_a_protected_step_equals_the_loss_term(name: str, strength: float) -> None:
    model, memory, data, targets = start()
    twin = copy.deepcopy(model)
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    handle = memsyn.protect(optimizer, model, memory, strength=strength, form="gradient")
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(data), targets).backward()
        optimizer.step()
        other.zero_grad()
        (F.cross_entropy(twin(data), targets) + strength * memsyn.penalty(twin, memory)).backward()
        other.step()
        assert handle.value() == pytest.approx(strength * float(memsyn.penalty(twin, memory).detach()), rel=1e-9)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keyword", [False, True])
def test_closures_are_penalised_though_they_run_after_the_hook(keyword: bool) -> None:
    model, memory, data, targets = start()
    twin = copy.deepcopy(model)
    optimizer, other = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](twin.parameters())
    memsyn.protect(optimizer, model, memory, strength=0.5, form="gradient")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), targets)
        loss.backward()
        return loss

    def penalised() -> Tensor:
        other.zero_grad()
        loss = F.cross_entropy(twin(data), targets) + 0.5 * memsyn.penalty(twin, memory)
        loss.backward()
        return loss

    for _ in range(3):
        found = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert float(found.detach()) == pytest.approx(float(other.step(penalised).detach()), rel=1e-9)
    for mine, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, expected, rtol=1e-9)
    assert optimizer.step(lambda: None) is None


def test_lbfgs_with_a_line_search_minimises_the_penalised_loss() -> None:
    model, memory, data, targets = start()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe")
    handle = memsyn.protect(optimizer, model, memory, strength=3.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), targets)
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    total = F.cross_entropy(model(data), targets) + 3.0 * memsyn.penalty(model, memory)
    optimizer.zero_grad()
    total.backward()
    assert handle.value() > 0
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-5


def test_gradient_accumulation_penalises_once_a_step() -> None:
    model, memory, data, targets = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=0.5, form="gradient")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for part, target in zip(data.split(5), targets.split(5), strict=True):
        F.cross_entropy(model(part), target, reduction="sum").backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        push = 2 * 0.5 * memory.importance[name] * (before[name] - memory.anchor[name])
        assert torch.allclose(parameter, before[name] - 0.1 * (gradients[name] + push), rtol=1e-9)


def test_parameters_without_a_gradient_stay_where_they_are() -> None:
    model, memory, data, _ = start()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    memsyn.protect(optimizer, model, memory)
    head = copy.deepcopy(model[2].state_dict())
    model[0](data).sum().backward()
    optimizer.step()
    assert all(torch.equal(model[2].state_dict()[name], value) for name, value in head.items())
    assert not torch.equal(model[0].weight, memory.anchor["0.weight"])
    optimizer.zero_grad()
    optimizer.step()


def test_remove_ends_protection_and_allows_it_again() -> None:
    model, memory, _, _ = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory)
    with pytest.raises(memsyn.ProtectionError, match=r"protected already: call remove\(\)"):
        memsyn.protect(optimizer, model, memory)
    handle.remove()
    handle.remove()
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert memsyn.protect(optimizer, model, memory).value() > 0


def test_a_removed_handle_leaves_the_next_protection_alone() -> None:
    model, memory, _, _ = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = memsyn.protect(optimizer, model, memory)
    first.remove()
    memsyn.protect(optimizer, model, memory)
    first.remove()
    with pytest.raises(memsyn.ProtectionError, match="protected already"):
        memsyn.protect(optimizer, model, memory)


def test_a_collected_optimizer_is_forgotten() -> None:
    import gc

    from memsyn.protecting.protection import _protected

    model, memory, _, _ = start()
    gc.collect()
    before = len(_protected)
    handle = memsyn.protect(torch.optim.SGD(model.parameters(), lr=0.1), model, memory)
    handle.remove()  # nothing left to do
    assert len(_protected) == before


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_is_no_strength(strength: float) -> None:
    model, memory, _, _ = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(memsyn.OptionError, match=f"strength must be finite and not negative, got {strength}"):
        memsyn.protect(optimizer, model, memory, strength=strength)


@pytest.mark.parametrize("strength", ["strong", True, (1.0,)])
def test_a_strength_that_is_no_number(strength: Any) -> None:
    model, memory, _, _ = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(memsyn.OptionError, match="strength must be a number or memsyn"):
        memsyn.protect(optimizer, model, memory, strength=strength)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_pushed_in_float32(dtype: torch.dtype) -> None:
    """An importance beyond the range of float16, and a push within it."""
    model = nn.Linear(2, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    memory = memsyn.Memory({"weight": torch.tensor([[1.0, 0.5]])}, {"weight": torch.tensor([[1e5, 1e-7]])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = memsyn.protect(optimizer, model, memory, strength=1e3, form="gradient")
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert model.weight.grad.tolist() == [[1.0, pytest.approx(1 + 1e-4, rel=1e-3)]]
    assert handle.value() == pytest.approx(1e3 * 1e-7 * 0.25, rel=1e-6)
    assert float(memsyn.penalty(model, memory).detach()) == pytest.approx(1e-7 * 0.25, rel=1e-6)


def test_a_fused_optimizer_that_unscales_gets_a_scaled_push() -> None:
    model = nn.Linear(2, 1, bias=False)
    memory = memsyn.Memory({"weight": model.weight.detach() - 1}, {"weight": torch.ones(1, 2)})
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    memsyn.protect(optimizer, model, memory, strength=1.0, form="gradient")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((0 * model.weight).sum()).backward()
    scaler.step(optimizer)
    assert torch.allclose(model.weight, before - 0.1 * 2.0, rtol=1e-5)


def test_what_does_not_fit_together() -> None:
    model, memory, _, _ = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(memsyn.OptionError, match="form must be one of auto, gradient, proximal, projected; got"):
        memsyn.protect(optimizer, model, memory, strength=1.0, form="magic")
    with pytest.raises(memsyn.OptionError, match=r"expected protect\(optimizer, model, memory\), got \(Seq"):
        memsyn.protect(model, optimizer, memory)
    with pytest.raises(memsyn.ProtectionError, match=r"memory is empty.*measure the model and consolidate"):
        memsyn.protect(optimizer, model, memsyn.Memory.empty())
    elsewhere = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(memsyn.ProtectionError, match="holds none of the memory's 4 parameters"):
        memsyn.protect(elsewhere, model, memory)
    with pytest.raises(memsyn.MismatchError, match=r"the model lacks 0.weight, 0.bias, 2.weight"):
        memsyn.protect(optimizer, nn.Sequential(nn.Tanh()), memory)
    with pytest.raises(memsyn.OptionError, match=r"LBFGS must see the penalty.*use form='gradient' or 'auto'"):
        memsyn.protect(torch.optim.LBFGS(model.parameters()), model, memory, form="proximal")


@pytest.mark.parametrize("form", ["gradient", "proximal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("smallest", [0, math.inf])
def test_a_protected_step_runs_through_three_of_our_files(
    kind: Any, dtype: torch.dtype, form: str, smallest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four with the compiled update."""
    monkeypatch.setattr(compiled, "SMALLEST", smallest)
    model, memory, data, _ = start()
    optimizer = kind(model.to(dtype).parameters(), lr=0.01)
    memsyn.protect(optimizer, model, memory, strength=0.1, form=form)
    model(data.to(dtype)).sum().backward()
    optimizer.step()
    few = {"protecting/penalising.py", "protecting/penalty.py", "protecting/optimizers.py"}
    assert files_of(optimizer.step) == (few if smallest else few | {"protecting/compiled.py"})


def test_a_parameter_of_the_model_itself_is_a_layer_of_the_report() -> None:
    """Under its own name, the same as in `Memory.summary`; all others go by the name of their module."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.linear = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    model = Scaled()
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [torch.ones(3, 2)], progress=False))
    with torch.no_grad():
        model.scale.add_(1.0)
    handle = memsyn.protect(torch.optim.SGD(model.parameters(), lr=0.1), model, memory)
    layers = handle.report().layers
    assert list(layers) == ["scale", "linear"] == [layer.layer for layer in memory.summary()]
    assert layers == {"scale": pytest.approx(float(memory.importance["scale"].sum())), "linear": 0.0}
