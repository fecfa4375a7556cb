"""The route check: compares every route with autograd, on a few samples, in float64, on a clone of its own.

Owns the route table (the route of each parameter), and the two comparisons that fill it: each route with autograd, and
samples alone with the same samples in a batch. Must not add to any importance, nor change the user's model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from memsyn.adapters import is_quantised
from memsyn.batches import Batch
from memsyn.engine.calls import Call, Split, ValuePath, path_of, split_from
from memsyn.engine.passes import (
    TOLERANCE,
    backward_to_activations,
    check_same_alone,
    gradients,
    refuse_nonfinite,
    run_backward,
    samples_interact,
    score_alone,
)
from memsyn.engine.recorder import ParameterGroup, Plans, Recorder
from memsyn.engine.routes import (
    BY_OPERATION,
    BY_RULE,
    BY_SAMPLE,
    UNUSED,
    Sums,
    Uses,
    add_by_operation,
    add_by_rule,
)
from memsyn.engine.tracer import ShapeTracer, guess, merge, splits_between
from memsyn.errors import BatchError, OutputError
from memsyn.kernels.outer_products import signed
from memsyn.kernels.rules import Axis, NoRuleError
from memsyn.measuring.model_copy import cached_values, model_copy
from memsyn.measuring.objectives import (
    ConstantError,
    Position,
    Scorer,
    check_cached,
    check_dependence,
    check_not_constant,
)
from memsyn.parameters import named_parameters, trainable_parameters, wide_dtype
from memsyn.torch_private import has_own_parameter, is_out_of_memory, version_of

NUM_SAMPLES: Final = 2
"""The number of samples in a check. Two suffice to distinguish samples, and cost half as much as four."""

FLOAT32: Final = math.sqrt(torch.finfo(torch.float32).eps)
"""How much a sample's scores alone may differ from its scores in the batch, if a part of the model needs float32."""

COMPARED: Final = 2**20
"""How many numbers of a parameter are compared at once."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    routes: dict[str, str]
    """Parameter -> the fastest route that gave autograd's gradient."""
    splits: dict[ValuePath, Split | None]
    """Path -> split; None if the batch axes are unknown."""
    unproven: set[str]
    """Parameters with a zero gradient on these samples. A route that also gives zero may still be wrong."""
    written: set[str]
    """Parameters that the forward pass writes to."""
    changes_inputs: bool
    """Whether the forward pass wrote to its batch."""


class Seen(IntEnum):
    """The largest batch that the checks have seen so far.

    A batch of one sample does not show the batch axes. If the first batch has one sample, the batches are measured by
    ordinary backward passes until a larger batch comes. Then the check runs again, once.
    """

    NOTHING = 0
    ONE_SAMPLE = 1
    SEVERAL_SAMPLES = 2


