"""The value Spectrum: the largest eigenvalues of a second moment with their vectors, and the mean of the rest.

Owns eigendecompositions, of whole second moments and of sketches. Must not know layers or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from memsyn.matrices import probe_matrix


@final
@dataclass(frozen=True, eq=False)
class Spectrum:
    """V diag(values) V^T + rest (I - V V^T), for G groups.

    Attributes:
        values: (G, r), from the largest to the smallest; not negative.
        vectors: (G, n, r), orthonormal columns; None for the standard basis, where r = n.
        rest: (G,), the mean of the other n - r eigenvalues; 0 if there are none.
    """

    values: Tensor
    vectors: Tensor | None
    rest: Tensor

    def __repr__(self) -> str:
        return f"Spectrum({len(self.values)} x {self.width} directions, {self.rank} of {self.width} kept)"

    @property
    def width(self) -> int:
        """n."""
        return self.values.shape[1] if self.vectors is None else self.vectors.shape[1]

    @property
    def rank(self) -> int:
        """r."""
        return self.values.shape[1]

    def trace(self) -> Tensor:
        """(G,), the sum of all eigenvalues."""
        return self.values.sum(1) + self.rest * (self.width - self.rank)

    def dimension(self) -> float:
        """tr(M)^2 / tr(M^2), summed over groups: how many directions it fills."""
        squares = self.values.square().sum(1) + self.rest.square() * (self.width - self.rank)
        return float((self.trace().square() / squares.clamp_min(torch.finfo(squares.dtype).tiny)).sum())

    def lost(self) -> float:
        """The share of the trace that lies outside of the kept vectors."""
        whole = float(self.trace().sum())
        return float((self.rest * (self.width - self.rank)).sum()) / whole if whole else 0.0

    def dense(self) -> Tensor:
        """The whole matrix, (G, n, n)."""
        if self.vectors is None:
            return torch.diag_embed(self.values)
        scaled = self.vectors * (self.values - self.rest.unsqueeze(1)).unsqueeze(1)
        identity = torch.eye(self.width, dtype=self.values.dtype, device=self.values.device)
        return scaled @ self.vectors.transpose(1, 2) + self.rest.view(-1, 1, 1) * identity

    def to(self, device: torch.device, dtype: torch.dtype) -> Spectrum:
        """The same on another device and in another dtype, its numbers in the order in which a file holds them.

        So a product with them rounds alike before they were saved and after they were loaded.
        """
        values, rest = (own.to(device, dtype).contiguous() for own in (self.values, self.rest))
        return Spectrum(values, None if self.vectors is None else self.vectors.to(device, dtype).contiguous(), rest)

    def product(self, columns: Tensor) -> Tensor:
        """M x for the columns of x, (G, n, k); no matrix (n, n) is formed."""
        values, rest = self.values.to(columns), self.rest.to(columns).view(-1, 1, 1)
        if self.vectors is None:
            return values.unsqueeze(2) * columns
        vectors = self.vectors.to(columns)
        return vectors @ ((values.unsqueeze(2) - rest) * (vectors.transpose(1, 2) @ columns)) + rest * columns

    def wider(self, width: int) -> Spectrum:
        """The same with further directions of eigenvalue 0, which come last. They are kept vectors."""
        added = width - self.width
        if not added:
            return self
        values = torch.nn.functional.pad(self.values, (0, added))
        if self.vectors is None:
            return Spectrum(values, None, self.rest)
        vectors = torch.nn.functional.pad(self.vectors, (0, added, 0, added))
        vectors[:, self.width :, self.rank :] = torch.eye(added).to(vectors)
        return Spectrum(values, vectors, self.rest)

    def last(self) -> Tensor:
        """(G,), the last number on the diagonal of the matrix."""
        if self.vectors is None:
            return self.values[:, -1]
        return (self.vectors[:, -1].square() * (self.values - self.rest.unsqueeze(1))).sum(1) + self.rest

    def without_last(self) -> Spectrum:
        """The spectrum of the matrix without its last row and column."""
        if self.vectors is None:
            return Spectrum(self.values[:, :-1], None, self.rest)
        values, vectors = _eigen(self.vectors[:, :-1], self.values - self.rest.unsqueeze(1))
        found = Spectrum(values + self.rest.double().unsqueeze(1), vectors, self.rest)
        return found.to(self.values.device, self.values.dtype)


def _eigen(columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, from the largest to the smallest, and vectors of C diag(w) C^T, for C (G, n, k) and w (G, k).

    There are min(n, k) of them. No matrix (n, n) is formed.
    """
    basis, upper = torch.linalg.qr(columns.double())
    values, vectors = torch.linalg.eigh((upper * weights.double().unsqueeze(1)) @ upper.transpose(1, 2))
    return values.flip(1), basis @ vectors.flip(2)


