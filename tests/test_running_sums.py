"""What sums keep of small contributions, held against float64 or against exact arithmetic."""

import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memsyn
from memsyn.engine.routes import BY_OPERATION, BY_RULE, BY_SAMPLE
from memsyn.kernels.running_sums import BATCHES, CHUNK, RunningSums
from tests.cases import Lambda, parameter

UNIT = 2.0**-24
"""The unit roundoff of float32."""
BOUND = (2 + BATCHES) * UNIT
"""What is promised where every batch is one addition."""


def summed(contributions: Iterable[float]) -> float:
    sums = RunningSums({"w": torch.zeros(1)})
    for number, value in enumerate(contributions, 1):
        sums.recent["w"] += value
        sums.end_batch(number)
    return float(sums.totals()["w"])


@pytest.mark.parametrize("first", ["big", "small", "in between"])
def test_many_small_contributions_beside_a_big_one(first: str) -> None:
    """Each is a quarter of what plain addition would have to see to change the sum at all."""
    big, small, count = 2.0**26, 1.0, 10**5
    values = {
        "big": [big, *[small] * count],
        "small": [*[small] * count, big],
        "in between": [*[small] * (count // 2), big, *[small] * (count // 2)],
    }[first]
    assert summed(values) == pytest.approx(math.fsum(values), rel=BOUND)
    plain = torch.tensor(big) + torch.tensor(small)
    assert float(plain) == big


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=100))
def test_any_sum_is_within_its_bound(values: list[float]) -> None:
    exact = math.fsum(values)
    assert abs(summed(values) - exact) <= BOUND * exact * 1.001 + 2.0**-149


def test_parts_of_a_large_tensor_are_all_folded() -> None:
    total = torch.zeros(CHUNK + 7)
    sums = RunningSums({"w": total, "t": torch.zeros(3, 2).T, "none": torch.zeros(0)})
    ones = torch.arange(6.0).reshape(2, 3)
    for number in range(3 * BATCHES + 1):
        sums.recent["w"] += 1
        sums.recent["t"] += ones
        sums.end_batch(number + 1)
    assert sums.num_folded == 3 * BATCHES
    found = sums.totals()
    assert torch.equal(found["w"], torch.full_like(total, 3 * BATCHES + 1))
    assert torch.equal(found["t"], ones * (3 * BATCHES + 1))


@pytest.mark.parametrize("num_batches", [3, BATCHES, 5 * BATCHES + 3])
def test_what_is_restored_goes_on_bit_for_bit(num_batches: int) -> None:
    values = torch.rand(2 * num_batches + 5, 6, generator=torch.Generator().manual_seed(0)).exp()
    whole = RunningSums({"w": torch.zeros(6)})
    for number, value in enumerate(values, 1):
        whole.recent["w"] += value
        whole.end_batch(number)
        if number == num_batches:
            parts = tuple({name: total.clone() for name, total in part.items()} for part in whole.parts())
            again = RunningSums({"w": torch.zeros(6)})
            again.restore((parts[0], parts[1]), number, whole.num_folded)
        elif number > num_batches:
            again.recent["w"] += value
            again.end_batch(number)
    assert torch.equal(again.totals()["w"], whole.totals()["w"])


# Measured. The model y = w x has d y^2 / d w = 2 w x^2: x^2 with w = 1/2.


def square_of_inputs(dtype: torch.dtype = torch.float32) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, 0.5)
    return model


def total_of(batches: Iterable[Tensor], model: nn.Module | None = None) -> float:
    found = memsyn.measure(model or square_of_inputs(), batches, progress=False)
    return float(found.sums["weight"].double())


def batches_of(big: float, small: float, count: int, size: int) -> list[Tensor]:
    return [torch.full((1, 1), big), *torch.full((count, 1), small).split(size)]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_million_samples_after_a_big_one(reverse: bool) -> None:
    """A batch of thousand ones is less than half of what 2^36 can show: plain sums would lose them all."""
    batches = batches_of(2.0**18, 1.0, 10**6, 1000)
    found = total_of(reversed(batches) if reverse else batches)
    assert found == pytest.approx(2.0**36 + 10**6, rel=BOUND)
    assert found > 2.0**36 + 0.98 * 10**6
    in_float64 = total_of((batch.double() for batch in batches), square_of_inputs(torch.float64))
    assert found == pytest.approx(in_float64, rel=BOUND)


