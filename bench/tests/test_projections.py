"""Projection, GPM and Adam-NSCL against their definitions, on small networks."""

import copy
from dataclasses import replace

import pytest
import torch
from bench.tests import tiny
from bench.tests.test_methods import SETTINGS, TASKS, build, course, plain_course, plain_steps, training
from tests.training import assert_close
from torch import nn

from memsyn import Memory, measure
from memsyn.matrices import Layout, Matrix
from memsyn.values.spectra import Spectrum, spectrum_of
from memsyn_bench.methods.method import FineTuning
from memsyn_bench.methods.projections import (
    LARGEST_SHARE,
    STRENGTH,
    adam_nscl,
    extended_basis,
    gpm,
    outside_null_space,
    without_span,
)
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.running import runner
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.networks import SharedHead
from memsyn_bench.sequences.sequences import SEQUENCES

PROJECTED = ("projected", "projected-full", "projected-inputs")
LAYER = "body.1.weight"
FLOOR = 0.1
"""mu of memsyn's projection."""


def joined(model):
    """The backbone's matrix with its bias as the last column, (8, 13)."""
    return torch.cat([model.body[1].weight, model.body[1].bias.unsqueeze(1)], 1).detach().clone()


def set_joined(model, matrix):
    model.body[1].weight.data, model.body[1].bias.data = matrix[:, :-1].clone(), matrix[:, -1].clone()


def inputs_of(index):
    """The inputs of the backbone's matrix in a task, with that of the bias, as columns: R (13, 12)."""
    images = TASKS[index].train_images.flatten(1)
    return torch.cat([images, torch.ones(len(images), 1, dtype=images.dtype)], 1).T


def factors_of(model, index, estimator="inputs"):
    batches, forward = [TASKS[index].train_images], lambda model, images: model(images, index)
    return measure(model, batches, forward=forward, estimator=estimator, progress=False)


# memsyn's projection


def damped(change, found, by_outputs):
    """U [(U^T D V)_ij / (1 + c a_j ((1 - mu) s_i + mu))] V^T, from whole second moments scaled to mean eigenvalue 1."""

    def spectrum(moment):
        return torch.linalg.eigh(moment[0] / moment[0].diagonal().mean())

    a, v = spectrum(found.inputs(LAYER))
    s, u = spectrum(found.outputs(LAYER)) if by_outputs else (torch.ones(8).double(), torch.eye(8).double())
    weights = STRENGTH * a * ((1 - FLOOR) * s.unsqueeze(1) + FLOOR)
    return u @ ((u.T @ change @ v) / (1 + weights)) @ v.T


@pytest.mark.parametrize("name", PROJECTED)
def test_what_a_task_changes_is_damped_when_it_ends(name):
    """Gradients are damped in each step. A task has 6 steps, and weights are after 10: all of them wait for `end`."""
    first, second = course(name, 1).models[0], course(name, 2).models[1]
    assert_close(first, plain_course(1)[0])
    plain = copy.deepcopy(first)
    estimator = "inputs" if name == "projected-inputs" else "kronecker"
    found = factors_of(first, 0, estimator)

    def damp_gradients(_):
        layer = plain.body[1]
        own = torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(1)], 1)
        own = damped(own, found, estimator == "kronecker")
        layer.weight.grad, layer.bias.grad = own[:, :-1].clone(), own[:, -1].clone()

    plain_steps(plain, 1, observe=damp_gradients)
    change = damped(joined(plain) - joined(first), found, estimator == "kronecker")
    expected = copy.deepcopy(plain)
    set_joined(expected, joined(first) + change)
    assert_close(second, expected)  # the heads too: the new one is not protected
    assert float(change.norm()) < 0.9 * float((joined(plain) - joined(first)).norm())


