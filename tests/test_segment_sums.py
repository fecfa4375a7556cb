"""Sums by segment, in which no sample can spoil or own the others."""

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from tqdm import tqdm

import memsyn
from memsyn.measuring.factor_scorer import traces
from memsyn.values.ranks import spearman
from tests.serving import TwoPaths, a_model, assert_same, assert_same_factors, begin, factors_of, measured, requests


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "traffic.safetensors"


def test_segments_have_sums_of_their_own(store: Path) -> None:
    model, batches, names = a_model(), requests(30), ["tenant-a", "B/../c d.e", None]
    parts = {name: batches[k::3] for k, name in enumerate(names)}
    expected = {name: measured(model, part) for name, part in parts.items()}
    with begin(model, store) as observer:
        for k, batch in enumerate(batches):
            observer.observe(batch, segment=names[k % 3])
        assert observer.flush()
        assert_same(observer.importance(), measured(model, batches))
        assert_same(observer.importance("tenant-a"), expected["tenant-a"])
        mixed = observer.importance({"tenant-a": 3.0, "B/../c d.e": 1.0}).mean()
        for name, omega in mixed.items():
            one, two = (expected[segment].mean()[name] for segment in names[:2])
            assert torch.allclose(omega, (3 * one + two) / 4, rtol=1e-12)
        with pytest.raises(memsyn.BatchError, match="nothing has been measured yet of 'tenant-z'"):
            observer.importance("tenant-z")
        for wrong in ({"tenant-a": -1.0}, {"tenant-a": math.nan}, {"tenant-a": 0.0}, {}):
            with pytest.raises(memsyn.OptionError, match="weights must be finite, not negative, and not all zero"):
                observer.importance(wrong)
    files = {"traffic+tenant-a.safetensors", "traffic+B%2F%2E%2E%2Fc%20d%2Ee.safetensors", store.name}
    assert {path.name for path in store.parent.iterdir()} == files
    assert_same(memsyn.Importance.load(store.with_name("traffic+tenant-a.safetensors")), expected["tenant-a"])


def test_there_are_not_too_many_segments(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]
    with begin(model, store) as observer:
        for k in range(70):
            observer.observe(batch, segment=f"user {k}")
        observer.observe(batch, segment="user 1")
        assert not observer.flush()
        stats = observer.stats()
        assert (stats.measured, stats.dropped) == (65, 6)
        assert "there are 64 segments already" in str(stats.last_error)


@pytest.mark.parametrize("cap", [None, 0.2, 0.04])
@pytest.mark.parametrize("max_batch", [1, 32])
def test_one_odd_request_cannot_own_the_memory(cap: float | None, max_batch: int, store: Path) -> None:
    """A larger one is scaled down to the share; all others count as they are."""
    model, usual, odd = nn.Linear(4, 2).double(), torch.ones(1, 4, dtype=torch.float64), 1e4
    one, large = (sum(float(total.sum()) for total in measured(model, [x]).sums.values()) for x in (usual, usual * odd))
    with begin(model, store, cap=cap, max_batch=max_batch) as observer:
        for _ in range(300):
            observer.observe(usual)
        assert observer.flush()
        assert observer.stats().capped == 0
        observer.observe(torch.cat([usual, odd * usual, usual]))
        assert observer.flush()
        found, stats = observer.importance(), observer.stats()
    assert (stats.measured, found.num_samples) == (303, 303)
    whole = sum(float(total.sum()) for total in found.sums.values())
    if cap is None:
        assert stats.capped == 0
        assert whole == pytest.approx(302 * one + large)
    else:
        assert stats.capped == 1
        assert 0.8 * cap <= 1 - 302 * one / whole <= cap


def test_samples_without_a_gradient_limit_nothing(store: Path) -> None:
    model, ones = nn.Linear(2, 1, bias=False).double(), torch.ones(4, 2, dtype=torch.float64)
    with begin(model, store, cap=0.1) as observer:
        observer.observe(0 * ones)
        assert observer.flush()
        for _ in range(3):
            observer.observe(ones)
            assert observer.flush()
        assert (observer.stats().measured, observer.stats().capped) == (16, 0)
        assert_same(observer.importance(), measured(model, [0 * ones, *[ones] * 3]))


