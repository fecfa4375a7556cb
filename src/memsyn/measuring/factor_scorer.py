"""Kronecker factors: the scorer that sums second moments of weight matrices while the model runs.

Owns which parameters are measured as matrices, and their sums. All other parameters are measured like importance, by
the routes of `measurement`. Must not know files.
"""

import math
from collections import Counter
from collections.abc import Container, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Final, final

import torch
from torch import Tensor, nn

from memsyn.batches import Batch
from memsyn.engine.matrix_tracer import MatrixFinder, MatrixTracer, complete_, zero_sums
from memsyn.engine.passes import run_backward
from memsyn.engine.recorder import Recorder
from memsyn.matrices import Matrix
from memsyn.measuring.objectives import (
    Estimator,
    Forward,
    OutputScorer,
    Position,
    SampleInfo,
    Scorer,
    check_holds_samples,
)
from memsyn.measuring.padding import layer_mask
from memsyn.values.factors import SQUARED_OUTPUTS


@final
class FactorScorer(Scorer):
    """The estimator's objective of the model's output; while a recorder watches, second moments are summed.

    Args:
        forward, estimator: as for every scorer.
        rank: of the sketches; None: second moments are summed whole as far as they are not too wide.
    """

    tells_samples_apart = True

    def __init__(self, forward: Forward | None, estimator: Estimator, rank: int | None = None) -> None:
        super().__init__(forward, estimator)
        self._rank = rank
        self.output_scorer = OutputScorer(forward, replace(estimator, objective=self._objective))
        self._adds_outputs = False
        self.matrices: dict[str, Matrix] = {}
        """Key -> matrix, as `MatrixFinder` names them."""
        self.sums: Mapping[str, Tensor] = {}
        """Where second moments are added: the running sums of the measurement."""
        self.excluded: Container[str] | None = None
        """The keys whose second moments are not added, in a second pass over a batch; None in a first pass."""
        self._parameters: dict[str, nn.Parameter] = {}

    def first_sums(self) -> dict[str, Tensor]:
        """The sums before the first sample that do not wait for a matrix: sum_k ||y_k||^2, if outputs are looked at."""
        return {SQUARED_OUTPUTS: torch.zeros((), dtype=torch.float64)} if self.needs_outputs else {}

    def _objective(self, output: Tensor, info: SampleInfo) -> Tensor:
        """The estimator's objective; the squared outputs are added if the pass adds."""
        if self._adds_outputs:
            total = self.sums[SQUARED_OUTPUTS]
            total += output.detach().double().square().sum().to(total.device)
        return self.estimator.objective(output, info)

    @property
    def needs_outputs(self) -> bool:
        """Whether the second moments of output gradients are summed, which needs a backward pass."""
        return self.estimator.factors == "both"

    def names(self) -> set[str]:
        """The parameters of all matrices."""
        weights = {matrix.weight for matrix in self.matrices.values()}
        return weights | {matrix.bias for matrix in self.matrices.values() if matrix.bias is not None}

    def candidates(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batch: Batch,
        position: Position,
        measured: Container[str],
    ) -> tuple[dict[str, Matrix], set[str]]:
        """(key -> matrix for the matrices among the parameters, parameters that the batch uses in another way).

        Those that are known are apart. A parameter of `measured` has sums of another kind already, which would be lost:
        it is measured as before. Of output gradients, a matrix is only taken if sum d x^T over its uses is the gradient
        of autograd: then no use of it is hidden.
        """
        several = (
            batch
            if batch.num_samples != 1 or batch.whole
            else batch.map(lambda t: torch.cat([t, t]) if len(t.shape) else t)
        )
        finder, values = self._watched(model, parameters, several, position)
        found = {
            key: replace(matrix, bias=None) if matrix.bias in measured else matrix
            for key, matrix in finder.matrices().items()
            if matrix.weight not in measured
        }
        if several.num_samples is not None:
            constant = self._constant(finder, model, several, position)
            found = {key: matrix for key, matrix in found.items() if matrix.weight not in constant}
        if self.needs_outputs:
            names = sorted({matrix.weight for matrix in found.values()})
            hidden = _with_hidden_uses(finder, values, {name: parameters[name] for name in names})
            found = {key: matrix for key, matrix in found.items() if matrix.weight not in hidden}
        weights = {matrix.weight for matrix in found.values()}
        return found, (finder.others | finder.num_positions.keys()) - weights

    def take(
        self, found: Mapping[str, Matrix], parameters: Mapping[str, nn.Parameter], *, on_meta: bool = False
    ) -> dict[str, Tensor]:
        """Measure these matrices from now on; returns their sums, which are zero.

        The sums are on the parameters' device; with `on_meta`, they have no values, but shapes and dtypes alone.
        """
        self.matrices.update(found)
        self._parameters.update({name: parameters[name] for name in self.names() & parameters.keys()})
        weights: Mapping[str, Tensor] = self._parameters
        if on_meta:
            weights = {name: torch.empty_like(p, device="meta") for name, p in weights.items()}
        return zero_sums(found, weights, outputs=self.needs_outputs, rank=self._rank)

    def _watched(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, position: Position
    ) -> tuple[MatrixFinder, Tensor]:
        """Run the model once while a finder watches; returns the finder and the objectives."""
        finder = MatrixFinder(parameters, torch.zeros((), requires_grad=True))
        with finder:
            values = self.output_scorer.scores(model, parameters, batch.copied(), position)
        return finder, values

    def _constant(self, together: MatrixFinder, model: nn.Module, batch: Batch, position: Position) -> set[str]:
        """Weights whose positions do not add up over samples.

        Such a weight is applied to a constant, as a row of a position table or a learned query. With two samples it has
        as many positions as with one, and its output gradient is summed over samples before it arrives.
        """
        counts: Counter[str] = Counter()
        for sample in batch.one_by_one():
            alone, _ = self._watched(model, together.parameters, sample, position)
            counts.update(alone.num_positions)
        return {name for name, number in together.num_positions.items() if counts[name] != number}

    def scores(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        batch: Batch,
        position: Position,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """(B, 1), the objective of each sample. With a recorder, second moments of the batch are added."""
        # A second pass over a batch, for the matrices that are new, leaves out those that are known.
        self._adds_outputs = recorder is not None and self.excluded is None
        try:
            with nullcontext() if recorder is None else self._tracer(model, batch, recorder.root):
                return self.output_scorer.scores(model, parameters, batch, position, recorder)
        finally:
            self._adds_outputs = False

    def add_inputs(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, batch_index: int
    ) -> set[str]:
        """Add the second moments of the inputs alone, by a forward pass.

        Returns:
            Those of `parameters` that the pass used: they are no matrices, or are not known to be.

        Raises:
            OutputError: no dimension of the output holds the samples.
        """
        tracer = self._tracer(model, batch, None, parameters)
        with tracer:
            output = self.output(model, batch.inputs, batch_index)
        check_holds_samples(output, batch, batch_index)
        return tracer.others

    def _tracer(
        self, model: nn.Module, batch: Batch, root: Tensor | None, others: Mapping[str, nn.Parameter] | None = None
    ) -> MatrixTracer:
        mask = layer_mask(model, batch.inputs) if self.masks_padding else None
        parameters = {**self._parameters, **(others or {})}
        return MatrixTracer(parameters, self.matrices, self.sums, root, mask, self.excluded or ())

    def check_complete(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, batch_index: int
    ) -> None:
        """Refuse nothing: the objectives are computed from the whole output."""

    def completed(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums by the names under which `KroneckerFactors` keeps them."""
        complete_(sums)
        return {name if name.startswith(SIDES) else f"diagonal/{name}": total for name, total in sums.items()}


SIDES: Final = (
    "inputs/",
    "inputs_sketch/",
    "inputs_trace/",
    "outputs/",
    "outputs_sketch/",
    "outputs_trace/",
    "positions/",
    SQUARED_OUTPUTS,
)
"""The first parts of the names of second moments; all other sums are named like their parameters."""

_SKETCHES: Final = ("inputs_sketch/", "outputs_sketch/")


def diagonals(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The diagonal of each second moment, the trace of each sketched one, and every other sum; no counts."""
    return {
        name: total.diagonal(dim1=1, dim2=2) if name.startswith(("inputs/", "outputs/")) and total.ndim == 3 else total
        for name, total in sums.items()
        if not name.startswith(("positions/", SQUARED_OUTPUTS, *_SKETCHES))
    }


def traces(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The sum of each of the `diagonals`, by name. It is not finite if a number of that second moment is not."""
    # |sum x_i x_j| is at most the larger one of sum x_i^2 and sum x_j^2. So a finite diagonal is that of finite sums.
    found = {name: own.sum(dtype=torch.float64) for name, own in diagonals(sums).items()}
    # A sketch can be infinite although its trace is not: then 0 times its sum is NaN.
    found |= {name: 0 * total.sum(dtype=torch.float64) for name, total in sums.items() if name.startswith(_SKETCHES)}
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}


def _with_hidden_uses(finder: MatrixFinder, values: Tensor, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The weights of which autograd has another gradient than the finder: up to rounding, by the model's largest one.

    Each gradient is compared when it arrives, and freed.
    """
    largest, gaps = 0.0, dict[str, float]()

    def compare(name: str, parameter: Tensor) -> None:
        nonlocal largest
        assert parameter.grad is not None
        expected, parameter.grad = parameter.grad, None
        expected = expected.to_dense() if expected.is_sparse else expected
        if expected.numel():
            found = finder.gradients.pop(name, None)
            size, tolerance = expected.abs(), math.sqrt(torch.finfo(expected.dtype).eps)
            gap = (expected if found is None else found - expected).abs() - tolerance * size
            largest = max(largest, float(size.max()))
            gaps[name] = float(gap.max()) / tolerance

    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: compare(name, p))
        for name, parameter in parameters.items()
    ]
    try:
        if values.requires_grad and parameters:
            # Each sample counts differently: the same sample twice, with opposite signs, would leave rounding alone.
            weights = torch.arange(1, len(values) + 1).to(values)
            run_backward((weights * values.sum(1)).sum(), list(parameters.values()), retain_graph=False)
    finally:
        for hook in hooks:
            hook.remove()
    unmatched = {name for name, own in finder.gradients.items() if name in parameters and bool(own.any())}
    return unmatched | {name for name, gap in gaps.items() if not gap <= largest}
