"""The projected form against its formula, and in the loops, optimizers and models it meets."""

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop
from transformers.pytorch_utils import Conv1D

import memsyn
from memsyn.matrices import Layout, Matrix
from memsyn.protecting.projection import Damping
from memsyn.values.directions import LayerDirections
from memsyn.values.spectra import Spectrum, spectrum_of
from tests.other_optimizers import UNKNOWN, WRAPPERS, ZeroingSGD, descend
from tests.training import files_of

C, MU = 10.0, 0.1


def a_moment(groups: int, width: int, seed: int) -> Tensor:
    rows = torch.randn(groups, 3, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.transpose(1, 2) @ rows + 0.1 * torch.eye(width)


def damped(change: Tensor, a: Tensor, s: Tensor | None, c: float = C) -> Tensor:
    """U [(U^T D V)_ij / (1 + c a_j ((1 - mu) s_i + mu))] V^T by dense eigendecompositions."""
    values, v = torch.linalg.eigh(a)
    weights = values.unsqueeze(-2)
    if s is None:
        return change @ v / (1 + c * weights) @ v.mT
    outputs, u = torch.linalg.eigh(s)
    weights = weights * ((1 - MU) * outputs.unsqueeze(-1) + MU)
    return u @ ((u.mT @ change @ v) / (1 + c * weights)) @ v.mT


def in_place(own: LayerDirections, change: Tensor) -> Tensor:
    """The damped change; its columns are damped in two parts if the matrix has a bias."""
    found = change.clone()
    widths = [own.matrix.layout.inputs] + ([] if own.matrix.bias is None else [1])
    Damping(own, C, change.device, change.dtype).damp_(found.split(widths, 2))
    return found


@given(
    groups=st.integers(1, 2),
    outputs=st.integers(1, 7),
    inputs=st.integers(1, 9),
    rank=st.sampled_from([None, 1, 2, 3]),
    both=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_damping_is_its_formula(
    groups: int, outputs: int, inputs: int, rank: int | None, both: bool, bias: bool, seed: int
) -> None:
    width = inputs + bias
    a, s = (
        spectrum_of(a_moment(groups, width, seed), rank)[0],
        spectrum_of(a_moment(groups, outputs, seed + 1), rank)[0],
    )
    matrix = Matrix("w", "b" if bias else None, Layout(groups, outputs, inputs, False, False))
    own = LayerDirections(matrix, a, s if both else None, 1.0, (1.0, 1.0), (1, 1))
    change = torch.randn(groups, outputs, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = in_place(own, change)
    torch.testing.assert_close(found, damped(change, a.dense(), s.dense() if both else None), rtol=1e-9, atol=1e-9)
    # In the direction of an eigenvector, the layer's output moves at most 1 / (1 + c a mu) as far as before.
    values, vectors = torch.linalg.eigh(a.dense())
    before, after = (change @ vectors).norm(dim=1), (found @ vectors).norm(dim=1)
    limit = 1 / (1 + C * values * (MU if both else 1.0))
    assert bool((after <= before * limit * (1 + 1e-6) + 1e-9).all())


def test_the_damping_of_a_table_is_by_row() -> None:
    counts = torch.tensor([[4.0, 0.0, 0.0]], dtype=torch.float64)
    matrix = Matrix("w", None, Layout(1, 2, 3, True, True))
    s = spectrum_of(a_moment(1, 2, 0), None)[0]
    own = LayerDirections(matrix, Spectrum(counts, None, torch.zeros(1)), s, 1.0, (1.0, 1.0), (1, 1))
    change = torch.ones(1, 2, 3, dtype=torch.float64)
    found = in_place(own, change)
    torch.testing.assert_close(found, damped(change, torch.diag_embed(counts), s.dense()))
    torch.testing.assert_close(found[:, :, 1:], change[:, :, 1:])  # rows that were never read are free


def a_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.randint(3, (5,), generator=generator))
        for _ in range(count)
    ]


def a_memory(model: nn.Module, rank: int | None = None, estimator: str = "kronecker") -> memsyn.Memory:
    data = torch.randn(20, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = memsyn.measure(model, [data], estimator=estimator, progress=False)
    return memsyn.Memory.empty().consolidate(model, found, rank=rank)


def train(model: nn.Module, optimizer: Optimizer, data: Iterable[tuple[Tensor, Tensor]]) -> None:
    for inputs, labels in data:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def matrix_of(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    return torch.cat([layer.weight.detach(), layer.bias.detach().unsqueeze(1)], 1)


def damp_by_hand(model: nn.Module, memory: memsyn.Memory, changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The damped changes of every parameter of a network of Linear layers and norms."""
    assert memory.directions is not None
    found = {}
    for key, own in memory.directions.layers.items():
        layer = key.removesuffix(".weight")
        change = torch.cat([changes[key], changes[f"{layer}.bias"].unsqueeze(1)], 1)
        s = None if own.outputs is None else own.outputs.dense()[0]
        result = damped(change, own.inputs.dense()[0], s)
        found |= {key: result[:, :-1], f"{layer}.bias": result[:, -1]}
    for name, single in memory.directions.diagonal.items():
        found[name] = changes[name] / (1 + C * ((1 - MU) * single.squares + MU * single.mass))
    return found


@pytest.mark.parametrize("estimator", ["kronecker", "inputs"])
@pytest.mark.parametrize("every", [1, 3])
def test_steps_of_sgd_are_their_closed_form(every: int, estimator: str) -> None:
    model = a_network()
    memory, twin = a_memory(model, estimator=estimator), copy.deepcopy(model)
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, every=every)
    assert handle.form == "projected"
    assert handle.strength == C
    data = batches(6)
    train(model, optimizer, data)
    matrices = {"0.weight", "0.bias", "3.weight", "3.bias"}
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for step, (inputs, labels) in enumerate(data, 1):
        other.zero_grad()
        F.cross_entropy(twin(inputs), labels).backward()
        gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        hand = damp_by_hand(twin, memory, gradients)
        for name, parameter in twin.named_parameters():
            parameter.grad = hand[name] if name in matrices else gradients[name]
        other.step()
        if step % every == 0:
            with torch.no_grad():
                changes = {name: p - before[name] for name, p in twin.named_parameters()}
                for name, change in damp_by_hand(twin, memory, changes).items():
                    twin.get_parameter(name).copy_(before[name] + change)
            before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-9, atol=1e-11)


class Unknown(Optimizer):
    """An optimizer that nobody knows: it moves every weight by a constant, whatever its gradient."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: Adam(p, lr=0.05),
    "adam, foreach": lambda p: Adam(p, lr=0.05, foreach=True),
    "adam, fused": lambda p: Adam(p, lr=0.05, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.05, weight_decay=0.5),
    "rmsprop": lambda p: RMSprop(p, lr=0.02),
    "unknown": Unknown,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_moves_the_old_outputs_less(name: str) -> None:
    model = a_network()
    memory, start = a_memory(model), copy.deepcopy(model)
    old = torch.randn(20, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def moved(strength: float) -> float:
        own = copy.deepcopy(start)
        optimizer = OPTIMIZERS[name](own.parameters())
        handle = memsyn.protect(optimizer, own, memory, strength=strength, every=4)
        train(own, optimizer, batches(10))
        handle.remove()
        return float((own(old) - start(old)).detach().norm())

    assert moved(C) < 0.6 * moved(0.0)
    assert moved(1e4) < 0.05 * moved(0.0)


def step_by_hand(memory: memsyn.Memory, model: nn.Module, optimizer: Any, inputs: Tensor, labels: Tensor) -> None:
    """A step of schedule-free SGD, with gradients damped, and after it the changes of the weights y and of z."""
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    named = dict(model.named_parameters())
    hand = damp_by_hand(model, memory, {name: p.grad for name, p in named.items() if p.grad is not None})
    for name, parameter in named.items():
        if not name.startswith("1."):  # not the norm, which is no matrix
            parameter.grad = hand[name]
    before = {name: p.detach().clone() for name, p in named.items()}
    before_z = {name: optimizer.state[p].get("z", p).detach().clone() for name, p in named.items()}
    optimizer.step()
    zs = {name: optimizer.state[p]["z"] for name, p in named.items()}
    for now, old in ((named, before), (zs, before_z)):
        changes = {name: now[name].detach() - old[name] for name in named}
        for name, change in damp_by_hand(model, memory, changes).items():
            now[name].data.copy_(old[name] + change)


def test_schedule_free_steps_are_their_closed_form() -> None:
    """The weights y and the base sequence z are both damped, so that their average x is."""
    model = a_network()
    memory, twin = a_memory(model), copy.deepcopy(model)
    optimizer, other = (schedulefree.SGDScheduleFree(m.parameters(), lr=0.5) for m in (model, twin))
    handle = memsyn.protect(optimizer, model, memory)
    assert handle.form == "projected"
    for part in (batches(4, 1), batches(3, 2)):  # an evaluation in between
        optimizer.train()
        other.train()
        for inputs, labels in part:
            train(model, optimizer, [(inputs, labels)])
            step_by_hand(memory, twin, other, inputs, labels)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-9, atol=1e-11)
        optimizer.eval()
        other.eval()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-9, atol=1e-11)
    handle.load_state_dict({**handle.state_dict(), "every": 10})
    assert handle.every == 1  # type: ignore[attr-defined]


OTHERS = {
    **{name: UNKNOWN[name] for name in UNKNOWN if "schedulefree" in name or "Lion" in name or "AdaF" in name},
    **WRAPPERS,
    "pytorch_optimizer.ScheduleFreeAdamW": lambda p: pytorch_optimizer.ScheduleFreeAdamW(p, lr=0.01),
    "copied Adam": UNKNOWN["copied Adam"],
    "SGD with zero_grad in step": UNKNOWN["SGD with zero_grad in step"],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_and_wrappers_move_the_old_outputs_less(name: str) -> None:
    """After `optimizer.eval()`, where there is one."""
    start = a_network()
    memory = a_memory(start)
    old = torch.randn(20, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    inputs, labels = batches(1)[0]

    def moved(strength: float) -> float:
        own = copy.deepcopy(start)
        optimizer = OTHERS[name](own.parameters())
        handle = memsyn.protect(optimizer, own, memory, strength=strength)
        descend(own, optimizer, lambda: F.cross_entropy(own(inputs), labels), 40)
        handle.remove()
        return float((own(old) - start(old)).detach().norm())

    assert moved(C) < 0.7 * moved(0.0)
    assert moved(1e6) < 1e-3 * moved(0.0)


def test_a_step_that_calls_the_step_of_its_parent_is_projected_once() -> None:
    model = a_network()
    memory, twin = a_memory(model), copy.deepcopy(model)
    optimizer, other = ZeroingSGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, every=2)
    memsyn.protect(other, twin, memory, every=2)
    train(model, optimizer, batches(4))
    train(twin, other, batches(4))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-9, atol=1e-11)


def test_a_table_with_sparse_gradients_is_projected() -> None:
    """Its gradient is left as it is; the change of its weights is damped."""
    data = torch.randint(6, (20, 3), generator=torch.Generator().manual_seed(0))

    def network(sparse: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(6, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 2)).double()

    model, start = network(True), network(True)
    factors = memsyn.measure(model, [data], estimator="kronecker", progress=False)
    memory = memsyn.Memory.empty().consolidate(model, factors)
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, every=1)
    F.cross_entropy(model(data), torch.zeros(20, dtype=torch.long)).backward()
    gradient = model[0].weight.grad.to_dense()
    optimizer.step()
    assert memory.directions is not None
    own = memory.directions.layers["0.weight"]
    assert own.outputs is not None
    change = damped(-0.1 * gradient.mT, torch.diag(own.inputs.values[0].double()), own.outputs.dense()[0].double()).mT
    torch.testing.assert_close(model[0].weight.detach(), start[0].weight.detach() + change, rtol=1e-6, atol=1e-9)
    handle.remove()


def test_a_strength_of_zero_changes_no_bit() -> None:
    model = a_network()
    twin = copy.deepcopy(model)
    optimizer, other = Adam(model.parameters()), Adam(twin.parameters())
    memsyn.protect(optimizer, model, a_memory(model), strength=0)
    train(model, optimizer, batches(4))
    train(twin, other, batches(4))
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("keyword", [True, False])
def test_closures_are_projected_though_they_run_after_the_hook(keyword: bool) -> None:
    model = a_network()
    memory, twin = a_memory(model), copy.deepcopy(model)
    optimizer, other = Adam(model.parameters(), lr=0.01), Adam(twin.parameters(), lr=0.01)
    memsyn.protect(optimizer, model, memory, every=2)
    memsyn.protect(other, twin, memory, every=2)
    for inputs, labels in batches(4):

        def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss is not None
        train(twin, other, [(inputs, labels)])
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in model.named_parameters())


def test_lbfgs_is_refused() -> None:
    model = a_network()
    memory = a_memory(model)
    with pytest.raises(memsyn.OptionError, match="LBFGS takes several steps inside one"):
        memsyn.protect(LBFGS(model.parameters()), model, memory)


def test_accumulated_gradients_are_projected_once() -> None:
    model = a_network()
    memory, twin = a_memory(model), copy.deepcopy(model)
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, every=1)
    memsyn.protect(other, twin, memory, every=1)
    (x, y), (x2, y2) = batches(2)
    F.cross_entropy(model(x), y).mul(0.5).backward()
    F.cross_entropy(model(x2), y2).mul(0.5).backward()
    optimizer.step()
    train(twin, other, [(torch.cat([x, x2]), torch.cat([y, y2]))])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_a_skipped_step_moves_nothing() -> None:
    model = a_network().float()
    memory = a_memory(a_network())
    optimizer = Adam(model.parameters())
    memsyn.protect(optimizer, model, memory, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = copy.deepcopy(model)
    (inputs, labels), *_ = batches(1)
    scaler.scale(F.cross_entropy(model(inputs.float()), labels) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before.get_parameter(name)) for name, p in model.named_parameters())


