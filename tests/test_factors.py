"""Kronecker factors: exact over the table of cases, the same for every batch size, and without side effects."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsyn
from memsyn.batches import model_input, take
from memsyn.matrices import probe_matrix
from memsyn.measuring.objectives import output_tensor
from tests import reference
from tests.cases import CASES, Case, Hidden, Lambda, hidden, normal
from tests.test_measure import NUM_SAMPLES, Snapshot, build, trained_a_little


def run(case: Case) -> Any:
    def of_sample(model: nn.Module, whole: Any, k: int) -> Tensor:
        sample = take(whole, k, k + 1)
        if case.forward is not None:
            return case.forward(model, sample)
        inputs = model_input(sample)
        return output_tensor(model(**inputs) if isinstance(inputs, dict) else model(inputs))

    return of_sample


def factors(case: Case, model: nn.Module, batches: Any, estimator: str = "kronecker") -> memsyn.KroneckerFactors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", memsyn.SlowParametersWarning)
        found = memsyn.measure(model, batches, forward=case.forward, estimator=estimator, progress=False)
    assert isinstance(found, memsyn.KroneckerFactors)
    return found


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))


quiet = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths", "ignore:enable_nested_tensor"
)


@quiet
@pytest.mark.parametrize("name", CASES)
def test_factors_equal_the_batch_of_one_reference(name: str) -> None:
    case = CASES[name]
    model, batch = build(case, torch.float64)
    found = factors(case, model, [batch])
    expected = reference.second_moments(*build(case, torch.float64), NUM_SAMPLES, run(case))
    for key, total in expected.items():
        if name == "weight used outside its layer" and key.endswith("/a.weight"):
            continue  # hooks on layers do not see the other use; MatrixFinder compares the sum of d x^T with autograd
        own = found.sums.get(key, total)
        if own.ndim == 3 and own.shape[1] == total.shape[1] - 1:  # the bias is not a column in all uses of the weight
            total = total[:, :-1, :-1]
        assert error(own, total) <= 1e-9, key
    # What is no matrix has the squared gradient of the same objective.
    model, batch = build(case, torch.float64)
    squares = {key: 0.0 for key in found.sums if key.startswith("diagonal/")}
    for k in range(NUM_SAMPLES):
        output = run(case)(model.eval(), batch, k).flatten()
        parameters = dict(model.named_parameters())
        names = [key.removeprefix("diagonal/") for key in squares]
        score = (output * reference.signs(k, len(output))).sum()
        grads = torch.autograd.grad(score, [parameters[n] for n in names], allow_unused=True) if names else ()
        for own, grad in zip(names, grads, strict=True):
            squares[f"diagonal/{own}"] += 0 if grad is None else grad.to_dense().square()
    for key, total in squares.items():
        zero = torch.zeros_like(found.sums[key])
        assert float((found.sums[key] - (zero + total)).norm()) <= 1e-9 * max(1e-3, float((zero + total).norm())), key


@quiet
@pytest.mark.parametrize("name", CASES)
def test_factors_do_not_depend_on_the_batch_size(name: str) -> None:
    case = CASES[name]
    model, batch = build(case, torch.float64)
    whole = factors(case, model, [batch])
    single = factors(case, model, [take(batch, k, k + 1) for k in range(NUM_SAMPLES)])
    parts = factors(case, model, [take(batch, 0, 2), take(batch, 2, 7)])
    largest = max(float(total.abs().max()) for total in whole.sums.values())
    for other in (single, parts):
        assert other.num_samples == NUM_SAMPLES
        for key in whole.sums.keys() & other.sums.keys():
            assert float((other.sums[key] - whole.sums[key]).abs().max()) <= 1e-9 * largest, key
        # A weight that a part of the batches reads in another way, or not at all, may be measured in another way.
        assert set(whole.matrices) == set(other.matrices) or name in {"experts"}


@quiet
@pytest.mark.parametrize("name", CASES)
def test_inputs_alone_are_those_of_both(name: str) -> None:
    case = CASES[name]
    model, batch = build(case, torch.float64)
    both, inputs = factors(case, model, [batch]), factors(case, model, [batch], "inputs")
    assert set(both.matrices) <= set(inputs.matrices)
    for key, total in both.sums.items():
        if key.startswith(("inputs", "positions")):
            assert error(inputs.sums[key], total) <= 1e-9, key
    assert not any(key.startswith("outputs") for key in inputs.sums)


# Side effects


def assert_unchanged_by(model: nn.Module, measuring: Callable[[], object]) -> None:
    snapshot = Snapshot(model)
    measuring()
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    "options", [{"estimator": "kronecker"}, {"estimator": "kronecker", "rank": 2}, {"estimator": "inputs"}]
)
def test_the_model_is_bit_for_bit_unchanged(options: Any) -> None:
    model = trained_a_little(CASES["residual network"].model())
    data = torch.utils.data.TensorDataset(torch.randn(10, 3, 8, 8))
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True)
    good, bad = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 8, 8)
    assert_unchanged_by(model, lambda: memsyn.measure(model, loader, progress=False, **options))

    def batches() -> Any:
        yield good
        raise RuntimeError("the disk is gone")

    def failing() -> None:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            memsyn.measure(model, batches(), progress=False, **options)

    assert_unchanged_by(model, failing)

    def broken() -> None:
        # The model's own error, not one of a sum that does not fit.
        with pytest.raises(
            memsyn.BatchError, match=r"batch 1: the model failed on it: .* to have 3 channels, but got 5"
        ):
            memsyn.measure(model, [good, bad], progress=False, **options)

    assert_unchanged_by(model, broken)


@pytest.mark.parametrize(
    "name", ["embedding with max_norm", "forward=", "tied embedding and head", "older weight norm", "out of sight"]
)
def test_models_with_slow_or_odd_parts_are_unchanged(name: str) -> None:
    case = CASES[name]
    model, batch = build(case, torch.float32)
    assert_unchanged_by(model, lambda: factors(case, model, [batch]))


# Sums


@quiet
@pytest.mark.parametrize("name", ["mlp", "conv1d", "residual network", "transformer, layer norm", "layer used twice"])
def test_a_sum_is_measuring_together(name: str) -> None:
    """The signs of a sample belong to its place in the data, so that outputs of the second part differ in them."""
    case = CASES[name]
    model, batch = build(case, torch.float64)
    first, second = (factors(case, model, [take(batch, *part)]) for part in ((0, 3), (3, NUM_SAMPLES)))
    whole, added = factors(case, model, [batch]), first + second
    assert (added.num_samples, added.matrices) == (NUM_SAMPLES, whole.matrices)
    assert added.sums.keys() == whole.sums.keys()
    for key, total in whole.sums.items():
        if key.startswith(("inputs", "positions")):
            assert error(added.sums[key], total) <= 1e-9, key
        else:
            assert torch.equal(added.sums[key], first.sums[key] + second.sums[key])
    # A loader whose first batch is the first part measures that part with the same signs.
    for key, total in first.sums.items():
        again = factors(case, model, [take(batch, 0, 2), take(batch, 2, 3)])
        assert error(again.sums[key], total) <= 1e-9 or float(total.norm()) <= 1e-12, key


def test_signs_do_not_matter_to_one_output() -> None:
    """Then d d^T and squared gradients are the same for every sign, and a sum is exact on both sides."""
    torch.manual_seed(0)
    model, data = (
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).double(),
        normal(4)(9, torch.float64),
    )
    parts = [memsyn.measure(model, [own], estimator="kronecker", progress=False) for own in (data, data[:4], data[4:])]
    added = parts[1] + parts[2]
    for key, total in parts[0].sums.items():
        assert error(added.sums[key], total) <= 1e-9, key


def test_factors_that_do_not_add_up() -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3), torch.randn(5, 4)
    found, inputs, sketch = (
        memsyn.measure(model, [data], estimator=estimator, rank=rank, progress=False)
        for estimator, rank in (("kronecker", None), ("inputs", None), ("kronecker", 1))
    )
    with pytest.raises(memsyn.MismatchError, match="cannot add factors of different quantities"):
        found + inputs
    with pytest.raises(memsyn.MismatchError, match=r"only one of the two holds it. Measure both with one estimator"):
        found + sketch
    marked = [replace(found, fingerprint=own) for own in ("sha256:1", "sha256:2")]
    with pytest.raises(memsyn.MismatchError, match="measured at different weights"):
        marked[0] + marked[1]
    assert (marked[0] + marked[0]).fingerprint == "sha256:1"
    assert (marked[0] + found).fingerprint is None
    other = replace(found, matrices={"weight": replace(found.matrices["weight"], bias=None)})
    with pytest.raises(memsyn.MismatchError, match="weight: the two read this weight as a matrix in different ways"):
        found + other
    # Here a matrix, there squared gradients: neither can be dropped, unless it is zero.
    squares = {"diagonal/weight": torch.zeros(3, 4), "diagonal/bias": torch.ones(3)}
    with pytest.raises(memsyn.MismatchError, match="bias: only one of the two has measured this parameter as a matrix"):
        found + replace(found, sums=squares, matrices={})
    zero = {name: total * 0 for name, total in squares.items()}
    zero["squared_outputs/"] = found.sums["squared_outputs/"]
    added = found + replace(found, sums=zero, matrices={})
    assert (added.sums.keys(), added.num_samples) == (found.sums.keys(), 10)
    for count in (0, 2.5):
        with pytest.raises(memsyn.OptionError, match=r"at least one sample|num_samples must be a whole number"):
            replace(found, num_samples=count)
    for side in ("inputs", "outputs"):
        with pytest.raises(memsyn.MismatchError, match=f"there is no whole second moment of the {side} of 'x'"):
            getattr(found, side)("x")


# Padding, sketches, tables


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(input_ids))))


@pytest.mark.parametrize("estimator", ["kronecker", "inputs"])
def test_padding_does_not_count(estimator: str) -> None:
    """Sentences of 5, 2 and 3 tokens: padded with a mask, and without padding one by one."""
    torch.manual_seed(0)
    model, lengths = Tokens().double(), [5, 2, 3]
    ids = torch.randint(1, 9, (3, 5))
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()

    def of(*batches: Any) -> memsyn.KroneckerFactors:
        return memsyn.measure(model, batches, estimator=estimator, progress=False)

    padded = of({"input_ids": ids * mask, "attention_mask": mask})
    other_fill = of({"input_ids": ids * mask + (1 - mask) * 7, "attention_mask": mask})
    bare = of(*({"input_ids": ids[k : k + 1, :n]} for k, n in enumerate(lengths)))
    assert set(padded.matrices) == {"table.weight", "inner.weight", "head.weight"}
    for key, total in padded.sums.items():
        assert error(other_fill.sums[key], total) <= 1e-12, key
        if key.startswith(("inputs", "positions")):
            assert error(bare.sums[key], total) <= 1e-12, key
    assert {float(total) for key, total in padded.sums.items() if key.startswith("positions")} == {10.0}
    if estimator == "kronecker":
        # d d^T of the head is a sum over the tokens that count: each has 3 outputs, whose squared signs are 1.
        assert float(padded.sums["outputs/head.weight"].diagonal(dim1=1, dim2=2).sum()) == pytest.approx(30.0)


def test_a_table_does_not_count_its_padding_row() -> None:
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(6, 3, padding_idx=2), nn.Linear(3, 2)).double()
    ids = torch.tensor([[0, 2, 5, 5], [2, 2, 2, 1]])
    found = memsyn.measure(table, [ids], estimator="kronecker", progress=False)
    assert found.sums["inputs/0.weight"].tolist() == [1, 1, 0, 0, 0, 2]
    assert float(found.sums["positions/0.weight"]) == 4
    assert float(found.sums["positions/1.weight"]) == 8  # the layer after it does meet the padding row
    assert found.inputs("0.weight").sum() == 1


@pytest.mark.parametrize("rank", [1, 2])
def test_sketches_are_the_whole_moment_times_the_probe_matrix(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 11), nn.Tanh(), nn.Conv1d(1, 3, 10), nn.Flatten(), nn.Linear(6, 3)).double()
    model = nn.Sequential(model[0], model[1], nn.Unflatten(1, (1, 11)), *model[2:])
    data = torch.randn(20, 12, dtype=torch.float64)

    def of(*batches: Tensor, rank: int | None = rank) -> memsyn.KroneckerFactors:
        return memsyn.measure(model, batches, estimator="kronecker", rank=rank, progress=False)

    whole, sketch, parts = of(data, rank=None), of(data), of(data[:7], data[7:8], data[8:])
    num_sketches = 0
    for key in whole.matrices:
        for side in ("inputs", "outputs"):
            own = whole.sums[f"{side}/{key}"]
            if own.shape[1] <= 4 * rank:
                assert torch.equal(sketch.sums[f"{side}/{key}"], own)
                continue
            num_sketches += 1
            omega = probe_matrix(own.shape[1], 2 * rank, own)
            for found in (sketch, parts):
                assert f"{side}/{key}" not in found.sums
                assert error(found.sums[f"{side}_sketch/{key}"], own @ omega) <= 1e-9
                assert error(found.sums[f"{side}_trace/{key}"], own.diagonal(dim1=1, dim2=2).sum(1)) <= 1e-9
            # What was lost is known, and nothing is lost of a whole moment.
            spectrum = sketch.spectrum(side, key)
            assert spectrum is not None
            assert sketch.lost(key)[side] == spectrum[0].lost() > 0
            assert whole.lost(key)[side] == 0
            with pytest.raises(memsyn.MismatchError, match=f"there is no whole second moment of the {side}"):
                getattr(sketch, side)(key)
    assert num_sketches >= 3
    added = of(data[:7]) + of(data[7:])
    for key, total in sketch.sums.items():
        if key.startswith(("inputs", "positions")):
            assert error(added.sums[key], total) <= 1e-9, key


# Which parameters are matrices


def test_experts_are_matrices() -> None:
    """Rows that the data choose have no batch axis, and second moments need none."""
    case = CASES["experts"]
    model, batch = build(case, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = memsyn.measure(model, [batch], estimator="kronecker", progress=False)
    assert set(found.matrices) == {"a.weight", "b.weight", "c.weight"}
    tokens = [float(found.sums[f"positions/{key}.weight"]) for key in "abc"]
    assert tokens[0] == tokens[1] + tokens[2] == NUM_SAMPLES * 6


def test_frozen_parameters_are_left_out() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double(), normal(4)(6, torch.float64)
    whole = memsyn.measure(model, [data], estimator="kronecker", progress=False)
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    found = memsyn.measure(model, [data], estimator="kronecker", progress=False)
    assert set(found.routes) == {"0.bias", "2.weight"}
    assert {matrix.weight: matrix.bias for matrix in found.matrices.values()} == {"2.weight": None}
    of_matrix = {"inputs/2.weight", "outputs/2.weight", "positions/2.weight"}
    assert set(found.sums) == {*of_matrix, "diagonal/0.bias", "squared_outputs/"}
    assert error(found.sums["inputs/2.weight"], whole.sums["inputs/2.weight"][:, :-1, :-1]) <= 1e-12
    assert error(found.sums["outputs/2.weight"], whole.sums["outputs/2.weight"]) <= 1e-12


def test_uses_out_of_sight_are_no_matrices() -> None:
    """A weight that only a custom function uses, and one that a layer uses too: autograd has more than d x^T."""
    torch.manual_seed(0)
    once = Lambda(hidden, a=nn.Linear(4, 5), b=nn.Linear(3, 2), w=nn.Parameter(torch.randn(3, 5))).double()
    twice = Lambda(
        lambda m, x: m.b(torch.tanh(m.a(x)) + Hidden.apply(x, m.a.weight)), a=nn.Linear(4, 3), b=nn.Linear(3, 2)
    ).double()
    for model, expected in ((once, {"a.weight", "b.weight"}), (twice, {"b.weight"})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", memsyn.SlowParametersWarning)
            found = memsyn.measure(model, [normal(6, 4)(5, torch.float64)], estimator="kronecker", progress=False)
        assert set(found.matrices) == expected
        assert {f"diagonal/{n}" for n, _ in model.named_parameters() if n in {"w", "a.weight"} - expected} <= set(
            found.sums
        )


@pytest.mark.parametrize("estimator", ["kronecker", "inputs"])
def test_a_matrix_that_a_later_batch_uses_in_another_way_is_named(estimator: str) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.a(x) if x[0, 0] < 9 else m.a(x) * m.a.weight.sum()

    torch.manual_seed(0)
    model, data = Lambda(run, a=nn.Linear(4, 3)), torch.randn(5, 4)
    with pytest.raises(memsyn.ModelError, match=r"a.weight: the first batch used it as a matrix, and this one uses it"):
        memsyn.measure(model, [data, data + 99], estimator=estimator, progress=False)


def test_options_that_do_not_fit() -> None:
    model, data = nn.Linear(2, 2), [torch.ones(2, 2)]
    for estimator in ("kronecker", "inputs"):
        with pytest.raises(memsyn.OptionError, match="batched=True takes the magnitude of a mean gradient"):
            memsyn.measure(model, data, estimator=estimator, batched=True)
        with pytest.raises(memsyn.OptionError, match="factors are measured without a checkpoint"):
            memsyn.measure(model, data, estimator=estimator, checkpoint="x")
        for rank in (0, -1, 2.5, "3", True):
            with pytest.raises(
                memsyn.OptionError, match=f"rank must be a whole number, at least 1, or None; got {rank!r}"
            ):
                memsyn.measure(model, data, estimator=estimator, rank=rank)
    for estimator in ("mas", "mas-local", "fisher"):
        with pytest.raises(memsyn.OptionError, match="rank is for estimator='kronecker' and 'inputs': leave it out"):
            memsyn.measure(model, data, estimator=estimator, rank=3)


@pytest.mark.parametrize("estimator", ["kronecker", "inputs"])
def test_a_weight_that_was_no_matrix_at_first_keeps_its_sums(estimator: str) -> None:
    """The first batch takes the sum of its columns, the second one the product: both go into its squared gradient."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        plain = x * m.a.weight.sum(0)
        return m.b(m.a(x) if bool((x > 0).all()) else plain)

    torch.manual_seed(0)
    model = Lambda(forward, a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 2)).double()
    first, second = -torch.rand(3, 4).double(), torch.rand(3, 4).double()
    found = factors(Case(lambda: model, lambda n, dtype: first), model, [first, second], estimator)
    assert "a.weight" not in found.matrices
    assert "b.weight" in found.matrices
    if estimator == "inputs":  # each sample counts 1
        assert torch.equal(found.sums["diagonal/a.weight"], torch.full((4, 4), 6.0).double())
        return
    expected = torch.zeros(4, 4).double()
    for k, x in enumerate(torch.cat([first, second])):
        score = (model(x.unsqueeze(0)).flatten() * reference.signs(k, 2)).sum()
        expected += torch.autograd.grad(score, model.a.weight)[0].square()
    torch.testing.assert_close(found.sums["diagonal/a.weight"], expected, rtol=1e-9, atol=1e-12)


