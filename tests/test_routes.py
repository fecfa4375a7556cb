"""Which route a parameter takes when batches differ, sizes coincide, or the data decide what happens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsyn
from memsyn.batches import model_input, take
from memsyn.engine.routes import BY_RULE, BY_SAMPLE
from tests import reference
from tests.cases import CASES, Hidden, Lambda, normal, parameter
from tests.test_measure import GOOD, Snapshot, build


def test_experts_whose_work_is_new_in_a_later_batch() -> None:
    """A weight that is first used, or used in another way, after the check is looked at again there."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return y if x.shape[1] < 4 else torch.tanh(y) * m.scale + F.linear(y, m.a.weight[:, :3])

    torch.manual_seed(0)
    model = Lambda(run, a=nn.Linear(5, 3), scale=parameter(3)).double()
    short, long = normal(3, 5)(6, torch.float64), normal(4, 5)(5, torch.float64)
    found = memsyn.measure(model, [short, short, long, short, long], progress=False)
    batches = [short, short, long, short, long]
    samples = [sample for batch in batches for sample in batch.split(1)]
    expected = reference.importance(model, samples, len(samples), lambda m, x, k: m(x[k]))
    assert max(reference.errors(found.mean(), expected).values()) <= 1e-9
    assert found.routes["scale"] == BY_RULE


@pytest.mark.parametrize("length", [2, 3, 7])
def test_sizes_that_coincide_do_not_matter(length: int) -> None:
    """As many samples as tokens, heads, channels, or as the check looks at."""
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x: m.c(m.lstm((m.a(x) + m.table(torch.arange(x.shape[1])))[:, :, :3].transpose(0, 1))[0]).transpose(
            0, 1
        ),
        a=nn.Linear(length, 4),
        table=nn.Embedding(9, 4),
        lstm=nn.LSTM(3, length),
        c=nn.Linear(length, 2),
    ).double()
    for sizes in ([length, length], [2, length], [3, 1, length]):
        parts = [normal(length, length)(size, torch.float64) for size in sizes]
        found = memsyn.measure(model, parts, progress=False)
        whole = torch.cat(parts)
        expected = reference.importance(model, whole, len(whole), lambda m, x, k: m(x[k : k + 1]))
        assert max(reference.errors(found.mean(), expected).values()) <= 1e-9
        assert BY_SAMPLE not in found.routes.values()


class OneShot(torch.autograd.Function):
    """tanh, whose backward pass frees what it needs, as those of reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = torch.tanh(x)
        return ctx.y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y = ctx.y
        del ctx.y
        return grad * (1 - y * y)  # type: ignore[no-any-return]


def scaled_gradient(m: nn.Module, x: Tensor) -> Tensor:
    """A hook of the model changes the gradient after memsyn's own hook has seen it."""
    h: Tensor = m.a(x)
    h.register_hook(lambda grad: grad * 0.1)
    return m.b(torch.tanh(h))  # type: ignore[no-any-return]


def refined(m: nn.Module, x: Tensor) -> Tensor:
    """The weights move the inputs by a gradient that the objective does not see, and are used again."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(m.b(torch.tanh(m.a(x))).square().sum(), x)
    return m.b(torch.tanh(m.a(x.detach() - 0.1 * grad)))  # type: ignore[no-any-return]


def force(m: nn.Module, x: Tensor) -> Tensor:
    """The output is itself a gradient."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(m.b(torch.tanh(m.a(x))).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("run", [scaled_gradient, refined, force, lambda m, x: m.b(OneShot.apply(m.a(x)))])
@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
def test_what_a_model_does_with_gradients_is_measured_exactly(run: Any) -> None:
    """The check must see gradients as the measurement does: those that autograd gives elsewhere would agree."""
    torch.manual_seed(0)
    model = Lambda(run, a=nn.Linear(4, 6), b=nn.Linear(6, 3)).double()
    batches = [normal(4)(5, torch.float64), normal(4)(3, torch.float64)]
    found = memsyn.measure(model, batches, progress=False)
    samples = torch.cat(batches)
    expected = reference.importance(model, samples, len(samples), lambda m, x, k: m(x[k : k + 1]))
    assert max(reference.errors(found.mean(), expected).values()) <= 1e-9