def test_a_scaled_step_is_the_plain_step() -> None:
    model = a_network()
    memory, twin = a_memory(model), copy.deepcopy(model)
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, every=1)
    memsyn.protect(other, twin, memory, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for inputs, labels in batches(3):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(inputs), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
    train(twin, other, batches(3))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-6, atol=1e-9)


def test_a_weight_and_its_bias_in_two_optimizers() -> None:
    model = a_network()
    memory = a_memory(model)
    first = SGD([model[0].weight, model[3].weight], lr=0.1)
    second = SGD([model[0].bias, model[3].bias, *model[1].parameters()], lr=0.1)
    memsyn.protect(first, model, memory, every=1)
    memsyn.protect(second, model, memory, every=1)
    before, ((inputs, labels), *_) = copy.deepcopy(model), batches(1)
    F.cross_entropy(model(inputs), labels).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    first.step()
    second.step()
    assert memory.directions is not None
    own = memory.directions.layers["0.weight"]
    assert own.outputs is not None
    a, s = own.inputs.dense()[0], own.outputs.dense()[0]
    # Each moves alone, so that of A only its own part counts: all but the last row and column, or the last number.
    weight = damped(damped(-0.1 * gradients["0.weight"], a[:-1, :-1], s), a[:-1, :-1], s)
    bias = damped(damped(-0.1 * gradients["0.bias"].unsqueeze(1), a[-1:, -1:], s), a[-1:, -1:], s)
    torch.testing.assert_close(model[0].weight - before[0].weight, weight, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(model[0].bias - before[0].bias, bias.squeeze(1), rtol=1e-8, atol=1e-12)


def test_a_frozen_bias_does_not_move() -> None:
    model = a_network()
    memory = a_memory(model)
    model[0].bias.requires_grad_(False)
    optimizer, before = Adam([p for p in model.parameters() if p.requires_grad]), copy.deepcopy(model)
    memsyn.protect(optimizer, model, memory, every=1)
    train(model, optimizer, batches(3))
    assert torch.equal(model[0].bias, before[0].bias)
    assert not torch.equal(model[0].weight, before[0].weight)


def test_layers_without_a_gradient_stay_where_they_are() -> None:
    model = a_network()
    memory, before = a_memory(model), copy.deepcopy(model)
    optimizer = Adam(model.parameters())
    memsyn.protect(optimizer, model, memory, every=1)
    for inputs, _ in batches(3):
        optimizer.zero_grad()
        model[0](inputs).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[3].weight, before[3].weight)
    assert torch.equal(model[1].weight, before[1].weight)
    assert not torch.equal(model[0].weight, before[0].weight)


