"""Both contracts, over the table of cases: exact, and without side effects."""

import contextlib
import warnings
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memsyn
from memsyn.batches import model_input, take
from memsyn.engine.routes import BY_RULE, BY_SAMPLE
from memsyn.measuring.objectives import output_tensor
from tests import reference
from tests.cases import CASES, Case, Hidden, Lambda, hidden, normal, parameter
from tests.serving import TwoPaths, assert_same_factors, factors_of

NUM_SAMPLES = 7


def build(case: Case, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return case.model().to(dtype), case.batch(NUM_SAMPLES, dtype)


def truth(case: Case, model: nn.Module, batch: Any, count: int = NUM_SAMPLES) -> dict[str, Tensor]:
    def run(clone: nn.Module, whole: Any, k: int) -> Tensor:
        sample = take(whole, k, k + 1)
        if case.forward is not None:
            return case.forward(clone, sample)
        inputs = model_input(sample)
        return output_tensor(clone(**inputs) if isinstance(inputs, dict) else clone(inputs))

    return reference.importance(model, batch, count, run)


def quietly(case: Case) -> contextlib.AbstractContextManager[Any]:
    slow = BY_SAMPLE in case.routes.values()
    return pytest.warns(memsyn.SlowParametersWarning) if slow else contextlib.nullcontext()


def measured(case: Case, model: nn.Module, batches: Any) -> memsyn.Importance:
    with quietly(case):
        return memsyn.measure(model, batches, forward=case.forward, progress=False)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths", "ignore:enable_nested_tensor")
@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, n) for n in CASES] + [(torch.float32, n) for n in CASES])
def test_measure_equals_the_batch_of_one_reference(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model, batch = build(case, dtype)
    importance = measured(case, model, [batch])
    expected = truth(case, *build(case, torch.float64))
    found = reference.errors(importance.mean(), expected)
    assert importance.num_samples == NUM_SAMPLES
    assert max(found.values()) <= (1e-9 if dtype == torch.float64 else case.float32), found
    routes = {
        name: next((route for pattern, route in case.routes.items() if fnmatchcase(name, pattern)), BY_RULE)
        for name in importance.routes
    }
    assert importance.routes == routes
    assert all(total.dtype == dtype for total in importance.sums.values())


def test_an_embedding_is_measured_without_the_scaling_of_its_updates() -> None:
    indices = torch.tensor([[1, 1, 2], [0, 2, 2]])
    plain, scaled = nn.Embedding(4, 3), nn.Embedding(4, 3, scale_grad_by_freq=True)
    scaled.load_state_dict(plain.state_dict())
    expected, found = (memsyn.measure(model, [indices], progress=False).sums["weight"] for model in (plain, scaled))
    assert torch.equal(expected, found)
    assert scaled.scale_grad_by_freq


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths", "ignore:enable_nested_tensor")
def test_every_case_moves_some_weight() -> None:
    for name, case in CASES.items():
        expected = truth(case, *build(case, torch.float64))
        assert sum(float(value.abs().sum()) for value in expected.values()) > 0, name


def test_closed_form_of_a_linear_map() -> None:
    weight, data = torch.randn(3, 4, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    model = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    model.weight.data.copy_(weight)
    omega = memsyn.measure(model, [data], progress=False).mean()["weight"]
    outputs = data @ weight.T  # d ||W x||^2 / d W = 2 (W x) x^T
    expected = 2 * torch.einsum("ko,ki->oi", outputs.abs(), data.abs()) / len(data)
    assert torch.allclose(omega, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["mlp", "residual network", "transformer, layer norm", "recurrent by hand"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_batch_size_order_and_split_do_not_matter(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model().double()
    batch = case.batch(12, torch.float64)
    whole = memsyn.measure(model, [batch], progress=False)
    order = torch.tensor(data.draw(st.permutations(range(12))))
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(lambda s: 0 < sum(s) <= 12))
    parts = list(batch[order].split([*sizes, 12 - sum(sizes)]))
    split = memsyn.measure(model, parts, progress=False)
    assert max(reference.errors(split.mean(), whole.mean()).values()) <= 1e-9
    cut = data.draw(st.integers(1, len(order) - 1))
    first, second = (memsyn.measure(model, [part], progress=False) for part in batch[order].split([cut, 12 - cut]))
    joined = first + second
    assert joined.num_samples == 12
    assert max(reference.errors(joined.mean(), whole.mean()).values()) <= 1e-9


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_convolutions_of_any_shape(data: st.DataObject) -> None:
    draw, spatial = data.draw, data.draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(spatial))  # noqa: E731
    groups = draw(st.integers(1, 3))
    kernel, dilation = each(1, 3), each(1, 2)
    mode = draw(st.sampled_from(["zeros", "circular", "replicate", "reflect"]))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    torch.manual_seed(draw(st.integers(0, 9)))
    conv = kind(
        groups * draw(st.integers(1, 4)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=each(1, 3),
        padding=each(0, 2),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    ).double()
    size = tuple(d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, each(2, 4), strict=True))
    batch = torch.randn(3, conv.in_channels, *size, dtype=torch.float64)
    importance = memsyn.measure(conv, [batch], progress=False)
    expected = reference.importance(conv, batch, 3, lambda m, x, k: m(x[k : k + 1]))
    assert max(reference.errors(importance.mean(), expected).values()) <= 1e-9
    assert set(importance.routes.values()) == {BY_RULE}


@settings(max_examples=30, deadline=None)
@given(tokens=st.lists(st.integers(0, 4), max_size=2), width=st.integers(1, 5), out=st.integers(1, 5))
def test_linears_of_any_shape(tokens: list[int], width: int, out: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 3), nn.Tanh(), nn.Linear(3, out)).double()
    batch = torch.randn(4, *tokens, width, dtype=torch.float64)
    importance = memsyn.measure(model, [batch], progress=False)
    expected = reference.importance(model, batch, 4, lambda m, x, k: m(x[k : k + 1]))
    assert max(reference.errors(importance.mean(), expected).values()) <= 1e-9


class Snapshot:
    """Everything of a model and of the generators that measuring must leave as it is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = self.take()

    def take(self) -> dict[str, Any]:
        state: dict[str, Any] = {"rng": torch.get_rng_state().clone()}
        for name, module in self.model.named_modules():
            state[f"{name} training"] = module.training
            state[f"{name} hooks"] = [len(v) for k, v in vars(module).items() if "hooks" in k and v is not None]
            state[f"{name} attributes"] = sorted(vars(module))
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            state[name] = tensor.detach().clone()
            state[f"{name} place"] = (tensor.data_ptr(), tensor.requires_grad, tensor._version)
            state[f"{name} grad"] = None if tensor.grad is None else (tensor.grad.data_ptr(), tensor.grad.clone())
        return state

    def assert_unchanged(self) -> None:
        now = self.take()
        assert now.keys() == self.state.keys()
        for key, before in self.state.items():
            same = torch.equal(now[key], before) if isinstance(before, Tensor) else str(now[key]) == str(before)
            assert same, key


def trained_a_little(model: nn.Module) -> nn.Module:
    """In train mode, with gradients, moving statistics and a hook: all that could be disturbed."""
    model.train()
    model.get_submodule("bn1").eval()
    model(torch.randn(8, 3, 8, 8)).sum().backward()
    model.get_submodule("head").register_forward_hook(lambda *args: None)
    return model


def test_the_model_is_bit_for_bit_unchanged() -> None:
    model = trained_a_little(CASES["residual network"].model())
    snapshot = Snapshot(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(10, 3, 8, 8)), 4, shuffle=True)
    snapshot.state["rng"] = torch.get_rng_state().clone()
    memsyn.measure(model, loader, progress=False)
    snapshot.assert_unchanged()


def test_the_model_is_unchanged_after_an_exception_in_the_loader() -> None:
    model = trained_a_little(CASES["residual network"].model())
    snapshot = Snapshot(model)

    def batches() -> Any:
        yield torch.randn(4, 3, 8, 8)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        memsyn.measure(model, batches(), progress=False)
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    "name", ["embedding with max_norm", "forward=", "tied embedding and head", "older weight norm"]
)
def test_models_with_slow_or_odd_parts_are_unchanged(name: str) -> None:
    case = CASES[name]
    model, batch = build(case, torch.float32)
    snapshot = Snapshot(model)
    measured(case, model, [batch])
    snapshot.assert_unchanged()


def test_numpy_and_python_generators_are_untouched() -> None:
    import random

    import numpy as np

    def batches() -> Any:
        random.random()
        np.random.rand()
        yield torch.randn(2, 4)

    before = random.getstate(), np.random.get_state()[1].tolist()
    memsyn.measure(nn.Linear(4, 3), batches(), progress=False)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_mode_does_not_matter(context: Any) -> None:
    model, batch = build(CASES["mlp"], torch.float32)
    expected = memsyn.measure(model, [batch], progress=False)
    with context():
        found = memsyn.measure(model, [batch * 1], progress=False)
    assert all(torch.equal(found.sums[name], total) for name, total in expected.sums.items())


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(4, 3)
    weight = model.weight.clone()
    batch = normal(4)(5, torch.float32)
    omega = memsyn.measure(model, [batch], progress=False).mean()["weight"]
    outputs = batch @ weight.T + model.bias
    assert torch.allclose(omega, 2 * outputs.abs().T @ batch.abs() / 5, rtol=1e-4)


def test_half_precision_weights_are_summed_in_float32() -> None:
    model, batch = build(CASES["mlp"], torch.float32)
    model = model.bfloat16()
    importance = memsyn.measure(model, [batch.bfloat16()], progress=False)
    expected = truth(CASES["mlp"], model.double(), batch.bfloat16().double())
    assert all(total.dtype == torch.float32 for total in importance.sums.values())
    assert max(reference.errors(importance.mean(), expected).values()) < 0.03


def test_batches_of_every_kind_give_the_same() -> None:
    model, batch = build(CASES["mlp"], torch.float64)
    targets = torch.zeros(NUM_SAMPLES)
    expected = memsyn.measure(model, [batch], progress=False)
    dataset = torch.utils.data.TensorDataset(batch, targets)
    named = Lambda(lambda m, x: m.net(x), net=model)

    def same(importance: memsyn.Importance) -> bool:
        pairs = zip(importance.sums.values(), expected.sums.values(), strict=True)
        return importance.num_samples == NUM_SAMPLES and all(torch.allclose(a, b, rtol=1e-12) for a, b in pairs)

    assert same(memsyn.measure(model, torch.utils.data.DataLoader(dataset, 3), progress=False))
    assert same(memsyn.measure(model, [(batch, targets)], progress=False))
    assert same(memsyn.measure(model, [[batch]], progress=False))
    assert same(memsyn.measure(model, iter([(batch, "never looked at")]), progress=False))
    assert same(memsyn.measure(named, [{"x": batch, "labels": targets}], progress=False))
    assert same(memsyn.measure(named, [({"x": batch}, targets)], progress=False))
    assert same(memsyn.measure(named, [UserBatch({"x": batch, "label": targets})], progress=False))
    assert same(memsyn.measure(model, [batch[:3], batch[:0], batch[3:]], progress=False))
    assert same(memsyn.measure(model, [{"a": [batch]}], forward=lambda m, b: m(b["a"][0]), progress=False))
    assert same(memsyn.measure(nn.DataParallel(model), [batch], progress=False))


class UserBatch(__import__("collections").UserDict):  # type: ignore[misc]
    """What Hugging Face's BatchEncoding is: a mapping that is not a dict."""


def test_max_samples_cuts_the_last_batch_and_reads_no_further() -> None:
    model, batch = build(CASES["mlp"], torch.float64)
    read = []

    def batches() -> Any:
        for part in batch.split(2):
            read.append(len(part))
            yield part, None

    found = memsyn.measure(model, batches(), max_samples=3, progress=False)
    expected = memsyn.measure(model, [batch[:3]], progress=False)
    assert (found.num_samples, read) == (3, [2, 2])
    assert max(reference.errors(found.mean(), expected.mean()).values()) <= 1e-12
    for wrong in (0, 2.5, "3"):
        with pytest.raises(memsyn.OptionError, match=f"max_samples must be a whole number, at least 1; got {wrong!r}"):
            memsyn.measure(model, [batch], max_samples=wrong)
    with pytest.raises(memsyn.BatchError, match="max_samples needs batches made of tensors"):
        memsyn.measure(model, [["a"]], max_samples=2, forward=lambda m, b: m(batch), progress=False)


def test_the_clone_shares_storage_and_hooks_of_the_user_keep_working() -> None:
    seen = []
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model[0].register_forward_hook(lambda module, args, output: seen.append(module.weight.data_ptr()))
    model.register_full_backward_hook(lambda *args: seen.append("backward"))
    batch = normal(4)(5, torch.float32)
    found = memsyn.measure(model, [batch], progress=False)
    assert seen[-1] == model[0].weight.data_ptr()
    assert "backward" not in seen
    plain = nn.Sequential(nn.Linear(4, 3))
    plain.load_state_dict(model.state_dict())
    expected = memsyn.measure(plain, [2 * batch], progress=False)
    assert torch.allclose(found.sums["0.weight"], expected.sums["0.weight"], rtol=1e-5)


def test_a_layer_first_met_after_the_check_is_still_exact() -> None:
    def route(m: nn.Module, x: Tensor) -> Tensor:
        return m.a(x) if x.shape[1] == 4 else m.b(x)

    model = Lambda(route, a=nn.Linear(4, 3), b=nn.Linear(5, 3)).double()
    wide = normal(5)(6, torch.float64)
    found = memsyn.measure(model, [normal(4)(6, torch.float64), wide], progress=False)
    assert set(found.routes.values()) == {BY_RULE}
    expected = reference.importance(model, wide, 6, lambda m, x, k: m(x[k : k + 1]))
    assert torch.allclose(found.sums["b.weight"], 6 * expected["b.weight"], rtol=1e-12)


def test_a_sample_axis_that_only_a_single_first_sample_hides() -> None:
    """With one sample, (time, samples, features) with one time step cannot be told from samples first."""
    case = CASES["time before samples"]
    model, batch = case.model().double(), normal(3, 3)(6, torch.float64)
    found = memsyn.measure(model, [batch[:1], batch[1:4], batch[4:]], progress=False)
    assert set(found.routes.values()) == {BY_RULE}
    expected = truth(case, model, batch, 6)
    assert max(reference.errors(found.mean(), expected).values()) <= 1e-9


def test_progress_is_shown_unless_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = build(CASES["mlp"], torch.float32)
    memsyn.measure(model, [batch, batch])
    assert "measuring: 100%" in (shown := capsys.readouterr().err)
    assert "14 samples" in shown
    memsyn.measure(model, [batch], progress=False)
    assert capsys.readouterr().err == ""


def test_the_warning_names_the_slow_layers() -> None:
    model, batch = build(CASES["experts"], torch.float32)
    with pytest.warns(
        memsyn.SlowParametersWarning, match=r"4 of 6 parameters .* in b \(Linear\), c \(Linear\)\..*max_sam"
    ):
        memsyn.measure(model, [batch], progress=False)


# Bad input


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


GOOD = torch.ones(6, 4)


def nan_at(sample: int) -> Tensor:
    batch = GOOD.clone()
    batch[sample] = float("nan")
    return batch


def _scaled_by_the_largest(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return y / y.detach().abs().max()


def _same_value_other_gradient(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return y * (1 + y.mean() - y.mean().detach())


class _Held:
    """An object that a clone does not copy."""

    layer: nn.Module

    def __deepcopy__(self, memo: Any) -> "_Held":
        return self


def _by_object() -> nn.Module:
    """A module whose forward reaches its own layers by an object that its clone shares."""
    held, model = _Held(), Lambda(lambda m, x: held.layer(x), a=nn.Linear(4, 3))
    held.layer = model.a
    return model


BAD: dict[str, tuple[Any, Any, Any, str]] = {
    "empty loader": (mlp, [], memsyn.BatchError, "no samples: the loader is empty"),
    "zero-length batches": (mlp, [GOOD[:0]] * 2, memsyn.BatchError, "no samples"),
    "bare tensor": (
        mlp,
        GOOD,
        memsyn.BatchError,
        r"one tensor of shape \(6, 4\).*Wrap it in a list: measure\(model, \[tensor\]\)",
    ),
    "bare mapping": (mlp, {"x": GOOD}, memsyn.BatchError, "one mapping. Wrap it"),
    "not iterable": (mlp, 3, memsyn.BatchError, "expected a DataLoader or any iterable of batches, got a int"),
    "empty tuple": (mlp, [()], memsyn.BatchError, "empty tuple or list"),
    "strings": (mlp, ["text"], memsyn.BatchError, "got a str.*forward="),
    "NaN": (mlp, [GOOD, nan_at(4)], memsyn.OutputError, "batch 1, sample 4: the output is NaN or infinite"),
    "infinite": (mlp, [GOOD / 0], memsyn.OutputError, "batch 0, sample 0: the output is NaN or infinite"),
    "overflow": (lambda: nn.Linear(4, 3), [GOOD * 1e25], memsyn.OutputError, "overflows when squared"),
    "mean loss": (
        lambda: Lambda(lambda m, x: m.a(x).mean(), a=nn.Linear(4, 3)),
        [GOOD],
        memsyn.OutputError,
        r"first dimension must be the samples; for 2 samples its shape is \(\)\. A mean loss",
    ),
    "batch mean": (
        lambda: Lambda(lambda m, x: m.a(x).mean(0), a=nn.Linear(4, 3)),
        [GOOD],
        memsyn.OutputError,
        r"its shape is \(3,\)",
    ),
    "no gradient": (
        lambda: Lambda(lambda m, x: m.a(x).detach(), a=nn.Linear(4, 3)),
        [GOOD],
        memsyn.OutputError,
        "no gradient with respect to any trainable parameter",
    ),
    "classes": (
        lambda: Lambda(lambda m, x: m.a(x).argmax(1), a=nn.Linear(4, 3)),
        [GOOD],
        memsyn.OutputError,
        "torch.int64, which has no gradient.*logits",
    ),
    "ambiguous mapping": (
        lambda: Lambda(lambda m, x: {"left": m.a(x), "right": x}, a=nn.Linear(4, 3)),
        [GOOD],
        memsyn.OutputError,
        "mapping with keys 'left', 'right'.*forward=",
    ),
    "ambiguous tuple": (
        lambda: Lambda(lambda m, x: (m.a(x), x), a=nn.Linear(4, 3)),
        [GOOD],
        memsyn.OutputError,
        "a tuple of Tensor, Tensor",
    ),
    "no output": (lambda: Lambda(lambda m, x: None, a=nn.Linear(4, 3)), [GOOD], memsyn.OutputError, "got a NoneType"),
    "nothing to train": (lambda: mlp().requires_grad_(False), [GOOD], memsyn.ModelError, "nothing to measure"),
    "lazy": (lambda: nn.LazyLinear(3), [GOOD], memsyn.ModelError, "weight has no shape yet: run one batch"),
    "not clonable": (
        lambda: _Locked(),
        [GOOD],
        memsyn.ModelError,
        "cannot be cloned for measuring: TypeError.*locks",
    ),
    "batch statistics": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)),
        [normal(4)(6, torch.float32)],
        memsyn.ModelError,
        "fails on sample 0 alone, .*ValueError.*Expected more than 1 value.*normalisation over the batch",
    ),
    "batch statistics over pixels": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 1), nn.BatchNorm2d(5, track_running_stats=False), nn.Conv2d(5, 3, 1)),
        [normal(2, 3, 3)(6, torch.float32)],
        memsyn.SamplesInteractError,
        "track_running_stats=False",
    ),
    "samples compared": (
        lambda: Lambda(lambda m, x: m.a(x) @ m.a(x).T, a=nn.Linear(4, 3)),
        [normal(4)(6, torch.float32)],
        memsyn.SamplesInteractError,
        "the objective of sample 0 changes with the other samples of the batch.*contrastive",
    ),
    "random forward": (
        lambda: Lambda(lambda m, x: m.a(x) * torch.rand(len(x), 1), a=nn.Linear(4, 3)),
        [normal(4)(6, torch.float32)],
        memsyn.SamplesInteractError,
        "random numbers in the forward pass",
    ),
    "normalised by the batch": (
        lambda: Lambda(lambda m, x: m.a((x - x.mean()) / x.std()), a=nn.Linear(4, 3)),
        [normal(4)(6, torch.float32)],
        memsyn.SamplesInteractError,
        "the objective of sample",
    ),
    "dependence through detach": (
        lambda: Lambda(_scaled_by_the_largest, a=nn.Linear(4, 3)),
        [normal(4)(6, torch.float32)],
        memsyn.SamplesInteractError,
        "the objective of sample",
    ),
    "dependence in the gradient alone": (
        lambda: Lambda(_same_value_other_gradient, a=nn.Linear(4, 3)),
        [normal(4)(6, torch.float32)],
        memsyn.SamplesInteractError,
        "the gradient of a.weight changes with the other samples",
    ),
    "time first in the output, as many steps as samples": (
        lambda: Lambda(lambda m, x: m.a(x).transpose(0, 1), a=nn.Linear(3, 2)),
        [normal(4, 3)(4, torch.float32)],
        memsyn.OutputError,
        r"for 2 samples its shape is \(4, 2, 2\)",
    ),
    "normalised output": (
        lambda: Lambda(lambda m, x: F.normalize(m.a(x), dim=1), a=nn.Linear(4, 3)),
        [normal(4)(6, torch.float32)],
        memsyn.OutputError,
        "the objective is the same for all weights, as the squared norm of a normalised output is",
    ),
    "another call": (
        mlp,
        [{"pixels": GOOD}],
        memsyn.BatchError,
        "batch 0: the model failed on it: TypeError.*forward=",
    ),
    "another width": (mlp, [GOOD, GOOD[:, :3]], memsyn.BatchError, "batch 1: the model failed on it: RuntimeError"),
    "one pair": (mlp, (GOOD, torch.zeros(6)), memsyn.BatchError, r"looks like one \(input, target\) pair"),
    "complex weights": (
        lambda: Lambda(lambda m, x: m.a(x).abs(), a=nn.Linear(4, 3, dtype=torch.complex64)),
        [GOOD.to(torch.complex64)],
        memsyn.ModelError,
        "a.weight is complex",
    ),
    "no module": (
        lambda: lambda x: x,
        [GOOD],
        memsyn.ModelError,
        "expected a torch.nn.Module to measure, got a func",
    ),
    "own model through a name from outside": (_by_object, [GOOD], memsyn.ModelError, "uses your model itself"),
    "infinite gradient": (
        lambda: Lambda(lambda m, x: (m.a(x) * 0).sqrt(), a=nn.Linear(4, 3)),
        [GOOD],
        memsyn.OutputError,
        "gradient of a.weight, a.bias is NaN",
    ),
}


