"""A relative strength means the same on every scale; a plain number is the paper's."""

import importlib
import inspect
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import memsyn


def memory_of(model: nn.Module, data: Tensor, scale: float = 1.0, rules: Sequence[str] = ("sum",)) -> memsyn.Memory:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return scale * model(batch)

    importance = memsyn.measure(model, [data], forward=forward, progress=False)
    memory = memsyn.Memory.empty()
    for rule in rules:
        memory = memory.consolidate(model, importance, rule=rule)
    return memory


def start() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(16, 4, dtype=torch.float64)


def test_the_default_is_the_same_wherever_it_is_written() -> None:
    """In protect, in Relative and in the callbacks; of a memory of directions, c."""
    model, data = start()
    memory = memory_of(model, data)
    assert memsyn.Relative() == memsyn.Relative(0.01)
    handle = memsyn.protect(torch.optim.SGD(model.parameters(), lr=0.1), model, memory)
    assert handle.strength == pytest.approx(memsyn.Relative(0.01).of(memory), rel=1e-12)
    factors = memsyn.measure(model, [data], estimator="kronecker", progress=False)
    memory = memsyn.Memory.empty().consolidate(model, factors)
    assert memsyn.protect(torch.optim.SGD(model.parameters(), lr=0.1), model, memory).strength == 10.0
    for trainer in ("lightning", "transformers"):
        callback = importlib.import_module(f"memsyn.integrations.{trainer}").MemsynCallback
        assert inspect.signature(callback).parameters["strength"].default is None  # protect's


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_the_papers_own_variant_in_one_line(make: type[torch.optim.Optimizer]) -> None:
    """strength=1.0, form="gradient" trains L + sum Omega (theta - theta*)^2, up to rounding; "auto" comes near."""
    ends = {}
    for form in ("paper", "gradient", "auto"):
        model, data = start()
        memory, optimizer = memory_of(model, data), make(model.parameters(), lr=0.01)
        if form != "paper":
            memsyn.protect(optimizer, model, memory, strength=1.0, form=form)
        for _ in range(50):
            optimizer.zero_grad()
            loss = (model(data) - 1).square().mean()
            (loss + memsyn.penalty(model, memory) if form == "paper" else loss).backward()
            optimizer.step()
        ends[form] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    way = ends["paper"] - torch.cat([parameter.detach().flatten() for parameter in start()[0].parameters()])
    off = {form: float((end - ends["paper"]).norm() / way.norm()) for form, end in ends.items()}
    assert off["gradient"] < 1e-9
    assert 1e-4 < off["auto"] < 0.5


def test_it_is_in_units_of_the_mean_of_what_has_importance() -> None:
    memory = memsyn.Memory(
        {"a": torch.zeros(2, 2), "b": torch.zeros(2)},
        {"a": torch.tensor([[0.0, 1.0], [2.0, 0.0]]), "b": torch.tensor([3.0, 6.0], dtype=torch.float64)},
    )
    assert memsyn.Relative(0.3).of(memory) == pytest.approx(0.3 / 3)
    assert memsyn.Relative(0.0).of(memory) == 0.0
    nothing = memsyn.Memory({"a": torch.zeros(2)}, {"a": torch.zeros(2)})
    with pytest.warns(memsyn.StrengthWarning, match="no weight of the memory has any importance"):
        assert memsyn.Relative(0.3).of(nothing) == 0.0
    infinite = memsyn.Memory({"a": torch.zeros(2)}, {"a": torch.tensor([1.0, float("inf")])})
    with pytest.raises(memsyn.MismatchError, match="the importance of a is not finite"):
        memsyn.Relative(0.3).of(infinite)


@pytest.mark.parametrize(
    "other",
    [
        lambda model, data: memory_of(model, data, scale=1000.0),
        lambda model, data: memory_of(model, data, scale=1e-3),
        lambda model, data: memory_of(model, data.repeat(7, 1)),
    ],
    ids=["large outputs", "small outputs", "more samples"],
)
@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_training_does_not_depend_on_the_scale_of_the_importance(
    other: Callable[[nn.Module, Tensor], memsyn.Memory], form: str
) -> None:
    def trained(make: Callable[[nn.Module, Tensor], memsyn.Memory]) -> dict[str, Tensor]:
        model, data = start()
        memory = make(model, data)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        memsyn.protect(optimizer, model, memory, strength=memsyn.Relative(0.5), form=form)
        for _ in range(10):
            optimizer.zero_grad()
            model(data + 1).square().mean().backward()
            optimizer.step()
        return model.state_dict()

    found, expected = trained(other), trained(memory_of)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(expected, start()[0].state_dict(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("rules", "num_tasks"),
    [
        (["sum"] * 5, 5),
        (["mean"] * 3, 1),
        (["max"] * 3, 1),
        (["ema"] * 3, 1),
        (["max", "sum", "sum", "max"], 3),
        (["sum", "sum", "mean"], 5 / 3),
        (["sum", "sum", "ema"], 3 / 2),
    ],
)
def test_one_more_task_leaves_the_pull_of_the_others_as_it_was(rules: list[str], num_tasks: float) -> None:
    model, data = start()
    one, memory = memory_of(model, data), memory_of(model, data, rules=rules)
    strength = memsyn.Relative(0.5)
    assert strength.of(memory) == pytest.approx(strength.of(one), rel=1e-6)
    weight = memory.importance["0.weight"] / one.importance["0.weight"]
    torch.testing.assert_close(weight, torch.full_like(weight, num_tasks), rtol=1e-6, atol=0)


def test_it_is_the_default_and_a_number_is_the_papers_lambda() -> None:
    model, data = start()
    memory = memory_of(model, data)

    def strength_of(**options: object) -> float:
        return memsyn.protect(torch.optim.Adam(model.parameters()), model, memory, **options).strength  # type: ignore[arg-type]

    assert strength_of() == memsyn.Relative().of(memory) == strength_of(strength=memsyn.Relative())
    assert strength_of(strength=2) == 2.0


def test_a_strength_beyond_float32() -> None:
    with pytest.raises(memsyn.OptionError, match="strength must be at most"):
        memsyn.Relative(1e39)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_values_that_are_no_strength(value: float) -> None:
    with pytest.raises(memsyn.OptionError, match="strength must be finite and not negative"):
        memsyn.Relative(value)