def test_a_layer_unfrozen_later_is_protected_from_then_on() -> None:
    model = a_network()
    memory = a_memory(model)
    model[0].requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, every=2)
    train(model, optimizer, batches(3))  # one step waits
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    train(model, optimizer, batches(2))
    handle.flush()
    assert set(handle.report().layers) == {"0", "1", "3"}


@pytest.mark.parametrize("every", [1, 3])
def test_a_backbone_that_was_frozen_in_the_optimizer_is_protected_when_it_learns(every: int) -> None:
    moved = []
    for strength in (0.0, 1e6):
        model = a_network()
        memory, before = a_memory(model), matrix_of(model, "0")
        model[0].requires_grad_(False)
        optimizer = SGD(model.parameters(), lr=0.1)
        handle = memsyn.protect(optimizer, model, memory, strength=strength, every=every)
        train(model, optimizer, batches(2))
        model[0].requires_grad_(True)
        train(model, optimizer, batches(4))
        handle.flush()
        moved.append(float((matrix_of(model, "0") - before).norm()))
    assert moved[1] < 0.01 * moved[0]


def test_a_network_that_is_all_frozen_can_be_protected_before_it_learns() -> None:
    model = a_network()
    memory, before = a_memory(model), matrix_of(model, "0")
    optimizer = SGD(model.requires_grad_(False).parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=1e6, every=1)
    model.requires_grad_(True)
    train(model, optimizer, batches(1))
    assert float((matrix_of(model, "0") - before).norm()) < 1e-3