class _Locked(nn.Linear):
    def __init__(self) -> None:
        import threading

        super().__init__(4, 3)
        self.lock = threading.Lock()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_an_error_that_says_what_to_do(name: str) -> None:
    build_model, batches, kind, message = BAD[name]
    torch.manual_seed(0)
    model = build_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (memsyn.SlowParametersWarning, UserWarning))
        with pytest.raises(kind, match=message) as caught:
            memsyn.measure(model, batches, progress=False)
    assert isinstance(caught.value, memsyn.MemsynError)


def test_nothing_is_changed_by_a_forward_that_uses_the_users_own_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(memsyn.ModelError, match=r"uses your model itself.*use that model"):
        memsyn.measure(model, [GOOD], forward=lambda _, batch: model(batch), progress=False)
    assert model[1].running_mean.abs().sum() == 0
    assert int(model[1].num_batches_tracked) == 0
    assert all(p.grad is None for p in model.parameters())


class Merging(nn.Linear):
    """Adapters that are merged into the weight in eval mode, as some libraries do it."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def train(self, mode: bool = True) -> nn.Module:
        if not mode and self.training:
            self.weight.data += self.up @ self.down
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ self.down.T @ self.up.T if self.training else 0)


class Clamping(nn.Linear):
    """A layer that writes to its weight in every forward pass."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Merging, Clamping])
