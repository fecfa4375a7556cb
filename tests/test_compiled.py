"""The compiled update against the plain one, and when it must stand aside."""

import pytest
import torch
from torch import Tensor, nn

import memsyn
from memsyn.protecting import compiled
from memsyn.protecting import penalty as arithmetic
from tests.levels import level, native_is, needs_library

__all__ = ["level"]

SHAPES = [(7, 5), (), (3,), (0,), (64, 129), (2, 3, 4, 5)]


@pytest.fixture(autouse=True)
def _from_one_weight_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SMALLEST", 0)


def held(dtype: torch.dtype = torch.float32) -> list[arithmetic.ProtectedWeights]:
    torch.manual_seed(0)
    return [arithmetic.ProtectedWeights(torch.randn(s), torch.randn(s), torch.rand(s).to(dtype)) for s in SHAPES]


def updated(form: str, items: list[arithmetic.ProtectedWeights]) -> list[Tensor]:
    factors = [0.1 * (index - 1) if form == "gradient" else 0.1 * index for index in range(len(items))]
    if form == "proximal":
        arithmetic.pull_(items, factors, None)
        return [item.parameter for item in items]
    if form == "preconditioned":
        squares = [(item.omega.to(item.parameter) * 1e-3).contiguous() for item in items]
        arithmetic.pull_(items, [abs(f) for f in factors], [arithmetic.Preconditioner(v, 1.5, 0.1) for v in squares])
        return [item.parameter for item in items]
    gradients = [torch.full_like(item.parameter, 0.5) for item in items]
    arithmetic.add_gradients_(gradients, items, factors)
    return gradients


def plainly(form: str, items: list[arithmetic.ProtectedWeights], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as patched:
        patched.setattr(compiled, "SMALLEST", float("inf"))
        return updated(form, items)


@needs_library
@pytest.mark.parametrize("form", ["gradient", "proximal", "preconditioned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_the_plain_update_computes(
    level: str, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    library = compiled.native_library()
    assert library is not None
    monkeypatch.setattr(compiled, "native_library", lambda: calls.append(form) or library)
    for found, expected in zip(updated(form, held(dtype)), plainly(form, held(dtype), monkeypatch), strict=True):
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=6e-7)
    assert calls == [form]


@needs_library
def test_a_weight_at_its_anchor_or_without_importance_does_not_move_by_a_bit(level: str) -> None:
    weight = torch.randn(1000)
    anchor = torch.where(torch.arange(1000) < 500, weight, torch.randn(1000))
    omega = torch.where(torch.arange(1000) < 500, torch.rand(1000), 0.0)
    found = weight.clone()
    arithmetic.pull_([arithmetic.ProtectedWeights(found, anchor, omega)], [0.7], None)
    assert torch.equal(found, weight)


@needs_library
@pytest.mark.parametrize("omega", [1e30, 3e38])
def test_overwhelming_importance_pins_to_the_anchor(level: str, omega: float) -> None:
    weight, anchor = torch.randn(100), torch.randn(100)
    arithmetic.pull_([arithmetic.ProtectedWeights(weight, anchor, torch.full((100,), omega))], [1e6], None)
    assert torch.equal(weight, anchor)


@needs_library
@pytest.mark.parametrize("form", ["gradient", "proximal", "preconditioned"])
def test_what_it_cannot_take_is_updated_plainly_beside_it(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> list[arithmetic.ProtectedWeights]:
        first, second, third = held()[0], held()[4], held()[5]
        return [
            first,
            arithmetic.ProtectedWeights(second.parameter.t(), second.anchor.t(), second.omega.t()),
            arithmetic.ProtectedWeights(third.parameter.half(), third.anchor, third.omega),
            arithmetic.ProtectedWeights(first.parameter.double(), first.anchor.double(), first.omega.double()),
        ]

    for found, expected in zip(updated(form, mixed()), plainly(form, mixed(), monkeypatch), strict=True):
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=6e-7)


@needs_library
def test_autograd_sees_that_a_weight_was_changed() -> None:
    weight = torch.randn(5, 5, requires_grad=True)
    loss = weight.square().sum()
    arithmetic.pull_([arithmetic.ProtectedWeights(weight.detach(), torch.zeros(5, 5), torch.ones(5, 5))], [1.0], None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("form", ["gradient", "proximal", "preconditioned"])
def test_without_the_library_the_plain_update_is_used(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with native_is("off"):
        found = updated(form, held())
    for own, expected in zip(found, plainly(form, held(), monkeypatch), strict=True):
        assert torch.equal(own, expected)


@needs_library
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_under_it_is_training_under_the_plain_update(optimizer: type[torch.optim.Optimizer]) -> None:
    def trained() -> nn.Module:
        torch.manual_seed(0)
        model, data = nn.Linear(20, 10), torch.randn(8, 20)
        memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [data], progress=False))
        own = optimizer(model.parameters(), lr=0.01)
        memsyn.protect(own, model, memory, strength=2.0)
        for _ in range(10):
            own.zero_grad()
            model(data).exp().mean().backward()
            own.step()
        return model

    found = trained()
    with native_is("off"):
        torch.testing.assert_close(found.state_dict(), trained().state_dict(), rtol=1e-6, atol=1e-7)
