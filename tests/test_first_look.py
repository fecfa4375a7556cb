"""What is run before and beside the passes: the passes of a check, and the calls of Python for each layer."""

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from benchmarks import layer_calls
from torch import Tensor, nn

import memsyn
from memsyn.errors import SamplesInteractError
from memsyn.measuring import route_check


class Counted(nn.Module):
    """Two layers; counts how many forward passes of how many samples it runs."""

    seen: ClassVar[Counter[int]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        type(self).seen[len(x)] += 1
        out: Tensor = self.second(self.first(x).tanh())
        return out


class Cumulative(Counted):
    """Sample 0 does not change with the other samples, but they change with sample 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(0)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets an item for each sample whose operations a check compares with those of the samples together."""
    found: list[Any] = []
    own = route_check.splits_between

    def counted(one: Any, two: Any) -> Any:
        found.append(one)
        return own(one, two)

    monkeypatch.setattr(route_check, "splits_between", counted)
    return found


def test_a_steady_layer_makes_few_calls() -> None:
    assert 40 < layer_calls.calls_of_layer() <= 75


def test_a_check_runs_four_forward_and_two_backward_passes(traced: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    backward: list[object] = []
    own = torch.autograd.backward

    def counted(*args: Any, **kwargs: Any) -> None:
        backward.append(args)
        own(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", counted)
    Counted.seen.clear()
    torch.manual_seed(0)
    memsyn.measure(Counted(), [torch.randn(8, 4)], progress=False)
    # Two samples together, each alone, and together with the recorder; then the batch itself.
    assert Counted.seen == {2: 2, 1: 2, 8: 1}
    assert len(backward) == 3
    # The first sample alone has shown all batch axes.
    assert len(traced) == 1


def test_a_sample_that_is_not_traced_is_still_compared_with_the_batch(traced: list[Any]) -> None:
    torch.manual_seed(0)
    with pytest.raises(SamplesInteractError, match="the objective of sample 1 changes with the other samples"):
        memsyn.measure(Cumulative(), [torch.randn(8, 4)], progress=False)
    assert len(traced) == 1