@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
def test_weights_that_a_layer_writes_itself_are_not_written(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Linear(3, 2))
    snapshot = Snapshot(model)
    memsyn.measure(model, [normal(4)(6, torch.float32)], progress=False)
    snapshot.assert_unchanged()


def test_what_is_noted_on_a_parameter_is_there() -> None:
    model = Lambda(lambda m, x: m.a(x) * m.a.weight.scale, a=nn.Linear(4, 3))
    model.a.weight.scale = 3.0
    plain = Lambda(lambda m, x: m.a(x) * 3.0, a=model.a)
    found, expected = (memsyn.measure(m, [GOOD], progress=False).sums["a.weight"] for m in (model, plain))
    assert torch.equal(found, expected)


def test_a_slow_batch_that_cannot_be_cut_rightly_is_an_error() -> None:
    """A table of three rows is no table of three samples."""
    model = Lambda(lambda m, x, table: Hidden.apply(x * table.mean(0), m.p), p=parameter(3, 4))
    table, x = torch.rand(3, 4), normal(4)(11, torch.float32)
    batches = [{"x": x[:8], "table": table}, {"x": x[8:], "table": table}]
    with (
        pytest.warns(memsyn.SlowParametersWarning),
        pytest.raises(memsyn.SamplesInteractError, match="not a tensor with samples first"),
    ):
        memsyn.measure(model, batches, progress=False)


