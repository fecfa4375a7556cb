"""The clone that is measured: functions that refer to the model refer to the clone, and what cannot be cloned."""

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

import memsyn
from memsyn.measuring.model_copy import model_copy
from tests import reference
from tests.cases import Lambda, normal
from tests.reference import errors

BATCH = normal(4)(5, torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def by_lambda(model: nn.Module) -> None:
    old = model.forward
    model.forward = lambda *args, **kwargs: 2 * old(*args, **kwargs)


def by_decorator(model: nn.Module) -> None:
    def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Tensor:
            return 2 * function(*args, **kwargs)

        return run

    model.forward = doubled(model.forward)


def by_two_decorators(model: nn.Module) -> None:
    by_lambda(model)
    inner = model.forward
    model.forward = lambda x: inner(x).mul(1.0)


def by_default(model: nn.Module) -> None:
    model.forward = lambda x, old=model.forward: 2 * old(x)


def by_keyword(model: nn.Module) -> None:
    def run(x: Tensor, *, old: Any = model.forward) -> Tensor:
        return 2 * old(x)

    model.forward = run


def by_method(model: nn.Module) -> None:
    old = model.forward
    model.forward = types.MethodType(lambda self, x: 2 * old(x), model)


def by_partial(model: nn.Module) -> None:
    def run(module: nn.Module, factor: float, x: Tensor) -> Tensor:
        return factor * type(module).forward(module, x)

    model.forward = functools.partial(run, model, 2)


def by_partial_of_a_closure(model: nn.Module) -> None:
    old = model.forward
    model.forward = functools.partial(lambda factor, x, keep: factor * old(x), 2, keep=model)


class Doubled:
    """As Accelerate keeps a `forward` in an object, which cannot be pickled."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.itself = self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * self.function(*args, **kwargs)

    def run(self, x: Tensor) -> Tensor:
        return self(x)

    def __getstate__(self) -> Any:
        raise TypeError("not to be pickled")


def by_object_in_a_closure(model: nn.Module) -> None:
    doubled = Doubled(model.forward)
    model.forward = lambda x: doubled(x)


def by_method_of_an_object_in_a_closure(model: nn.Module) -> None:
    run = Doubled(model.forward).run
    model.forward = lambda x: run(x)


def by_object(model: nn.Module) -> None:
    class Copied(Doubled):
        def __getstate__(self) -> Any:
            return vars(self)

    old = model.forward
    model.forward = Copied(lambda x: old(x))


def by_autocast(model: nn.Module) -> None:
    by_lambda(model)
    model.forward = torch.autocast("cpu", enabled=False)(model.forward)


def by_mixed_precision(model: nn.Module) -> None:
    """As Accelerate does with a `forward` that another library has patched before."""
    by_method(model)
    wrapped = torch.autocast("cpu", enabled=False)(model.forward.__func__)
    model.forward = types.MethodType(convert_outputs_to_fp32(wrapped), model)


def by_layer(model: nn.Module) -> None:
    head = model[2]
    head.forward = lambda x: 2 * F.linear(x, head.weight, head.bias)


def by_weight(model: nn.Module) -> None:
    weight, bias = model[2].weight, model[2].bias
    model[2].forward = lambda x: 2 * F.linear(x, weight, bias)


def by_hook(model: nn.Module) -> None:
    head = model[2]
    model.register_forward_hook(lambda module, args, output: output + head(module[1](module[0](args[0]))))


PATCHES = [value for name, value in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
def test_a_patched_model_is_measured_as_it_runs(patch: Callable[[nn.Module], None]) -> None:
    model = network()
    patch(model)
    assert torch.allclose(model(BATCH), 2 * network()(BATCH), rtol=1e-12)
    patched = vars(model).get("forward")
    found = memsyn.measure(model, [BATCH], progress=False).mean()
    expected = reference.importance(network(), BATCH, 5, lambda m, x, k: 2 * m(x[k : k + 1]))
    assert max(errors(found, expected).values()) <= 1e-9
    assert vars(model).get("forward") is patched


def test_a_function_that_refers_to_a_layer_refers_to_the_clones() -> None:
    layer = nn.Linear(4, 3).double()
    model = Lambda(lambda m, x: layer(x), a=layer)
    found = memsyn.measure(model, [BATCH], progress=False).sums
    expected = memsyn.measure(layer, [BATCH], progress=False).sums
    assert torch.equal(found["a.weight"], expected["weight"])


def test_variables_that_a_function_writes_to_stay_shared() -> None:
    model, calls = network(), 0
    old = model.forward

    def count(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return old(x)

    model.forward = count
    clone = model_copy(model)
    assert clone.forward.__closure__[0] is count.__closure__[0]
    clone(BATCH)
    assert calls == 1


def test_a_function_that_refers_to_itself_or_to_nothing_yet_stays_what_it_is() -> None:
    def later() -> Tensor:
        return missing

    def again(x: Tensor, depth: int = 0) -> Tensor:
        return x if depth else again(x, 1)

    model = network()
    model.again, model.later = again, later
    clone = model_copy(model)
    assert clone.again is again
    assert clone.later is later
    missing = BATCH
    assert clone.later() is missing


class Saved(nn.Module):
    """As Keras 3 does on torch: a copy is a new model, with parameters under other names."""

    def __init__(self, prefix: str = "sequential/") -> None:
        super().__init__()
        self.weights = nn.ParameterDict({f"{prefix}kernel": torch.ones(4, 3)})

    def __reduce__(self) -> Any:
        return Saved, ("",)

    def forward(self, x: Tensor) -> Tensor:
        return x @ next(iter(self.weights.values()))


def test_a_model_that_copies_itself_as_another_is_an_error() -> None:
    with pytest.raises(
        memsyn.ModelError, match=r"deepcopy of Saved gives .* lacks weights.sequential/kernel\. Keras .*__deepcopy__"
    ):
        memsyn.measure(Saved(), [BATCH.float()], progress=False)
