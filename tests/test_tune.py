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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": 0.0}, "start must be a positive strength"),
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


def test_a_network_learns_a_new_task_with_the_strength_found(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [torch.randn(50, 4)], progress=False))
    data = torch.randn(200, 4)
    targets = (data[:, 0] * data[:, 1] > 0).long()

    def train(strength: float) -> float:
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.2, momentum=0.9)
        memsyn.protect(optimizer, own, memory, strength=strength)
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(own(data[:150]), targets[:150]).backward()
            optimizer.step()
        return float((own(data[150:]).argmax(1) == targets[150:]).float().mean())

    found = memsyn.tune(train, start=10.0, drop=0.1, decay=0.1)
    scores = {trial.strength: trial.score for trial in found.trials}
    assert found.strength < 10.0
    assert scores[found.strength] >= 0.9 * found.reachable > scores[10.0]
    assert "tuning" in capsys.readouterr().err