def test_a_rule_that_only_zeros_have_vouched_for_is_checked_again() -> None:
    model = Lambda(lambda m, x: F.linear(x, m.w) + Hidden.apply(torch.tanh(x), m.w), w=parameter(4, 4)).double()
    data = torch.cat([torch.zeros(4, 4, dtype=torch.float64), normal(4)(6, torch.float64)])
    with pytest.warns(memsyn.SlowParametersWarning, match="the model"):
        found = memsyn.measure(model, [data[:4], data[4:]], progress=False)
    expected = reference.importance(model, data, 10, lambda m, x, k: m(x[k : k + 1]))
    assert max(reference.errors(found.mean(), expected).values()) <= 1e-9


def test_a_rule_that_the_first_samples_say_nothing_of_is_checked_on_others() -> None:
    model = Lambda(lambda m, x: F.linear(x, m.w) + Hidden.apply(torch.tanh(x), m.w), w=parameter(4, 4)).double()
    data = torch.cat([torch.zeros(4, 4, dtype=torch.float64), normal(4)(6, torch.float64)])
    with pytest.warns(memsyn.SlowParametersWarning):
        found = memsyn.measure(model, [data], progress=False)
    expected = reference.importance(model, data, 10, lambda m, x, k: m(x[k : k + 1]))
    assert max(reference.errors(found.mean(), expected).values()) <= 1e-9