def spectrum_of(moment: Tensor, rank: int | None, *, scaled: bool = True) -> tuple[Spectrum, float]:
    """The spectrum of a second moment (G, n, n), or of a diagonal (n,), and its mean eigenvalue over all groups.

    If `scaled`, the spectrum is divided by that mean. With a rank below half of the width, the other eigenvalues are
    replaced by their mean; else all are kept, since that takes less room. Computed in float64.
    """
    wide = moment.double()
    if moment.ndim == 1:
        mean = float(wide.mean()) if len(wide) else 0.0
        values = wide / mean if scaled and mean > 0 else wide
        return Spectrum(values.unsqueeze(0).to(moment), None, moment.new_zeros(1)), mean
    mean = float(wide.diagonal(dim1=1, dim2=2).mean()) if wide.numel() else 0.0
    values, vectors = torch.linalg.eigh(wide / mean if scaled and mean > 0 else wide)
    return truncated(values.flip(1).clamp_min(0), vectors.flip(2), rank).to(moment.device, moment.dtype), mean


def truncated(values: Tensor, vectors: Tensor, rank: int | None) -> Spectrum:
    """The spectrum of all eigenvalues and vectors; of `rank` of them and the mean of the rest, if that is smaller."""
    width = vectors.shape[1]
    if rank is None or 2 * rank >= width:
        return Spectrum(values, vectors, values.new_zeros(len(values)))
    return Spectrum(values[:, :rank], vectors[:, :, :rank].contiguous(), values[:, rank:].mean(1))


def spectrum_of_sketch(sketch: Tensor, trace: Tensor, rank: int | None) -> tuple[Spectrum, float]:
    """The spectrum of M from its sketch M Omega (G, n, l) and its trace (G,), scaled to mean eigenvalue 1.

    The Nystroem approximation N = Y (Omega^T Y)^+ Y^T with Y = M Omega (Tropp et al. 2017). M - N has no negative
    eigenvalue, so that its nuclear norm is exactly tr(M) - tr(N): the part that is replaced by its mean. The default
    rank is half of the sketch's columns.
    """
    _, width, columns = sketch.shape
    mean = float(trace.double().sum()) / (len(trace) * width)
    if not mean > 0:
        empty = Spectrum(trace.new_zeros(len(trace), 1), sketch.new_zeros(*sketch.shape[:2], 1), trace * 0)
        return empty, 0.0
    y = sketch.double() / mean
    omega = probe_matrix(width, columns, y)
    core = omega.T @ y
    values, vectors = torch.linalg.eigh((core + core.transpose(1, 2)) / 2)
    least = values.amax(1, keepdim=True) * width * torch.finfo(sketch.dtype).eps
    inverse_root = torch.where(values > least, values.clamp_min(0).rsqrt(), torch.zeros_like(values))
    left, singular, _ = torch.linalg.svd((y @ vectors) * inverse_root.unsqueeze(1), full_matrices=False)
    kept = min(rank or max(1, columns // 2), columns)
    # No eigenvalue of M is above its trace; a file may hold a sketch that says otherwise.
    values = singular.square()[:, :kept].minimum(trace.double().unsqueeze(1) / mean)
    vectors = left[:, :, :kept].contiguous()
    lost = (trace.double() / mean - values.sum(1)).clamp_min(0)
    rest = lost / (width - kept) if kept < width else lost * 0
    # An eigenvalue below the mean of the rest would be damped less than the directions that are not kept.
    return Spectrum(values.maximum(rest.unsqueeze(1)), vectors, rest).to(sketch.device, sketch.dtype), mean


def combined(old: Spectrum, new: Spectrum, weights: tuple[float, float], rank: int | None, whole: int) -> Spectrum:
    """The spectrum of weights[0] old + weights[1] new.

    Up to the width `whole` from the whole matrices, else from the kept vectors alone, without forming a matrix.
    """
    old = old.to(new.values.device, torch.promote_types(old.values.dtype, new.values.dtype))
    if old.vectors is None or new.vectors is None:
        return Spectrum(weights[0] * old.values + weights[1] * new.values, None, old.rest)
    if old.width <= whole:
        return spectrum_of(weights[0] * old.dense() + weights[1] * new.dense(), rank, scaled=False)[0]
    rest = (weights[0] * old.rest + weights[1] * new.rest).double()
    # Without its rest, a spectrum is sum_i (value_i - rest) v_i v_i^T: negative for the directions `wider` has added.
    parts = [weight * (own.values - own.rest.unsqueeze(1)) for own, weight in zip((old, new), weights, strict=True)]
    values, vectors = _eigen(torch.cat([old.vectors, new.vectors.to(old.vectors)], 2), torch.cat(parts, 1))
    kept = min(rank or max(old.rank, new.rank), values.shape[1])
    dropped = values[:, kept:].sum(1) / max(1, old.width - kept)
    values = (values[:, :kept] + rest.unsqueeze(1)).clamp_min(0)
    found = Spectrum(values, vectors[:, :, :kept].contiguous(), (rest + dropped).clamp_min(0))
    return found.to(old.values.device, old.values.dtype)
