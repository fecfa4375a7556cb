"""The kernel in Triton against the definition, in Triton's interpreter on the CPU.

`test_triton_products.py` runs this file in a process of its own with TRITON_INTERPRET=1. Triton reads the variable
once, when it is imported.
"""

import os
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memsyn
from memsyn.kernels import fused_products, triton_products
from memsyn.kernels.outer_products import Magnitude, absolute, signed, square
from memsyn.kernels.rules import MAGNITUDES
from memsyn.measuring.objectives import squared_l2_norm

assert os.environ["TRITON_INTERPRET"] == "1"

Pairs = list[tuple[Tensor, Tensor]]
MAGNITUDE = st.sampled_from([absolute, square, signed])
DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZE = st.integers(1, 40)


def by_definition(pairs: Pairs, magnitude: Magnitude) -> Tensor:
    """Sample by sample and token by token, in float64: (G, rows, columns)."""
    left, right = pairs[0]
    total = torch.zeros(left.shape[1], left.shape[3], right.shape[3], dtype=torch.float64)
    for k in range(len(left)):
        gradient = torch.zeros_like(total)
        for lefts, rights in pairs:
            for t in range(lefts.shape[2]):
                gradient += lefts[k, :, t, :, None].double() * rights[k, :, t, None, :].double()
        total += magnitude(gradient)
    return total


def strided(values: Tensor, order: list[int], step: int) -> Tensor:
    """The same values in memory with dimensions in another order, and with NaN between them and after them."""
    shape = [values.shape[dim] for dim in order]
    shape[-1] = shape[-1] * step + 3
    memory = torch.full(shape, torch.nan, dtype=values.dtype)
    inner = memory[..., : shape[-1] - 3 : step]
    view = inner.permute([order.index(dim) for dim in range(values.ndim)])
    assert view.shape == values.shape
    return view.copy_(values)


@st.composite
def problems(draw: st.DrawFn, *, integers: bool) -> tuple[Pairs, Tensor]:
    """One or two uses, and a total that is not zero."""
    samples, groups, rows, columns = draw(st.integers(0, 5)), draw(st.integers(1, 3)), draw(SIZE), draw(SIZE)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(DTYPE)

    def factor(tokens: int, features: int) -> Tensor:
        shape = (samples, groups, tokens, features)
        if integers:
            values = torch.randint(-4, 5, shape, generator=generator).to(dtype)
        else:
            values = torch.randn(shape, generator=generator).to(dtype)
        return strided(values, draw(st.permutations(range(4))), draw(st.integers(1, 2)))

    pairs = []
    for _ in range(draw(st.integers(1, 2))):
        tokens = draw(st.integers(0, 40))
        pairs.append((factor(tokens, rows), factor(tokens, columns)))
    total = torch.randint(-4, 5, (groups, rows, columns), generator=generator).float()
    return pairs, strided(total, draw(st.permutations(range(3))), draw(st.integers(1, 2)))


@settings(max_examples=80, deadline=None)
@given(problem=problems(integers=True), magnitude=MAGNITUDE, programs=st.sampled_from([1, 4, 1024]))
def test_integers_are_summed_bit_for_bit(problem: tuple[Pairs, Tensor], magnitude: Magnitude, programs: int) -> None:
    """Of factors up to 4, float32 holds every product and sum exactly, in whatever order they are added."""
    pairs, total = problem
    expected = total + by_definition(pairs, magnitude)
    assert triton_products.takes(pairs, total, magnitude)
    with patch.object(triton_products, "PROGRAMS", programs):
        triton_products.add_products(pairs, total, magnitude)
    assert torch.equal(total.double(), expected)


@settings(max_examples=40, deadline=None)
@given(problem=problems(integers=False), magnitude=MAGNITUDE)
def test_random_numbers_are_summed_within_rounding(problem: tuple[Pairs, Tensor], magnitude: Magnitude) -> None:
    pairs, total = problem
    expected = total + by_definition(pairs, magnitude)
    sizes = by_definition([(left.abs(), right.abs()) for left, right in pairs], magnitude) + total.abs()
    triton_products.add_products(pairs, total, magnitude)
    count = sum(left.shape[2] for left, _ in pairs)
    # Each number takes part in at most so many additions and multiplications; a square has the error twice.
    bound = (2 * count + len(pairs[0][0]) + 5) * 2.0**-24
    assert ((total - expected).abs() <= bound * sizes).all()