def test_a_weight_without_any_gradient_is_zero_and_measuring_goes_on() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    nn.init.zeros_(model[1].weight)  # as adapters start
    found = memsyn.measure(model, [GOOD] * 5, progress=False)
    assert not any(total.any() for total in found.sums.values())
    assert found.num_samples == 30


@pytest.mark.parametrize("slow", [False, True])
def test_a_model_that_changes_its_input_in_place(slow: bool) -> None:
    model = Lambda(
        lambda m, x: Hidden.apply(x.mul_(2).add_(m.p), m.w) if slow else m.a(x.mul_(2).add_(m.p)),
        a=nn.Linear(4, 3),
        p=parameter(4),
        w=parameter(3, 4),
    ).double()
    batch = normal(4)(6, torch.float64)
    expected = reference.importance(model, batch, 6, lambda m, x, k: m(x[k : k + 1].clone()))
    with pytest.warns(memsyn.SlowParametersWarning) if slow else contextlib.nullcontext():
        found = memsyn.measure(model, [batch], progress=False)
    assert max(reference.errors(found.mean(), expected).values()) <= 1e-9


def test_a_batch_that_only_a_later_one_shows_to_be_changed_in_place() -> None:
    model = Lambda(lambda m, x: m.a(x.mul_(2) if x[0, 0] > 10 else x), a=nn.Linear(4, 3))
    with pytest.raises(memsyn.BatchError, match=r"batch 1: the forward pass changed it in place.*copies"):
        memsyn.measure(model, [GOOD.clone(), GOOD + 20], progress=False)


