"""Local importance: each layer's own squared output norm, against one layer and one sample at a time."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memsyn
from memsyn.batches import take
from memsyn.engine.routes import BY_RULE
from memsyn.measuring.objectives import each_output, squared_l2_norm
from tests import reference
from tests.cases import CASES as ALL_CASES
from tests.cases import Attention, Hidden, Lambda, frozen, integers, norm_net, normal, parameter, residual
from tests.test_measure import Snapshot, trained_a_little
from tests.zoo import ZOO

NUM_SAMPLES = 5
Activations = dict[str, Callable[[Tensor], Tensor]]


def measured(model: nn.Module, batches: Any, **options: Any) -> memsyn.Importance:
    return memsyn.measure(model, batches, estimator="mas-local", progress=False, **options)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.5 * x)


def gelu_by_hand(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class Cubed(torch.autograd.Function):
    """An activation that no function mode sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2


def stack(phi: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Lambda(
        lambda m, x: m.c(phi(m.b(phi(m.a(x))))), a=nn.Linear(4, 7), b=nn.Linear(7, 6), c=nn.Linear(6, 3)
    )


PHI: Activations = {
    "relu": torch.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu, shaped": lambda x: torch.relu(x.unsqueeze(1)).flatten(1),
    "relu, moved": lambda x: torch.relu(x) + 0.3,
    "relu, scaled": lambda x: 2 * torch.relu(x),
    "relu6": F.relu6,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu by hand": gelu_by_hand,
    "silu": F.silu,
    "swish by hand": swish,
    "elu": F.elu,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "dropout of tanh": lambda x: F.dropout(torch.tanh(x), 0.5, False),
    "chosen by sign": lambda x: torch.where(x > 0, x, 0.1 * x),
    "custom function": Cubed.apply,
    "none": lambda x: x,
}

Case = tuple[Callable[[], nn.Module], Callable[[int, torch.dtype], Tensor], Activations]

CONV = {"0": torch.tanh, "2": torch.relu}


def conv(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), layers[0], nn.ReLU(), *layers[1:])


def normed(norm: Callable[[], nn.Module], kind: type[nn.Module]) -> Callable[[], nn.Module]:
    return norm_net(norm, channels=6, conv=kind)


def residual_by_groups() -> nn.Module:
    model = residual()
    for name, channels in (("bn1", 6), ("bn2", 8), ("bn3", 8)):
        setattr(model, name, nn.GroupNorm(2, channels))
    return model


def with_statistics(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    for name, p in model.named_parameters():
        if "bn" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator))
    return model


