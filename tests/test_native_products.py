"""Sums of outer products in the native library: against the definition, and against the tiles of torch.

Most factors hold small integers. Then all products and sums are exact in float32, so that every order of summation
gives the same bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memsyn
from memsyn.kernels import convolutions, outer_products
from memsyn.kernels.native_products import Factors, takes_products
from memsyn.kernels.outer_products import Magnitude, absolute, add_natively, signed, square
from tests.levels import level, native_is, needs_library, threads_are

__all__ = ["level"]

FUNCTIONS = {"abs": absolute, "square": square, "signed": signed}

each_level = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def by_definition(uses: Sequence[Factors], magnitude: Magnitude) -> Tensor:
    """sum_k f(sum_t left_kt right_kt^T) in float64, sample by sample."""
    total = None
    for k in range(len(uses[0][0])):
        own = None
        for left, right, num_dims in uses:
            rows = left[k].double().flatten(1, num_dims)
            columns = right[k].double().flatten(1, num_dims).flatten(2)
            product = rows.transpose(1, 2) @ columns
            own = product if own is None else own + product
        assert own is not None
        total = magnitude(own.clone()) if total is None else total + magnitude(own.clone())
    assert total is not None
    return total


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "features last": lambda x: x,
    "tokens last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "groups last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "samples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "reversed rows": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
}
"""Of a tensor (B, G, T, features), the same numbers with other strides."""


def integers(shape: Sequence[int], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return LAYOUTS[layout](torch.randint(-3, 4, tuple(shape), generator=generator).to(dtype))


@needs_library
@each_level
@given(data=st.data())
def test_it_is_the_sum_of_the_definition(level: str, data: st.DataObject) -> None:
    groups, samples = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 6))
    rows, columns = data.draw(st.integers(1, 45)), data.draw(st.integers(1, 75))
    name, threads = data.draw(st.sampled_from(list(FUNCTIONS))), data.draw(st.sampled_from([1, 2]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    uses = []
    for _ in range(data.draw(st.integers(1, 2))):
        tokens, seed = data.draw(st.sampled_from([0, 1, 2, 3, 5, 16, 19, 33])), data.draw(st.integers(0, 9))
        layouts = data.draw(st.sampled_from(list(LAYOUTS))), data.draw(st.sampled_from(list(LAYOUTS)))
        left = integers((samples, groups, tokens, rows), dtype, layouts[0], seed)
        uses.append((left, integers((samples, groups, tokens, columns), dtype, layouts[1], seed + 10), 1))
    total = torch.full((groups, rows, columns), 2.0)
    with threads_are(threads):
        assert add_natively(uses, total, FUNCTIONS[name])
    expected = by_definition(uses, FUNCTIONS[name]) + 2 if samples else torch.full_like(total, 2.0)
    assert torch.equal(total, expected.float())


LARGE = {
    "tokens of several parts": (2, 1, 2500, 20, 40),
    "rows of several blocks": (2, 1, 3, 1400, 40),
    "columns of several blocks": (2, 1, 3, 20, 1300),
    "samples of several depths": (300, 1, 3, 20, 40),
    "one number": (1, 1, 1, 1, 1),
    "many groups": (3, 40, 5, 3, 7),
}


@needs_library
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("layout", ["features last", "tokens last"])
@pytest.mark.parametrize("threads", [1, 2])
def test_large_sums(level: str, shape: tuple[int, ...], layout: str, threads: int) -> None:
    samples, groups, tokens, rows, columns = shape
    left = integers((samples, groups, tokens, rows), torch.float32, layout, 1)
    right = integers((samples, groups, tokens, columns), torch.float32, layout, 2)
    total = torch.zeros(groups, rows, columns)
    with threads_are(threads):
        assert add_natively([(left, right, 1)], total, absolute)
    assert torch.equal(total, by_definition([(left, right, 1)], absolute).float())


@needs_library
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_float32(level: str, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(6, 2, 50, 33).to(dtype), torch.randn(6, 2, 50, 70).to(dtype)
    found, tiled = torch.zeros(2, 33, 70), torch.zeros(2, 33, 70)
    assert add_natively([(left, right, 1)], found, FUNCTIONS[name])
    expected = by_definition([(left, right, 1)], FUNCTIONS[name])
    outer_products._add_tiles([(left.float(), right.float())], tiled, FUNCTIONS[name])
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-6 * scale
    assert (found - tiled).abs().max() <= 2e-6 * scale


@needs_library
def test_any_number_of_threads_gives_the_same_bits(level: str) -> None:
    torch.manual_seed(0)
    for samples, tokens, rows, columns in [(9, 7, 33, 70), (5, 64, 300, 400), (2, 2100, 40, 50)]:
        left, right = torch.randn(samples, 1, tokens, rows), torch.randn(samples, 1, tokens, columns)
        found = []
        for count in (1, 2, 3):
            total = torch.zeros(1, rows, columns)
            with threads_are(count):
                assert add_natively([(left, right, 1)], total, absolute)
            found.append(total)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_stays_in_its_row_or_column(level: str, value: float, side: int) -> None:
    factors = [torch.ones(3, 1, 5, 37), torch.ones(3, 1, 5, 41)]
    factors[side][1, 0, 2, 20] = value
    total = torch.zeros(1, 37, 41)
    assert add_natively([(factors[0], factors[1], 1)], total, absolute)
    reached = total[0, 20] if side == 0 else total[0, :, 20]
    assert (reached.isnan() if value != value else reached == float("inf")).all()
    assert (~total.isfinite()).sum() == len(reached)


@needs_library
@pytest.mark.parametrize("make", [lambda x: x.transpose(1, 2), lambda x: x[:, ::2, ::3], lambda x: x[:, 1:3, 5:]])
def test_a_total_of_any_strides(level: str, make: Callable[[Tensor], Tensor]) -> None:
    memory = torch.zeros(2, 37, 41)
    total = make(memory)
    left = integers((4, 2, 3, total.shape[1]), torch.float32, "features last", 1)
    right = integers((4, 2, 3, total.shape[2]), torch.float32, "features last", 2)
    assert add_natively([(left, right, 1)], total, absolute)
    assert torch.equal(total, by_definition([(left, right, 1)], absolute).float())
    make(memory).zero_()
    assert not memory.any()


@needs_library
def test_autograd_sees_that_the_total_was_changed() -> None:
    total = torch.zeros(1, 3, 4)
    before = total._version
    assert add_natively([(torch.ones(2, 1, 2, 3), torch.ones(2, 1, 2, 4), 1)], total, absolute)
    assert total._version == before + 1


@needs_library
def test_what_it_does_not_take() -> None:
    good = torch.ones(2, 1, 3, 4)
    assert takes_products(good, good.bfloat16())
    assert not takes_products(good, good.double())
    assert not takes_products(good, good.half())
    assert not takes_products(good, torch.ones(2, 1, 3, 4, dtype=torch.complex64).conj().imag)  # negates when read
    assert not takes_products(good, good.to("meta"))
    assert not takes_products(good, good.to_sparse())
    assert not add_natively([(good, good, 1)], torch.zeros(1, 4, 4, dtype=torch.float64), absolute)
    assert not add_natively([(good, good, 1)], torch.zeros(1, 4, 4), lambda gradient, out=None: gradient)
    with native_is("off"):
        assert not takes_products(good)


GEOMETRIES = {
    "3x3": ((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1),
    "stride": ((3, 3), (2, 2), (1, 1), ((1, 1), (1, 1)), 1),
    "dilation, groups": ((3, 2), (1, 2), (2, 3), ((0, 0), (2, 2)), 2),
    "uneven padding": ((4, 2), (1, 1), (1, 1), ((1, 2), (0, 1)), 1),
    "1x1": ((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), 1),
    "1x1, stride, groups": ((1, 1), (2, 3), (1, 1), ((0, 0), (0, 0)), 2),
    "1x1, padded": ((1, 1), (1, 1), (1, 1), ((1, 1), (1, 1)), 1),
    "patches": ((3, 3), (3, 3), (1, 1), ((0, 0), (0, 0)), 1),
    "one dimension": ((5,), (2,), (1,), ((2, 2),), 2),
    "three dimensions": ((2, 3, 2), (1, 2, 1), (1, 1, 2), ((0, 0), (1, 1), (1, 1)), 1),
}


@needs_library
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("num_pairs", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions(level: str, name: str, num_pairs: int, channels_last: bool, dtype: torch.dtype) -> None:
    geometry = convolutions.Geometry(*GEOMETRIES[name])
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for extra in range(num_pairs):
        image = torch.randint(-3, 4, (5, 6, *(9 + extra,) * len(geometry.kernel)), generator=generator).to(dtype)
        windows = convolutions.windows_of(image, geometry)
        size = windows.shape[2 + len(geometry.kernel) :]
        grad = torch.randint(-3, 4, (5, 8, *size), generator=generator).to(dtype)
        if channels_last:
            image, grad = (x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (image, grad))
        pairs.append(convolutions.Pair(grad, image))
    found = convolutions.conv_products(pairs, geometry, absolute)
    with native_is("off"):
        expected = convolutions.conv_products(
            [convolutions.Pair(g.double(), i.double()) for g, i in pairs], geometry, absolute
        )
    assert convolutions._conv_weight_natively(pairs, geometry, absolute) is not None
    assert torch.equal(found, expected.float())
    total = torch.ones_like(found)
    if channels_last:
        total = total.movedim(1, -1).contiguous().movedim(-1, 1)
    is_pointwise = geometry.kernel == (1, 1)
    assert convolutions.add_pointwise_products(pairs, geometry, total, absolute) == is_pointwise
    assert torch.equal(total, expected.float() + 1 if is_pointwise else torch.ones_like(found))


@needs_library
def test_products_of_pointwise_convolutions_that_are_not_added_in_place() -> None:
    one = ((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    grad, image, total = torch.ones(2, 4, 3, 3), torch.ones(2, 4, 3, 3), torch.zeros(4, 4, 1, 1)
    pairs, geometry = [convolutions.Pair(grad, image)], convolutions.Geometry(*one, 1)
    add = convolutions.add_pointwise_products
    assert not add(pairs, geometry, total.double(), absolute)
    assert not add(pairs, convolutions.Geometry(*one, 4), total[:, :1], absolute)
    with native_is("off"):
        assert not add(pairs, geometry, total, absolute)
    assert not total.any()
    assert add(pairs, geometry, total, absolute)
    assert (total == 18).all()


@needs_library
def test_images_are_copied_some_samples_at_a_time(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = convolutions.copy_channels_last

    def noted(image: Tensor, *others: Any) -> None:
        copied.append(len(image))
        copy(image, *others)

    monkeypatch.setattr(convolutions, "copy_channels_last", noted)
    monkeypatch.setattr(convolutions, "INPUTS", 1500)  # an image has 6 channels of 11 x 11: two fit
    test_convolutions(level, "3x3", 1, False, torch.float32)
    assert copied == [2, 2, 1] * 2  # the check computes the products twice


class Tied(nn.Module):
    """A table that is the map to the logits too, and a Linear between them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.middle(self.table(tokens))), self.table.weight)


@needs_library
def test_factors_in_bfloat16_are_not_widened_before(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the result is that of the widened ones: products and sums are in float32."""
    seen: list[torch.dtype] = []
    add = outer_products.add_native_products

    def noted(uses: Sequence[Factors], *others: Any) -> None:
        seen.extend(factor.dtype for left, right, _ in uses for factor in (left, right))
        add(uses, *others)

    monkeypatch.setattr(outer_products, "add_native_products", noted)
    torch.manual_seed(0)
    model, batch = Tied().bfloat16(), torch.randint(11, (5, 7))
    found = memsyn.measure(model, [batch], progress=False).mean()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) >= 4
    with native_is("off"):
        expected = memsyn.measure(model, [batch], progress=False).mean()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@needs_library
@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3)])
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_other_halves_and_unlike_ones_are_widened(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(shape).to(dtypes[0]), torch.randn(shape).to(dtypes[1])
    found, expected = torch.zeros(3, 3), torch.zeros(3, 3)
    outer_products.add_token_products([left], [right], found, absolute)
    with native_is("off"):
        outer_products.add_token_products([left.float()], [right.float()], expected, absolute)
    torch.testing.assert_close(found, expected)