def test_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    def model(reentrant: bool) -> nn.Module:
        def run(m: nn.Module, x: Tensor) -> Tensor:
            return m.c(checkpoint(m.b, torch.tanh(m.a(x)), use_reentrant=reentrant))

        return Lambda(run, a=nn.Linear(4, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 3)).double()

    batch = normal(4)(6, torch.float64)
    found = memsyn.measure(subject := model(False), [batch], progress=False)
    expected = reference.importance(subject, batch, 6, lambda m, x, k: m(x[k : k + 1]))
    assert max(reference.errors(found.mean(), expected).values()) <= 1e-9
    with pytest.raises(memsyn.ModelError, match=r"reentrant checkpoints.*use_reentrant=False"):
        memsyn.measure(model(True), [batch], progress=False)


def test_small_gradients_are_checked_as_closely_in_half_precision() -> None:
    model = Lambda(
        lambda m, x: (
            m.h(torch.tanh(x)) * 30 + 0.03 * torch.tanh(m.g(x)) + 0.03 * Hidden.apply(torch.cos(x), m.g.weight)
        ),
        h=nn.Linear(4, 4),
        g=nn.Linear(4, 4),
    ).bfloat16()
    with pytest.warns(memsyn.SlowParametersWarning, match=r"1 of 4 .* g \(Linear\)"):
        memsyn.measure(model, [normal(4)(6, torch.bfloat16)], progress=False)