CASES: dict[str, Case] = {
    **{f"MLP, {name}": (stack(phi), normal(4), {"a": phi, "b": phi}) for name, phi in PHI.items()},
    "convolutions": (lambda: conv(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3)), normal(3, 6, 6), CONV),
    "strided": (lambda: conv(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 2, 1)), normal(3, 6, 6), CONV),
    "grouped": (lambda: conv(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 6, 3, groups=6)), normal(3, 6, 6), CONV),
    "transposed": (lambda: conv(nn.ConvTranspose2d(4, 6, 2, stride=2)), normal(3, 4, 4), CONV),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2), nn.GELU(), nn.Conv1d(4, 3, 1)),
        normal(2, 9),
        {"0": F.gelu},
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3)),
        normal(5, 4),
        {"0": F.gelu},
    ),
    "time before samples": (
        lambda: Lambda(lambda m, x: torch.tanh(m.a(x.transpose(0, 1))).transpose(0, 1), a=nn.Linear(3, 2)),
        normal(4, 3),
        {"a": torch.tanh},
    ),
    "group norm ends a layer": (normed(lambda: nn.GroupNorm(2, 6), nn.Conv2d), normal(3, 4, 4), {"1": torch.relu}),
    "layer norm ends a layer": (normed(lambda: nn.LayerNorm(5), nn.Conv1d), normal(3, 5), {"1": torch.relu}),
    "transformer": (
        lambda: Lambda(
            lambda m, x: m.head(m.block(torch.relu(m.patches(x)).flatten(2).transpose(1, 2)).mean(1)),
            patches=nn.Conv2d(3, 8, 2, 2),
            block=Attention(8, 2, nn.LayerNorm),
            head=nn.Linear(8, 3),
        ),
        normal(3, 4, 4),
        {"patches": torch.relu, "block.up": F.gelu},
    ),
    "layer used twice": (
        lambda: Lambda(
            lambda m, x: torch.tanh(m.b(torch.tanh(m.b(torch.tanh(m.a(x)))))), a=nn.Linear(4, 5), b=nn.Linear(5, 5)
        ),
        normal(4),
        {"a": torch.tanh, "b": torch.tanh},
    ),
    "siamese": (
        lambda: Lambda(lambda m, x: torch.relu(m.a(x[:, 0])) * torch.relu(m.a(x[:, 1])), a=nn.Linear(4, 3)),
        normal(2, 4),
        {"a": torch.relu},
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.Tanh()),
        integers(5, 6),
        {"1": torch.tanh},
    ),
    "gated": (
        lambda: Lambda(
            lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
            gate=nn.Linear(4, 6),
            up=nn.Linear(4, 6),
            down=nn.Linear(6, 4),
        ),
        normal(5, 4),
        {"gate": F.silu},
    ),
    "overwritten afterwards": (
        lambda: Lambda(lambda m, x: m.b(m.a(x).add_(x)).mul_(2 * x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        normal(4),
        {},
    ),
    "read again afterwards": (
        lambda: Lambda(lambda m, x: (lambda h: m.b(torch.relu(h)) + h)(m.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        normal(4),
        {"a": torch.relu},
    ),
}


def truth(model: nn.Module, batch: Tensor, activations: Activations) -> dict[str, Tensor]:
    return reference.local_importance(model, batch, len(batch), lambda m, x, k: m(x[k : k + 1]), activations)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_layer_and_one_sample_at_a_time(name: str) -> None:
    build, batch, activations = CASES[name]
    torch.manual_seed(0)
    model = build().double()
    data = batch(NUM_SAMPLES, torch.float64)
    importance = measured(model, [data])
    found = reference.errors(importance.mean(), truth(model, data, activations))
    assert max(found.values()) <= 1e-12, found
    assert set(importance.routes.values()) == {BY_RULE}
    alone = measured(model, list(data.split(1)))
    assert max(reference.errors(alone.mean(), importance.mean()).values()) <= 1e-12


def in_eval(bn: nn.Module, then: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Batch normalisation with its statistics, its parameters held."""
    return lambda z: then(
        F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight.detach(), bn.bias.detach(), eps=bn.eps)
    )


@pytest.mark.parametrize("groups", [False, True])
def test_a_residual_network_ends_layers_after_batch_norm_and_before_group_norm(groups: bool) -> None:
    torch.manual_seed(0)
    model = with_statistics(residual_by_groups() if groups else residual()).double()
    relu: Callable[[Tensor], Tensor] = torch.relu
    same: Callable[[Tensor], Tensor] = lambda z: z  # noqa: E731
    activations: Activations = {"bn1": relu, "bn2": relu}
    if not groups:
        activations |= {
            "conv1": in_eval(model.bn1, relu),
            "conv2": in_eval(model.bn2, relu),
            "conv3": in_eval(model.bn3, same),
        }
    data = normal(3, 8, 8)(NUM_SAMPLES, torch.float64)
    found = reference.errors(measured(model.train(), [data]).mean(), truth(model, data, activations))
    assert max(found.values()) <= 1e-12, found


def test_scaling_weights_before_a_batch_norm_scales_importance_as_it_scales_the_exact_one() -> None:
    torch.manual_seed(0)
    model = normed(lambda: nn.BatchNorm2d(6), nn.Conv2d)().double().eval()
    data = normal(3, 4, 4)(NUM_SAMPLES, torch.float64)
    before = [memsyn.measure(model, [data], estimator=e, progress=False).sums["0.weight"] for e in ("mas", "mas-local")]
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[1].running_mean):
            tensor.mul_(10)
        model[1].running_var.add_(model[1].eps).mul_(100).sub_(model[1].eps)  # the network computes what it did
    after = [memsyn.measure(model, [data], estimator=e, progress=False).sums["0.weight"] for e in ("mas", "mas-local")]
    for old, new in zip(before, after, strict=True):
        assert torch.allclose(new, old / 10, rtol=1e-9)


def test_hebbs_rule() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU()).double()
    data = torch.rand(NUM_SAMPLES, 4, dtype=torch.float64)
    hidden = torch.relu(model[0](data))
    output = torch.relu(model[2](hidden))
    omega = measured(model, [data]).mean()
    assert torch.allclose(omega["0.weight"], 2 * hidden.T @ data / NUM_SAMPLES, rtol=1e-12)
    assert torch.allclose(omega["2.weight"], 2 * output.T @ hidden / NUM_SAMPLES, rtol=1e-12)
    assert torch.allclose(omega["2.bias"], 2 * output.mean(0), rtol=1e-12)
    squares = memsyn.measure(
        model,
        [data],
        estimator=memsyn.Estimator(squared_l2_norm, "square", local=True),
        progress=False,
    ).mean()
    assert torch.allclose(squares["2.bias"], (2 * output).square().mean(0), rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_convolutions_between_relus_and_batch_norms(data: st.DataObject) -> None:
    """In which no sign changes within a channel, and an ordinary weight gradient will do."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 99)))
    groups = draw(st.integers(1, 2))
    layer = nn.Conv2d(
        2 * groups,
        3 * groups,
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.sampled_from([0, 1, (1, 0), "valid"])) if draw(st.booleans()) else 1,
        dilation=draw(st.integers(1, 2)),
        groups=groups,
    )
    model = with_statistics(Lambda(lambda m, x: torch.relu(m.bn(m.c(x))), c=layer, bn=nn.BatchNorm2d(3 * groups)))
    x = torch.rand(4, 2 * groups, 6, 7, dtype=torch.float64)
    x[:, 0] *= -1
    model = model.double().eval()
    expected = truth(model, x, {"bn": torch.relu, "c": in_eval(model.bn, torch.relu)})
    assert max(reference.errors(measured(model, [x]).mean(), expected).values()) <= 1e-12
    x[3, 0] *= -1  # found out by the last sample only
    expected = truth(model, x, {"bn": torch.relu, "c": in_eval(model.bn, torch.relu)})
    assert max(reference.errors(measured(model, [x]).mean(), expected).values()) <= 1e-12


def test_attention_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, batch_first=True).double()
    x = normal(4, 6)(NUM_SAMPLES, torch.float64)
    omega = measured(model, [x], forward=lambda m, x: m(x, x, x)[0]).mean()
    z = F.linear(x, model.in_proj_weight, model.in_proj_bias)
    assert torch.allclose(omega["in_proj_weight"], 2 * torch.einsum("bti,btj->bij", z, x).abs().mean(0), rtol=1e-12)
    assert torch.allclose(omega["in_proj_bias"], 2 * z.sum(1).abs().mean(0), rtol=1e-12)
    assert torch.allclose(omega["out_proj.bias"], 2 * model(x, x, x)[0].sum(1).abs().mean(0), rtol=1e-12)


def test_bare_parameters_and_tables_are_part_of_the_layer_that_they_are_added_to() -> None:
    torch.manual_seed(0)
    model = Lambda(
        lambda m, x: m.b(torch.tanh(m.a(x) * m.scale + m.places)),
        a=nn.Linear(4, 3),
        b=nn.Linear(3, 2),
        scale=parameter(3),
        places=parameter(5, 3),
    ).double()
    x = normal(5, 4)(NUM_SAMPLES, torch.float64)
    omega = measured(model, [x]).mean()
    z = model.a(x)
    y = torch.tanh(z * model.scale + model.places)
    d = 2 * y * (1 - y**2)
    expected = {
        "places": d.abs().mean(0),
        "scale": (d * z).sum(1).abs().mean(0),
        "a.weight": torch.einsum("bti,btj->bij", d * model.scale, x).abs().mean(0),
        "a.bias": (d * model.scale).sum(1).abs().mean(0),
    }
    for name, value in expected.items():
        assert torch.allclose(omega[name], value, rtol=1e-12), name


def test_a_tied_matrix_adds_its_two_layers_before_the_absolute_value() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 4)
    head = nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = Lambda(lambda m, ids: m.head(torch.tanh(m.embedding(ids))), embedding=embedding, head=head).double()
    ids = integers(7, 5)(NUM_SAMPLES, torch.float64)
    rows = embedding.weight[ids].detach()
    looked_up = 2 * torch.tanh(rows) * (1 - torch.tanh(rows) ** 2)
    a = torch.tanh(rows)
    own = torch.einsum("bti,btj->bij", 2 * head(a), a)
    for k in range(NUM_SAMPLES):
        own[k].index_add_(0, ids[k], looked_up[k])
    assert torch.allclose(measured(model, [ids]).mean()["embedding.weight"], own.abs().mean(0), rtol=1e-12)


def test_layers_of_which_nothing_is_used_count_and_those_that_do_not_run_are_zero() -> None:
    model = Lambda(lambda m, x: (m.a(x), m.b(x))[1], a=nn.Linear(4, 3), b=nn.Linear(4, 3), c=nn.Linear(4, 3)).double()
    x = normal(4)(NUM_SAMPLES, torch.float64)
    sums = measured(model, [x]).sums
    assert torch.allclose(sums["a.bias"], 2 * model.a(x).abs().sum(0), rtol=1e-12)
    assert not sums["c.weight"].any()


def test_frozen_parameters_are_left_out() -> None:
    model = frozen(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), "0.weight").double()
    x = normal(4)(NUM_SAMPLES, torch.float64)
    expected = truth(model.requires_grad_(), x, {"0": torch.relu})
    frozen(model, "0.weight")
    omega = measured(model, [x]).mean()
    assert set(omega) == {"0.bias", "2.weight", "2.bias"}
    assert all(torch.allclose(value, expected[name], rtol=1e-12) for name, value in omega.items())


