"""Directions against their formulas: how factors of tasks are combined, and what a change is predicted to do."""

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memsyn
from memsyn import KroneckerFactors, Memory
from memsyn.matrices import Layout, Matrix
from memsyn.values.directions import DiagonalDirections, Directions, LayerDirections, damping
from memsyn.values.factors import BOTH, INPUTS_ALONE
from memsyn.values.spectra import Spectrum, spectrum_of
from tests.test_spectra import close, cut, moment

ROUTES = dict.fromkeys(["a.weight", "a.bias", "g.weight", "t.weight", "n.weight", "idle.weight"], "any")
MATRICES = {
    "a.weight": Matrix("a.weight", "a.bias", Layout(1, 4, 5, False, False)),
    "g.weight": Matrix("g.weight", None, Layout(2, 3, 4, False, False)),
    "t.weight": Matrix("t.weight", None, Layout(1, 2, 7, True, True)),
    "idle.weight": Matrix("idle.weight", None, Layout(1, 2, 2, False, False)),
}
SHAPES = {"a.weight": (4, 5), "a.bias": (4,), "g.weight": (6, 4), "t.weight": (7, 2), "n.weight": (3,),
          "idle.weight": (2, 2)}  # fmt: skip


def factors(seed: int, num_samples: int = 6, *, without: tuple[str, ...] = ()) -> KroneckerFactors:
    """Random factors of all kinds of parameters; `idle.weight` met no inputs."""
    generator = torch.Generator().manual_seed(seed)
    sums = {"diagonal/n.weight": torch.rand(3, generator=generator, dtype=torch.float64) * (seed + 1)}
    for key, matrix in MATRICES.items():
        layout = matrix.layout
        sums[f"outputs/{key}"] = moment(layout.groups, layout.outputs, num_samples, seed) * (seed + 2)
        sums[f"inputs/{key}"] = moment(layout.groups, matrix.width, 3 * num_samples, seed + 50)
        if layout.is_table:
            sums[f"inputs/{key}"] = torch.randint(4, (7,), generator=generator).double()
        sums[f"positions/{key}"] = torch.tensor(3.0 * num_samples, dtype=torch.float64)
    sums["inputs/idle.weight"], sums["outputs/idle.weight"] = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    sums = {name: total for name, total in sums.items() if name.partition("/")[2] not in without}
    known = {key: matrix for key, matrix in MATRICES.items() if key not in without}
    return KroneckerFactors(sums, num_samples, known, {n: r for n, r in ROUTES.items() if n not in without})