def test_samples_are_cut_into_parts_only_if_a_matrix_is_small() -> None:
    parts = triton_products._num_parts
    assert parts(32, 1, 64, 64) == 32
    assert parts(5000, 1, 64, 64) == triton_products.PROGRAMS
    assert parts(32, 1, 768, 768) == triton_products.PROGRAMS // 144 == 7
    assert parts(32, 7, 64, 65) == min(32, triton_products.PROGRAMS // 14)
    assert parts(32, 1, 50257, 768) == 1
    assert parts(10**6, 1, 2**10, 2**10) == triton_products.PROGRAMS // 256


@pytest.mark.parametrize("programs", [1, 2, 3, 1024])
def test_parts_of_unlike_size_are_all_added(programs: int) -> None:
    """With 5 samples: one part, 3 and 2, 2 and 2 and 1, and each alone."""
    left, right = torch.arange(40.0).reshape(5, 1, 2, 4), torch.arange(30.0).reshape(5, 1, 2, 3) - 15
    total = torch.zeros(1, 4, 3)
    sizes = []
    launch = triton_products._launch
    with (
        patch.object(triton_products, "PROGRAMS", programs),
        patch.object(triton_products, "_launch", lambda *given: sizes.append(len(given[2])) or launch(*given)),
    ):
        triton_products.add_products([(left, right)], total, absolute)
    assert sizes == [min(programs, 5)]
    assert torch.equal(total.double(), by_definition([(left, right)], absolute))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
def test_what_is_not_finite_stays_in_its_own_row_and_column() -> None:
    left, right = torch.ones(2, 1, 3, 20), torch.ones(2, 1, 3, 20)
    left[0, 0, 1, 4], right[1, 0, 2, 7] = torch.inf, torch.nan
    total = torch.zeros(1, 20, 20)
    triton_products.add_products([(left, right)], total, absolute)
    assert torch.equal(total.double().nan_to_num(-1), by_definition([(left, right)], absolute).nan_to_num(-1))
    assert total.isfinite().sum() == 19 * 19


def test_it_leaves_other_functions_and_dtypes_to_the_tiles() -> None:
    left, right, total = torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 5), torch.zeros(1, 4, 5)
    takes = triton_products.takes
    assert takes([(left, right)], total, absolute)
    assert not takes([(left, right)], total, lambda gradient, out=None: gradient)
    assert not takes([(left.double(), right.double())], total.double(), absolute)
    assert not takes([(left, right)], total.bfloat16(), absolute)
    assert not takes([(left, right.half())], total, absolute)
    assert not takes([(left, right), (left.half(), right.half())], total, absolute)


class Small(nn.Module):
    """A convolution with groups and one without, and linear layers on tokens, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.grouped(self.first(images).relu()).flatten(2).transpose(1, 2)
        out: Tensor = self.head(self.twice(self.twice(tokens).tanh()))
        return out


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_a_measurement_by_the_kernel_is_one_by_tiles(magnitude: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = Small(), [torch.randn(3, 3, 9, 9), torch.randn(2, 3, 9, 9)]
    estimator = memsyn.Estimator(squared_l2_norm, magnitude)
    expected = memsyn.measure(model, batches, estimator=estimator, progress=False)
    seen = []
    launch = triton_products._launch
    monkeypatch.setattr(triton_products, "_launch", lambda *given: seen.append(given[-1]) or launch(*given))
    monkeypatch.setattr(fused_products, "DEVICES", {"cpu"})
    monkeypatch.setattr(triton_products, "_launch", lambda *given: seen.append(given[-1]) or launch(*given))
    monkeypatch.setattr(fused_products, "DEVICES", {"cpu"})
    found = memsyn.measure(model, batches, estimator=estimator, progress=False)
    assert fused_products.failures == {}
    assert set(seen) == {magnitude}
    assert len(seen) >= 2 * 4
    for name, value in expected.mean().items():
        torch.testing.assert_close(found.mean()[name], value, rtol=1e-5, atol=1e-6 * float(value.max()))