def test_new_rows_of_a_head_are_free() -> None:
    model = a_network()
    memory = a_memory(model)
    grown = nn.Linear(6, 5).double()
    with torch.no_grad():
        grown.weight[:3], grown.bias[:3] = model[3].weight, model[3].bias
    model[3] = grown
    optimizer, start = Unknown(model.parameters()), matrix_of(model, "3").clone()
    with pytest.warns(memsyn.GrownParametersWarning, match=r"3\.weight \(3 to 5 rows\)"):
        memsyn.protect(optimizer, model, memory, every=1, strength=1e6)
    for _ in range(3):
        optimizer.step()
    moved = matrix_of(model, "3") - start
    torch.testing.assert_close(moved[3:], torch.full((2, 7), 0.03, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(moved[:3].norm()) < 0.1 * 0.03 * 21**0.5


def test_new_rows_of_a_table_are_free_and_old_ones_held_as_often_as_they_were_read() -> None:
    table = nn.Embedding(4, 3).double()
    index = torch.tensor([[0, 0, 0, 1]])
    found = memsyn.measure(table, [index], estimator="kronecker", progress=False)
    memory = memsyn.Memory.empty().consolidate(table, found)
    bigger = nn.Embedding(6, 3).double()
    with torch.no_grad():
        bigger.weight[:4] = table.weight
    optimizer, before = Unknown(bigger.parameters()), bigger.weight.detach().clone()
    with pytest.warns(memsyn.GrownParametersWarning, match=r"weight \(4 to 6 rows\)"):
        memsyn.protect(optimizer, bigger, memory, every=1)
    optimizer.step()
    moved = (bigger.weight.detach() - before).norm(dim=1)
    assert moved[0] < moved[1] < moved[2]
    torch.testing.assert_close(moved[2:], torch.full((4,), 0.01 * 3**0.5, dtype=torch.float64))


def test_a_tied_weight_is_damped_for_both_of_its_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(index)))

    torch.manual_seed(0)
    model = Tied().double()
    found = memsyn.measure(model, [torch.randint(5, (8, 6))], estimator="kronecker", progress=False)
    assert set(found.matrices) == {"table.weight", "table.weight as table"}
    memory = memsyn.Memory.empty().consolidate(model, found, rank=None)
    assert memory.directions is not None
    optimizer, before = Unknown(model.parameters()), model.table.weight.detach().clone()
    memsyn.protect(optimizer, model, memory, every=1)
    optimizer.step()
    change = torch.full((7, 4), 0.01, dtype=torch.float64)
    for key, own in memory.directions.layers.items():
        assert own.outputs is not None
        turned = change.mT if key.endswith("as table") else change
        turned = damped(turned, own.inputs.dense()[0], own.outputs.dense()[0])
        change = turned.mT if key.endswith("as table") else turned
    torch.testing.assert_close(model.table.weight - before, change, rtol=1e-9, atol=1e-12)