def test_the_memory_format_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    images = torch.randn(5, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, last = (measured(model, [x]).mean() for x in (images, images.to(memory_format=torch.channels_last)))
    for name, omega in plain.items():
        assert torch.allclose(last[name], omega, rtol=1e-12), name


def test_batch_size_order_and_split_do_not_matter() -> None:
    torch.manual_seed(0)
    model = with_statistics(residual()).double()
    data = normal(3, 8, 8)(9, torch.float64)
    whole = measured(model, [data])
    parts = measured(model, data[torch.randperm(9)].split([4, 1, 2, 2]))
    joined = measured(model, [data[:2]]) + measured(model, [data[2:]])
    assert joined.num_samples == parts.num_samples == 9
    for other in (parts, joined):
        assert max(reference.errors(other.mean(), whole.mean()).values()) <= 1e-12


def test_the_model_is_bit_for_bit_unchanged() -> None:
    model = trained_a_little(residual())
    snapshot = Snapshot(model)
    measured(model, [torch.zeros(4, 3, 8, 8)])
    snapshot.assert_unchanged()


def test_it_cannot_be_added_to_the_exact_importance() -> None:
    model, data = nn.Linear(4, 3), [normal(4)(4, torch.float32)]
    local, exact = measured(model, data), memsyn.measure(model, data, progress=False)
    assert local.quantity == ("squared_l2_norm of each layer", "abs")
    with pytest.raises(memsyn.MismatchError, match=r"squared_l2_norm of each layer and abs of squared_l2_norm\."):
        local + exact
    with pytest.raises(memsyn.MismatchError, match="cannot be folded"):
        memsyn.Memory.empty().consolidate(model, local).consolidate(model, exact)
    assert all(torch.allclose(local.sums[name], exact.sums[name]) for name in local.sums)  # of a single layer


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model = Lambda(
        lambda m, input_ids, attention_mask: m.b(torch.tanh(m.a(m.t(input_ids))).flatten(0, 1)).unflatten(
            0, input_ids.shape
        ),
        t=nn.Embedding(9, 4),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 3),
    ).double()
    ids = integers(9, 6)(3, torch.float64)
    mask = (torch.arange(6) < torch.tensor([[3], [6], [2]])).long()
    padded = measured(model, [{"input_ids": ids, "attention_mask": mask}])
    cut = [{"input_ids": ids[k : k + 1, :n], "attention_mask": mask[k : k + 1, :n]} for k, n in enumerate((3, 6, 2))]
    assert max(reference.errors(padded.mean(), measured(model, cut).mean()).values()) <= 1e-12