def test_batches_of_one_are_ordinary_passes() -> None:
    model, batch = build(CASES["state space"], torch.float64)
    expected = memsyn.measure(model, [batch], progress=False)
    found = memsyn.measure(model, batch.split(1), progress=False)
    assert max(reference.errors(found.mean(), expected.mean()).values()) <= 1e-9
    assert set(found.routes.values()) == {BY_SAMPLE}


def test_an_output_in_place_of_a_view_stays_differentiable() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)  # of tokens: a view
        y[:, 0].mul_(3)
        y.mul_(2)
        z = y.expand(2, *y.shape)[1]
        return m.b(z)

    model = Lambda(run, a=nn.Linear(4, 5), b=nn.Linear(5, 2)).double()
    batch = normal(3, 4)(6, torch.float64)
    found = memsyn.measure(model, [batch], progress=False)
    expected = reference.importance(model, batch, 6, lambda m, x, k: m(x[k : k + 1]))
    assert max(reference.errors(found.mean(), expected).values()) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_cast_in_the_forward_pass(dtype: torch.dtype) -> None:
    model = Lambda(
        lambda m, x: F.linear(x, m.w.float()) * m.s.float(),
        w=nn.Parameter(torch.randn(3, 4).to(dtype)),
        s=nn.Parameter(torch.randn(3).to(dtype)),
    )
    batch = normal(4)(6, torch.float32)
    found = memsyn.measure(model, [batch], progress=False)
    wide = Lambda(lambda m, x: F.linear(x, m.w) * m.s, w=parameter(3, 4), s=parameter(3)).double()
    wide.load_state_dict(model.state_dict())
    expected = reference.importance(wide, batch.double(), 6, lambda m, x, k: m(x[k : k + 1]))
    assert max(reference.errors(found.mean(), expected).values()) <= 0.02
    assert all(total.dtype == torch.float32 for total in found.sums.values())


def test_half_precision_convolutions_and_images_with_channels_last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1))
    batch = normal(3, 5, 4)(6, torch.float64)
    expected = reference.importance(model.double(), batch, 6, lambda m, x, k: m(x[k : k + 1]))
    last = model.to(memory_format=torch.channels_last)
    found = memsyn.measure(last, [batch.to(memory_format=torch.channels_last)], progress=False)
    assert max(reference.errors(found.mean(), expected).values()) <= 1e-9
    half = memsyn.measure(last.to(torch.bfloat16), [batch.bfloat16()], progress=False)
    assert max(reference.errors(half.mean(), expected).values()) <= 0.05


def test_a_model_that_autograd_cannot_differentiate() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.exp(m.a(x))
        z = y * y
        y += 1
        return z

    with pytest.raises(memsyn.ModelError, match="autograd cannot differentiate the model"):
        memsyn.measure(Lambda(run, a=nn.Linear(4, 3)), [GOOD], progress=False)


def test_threads_measure_one_model_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, batch = build(CASES["residual network"], torch.float64)
    expected = memsyn.measure(model, [batch], progress=False)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: memsyn.measure(model, [batch] * 2, progress=False), range(6)))
    for found in results:
        assert max(reference.errors(found.mean(), expected.mean()).values()) <= 1e-12


def test_empty_weights() -> None:
    model = Lambda(lambda m, x: m.a(x) + F.linear(x[:, :0], m.b), a=nn.Linear(4, 3), b=parameter(3, 0)).double()
    batch = normal(4)(6, torch.float64)
    found = memsyn.measure(model, [batch], progress=False)
    assert found.sums["b"].shape == (3, 0)


# Samples in another order, or rows of them chosen by the data


def measured_and_error(model: nn.Module, batches: list[Any]) -> tuple[memsyn.Importance, float]:
    """The importance, and its largest error against every sample alone."""
    found = memsyn.measure(model, batches, progress=False)
    singles = [take(batch, k, k + 1) for batch in batches for k in range(len(next(iter(_tensors(batch)))))]

    def alone(m: nn.Module, samples: list[Any], k: int) -> Tensor:
        sample = model_input(samples[k])
        return m(**sample) if isinstance(sample, dict) else m(sample)

    expected = reference.importance(model, singles, len(singles), alone)
    return found, max(reference.errors(found.mean(), expected).values())