def test_whoever_looks_sees_projected_weights() -> None:
    model = a_network()
    memory, twin = a_memory(model), copy.deepcopy(model)
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    memsyn.protect(other, twin, memory, every=1)
    handle = memsyn.protect(optimizer, model, memory, every=100)
    looks: list[Callable[[], Any]] = [model.state_dict, optimizer.state_dict, handle.state_dict, handle.flush]
    data = batches(len(looks) + 1)
    for look, one in zip(looks, data, strict=False):
        train(model, optimizer, [one])
        train(twin, other, [one])
        look()
        torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-9, atol=1e-12)
    train(model, optimizer, data[-1:])
    train(twin, other, data[-1:])
    handle.remove()
    torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-9, atol=1e-12)
    handle.remove()
    memsyn.protect(optimizer, model, memory)  # it is free again


def test_a_model_is_copied_and_pickled_while_it_is_protected() -> None:
    model = a_network()
    optimizer = SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, a_memory(model), every=100)
    train(model, optimizer, batches(1))
    waiting = model[0].weight.detach().clone()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.state_dict()["0.weight"], waiting)
        twin.load_state_dict(twin.state_dict())
    assert torch.equal(model[0].weight, waiting)  # nobody has looked at the model itself
    assert not torch.equal(model.state_dict()["0.weight"], waiting)


