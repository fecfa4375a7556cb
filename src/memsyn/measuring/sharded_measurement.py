"""Measuring a sharded model in place: all processes step together, each on batches of its own.

Owns the sums over parts of weights, and the passes over a batch in which every process must take part. The formulas,
the routes and the estimators are those of `measurement`.

A pass runs the model forward and backward. The sums of a unit are whole for a moment: when its gradients have arrived,
they are added up over the processes, and each process keeps its part. A process that has no batch, while another one
has, takes part with a sample that does not count.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from memsyn.batches import Batch
from memsyn.engine.calls import split_from
from memsyn.engine.passes import add_by_uses, refuse_nonfinite, run_backward
from memsyn.engine.recorder import Plans, Recorder
from memsyn.engine.routes import BY_FACTORS, BY_RULE, BY_SAMPLE, UNUSED
from memsyn.engine.tracer import merge
from memsyn.errors import BatchError, ProcessError
from memsyn.kernels.outer_products import Magnitude, Workspace
from memsyn.kernels.rules import MAGNITUDES
from memsyn.kernels.running_sums import RunningSums
from memsyn.kernels.second_moments import mirror_
from memsyn.matrices import Matrix
from memsyn.measuring.distributed import FASTEST_FIRST
from memsyn.measuring.factor_scorer import SIDES, FactorScorer
from memsyn.measuring.objectives import OutputScorer, Position, check_dependence
from memsyn.measuring.route_check import (
    CheckResult,
    RouteTable,
    Seen,
    check_in_place,
    no_gradients_kept,
    samples_to_check,
)
from memsyn.measuring.sharded_model import ShardedModel
from memsyn.parameters import wide_dtype
from memsyn.sharding.parts import empty_cut, from_part, is_sharded, local_part
from memsyn.torch_private import without_function_modes
from memsyn.values.factors import BOTH, INPUTS_ALONE, KroneckerFactors, matrices_from, matrices_header
from memsyn.values.importance import Importance


@final
class ShardedSums(MutableMapping[str, Tensor]):
    """Sums over samples whose totals are cut between processes.

    While a pass runs, a name gives the sums of this process for the whole weight. They exist from their first addition
    until `hand_over`, which adds them up over all processes and keeps this process's part.

    Attributes:
        totals: name -> tensor of the shape and placement of the result; its part is not read.
        counts: whether additions count. If not, zeros are handed over.
        begins: called with a name before its first addition since it was handed over.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts = True
        self.begins: Callable[[str], None] = lambda name: None
        self.running = RunningSums({})
        self._whole: dict[str, Tensor] = {}

    def begin(self, totals: Mapping[str, Tensor]) -> None:
        """Add sums, which are zero. `totals` are DTensors, or plain tensors for sums that are added up at the end."""
        self.totals.update(totals)
        self.running.replace((), {name: torch.zeros_like(local_part(own)) for name, own in totals.items()})

    def leave_out(self, names: Collection[str]) -> None:
        """Forget some sums, which are zero."""
        self.running.replace(names, {})
        for name in names:
            self.totals.pop(name, None)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._whole:
            if name in self.totals:
                self.begins(name)
            self._whole[name] = self._zeros(name)
        return self._whole[name]

    def _zeros(self, name: str) -> Tensor:
        total = self.totals[name]
        with without_function_modes():
            device = total.device_mesh.device_type if is_sharded(total) else total.device
            return torch.zeros(total.shape, dtype=total.dtype, device=device)

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._whole[name] = value

    def __delitem__(self, name: str) -> None:
        self._whole.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.totals

    def __iter__(self) -> Iterator[str]:
        return iter(self.totals)

    def __len__(self) -> int:
        return len(self.totals)

    @property
    def waiting(self) -> list[str]:
        """The names that hold additions which were not handed over."""
        return list(self._whole)

    def hand_over(self, names: Collection[str]) -> None:
        """Add up the sums of these names over all processes. All must call it together, with the same names."""
        with without_function_modes(), torch.no_grad():
            for name in names:
                whole = self._whole.pop(name, None)
                if whole is None or not self.counts:
                    whole = self._zeros(name)
                if name.startswith(("inputs/", "outputs/")) and whole.ndim == 3:
                    mirror_(whole)
                recent = self.running.recent[name]
                recent += _summed(whole, self.totals[name]).to(recent)

    def result(self) -> dict[str, Tensor]:
        """The totals."""
        return {name: from_part(part, self.totals[name]) for name, part in self.running.totals().items()}