def _tensors(batch: Any) -> list[Tensor]:
    return list(batch.values()) if isinstance(batch, dict) else [batch]


@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
def test_tokens_without_their_padding() -> None:
    def run(m: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
        y = torch.zeros(*x.shape[:2], 3, dtype=x.dtype)
        y[kept] = m.b(torch.tanh(m.a(x[kept])))
        return m.c(y).sum(1)

    torch.manual_seed(0)
    model = Lambda(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3), c=nn.Linear(3, 2)).double()
    batches = []
    for counts in ([2, 2, 2, 2], [1, 3, 4, 4], [4, 1, 2, 1]):  # the first hides that the rows are chosen
        kept = torch.arange(4) < torch.tensor(counts)[:, None]
        batches.append({"x": normal(4, 4)(4, torch.float64) + sum(counts), "kept": kept})
    found, error = measured_and_error(model, batches)
    assert error <= 1e-9
    assert found.routes["a.weight"] == found.routes["b.bias"] == BY_SAMPLE
    assert found.routes["c.weight"] == BY_RULE


@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
def test_a_layer_that_meets_the_samples_in_two_orders() -> None:
    def run(m: nn.Module, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ends = []
        for lengths in (left, right):
            rows = lengths.argsort(descending=True)
            y = m.a(x.index_select(0, rows) * lengths.index_select(0, rows)[:, None])
            ends.append(torch.tanh(y).index_select(0, rows.argsort()))
        return ends[0] * ends[1]

    torch.manual_seed(0)
    model = Lambda(run, a=nn.Linear(4, 3)).double()
    x = normal(4)(4, torch.float64)
    found, error = measured_and_error(
        model, [{"x": x, "left": torch.tensor([9, 8, 2, 5]), "right": torch.tensor([7, 6, 3, 1])}]
    )
    assert error <= 1e-9
    assert set(found.routes.values()) == {BY_SAMPLE}


@pytest.mark.parametrize("lengths", [(1, 5), (5, 1, 4)])
def test_a_fold_that_the_first_batch_does_not_show(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x: m.b(torch.tanh(m.a(x.transpose(0, 1).flatten(0, 1)))).unflatten(0, (x.shape[1], -1)).sum(0),
        a=nn.Linear(4, 3),
        b=nn.Linear(3, 2),
    ).double()
    found, error = measured_and_error(model, [normal(length, 4)(4, torch.float64) for length in lengths])
    assert error <= 1e-9
    assert set(found.routes.values()) == {BY_RULE}


def test_what_is_refused_in_a_batch_with_something_new_is_not_lost() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return y if x.shape[0] != 5 and x[0, 0] < 90 else Hidden.apply(y, m.b.weight) + m.b(y) + F.linear(x, m.a.weight)

    torch.manual_seed(0)
    model = Lambda(run, a=nn.Linear(3, 3), b=nn.Linear(3, 3)).double()
    first, second = normal(3)(4, torch.float64), normal(3)(4, torch.float64) + 100
    with pytest.warns(memsyn.SlowParametersWarning):
        found, error = measured_and_error(model, [first, second, first])
    assert error <= 1e-9
    assert found.routes["b.weight"] == BY_SAMPLE


def test_what_was_computed_of_weights_before_is_an_error() -> None:
    model = Lambda(lambda m, x: torch.tanh(m.a(x)) @ m.head, a=nn.Linear(4, 3))
    model.head = model.a.weight.t().t()
    with pytest.raises(memsyn.ModelError, match="head was computed from weights before the forward pass and cached"):
        memsyn.measure(model, [GOOD], progress=False)


def test_uses_with_other_options() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        ids = x.long().abs() % 5
        embedded = F.embedding(ids, m.t.weight, padding_idx=0) + F.embedding(ids.flip(1), m.t.weight)
        image = (
            F.conv1d(x[:, None], m.c.weight)
            + F.conv1d(x[:, None], m.c.weight, stride=2, padding=3)[..., : x.shape[1] - 2]
        )
        return torch.cat([embedded.flatten(1), image.flatten(1)], 1)

    torch.manual_seed(0)
    model = Lambda(run, t=nn.Embedding(5, 3), c=nn.Conv1d(1, 2, 3, bias=False)).double()
    found, error = measured_and_error(model, [5 * normal(2 + 2)(6, torch.float64)])
    assert error <= 1e-9
    assert found.routes["c.weight"] != BY_RULE


def test_the_users_batch_is_not_changed() -> None:
    model = Lambda(
        lambda m, x: m.a(x.mul_(0.5)) + (m.b(x) if x.shape[1] > 3 and len(x) > 4 else 0),
        a=nn.Linear(4, 3),
        b=nn.Linear(4, 3),
    ).double()
    first, second = normal(4)(4, torch.float64), normal(4)(4, torch.float64) + 1
    copies = first.clone(), second.clone()
    memsyn.measure(model, [first, second], progress=False)
    assert torch.equal(first, copies[0])
    assert torch.equal(second, copies[1])


@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
def test_a_route_that_gave_only_zeros_is_not_trusted_with_more() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        steps = m.a(x.transpose(0, 1)).transpose(0, 1).cumsum(1)
        return m.b(x).sum(1) + steps.sum(1) * (x[:, 0, :1] > 90)

    torch.manual_seed(0)
    model = Lambda(run, a=nn.Linear(4, 3), b=nn.Linear(4, 3)).double()
    plain = normal(5, 4)(8, torch.float64)
    rare = plain.clone()
    rare[3, 0, 0] = 99
    found, error = measured_and_error(model, [plain, plain, plain, rare, plain, rare])
    assert error <= 1e-9
    assert found.routes["b.weight"] == BY_RULE


def test_rows_that_a_function_scales_in_place_are_not_the_users() -> None:
    torch.manual_seed(0)
    model = Lambda(lambda m, ids: F.embedding(ids, m.w, max_norm=1.0).sum(1), w=parameter(6, 3)).double()
    with torch.no_grad():
        model.w[:3] *= 0.01
        model.w[3:] *= 10
    snapshot = Snapshot(model)
    ids = torch.tensor([[0, 1], [2, 0], [1, 1]])
    memsyn.measure(model, [ids, ids + 3], progress=False)
    snapshot.assert_unchanged()


def test_real_weights_in_complex_arithmetic() -> None:
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.filter) * m.scale, n=6),
        filter=parameter(4, 2),
        scale=parameter(4),
    ).double()
    found, error = measured_and_error(model, [normal(6)(5, torch.float64)])
    assert error <= 1e-9
    assert BY_SAMPLE not in found.routes.values()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("want of memory"), None], ids=["device", "processor"])