def test_a_parameter_that_is_used_out_of_sight_is_an_error_that_names_it() -> None:
    model = Lambda(
        lambda m, x: m.b(Hidden.apply(torch.tanh(m.a(x)), m.w)), a=nn.Linear(4, 5), b=nn.Linear(3, 2), w=parameter(3, 5)
    )
    with pytest.raises(memsyn.ModelError, match=r"^w: the output depends on it, but no operation.*freeze"):
        measured(model, [normal(4)(4, torch.float32)])


def test_a_layer_that_is_used_more_often_later_is_an_error_that_names_it() -> None:
    def roll(m: nn.Module, x: Tensor) -> Tensor:
        state = x[:, 0]
        for _ in range(x.shape[1]):
            state = torch.tanh(m.a(state))
        return state

    model = Lambda(roll, a=nn.Linear(4, 4)).double()
    short, long = normal(1, 4)(4, torch.float64), normal(3, 4)(4, torch.float64)
    with pytest.raises(memsyn.ModelError, match=r"a\.bias, a\.weight: used once in the batch that was checked first"):
        measured(model, [short, long])
    both = measured(model, [long, short])
    parts = measured(model, [long]) + measured(model, [short])
    assert max(reference.errors(both.mean(), parts.mean()).values()) <= 1e-12