def _summed(whole: Tensor, total: Tensor) -> Tensor:
    """This process's part of the sum over processes of a whole tensor each; of a plain total, its own sum."""
    if not is_sharded(total):
        return whole
    from torch.distributed.tensor import DTensor, Partial

    mesh = total.device_mesh
    terms = DTensor.from_local(whole, mesh, [Partial()] * mesh.ndim, run_check=False)
    return terms.redistribute(placements=total.placements).to_local()


class _Progress:
    """How far the sums of a unit were handed over in a pass, in an order that is the same in all processes.

    Args:
        order: the names. With the order a, b, c: when a pass has begun c and then a, and begins b, c and a are
            complete. Then a is handed over, and c waits for b.
    """

    def __init__(self, order: Sequence[str]) -> None:
        self._order = list(order)
        self._complete: list[str] = []
        self.handed_over: set[str] = set()

    def complete_before(self, name: str) -> list[str]:
        """The names that may be handed over when `name` begins: all that began earlier are complete."""
        found = []
        while self._order and self._order[0] in self._complete:
            found.append(self._order.pop(0))
        self._complete.append(name)
        self.handed_over.update(found)
        return found


@final
class ShardedMeasurement:
    """The sums over the batches so far of all processes, and the route of each parameter.

    Args:
        model: the sharded model, in evaluation mode.
        trainable: name -> parameter, for the parameters to measure.
        scorer: gives the objectives.
    """

    def __init__(
        self, model: ShardedModel, trainable: Mapping[str, nn.Parameter], scorer: OutputScorer | FactorScorer
    ) -> None:
        self._model, self._scorer = model, scorer
        self.table = RouteTable(trainable)
        self.num_samples = 0
        """Of this process."""
        gathered = model.gathered_parameters()
        self._parameters = {name: gathered[name] for name in trainable}
        self._unit_of = {name: unit for unit in model.units for name in unit.places}
        self._of_unit: dict[Any, list[str]] = {}
        """Unit -> the names of its sums, in the order in which they are handed over."""
        self._innermost: dict[str, Any] = {}
        """Name of a sum -> its unit, if no other unit runs inside of it."""
        self._is_ordered = False
        self._sums = ShardedSums()
        self._begin({name: _like(parameter) for name, parameter in trainable.items()}, {n: n for n in trainable})
        if isinstance(scorer, FactorScorer):
            self._sums.begin(scorer.first_sums())
            scorer.sums = self._sums
        self._idle: Batch | None = None
        """One sample, for passes in which this process has none of its own."""
        self._workspace = Workspace()

    # One step of all processes

    def add(self, batch: Batch | None, index: int) -> set[str] | None:
        """Add one batch, or take part without one. All processes must call it together.

        Returns:
            The parameters that are newly found to need one sample at a time; None if no process had a batch.

        Raises:
            ProcessError: another process could not read its batch.
        """
        if batch is not None and batch.num_samples == 0:
            batch = None
        count = 0 if batch is None else batch.num_samples
        if count is None:
            raise BatchError(f"batch {index}: it holds no tensor. Give batches of tensors, samples first.")
        batch = None if batch is None else batch.to(self._model.device)
        has_batch, has_none, most = self._model.largest(batch is not None, batch is None and self._idle is None, count)
        if not has_batch:
            return None
        if has_none:
            self._idle = self._model.batch_of_another(batch)
        if batch is not None and self._idle is None:
            self._idle = batch.take(0, 1).copied()
        assert self._idle is not None
        known = self.table.slow if self.table.seen == Seen.SEVERAL_SAMPLES else set[str]()
        with self._workspace:
            self._learn_padding(batch, index)
            self._check(batch, index, most)
            self._add(batch, index)
        self.num_samples += count
        # Each process counts its own samples, so that RunningSums folds after the same batches everywhere.
        self._sums.running.end_batch(max(1, self.num_samples))
        return self.table.slow - known if self.table.seen == Seen.SEVERAL_SAMPLES else set()

    def _learn_padding(self, batch: Batch | None, index: int) -> None:
        """Let the scorer look whether outputs have positions, before a pass: that takes two passes of all processes."""
        assert self._idle is not None
        scorer = self._scorer.output_scorer if isinstance(self._scorer, FactorScorer) else self._scorer
        padded = next((own for own in (batch, self._idle) if own is not None and scorer.asks_for_positions(own)), None)
        if not self._model.largest(padded is not None)[0]:
            return
        with torch.no_grad():
            if padded is not None:
                self._scores(index, padded)
                return
            for _ in range(2):
                scorer.output(self._model.module, self._idle.copied().inputs, index)

    def _add(self, batch: Batch | None, index: int) -> None:
        """Add one batch, for which the routes are known as far as they can be."""
        self._sums.counts = batch is not None
        if isinstance(self._scorer, FactorScorer) and not self._scorer.needs_outputs:
            self._add_inputs(self._scorer, batch, index)
            return
        slow, refused, unknown = self.table.slow, set[str](), set[str]()
        if self.table.seen == Seen.SEVERAL_SAMPLES:
            refused, unknown = self._pass(batch, index)
            self.table.routes.update(dict.fromkeys(self._model.any_of(refused - unknown, self._parameters), BY_SAMPLE))
            everywhere = self._model.any_of(unknown, self._parameters)
            if everywhere:
                self._add_after_check(batch, index, set(everywhere))
        # What another process has refused was added here by its rule.
        own = {name: self._parameters[name] for name in self._parameters if name in slow | refused}
        self._add_samples(batch, index, own)

    def _add_after_check(self, batch: Batch | None, index: int, unknown: set[str]) -> None:
        """Check parameters with new uses, and add the second moments of those that are found to be matrices."""
        known = set(self._scorer.matrices) if isinstance(self._scorer, FactorScorer) else set()
        self._check_now(batch, index, unknown)
        if isinstance(self._scorer, FactorScorer) and set(self._scorer.matrices) != known:
            self._scorer.excluded = known
            try:
                self._pass(batch, index, only=set())
            finally:
                self._scorer.excluded = None

    def _pass(self, batch: Batch | None, index: int, only: set[str] | None = None) -> tuple[set[str], set[str]]:
        """Add the batch by the rules. Returns the parameters that were refused, and those of them with unknown uses."""
        own = batch if batch is not None else self._idle
        assert own is not None
        with self._handing_over(), no_gradients_kept(self._parameters):
            passed = add_by_uses(
                self._sums,  # type: ignore[arg-type]
                self._parameters,
                partial(self._scores, index),
                own,
                self._magnitude,
                routes=self.table.routes,
                plans=self.table.plans,
                unproven=self.table.unproven,
                only=only,
            )
        return (passed.refused, passed.unknown) if batch is not None else (set(), set())

    def _add_samples(self, batch: Batch | None, index: int, own: Mapping[str, nn.Parameter]) -> None:
        """Add sum_k f(g_k) for some parameters, one sample at a time, by ordinary backward passes.

        The largest number of samples of a process decides how many passes there are.
        """
        has_work = bool(own) or (isinstance(self._scorer, FactorScorer) and self.table.seen != Seen.SEVERAL_SAMPLES)
        samples = list(batch.one_by_one()) if batch is not None and has_work else []
        several = self.table.seen == Seen.SEVERAL_SAMPLES
        names = set(self._model.any_of(own.keys(), self._parameters)) if several else None
        for k in range(self._model.largest(len(samples))[0]):
            self._sums.counts = k < len(samples)
            assert self._idle is not None
            self._add_one_sample(samples[k] if k < len(samples) else self._idle, index, own, k, names)
        self._sums.counts = batch is not None

    def _add_one_sample(
        self, sample: Batch, index: int, own: Mapping[str, nn.Parameter], k: int, names: Collection[str] | None
    ) -> None:
        # The rules' parameters are cut from the graph, which then reaches as deep in every process: a backward pass to
        # the experts of one sample alone would end at another layer than that of another process.
        by_rule = {} if self.table.seen != Seen.SEVERAL_SAMPLES else _without(self._parameters, own)
        recorder = Recorder(by_rule, self.table.plans if by_rule else Plans({}), lambda names, uses: None)
        hooks = [p.register_post_accumulate_grad_hook(partial(self._add_gradient, name)) for name, p in own.items()]
        excludes = isinstance(self._scorer, FactorScorer) and bool(by_rule)
        if isinstance(self._scorer, FactorScorer) and excludes:
            self._scorer.excluded = set(self._scorer.matrices)
        try:
            with torch.autograd.set_multithreading_enabled(False), self._handing_over(names), recorder:
                values = self._scores(index, sample, k, recorder)
                if not values.requires_grad:
                    check_dependence(values, [])
                recorder.start_backward(last=True)
                inputs = [recorder.root, *own.values()]
                for column in range(values.shape[1]):
                    last = column == values.shape[1] - 1
                    run_backward(values[0, column], inputs, retain_graph=not last)
        finally:
            for hook in hooks:
                hook.remove()
            if isinstance(self._scorer, FactorScorer):
                self._scorer.excluded = None

    def _add_gradient(self, name: str, parameter: Tensor) -> None:
        with without_function_modes():
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            total = self._sums[name]
            total += self._magnitude(gradient.to_dense().to(total.dtype, copy=True))

    def _add_inputs(self, scorer: FactorScorer, batch: Batch | None, index: int) -> None:
        """Add the second moments of inputs. Each other parameter counts 1 for each sample, as if its input were 1."""
        own = batch if batch is not None else self._idle
        assert own is not None

        def add() -> list[str]:
            with self._handing_over():
                used = scorer.add_inputs(self._model.module, self._parameters, own.copied(), index)
            return self._model.any_of(used if batch is not None else set(), self._parameters)

        used = add()
        if any(self.table.routes[name] == UNUSED for name in used):
            known = set(scorer.matrices)
            self._find_matrices(batch, index)
            new = [name for name in used if self.table.routes[name] == UNUSED]
            self.table.routes.update(dict.fromkeys(new, BY_RULE))
            scorer.excluded = known
            try:
                add()
            finally:
                scorer.excluded = None
        for name in used:
            if batch is not None and name in self._parameters:
                total = self._sums[name]
                total += batch.num_samples or 0
        self._hand_over_rest()

    # What is handed over, and when

    @contextmanager
    def _handing_over(self, names: Collection[str] | None = None) -> Iterator[None]:
        """For one pass: hand over the sums of each unit as soon as they are there, and at the end what is left.

        Args:
            names: the sums that the pass may add to, the same in all processes; None: all.
        """
        ended: dict[Any, _Progress] = {}
        begun: list[str] = []

        def order(unit: Any) -> list[str]:
            # Without those that no process uses.
            is_known = self.table.seen == Seen.SEVERAL_SAMPLES
            own = [n for n in self._of_unit.get(unit, ()) if not (is_known and self.table.routes.get(n) == UNUSED)]
            return own if names is None else [name for name in own if name in names]

        def begins(name: str) -> None:
            unit = self._innermost.get(name)
            if unit is not None and not name.startswith(SIDES):
                begun.append(name)
                progress = ended.setdefault(unit, _Progress([own for own in order(unit) if not own.startswith(SIDES)]))
                self._sums.hand_over(progress.complete_before(name))

        def after_backward(unit: Any) -> None:
            done = ended.pop(unit, _Progress([])).handed_over
            self._sums.hand_over([n for n in order(unit) if n not in done and not n.startswith("inputs")])

        def after_forward(unit: Any) -> None:
            self._sums.hand_over([name for name in order(unit) if name.startswith("inputs")])

        looks_at_inputs = isinstance(self._scorer, FactorScorer)
        self._sums.begins = begins
        try:
            with self._model.handing_over(after_forward if looks_at_inputs else None, after_backward):
                yield
        finally:
            self._sums.begins = lambda name: None
        self._hand_over_rest()
        if not self._is_ordered:
            # Once the sums are in the order of a pass, few have to wait for another one.
            first = json.loads(self._model.from_everyone(json.dumps(begun))[0])
            place = {name: index for index, name in enumerate(first)}
            for own in self._of_unit.values():
                own.sort(key=lambda name: place.get(name, -1))
            self._is_ordered = True

    def _begin(self, totals: Mapping[str, Tensor], weights: Mapping[str, str]) -> None:
        """Begin sums, which belong to the units of their weights."""
        self._sums.begin(totals)
        for name, total in totals.items():
            if is_sharded(total):
                unit = self._unit_of[weights[name]]
                self._of_unit.setdefault(unit, []).append(name)
                if self._model.is_innermost(unit):
                    self._innermost[name] = unit

    def _hand_over_rest(self) -> None:
        """Hand over what the units of this pass have not: those whose inputs have no gradient, and late uses."""
        sharded = {name for name, total in self._sums.totals.items() if is_sharded(total)}
        self._sums.hand_over(self._model.any_of(set(self._sums.waiting) & sharded, sharded))
        self._sums.hand_over([name for name in self._sums.waiting if name not in sharded])

    # Routes and matrices

    def _check(self, batch: Batch | None, index: int, most: int) -> None:
        """Check the routes, if a process has several samples and it is time; find the matrices in the first batch."""
        is_first = self.table.seen == Seen.NOTHING
        if isinstance(self._scorer, FactorScorer) and not self._scorer.needs_outputs:
            if is_first:
                self.table.routes, self.table.seen = dict.fromkeys(self.table.routes, UNUSED), Seen.SEVERAL_SAMPLES
            return
        if most > 1 and self._model.largest(self.table.should_check(most, index))[0]:
            self._check_now(batch, index, None)
        elif is_first and isinstance(self._scorer, FactorScorer) and not self._scorer.matrices:
            self._find_matrices(batch, index)

    def _check_now(self, batch: Batch | None, index: int, only: set[str] | None) -> None:
        own = batch if batch is not None and (batch.num_samples or 0) > 1 and not batch.whole else None
        assert self._idle is not None
        twice = (batch or self._idle).take(0, 1).map(lambda t: torch.cat([t, t]) if t.ndim else t)
        pairs = list(samples_to_check(own if own is not None else twice))
        for round_ in range(self._model.largest(len(pairs))[0]):
            few = pairs[min(round_, len(pairs) - 1)]
            position = Position(index, self.num_samples)
            verdict = check_in_place(self._model.module, self._parameters, self._scorer, few, position)
            self.table.learn(self._together(verdict, is_real=own is not None), 2, only)
            if isinstance(self._scorer, FactorScorer):
                self._find_matrices(few, index)
            if not (self.table.unproven if only is None else only & self.table.slow):
                break

    def _together(self, verdict: CheckResult, *, is_real: bool) -> CheckResult:
        """The results of all processes whose samples differ."""
        own = {
            "real": is_real,
            "routes": verdict.routes,
            "splits": list(verdict.splits.items()),
            "unproven": sorted(verdict.unproven),
            "changes_inputs": verdict.changes_inputs,
        }
        everyone = [json.loads(text) for text in self._model.from_everyone(json.dumps(own))]
        everyone = [other for other in everyone if other["real"]] or everyone
        routes: dict[str, str] = {}
        splits: dict[tuple[str, ...], Any] = {}
        for other in everyone:
            for name, route in other["routes"].items():
                routes[name] = max(route, routes.get(name, UNUSED), key=FASTEST_FIRST.index)
            for path, plain in other["splits"]:
                split, key = split_from(plain), tuple(path)
                splits[key] = merge(splits[key], split) if key in splits else split
        proven = {
            name
            for other in everyone
            for name, route in other["routes"].items()
            if route != UNUSED and name not in other["unproven"]
        }
        unproven = {name for other in everyone for name in other["unproven"]} - proven
        changes = any(other["changes_inputs"] for other in everyone)
        return CheckResult(routes, splits, unproven, set(), changes)

    def _find_matrices(self, batch: Batch | None, index: int) -> None:
        """Measure the weights that are used as matrices, and in no other way, by second moments from now on."""
        assert isinstance(self._scorer, FactorScorer)
        assert self._idle is not None
        own = batch if batch is not None else self._idle
        few = own if own.whole else own.take(0, 2)
        measured = {name for name in self._parameters if bool(self._sums.running.recent[name].any())}
        measured = set(self._model.any_of(measured, self._parameters))
        found, others = self._scorer.candidates(
            self._model.module, self._parameters, few, Position(index, self.num_samples), measured
        )
        own_words = {"matrices": matrices_header(found), "others": sorted(others)}
        everyone = [json.loads(text) for text in self._model.from_everyone(json.dumps(own_words))]
        refused = {name for other in everyone for name in other["others"]}
        agreed: dict[str, Matrix] = {}
        for other in everyone:
            for key, matrix in matrices_from(other["matrices"]).items():
                if agreed.setdefault(key, matrix) != matrix:
                    refused.add(matrix.weight)
        agreed = {key: matrix for key, matrix in sorted(agreed.items()) if matrix.weight not in refused}
        zeros, names = self._scorer.take(agreed, self._parameters, on_meta=True), self._scorer.names()
        # An activation checkpoint runs layers again without the tracer: there too, nothing may take a gradient.
        self._model.freeze([name for name in self._parameters if name in names])
        self._parameters = _without(self._parameters, names)
        self._sums.leave_out(names)
        for own_names in self._of_unit.values():
            own_names[:] = [name for name in own_names if name not in names]
        weights = {name: agreed[name.partition("/")[2]].weight for name in zeros}
        self._begin(
            {name: _like_factor(name, own, self._model.weights[weights[name]]) for name, own in zeros.items()}, weights
        )
        self.table.routes.update(dict.fromkeys(names, BY_FACTORS))

    @property
    def _magnitude(self) -> Magnitude:
        return MAGNITUDES[self._scorer.estimator.magnitude]

    def _scores(
        self, batch_index: int, batch: Batch, first_sample: int = 0, recorder: Recorder | None = None
    ) -> Tensor:
        """The objectives of a batch's samples. The forward pass gets copies, since it may write to its inputs."""
        position = Position(batch_index, self.num_samples).moved(first_sample)
        return self._scorer.scores(self._model.module, self._parameters, batch.copied(), position, recorder)

    # The result

    def result(self) -> Importance | KroneckerFactors:
        """The result for the samples of all processes: tensors that are cut like the model's parameters.

        Raises:
            BatchError: there were no samples.
            OutputError: a gradient is NaN or infinite.
        """
        num_samples = self._model.total(self.num_samples)
        if num_samples == 0:
            raise BatchError(
                "there are no samples: the loaders of all processes are empty, or all of their batches are. Nothing "
                "was measured. Give at least one sample."
            )
        sums = self._sums.result()
        for name, total in sums.items():
            if not is_sharded(total):
                sums[name] = self._model.added_up(total)
        broken = {name for name, total in sums.items() if not bool(local_part(total).isfinite().all())}
        refuse_nonfinite(self._model.any_of(broken, sums))
        estimator, routes = self._scorer.estimator, dict(self.table.routes)
        if not isinstance(self._scorer, FactorScorer):
            return Importance(sums, num_samples, routes, estimator.name, estimator.magnitude)
        magnitude = BOTH if self._scorer.needs_outputs else INPUTS_ALONE
        named = {name if name.startswith(SIDES) else f"diagonal/{name}": total for name, total in sums.items()}
        own = {name: route for name, route in routes.items() if not name.startswith(SIDES)}
        return KroneckerFactors(named, num_samples, self._scorer.matrices, own, estimator.name, magnitude)


