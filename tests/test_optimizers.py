"""Optimizers that torch does not have, wrappers around optimizers, and handles that did not act.

The loss is s (theta - 3)^2 / 2 and the penalty 2 s (theta - 1)^2, for a scale s. Weights must come to rest at its
minimum, (3 + 4 * 1) / 5 = 1.4, whatever the optimizer and the scale.
"""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import memsyn
from memsyn.protecting import compiled
from tests.other_optimizers import UNKNOWN, WRAPPERS, Make, PlainSubclass, ZeroingSGD, descend
from tests.training import a_task, assert_close, train

REST = 1.4


def of_one_weight() -> tuple[nn.Module, memsyn.Memory]:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    ones = torch.ones(1, 1, dtype=torch.float64)
    return model, memsyn.Memory({"weight": ones.clone()}, {"weight": 4 * ones})


def rest_of(make: Make, scale: float = 1.0) -> tuple[float, memsyn.Protection]:
    """Where the weight comes to rest, and the handle."""
    model, memory = of_one_weight()
    nn.init.constant_(model.weight, 1.3)
    optimizer = make(model.parameters())
    handle = memsyn.protect(optimizer, model, memory, strength=0.5 * scale)
    descend(model, optimizer, lambda: (scale * (model.weight - 3) ** 2 / 2).sum(), 500)
    return float(model.weight.detach()), handle


def scales(name: str) -> list[float]:
    """Plain gradient descent diverges if its loss is a hundred times as steep."""
    return [1.0] if "SGD" in name or "Wrapper" in name else [1.0, 100.0]


# Which form


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_optimizer_comes_to_rest_at_the_minimum(name: str) -> None:
    for scale in scales(name):
        found, handle = rest_of(UNKNOWN[name], scale)
        assert handle.form == "gradient"
        assert found == pytest.approx(REST, abs=0.003), scale


def test_the_proximal_form_is_for_steps_that_are_known() -> None:
    model, memory = of_one_weight()

    class Decayed(AdamW):
        """Has options of its own, and the step of AdamW."""

    for known in (SGD, Adam, AdamW, PlainSubclass, Decayed):
        assert memsyn.protect(known(model.parameters(), lr=0.1), model, memory).form == "proximal"
    unknown = UNKNOWN["copied Adam"](model.parameters())
    with pytest.raises(memsyn.OptionError, match=r"subclasses that do not override step; CopiedAdam has a step of its"):
        memsyn.protect(unknown, model, memory, form="proximal")
    zeroing = ZeroingSGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(zeroing, model, memory)
    assert handle.form == "gradient"
    with pytest.raises(memsyn.OptionError, match=r"ZeroingSGD has a step of its own. Use form='gradient' or 'auto'"):
        handle.load_state_dict({**handle.state_dict(), "form": "proximal"})


def test_a_subclass_that_takes_over_the_step_of_sgd_is_protected_like_sgd() -> None:
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    optimizer, other = PlainSubclass(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=1.0)
    memsyn.protect(other, twin, memory, strength=1.0)
    train(model, optimizer, data, targets, 3)
    train(twin, other, data, targets, 3)
    assert_close(model, twin)


def test_the_share_that_is_held_is_not_known_of_an_unknown_step() -> None:
    _, handle = rest_of(UNKNOWN["copied Adam"])
    report = handle.report()
    assert math.isnan(report.held)
    assert report.penalty == pytest.approx(0.5 * 4 * 0.4**2, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")  # as torch imports it
def test_sharded_states_of_several_processes(tmp_path: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for kind, options in ((SGD, {"lr": 0.05, "momentum": 0.9}), (Adam, {"lr": 0.01})):
            found, handle = rest_of(lambda p, k=kind, o=options: ZeroRedundancyOptimizer(p, optimizer_class=k, **o))
            assert handle.form == "gradient"
            assert found == pytest.approx(REST, abs=1e-3)
    finally:
        dist.destroy_process_group()


# Steps that call the step of their parent, or end in zero_grad()


def test_a_step_that_calls_the_step_of_its_parent_is_penalised_once() -> None:
    """Torch calls the hooks for each of the two steps."""
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    optimizer, other = ZeroingSGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=0.5)
    memsyn.protect(other, twin, memory, strength=0.5, form="gradient")
    for _ in range(2):
        train(model, optimizer, data, targets, 2)
        train(twin, other, data, targets, 2)
        assert_close(model, twin)

        def fails() -> Tensor:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(fails)  # and the steps after it are penalised again


@pytest.mark.parametrize("form", ["gradient", "proximal"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_gradients_that_are_gone_when_the_step_ends(form: str, with_closure: bool) -> None:
    """A hook that was registered first calls zero_grad()."""
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda own, *_: own.zero_grad())
    memsyn.protect(optimizer, model, memory, strength=0.5, form=form)
    memsyn.protect(other, twin, memory, strength=0.5, form=form)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), targets)
        loss.backward()
        return loss

    for _ in range(3):
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        train(twin, other, data, targets, 1)
        assert_close(model, twin)


