"""The forms of protection and the optimizers they meet, against closed forms and the plain loss term."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

import memsyn
from memsyn.protecting import compiled
from memsyn.protecting import penalty as arithmetic
from tests.training import a_task, assert_close, train

Make = Callable[[Any], Optimizer]


def of_one_weight(theta: float, anchor: float, omega: float) -> tuple[nn.Module, memsyn.Memory]:
    """A model of one weight."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, theta)
    ones = torch.ones(1, 1, dtype=torch.float64)
    return model, memsyn.Memory({"weight": anchor * ones}, {"weight": omega * ones})


def closure_of(model: nn.Module, optimizer: Optimizer, data: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), targets)
        loss.backward()
        return loss

    return closure


# The proximal form


def test_a_proximal_step_is_its_closed_form() -> None:
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    assert memsyn.protect(optimizer, model, memory, strength=3.0).form == "proximal"
    for _ in range(4):
        train(model, optimizer, data, targets, 1)
        train(twin, other, data, targets, 1)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                k = 2 * 0.1 * 3.0 * memory.importance[name]
                parameter.copy_((parameter + k * memory.anchor[name]) / (1 + k))
        assert_close(model, twin)


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.02, momentum=0.9),
    "nesterov": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "tensor learning rate": lambda p: SGD(p, lr=torch.tensor(0.05)),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.0),
}


@pytest.mark.parametrize("form", ["gradient", "proximal"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_forms_come_to_rest_at_the_minimum_of_the_penalised_loss(form: str, name: str) -> None:
    """L = (theta - 3)^2 / 2 and lambda Omega = 2: the minimum is at (3 + 4 * 1) / 5."""
    model, memory = of_one_weight(1.0, 1.0, 4.0)
    optimizer = OPTIMIZERS[name](model.parameters())
    memsyn.protect(optimizer, model, memory, strength=0.5, form=form)
    for _ in range(3000):
        optimizer.zero_grad()
        ((model.weight - 3) ** 2 / 2).sum().backward()
        optimizer.step()
    assert float(model.weight.detach()) == pytest.approx(1.4, abs=1e-3)


def test_a_weight_at_its_anchor_or_of_no_importance_is_not_moved_by_a_bit() -> None:
    model = nn.Linear(3, 1, bias=False)
    anchor = torch.tensor([[0.1, 0.2, 0.7]])
    memory = memsyn.Memory({"weight": anchor}, {"weight": torch.tensor([[0.3, 0.0, 3e38]])})
    optimizer = SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=1e6)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 0.9, 0.3]]))
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.equal(model.weight.detach(), torch.tensor([[0.1, 0.9, 0.7]]))