def test_weights_that_are_replaced_are_taken_over() -> None:
    model = a_network()
    memory, others = a_memory(model), {name: p + 1 for name, p in a_network().state_dict().items()}
    optimizer = SGD(model.parameters(), lr=0.0)
    memsyn.protect(optimizer, model, memory, every=5)
    train(model, optimizer, batches(2))  # two steps wait
    model.load_state_dict(others)
    train(model, optimizer, batches(8))
    assert all(torch.equal(p, others[name]) for name, p in model.named_parameters())


def test_training_goes_on_from_a_checkpoint() -> None:
    def course(stop: int | None) -> nn.Module:
        model = a_network()
        memory = a_memory(model)
        optimizer = Adam(model.parameters(), lr=0.01)
        handle = memsyn.protect(optimizer, model, memory, every=2)
        data = batches(6)
        if stop is not None:
            train(model, optimizer, data[:stop])
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
            model = a_network()
            optimizer = Adam(model.parameters(), lr=0.5)
            handle = memsyn.protect(optimizer, model, memory, strength=1.0, every=7)
            for part, state in zip((model, optimizer, handle), saved, strict=True):
                part.load_state_dict(state)
            assert handle.strength == C
        train(model, optimizer, data[stop or 0 :])
        handle.remove()
        return model

    whole, resumed = course(None), course(4)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter, resumed.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_a_state_that_is_none() -> None:
    model = a_network()
    handle = memsyn.protect(SGD(model.parameters(), lr=0.1), model, a_memory(model))
    with pytest.raises(memsyn.OptionError, match="expected the state of a projected form"):
        handle.load_state_dict({"strength": 1.0, "form": "gradient"})
    with pytest.raises(memsyn.OptionError, match="the state holds no directions"):
        handle.load_state_dict({**handle.state_dict(), "directions": {}})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_projected_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3)
    data = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    found = memsyn.measure(model, [data], estimator="kronecker", progress=False)
    memory = memsyn.Memory.empty().consolidate(model, found, rank=None)
    half = copy.deepcopy(model).to(dtype)
    wide = copy.deepcopy(half).float()
    for own in (half, wide):
        optimizer = Unknown(own.parameters())
        memsyn.protect(optimizer, own, memory, every=1)
        optimizer.step()
    exact, steps = wide.weight, torch.finfo(dtype).eps * wide.weight.abs()
    assert bool(((half.weight.float() - exact).abs() <= 2 * steps + 1e-3 * torch.finfo(dtype).eps).all())