def test_squared_outputs_are_summed_once_however_batches_come() -> None:
    """Also where a weight is first used in a later batch, so that this batch is run twice."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.first(x)
            return self.second(y) if x[0, 0] > 0 else y

    torch.manual_seed(0)
    model, x = Branch().double(), torch.randn(12, 3, dtype=torch.float64)
    x[:, 0] = torch.tensor([-1.0] * 6 + [1.0] * 6)
    expected = float(torch.cat([model(x[:6]), model(x[6:])]).detach().square().sum(1).mean())
    for size in (1, 2, 3, 6):
        found = memsyn.measure(model, x.split(size), estimator="kronecker", progress=False)
        assert found.squared_outputs == pytest.approx(expected, rel=1e-12)
    parts = [memsyn.measure(model, [part], estimator="kronecker", progress=False) for part in (x[:6], x[6:9], x[9:])]
    assert (parts[0] + parts[1] + parts[2]).squared_outputs == pytest.approx(expected, rel=1e-12)
    unknown = replace(parts[1], sums={n: own for n, own in parts[1].sums.items() if n != "squared_outputs/"})
    assert (parts[2] + unknown).squared_outputs is None
    inputs = memsyn.measure(model, [x[:6]], estimator="inputs", progress=False)
    assert inputs.squared_outputs is None