def test_a_proximal_step_of_adam_is_measured_by_its_preconditioner() -> None:
    for amsgrad in (False, True):
        model, memory, data, targets = a_task()
        twin = copy.deepcopy(model)
        optimizer = Adam(model.parameters(), lr=0.01, amsgrad=amsgrad)
        other = Adam(twin.parameters(), lr=0.01, amsgrad=amsgrad)
        memsyn.protect(optimizer, model, memory, strength=3.0, form="proximal")
        for step in range(1, 5):
            train(model, optimizer, data * step, targets, 1)
            train(twin, other, data * step, targets, 1)
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    squares = other.state[parameter]["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
                    k = 2 * 0.01 * 3.0 * memory.importance[name] / ((squares / (1 - 0.999**step)).sqrt() + 1e-8)
                    parameter.copy_((parameter + k * memory.anchor[name]) / (1 + k))
            assert_close(model, twin)


# Strengths that are too large


class Plain(Optimizer):
    """An optimizer of somebody else."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter -= group["lr"] * parameter.grad


DEFAULTS: dict[str, Make] = {
    **{name: OPTIMIZERS[name] for name in ("momentum", "nesterov", "adam", "adamw")},
    "rmsprop": lambda p: RMSprop(p, lr=0.01),
    "adagrad": lambda p: Adagrad(p, lr=0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "lbfgs": lambda p: LBFGS(p, max_iter=10),
    "lbfgs with a line search": lambda p: LBFGS(p, max_iter=10, line_search_fn="strong_wolfe"),
    "somebody else's": Plain,
}


STEP_BY_THE_GRADIENT = {"radam", "asgd", "somebody else's"}
"""Their steps, or their first steps, grow with the gradient. Their step is not known, so the gradient form is taken."""


@pytest.mark.parametrize("name", DEFAULTS)
def test_no_strength_diverges_in_silence_by_default(name: str) -> None:
    refused, said = [], ""
    for strength in (0.0, *(10.0**exponent for exponent in range(-3, 7))):
        model, memory, data, targets = a_task(torch.float32)
        optimizer = DEFAULTS[name](model.parameters())
        memsyn.protect(optimizer, model, memory, strength=strength)

        closure = closure_of(model, optimizer, data, targets)
        before = float(closure().detach())
        try:
            for _ in range(60):
                if name == "somebody else's":
                    closure()
                    optimizer.step()
                else:
                    optimizer.step(closure)
        except memsyn.ProtectionError as error:
            said, refused = str(error), [*refused, strength]
            continue
        after = float(closure().detach())
        assert math.isfinite(after)
        assert after < 2 * before, (name, strength)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert refused == [s for s in refused if s >= 1000] if name != "somebody else's" else refused[0] == 100
    assert bool(refused) == (name in STEP_BY_THE_GRADIENT)
    if refused:
        assert re.search(r"strength 1e\+06 makes \w+ diverge: .* gradient descent is stable up to [\d.]+\. Load", said)


LIMITS: dict[str, Make] = {
    "plain": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.8),
    "dampening": lambda p: SGD(p, lr=0.05, momentum=0.8, dampening=0.4),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.8, nesterov=True),
    "weight decay": lambda p: SGD(p, lr=0.05, momentum=0.5, weight_decay=2.0),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_gradient_form_warns_with_the_largest_stable_strength(name: str) -> None:
    def distance(strength: float, steps: int = 400) -> float:
        model, memory = of_one_weight(1.0, 0.0, 3.0)
        optimizer = LIMITS[name](model.parameters())
        memsyn.protect(optimizer, model, memory, strength=strength, form="gradient")
        for _ in range(steps):
            model.weight.grad = torch.zeros_like(model.weight)
            optimizer.step()
        return abs(float(model.weight.detach()))

    with pytest.warns(memsyn.StrengthWarning, match=r"Use form='proximal'") as caught:
        distance(1e4, 1)
    assert len(caught) == 1
    limit = float(str(caught[0].message).split("beyond ")[1].split()[0])
    assert distance(0.98 * limit) < 1e-2
    with pytest.warns(memsyn.StrengthWarning, match="too large"):
        assert distance(1.02 * limit) > 10


def test_a_schedule_that_makes_the_gradient_form_unstable_is_warned_of() -> None:
    model, memory = of_one_weight(1.0, 0.0, 3.0)
    optimizer = SGD(model.parameters(), lr=0.001)
    memsyn.protect(optimizer, model, memory, strength=10.0, form="gradient")
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.warns(memsyn.StrengthWarning, match=r"beyond 3.33 the pull overshoots"):
        optimizer.step()


def test_a_strength_that_is_loaded_is_looked_at_again() -> None:
    model, memory = of_one_weight(1.0, 0.0, 3.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, strength=0.1, form="gradient")
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    handle.load_state_dict({**handle.state_dict(), "strength": 10.0})
    with pytest.warns(memsyn.StrengthWarning, match=r"strength 10 .* beyond 3.33 the pull overshoots"):
        optimizer.step()


# Optimizers as people set them up


PLAIN: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, foreach=False),
    "adam": lambda p: Adam(p, lr=0.01, foreach=False),
    "adamw": lambda p: AdamW(p, lr=0.01, foreach=False),
}
VARIANTS: dict[str, Make] = {
    "sgd, foreach": lambda p: SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd, fused": lambda p: SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam, foreach": lambda p: Adam(p, lr=0.01, foreach=True),
    "adam, fused": lambda p: Adam(p, lr=0.01, fused=True),
    "adamw, fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "adam, tensor learning rate": lambda p: Adam(p, lr=torch.tensor(0.01)),
}


@pytest.mark.parametrize("form", ["gradient", "proximal"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_variants_of_an_optimizer_are_protected_alike(name: str, form: str) -> None:
    plain = PLAIN[name.split(",")[0]]
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    optimizer, other = VARIANTS[name](model.parameters()), plain(twin.parameters())
    memsyn.protect(optimizer, model, memory, strength=0.3, form=form)
    memsyn.protect(other, twin, memory, strength=0.3, form=form)
    train(model, optimizer, data, targets, 5)
    train(twin, other, data, targets, 5)
    assert_close(model, twin, rtol=1e-5 if "tensor" in name else 1e-9)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_groups_with_their_own_rates_and_a_schedule(form: str) -> None:
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)

    def groups(m: nn.Module) -> Optimizer:
        return SGD([{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": 0.01}], lr=0.1)

    optimizer, other = groups(model), groups(twin)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (optimizer, other)]
    memsyn.protect(optimizer, model, memory, strength=0.5, form=form)
    for _ in range(6):
        train(model, optimizer, data, targets, 1)
        rates = {0: other.param_groups[0]["lr"], 2: other.param_groups[1]["lr"]}
        other.zero_grad()
        loss = F.cross_entropy(twin(data), targets)
        (loss + 0.5 * memsyn.penalty(twin, memory) if form == "gradient" else loss).backward()
        other.step()
        for name, parameter in twin.named_parameters() if form == "proximal" else ():
            k = 2 * rates[int(name[0])] * 0.5 * memory.importance[name]
            parameter.data.copy_((parameter.data + k * memory.anchor[name]) / (1 + k))
        for schedule in schedules:
            schedule.step()
        assert_close(model, twin)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_two_optimizers_protect_their_own_parameters(form: str) -> None:
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    pair = SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)
    handles = [memsyn.protect(each, model, memory, strength=1.0, form=form) for each in pair]
    whole = SGD(twin.parameters(), lr=0.1)
    handle = memsyn.protect(whole, twin, memory, strength=1.0, form=form)
    for _ in range(4):
        for each in pair:
            each.zero_grad()
        F.cross_entropy(model(data), targets).backward()
        for each in pair:
            each.step()
        train(twin, whole, data, targets, 1)
    assert_close(model, twin)
    assert sum(each.value() for each in handles) == pytest.approx(handle.value(), rel=1e-9)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_maximizing(form: str) -> None:
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    optimizer, other = SGD(model.parameters(), lr=0.1, maximize=True), SGD(twin.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=1.0, form=form)
    memsyn.protect(other, twin, memory, strength=1.0, form=form)
    for _ in range(3):
        optimizer.zero_grad()
        (-F.cross_entropy(model(data), targets)).backward()
        optimizer.step()
        train(twin, other, data, targets, 1)
    assert_close(model, twin)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_clipping_is_of_the_new_gradient_alone(form: str) -> None:
    model, memory, data, targets = a_task()
    optimizer = SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=0.5, form=form)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(data), targets).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    clipped = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        k = 2 * 0.1 * 0.5 * memory.importance[name]
        new = before[name] - 0.1 * clipped[name]
        if form == "gradient":
            expected = new - k * (before[name] - memory.anchor[name])
        else:
            expected = (new + k * memory.anchor[name]) / (1 + k)
        assert torch.allclose(parameter, expected, rtol=1e-9)


def test_lbfgs_without_a_line_search() -> None:
    model, memory, data, targets = a_task()
    twin = copy.deepcopy(model)
    optimizer, other = LBFGS(model.parameters(), lr=0.5, max_iter=5), LBFGS(twin.parameters(), lr=0.5, max_iter=5)
    assert memsyn.protect(optimizer, model, memory, strength=0.3).form == "gradient"

    def loss(m: nn.Module, o: Optimizer, strength: float) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            o.zero_grad()
            total = F.cross_entropy(m(data), targets) + strength * memsyn.penalty(m, memory)
            total.backward()
            return total

        return closure

    for _ in range(3):
        optimizer.step(loss(model, optimizer, 0.0))
        other.step(loss(twin, other, 0.3))
    assert_close(model, twin, rtol=1e-7)


# Mixed precision


@pytest.mark.parametrize("form", ["gradient", "proximal"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_changes_nothing_and_a_skipped_step_moves_nothing(form: str, fused: bool) -> None:
    model, memory, data, targets = a_task(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, other = SGD(model.parameters(), lr=0.1, fused=fused), SGD(twin.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=0.5, form=form)
    memsyn.protect(other, twin, memory, strength=0.5, form=form)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(data), targets)).backward()
        if step == 3:
            before = [p.detach().clone() for p in model.parameters()]
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        else:
            train(twin, other, data, targets, 1)
            assert_close(model, twin, rtol=1e-4)


def test_autocast_in_bfloat16_equals_the_loss_term() -> None:
    model, memory, data, targets = a_task(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, other = AdamW(model.parameters(), lr=0.01), AdamW(twin.parameters(), lr=0.01)
    memsyn.protect(optimizer, model, memory, strength=0.5, form="gradient")
    for _ in range(5):
        for m, o, strength in ((model, optimizer, 0.0), (twin, other, 0.5)):
            o.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(m(data), targets)
            (loss + strength * memsyn.penalty(m, memory)).backward()
            o.step()
    assert_close(model, twin, rtol=1e-4)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_the_anchor_of_a_model_in_bfloat16_is_not_rounded(form: str) -> None:
    """1 is the nearest bfloat16 to both, and a pull to the true anchor moves it."""
    model = nn.Linear(2, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    anchor = torch.tensor([[1.003, 0.998]])
    memory = memsyn.Memory({"weight": anchor}, {"weight": torch.full((1, 2), 50.0)})
    optimizer = SGD(model.parameters(), lr=0.01)
    handle = memsyn.protect(optimizer, model, memory, strength=1.0, form=form)
    model.weight.grad = torch.zeros_like(model.weight)
    assert handle.value() == pytest.approx(50 * (0.003**2 + 0.002**2), rel=1e-4)
    for _ in range(8):
        model.weight.grad.zero_()
        optimizer.step()
        if form == "gradient":
            break
    if form == "gradient":
        expected = (2 * 50 * (1 - anchor)).bfloat16()
        assert torch.equal(model.weight.grad, expected)
    else:
        assert float((model.weight.detach().float() - anchor).abs().max()) <= 2**-8


def test_importance_in_bfloat16_is_off_by_its_rounding_at_most() -> None:
    model, memory, data, targets = a_task(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, other = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, strength=5.0, importance_dtype=torch.bfloat16)
    memsyn.protect(other, twin, memory, strength=5.0)
    train(model, optimizer, data, targets, 20)
    train(twin, other, data, targets, 20)
    assert handle.state_dict()["importance"]["0.weight"].dtype == torch.bfloat16
    moved = torch.cat([(p.detach() - memory.anchor[n]).flatten() for n, p in model.named_parameters()])
    expected = torch.cat([(p.detach() - memory.anchor[n]).flatten() for n, p in twin.named_parameters()])
    assert 0 < float((moved - expected).norm() / expected.norm()) < 2**-8


# Large parameters


@pytest.mark.parametrize("form", ["gradient", "proximal"])
@pytest.mark.parametrize("make", [OPTIMIZERS["momentum"], OPTIMIZERS["adam"]])
@pytest.mark.parametrize("channels_last", [False, True])
def test_buckets_change_nothing(form: str, make: Make, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 7)).to(memory_format=layout)
    data, targets = torch.randn(8, 3, 4, 4), torch.randint(7, (8,))
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [data], progress=False))
    found = []
    for bucket in (arithmetic.BUCKET, 16):
        monkeypatch.setattr(arithmetic, "BUCKET", bucket)
        own = copy.deepcopy(model)
        optimizer = make(own.parameters())
        handle = memsyn.protect(optimizer, own, memory, strength=2.0, form=form)
        train(own, optimizer, data, targets, 4)
        found.append((own, handle.value(), handle.report()))
    assert_close(found[0][0], found[1][0], rtol=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    assert found[0][2].bound == pytest.approx(found[1][2].bound, rel=1e-4)
    assert found[0][2].held == found[1][2].held


@pytest.mark.parametrize("form", ["gradient", "proximal"])
@pytest.mark.parametrize("make", [OPTIMIZERS["momentum"], OPTIMIZERS["adam"]])
@pytest.mark.parametrize("smallest", [compiled.SMALLEST, math.inf])
def test_nothing_of_a_parameters_size_is_made_in_a_step(
    form: str, make: Make, smallest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "SMALLEST", smallest)
    model = nn.Linear(1500, 1500)
    parameters = dict(model.named_parameters())
    memory = memsyn.Memory(
        {name: p.detach() + 0.01 for name, p in parameters.items()},
        {n: torch.rand_like(p) for n, p in parameters.items()},
    )
    optimizer = make(model.parameters())
    handle = memsyn.protect(optimizer, model, memory, strength=0.01, form=form, device="cpu")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the optimizer's own state
    with torch.profiler.profile(profile_memory=True) as profile:
        handle._before_step(optimizer, (optimizer,), {})
        handle._after_step(optimizer, (optimizer,), {})
    largest = max((event.self_cpu_memory_usage for event in profile.events()), default=0)
    assert largest > 0 or smallest < math.inf
    assert largest <= 4 * arithmetic.BUCKET < 4 * model.weight.numel()


@pytest.mark.parametrize("make", [OPTIMIZERS["momentum"], OPTIMIZERS["adam"]])
def test_a_learning_rate_of_zero_moves_nothing(make: Make) -> None:
    """As a schedule's warm-up begins; with Adam also where no gradient was seen yet."""
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    memory = memsyn.Memory(
        {name: p.detach() + 1 for name, p in model.named_parameters()},
        {n: torch.ones_like(p) for n, p in model.named_parameters()},
    )
    optimizer = make(model.parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    handle = memsyn.protect(optimizer, model, memory, strength=1.0, form="proximal")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert handle.report().held == 0.0


def a_hand_made_task(size: int = 3) -> tuple[nn.Module, memsyn.Memory]:
    model = nn.Linear(size, 2)
    return model, memsyn.Memory(
        {name: p.detach() + 1 for name, p in model.named_parameters()},
        {n: torch.ones_like(p) for n, p in model.named_parameters()},
    )


@pytest.mark.parametrize("compiled_too", [False, True])
def test_a_fused_adam_whose_first_step_is_skipped(compiled_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SMALLEST", 0 if compiled_too else math.inf)
    model, memory = a_hand_made_task()
    before = copy.deepcopy(model.state_dict())
    optimizer = Adam(model.parameters(), lr=0.1, fused=True)
    handle = memsyn.protect(optimizer, model, memory, strength=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model.weight.sum() * float("inf") + model.bias.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert handle.report().held == 0.0
    optimizer.zero_grad()
    scaler.scale(model.weight.sum()).backward()
    scaler.step(optimizer)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not torch.equal(model.weight, before["weight"])


def test_a_head_without_steps_does_not_change_what_is_said_of_the_others() -> None:
    body, head = nn.Linear(3, 3), nn.Linear(3, 2)
    model = nn.ModuleList([body, head])
    memory = memsyn.Memory(
        {name: p.detach() + 0.1 for name, p in model.named_parameters()},
        {n: torch.full_like(p, 1e6) for n, p in model.named_parameters()},
    )
    optimizer = Adam(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, strength=1.0)
    body(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert handle.report().held == pytest.approx(12 / 20)


def test_a_parameter_that_is_widened_at_its_place_is_an_error() -> None:
    model, memory = a_hand_made_task()
    buffer = torch.zeros(12)
    model.weight.data = buffer[:6].view(2, 3)
    optimizer = SGD(model.parameters(), lr=0.1)
    memsyn.protect(optimizer, model, memory, strength=1.0)
    model.weight.data = buffer.view(2, 6)
    model.weight.grad = torch.zeros(2, 6)
    with pytest.raises(memsyn.MismatchError, match="weight"):
        optimizer.step()


def test_an_anchor_that_is_the_weight_itself_stays_where_it_is() -> None:
    model = nn.Linear(3, 2, bias=False)
    memory = memsyn.Memory({"weight": model.weight.detach()}, {"weight": torch.ones(2, 3)})
    handle = memsyn.protect(SGD(model.parameters(), lr=0.1), model, memory, strength=1.0)
    with torch.no_grad():
        model.weight.add_(1.0)
    assert handle.value() == pytest.approx(6.0)


def test_the_warning_comes_again_when_what_is_protected_or_how_strongly_changes() -> None:
    model, memory = a_hand_made_task()
    optimizer = SGD(model.parameters(), lr=0.01)
    handle = memsyn.protect(optimizer, model, memory, strength=1.0, form="gradient")

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    step()
    handle.strength = 1000.0
    with pytest.warns(memsyn.StrengthWarning, match="beyond 100 the pull overshoots"):
        step()
    for lr in (0.02, 0.03):  # a warm-up: said already
        optimizer.param_groups[0]["lr"] = lr
        step()


class Rateless(Optimizer):
    """An optimizer whose groups have no learning rate."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(0.1 * parameter.grad)


def test_options_that_do_not_fit() -> None:
    model, memory = a_hand_made_task()
    rateless = Rateless(model.parameters())
    with pytest.raises(memsyn.OptionError, match=r"known of SGD, .* Rateless has a step of its own. Use form='g"):
        memsyn.protect(rateless, model, memory, form="proximal")
    assert memsyn.protect(rateless, model, memory).form == "gradient"
    with pytest.raises(memsyn.OptionError, match="form must be one of auto"):
        memsyn.protect(SGD(model.parameters(), lr=0.1), model, memory, form=["gradient"])  # type: ignore[arg-type]
    with pytest.raises(memsyn.OptionError, match=r"importance_dtype must be one of .*; got torch.float16"):
        memsyn.protect(SGD(model.parameters(), lr=0.1), model, memory, importance_dtype=torch.float16)
    lbfgs = LBFGS(model.parameters())
    handle = memsyn.protect(lbfgs, model, memory)
    with pytest.raises(memsyn.OptionError, match="LBFGS must see the penalty"):
        handle.load_state_dict({**handle.state_dict(), "form": "proximal"})
