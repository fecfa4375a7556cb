"""Choosing a strength by what the new task can still learn."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memsyn


def test_the_largest_strength_that_leaves_enough() -> None:
    asked: list[float] = []

    def train(strength: float) -> float:
        asked.append(strength)
        return 0.9 if strength <= 3 else 0.7

    found = memsyn.tune(train, start=16.0, drop=0.1, progress=False)
    assert found.strength == 2.0
    assert found.reachable == 0.9
    assert asked == [trial.strength for trial in found.trials] == [0.0, 16.0, 8.0, 4.0, 2.0]
    assert memsyn.tune(train, start=1.0, progress=False).strength == 1.0


def test_a_budget_that_is_too_small_is_said() -> None:
    with pytest.warns(memsyn.StrengthWarning, match=r"strength 4, the smallest of 3 tried.*only 0.1 of 1. Start lower"):
        found = memsyn.tune(lambda strength: 0.1 if strength else 1.0, start=16.0, budget=4, progress=False)
    assert found.strength == 4.0
    assert len(found.trials) == 4


def test_a_relative_start_is_tuned_in_its_own_unit() -> None:
    """What `train` is given and what comes back is `Relative`, as `protect` takes it."""
    asked: list[object] = []

    def train(strength: memsyn.Relative) -> float:
        asked.append(strength)
        return 0.9 if strength.value <= 0.3 else 0.7

    found = memsyn.tune(train, start=memsyn.Relative(1.0), drop=0.1, progress=False)
    expected = [memsyn.Relative(value) for value in (0.0, 1.0, 0.5, 0.25)]
    assert asked == [trial.strength for trial in found.trials] == expected
    assert found.strength == memsyn.Relative(0.25)


def test_a_relative_start_that_is_too_large_is_said_in_its_own_unit() -> None:
    with pytest.warns(memsyn.StrengthWarning, match=r"with strength Relative\(0.5\), the smallest of 1 tried"):
        found = memsyn.tune(
            lambda strength: 0.1 if strength.value else 1.0, start=memsyn.Relative(0.5), budget=2, progress=False
        )
    assert found.strength == memsyn.Relative(0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": 0.0}, "start must be a positive strength"),
        ({"start": memsyn.Relative(0.0)}, r"start must be a positive strength, got Relative\(value=0.0\)"),
        ({"start": float("inf")}, "strength must be finite and not negative"),
        ({"start": "10"}, r"strength must be a number or memsyn.Relative\(...\), got '10'"),
        ({"start": 1.0, "drop": 1.0}, "drop must be from 0 to below 1"),
        ({"start": 1.0, "decay": 1.0}, "decay must be between 0 and 1"),
        ({"start": 1.0, "budget": 1}, "budget must be at least 2"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(memsyn.OptionError, match=says):
        memsyn.tune(lambda strength: 1.0, progress=False, **options)


def test_scores_that_are_none() -> None:
    with pytest.raises(memsyn.OptionError, match=r"train\(0\) gave nan"):
        memsyn.tune(lambda strength: float("nan"), start=1.0, progress=False)
    with pytest.raises(memsyn.OptionError, match="without protection the score is 0"):
        memsyn.tune(lambda strength: 0.0, start=1.0, progress=False)


@pytest.mark.parametrize(
    ("estimator", "start", "form"),
    [("mas", 10.0, "proximal"), ("mas", memsyn.Relative(1.0), "proximal"), ("kronecker", 1e5, "projected")],
)
def test_a_network_learns_a_new_task_with_the_strength_found(
    estimator: str, start: float | memsyn.Relative, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    found = memsyn.measure(model, [torch.randn(50, 4)], estimator=estimator, progress=False)
    memory = memsyn.Memory.empty().consolidate(model, found)
    data = torch.randn(200, 4)
    targets = (data[:, 0] * data[:, 1] > 0).long()

    def train(strength: Any) -> float:
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.2, momentum=0.9)
        handle = memsyn.protect(optimizer, own, memory, strength=strength)
        assert handle.form == form
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(own(data[:150]), targets[:150]).backward()
            optimizer.step()
        handle.remove()
        return float((own(data[150:]).argmax(1) == targets[150:]).float().mean())

    tuned = memsyn.tune(train, start=start, drop=0.1, decay=0.1)
    scores = {trial.strength: trial.score for trial in tuned.trials}
    assert type(tuned.strength) is type(start)
    assert tuned.strength != start
    assert scores[tuned.strength] >= 0.9 * tuned.reachable > scores[start]
    assert train(tuned.strength) == scores[tuned.strength]  # protect takes it as it is
    assert "tuning" in capsys.readouterr().err