@pytest.mark.parametrize("where", ["a route", "the forward pass"])
def test_want_of_memory_ends_the_check(monkeypatch: pytest.MonkeyPatch, where: str, error: RuntimeError | None) -> None:
    """It is neither taken for a route that fails, nor for a model that insists on a precision."""
    from memsyn.measuring import route_check

    def exhausted(*given: Any, **options: Any) -> Any:
        if error is not None:
            raise error
        return torch.empty(2**60, dtype=torch.uint8)

    if where == "a route":
        monkeypatch.setattr(route_check, "add_by_rule", exhausted)
    forward = exhausted if where == "the forward pass" else None
    with pytest.raises(RuntimeError, match=r"want of memory|can't allocate memory"):
        memsyn.measure(nn.Linear(2, 2), [torch.ones(3, 2)], forward=forward, progress=False)


def test_two_samples_with_a_dead_branch_keep_the_fast_routes() -> None:
    """The check looks again for samples that reach the branch, but never at one sample alone."""
    model = Lambda(lambda m, x: m.a(x) + torch.relu(m.b(x)), a=nn.Linear(3, 2), b=nn.Linear(3, 2)).double()
    with torch.no_grad():
        model.b.bias.fill_(-1e3)
    for size in (2, 3, 4):
        importance = memsyn.measure(model, [normal(3)(size, torch.float64)] * 2, progress=False)
        assert set(importance.routes.values()) == {BY_RULE}, size