@pytest.mark.parametrize("odd", [[0], [5], [0, 5, 31]])
def test_the_first_samples_are_limited_by_each_other(odd: list[int], store: Path) -> None:
    model, given = nn.Linear(1, 1, bias=False).double(), torch.ones(32, 1, dtype=torch.float64)
    given[odd] = 1000.0
    with begin(model, store, cap=0.1) as observer:
        observer.observe(given)
        assert observer.flush()
        one = 2 * abs(model.weight.item())
        assert observer.stats().capped == len(odd)
        assert float(observer.importance().sums["weight"]) <= one * (32 - len(odd) + 10 * len(odd)) * (1 + 1e-9)
        assert observer.importance().num_samples == 32


def test_a_segment_that_cannot_be_written_keeps_no_other(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, write = a_model(), requests(1)[0], memsyn.live.segment_files.write

    def failing(path: Any, *args: Any) -> None:
        if "+a." in str(path):
            raise memsyn.MemoryFileError("no room for a")
        write(path, *args)

    monkeypatch.setattr(memsyn.live.segment_files, "write", failing)
    with begin(model, store) as observer:
        for segment in ("a", "b", None):
            observer.observe(batch, segment=segment)
        assert not observer.flush()
        assert "no room for a" in str(observer.stats().last_error)
        assert {path.name for path in store.parent.glob("t*")} == {"traffic+b.safetensors", store.name}
        monkeypatch.undo()
        assert observer.flush()
        assert_same(memsyn.Importance.load(store.with_name("traffic+a.safetensors")), measured(model, [batch]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_what_is_not_finite_is_left_out_alone(bad: float, store: Path) -> None:
    model, batches = a_model(), requests(30)
    model[1] = nn.Identity()
    good = [batch.clone() for batch in batches]
    with begin(model, store) as observer:
        for k, batch in enumerate(batches):
            if k % 7 == 0:
                batch = torch.cat([batch, torch.full((1, 4), bad, dtype=torch.float64)])
            observer.observe(batch)
        assert observer.flush()
        stats = observer.stats()
        assert stats.invalid == 5
        assert "the output" in str(stats.last_error)
        assert_same(observer.importance(), measured(model, good))


@pytest.mark.parametrize("cap", [None, 0.05])
def test_halves_find_the_one_sample_at_fault(cap: float | None, store: Path) -> None:
    """Seven passes for eight samples, of which only two are measured alone."""
    model, sizes = nn.Linear(4, 2).double(), []

    def forward(model: nn.Module, inputs: Tensor) -> Tensor:
        sizes.append(len(inputs))
        return model(inputs)

    good, odd = torch.ones(8, 4, dtype=torch.float64), torch.ones(8, 4, dtype=torch.float64)
    odd[5] = math.nan if cap is None else 1e3
    with begin(model, store, forward=forward, cap=cap, max_batch=8) as observer:
        for _ in range(40):
            observer.observe(good)
        assert observer.flush()
        sizes.clear()
        observer.observe(odd)
        assert observer.flush()
        stats = observer.stats()
        assert (stats.invalid, stats.capped, stats.measured) == ((1, 0, 327) if cap is None else (0, 1, 328))
    assert sizes == [8, 4, 4, 2, 1, 1, 2]


@pytest.mark.parametrize("first", [1, 3])
def test_without_sums_to_compare_with_the_limit_is_of_the_batch(first: int, store: Path) -> None:
    """A single first sample is added as it is; of several, the odd one has ten times their median."""
    model, given = nn.Linear(1, 1, bias=False).double(), torch.ones(first, 1, dtype=torch.float64)
    given[0] = 1000.0
    one = 2 * abs(model.weight.item())
    with begin(model, store, cap=0.01) as observer:
        observer.observe(given)
        assert observer.flush()
        total = float(observer.importance().sums["weight"])
        assert observer.stats().capped == (first > 1)
        assert total == pytest.approx(one * 1e6 if first == 1 else one * (10 + 2))


def test_a_gradient_that_is_not_finite_is_left_out(store: Path) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).abs().sum(1, keepdim=True).sqrt()

    model, batches = Root(), requests(10)
    with begin(model, store) as observer:
        for batch in batches:
            observer.observe(batch)
        observer.observe(torch.zeros(2, 4, dtype=torch.float64))
        assert observer.flush()
        assert observer.stats().invalid == 2
        assert "a gradient is NaN or infinite" in str(observer.stats().last_error)
        assert_same(observer.importance(), measured(model, batches))


def test_a_model_that_cannot_be_measured_is_given_up_until_its_weights_change(store: Path) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.mixes = nn.Linear(4, 2).double(), True

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x - x.mean(0) if self.mixes else x)

    model, batch = Mixing(), torch.randn(4, 4, dtype=torch.float64)
    with begin(model, store, max_batch=4) as observer:
        for _ in range(20):
            observer.observe(batch)
        assert not observer.flush()
        stats = observer.stats()
        # After eight batches the pauses are 1, 2, 4 and 8 batches: 10, 13 and 18 are tried.
        assert (stats.measured, stats.dropped, stats.errors) == (0, 80, 11)
        assert "SamplesInteractError" in str(stats.last_error)
        model.mixes = False
        with torch.no_grad():
            model.head.weight.mul_(2)
        observer.observe(batch)
        assert observer.flush()
        assert_same(observer.importance(), measured(model, [batch]))


def test_convergence_is_the_rank_correlation_of_halves(store: Path) -> None:
    """Near 0 for halves that share nothing, 1 for the same, and growing with the number of samples."""
    model, found = a_model(), []
    with begin(model, store, max_batch=1) as observer:
        assert math.isnan(observer.converged())
        batches = [torch.randn(1, 4, dtype=torch.float64) for _ in range(400)]
        for count in (2, 400):
            for batch in batches[:count]:
                observer.observe(batch)
            assert observer.flush()
            found.append(observer.converged())
            if count == 2:
                halves = [torch.cat([t.flatten() for t in measured(model, [b]).sums.values()]) for b in batches[:2]]
                assert found[0] == pytest.approx(spearman(*(half.numpy() for half in halves)))
    assert found[0] < 0.95 < found[1] <= 1


@pytest.mark.soak
def test_a_week_in_fast_forward(store: Path, soak: bool) -> None:
    """The sums are right against float64, and memory is constant."""
    count, width = 10**6 if soak else 50_000, 8
    model, generator = nn.Linear(width, 3, bias=False), np.random.default_rng(0)
    weight, sums = model.weight.detach().double().numpy(), np.zeros((3, width))
    resident: list[int] = []
    with begin(model, store, room=512, max_batch=250, budget=100.0, interval=0.5) as observer:
        for start in tqdm(range(0, count, 250), "requests"):
            inputs = generator.normal(size=(250, width)).astype(np.float32)
            for row in torch.from_numpy(inputs).split(1):
                observer.observe(row)
            own = inputs.astype(np.float64)
            sums += (2 * np.abs(own @ weight.T)).T @ np.abs(own)
            while observer.stats().waiting > 250:
                time.sleep(0.0005)
            if start % (count // 10) == 0:
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        assert observer.flush()
        stats = observer.stats()
    assert (stats.seen, stats.measured, stats.dropped) == (count, count, 0)
    found = memsyn.Importance.load(store)
    error = np.abs(found.sums["weight"].double().numpy() / sums - 1).max()
    grown = resident[-1] - resident[2]
    tqdm.write(f"{count} requests: largest error {error:.1e}, memory grew by {grown / 2**20:.1f} MiB")
    assert found.num_samples == count
    assert error < 1e-6
    assert grown < 8 * 2**20


# Factors


def trace(factors: memsyn.KroneckerFactors, name: str) -> float:
    return float(factors.sums[name].diagonal(dim1=1, dim2=2).sum())


def test_segments_of_factors(store: Path) -> None:
    """S is the weighted mean of the segments' S; in A each position counts w_s / N_s, and so does a text of 5 words."""
    model, generator = nn.Linear(4, 2).double(), torch.Generator().manual_seed(0)
    texts = {
        name: torch.randn(count, length, 4, generator=generator, dtype=torch.float64)
        for name, count, length in (("a", 30, 2), ("b", 10, 5))
    }
    with begin(model, store, estimator="kronecker") as observer:
        for name, given in texts.items():
            observer.observe(given, segment=name)
        assert observer.flush()
        own, mixed = [observer.factors(name) for name in texts], observer.factors({"a": 3.0, "b": 1.0})
        assert mixed.num_samples == 40
        assert torch.allclose(mixed.outputs("weight"), (3 * own[0].outputs("weight") + own[1].outputs("weight")) / 4)
        expected = 6 * own[0].inputs("weight") + 5 * own[1].inputs("weight")  # weight times positions per sample
        assert torch.allclose(mixed.inputs("weight"), expected / 11)
        assert_same_factors(observer.factors(), own[0] + own[1])


@pytest.mark.parametrize("cap", [0.2, 0.01])
def test_an_odd_request_cannot_own_factors(cap: float, store: Path) -> None:
    """Its share is the mean of its shares of both traces; all its sums are divided by what is too much."""
    model, usual, odd = nn.Linear(4, 2).double(), torch.ones(1, 4, dtype=torch.float64), 1e4
    one, large = (factors_of(model, [x], "kronecker") for x in (usual, usual * odd))
    names = ("inputs/weight", "outputs/weight")
    with begin(model, store, estimator="kronecker", cap=cap) as observer:
        for _ in range(300):
            observer.observe(usual)
        assert observer.flush()
        assert observer.stats().capped == 0
        observer.observe(torch.cat([usual, odd * usual, usual]))
        assert observer.flush()
        found, stats = observer.factors(), observer.stats()
    assert (stats.measured, stats.capped, found.num_samples) == (303, 1, 303)
    # The first of the three is added before the second is measured alone.
    share = sum(trace(large, name) / (301 * trace(one, name)) for name in names) / 2
    excess = share / max(cap, 10 / 301)
    assert float(found.sums["positions/weight"]) == pytest.approx(302 + 1 / excess)
    for name in names:
        assert trace(found, name) == pytest.approx(302 * trace(one, name) + trace(large, name) / excess)


def test_the_first_factors_are_limited_by_each_other(store: Path) -> None:
    model, given = nn.Linear(1, 1, bias=False).double(), torch.ones(32, 1, dtype=torch.float64)
    given[5] = 1000.0
    with begin(model, store, estimator="kronecker", cap=0.1) as observer:
        observer.observe(given)
        assert observer.flush()
        found = observer.factors()
        assert (observer.stats().capped, found.num_samples) == (1, 32)
    excess = (1e6 / 10 + 1 / 10) / 2  # ten times the median of each trace, which is 1
    assert float(found.sums["inputs/weight"]) == pytest.approx(31 + 1e6 / excess)
    assert float(found.sums["outputs/weight"]) == pytest.approx(31 + 1 / excess)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("estimator", ["inputs", "kronecker"])
def test_what_is_not_finite_is_left_out_of_factors(bad: float, estimator: str, store: Path) -> None:
    """The signs of the others are those of a measurement without it, though some of them were measured twice."""
    model, batches = a_model(), list(torch.randn(30, 4, dtype=torch.float64).split(1))
    with begin(model, store, estimator=estimator) as observer:
        for k, batch in enumerate(batches):
            if k in (0, 20):
                observer.observe(torch.full((1, 4), bad, dtype=torch.float64))
            observer.observe(batch)
        assert observer.flush()
        assert observer.stats().invalid == 2
        assert_same_factors(observer.factors(), factors_of(model, batches, estimator))


def test_traces_tell_what_is_not_finite() -> None:
    whole, sketch = torch.eye(3).unsqueeze(0), torch.ones(1, 3, 2)
    sums = {
        "inputs/w": 2 * whole,
        "outputs_sketch/w": sketch,
        "outputs_trace/w": torch.tensor([5.0]),
        "positions/w": torch.tensor(9.0),
        "b": torch.ones(4),
    }
    assert traces(sums) == {"inputs/w": 6.0, "outputs_trace/w": 5.0, "b": 4.0, "outputs_sketch/w": 0.0}
    sketch[0, 1, 1] = math.inf
    assert math.isnan(traces(sums)["outputs_sketch/w"])
    assert traces({}) == {}


def test_convergence_of_factors_is_that_of_their_diagonals(store: Path) -> None:
    """A matrix that only one half has used is zero in the other."""
    model, generator = TwoPaths(), torch.Generator().manual_seed(0)
    one, two = ({"x": torch.randn(1, 4, generator=generator, dtype=torch.float64)} for _ in range(2))
    two["more"] = torch.randn(1, 2, generator=generator, dtype=torch.float64)
    with begin(model, store, estimator="inputs") as observer:
        for batch in (one, two):
            assert math.isnan(observer.converged())
            observer.observe(batch)
            assert observer.flush()
        halves = [factors_of(model, [batch], "inputs").sums for batch in (one, two)]
        firsts = [own["inputs/first.weight"][0].diagonal() for own in halves]
        seconds = [torch.zeros(3, dtype=torch.float64), halves[1]["inputs/second.weight"][0].diagonal()]
        scales = [torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
        other = torch.zeros(9, dtype=torch.float64)  # the second layer's weight and bias by their own names: unused
        sides = [torch.cat([*parts, other]).numpy() for parts in zip(firsts, seconds, scales, strict=True)]
        assert observer.converged() == pytest.approx(spearman(*sides))