def test_custom_functions_whose_branches_meet_again_are_followed_once() -> None:
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            return x + y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            return grad, grad

    def doubled(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        for _ in range(40):  # 2^40 paths lead from the result to the layer
            y = Both.apply(y, y) / 2
        return Both.apply(y, y)

    model, data = Lambda(doubled, a=nn.Linear(3, 2)).double(), normal(3)(4, torch.float64)
    plain = Lambda(lambda m, x: 2 * m.a(x), a=model.a)
    assert max(reference.errors(measured(model, [data]).mean(), measured(plain, [data]).mean()).values()) <= 1e-12


def test_what_cannot_be_measured_says_why() -> None:
    model, good = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), normal(4)(4, torch.float32)
    with pytest.raises(
        memsyn.OutputError, match=r"batch 1: the output of the layer of 2\.bias, 2\.weight is NaN or inf"
    ):
        measured(model, [good, good * math.inf])
    with pytest.raises(memsyn.BatchError, match="batch 0: local importance needs batches made of tensors"):
        measured(model, ["text"], forward=lambda m, batch: m(good))
    with pytest.raises(memsyn.OptionError, match="only squared_l2_norm can be taken layer by layer, not each_output"):
        memsyn.Estimator(each_output, local=True)
    with pytest.raises(memsyn.SamplesInteractError, match="batch"):
        measured(Lambda(lambda m, x: m.a(x - x.mean()), a=nn.Linear(4, 3)), [good])


@pytest.mark.parametrize("name", ["gru", "lstm", "cells", "state space", "windows folded into the batch"])
def test_whatever_the_routes_they_give_what_single_samples_give(name: str) -> None:
    case = ALL_CASES[name]
    torch.manual_seed(0)
    model, batch = case.model().double(), case.batch(NUM_SAMPLES, torch.float64)
    together = measured(model, [batch], forward=case.forward)
    alone = measured(model, [take(batch, k, k + 1) for k in range(NUM_SAMPLES)], forward=case.forward)
    assert max(reference.errors(together.mean(), alone.mean()).values()) <= 1e-12