@final
class RouteTable:
    """The route of each parameter, and the other results of all checks so far.

    Attributes:
        routes: parameter -> route.
        splits: path of a use -> split; None if the batch axes are unknown.
        plans: the plan of each operation, made from the splits.
        unproven: parameters on a fast route, with only zero gradients in all checks so far.
        written: parameters that the forward pass writes to.
        changes_inputs: whether the forward pass writes to its batch.
        seen: the largest batch that the checks have seen.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.routes = dict.fromkeys(names, BY_SAMPLE)
        self.splits: dict[ValuePath, Split | None] = {}
        self.plans = Plans(self.splits)
        self.unproven: set[str] = set()
        self.written: set[str] = set()
        self.changes_inputs = False
        self.seen = Seen.NOTHING

    @property
    def slow(self) -> set[str]:
        """The parameters that need one sample at a time."""
        return {name for name, route in self.routes.items() if route == BY_SAMPLE}

    def should_check(self, num_samples: int | None, batch_index: int) -> bool:
        """Whether to check this batch.

        Checked are the first batch, the first batch with several samples, and the batches 1, 2, 4, 8, ... as long as
        some parameter is unproven.
        """
        if self.seen < Seen.SEVERAL_SAMPLES:
            return self.seen == Seen.NOTHING or num_samples != 1
        return bool(self.unproven) and batch_index & (batch_index - 1) == 0

    def learn(self, verdict: CheckResult, num_samples: int | None, only: set[str] | None) -> None:
        """Add the result of a check on `num_samples` samples.

        As long as no check has seen several samples, the verdict replaces everything. A later check changes the routes
        of the parameters in `only` (by default, the unproven ones). Other parameters change only if no fast route of
        theirs holds: then they are measured one sample at a time.
        """
        self.changes_inputs = self.changes_inputs or verdict.changes_inputs
        if self.seen < Seen.SEVERAL_SAMPLES:
            self.routes, self.splits, self.unproven = dict(verdict.routes), verdict.splits, verdict.unproven
        else:
            names = only or self.unproven
            for path, split in verdict.splits.items():
                self.splits[path] = merge(self.splits[path], split) if path in self.splits else split
            for name, route in verdict.routes.items():
                if name in names or route == BY_SAMPLE:
                    self.routes[name] = route
            self.unproven = {n for n in self.unproven if n in verdict.unproven} | (names & verdict.unproven)
        self.plans = Plans(self.splits)
        self.seen = max(self.seen, Seen.ONE_SAMPLE if num_samples == 1 else Seen.SEVERAL_SAMPLES)

    def state(self) -> dict[str, Any]:
        """The table as plain values, for a checkpoint."""
        return {
            "routes": self.routes,
            "splits": list(self.splits.items()),
            "unproven": sorted(self.unproven),
            "written": sorted(self.written),
            "changes_inputs": self.changes_inputs,
            "num_guarded": int(self.seen),
        }

    def restore(self, known: Mapping[str, Any]) -> None:
        """Read the table from the values of `state`.

        Raises:
            LookupError, TypeError, ValueError: the values are not those of a state.
        """
        self.routes = {name: known["routes"][name] for name in self.routes}
        self.splits = {tuple(path): split_from(plain) for path, plain in known["splits"]}
        self.plans = Plans(self.splits)
        self.unproven, self.written = set(known["unproven"]), set(known["written"])
        # The name and the limit are for older checkpoints: they hold the number of samples in the largest check.
        self.changes_inputs, self.seen = bool(known["changes_inputs"]), Seen(min(known["num_guarded"], 2))


def samples_to_check(batch: Batch) -> Iterator[Batch]:
    """Yield two samples each from the start, the end and the middle of a batch, to check one after the other."""
    total = batch.num_samples
    if total is None:
        yield batch
        return
    last = max(0, total - NUM_SAMPLES)
    # At most `last`: a pair that begins at the last sample would be a single sample, which has no fast route.
    for start in dict.fromkeys((0, last, min(total // 2, last))):
        yield batch.take(start, start + NUM_SAMPLES)


def check(
    model: nn.Module, measured: Iterable[str], scorer: Scorer, batch: Batch, position: Position, *, served: bool = False
) -> CheckResult:
    """Find the fastest correct route for every parameter, on a few samples.

    With sample weights w, the signed sum_k w_k g_k of each route must equal autograd's gradient of sum_k w_k s_k. The
    routes get the output gradients of the unweighted sum, and apply the weights themselves. So the comparison fails if
    a batch axis is wrong, if a use of a parameter was missed, or if samples interact. The weights are powers of two, so
    they add no rounding errors. Each sample's objective alone must also equal its objective in the batch.

    The check runs in float64 on a private clone, so rounding is never mistaken for an error. If the forward pass fails
    in float64, the check runs in the model's own precision. At most one parameter's gradients are held at a time.

    Args:
        model: the user's model; it is not changed.
        measured: names of the parameters to measure.
        scorer: gives the objectives. If it does not tell samples apart, the routes must give the same as autograd for
            the samples alone.
        batch: a few samples.
        position: the position of the first sample.
        served: whether other threads use the model at the same time, and may write to it. Then its buffers are not
            restored after a failure, and hooks that may be foreign to the model are not called.

    Raises:
        ModelError: the forward pass uses the user's model, not the model that it gets.
        OutputError: the objective does not depend on the parameters.
        SamplesInteractError: the samples interact, or the forward pass draws random numbers.
    """
    measured = list(measured)
    with unchanged_buffers(model, served=served):
        try:
            clone = private_clone(model, torch.float64, served)
            return _Check(model, clone, _measured(clone, measured), scorer, position).verdict(batch.map(doubled))
        except ConstantError:
            # It is an OutputError too, but another precision would not help.
            raise
        except (BatchError, OutputError):
            # The forward pass fails in float64: it has a fixed precision.
            clone = private_clone(model, None, served)
            return _Check(model, clone, _measured(clone, measured), scorer, position).verdict(batch)


def _measured(clone: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    own = named_parameters(clone)
    found = {name: own[name] for name in names}
    for parameter in found.values():
        parameter.requires_grad_()
    return found


@contextmanager
def unchanged_buffers(model: nn.Module, *, served: bool) -> Iterator[None]:
    """Restore the buffers of the user's model, as running statistics: a `forward` may run it in place of the clone."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if not served]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def check_in_place(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], scorer: Scorer, batch: Batch, position: Position
) -> CheckResult:
    """`check` of a model that cannot be cloned, on the model itself and in its own precision.

    A parameter that no rule measures is measured one sample at a time: other routes read weights at times at which a
    sharded model does not hold them.

    Args:
        model: the user's model, in evaluation mode.
        parameters: name -> parameter as the forward pass uses it, for the parameters to measure.
        scorer, batch, position: as for `check`.

    Raises:
        OutputError: the objective does not depend on the parameters.
        SamplesInteractError: the samples interact, or the forward pass draws random numbers.
    """
    return _Check(model, model, dict(parameters), scorer, position, in_place=True).verdict(batch)