class Weights(nn.Module):
    """Parameters by name."""

    def __init__(self, **changed: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in (SHAPES | {k.replace("_", "."): shape for k, shape in changed.items()}).items():
            layer, _, own = name.partition(".")
            if layer not in dict(self.named_children()):
                self.add_module(layer, nn.Module())
            if shape:
                self.get_submodule(layer).register_parameter(own, nn.Parameter(torch.randn(shape).double()))


def consolidated(*parts: KroneckerFactors, rank: int | None = None, **options: Any) -> Directions:
    memory = Memory.empty()
    for part in parts:
        memory = memory.consolidate(Weights(), part, rank=rank, **options)
    assert memory.directions is not None
    return memory.directions


def scaled(own: Tensor) -> tuple[Tensor, float]:
    """A matrix, or the numbers of a diagonal, with mean eigenvalue 1, and that mean."""
    if own.ndim == 1:
        return torch.diag_embed(own.unsqueeze(0)) / own.mean(), float(own.mean())
    mean = float(own.diagonal(dim1=1, dim2=2).mean())
    return own / mean, mean


def dense(spectrum: Spectrum | None) -> Tensor:
    assert spectrum is not None
    return spectrum.dense()


RULES = {
    # old and new weight in two consolidations of 6 and 18 samples, the mass
    "sum": ({}, (1.0, 1.0), 2.0),
    "mean": ({"rule": "mean"}, (0.25, 0.75), 1.0),
    "ema": ({"rule": "ema", "decay": 0.2}, (0.2, 0.8), 1.0),
}


@pytest.mark.parametrize("rule", RULES)
def test_tasks_are_combined_by_the_formulas(rule: str) -> None:
    options, (first, second), mass = RULES[rule]
    one, other = factors(1, 6), factors(2, 18)
    found = consolidated(one, other, **options)
    shares = first / mass, second / mass
    assert set(found.layers) == {"a.weight", "g.weight", "t.weight"}
    for key, own in found.layers.items():
        (a, a_mean), (b, b_mean) = scaled(one.inputs(key)), scaled(other.inputs(key))
        (s, s_mean), (r, r_mean) = scaled(one.outputs(key)), scaled(other.outputs(key))
        close(own.inputs.dense(), first * a + second * b)
        close(dense(own.outputs), shares[0] * s + shares[1] * r)
        assert own.mass == pytest.approx(mass)
        assert own.scales == pytest.approx(
            (shares[0] * a_mean + shares[1] * b_mean, shares[0] * s_mean + shares[1] * r_mean)
        )
        assert own.counts == (72, 24)
    own = found.diagonal["n.weight"]
    g, h = one.sums["diagonal/n.weight"] / 6, other.sums["diagonal/n.weight"] / 18
    close(own.squares, first * g / g.mean() + second * h / h.mean())
    assert own.mass == pytest.approx(mass)
    assert own.scale == pytest.approx(float(shares[0] * g.mean() + shares[1] * h.mean()))
    assert found.free == {"idle.weight"}
    # The order of three tasks does not matter to a sum.
    if rule == "sum":
        third = factors(3)
        ways = consolidated(one, other, third), consolidated(third, other, one)
        for key, own in ways[0].layers.items():
            close(own.inputs.dense(), ways[1].layers[key].inputs.dense())
            close(dense(own.outputs), dense(ways[1].layers[key].outputs))
            assert own.mass == 3.0


def test_what_one_side_alone_has_is_taken_over() -> None:
    one, other = factors(1, without=("g.weight", "idle.weight")), factors(2, without=("a.weight", "n.weight"))
    found = consolidated(one, other, rule="mean")
    alone = consolidated(one).layers | consolidated(other).layers
    for key in ("a.weight", "g.weight"):
        assert torch.equal(found.layers[key].inputs.dense(), alone[key].inputs.dense())
        assert found.layers[key].mass == 1.0
        assert found.layers[key].counts == (18, 6)
    assert found.diagonal["n.weight"].mass == 1.0
    assert found.free == {"idle.weight"}
    assert found.names() == {"a.weight", "a.bias", "g.weight", "t.weight", "n.weight"}


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_layer_that_no_output_relied_on_is_free(side: str) -> None:
    """As a pooler is that runs, and whose result is left out; and as an unused head is."""
    one, idle = factors(1), factors(2)
    idle.sums[f"{side}/a.weight"].zero_()
    idle.sums["diagonal/n.weight"].zero_()
    found = consolidated(idle)
    assert set(found.layers) == {"g.weight", "t.weight"}
    assert found.free == {"a.weight", "a.bias", "n.weight", "idle.weight"}
    # Nothing is added to what an earlier task relies on, and it counts as no task.
    both, before = consolidated(one, idle), consolidated(one)
    assert both.layers["a.weight"].mass == 1.0
    assert torch.equal(dense(both.layers["a.weight"].outputs), dense(before.layers["a.weight"].outputs))
    assert torch.equal(both.layers["a.weight"].inputs.dense(), before.layers["a.weight"].inputs.dense())
    assert both.diagonal["n.weight"].mass == 1.0
    assert both.free == {"idle.weight"}
    assert consolidated(idle, one).free == {"idle.weight"}


def test_a_truncated_sum_keeps_the_mean_of_the_rest() -> None:
    one, other = factors(1), factors(2)
    found = consolidated(one, other, rank=2).layers["a.weight"]
    (a, _), (b, _) = scaled(one.inputs("a.weight")), scaled(other.inputs("a.weight"))
    close(found.inputs.dense(), cut(cut(a, 2) + cut(b, 2), 2), 1e-8)
    assert found.inputs.rank == 2
    assert dense(found.outputs).shape == (1, 4, 4)
    assert found.outputs is not None
    assert found.outputs.rank == 4  # half of the width: then all of it is kept
    close(found.inputs.trace(), torch.full((1,), 12.0, dtype=torch.float64))


def grown_factors() -> KroneckerFactors:
    """Task 2, in which the head `a` has 6 outputs and the table `t` 9 rows."""
    found = factors(2)
    layouts = {"a.weight": Layout(1, 6, 5, False, False), "t.weight": Layout(1, 2, 9, True, True)}
    matrices = found.matrices | {key: replace(found.matrices[key], layout=own) for key, own in layouts.items()}
    sums = found.sums | {
        "outputs/a.weight": moment(1, 6, 9, 7),
        "inputs/t.weight": torch.arange(9).double(),
        "diagonal/n.weight": torch.arange(1, 6).double(),
    }
    return replace(found, sums=sums, matrices=matrices)


def test_grown_heads_and_tables() -> None:
    one, other = factors(1), grown_factors()
    bigger = Weights(a_weight=(6, 5), a_bias=(6,), t_weight=(9, 2), n_weight=(5,))
    memory = Memory.empty().consolidate(Weights(), one, rank=None)
    found = memory.consolidate(bigger, other, rank=None).directions
    assert found is not None
    old, new = scaled(one.outputs("a.weight"))[0], scaled(other.outputs("a.weight"))[0]
    close(dense(found.layers["a.weight"].outputs), torch.nn.functional.pad(old, (0, 2, 0, 2)) / 2 + new / 2)
    (a, _), (b, _) = scaled(one.inputs("t.weight")), scaled(other.inputs("t.weight"))
    close(found.layers["t.weight"].inputs.dense(), torch.nn.functional.pad(a, (0, 2, 0, 2)) + b)
    g, h = one.sums["diagonal/n.weight"], other.sums["diagonal/n.weight"]
    close(found.diagonal["n.weight"].squares, torch.nn.functional.pad(g / g.mean(), (0, 2)) + h / h.mean())
    shrunk = memory.consolidate(bigger, other, rank=None)
    with pytest.raises(memsyn.MismatchError, match=r"a.weight was read as .* cannot be combined. Use the model"):
        shrunk.consolidate(bigger, one)


def test_lost_parameters_are_left_out_with_a_warning() -> None:
    memory = Memory.empty().consolidate(Weights(), factors(1), rank=None)
    lost = Weights(a_bias=(), t_weight=(), n_weight=(), idle_weight=())
    found = factors(2, without=("a.weight", "t.weight", "n.weight", "idle.weight"))
    a_alone = factors(2).inputs("a.weight")[:, :-1, :-1]
    found.sums.update({k: v for k, v in factors(2).sums.items() if k.endswith("/a.weight")})
    found.sums["inputs/a.weight"] = a_alone * 18
    found.matrices["a.weight"] = replace(MATRICES["a.weight"], bias=None)
    del found.routes["a.bias"]
    with pytest.warns(memsyn.LostParametersWarning, match=r"3 parameters .* left out: a.bias, n.weight, t.weight"):
        both = memory.consolidate(lost, found, rank=None).directions
    assert both is not None
    assert both.names() == {"a.weight", "g.weight"}
    assert both.free == set()
    # A lost bias takes its column of A along.
    before = scaled(factors(1).inputs("a.weight"))[0][:, :-1, :-1]
    close(both.layers["a.weight"].inputs.dense(), before + scaled(a_alone)[0])


def test_other_architectures_are_refused() -> None:
    memory = Memory.empty()
    with pytest.raises(memsyn.MismatchError, match=r"lacks a.bias, a.weight, g.weight.*Use the model they were"):
        memory.consolidate(nn.Linear(2, 2), factors(1))
    for rank in (0, 2.5, "3"):
        with pytest.raises(memsyn.OptionError, match=f"rank must be a whole number, at least 1, or None; got {rank!r}"):
            memory.consolidate(Weights(), factors(1), rank=rank)  # type: ignore[arg-type]
    with pytest.raises(memsyn.OptionError, match="rule='max' is for importances"):
        memory.consolidate(Weights(), factors(1), rule="max")
    inputs = replace(factors(1), magnitude=INPUTS_ALONE)
    with pytest.raises(memsyn.MismatchError, match="holds second moments of inputs and output gradients of"):
        memory.consolidate(Weights(), factors(1)).consolidate(Weights(), inputs)


# Room, and predicted changes

LAYERS = {
    "groups": st.integers(1, 2),
    "outputs": st.integers(1, 7),
    "inputs": st.integers(1, 9),
    "rank": st.sampled_from([None, 1, 2, 3]),
    "seed": st.integers(0, 99),
}


def a_layer(groups: int, outputs: int, inputs: int, rank: int | None, seed: int) -> LayerDirections:
    a, s = (spectrum_of(moment(groups, n, 4, seed + n), rank)[0] for n in (inputs, outputs))
    matrix = Matrix("w", None, Layout(groups, outputs, inputs, False, False))
    return LayerDirections(matrix, a, s, 2.0, (3.0, 5.0), (1, 1))


# At 10 and an eigenvalue of S of 0, exactly half of a step remains, and rounding decides.
@given(**LAYERS, strength=st.sampled_from([0.13, 1.3, 11.0]))
@settings(max_examples=60, deadline=None)
def test_room_by_counting(groups: int, outputs: int, inputs: int, rank: int | None, seed: int, strength: float) -> None:
    own = a_layer(groups, outputs, inputs, rank, seed)
    for s in (own.outputs, None):
        room = 0
        for group in range(groups):
            rows = torch.ones(1) if s is None else torch.linalg.eigvalsh(s.dense()[group])
            for s_i in rows.tolist():
                for a_j in torch.linalg.eigvalsh(own.inputs.dense()[group]).tolist():
                    room += 1 / (1 + strength * a_j * (0.9 * s_i + 0.1)) > 0.5
        number = groups * inputs * (1 if s is None else outputs)
        assert replace(own, outputs=s).room(strength) == pytest.approx(room / number)
    all_weights = damping(torch.ones(1, 3), torch.ones(1, 2), 1.0)
    assert torch.equal(all_weights, torch.full((1, 2, 3), 0.5))


@given(**LAYERS)
@settings(max_examples=60, deadline=None)
def test_a_predicted_change_is_the_trace(groups: int, outputs: int, inputs: int, rank: int | None, seed: int) -> None:
    own = a_layer(groups, outputs, inputs, rank, seed)
    change = torch.randn(groups, outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, s = own.inputs.dense(), dense(own.outputs)
    trace = (s @ change @ a @ change.mT).diagonal(dim1=1, dim2=2).sum()
    assert own.predicted_change(change) == pytest.approx(float(trace) * 3 * 5 / 2, rel=1e-8, abs=1e-9)
    alone = (change @ a @ change.mT).diagonal(dim1=1, dim2=2).sum()
    inputs_alone = replace(own, outputs=None, scales=(3.0, 1.0))
    assert inputs_alone.predicted_change(change) == pytest.approx(float(alone) * 3 / 2, rel=1e-8, abs=1e-9)


def test_predicted_changes_of_a_model_are_added_up_by_layer() -> None:
    own = factors(1)
    directions = consolidated(own)
    before = {name: p.detach() for name, p in Weights().named_parameters()}
    after = {name: value + torch.randn(value.shape, dtype=value.dtype) for name, value in before.items()}
    change = {name: after[name] - before[name] for name in before}
    found = directions.predicted_change(before, after)

    def trace(key: str, matrix: Tensor) -> float:
        a = own.inputs(key)
        a = torch.diag_embed(a.unsqueeze(0)) if a.ndim == 1 else a
        return float((own.outputs(key) @ matrix @ a @ matrix.mT).diagonal(dim1=1, dim2=2).sum())

    assert found == pytest.approx(
        {
            "a": trace("a.weight", torch.cat([change["a.weight"], change["a.bias"].unsqueeze(1)], 1).unsqueeze(0)),
            "g": trace("g.weight", change["g.weight"].reshape(2, 3, 4)),
            "t": trace("t.weight", change["t.weight"].T.unsqueeze(0)),
            "n": float((own.sums["diagonal/n.weight"] / 6 * change["n.weight"].square()).sum()),
        }
    )
    del after["t.weight"]
    with pytest.raises(memsyn.MismatchError, match=r"t.weight is not among the weights after the change"):
        directions.predicted_change(before, after)


def test_rows_that_the_memory_does_not_know_do_not_count() -> None:
    directions = consolidated(factors(1))
    before = {name: p.detach() for name, p in Weights().named_parameters()}
    after = {name: value + 1 for name, value in before.items()}

    def grown(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        more = ("a.weight", "a.bias", "t.weight", "n.weight")
        return {n: torch.cat([w, torch.randn_like(w[:1])]) if n in more else w for n, w in weights.items()}

    expected = directions.predicted_change(before, after)
    assert directions.predicted_change(before, grown(after)) == expected
    assert directions.predicted_change(grown(before), grown(after)) == expected


def measured(model: nn.Module, data: Tensor, estimator: str = "kronecker", **options: Any) -> KroneckerFactors:
    found = memsyn.measure(model, [data], estimator=estimator, progress=False, **options)
    assert isinstance(found, KroneckerFactors)
    return found


@torch.no_grad()
def mean_change(one: nn.Module, other: nn.Module, data: Tensor) -> float:
    """The mean squared change of the outputs."""
    return float((one(data) - other(data)).square().sum(1).mean())


def moved(model: nn.Module, *names: str) -> nn.Module:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if not names or name in names:
                parameter.add_(torch.randn_like(parameter))
    return other


def test_the_predicted_change_is_the_mean_squared_change_of_one_output() -> None:
    """With one output, d is 1 or -1 times a constant: the signs drop out, and S is exact."""
    torch.manual_seed(0)
    data = torch.randn(50, 4, dtype=torch.float64)
    for model in (nn.Linear(4, 1).double(), nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1)).double()):
        memory = Memory.empty().consolidate(model, measured(model, data), rank=None)
        for layer, names in (
            ("weight", ["weight", "bias"]),
            ("0", ["0.weight", "0.bias"]),
            ("1", ["1.weight", "1.bias"]),
        ):
            if names[0] in dict(model.named_parameters()):
                other = moved(model, *names)
                expected = mean_change(other, model, data)
                found = memory.predicted_change(other, model)
                assert found[layer] == pytest.approx(expected, rel=1e-9)
                assert sum(found.values()) == pytest.approx(expected, rel=1e-9)
                as_weights = memory.predicted_change(other.state_dict(), model.state_dict())
                assert as_weights == pytest.approx(found)


def test_inputs_alone_predict_the_change_of_each_layers_own_output() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(50, 4).double()
    memory = Memory.empty().consolidate(model, measured(model, data, "inputs"), rank=None)
    other = moved(model)
    hidden = torch.tanh(model[0](data)).detach()
    expected = {
        "0": mean_change(other[0], model[0], data),
        "2": mean_change(other[2], model[2], hidden),
    }
    assert memory.predicted_change(other, model) == pytest.approx(expected, rel=1e-9)


def test_the_predicted_change_of_several_outputs_is_right_on_average() -> None:
    """E[v v^T] = I. Of N samples the off-diagonal numbers of S are off by 1 / sqrt(N)."""
    torch.manual_seed(0)
    data = torch.randn(20_000, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    memory = Memory.empty().consolidate(model, measured(model, data), rank=None)
    for name in ("0", "1"):
        other = moved(model, f"{name}.weight", f"{name}.bias")
        expected = mean_change(other, model, data)
        assert memory.predicted_change(other, model)[name] == pytest.approx(expected, rel=0.05)


# Memories


def parts_of(model: nn.Module, **options: Any) -> tuple[KroneckerFactors, KroneckerFactors]:
    """Factors of 12 and of 20 samples."""
    data = torch.randn(32, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return measured(model, data[:12], **options), measured(model, data[12:] * 2, **options)


def a_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 3)).double()


@pytest.mark.parametrize("rank", [None, 2])
def test_merging_replicas_is_consolidating_their_sum(rank: int | None) -> None:
    model = a_model()
    one, other = parts_of(model)
    memories = [Memory.empty().consolidate(model, part, rank=rank) for part in (one, other)]
    merged, expected = memories[0].merge(memories[1]), Memory.empty().consolidate(model, one + other, rank=rank)
    assert merged.directions is not None
    assert expected.directions is not None
    assert [(entry.num_samples, entry.rule) for entry in merged.history] == [(12, "sum"), (20, "merge")]
    lost = max(*one.lost("0.weight", rank).values(), *other.lost("0.weight", rank).values(), 0.0)
    assert (lost == 0.0) == (rank is None)
    for key, own in merged.directions.layers.items():
        same = expected.directions.layers[key]
        assert own.counts == same.counts == (32, 32)
        assert own.mass == same.mass == 1.0
        assert own.scales == pytest.approx(same.scales, rel=1e-9)
        for mine, theirs in ((own.inputs, same.inputs), (own.outputs, same.outputs)):
            whole, close_to = dense(mine), dense(theirs)
            nuclear = float(torch.linalg.eigvalsh(whole - close_to).abs().sum())
            # Each of the two has replaced what it lost, and their sum is cut once more.
            assert nuclear <= (1e-9 if rank is None else 6 * lost) * float(theirs.trace().sum() if theirs else 1)
    for name, single in merged.directions.diagonal.items():
        theirs_too = expected.directions.diagonal[name]
        close(single.squares, theirs_too.squares)
        assert (single.mass, single.scale) == pytest.approx((theirs_too.mass, theirs_too.scale))
    assert set(merged.directions.diagonal) == {"1.weight", "1.bias"}
    # A third replica joins.
    third = Memory.empty().consolidate(model, other, rank=rank)
    if rank is None:
        three = merged.merge(third).directions
        same_three = Memory.empty().consolidate(model, one + other + other, rank=None).directions
        assert three is not None
        assert same_three is not None
        close(three.layers["0.weight"].inputs.dense(), same_three.layers["0.weight"].inputs.dense())
        assert three.layers["0.weight"].scales == pytest.approx(same_three.layers["0.weight"].scales)


def test_merging_a_replica_that_left_a_head_free() -> None:
    one, other = factors(1, 6), factors(2, 18)
    for key in ("inputs/a.weight", "outputs/a.weight", "positions/a.weight", "diagonal/n.weight"):
        other.sums[key].zero_()
    memories = [Memory.empty().consolidate(Weights(), part, rank=None) for part in (one, other)]
    expected = Memory.empty().consolidate(Weights(), one + other, rank=None).directions
    assert expected is not None
    for found in (memories[0].merge(memories[1]).directions, memories[1].merge(memories[0]).directions):
        assert found is not None
        assert found.free == expected.free == {"idle.weight"}
        for key, own in found.layers.items():
            assert own.scales == pytest.approx(expected.layers[key].scales)
            assert own.counts == expected.layers[key].counts
            close(own.inputs.dense(), expected.layers[key].inputs.dense())
            close(dense(own.outputs), dense(expected.layers[key].outputs))
        single, same = found.diagonal["n.weight"], expected.diagonal["n.weight"]
        close(single.squares, same.squares)
        assert single.scale == pytest.approx(same.scale)


def test_memories_of_other_weights_or_other_matrices_are_not_merged() -> None:
    model = a_model()
    one, other = parts_of(model)
    memory = Memory.empty().consolidate(model, one)
    with pytest.raises(memsyn.MismatchError, match=r"of different weights. Only replicas of one model"):
        memory.merge(Memory.empty().consolidate(moved(model), other))
    with pytest.raises(memsyn.MismatchError, match="hold nothing else, and the same second moments"):
        memory.merge(Memory.empty().consolidate(model, measured(model, torch.randn(4, 6).double(), "inputs")))
    changed = replace(other.matrices["0.weight"], layout=Layout(3, 3, 7, False, False))
    own = Memory.empty().consolidate(model, other)
    assert own.directions is not None
    layers = own.directions.layers | {"0.weight": replace(own.directions.layers["0.weight"], matrix=changed)}
    with pytest.raises(memsyn.MismatchError, match=r"0.weight is read as another matrix in the other memory"):
        memory.merge(replace(own, directions=replace(own.directions, layers=layers)))


def test_a_memory_of_importance_and_directions(tmp_path: Any) -> None:
    model = a_model()
    one, other = parts_of(model)
    importance = memsyn.measure(model, [torch.randn(5, 6).double()], progress=False)
    memory = Memory.empty().consolidate(model, importance, label="both").consolidate(model, one)
    memory = memory.consolidate(model, importance, rule="mean").consolidate(model, other, rule="mean")
    assert memory.quantity == ("squared_l2_norm", "abs")
    assert memory.directions_quantity == ("signed_outputs", BOTH)
    assert memory.counts == dict.fromkeys(importance.sums, 10)
    assert [entry.num_samples for entry in memory.history] == [5, 12, 5, 20]
    assert memory.num_samples == 42
    alone = Memory.empty().consolidate(model, one).consolidate(model, other, rule="mean").directions
    assert memory.directions is not None
    assert alone is not None
    for key, own in memory.directions.layers.items():  # the samples of an importance do not weigh
        assert torch.equal(own.inputs.dense(), alone.layers[key].inputs.dense())
    memory.save(tmp_path / "m.safetensors")
    for found in (Memory.load(tmp_path / "m.safetensors"), Memory.load(tmp_path / "m.safetensors", like=model)):
        assert (found.history, found.counts, found.names) == (memory.history, memory.counts, memory.names)
        assert found.directions is not None
        assert found.directions.header() == memory.directions.header()
        for group, members in memory.directions.groups().items():
            assert all(torch.equal(found.directions.groups()[group][n], tensor) for n, tensor in members.items())
        assert all(torch.equal(found.importance[n], own) for n, own in memory.importance.items())
        # The anchor is the reference of predicted changes.
        other_model = moved(model)
        assert found.predicted_change(other_model) == found.predicted_change(other_model, model)
    with pytest.raises(memsyn.MismatchError, match="only memories of one consolidation each can be merged"):
        memory.merge(memory)


def test_load_warns_if_directions_are_of_other_weights(tmp_path: Any) -> None:
    model = a_model()
    memory = Memory.empty().consolidate(model, parts_of(model)[0])
    memory.save(tmp_path / "m.safetensors")
    assert Memory.load(tmp_path / "m.safetensors", like=model).quantity is None
    with pytest.warns(memsyn.MovedWeightsWarning, match="6 of 6 parameters .the first is 0.bias. have other weights"):
        Memory.load(tmp_path / "m.safetensors", like=moved(model, "3.bias"))
    with pytest.raises(memsyn.OptionError, match="holds no anchor: give the weights that were measured as reference="):
        memory.predicted_change(model)
    with pytest.raises(memsyn.OptionError, match="holds no directions: measure with estimator='kronecker'"):
        Memory.empty().predicted_change(model)
    with pytest.warns(memsyn.MovedWeightsWarning, match="measured at other weights"):
        Memory.empty().consolidate(moved(model), replace(parts_of(model)[0], fingerprint=memsyn.fingerprint(model)))


def test_check_of_directions() -> None:
    model = a_model()
    memory = Memory.empty().consolidate(model, parts_of(model)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.check(model)
    grown = nn.Sequential(model[0], model[1], model[2], nn.Linear(9, 5).double(), nn.Linear(2, 2))
    with pytest.warns(memsyn.NewParametersWarning, match=r"2 parameters .* stay free to change: 4.weight, 4.bias"):
        memory.check(grown)
    for other, message in (
        (nn.Sequential(model[0], nn.LayerNorm(9), model[2], nn.Linear(9, 2)), r"3.weight \(expected Layout.*\(2, 9\)"),
        (nn.Sequential(model[0], nn.LayerNorm(8), model[2], model[3]), r"1.weight \(expected \(9,\), .* \(8,\)\)"),
        (nn.ModuleDict({"x": nn.Linear(6, 9)}), "the model has none of its parameters"),
    ):
        with pytest.raises(memsyn.MismatchError, match=message):
            memory.check(other)


def test_a_scalar_without_a_matrix() -> None:
    directions = Directions({}, {"scale": DiagonalDirections(torch.ones(()), 2.0, 3.0)})
    before, after = {"scale": torch.tensor(1.0)}, {"scale": torch.tensor(3.0)}
    assert directions.predicted_change(before, after) == {"scale": pytest.approx(1.0 * 4 * 3 / 2)}


@pytest.mark.parametrize(
    ("rule", "decay", "expected"),
    [
        ("sum", None, (2 + 3 + 7) / 3),
        ("mean", None, (2 + 3 + 2 * 7) / 4),
        ("ema", 0.25, 2.75 / 4 + 7 * 0.75),
    ],
)
def test_squared_outputs_are_combined_as_output_gradients_are(rule: str, decay: float | None, expected: float) -> None:
    memory = Memory.empty()
    for number, (length, samples) in enumerate(((2.0, 6), (3.0, 6), (7.0, 12))):
        own = factors(number)
        scale = samples / own.num_samples
        sums = {name: total * scale for name, total in own.sums.items()}
        sums["squared_outputs/"] = torch.tensor(length * samples, dtype=torch.float64)
        found = replace(own, sums=sums, num_samples=samples)
        memory = memory.consolidate(Weights(), found, rule=rule, decay=decay)
    assert memory.directions is not None
    assert memory.directions.squared_outputs == pytest.approx(expected, rel=1e-12)
    assert memory.directions.mass == memory.directions.layers["a.weight"].mass
