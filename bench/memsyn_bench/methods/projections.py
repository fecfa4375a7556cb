"""Methods that keep new tasks out of the directions that old tasks use: memsyn's projection, GPM and Adam-NSCL.

Owns when factors are measured and how tasks are added up, and the bases of the last two. The factors and the first
projection are memsyn's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, final

import torch
from torch import Tensor

from memsyn import KroneckerFactors, Memory, measure
from memsyn.matrices import Matrix
from memsyn.parameters import trainable_parameters
from memsyn.values.directions import STRENGTH
from memsyn.values.spectra import Spectrum
from memsyn_bench.methods.method import Method, TaskTraining, TensorGroups
from memsyn_bench.methods.penalties import MEASURE_BATCH, present_weights, through_head
from memsyn_bench.methods.sources import TRAINING, ImageSource, MeasuringMethod
from memsyn_bench.sequences.networks import MultiHead

Moments = Literal["kronecker", "inputs"]
"""The estimators of `memsyn.measure` that measure factors."""

FIRST_SHARE, SHARE_PER_TASK, LARGEST_SHARE = 0.97, 0.003, 0.999
"""GPM's threshold: 0.97 for the first task and 0.003 more with each, as Saha et al. (2021) for 10-split CIFAR-100. From
the eleventh task on it stays below 1, where nothing could be learned."""
NULL_RATIO = 10.0
"""a of Wang et al. (2021), as in their code for 10-split CIFAR-100 and TinyImageNet; 30 for 20-split CIFAR-100."""


@final
class Projection(MeasuringMethod):
    """The factors of a task are measured when it has been learned, and projected away from the next task on.

    Args:
        strength: c; by default that of `memsyn.protect`, for every sequence.
        estimator: as `memsyn.measure` takes it.
        rank: the number of eigenvectors that are kept; None: all.
        every: steps between two projections.
        source: the images that factors are measured on.
        protects_heads: whether heads are protected too; not if another method replaces them.
    """

    def __init__(
        self,
        strength: float = STRENGTH,
        *,
        estimator: Moments = "kronecker",
        rank: int | None = 64,
        every: int = 10,
        source: ImageSource = TRAINING,
        protects_heads: bool = True,
    ) -> None:
        super().__init__(strength, source)
        self.options = {"every": every} if protects_heads else {"every": every, "exclude": ["heads.*"]}
        self._estimator, self._rank = estimator, rank

    def remembered(self, training: TaskTraining, images: Tensor) -> Memory:
        """The memory with the factors over the images."""
        factors = _factors(training, images, self._estimator)
        return self.memory.consolidate(training.model, factors, rank=self._rank)


def _factors(training: TaskTraining, images: Tensor, estimator: Moments) -> KroneckerFactors:
    """The factors over images, through the task's head."""
    batches = images.split(MEASURE_BATCH)
    forward = through_head(training)
    return measure(training.model, batches, forward=forward, estimator=estimator, progress=False)


Extend = Callable[[KroneckerFactors, TensorGroups, int], TensorGroups]
"""(factors of a task's inputs, what is kept of the tasks before, the task's index) -> what is kept now.

Its group `bases` has (G, n, k) for each matrix: orthonormal columns, or zeros where the G groups differ in number.
"""


def gpm(factors: KroneckerFactors, kept: TensorGroups, index: int) -> TensorGroups:
    """Gradient Projection Memory: the basis M of each layer spans most of the inputs of every task (Saha et al. 2021).

    All training images count, and of a convolution all patches; the paper takes a random sample of them.
    """
    share = min(FIRST_SHARE + SHARE_PER_TASK * index, LARGEST_SHARE)
    bases = dict(kept.get("bases", {}))
    for key in factors.matrices:
        found = factors.spectrum("inputs", key)
        if found is not None:
            bases[key] = extended_basis(bases.get(key), found[0], share)
    return {"bases": bases}


def adam_nscl(factors: KroneckerFactors, kept: TensorGroups, index: int) -> TensorGroups:
    """Adam-NSCL: each layer changes in the null space of its inputs' uncentered covariance alone (Wang et al. 2021).

    The covariance is summed over all positions of all tasks, each of the same weight. What is kept beside it are the
    directions outside of the null space: with U1 of these and U2 of the others, P = U2 U2^T = I - U1 U1^T.

    The authors' code divides P by its Frobenius norm, the root of the number of directions, and has a learning rate of
    its own for it. Here P is not divided: all methods share a learning rate.
    """
    old = kept.get("sums", {})
    own = {name: total for name, total in factors.sums.items() if name.partition("/")[2] in factors.matrices}
    sums = {**old, **{name: total + old[name] if name in old else total for name, total in own.items()}}
    whole = replace(factors, sums=sums)
    bases = dict(kept.get("bases", {}))
    for key in factors.matrices:
        found = whole.spectrum("inputs", key)
        if found is not None:
            bases[key] = outside_null_space(found[0])
    return {"sums": sums, "bases": bases}