def test_a_report_says_how_much_was_taken_away_and_how_much_room_is_left() -> None:
    model = a_network()
    memory = a_memory(model)
    optimizer = Unknown(model.parameters())
    handle = memsyn.protect(optimizer, model, memory, every=1)
    assert handle.report().held == 0.0
    before = copy.deepcopy(model).requires_grad_(False)
    optimizer.step()
    report = handle.report()
    names = model.state_dict()
    kept = sum(float((p - before.get_parameter(n)).square().sum()) for n, p in names.items())
    whole = sum(p.numel() * 1e-4 for p in names.values())
    assert report.held == pytest.approx(1 - kept / whole)
    layer = sum(float((names[n] - before.get_parameter(n)).square().sum()) for n in ("0.weight", "0.bias"))
    assert report.layers["0"] == pytest.approx(1 - layer / (30 * 1e-4))
    assert memory.directions is not None
    assert report.room == {"0": memory.directions.room()["0.weight"], "3": memory.directions.room()["3.weight"]}
    assert (report.penalty, report.bound, handle.value()) == (0.0, 0.0, 0.0)


def test_compiled_training() -> None:
    model = a_network()
    memory, twin = a_memory(model), copy.deepcopy(model)
    optimizer, other = Adam(model.parameters(), lr=0.01), Adam(twin.parameters(), lr=0.01)
    compiled = torch.compile(model, backend="eager")
    memsyn.protect(optimizer, compiled, memory, every=2)
    memsyn.protect(other, twin, memory, every=2)
    train(compiled, optimizer, batches(4))
    train(twin, other, batches(4))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_a_projected_step_runs_through_three_of_our_files() -> None:
    model = a_network()
    optimizer = Adam(model.parameters())
    memsyn.protect(optimizer, model, a_memory(model), every=1)
    train(model, optimizer, batches(1))
    assert files_of(optimizer.step) == {"protecting/projection.py", "matrices.py", "parameters.py"}