@pytest.mark.parametrize("name", PROJECTED)
def test_the_directions_of_tasks_are_consolidated(name):
    found = course(name, 2)
    estimator, rank = "inputs" if name == "projected-inputs" else "kronecker", None if name == "projected-full" else 64
    expected = Memory.empty()
    for index, model in enumerate(found.models):
        expected = expected.consolidate(model, factors_of(model, index, estimator), rank=rank)
    own = found.method.memory.directions
    assert {key: layer.mass for key, layer in own.layers.items()} == {
        LAYER: 2.0, "heads.0.weight": 1.0, "heads.1.weight": 1.0
    }  # fmt: skip
    for group, members in expected.directions.groups().items():
        assert own.groups()[group].keys() == members.keys()
        for key, value in members.items():
            assert torch.allclose(own.groups()[group][key], value, rtol=1e-8), (group, key)


def test_bytes_of_projections_are_those_of_the_tensors_held():
    def spectrum(width):
        return width + width * width + 1

    inputs = spectrum(13) + 2 * spectrum(9)  # of the backbone and two heads, with the inputs of biases
    outputs = spectrum(8) + 2 * spectrum(3)
    excerpts = (12 * 8 + 8) + 2 * (8 * 3 + 3)  # up to 256 values of each parameter: here all
    bases = {name: course(name, 2).method.kept["bases"][LAYER].shape[2] for name in ("gpm", "adam-nscl")}
    weights = sum(parameter.numel() for parameter in build().parameters())
    expected = {  # numbers kept after two tasks
        "projected": inputs + outputs + excerpts,
        "projected-full": inputs + outputs + excerpts,
        "projected-inputs": inputs + excerpts,
        "gpm": 13 * bases["gpm"],
        "adam-nscl": 13 * 13 + 1 + 13 * bases["adam-nscl"],
    }
    for name, numbers in expected.items():
        found, once = course(name, 2), course(name, 1)
        assert found.method.num_bytes() == 8 * numbers, name
        working = weights if name == "adam-nscl" else 0
        assert found.trainings[1].num_bytes == once.method.num_bytes() + 8 * working, name


@pytest.fixture
def _tiny_sequence(monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)


@pytest.mark.usefixtures("_tiny_sequence")
@pytest.mark.parametrize("name", PROJECTED)
def test_a_run_scores_the_projected_weights_and_writes_the_memory(tmp_path, monkeypatch, name):
    trained, scored = [], []

    def noted_training(now, method, **options):
        result = train(now, method, **options)
        trained.append(now.model.body.layers[0].weight.detach().clone())
        return result

    def noted_score(model, tasks, kind):
        if kind == tiny.SEQUENCE.scorings[0]:
            scored.append(model.body.layers[0].weight.detach().clone())
        return tuple(0.0 for _ in tasks)

    monkeypatch.setattr(runner, "train", noted_training)
    monkeypatch.setattr(runner, "score", noted_score)
    runner.run(replace(SETTINGS, epochs=1), methods=[name], num_seeds=1, out=tmp_path)
    assert [torch.equal(*pair) for pair in zip(trained, scored, strict=True)] == [True, False, False]
    memory = Memory.load(tmp_path / f"{name}-seed0.memsyn.safetensors")
    assert {key: layer.mass for key, layer in memory.directions.layers.items()} == {
        **{f"body.layers.{place}.weight": 3.0 for place in (0, 4, 8, 12)},
        **{f"heads.{index}.weight": 1.0 for index in range(3)},
    }
    layer = memory.directions.layers["body.layers.4.weight"]
    assert layer.inputs.vectors.shape == (1, 72, 72)  # of 72 inputs, 64 are more than half: all are kept
    assert (layer.outputs is None) == (name == "projected-inputs")


# GPM and Adam-NSCL


def moment(*columns):
    """The spectrum of R R^T, with columns of R."""
    r = torch.tensor(columns, dtype=torch.float64).T
    return spectrum_of((r @ r.T).unsqueeze(0), None)[0]


def absolute(basis):
    """Without the signs of its columns, which are arbitrary."""
    return basis.abs()[0].round(decimals=8).T.tolist()