# Wrappers


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_optimizer_comes_to_rest_at_the_minimum(name: str) -> None:
    for scale in scales(name):
        found, handle = rest_of(WRAPPERS[name], scale)
        assert found == pytest.approx(REST, abs=0.003), scale
        assert handle.form == ("gradient" if "Lion" in name else "proximal")
        assert handle.wrappers == (name.split(" ")[0].split(".")[-1],)


def test_the_optimizer_that_steps_is_found_and_named() -> None:
    model, memory = of_one_weight()
    inner = Adam(model.parameters(), lr=0.01)

    class Outer:
        def __init__(self, optimizer: Any) -> None:
            self.base_optimizer = optimizer

    class Uninitialised(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    handle = memsyn.protect(Outer(Uninitialised(inner)), model, memory)
    assert handle.optimizer is inner
    assert handle.wrappers == ("Outer", "Uninitialised")
    with pytest.raises(memsyn.ProtectionError, match="protected already"):
        memsyn.protect(inner, model, memory)
    handle.remove()
    assert memsyn.protect(inner, model, memory).wrappers == ()

    class Alone(Optimizer):
        def __init__(self) -> None:
            self.param_groups = [{"params": list(model.parameters())}]

    with pytest.raises(memsyn.ProtectionError, match=r"Alone did not call Optimizer.__init__.* as .optimizer, .base_o"):
        memsyn.protect(Alone(), model, memory)
    with pytest.raises(memsyn.OptionError, match=r"must be a torch.optim.Optimizer, or hold one as .optimizer; got o"):
        memsyn.protect(object(), model, memory)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_the_optimizer_of_accelerate(kind: Any) -> None:
    """It does not call Optimizer.__init__."""
    inner = []

    def prepared(parameters: Any) -> Any:
        inner.append(kind(parameters, lr=0.01))
        return Accelerator(cpu=True).prepare(inner[0])

    found, handle = rest_of(prepared)
    assert found == pytest.approx(REST, abs=1e-3)
    assert handle.wrappers == ("AcceleratedOptimizer",)
    assert handle.optimizer is inner[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_an_optimizer_has_lost_its_protection_and_can_be_protected(copied: Callable[[Any], Any]) -> None:
    model, memory = of_one_weight()
    optimizer = SGD(model.parameters(), lr=0.05)
    memsyn.protect(optimizer, model, memory, strength=0.5)
    other, twin = copied((model, optimizer))
    memsyn.protect(twin, other, memory, strength=0.5)
    for own, steps in ((optimizer, model), (twin, other)):
        descend(steps, own, lambda m=steps: ((m.weight - 3) ** 2 / 2).sum(), 400)
    assert float(model.weight.detach()) == float(other.weight.detach()) == pytest.approx(REST, abs=1e-6)


# Handles that did not act


@pytest.mark.parametrize("look", ["state_dict", "report", "remove"])
def test_weights_that_another_optimizer_moves_are_said_once(look: str) -> None:
    model, memory, data, targets = a_task()
    optimizer, other = SGD(model.parameters(), lr=0.1), Adam(model.parameters(), lr=0.1, fused=True)
    handle = memsyn.protect(optimizer, model, memory, strength=0.5)
    handle.report()
    model.state_dict()
    train(model, other, data, targets, 1)
    with pytest.warns(memsyn.NotProtectedWarning, match=r"4 protected parameters, 0.bias among them, .* made no step"):
        (model.state_dict if look == "state_dict" else getattr(handle, look))()
    train(model, other, data, targets, 1)
    model.state_dict()
    handle.report()
    handle.remove()


def test_weights_that_are_loaded_or_stepped_are_not_warned_of() -> None:
    model, memory, data, targets = a_task()
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, strength=0.5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
        handle.report()
        model.float().state_dict()  # rounds them
        model.double()
        train(model, optimizer, data, targets, 1)
        model.state_dict()
        handle.remove()
    assert said == []


class OfItself(Optimizer):
    """Computes its gradients in its step."""

    def __init__(self, parameters: Any, loss: Callable[[], Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.loss = loss

    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        gradients = torch.autograd.grad(self.loss(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.1 * gradient)


def test_a_step_that_moves_weights_without_a_gradient_is_said_once() -> None:
    model, memory = of_one_weight()
    optimizer = OfItself(model.parameters(), lambda: ((model.weight - 3) ** 2).sum())
    memsyn.protect(optimizer, model, memory, strength=0.5)
    with pytest.warns(memsyn.NotProtectedWarning, match=r"a step of OfItself has moved weight, and no .* had a gr"):
        optimizer.step()
    optimizer.step()


def test_steps_without_a_gradient_that_move_nothing_are_not_warned_of() -> None:
    model, memory = of_one_weight()
    optimizer = Adam(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=0.5)
    optimizer.step()
    optimizer.step(lambda: 0.0)
    assert float(model.weight.detach()) == 1.0


# Parameters that cannot be protected, and empty ones


def test_a_table_with_sparse_gradients_is_refused_before_it_moves() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    memory = memsyn.Memory({"weight": model.weight.detach() - 1}, {"weight": torch.ones(4, 2)})
    with pytest.raises(
        memsyn.ProtectionError, match=r"weight gets a sparse gradient: make its embedding with sparse=F"
    ):
        memsyn.protect(SGD(model.parameters(), lr=0.1), model, memory)
    model.weight.requires_grad_(False)
    memsyn.protect(SGD(model.parameters(), lr=0.1), model, memory)


class Table(nn.Module):
    """Nobody can tell from outside that its gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 2))

    def forward(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.weight, sparse=True)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_sparse_gradient_is_refused_before_the_step_moves_anything(form: str, with_closure: bool) -> None:
    model = Table()
    memory = memsyn.Memory({"weight": torch.zeros(4, 2)}, {"weight": torch.ones(4, 2)})
    optimizer = SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=1.0, form=form)

    def closure() -> Tensor:
        loss = model(torch.tensor([1])).sum()
        loss.backward()
        return loss

    if not with_closure:
        closure()
    with pytest.raises(memsyn.ProtectionError, match=r"sparse gradient: make its embedding with sparse=False"):
        optimizer.step(*([closure] if with_closure else []))
    assert torch.equal(model.weight.detach(), torch.ones(4, 2))


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_parameters_without_values_are_refused(form: str) -> None:
    model, memory = of_one_weight()
    moved = copy.deepcopy(model).to("meta")
    with pytest.raises(memsyn.ProtectionError, match=r'weight has no values: it is on the device "meta"'):
        memsyn.protect(SGD(moved.parameters(), lr=0.1), moved, memory, form=form)
    with pytest.raises(memsyn.ProtectionError, match=r'weight has no values: it is on the device "meta"'):
        memsyn.penalty(moved, memory)
    optimizer = SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, form=form)
    model.weight = nn.Parameter(torch.empty(1, 1, dtype=torch.float64, device="meta"))  # it is offloaded
    optimizer.param_groups[0]["params"] = [model.weight]
    with pytest.raises(memsyn.ProtectionError, match=r"Protect after the weights are loaded, without offloading"):
        optimizer.step()


def test_a_projection_refuses_parameters_without_values_too() -> None:
    model = nn.Linear(2, 1)
    factors = memsyn.measure(model, [torch.ones(4, 2)], estimator="kronecker", progress=False)
    memory = memsyn.Memory.empty().consolidate(model, factors)
    model.to("meta")
    with pytest.raises(memsyn.ProtectionError, match="weight has no values"):
        memsyn.protect(SGD(model.parameters(), lr=0.1), model, memory)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_parameters_are_refused() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged))
    memory = memsyn.Memory({"weight": torch.ones(5)}, {"weight": torch.ones(5)})
    with pytest.raises(memsyn.ProtectionError, match="weight is a nested tensor, and only dense parameters"):
        memsyn.protect(SGD(model.parameters(), lr=0.1), model, memory)
    model.weight = nn.Parameter(torch.ones(5).to_sparse())
    with pytest.raises(memsyn.ProtectionError, match=r"weight is a tensor of layout torch.sparse_coo, and only dense"):
        memsyn.penalty(model, memory)


class WithEmpties(nn.Module):
    """A layer, and parameters of no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.no_rows, self.no_columns = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(2, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.no_rows.sum() + self.no_columns.sum()


@pytest.mark.parametrize("form", ["gradient", "proximal", "projected"])
@pytest.mark.parametrize("make", [SGD, Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("smallest", [0, compiled.SMALLEST])
def test_empty_parameters_change_nothing(
    form: str, make: Any, smallest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "SMALLEST", smallest)
    model, data = WithEmpties(), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    if form == "proximal" and make is torch.optim.RMSprop:
        return
    estimator = "kronecker" if form == "projected" else "mas"

    def remembered(own: nn.Module) -> memsyn.Memory:
        found = memsyn.measure(own, [data], estimator=estimator, progress=False)
        memsyn.Memory.empty().consolidate(own, found).consolidate(own, found).save(tmp_path / "memory.safetensors")
        return memsyn.Memory.load(tmp_path / "memory.safetensors")

    ways = []
    for own in (model, copy.deepcopy(model.layer)):
        memory = remembered(own)
        optimizer = make(own.parameters(), lr=0.01)
        handle = memsyn.protect(optimizer, own, memory, strength=0.5, form=form)
        for _ in range(3):
            optimizer.zero_grad()
            own(data).square().sum().backward()
            optimizer.step()
        if form != "projected":
            assert float(memsyn.penalty(own, memory).detach()) == pytest.approx(handle.value() / 0.5, rel=1e-5)
        handle.report()
        handle.load_state_dict(handle.state_dict())
        handle.remove()
        ways.append([p.detach() for p in own.parameters() if p.numel()])
    assert len(ways[0]) == 2
    assert all(torch.equal(left, right) for left, right in zip(*ways, strict=True))


def test_a_second_protected_optimizer_that_has_not_stepped_is_no_alarm() -> None:
    model, memory = of_one_weight()
    first, second = SGD(model.parameters(), lr=0.1), Adam(model.parameters(), lr=0.1)
    one, other = memsyn.protect(first, model, memory), memsyn.protect(second, model, memory)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
        first.step()
        model.state_dict()
        one.remove()
        other.remove()
    assert said == []
    assert model.weight.item() != 1.0