def extended_basis(basis: Tensor | None, moment: Spectrum, share: float) -> Tensor:
    """GPM's basis M with the leading left singular vectors of R - M M^T R, (G, n, k).

    As many as ||M M^T R||^2 + ||kept||^2 >= share ||R||^2 needs. `moment` is that of R R^T = V diag(a) V^T, up to a
    factor: V diag(a)^(1/2) is R up to a rotation of its columns, which changes none of these.
    """
    vectors = _eigenvectors(moment).double()
    inputs = vectors * moment.values.double().sqrt().unsqueeze(1)
    old = inputs.new_zeros(*inputs.shape[:2], 0) if basis is None else basis.to(inputs)
    spanned = old.transpose(1, 2) @ inputs
    left, singular, _ = torch.linalg.svd(inputs - old @ spanned, full_matrices=False)
    energy, total = singular.square(), moment.trace().double().unsqueeze(1)
    before = spanned.square().sum((1, 2)).unsqueeze(1) + energy.cumsum(1) - energy
    # A vector of no energy is arbitrary, and may lie in the old span.
    is_new = (before < share * total) & (energy > torch.finfo(moment.values.dtype).eps * total)
    return torch.cat([old, _chosen_columns(left, is_new)], 2).to(moment.values)


def outside_null_space(moment: Spectrum, ratio: float = NULL_RATIO) -> Tensor:
    """The eigenvectors whose eigenvalue is above `ratio` times the smallest one, (G, n, k).

    The smallest one is taken as no less than what rounding leaves of a zero: the machine epsilon times the largest.
    """
    values = moment.values
    smallest = values.amin(1) if moment.rank == moment.width else moment.rest
    least = smallest.maximum(torch.finfo(values.dtype).eps * values.amax(1))
    return _chosen_columns(_eigenvectors(moment), values > ratio * least.unsqueeze(1))


def _eigenvectors(moment: Spectrum) -> Tensor:
    """(G, n, r); those of a table's rows are the standard basis."""
    return torch.eye(moment.width).to(moment.values).unsqueeze(0) if moment.vectors is None else moment.vectors


def _chosen_columns(vectors: Tensor, chosen: Tensor) -> Tensor:
    """The columns of (G, n, r) chosen in any group by (G, r), with zeros where another group chose."""
    return (vectors * chosen.unsqueeze(1))[:, :, chosen.any(0)]


def without_span(matrix: Matrix, basis: Tensor, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """D - D M M^T for the change D of a weight, with that of its bias as the last column: the input 1.

    Example: a Linear(4, 3) has D of (1, 3, 5), and M (1, 5, k).
    """
    layout, weight = matrix.layout, changes[matrix.weight]
    change = layout.matrix(weight)
    if matrix.bias is not None:
        change = torch.cat([change, changes[matrix.bias].reshape(layout.groups, -1, 1)], 2)
    basis = basis.to(change)
    change = change - (change @ basis) @ basis.transpose(1, 2)
    found = {matrix.weight: layout.weight(change[:, :, : layout.inputs], weight.shape)}
    return found if matrix.bias is None else {**found, matrix.bias: change[:, :, -1].flatten()}


@final
class OrthogonalProjection(Method):
    """From the second task on, weight matrices change only where the inputs of old tasks have no part.

    What else the backbone has (scales and shifts of normalisations) is frozen after the first task, as in GPM's code;
    Adam-NSCL's code penalises its change. A head of its own for each task is free.

    GPM projects the gradient, g <- g - g M M^T, before the optimizer's step. Its paper trains by SGD, whose step then
    stays outside of M. Adam divides a gradient weight by weight, so that its step does not: with the benchmark's
    default optimizer GPM protects less than in the paper. Adam-NSCL projects the change of the weights by the
    optimizer's step, whichever optimizer it is.

    Args:
        extend: adds a task to what is kept.
        of_updates: whether the optimizer's change is projected, not the gradient.
    """

    def __init__(self, extend: Extend, *, of_updates: bool) -> None:
        super().__init__()
        self._extend, self._of_updates = extend, of_updates
        self._matrices: dict[str, Matrix] = {}

    def begin(self, training: TaskTraining) -> None:
        """Find the weight matrices, by a forward pass of one image."""
        if self.kept:
            self._matrices = _input_factors(training, training.task.train_images[:1]).matrices

    def before_step(self, training: TaskTraining, images: Tensor) -> None:
        """Project the gradients, or put the weights aside."""
        if not self.kept:
            return
        if self._of_updates:
            self.working = {"before": present_weights(training.model)}
        else:
            parameters = trainable_parameters(training.model)
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            for name, gradient in self._projected(gradients).items():
                gradients[name].copy_(gradient)

    @torch.no_grad()
    def after_step(self, training: TaskTraining) -> None:
        """Project the change of the weights."""
        if self.working:
            before, parameters = self.working["before"], trainable_parameters(training.model)
            changes = {name: p - before[name] for name, p in parameters.items() if p.grad is not None}
            for name, change in self._projected(changes).items():
                parameters[name].copy_(before[name] + change)

    def _projected(self, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changes that are not free, as they may be."""
        of_matrices = {name for matrix in self._matrices.values() for name in (matrix.weight, matrix.bias)}
        found = {
            name: torch.zeros_like(change)
            for name, change in changes.items()
            if name.startswith("body.") and name not in of_matrices
        }
        for key, matrix in self._matrices.items():
            if key in self.kept["bases"] and matrix.weight in changes:
                found |= without_span(matrix, self.kept["bases"][key], changes)
        return found

    def end(self, training: TaskTraining) -> None:
        """Measure the task's inputs on its training images, and add them."""
        super().end(training)
        factors = _input_factors(training, training.task.train_images)
        self.kept = self._extend(factors, self.kept, training.index)


def _input_factors(training: TaskTraining, images: Tensor) -> KroneckerFactors:
    """The inputs' factors of the matrices that later tasks train too."""
    factors = _factors(training, images, "inputs")
    has_own_head = isinstance(training.model, MultiHead)
    matrices = {
        key: matrix for key, matrix in factors.matrices.items() if not (has_own_head and key.startswith("heads."))
    }
    return replace(factors, matrices=matrices)