def test_autocast_within_the_model_is_no_interaction() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.b(torch.tanh(m.a(x)))

    torch.manual_seed(0)
    model = Lambda(run, a=nn.Linear(4, 30), b=nn.Linear(30, 3))
    found = memsyn.measure(model, [normal(4)(6, torch.float32)], progress=False)
    assert set(found.routes.values()) == {BY_RULE}


def test_a_gradient_of_zero_over_many_pixels_is_no_interaction() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 94 * 94, 2))
    found = memsyn.measure(model, [torch.randn(5, 3, 96, 96)], progress=False)
    assert set(found.routes.values()) == {BY_RULE}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_transformer_encoder_with_padding(frozen: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = Lambda(
        lambda m, ids: m.head(m.encoder(m.tokens(ids), src_key_padding_mask=ids == 0).sum(1)),
        tokens=nn.Embedding(11, 8),
        encoder=nn.TransformerEncoder(layer, 2),
        head=nn.Linear(8, 3),
    ).double()
    model.tokens.requires_grad_(not frozen)
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9], [1, 0, 0, 0], [2, 2, 2, 0]])
    enabled = torch.backends.mha.get_fastpath_enabled()
    found = memsyn.measure(model, [ids], progress=False)
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert set(found.routes.values()) == {BY_RULE}
    model.encoder.use_nested_tensor = False
    expected = reference.importance(model, ids, 5, lambda m, x, k: m(x[k : k + 1]))
    assert max(reference.errors(found.mean(), expected).values()) <= 1e-9