@dataclass(eq=False)
class _Check:
    """One check of a few samples."""

    model: nn.Module
    clone: nn.Module
    parameters: dict[str, nn.Parameter]
    scorer: Scorer
    position: Position
    in_place: bool = False
    """Whether the clone is the user's model itself."""
    splits: dict[ValuePath, Split | None] = field(default_factory=dict)
    changes_inputs: bool = False

    def __post_init__(self) -> None:
        self.precise = all(p.dtype == torch.float64 for p in self.parameters.values())
        self.routes = (BY_RULE,) if self.in_place else (BY_RULE, BY_OPERATION)

    def scores(self, batch: Batch, first_sample: int = 0) -> Tensor:
        """The objectives of the samples. The forward pass gets a copy of the batch, so it may write to it."""
        own = batch.copied()
        values = self.scorer.scores(self.clone, self.parameters, own, self.position.moved(first_sample))
        self.changes_inputs = self.changes_inputs or _any_written(batch.tensors, own.tensors)
        return values

    def verdict(self, batch: Batch) -> CheckResult:
        """Run the check."""
        values, written = self._trace(batch)
        groups = self._record(batch) if len(values) > 1 else {}
        comparison = _Comparison(self, groups, _sample_weights(len(values)).to(values))
        comparison.run(values)
        if self.precise and not self.in_place:  # a sharded model has freed its weights by now
            check_not_constant(values, self.parameters, comparison.total_norm)
        slow = comparison.unmatched
        if slow and len(values) > 1 and batch.num_samples is not None and not self.in_place:
            self._check_slow(batch, len(values), slow, comparison.total_norm)
        if self.in_place:
            return CheckResult(comparison.routes, self.splits, comparison.unproven(), written, self.changes_inputs)
        own = named_parameters(self.model)
        # Conversion to float64 is exact, so a parameter of the clone differs from the model only if it was written to.
        written |= {
            # No forward pass writes to quantised weights, and they have no numbers to compare.
            name
            for name, p in named_parameters(self.clone).items()
            if not (is_quantised(own[name]) or _is_equal(p, own[name]))
        }
        return CheckResult(comparison.routes, self.splits, comparison.unproven(), written, self.changes_inputs)

    def _trace(self, batch: Batch) -> tuple[Tensor, set[str]]:
        """Find the splits. Returns the scores, and the names of the parameters that the forward pass writes to."""
        together = ShapeTracer(self.parameters, batch.tensors)
        found = {} if self.in_place else cached_values(self.model, self.clone)
        cached = {name: tensor.requires_grad_() for name, tensor in found.items()}
        with together:
            values = self.scores(batch)
        check_dependence(values.sum(1), [] if self.in_place else trainable_parameters(self.model).values())
        check_cached(values.sum(1), cached)
        if batch.num_samples is None:
            self.splits = guess(together, len(values))
        elif len(values) > 1:
            alone = self._compare_with_single(together, batch, values.detach())
            values = values if self.scorer.tells_samples_apart else alone
        return values, together.written

    def _compare_with_single(self, traced: ShapeTracer, batch: Batch, together: Tensor) -> Tensor:
        """Run every sample alone, to find the splits and to check that samples do not interact. Returns the scores."""
        tolerance = FLOAT32 if self.precise else TOLERANCE
        by_sample = self.scorer.tells_samples_apart
        found = []
        for k in range(len(together)):
            sample = batch.take(k, k + 1)
            single = ShapeTracer(self.parameters, sample.tensors)
            # If the samples before have shown all splits, only the objective is still of interest.
            is_traced = not by_sample or any(self.splits.get(path) is None for path in traced.events)
            with single if is_traced else nullcontext():
                alone = score_alone(self.scores, sample, k)
            if by_sample:
                check_same_alone(alone.detach(), together, k, tolerance)
            found.append(alone.detach() if by_sample else alone)
            # One sample may skip operations that another one needs, for instance those for padding.
            for path, split in splits_between(single, traced).items() if is_traced else ():
                if self.splits.get(path) is None:
                    self.splits[path] = split
        values = torch.cat(found)
        if not by_sample:
            check_same_alone(values.detach().sum(0, keepdim=True), together, 0, tolerance)
        return values

    def _record(self, batch: Batch) -> dict[str, ParameterGroup]:
        """Parameter -> its group, with all uses and their output gradients."""
        groups: list[ParameterGroup] = []

        def keep(names: frozenset[str], uses: Uses) -> None:
            groups.append(ParameterGroup(names, list(uses)))

        recorder = Recorder(self.parameters, Plans(self.splits), keep, keeps=True)
        kept = no_gradients_kept(self.parameters) if self.in_place else nullcontext()
        with torch.autograd.set_multithreading_enabled(False), kept, recorder:
            values = self.scores(batch)
            # Signed gradients may be added before they are compared, so one backward pass serves all R objectives.
            backward_to_activations(recorder, values.sum(1, keepdim=True), self.parameters.values())
        return {name: group for group in groups for name in group.names}

    def _check_slow(self, batch: Batch, size: int, expected: Sums, total_norm: float) -> None:
        """Check that the gradients of single samples give autograd's gradients, for parameters without a fast route.

        Raises:
            SamplesInteractError: they differ.
        """
        found = {name: torch.zeros_like(grad) for name, grad in expected.items()}
        parameters = {name: self.parameters[name] for name in expected}
        for k, weight in enumerate(_sample_weights(size)):
            value = score_alone(self.scores, batch.take(k, k + 1), k)
            for name, grad in gradients(value.sum(), parameters).items():
                found[name] += weight * grad
        differing = sorted(
            name
            for name, grad in found.items()
            if _exceeds_rounding(
                grad - expected[name], expected[name], float(expected[name].norm()), total_norm, exactly=False
            )
        )
        if differing:
            raise samples_interact(f"the gradient of {', '.join(differing[:3])}")