def test_parts_add_up_to_the_whole() -> None:
    batches = batches_of(2.0**18, 1.0, 10**5, 1000)
    parts = [memsyn.measure(square_of_inputs(), part, progress=False) for part in (batches[:1], batches[1:])]
    joined = parts[0] + parts[1]
    assert joined.num_samples == 10**5 + 1
    assert float(joined.sums["weight"]) == pytest.approx(total_of(batches), rel=2 * BOUND)
    assert float(joined.sums["weight"]) == pytest.approx(2.0**36 + 10**5, rel=BOUND)
    assert float(joined.sums["weight"]) > 2.0**36


def test_importances_of_very_different_sizes_add_up() -> None:
    large = memsyn.Importance({"w": torch.tensor([3e30, 1.0, 0.0])}, 10**15)
    small = memsyn.Importance({"w": torch.tensor([1.0, 2.0**-23, 1e-40])}, 1)
    for joined in (large + small, small + large):
        assert joined.num_samples == 10**15 + 1
        expected = torch.tensor([3e30, 1 + 2.0**-23, 1e-40])
        assert torch.equal(joined.sums["w"], expected)
        assert torch.allclose(joined.mean()["w"].double(), expected.double() / (10**15 + 1), rtol=2 * UNIT, atol=1e-45)


def test_contributions_too_small_for_normal_numbers_count() -> None:
    """x^2 = 1e-40 is a denormal float32, of some five digits; 1e6 of them are normal."""
    found = total_of(torch.full((10**6, 1), 1e-20).split(1000))
    assert found == pytest.approx(1e-34, rel=1e-4)
    beside = total_of(batches_of(1e-17, 1e-20, 10**6, 1000))
    assert beside == pytest.approx(1e-34 + 1e-34, rel=1e-4)


def by_operation(own: nn.Module, x: Tensor) -> Tensor:
    return torch.einsum("i,bi->b", own.get_parameter("weight"), x).unsqueeze(1)


def by_sample(own: nn.Module, x: Tensor) -> Tensor:
    """Which samples go through the weight depends on them."""
    chosen = x[:, 0] > 0
    out = torch.zeros_like(x)
    out[chosen] = x[chosen] * own.get_parameter("weight")
    return out


@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("route", [BY_RULE, BY_OPERATION, BY_SAMPLE])
def test_half_precision_sums_neither_overflow_nor_stand_still(dtype: torch.dtype, route: str) -> None:
    """Contributions of 1, of which bfloat16 adds up no more than 256 and float16 2048, after one of 64^2.

    And all together more than the 65504 of float16.
    """
    made = {BY_OPERATION: by_operation, BY_SAMPLE: by_sample}
    model = Lambda(made[route], weight=parameter(1)) if route in made else square_of_inputs()
    model = model.to(dtype)
    nn.init.constant_(model.get_parameter("weight"), 0.5)
    count = 3000
    batches = [torch.full((20, 1), 64.0, dtype=dtype), *torch.ones(count, 1, dtype=dtype).split(100)]
    found = memsyn.measure(model, batches, progress=False)
    assert found.sums["weight"].dtype == torch.float32
    assert float(found.sums["weight"]) == 20 * 64**2 + count
    assert found.routes == {"weight": route}


def test_numbers_too_large_for_half_precision_are_an_error_that_says_so() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).half()
    with torch.no_grad():
        model[0].weight.fill_(200.0)
        model[1].weight.fill_(1.0)
    with pytest.raises(memsyn.OutputError, match=r"is NaN or infinite.*in half precision.*measure model.float\(\)"):
        memsyn.measure(model, [torch.full((4, 1), 200.0, dtype=torch.float16)], progress=False)
    wide = memsyn.measure(model.float(), [torch.full((4, 1), 200.0)], progress=False)
    assert float(wide.sums["0.weight"]) == 4 * 2 * 200.0**3