def test_a_table_that_two_layers_read() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        places = m.table(torch.arange(5).expand(len(x), -1))
        return m.b(torch.tanh(m.a(x) + places)) + places

    torch.manual_seed(0)
    model = Lambda(run, a=nn.Linear(4, 3), b=nn.Linear(3, 3), table=nn.Embedding(5, 3)).double()
    x = normal(5, 4)(NUM_SAMPLES, torch.float64)
    y = torch.tanh(model.a(x) + model.table.weight)
    d = 2 * y * (1 - y**2) + 2 * (model.b(y) + model.table.weight)
    assert torch.allclose(measured(model, [x]).mean()["table.weight"], d.abs().mean(0), rtol=1e-12)


def test_what_is_looked_at_without_gradients_ends_no_layer() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        z = m.a(x)
        with torch.no_grad():
            scale = z.abs().amax(1, keepdim=True) * m.c(z)
        return m.b(torch.tanh(z)) * scale

    torch.manual_seed(0)
    model = Lambda(run, a=nn.Linear(4, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 3)).double()
    x = normal(4)(NUM_SAMPLES, torch.float64)
    sums = measured(model, [x]).sums
    y = torch.tanh(model.a(x))
    assert torch.allclose(sums["a.bias"], (2 * y * (1 - y**2)).abs().sum(0), rtol=1e-12)
    assert torch.allclose(sums["b.bias"], 2 * model.b(y).abs().sum(0), rtol=1e-12)
    assert not sums["c.bias"].any()


@pytest.mark.parametrize("name", ["BERT, classifier", "ViT", "Llama", "Swin", "GPT-2", "wav2vec2", "BART"])
def test_models_that_others_wrote_do_not_depend_on_the_batch(name: str) -> None:
    pytest.importorskip("transformers", reason="needs transformers: make install brings it")
    specimen = ZOO[name]
    torch.manual_seed(0)
    model, batch = specimen.model(specimen.attentions[0]).to(specimen.dtype), specimen.batch()
    together = measured(model, [batch])
    alone = measured(model, [take(batch, k, k + 1) for k in range(together.num_samples)])
    assert max(reference.errors(together.mean(), alone.mean()).values()) <= specimen.error


def test_the_linear_layers_of_gpt2_end_after_its_own_gelu() -> None:
    pytest.importorskip("transformers", reason="needs transformers: make install brings it")
    torch.manual_seed(0)
    model = ZOO["GPT-2"].model("eager").double()
    ids = integers(23, 6)(3, torch.float64)
    act = importlib.import_module("transformers.activations").NewGELUActivation()
    expected = reference.local_importance(
        model,
        ids,
        3,
        lambda m, x, k: m(input_ids=x[k : k + 1]),
        {f"transformer.h.{i}.mlp.c_fc": act for i in range(2)},
    )
    found = reference.errors(measured(model, [{"input_ids": ids}]).mean(), expected)
    apart = {"transformer.wte.weight", "transformer.wpe.weight"}  # added to each other: one layer
    assert max(error for name, error in found.items() if name not in apart) <= 1e-9, found


def test_efficientnet() -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the weights: make install brings them")
    torch.manual_seed(0)
    specimen = ZOO["EfficientNet-Lite0, trained"]
    model = specimen.model(None).double().eval()
    data = normal(3, 64, 64)(2, torch.float64)
    activations: Activations = {}
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(convs) == len(norms)
    for conv_name, norm_name in zip(convs, norms, strict=True):
        linear = "_project_conv" in conv_name
        then: Callable[[Tensor], Tensor] = (lambda z: z) if linear else F.relu6
        activations[conv_name] = in_eval(model.get_submodule(norm_name), then)
        activations[norm_name] = then
    found = reference.errors(measured(model, [data]).mean(), truth(model, data, activations))
    assert max(found.values()) <= 1e-9, {name: error for name, error in found.items() if error > 1e-9}