def test_a_model_that_insists_on_its_precision_is_checked_in_it() -> None:
    model = Lambda(lambda m, x: m.a(x.float()), a=nn.Linear(4, 3))
    batch = normal(4)(6, torch.float32)
    found, expected = (memsyn.measure(m, [batch], progress=False).sums.values() for m in (model, model.a))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_loader_over_a_stream_has_no_length() -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            yield from GOOD

    found = memsyn.measure(mlp(), torch.utils.data.DataLoader(Stream(), batch_size=4), progress=False)
    assert found.num_samples == 6


def test_a_layer_under_no_grad_has_no_importance() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.a(x)
        return m.b(x)

    model = Lambda(run, a=nn.Linear(4, 4), b=nn.Linear(4, 3)).double()
    batch = normal(4)(6, torch.float64)
    found = memsyn.measure(model, [batch], progress=False).mean()
    expected = reference.importance(model, batch, 6, lambda m, x, k: m(x[k : k + 1]))
    assert not found["a.weight"].any()
    assert max(reference.errors(found, expected).values()) <= 1e-9


def test_a_mapping_that_is_no_dict_stays_what_it_is() -> None:
    found = memsyn.measure(mlp(), [UserBatch({"x": GOOD})], forward=lambda m, b: m(b.data["x"]), progress=False)
    assert found.num_samples == 6


def test_batches_without_tensors_are_read_by_forward() -> None:
    codes = {"red": [1.0, 0.0, 0.0, 1.0], "green": [0.0, 2.0, 0.0, 1.0], "blue": [0.0, 0.0, 3.0, 1.0]}

    def run(m: nn.Module, words: list[str]) -> Tensor:
        return m(torch.tensor([codes[word] for word in words]))

    model = mlp()
    found = memsyn.measure(model, [["red", "green"], ["blue"]], forward=run, progress=False)
    expected = memsyn.measure(model, [torch.tensor(list(codes.values()))], progress=False)
    assert found.num_samples == 3
    assert max(reference.errors(found.mean(), expected.mean()).values()) <= 1e-5


def test_slow_parameters_need_batches_that_can_be_cut() -> None:
    model = Lambda(hidden, a=nn.Linear(4, 5), b=nn.Linear(3, 2), w=parameter(3, 5))
    texts = {"short": torch.randn(2, 5, 4)}
    with pytest.raises(memsyn.BatchError, match="without tensors cannot be cut"):
        memsyn.measure(model, ["short"], forward=lambda m, text: m(texts[text]), progress=False)


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("estimator", ["inputs", "kronecker"])
def test_a_matrix_that_a_later_single_sample_uses_first(estimator: str, is_reversed: bool) -> None:
    """It is found then, and so is a parameter that is no matrix: the factors are those of larger batches."""
    model, generator = TwoPaths(), torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    more = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    large = [{"x": x}, {"x": y, "more": more}][:: -1 if is_reversed else 1]
    small = [{name: own[k : k + 1] for name, own in batch.items()} for batch in large for k in range(6)]
    assert_same_factors(factors_of(model, small, estimator), factors_of(model, large, estimator), 1e-10)