E1, E2, E3 = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("old", "share", "expected"),
    [
        (None, 0.89, [E1]),  # ||R||^2 = 9 + 1, and 9 are in the first direction
        (None, 0.91, [E1, E2]),
        (None, 1.0, [E1, E2]),  # the third direction has no energy
        (E2, 0.09, [E2]),  # 1 is spanned already
        (E2, 0.11, [E2, E1]),
        (E3, 0.89, [E3, E1]),
        ([0.6, 0.8, 0.0], 0.38, [[0.6, 0.8, 0.0]]),  # 0.36 * 9 + 0.64 * 1 = 3.88 are spanned
        ([0.6, 0.8, 0.0], 0.39, [[0.6, 0.8, 0.0], [0.8, 0.6, 0.0]]),
    ],
)
def test_a_basis_gets_the_leading_directions_that_it_does_not_span(old, share, expected):
    basis = None if old is None else torch.tensor(old, dtype=torch.float64).reshape(1, 3, 1)
    found = extended_basis(basis, moment([3.0, 0.0, 0.0], [0.0, 1.0, 0.0]), share)
    assert absolute(found) == expected
    assert torch.allclose(found[0].T @ found[0], torch.eye(len(expected)).double())


def test_groups_of_a_convolution_have_bases_of_their_own_and_zeros_where_one_is_smaller():
    wide = Spectrum(torch.tensor([[5.0, 5.0], [9.0, 1.0]]), torch.eye(2).expand(2, 2, 2), torch.zeros(2))
    assert extended_basis(None, wide, 0.9).abs().tolist() == [[[1, 0], [0, 1]], [[1, 0], [0, 0]]]
    assert outside_null_space(wide, 2.0).abs().tolist() == [[[0], [0]], [[1], [0]]]


def test_a_tables_rows_are_directions():
    counts = Spectrum(torch.tensor([[0.0, 9.0, 1.0]]), None, torch.zeros(1))
    assert absolute(extended_basis(None, counts, 0.8)) == [E2]
    assert absolute(outside_null_space(counts)) == [E2, E3]


@pytest.mark.parametrize(
    ("values", "rest", "expected"),
    [
        ([10.5, 9.5, 1.0], 0.0, [E1]),
        ([5.0, 2.0, 1.0], 0.0, []),
        ([5.0, 1e-3, 0.0], 0.0, [E1, E2]),  # a null space as such, of rounded numbers too
        ([5.0, 1e-6, 1e-9], 0.0, [E1]),
        ([5.0], 0.4, [E1]),  # of a sketch: the smallest is the mean of the rest
        ([5.0], 0.6, []),
    ],
)
def test_the_null_space_has_the_eigenvalues_up_to_ten_times_the_smallest(values, rest, expected):
    vectors = torch.eye(3)[:, : len(values)].unsqueeze(0)
    found = outside_null_space(Spectrum(torch.tensor([values]), vectors, torch.tensor([rest])))
    assert found.shape == (1, 3, len(expected))
    assert absolute(found) == expected


def test_the_span_is_taken_out_of_a_weight_with_its_bias_however_it_is_laid_out():
    source = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 4, 2, generator=source))[0]
    weight, bias = torch.randn(10, 3, generator=source), torch.randn(10, generator=source)
    grouped = Matrix("w", "b", Layout(2, 5, 3, False, False))
    found = without_span(grouped, basis, {"w": weight, "b": bias})
    for group in range(2):
        rows = slice(5 * group, 5 * group + 5)
        whole = torch.cat([weight[rows], bias[rows, None]], 1) @ (torch.eye(4) - basis[group] @ basis[group].T)
        assert torch.allclose(torch.cat([found["w"][rows], found["b"][rows, None]], 1), whole, atol=1e-6)
    turned = Matrix("w", None, Layout(1, 3, 4, True, False))
    weight = torch.randn(4, 3, generator=source)
    found = without_span(turned, basis[:1], {"w": weight})
    assert found.keys() == {"w"}
    assert torch.allclose(found["w"], (torch.eye(4) - basis[0] @ basis[0].T) @ weight, atol=1e-6)