def test_a_weight_whose_rows_are_inputs_and_its_longer_bias_are_damped_as_its_transpose() -> None:
    torch.manual_seed(0)
    turned = Conv1D(9, 4).double()  # of transformers: weight (4, 9), bias (9,)
    plain = nn.Linear(4, 9).double()
    with torch.no_grad():
        plain.weight.copy_(turned.weight.T)
        plain.bias.copy_(turned.bias.normal_())
    data = torch.randn(6, 4, dtype=torch.float64)
    for layer in (turned, plain):
        factors = memsyn.measure(layer, [data], estimator="kronecker", progress=False)
        optimizer = Adam(layer.parameters(), lr=0.1)
        memsyn.protect(optimizer, layer, memsyn.Memory.empty().consolidate(layer, factors), every=2)
        before = layer.weight.detach().clone()
        for _ in range(2):
            optimizer.zero_grad()
            (layer(data) - 1).square().sum().backward()
            optimizer.step()
        assert (layer.weight - before).abs().max() > 1e-3
    torch.testing.assert_close(turned.weight.T, plain.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(turned.bias, plain.bias, rtol=1e-9, atol=1e-12)


def test_a_gradient_that_is_no_view_of_a_matrix_is_damped_alike() -> None:
    """That of a convolution in channels_last is copied to be a matrix, and must be written back."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).double()
    data = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    factors = memsyn.measure(plain, [data], estimator="kronecker", progress=False)
    memory = memsyn.Memory.empty().consolidate(plain, factors)
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    start = plain[0].weight.detach().clone()
    for layer, batch in ((plain, data), (other, data.to(memory_format=torch.channels_last))):
        optimizer = SGD(layer.parameters(), lr=0.1)
        memsyn.protect(optimizer, layer, memory, every=2)
        for _ in range(2):
            optimizer.zero_grad()
            (layer(batch) - 1).square().mean().backward()
            optimizer.step()
    assert not other[0].weight.grad.is_contiguous()
    assert (plain[0].weight - start).abs().max() > 1e-4
    torch.testing.assert_close(other[0].weight, plain[0].weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other[0].bias, plain[0].bias, rtol=1e-9, atol=1e-12)


def test_what_does_not_fit_together() -> None:
    model = a_network()
    memory = a_memory(model)
    importance = memsyn.Memory.empty().consolidate(
        model, memsyn.measure(model, [torch.randn(3, 4).double()], progress=False)
    )
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(memsyn.OptionError, match="'projected' needs Kronecker factors"):
        memsyn.protect(optimizer, model, importance, form="projected")
    with pytest.raises(memsyn.OptionError, match="form='gradient' needs an importance"):
        memsyn.protect(optimizer, model, memory, form="gradient")
    with pytest.raises(memsyn.OptionError, match="directions alone, which have no penalty"):
        memsyn.penalty(model, memory)
    with pytest.raises(memsyn.OptionError, match="takes a number as strength"):
        memsyn.protect(optimizer, model, memory, strength=memsyn.Relative(1.0))
    for every in (0, 1.5, True):
        with pytest.raises(memsyn.OptionError, match="every must be a whole number"):
            memsyn.protect(optimizer, model, memory, every=every)  # type: ignore[arg-type]
    with pytest.raises(memsyn.ProtectionError, match="holds none of the memory's 6 parameters"):
        memsyn.protect(SGD(a_network().parameters(), lr=0.1), model, memory)
    other = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(memsyn.MismatchError, match="another architecture"):
        memsyn.protect(SGD(other.parameters(), lr=0.1), other, memory)
    handle = memsyn.protect(optimizer, model, memory)
    with pytest.raises(memsyn.ProtectionError, match="protected already"):
        memsyn.protect(optimizer, model, memory)
    handle.remove()


def test_a_memory_of_both_is_projected_by_default_and_can_be_pulled() -> None:
    model = a_network()
    importance = memsyn.measure(model, [torch.randn(3, 4).double()], progress=False)
    memory = a_memory(model).consolidate(model, importance)
    for form, asked in (("projected", "auto"), ("gradient", "gradient"), ("proximal", "proximal")):
        optimizer = SGD(model.parameters(), lr=0.1)
        assert memsyn.protect(optimizer, model, memory, form=asked).form == form
    assert memsyn.protect(LBFGS(model.parameters()), model, memory).form == "gradient"


def test_all_processes_project_alike() -> None:
    """The projection uses no random number and no order of threads: the same steps give the same bits."""
    found = []
    for _ in range(2):
        model = a_network()
        optimizer = Adam(model.parameters())
        memsyn.protect(optimizer, model, a_memory(model), every=2)
        train(model, optimizer, batches(5))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)