def _like(parameter: Tensor) -> Tensor:
    """A tensor with the shape and placement of a parameter, in float32 at least."""
    return from_part(torch.empty_like(local_part(parameter), dtype=wide_dtype(parameter)), parameter)


def _like_factor(name: str, shape: Tensor, weight: Tensor) -> Tensor:
    """A tensor for a sum of second moments, from one without values: its rows are cut as the weight's are.

    Second moments (G, n, n) and sketches (G, n, c) are cut along n, the counts of a table along its rows. The number of
    positions and traces are not cut.
    """
    if not is_sharded(weight) or shape.ndim == 0 or "_trace/" in name:
        device = weight.device_mesh.device_type if is_sharded(weight) else weight.device
        return torch.empty_like(shape, device=device)
    return empty_cut(shape.shape, shape.dtype, weight, 1 if shape.ndim == 3 else 0)


def _without(values: Mapping[str, nn.Parameter], names: Collection[str]) -> dict[str, nn.Parameter]:
    return {name: own for name, own in values.items() if name not in names}


def measure_in_place(
    measurement: ShardedMeasurement,
    model: ShardedModel,
    batches: Iterator[Sequence[Batch]],
    warn: Callable[[set[str]], None],
) -> None:
    """Add all batches of all processes. `batches` gives the parts of a loader's batch, which are added one by one.

    Raises:
        ProcessError: another process could not read a batch.
    """
    waiting: list[Batch] = []
    index = 0
    while True:
        error: BaseException | None = None
        try:
            while not waiting and (more := next(batches, None)) is not None:
                waiting = list(more)
        except Exception as problem:
            error = problem
        (failed,) = model.largest(error is not None)
        if error is not None:
            raise error
        if failed:
            raise ProcessError(
                "measuring failed in another process, which could not read its batch. Read the error of that process "
                "for the cause."
            )
        slow = measurement.add(waiting.pop(0) if waiting else None, index)
        if slow is None:
            return
        if slow:
            warn(slow)
        index += 1