def slow_gpm(num_tasks):
    """M after some tasks, from the inputs themselves."""
    basis = torch.zeros(13, 0).double()
    for index in range(num_tasks):
        r, share = inputs_of(index), 0.97 + 0.003 * index
        residual = r - basis @ basis.T @ r
        left, singular, _ = torch.linalg.svd(residual)
        count, covered = 0, (basis @ basis.T @ r).square().sum()
        while covered < share * r.square().sum():
            covered += singular[count] ** 2
            count += 1
        basis = torch.cat([basis, left[:, :count]], 1)
    return basis


def slow_null_space(num_tasks):
    """U2 after some tasks, from the inputs themselves."""
    r = torch.cat([inputs_of(index) for index in range(num_tasks)], 1)
    left, singular, _ = torch.linalg.svd(r)
    values = torch.zeros(13).double()
    values[: len(singular)] = singular.square()
    return left[:, values <= 10 * max(float(values[-1]), 2.0**-52 * float(values[0]))]


@pytest.mark.parametrize("num_old", [1, 2])
def test_gpm_projects_the_gradient_before_the_optimizers_step(num_old):
    found = course("gpm", num_old + 1)
    basis = slow_gpm(num_old)
    assert 0 < basis.shape[1] < 13
    expected = copy.deepcopy(found.models[num_old - 1])
    weight, bias = expected.body[1].weight, expected.body[1].bias

    def project(gradients):
        whole = torch.cat([weight.grad, bias.grad.unsqueeze(1)], 1)
        whole = whole - whole @ basis @ basis.T
        weight.grad, bias.grad = whole[:, :-1].clone(), whole[:, -1].clone()

    plain_steps(expected, num_old, project)
    assert_close(found.models[num_old], expected)


@pytest.mark.parametrize("num_old", [1, 2])
def test_adam_nscl_projects_the_change_after_the_optimizers_step(num_old):
    found = course("adam-nscl", num_old + 1)
    null_space = slow_null_space(num_old)
    assert 0 < null_space.shape[1] < 13
    expected = copy.deepcopy(found.models[num_old - 1])

    def project(gradients):
        before = joined(expected)
        return lambda: set_joined(expected, before + (joined(expected) - before) @ null_space @ null_space.T)

    plain_steps(expected, num_old, project)
    assert_close(found.models[num_old], expected)


@pytest.mark.parametrize(("name", "adds"), [("gpm", gpm), ("adam-nscl", adam_nscl)])
def test_the_first_task_is_fine_tuning_and_its_head_is_not_kept(name, adds):
    found = course(name, 1)
    assert_close(found.models[0], plain_course(1)[0])
    assert found.method.kept["bases"].keys() == {LAYER}
    again = adds(replace(factors_of(build(), 0), matrices={}), found.method.kept, 1)
    assert again["bases"] == found.method.kept["bases"]


def test_the_covariance_counts_every_sample_of_every_task_alike():
    sums = course("adam-nscl", 2).method.kept["sums"]
    r = torch.cat([inputs_of(0), inputs_of(1)], 1)
    assert sums.keys() == {f"inputs/{LAYER}", f"positions/{LAYER}"}
    assert torch.allclose(sums[f"inputs/{LAYER}"][0], r @ r.T)
    assert float(sums[f"positions/{LAYER}"]) == 24


def test_the_share_of_gpm_stays_below_one():
    factors, basis = factors_of(build(), 0), torch.eye(13).double()
    whole = gpm(factors, {}, 1000)["bases"][LAYER]
    expected = extended_basis(None, factors.spectrum("inputs", LAYER)[0], LARGEST_SHARE)
    assert torch.equal(whole, expected)
    kept = {"bases": {LAYER: basis.unsqueeze(0)}}
    assert torch.equal(gpm(factors, kept, 1)["bases"][LAYER], kept["bases"][LAYER])


