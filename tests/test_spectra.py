"""Spectra against dense eigendecompositions, of whole second moments and of sketches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memsyn.matrices import probe_matrix
from memsyn.values.spectra import Spectrum, combined, spectrum_of, spectrum_of_sketch

GROUPS, WIDTHS, RANKS = st.integers(1, 3), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 9))


def moment(groups: int, width: int, samples: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """sum x x^T over random samples."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, samples, width, generator=generator, dtype=torch.float64).to(dtype)
    return rows.mT @ rows


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    """A matrix (1, n, n) with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (basis * values.double() @ basis.T).unsqueeze(0)


def cut(dense: Tensor, rank: int) -> Tensor:
    """The largest eigenvalues with their vectors, and of the others their mean, by the definition."""
    values, vectors = torch.linalg.eigh(dense)
    other = dense.shape[1] - rank
    values = torch.cat([values[:, :other].mean(1, keepdim=True).expand(-1, other), values[:, other:]], 1)
    return vectors * values.unsqueeze(1) @ vectors.mT


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest)


def assert_orthonormal(spectrum: Spectrum, tolerance: float = 1e-9) -> None:
    assert spectrum.vectors is not None
    identity = torch.eye(spectrum.rank, dtype=spectrum.vectors.dtype).expand(len(spectrum.values), -1, -1)
    close(spectrum.vectors.mT @ spectrum.vectors, identity, tolerance)


@given(groups=GROUPS, width=WIDTHS, samples=st.integers(1, 9), rank=RANKS, seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_a_spectrum_is_that_of_the_dense_matrix(
    groups: int, width: int, samples: int, rank: int | None, seed: int
) -> None:
    own = moment(groups, width, samples, seed)
    found, mean = spectrum_of(own, rank)
    is_cut = rank is not None and 2 * rank < width
    kept = rank if is_cut and rank is not None else width
    trace = own.diagonal(dim1=1, dim2=2).sum(1)
    assert mean == pytest.approx(float(trace.sum()) / (groups * width))
    assert (found.rank, found.width, len(found.rest)) == (kept, width, groups)
    scaled = own / mean
    expected = torch.linalg.eigvalsh(scaled).flip(1)
    close(found.values, expected[:, :kept].clamp_min(0))
    close(found.trace(), trace / mean)
    assert float(found.trace().mean()) / width == pytest.approx(1.0)
    assert bool((found.values.diff(dim=1) <= 0).all())
    assert bool((found.values >= found.rest.unsqueeze(1) - 1e-12).all())
    assert_orthonormal(found)
    if is_cut:
        close(found.trace() - found.values.sum(1), expected[:, kept:].sum(1))
    # Two equal eigenvalues at the cut leave their vectors undetermined: compare where there is a gap.
    if not is_cut or bool((expected[:, kept - 1] - expected[:, kept] > 1e-3).all()):
        close(found.dense(), cut(scaled, kept) if is_cut else scaled, 1e-8)
    assert found.lost() == pytest.approx(float(expected[:, kept:].sum() / expected.sum()), abs=1e-12)
    whole, alone = spectrum_of(own, None, scaled=False)
    assert alone == pytest.approx(mean)
    close(whole.dense(), own)
    squares = own.square().sum((1, 2))
    assert whole.dimension() == pytest.approx(float((trace.square() / squares).sum()))


def test_a_diagonal_keeps_its_basis() -> None:
    counts = torch.tensor([1.0, 0.0, 5.0])
    found, mean = spectrum_of(counts, 1)
    assert mean == 2.0
    assert found.vectors is None
    assert found.values.tolist() == [[0.5, 0.0, 2.5]]
    assert (found.width, found.rank, found.lost()) == (3, 3, 0.0)
    assert torch.equal(found.dense()[0], torch.diag(counts / 2))
    assert found.wider(5).values.tolist() == [[0.5, 0.0, 2.5, 0.0, 0.0]]
    assert float(found.last()) == 2.5
    assert torch.equal(found.without_last().dense(), found.dense()[:, :-1, :-1])
    twice = combined(found, spectrum_of(torch.ones(3), None)[0], (2.0, 0.5), 1, 9)
    assert twice.vectors is None
    assert twice.values.tolist() == [[1.5, 0.5, 5.5]]


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 0, 0), (4,), (0,)])
def test_a_zero_moment_has_no_scale(shape: tuple[int, ...]) -> None:
    found, mean = spectrum_of(torch.zeros(shape), None)
    assert mean == 0.0
    assert not found.values.any()
    assert found.lost() == 0.0


@given(
    groups=GROUPS,
    width=st.integers(2, 9),
    rank=RANKS,
    added=st.integers(0, 4),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_wider_and_without_last_are_those_of_the_dense_matrix(
    groups: int, width: int, rank: int | None, added: int, seed: int
) -> None:
    found, _ = spectrum_of(moment(groups, width, width, seed), rank)
    wider = found.wider(width + added)
    close(wider.dense(), torch.nn.functional.pad(found.dense(), (0, added, 0, added)))
    assert wider.width == width + added
    assert_orthonormal(wider)
    close(wider.trace(), found.trace())
    close(found.last(), found.dense()[:, -1, -1])
    for own in (found, wider):
        shorter = own.without_last()
        close(shorter.dense(), own.dense()[:, :-1, :-1])
        assert shorter.width == own.width - 1
        assert_orthonormal(shorter)


def test_to_changes_the_dtype_of_all_parts() -> None:
    found = spectrum_of(moment(1, 9, 20), 2)[0].to(torch.device("cpu"), torch.float32)
    assert found.vectors is not None
    assert {t.dtype for t in (found.values, found.vectors, found.rest)} == {torch.float32}
    plain = spectrum_of(torch.ones(3, dtype=torch.float64), None)[0].to(torch.device("cpu"), torch.float32)
    assert plain.vectors is None
    assert plain.dense().dtype == torch.float32


# Sketches


def sketched(own: Tensor, columns: int, rank: int | None = None) -> tuple[Spectrum, float]:
    return spectrum_of_sketch(own @ probe_matrix(own.shape[1], columns, own), own.diagonal(dim1=1, dim2=2).sum(1), rank)


@pytest.mark.parametrize(("width", "columns", "samples"), [(40, 12, 5), (300, 64, 30), (300, 64, 1), (40, 40, 15)])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_sketch_of_low_rank_reconstructs_the_matrix(groups: int, width: int, columns: int, samples: int) -> None:
    own = moment(groups, width, samples, dtype=torch.float32)
    found, mean = sketched(own, columns)
    assert found.values.dtype == torch.float32
    assert found.rank == columns // 2
    assert mean == pytest.approx(float(own.diagonal(dim1=1, dim2=2).mean()), rel=1e-5)
    error = (found.dense().double() - own.double() / mean).norm() / (own.double() / mean).norm()
    assert float(error) <= 1e-4
    assert found.lost() <= 1e-4
    assert_orthonormal(found, 1e-5)


DECAYS = {
    "power": lambda n: torch.arange(1, n + 1).double() ** -1.0,
    "square": lambda n: torch.arange(1, n + 1).double() ** -2.0,
    "exponential": lambda n: 0.8 ** torch.arange(n).double(),
    "flat with a few": lambda n: torch.cat([torch.full((5,), 100.0).double(), torch.ones(n - 5).double()]),
    "flat": lambda n: torch.ones(n).double(),
}


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("rank", [None, 3])
def test_what_a_sketch_has_lost_is_its_error_in_nuclear_norm(name: str, rank: int | None) -> None:
    width, columns = 120, 32
    own = with_eigenvalues(DECAYS[name](width))
    found, mean = sketched(own, columns, rank)
    assert found.vectors is not None
    assert bool((found.values >= found.rest.unsqueeze(1)).all())
    if name == "flat with a few" and rank is None:
        # The sketch sees too little of the flat part. What it has found there is raised to the mean of the rest.
        assert torch.equal(found.values[:, 5:], found.rest.expand(1, 11))
        assert width < float(found.trace().sum()) <= width + 11 * float(found.rest)
        return
    kept = found.vectors * found.values.unsqueeze(1) @ found.vectors.mT
    left = own / mean - kept
    values = torch.linalg.eigvalsh(left)
    # Nothing is invented: the eigenvalues of the approximation are never above those of the matrix.
    assert float(values.min()) >= -1e-9 * float(found.values.max())
    assert found.lost() == pytest.approx(float(values.abs().sum()) / width, rel=1e-8)
    best = torch.linalg.eigvalsh(own / mean)[0, : width - found.rank].sum() / width
    assert found.lost() >= float(best) - 1e-9
    assert float(found.trace().sum()) == pytest.approx(width)


@given(
    width=st.integers(2, 30),
    columns=st.integers(1, 30),
    samples=st.integers(1, 40),
    rank=RANKS,
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_sketches_of_any_shape(width: int, columns: int, samples: int, rank: int | None, seed: int) -> None:
    columns = min(columns, width)
    own = moment(2, width, samples, seed)
    found, mean = sketched(own, columns, rank)
    assert found.rank == min(rank or max(1, columns // 2), columns)
    assert found.rank == width or bool((found.values >= found.rest.unsqueeze(1)).all())
    assert_orthonormal(found, 1e-6)
    trace = own.diagonal(dim1=1, dim2=2).sum(1) / mean
    # An eigenvalue below the mean of the rest is raised to it.
    assert bool((found.trace() >= trace * (1 - 1e-6)).all())
    assert bool((found.trace() <= trace + found.rank * found.rest + 1e-6).all())


def test_sketches_of_nothing() -> None:
    found, mean = spectrum_of_sketch(torch.zeros(2, 9, 4), torch.zeros(2), None)
    assert mean == 0.0
    assert not found.dense().any()
    one_group = moment(2, 20, 3)
    one_group[1] = 0
    found, mean = sketched(one_group, 12)
    close(found.dense(), one_group / mean, 1e-6)
    assert_orthonormal(found, 1e-6)


# Sums


@given(groups=GROUPS, width=WIDTHS, ranks=st.tuples(RANKS, RANKS, RANKS), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_weighted_sum_is_that_of_the_dense_matrices(
    groups: int, width: int, ranks: tuple[int | None, int | None, int | None], seed: int
) -> None:
    one, other = (spectrum_of(moment(groups, width, 5, seed + k), ranks[k])[0] for k in (0, 1))
    dense = 0.3 * one.dense() + 1.5 * other.dense()
    found = combined(one, other, (0.3, 1.5), ranks[2], width)
    close(found.trace(), dense.diagonal(dim1=1, dim2=2).sum(1))
    if ranks[2] is None or 2 * ranks[2] >= width:
        close(found.dense(), dense)
    else:
        close(found.values, torch.linalg.eigvalsh(dense).flip(1)[:, : ranks[2]])
    # Beyond the width up to which matrices are whole: all vectors of both, if the rank allows it.
    wide = combined(one, other, (0.3, 1.5), width, width - 1)
    close(wide.dense(), dense)
    assert_orthonormal(wide)


@pytest.mark.parametrize("rank", [None, 2, 5, 12])
def test_a_sum_of_wide_spectra_is_cut_like_the_dense_matrix(rank: int | None) -> None:
    one = spectrum_of(with_eigenvalues(DECAYS["power"](30), 1), 6)[0]
    other = spectrum_of(with_eigenvalues(DECAYS["square"](30), 2), 4)[0]
    found = combined(one, other, (0.7, 0.6), rank, 29)
    dense = 0.7 * one.dense() + 0.6 * other.dense()
    kept = min(rank or 6, 10)
    assert found.rank == kept
    close(found.dense(), cut(dense, kept))
    close(found.trace(), torch.full((1,), 30 * 1.3, dtype=torch.float64))
    assert_orthonormal(found)


def test_wide_spectra_know_that_added_directions_are_free() -> None:
    one = spectrum_of(with_eigenvalues(DECAYS["power"](20)), 5)[0].wider(23)
    other = spectrum_of(with_eigenvalues(DECAYS["square"](23), 2), 5)[0]
    dense = 0.5 * one.dense() + 0.5 * other.dense()
    close(combined(one, other, (0.5, 0.5), 23, 22).dense(), dense)
    close(combined(one, other, (0.5, 0.5), 4, 22).dense(), cut(dense, 4))


def test_a_sum_takes_the_wider_dtype() -> None:
    one = spectrum_of(moment(1, 4, 9), None)[0]
    found = combined(one.to(torch.device("cpu"), torch.float32), one, (1.0, 1.0), None, 9)
    assert found.values.dtype == torch.float64
    close(found.dense(), 2 * one.dense(), 1e-6)