@contextmanager
def no_gradients_kept(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Drop what autograd adds to gathered weights: `fully_shard` would add it up over the processes."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in parameters.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(eq=False)
class _Comparison:
    """Compares each group's routes with autograd's gradients, as soon as the group's gradients arrive.

    An example with three parameters, each in a group of its own:

        the gradient of b arrives    The rule gives the same gradient: b gets the route "rule", its gradient is freed.
        the gradient of W arrives    The rule gives another gradient, the operation's derivative gives the same: W gets
                                     the route "operation".
        the backward pass ends       c has no gradient, so zero is expected. Nothing used c: c gets the route "unused".
    """

    check: _Check
    group_of: dict[str, ParameterGroup]
    weights: Tensor
    routes: dict[str, str] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    """Parameter -> norm of autograd's gradient."""
    unmatched: Sums = field(default_factory=dict)
    """Parameter -> autograd's gradient, as long as no route has given the same."""
    total_norm: float = 0.0
    """The norm of all gradients together; zero before the backward pass ends."""

    def run(self, values: Tensor) -> None:
        """Differentiate, compare each gradient when it arrives, and then compare the rest."""
        parameters = self.check.parameters
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._receive_grad(name, p))
            for name, parameter in parameters.items()
        ]
        try:
            run_backward((self.weights * values.sum(1)).sum(), list(parameters.values()), retain_graph=False)
        finally:
            for hook in hooks:
                hook.remove()
        refuse_nonfinite([name for name in parameters if not math.isfinite(self.norms.get(name, 0.0))])
        self.total_norm = math.hypot(*self.norms.values())
        self._compare_rest()

    def _receive_grad(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        expected = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        parameter.grad = None
        self.norms[name] = float(expected.norm())
        self.unmatched[name] = expected
        group = self.group_of.get(name)
        if group is not None and group.names <= self.unmatched.keys():
            route = self._route(group)
            if route is not None:
                self.routes.update(dict.fromkeys(group.names, route))
                for done in group.names:
                    del self.unmatched[done], self.group_of[done]
        if self.check.in_place and name in self.unmatched and expected.numel() > COMPARED:
            # A large gradient is not kept for a second comparison: a sharded model has no room for it.
            self.routes[name] = BY_SAMPLE
            del self.unmatched[name]

    def _compare_rest(self) -> None:
        """Compare the gradients that are still unmatched.

        A parameter without a gradient expects zeros. The tolerance may now be relative to the norm of all gradients,
        since this norm is known only at the end.
        """
        parameters = self.check.parameters
        for name in parameters.keys() - self.unmatched.keys() - self.routes.keys():
            if name in self.group_of:
                self.unmatched[name] = torch.zeros_like(parameters[name])
            else:
                self.routes[name] = UNUSED
        for name in [name for name in parameters if name in self.unmatched]:
            group = self.group_of.get(name, ParameterGroup(frozenset((name,))))
            route = self._route(group) if name in self.unmatched else None
            for member in group.names & self.unmatched.keys() if route is not None else ():
                self.routes[member] = (route if group.uses else UNUSED) or BY_SAMPLE
                del self.unmatched[member]
        self.routes.update(dict.fromkeys(self.unmatched, BY_SAMPLE))

    def unproven(self) -> set[str]:
        """The parameters with a zero gradient that take a fast route."""
        zero = {n for n, parameter in self.check.parameters.items() if not self.norms.get(n) and parameter.numel()}
        return {n for n in zero if self.routes[n] not in (BY_SAMPLE, UNUSED)}

    def _route(self, group: ParameterGroup) -> str | None:
        """The first route that gives a group's expected gradients, up to rounding; None if no route does.

        In a folded dimension, neighbours may belong to one sample or to different samples. Both layouts are tried, and
        the splits keep the one that agrees.
        """
        for uses in (group.uses, _with_interleaved_samples(group.uses, len(self.weights))):
            if uses is None:
                continue
            for route in self.check.routes:
                gaps = self._gaps(route, ParameterGroup(group.names, list(uses)))
                if gaps is not None and self._agrees(gaps):
                    if uses is not group.uses:
                        self._note_splits(uses)
                    return route
        return None

    def _gaps(self, route: str, group: ParameterGroup) -> Sums | None:
        """sum_k w_k g_k by a route, less autograd's gradient, of a group's parameters; None if it supports no such use.

        Each sum starts at the negative of what it should reach. So no third tensor of the parameter's size is needed.
        """
        size, parameters = len(self.weights), self.check.parameters
        found = {n: self.unmatched[n].to(wide_dtype(self.unmatched[n])).neg() for n in sorted(group.names)}
        try:
            if route == BY_OPERATION:
                if group.uses:
                    add_by_operation(found, parameters, group.names, group.uses, size, signed, weights=self.weights)
            elif len(group.names) == 1:
                (name,) = group.names
                add_by_rule(found[name], parameters[name], group.uses, size, signed, weights=self.weights)
            else:
                return None
        except NoRuleError:
            return None
        except RuntimeError as error:
            if is_out_of_memory(error):  # no fault of the route: a slower one would only hide it
                raise
            return None
        return found

    def _agrees(self, gaps: Sums) -> bool:
        return not any(
            _exceeds_rounding(
                gap, self.unmatched[n], self.norms.get(n, 0.0), self.total_norm, exactly=self.check.precise
            )
            for n, gap in gaps.items()
        )

    def _note_splits(self, uses: Uses) -> None:
        for call, place in uses:
            self.check.splits[path_of(call.values[place], call.function, place)] = call.splits[place]


def _sample_weights(num_samples: int) -> Tensor:
    """(B,): powers of two, which differ between neighbours."""
    # With equal weights, the sum would be the same if two samples were exchanged.
    return torch.tensor([1.0, 4.0, 2.0, 8.0]).repeat(num_samples // 4 + 1)[:num_samples]


def _with_interleaved_samples(uses: Uses, num_samples: int) -> list[tuple[Call, str]] | None:
    """The same uses, but with the samples of folded dimensions interleaved; None if no output dimension is folded.

    Axis(0, folded=True) reads (6, 8) as a a b b c c; with `minor=True` it reads the rows as a b c a b c.
    """

    def interleaved(axis: Axis | None) -> Axis | None:
        return None if axis is None else axis._replace(minor=axis.folded)

    calls: dict[int, Call] = {}
    folded = False
    for call, _ in uses:
        assert call.grad is not None
        splits = {
            place: Split(interleaved(split.out), {other: interleaved(axis) for other, axis in split.args.items()})
            for place, split in call.splits.items()
        }
        folded = folded or any(s.out is not None and call.grad.shape[s.out.dim] != num_samples for s in splits.values())
        calls.setdefault(id(call), replace(call, splits=splits))
    return [(calls[id(call)], place) for call, place in uses] if folded else None


def private_clone(model: nn.Module, dtype: torch.dtype | None, served: bool) -> nn.Module:
    """A clone that shares no memory with the model, converted to `dtype` if given."""
    clone = model_copy(model, private=named_parameters(model), dtype=dtype, served=served)
    for buffer in clone.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype or buffer.dtype)
    for module in clone.modules():
        if isinstance(module, nn.Embedding) and has_own_parameter(module, "weight"):
            # Two samples look up few rows, so a dense gradient of a large table would be mostly zeros.
            module.sparse = True
    return clone


def doubled(tensor: Tensor) -> Tensor:
    """A tensor of floating point numbers in float64, any other as it is."""
    return tensor.double() if tensor.is_floating_point() else tensor


def _is_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the precision of the left one, compared in chunks."""
    # Parts that fit into the cache, since the right ones are converted into new memory.
    parts = (tensor.detach().reshape(-1).split(COMPARED // 16) for tensor in (left, right))
    return all(torch.equal(part, other.to(part.dtype)) for part, other in zip(*parts, strict=True))


def _any_written(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether a forward pass has written to the tensors of its batch: `before` originals, `after` its copies."""
    return any(
        # A write counts even if it changed no number here. A write that torch does not count shows in the numbers.
        version_of(new) > 0 or (old.layout == torch.strided and not old.is_nested and not torch.equal(old, new))
        for old, new in zip(before, after, strict=True)
    )


def _exceeds_rounding(gap: Tensor, expected: Tensor, norm: float, total_norm: float, *, exactly: bool) -> bool:
    """Whether a gap between gradients is more than rounding: relative to `norm`, or to a small part of `total_norm`."""
    tolerance, floor = (1e-6, 1e-4) if exactly else (_rounding(expected),) * 2
    # A gradient that is zero in exact arithmetic (the key bias of an attention) consists only of rounding errors. So it
    # is compared with a small part of all gradients.
    scale = max(norm, floor * total_norm)
    return not float(gap.norm()) <= tolerance * scale


def _rounding(gradient: Tensor) -> float:
    """The relative rounding error of a gradient. On CUDA, float32 products may use TF32, with a mantissa of 10 bits."""
    if gradient.is_cuda and gradient.dtype == torch.float32:
        return 2.0**-5
    return max(FLOAT32, math.sqrt(torch.finfo(gradient.dtype).eps))
