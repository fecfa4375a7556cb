"""One measurement: its state over all batches.

Owns the clone of the model that is measured, the time of route checks, the sums, and the state from which a measurement
resumes. Must not know loaders, progress or files.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from memsyn.batches import Batch
from memsyn.engine.passes import (
    Passed,
    Scores,
    add_batched,
    add_by_samples,
    add_by_uses,
    add_one_sample,
    check_finite,
)
from memsyn.engine.recorder import Recorder
from memsyn.engine.routes import BY_FACTORS, BY_RULE, BY_SAMPLE, UNUSED
from memsyn.errors import BatchError, MemsynError, OutputError, SamplesInteractError
from memsyn.kernels.outer_products import Workspace
from memsyn.kernels.rules import MAGNITUDES
from memsyn.kernels.running_sums import RunningSums
from memsyn.matrices import Matrix
from memsyn.measuring import route_check
from memsyn.measuring.distributed import ProcessGroup, share_sums, sum_over_processes
from memsyn.measuring.factor_scorer import SIDES, FactorScorer
from memsyn.measuring.local_importance import LocalScorer, remainder_scale
from memsyn.measuring.model_copy import model_copy
from memsyn.measuring.objectives import Estimator, Forward, OutputScorer, Position, Scorer, output_tensor
from memsyn.measuring.resume import State
from memsyn.measuring.route_check import FLOAT32, RouteTable, Seen
from memsyn.parameters import (
    canonical_name,
    fingerprint,
    named_parameters,
    trainable_parameters,
    unwrap,
    weights,
    wide_dtype,
)
from memsyn.storage.reading_and_writing import Groups
from memsyn.torch_private import foreach_zero_, version_of, without_function_modes
from memsyn.values.factors import BOTH, INPUTS_ALONE, KroneckerFactors
from memsyn.values.importance import Importance, check_same_shapes


@final
class Measurement:
    """The sums over the batches so far, and the route of each parameter.

    Args:
        model: the user's model; it is only read.
        trainable: name -> parameter, for the parameters to measure.
        device: batches are moved to this device.
        forward: runs the model; None calls the model with the batch.
        estimator: what to measure.
        batched: take the magnitude of each batch's mean gradient, as other libraries do.
        private: measure a snapshot of the weights, taken at the first batch. Later changes of the model do not matter.
        rank: of the second moments that an estimator of factors sums; None: whole.
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Mapping[str, nn.Parameter],
        device: torch.device,
        forward: Forward | None,
        estimator: Estimator,
        *,
        batched: bool = False,
        private: bool = False,
        rank: int | None = None,
    ) -> None:
        self.model, self.device, self.private = model, device, private
        self.scorer: Scorer = _scorer(forward, estimator, rank)
        self.batched = batched
        self.table = RouteTable(trainable)
        self.copy: nn.Module | None = None
        """The clone that is run. It shares the user's weights; if `private`, it has its own."""
        self.parameters: dict[str, nn.Parameter] = {}
        """Name -> parameter of the clone."""
        self.fingerprint: str | None = None
        """The fingerprint of the clone's weights, if `private`."""
        self.sums: RunningSums | None = None
        self.num_samples = 0
        self._workspace = Workspace()

    @property
    def estimator(self) -> Estimator:
        """The estimator: an objective and a magnitude."""
        return self.scorer.estimator

    def add(self, batch: Batch, index: int, *, can_guess: bool = False) -> set[str]:
        """Add one batch. Returns the parameters that are newly found to need one sample at a time.

        With `can_guess`, a batch that cannot be measured by its first dimension is measured by the rows of its output:
        one row makes it one sample, and as many rows as a list has items make these its samples.
        """
        batch = batch.to(self.device)
        try:
            return self._add_checked(batch, index)
        except MemsynError as error:
            # Some estimators add during the forward pass. Then only the check may fail before anything was added.
            is_clean = isinstance(self.scorer, OutputScorer) or self.table.seen != Seen.SEVERAL_SAMPLES
            samples = self._other_samples(batch, index, error) if can_guess and is_clean else None
            if samples is None:
                raise
        return set[str]().union(*[self._add_checked(sample, index) for sample in samples])

    def _add_checked(self, batch: Batch, index: int) -> set[str]:
        if batch.num_samples == 0:
            return set()
        was_checked = self.table.seen == Seen.SEVERAL_SAMPLES
        known = self.table.slow if was_checked else set()
        if self.table.should_check(batch.num_samples, index):
            self._check(batch, index)
        assert self.sums is not None
        with self._workspace:
            self.num_samples += self._add(batch, index, self.sums.recent)
            self.sums.end_batch(self.num_samples)
        is_checked = self.table.seen == Seen.SEVERAL_SAMPLES
        return self.table.slow - known if is_checked and not self.batched else set()

    def alone(self, batch: Batch, index: int) -> set[str]:
        """Like `add`, but first set the sums to zero, so that they hold only this batch."""
        if self.sums is not None:
            recent = self.sums.recent
            foreach_zero_(list(recent.values()))
            # A new object counts from batch 0. So it never folds, and `recent` holds this batch alone.
            self.sums = RunningSums(recent)
        return self.add(batch, index)

    def _add(self, batch: Batch, index: int, sums: dict[str, Tensor]) -> int:
        """Add one batch to `sums`. Returns its number of samples."""
        scores, magnitude = partial(self._scores, index), MAGNITUDES[self.estimator.magnitude]
        if self.batched:
            return add_batched(sums, self.parameters, scores, batch, magnitude)
        if isinstance(self.scorer, FactorScorer):
            self.scorer.sums = sums
            if not self.scorer.needs_outputs:
                return self._add_inputs(self.scorer, batch, index, sums)
            if self.table.seen == Seen.ONE_SAMPLE:
                self._add_one_sample(batch, index, sums)
                return 1
        if self.table.seen == Seen.ONE_SAMPLE:  # all batches so far have one sample: ordinary backward passes
            return len(add_by_samples(sums, self.parameters, scores, batch, magnitude, together=None))
        passed = self._pass(scores, batch, None)
        # A parameter has a use that no earlier check has seen. The first pass has added nothing for it. After a check,
        # the second pass adds its importance, or refuses it again.
        if passed.unknown:
            with self._new_matrices_only():
                self._check(batch, index, only=passed.unknown)
                again = self._pass(scores, batch, passed.unknown).refused & passed.unknown
            passed = passed._replace(refused=(passed.refused - passed.unknown) | again)
        self.table.routes.update(dict.fromkeys(passed.refused, BY_SAMPLE))
        slow = self.table.slow
        if slow:
            if batch.num_samples is None and len(passed.scores) == 1:
                batch = batch.as_one_sample()
            own = {name: self.parameters[name] for name in slow}
            together = passed.scores if self.scorer.tells_samples_apart else None
            add_by_samples(sums, own, scores, batch, magnitude, together=together)
        return len(passed.scores)

    def _other_samples(self, batch: Batch, index: int, error: MemsynError) -> list[Batch] | None:
        """The samples of a batch by the rows of its output, after an error; None if they say nothing else.

        Raises:
            MemsynError: the output has another number of rows, and no list in the batch has so many items.
        """
        size = batch.num_samples
        is_reading = isinstance(error, (BatchError, OutputError, SamplesInteractError))
        if batch.whole or size is None or not (is_reading or isinstance(error.__cause__, BatchError)):
            return None
        try:
            output = self._outputs([batch], index)[0]
        except MemsynError:
            return None  # the model does not take the batch at all
        if output.ndim == 0:
            return None
        rows = len(output)
        if rows == 1 and size > 1 and output.ndim > 1:
            return [batch.as_one_sample()]
        samples = batch.items(rows)
        if samples is None and rows != size:
            shape = next(tuple(tensor.shape) for tensor in batch.tensors if tensor.ndim)
            raise type(error)(
                f"batch {index}: the first dimension of a tensor of shape {shape} was taken for {size} samples, but "
                f"the model's output has the shape {tuple(output.shape)}. Return one output row per sample, or say "
                "what the samples are: split=lambda batch: [...], a list of batches of one sample each. Before, "
                f"memsyn found: {error}"
            ) from error
        return samples

    def _outputs(self, batches: Sequence[Batch], index: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The outputs of the model, without gradients, by a clone that shares no memory with it."""
        clone = route_check.private_clone(self.model, dtype, self.private)
        with torch.no_grad(), route_check.unchanged_buffers(self.model, served=self.private):
            return [output_tensor(self.scorer.output(clone, batch.copied().inputs, index)) for batch in batches]

    def check_rows(self, rows: Batch, sequences: Sequence[Batch], index: int) -> None:
        """Refuse rows of packed sequences in which a sequence has other outputs than alone.

        Raises:
            SamplesInteractError: its outputs differ.
        """
        given = [rows.to(self.device), *(own.to(self.device) for own in sequences)]
        try:  # in float64, which mixed precision leaves as it is
            together, *alone = self._outputs([own.map(route_check.doubled) for own in given], index, torch.float64)
        except (BatchError, OutputError):
            together, *alone = self._outputs(given, index)
        width = together.shape[1] if together.ndim > 1 else 0
        found = torch.cat([own.flatten(0, 1) for own in alone]) if all(own.ndim > 1 for own in alone) else None
        expected = together.flatten(0, 1) if width else together
        tolerance = math.sqrt(torch.finfo(together.dtype).eps) if together.is_floating_point() else 0.0
        if (
            found is None
            or found.shape != expected.shape
            or not float((found - expected).abs().max()) <= max(FLOAT32, tolerance) * float(expected.abs().max())
        ):
            raise SamplesInteractError(
                f"batch {index}: its rows hold {len(sequences)} sequences, by their position_ids or boundaries, but "
                "the outputs in the rows are not those of the sequences alone, so no importance per sequence exists. "
                "Keep them apart (in transformers: model.config.use_cache = False), give each a row of its own, or "
                "count a row as one sample: split=lambda batch: [batch]."
            )

    def _add_inputs(self, scorer: FactorScorer, batch: Batch, index: int, sums: dict[str, Tensor]) -> int:
        """Add the second moments of inputs. Each other parameter counts 1 for each sample, as if its input were 1."""
        assert self.copy is not None
        if batch.num_samples is None:
            raise BatchError(
                f"batch {index}: the inputs of a batch without tensors cannot be counted. Give batches of tensors, "
                "samples first."
            )
        used = scorer.add_inputs(self.copy, self.parameters, batch.copied(), index)
        if any(self.table.routes[name] == UNUSED for name in used):
            with self._new_matrices_only():
                for few in (*route_check.samples_to_check(batch), batch):
                    if any(self.table.routes[name] == UNUSED for name in used):
                        self._take_matrices(few, Position(index, self.num_samples))
                self.table.routes.update((name, BY_RULE) for name in used if self.table.routes[name] == UNUSED)
                scorer.add_inputs(self.copy, self.parameters, batch.copied(), index)
        for name in used & self.parameters.keys():
            sums[name] += batch.num_samples
        return batch.num_samples

    def _add_one_sample(self, batch: Batch, index: int, sums: dict[str, Tensor]) -> None:
        """Add factors of a batch of one sample. A weight that no earlier batch has used may be a matrix."""
        routes, scores = self.table.routes, partial(self._scores, index)
        magnitude = MAGNITUDES[self.estimator.magnitude]
        new = {name for name in self.parameters if routes[name] == UNUSED}
        used = add_one_sample(sums, self.parameters, scores, batch, magnitude, new)
        if used:
            with self._new_matrices_only():
                self._take_matrices(batch, Position(index, self.num_samples))
                others = {name: self.parameters[name] for name in used & self.parameters.keys()}
                routes.update(dict.fromkeys(others, BY_SAMPLE))
                add_one_sample(sums, others, scores, batch, magnitude)

    @contextmanager
    def _new_matrices_only(self) -> Iterator[None]:
        """For a second pass over a batch: add the second moments of those matrices alone that are found from now on."""
        if not isinstance(self.scorer, FactorScorer):
            yield
            return
        known = set(self.scorer.matrices)
        self.scorer.excluded = known
        try:
            yield
        finally:
            self.scorer.excluded = None

    def _take_matrices(self, batch: Batch, position: Position) -> None:
        """Measure the weights that the batch uses as matrices by their second moments, from now on."""
        assert isinstance(self.scorer, FactorScorer)
        assert self.copy is not None
        assert self.sums is not None
        parts = self.sums.parts()
        measured = {name for name in self.parameters if any(name in p and bool(p[name].any()) for p in parts)}
        found, _ = self.scorer.candidates(self.copy, self.parameters, batch, position, measured)
        zeros, names = self.scorer.take(found, self.parameters), self.scorer.names()
        for name in names & self.parameters.keys():
            self.parameters[name].requires_grad_(False)
        self.parameters = {name: p for name, p in self.parameters.items() if name not in names}
        self.sums.replace(names, zeros)
        self.table.routes.update(dict.fromkeys(names, BY_FACTORS))

    def _pass(self, scores: Scores, batch: Batch, only: set[str] | None) -> Passed:
        assert self.sums is not None
        return add_by_uses(
            self.sums.recent,
            self.parameters,
            scores,
            batch,
            MAGNITUDES[self.estimator.magnitude],
            routes=self.table.routes,
            plans=self.table.plans,
            unproven=self.table.unproven,
            only=only,
        )

    def _check(self, batch: Batch, index: int, only: set[str] | None = None) -> None:
        """Check the routes on a few samples of the batch: of the parameters in `only`, or of all."""
        table, position = self.table, Position(index, self.num_samples)
        if isinstance(self.scorer, FactorScorer) and not self.scorer.needs_outputs:
            # No gradient is computed, so there is no route to check.
            self._make_copy()
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)
            table.routes, table.seen = dict.fromkeys(table.routes, UNUSED), Seen.SEVERAL_SAMPLES
            return
        for few in route_check.samples_to_check(batch):
            verdict = route_check.check(self.model, table.routes, self.scorer, few, position, served=self.private)
            table.learn(verdict, few.num_samples, only)
            # Only after the first check it is known which parameters the copy must not share with the model.
            if self.copy is None:
                table.written = verdict.written
                self._make_copy()
            assert self.copy is not None
            self.scorer.check_complete(self.copy, self.parameters, few, index)
            if isinstance(self.scorer, FactorScorer):
                try:
                    self._take_matrices(few, position)
                except MemsynError:
                    # The check ran in float64, and these samples overflow in float32: let another batch show the
                    # matrices, before anything is measured.
                    table.seen = Seen.NOTHING
                    raise
            open_questions = table.unproven if only is None else only & table.slow
            if table.seen == Seen.ONE_SAMPLE or not open_questions:
                break

    def _make_copy(self) -> None:
        own = named_parameters(self.model) if self.private else self.table.written
        self.copy = model_copy(self.model, private=own, served=self.private)
        if self.private:
            # Later checks must also read the snapshot: the weights of the user's model may have changed by then.
            self.model, self.fingerprint = self.copy, fingerprint(weights(self.copy))
        self.parameters = {name: p for name, p in named_parameters(self.copy).items() if name in self.table.routes}
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        more = self.scorer.first_sums() if isinstance(self.scorer, FactorScorer) else {}
        self.sums = RunningSums({**_zeros(self.parameters), **more})

    def _scores(
        self, batch_index: int, batch: Batch, first_sample: int = 0, recorder: Recorder | None = None
    ) -> Tensor:
        """The objectives of a batch's samples. The batch is not changed: it is the user's, and may be read again."""
        assert self.copy is not None
        position = Position(batch_index, self.num_samples).moved(first_sample)
        if self.table.changes_inputs:
            return self.scorer.scores(self.copy, self.parameters, batch.copied(), position, recorder)
        with without_function_modes():
            versions = [version_of(tensor) for tensor in batch.tensors]
            # The same tensors in new containers: a forward pass may remove keys from its dict.
            own_containers = batch.map(lambda tensor: tensor)
        values = self.scorer.scores(self.copy, self.parameters, own_containers, position, recorder)
        if versions != [version_of(tensor) for tensor in batch.tensors]:
            raise BatchError(
                f"batch {batch_index}: the forward pass changed it in place, but did not change the first batch. Let "
                "the forward pass work on copies of its inputs."
            )
        return values

    def result(self, group: ProcessGroup | None) -> Importance | KroneckerFactors:
        """The result. With a group, the result for the samples of all processes.

        Raises:
            BatchError: there were no samples.
        """
        sums = {} if self.sums is None else self.sums.totals()
        # Without samples, the table still has the slowest routes, which would be those of all processes.
        routes = dict.fromkeys(self.table.routes, UNUSED) if self.sums is None else self.table.routes
        if group is not None and isinstance(self.scorer, FactorScorer):
            self.scorer.matrices = share_sums(sums, self.scorer.matrices, self.scorer.names(), self.device, group)
            routes = {**dict.fromkeys(sums, BY_FACTORS), **routes}
            if sums:  # in all processes, or in none: then none has samples
                self.num_samples, routes = sum_over_processes(sums, self.num_samples, routes, group)
        elif group is not None:
            # This process had no samples, but the others wait until it adds tensors of the same shapes.
            if not sums:
                sums = _zeros(trainable_parameters(self.model))
            self.num_samples, routes = sum_over_processes(sums, self.num_samples, routes, group)
        if self.num_samples == 0:
            raise BatchError(
                "there are no samples: the loader is empty, or all of its batches are empty. Nothing was measured. "
                "Give at least one sample."
            )
        if isinstance(self.scorer, FactorScorer):
            return self.factors(sums, self.num_samples, routes)
        return self.held(sums, self.num_samples, routes)

    def factors(
        self,
        sums: dict[str, Tensor],
        num_samples: int,
        routes: dict[str, str] | None = None,
        matrices: Mapping[str, Matrix] | None = None,
    ) -> KroneckerFactors:
        """Kronecker factors from sums of this measurement; or from other sums, of some of the given matrices."""
        assert isinstance(self.scorer, FactorScorer)
        check_finite(sums)
        magnitude = BOTH if self.scorer.needs_outputs else INPUTS_ALONE
        known = self.scorer.matrices if matrices is None else matrices
        found = {key: matrix for key, matrix in known.items() if f"positions/{key}" in sums}
        # Other sums may hold a parameter by its own name too, from before it was found to be a matrix: it is zero.
        taken = {name for matrix in found.values() for name in (matrix.weight, matrix.bias) if name is not None}
        own = {name: route for name, route in (routes or self.table.routes).items() if not name.startswith(SIDES)}
        return KroneckerFactors(
            self.scorer.completed({name: total for name, total in sums.items() if name not in taken}),
            num_samples,
            found,
            own | dict.fromkeys(taken, BY_FACTORS),
            self.estimator.name,
            magnitude,
            self.fingerprint,
        )

    def held(self, sums: dict[str, Tensor], num_samples: int, routes: dict[str, str] | None = None) -> Importance:
        """An importance from sums of this measurement. By default, with the routes of this measurement."""
        check_finite(sums)
        magnitude = f"{self.estimator.magnitude} of the batch mean" if self.batched else self.estimator.magnitude
        own = {} if self.batched else dict(routes or self.table.routes)
        return Importance(sums, num_samples, own, self.estimator.name, magnitude, self.fingerprint)

    def settings(self) -> dict[str, Any]:
        """The settings that must be the same when a measurement resumes: description -> value."""
        buffers = {canonical_name(name): buffer for name, buffer in unwrap(self.model).named_buffers()}
        return {
            "the weights or buffers": fingerprint({**named_parameters(self.model), **buffers}),
            "which parameters require a gradient": list(self.table.routes),
            "estimator": [self.estimator.name, self.estimator.magnitude],
            "batched": self.batched,
            "whether there is a forward": not self.scorer.masks_padding,
        }

    def state(self) -> State | None:
        """The state from which to resume after the last batch; None before the first batch."""
        if self.sums is None:
            return None
        sums, remainder = self.sums.parts()
        check_finite(remainder)
        known = {"num_samples": self.num_samples, "num_added": self.sums.num_batches, **self.table.state()}
        # Sum and count in the file must match: before the first fold all samples, then those that are folded.
        return self.held(sums, self.sums.num_folded or self.num_samples), remainder, known

    def restore(self, header: Mapping[str, Any], groups: Groups) -> None:
        """Resume from a saved state."""
        known = header["checkpoint"]
        self.num_samples = known["num_samples"]
        self.table.restore(known)
        self._make_copy()
        assert self.sums is not None
        for part in (groups["importance"], groups["remainder"] or groups["importance"]):
            check_same_shapes(part, self.sums.recent, "the checkpoint", "the model")
        num_folded = header["num_samples"] if groups["remainder"] else 0
        scale = remainder_scale(self.estimator) if header["format"] == 1 else 1.0
        remainder = {name: total * scale for name, total in groups["remainder"].items()}
        self.sums.restore((groups["importance"], remainder), known["num_added"], num_folded)


def describe_slow(model: nn.Module, slow: set[str], num_measured: int) -> str:
    """The text of the warning: names the layers of the slow parameters, and their types."""
    model = unwrap(model)
    owners = sorted({name.rpartition(".")[0] for name in slow})  # paths of modules; "" is the model itself
    kinds = {canonical_name(name): type(module).__name__ for name, module in model.named_modules()}
    named = [f"{owner or 'the model'} ({kinds[owner]})" for owner in owners]
    return (
        f"{len(slow)} of {num_measured} parameters have no fast route, so they are measured one sample "
        f"at a time. This is exact, but slow. They are in {', '.join(named)}. To save time, use fewer samples "
        "(max_samples=), or freeze parameters that need no protection."
    )


def _scorer(forward: Forward | None, estimator: Estimator, rank: int | None) -> Scorer:
    if estimator.factors is not None:
        return FactorScorer(forward, estimator, rank)
    return (LocalScorer if estimator.local else OutputScorer)(forward, estimator)


def _zeros(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p, dtype=wide_dtype(p), requires_grad=False) for name, p in parameters.items()}