def test_an_unused_matrix_has_no_basis():
    factors = factors_of(build(), 0)
    idle = replace(factors, sums={**factors.sums, f"inputs/{LAYER}": torch.zeros(1, 13, 13).double()})
    assert gpm(idle, {}, 0)["bases"].keys() == adam_nscl(idle, {}, 0)["bases"].keys() == {"heads.0.weight"}


@pytest.mark.parametrize(("name", "optimizer", "is_exact"), [
    ("gpm", "sgd", True), ("gpm", "adam", False), ("adam-nscl", "sgd", True), ("adam-nscl", "adam", True)
])  # fmt: skip
def test_outputs_on_the_basis_stay_with_sgd_and_by_gpm_not_with_adam(name, optimizer, is_exact):
    first, second = course(name, 2, optimizer=optimizer).models
    basis = course(name, 1, optimizer=optimizer).method.kept["bases"][LAYER][0]
    change = joined(second) - joined(first)
    assert float(change.norm()) > 1e-4
    share = float((change @ basis).norm() / change.norm())
    assert share < 1e-8 if is_exact else share > 0.05


def learned(model, method, index, **changes):
    settings = replace(SETTINGS, **changes)
    now = task_training(model, tiny.make_task(index, 8), index, settings=settings, augment=tiny.augment, seed=0)
    train(now, method, after_epoch=lambda: None)
    method.end(now)
    return copy.deepcopy(model)


@pytest.mark.parametrize("name", ["gpm", "adam-nscl"])
def test_normalisations_are_frozen_after_the_first_task_and_convolutions_are_projected(name):
    start = tiny.build(tiny.load(8), generator(0, 0))
    method, model = METHODS[name].make(0.0), copy.deepcopy(start)
    first = learned(model, method, 0, optimizer="sgd")
    bases = method.kept["bases"]
    second = learned(model, method, 1, optimizer="sgd")
    assert bases.keys() == {f"body.layers.{place}.weight" for place in (0, 4, 8, 12)}
    for place in (1, 5, 9, 13):
        before, now, then = (net.body.layers[place].weight for net in (start, first, second))
        assert not torch.equal(before, now)
        assert torch.equal(now, then)
    moved = 0
    for key, basis in bases.items():
        change = (second.get_parameter(key) - first.get_parameter(key)).detach().flatten(1)
        assert float((change @ basis[0]).norm()) <= 1e-5 * max(1.0, float(change.norm()))
        moved += bool(change.norm() > 1e-4)
    assert moved > 0
    assert not torch.equal(first.heads[1].weight, second.heads[1].weight)
    assert torch.equal(first.heads[0].weight, second.heads[0].weight)


@pytest.mark.parametrize("name", ["gpm", "adam-nscl"])
def test_a_warm_up_trains_the_head_alone(name):
    found = course(name, 2, warmup=2).models
    assert torch.equal(joined(found[0]), joined(found[1]))
    assert not torch.equal(found[0].heads[1].weight, found[1].heads[1].weight)


@pytest.mark.parametrize("name", ["gpm", "adam-nscl"])
def test_a_head_that_tasks_share_is_projected_too(name):
    model = SharedHead(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh()), 8, num_classes=3).double()
    method, before = METHODS[name].make(0.0), None
    for index in (0, 1):
        now = training(model, index, optimizer="sgd")
        train(now, method, after_epoch=lambda: None)
        if index == 0:
            method.end(now)
            before, basis = copy.deepcopy(model.heads[0]), method.kept["bases"]["heads.0.weight"][0]
    change = torch.cat([model.heads[0].weight - before.weight, (model.heads[0].bias - before.bias).unsqueeze(1)], 1)
    change = change.detach()
    assert float((change @ basis).norm()) < 1e-12
    assert float(change.norm()) > 1e-4


def test_neither_holds_anything_before_the_first_task():
    for name in ("gpm", "adam-nscl"):
        method = METHODS[name].make(0.0)
        assert (method.num_bytes(), method.kept, METHODS[name].strength) == (0, {}, None)
        assert METHODS[name].summary.count("\n") == 0
        assert not isinstance(method, FineTuning)
