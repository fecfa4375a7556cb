"""The check that each route computes what it should, on a few samples, in float64 on a clone of its own.

Owns the comparison of every route with autograd, and of samples alone with the same samples together. Must not add
to any importance, nor leave anything on the user's model.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from memsyn.batches import map_tensors, num_samples, take, tensors
from memsyn.engine.calls import Call, Path, Split, path_of
from memsyn.engine.passes import (
    TOLERANCE,
    backward_to_activations,
    check_same_alone,
    gradients,
    refuse_broken,
    run_backward,
    samples_interact,
    score_alone,
)
from memsyn.engine.recorder import Group, Plans, Recorder
from memsyn.engine.routes import (
    BY_OPERATION,
    BY_RULE,
    BY_SAMPLE,
    UNUSED,
    Sums,
    add_by_operation,
    add_by_rule,
)
from memsyn.engine.tracer import Observer, compare, guess
from memsyn.errors import BatchError, ModelError, OutputError
from memsyn.kernels.rules import Axis, NoRuleError, signed
from memsyn.measuring.dependence import ConstantError, check_cached, check_dependence, check_not_constant
from memsyn.measuring.model_copy import cached_values, shadow
from memsyn.parameters import named_parameters, trainable_parameters, wide_dtype

NUM_SAMPLES = 2
"""Enough to tell samples apart, and half the cost of four."""

FLOAT32 = math.sqrt(torch.finfo(torch.float32).eps)
"""What parts of a model that insist on float32 may differ by, in and out of company."""

CHUNK = 2**20
"""Numbers of a parameter that are looked at together."""

Run = Callable[[nn.Module, Any, int], Tensor]
"""(model, batch, place of the first sample) -> (B, R), the objectives of each sample."""


@dataclass(frozen=True)
class Verdict:
    """What the guard saw."""

    routes: dict[str, str]
    """Parameter -> the best route that gave autograd's gradient."""
    splits: dict[Path, Split | None]
    """What the operations at each path do with samples."""
    unproven: set[str]
    """Parameters whose gradient was zero on these samples: that their route gave zero says little."""
    written: set[str]
    """Parameters to which the forward pass writes."""
    once: frozenset[str]
    """Parameters with a single use, in one operation on nothing but them."""


def choices(batch: Any) -> Iterator[Any]:
    """Samples to look at, from the start, the end and the middle of a batch: the next when the last were not enough."""
    total = num_samples(batch)
    if total is None:
        yield batch
        return
    for start in dict.fromkeys((0, max(0, total - NUM_SAMPLES), total // 2)):
        yield take(batch, start, start + NUM_SAMPLES)


def check(
    model: nn.Module, measured: Iterable[str], run: Run, batch: Any, *, local: bool = False, served: bool = False
) -> Verdict:
    """Find the best route for every parameter, and see that it holds for a few samples.

    With sample weights w, the signed sum_k w_k g_k of each route must equal autograd's gradient of sum_k w_k s_k. Since
    the routes see the gradient of the unweighted sum, this fails wherever the samples are not where they are looked
    for, where a weight is used unseen, and where samples interact. Weights are powers of two: they change no rounding.
    Each sample's objective must also be the same alone as among others.

    All this runs in float64 on a private clone, where rounding cannot be taken for an error; in the model's own
    precision only if its forward pass insists on that. No more than one parameter's gradients are held at a time.

    Args:
        model: the user's; it is not changed.
        measured: the parameters to measure.
        run: (model, batch, place of the first sample) -> the objectives of each sample.
        batch: a few samples.
        local: the objectives are sums over layers, of which the first row holds those of all samples. What the routes
            give must equal what autograd gives for the samples alone.
        served: others use the model meanwhile, and may write to it: its buffers are not put back after a failure, and
            hooks of which nobody knows what they do are not called.

    Raises:
        ModelError: the forward pass uses the user's model in place of the one it is given.
        OutputError: the objective does not depend on the parameters.
        SamplesInteractError: the samples interact, or the forward pass draws random numbers.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if not served]
    measured = list(measured)
    try:
        try:
            return _Check(model, _private(model, torch.float64, served), measured, run, local).verdict(
                map_tensors(batch, _double)
            )
        except ConstantError:
            raise
        except (BatchError, OutputError):  # a forward pass with a precision of its own
            return _Check(model, _private(model, None, served), measured, run, local).verdict(batch)
    except ModelError:
        with torch.no_grad():
            for buffer, value in before:  # it may have been the user's own model that ran
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        raise


@dataclass(eq=False)
class _Check:
    """One look at a few samples."""

    model: nn.Module
    clone: nn.Module
    measured: list[str]
    run: Run
    local: bool
    splits: dict[Path, Split | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = named_parameters(self.clone)
        self.parameters = {name: own[name] for name in self.measured}
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.precise = all(p.dtype == torch.float64 for p in self.parameters.values())

    def scores(self, batch: Any, first_sample: int = 0) -> Tensor:
        return self.run(self.clone, batch, first_sample)

    def verdict(self, batch: Any) -> Verdict:
        values, written = self._observe(batch)
        groups = self._record(batch) if len(values) > 1 else {}
        once = frozenset(name for name, group in groups.items() if len(group.names) == len(group.uses) == 1)
        routes, unproven, slow = self._compare(values, groups)
        if self.precise:
            check_not_constant(values, self.parameters, self.whole)
        if slow and len(values) > 1 and num_samples(batch) is not None:
            self._check_slow(batch, len(values), slow)
        own = named_parameters(self.model)
        written |= {name for name, p in named_parameters(self.clone).items() if not _same_numbers(p, own[name])}
        return Verdict(routes, self.splits, unproven, written, once)

    def _observe(self, batch: Any) -> tuple[Tensor, set[str]]:
        """Find what each operation does with samples; returns their objectives, and the parameters written to."""
        observer = Observer(self.parameters, tensors(batch))
        cached = {name: tensor.requires_grad_() for name, tensor in cached_values(self.model, self.clone).items()}
        with observer:
            values = self.scores(batch)
        check_dependence(values.sum(1), trainable_parameters(self.model).values())
        check_cached(values.sum(1), cached)
        if num_samples(batch) is None:
            self.splits = guess(observer, len(values))
        elif len(values) > 1:
            alone = self._compare_with_single(observer, batch, values.detach())
            values = alone if self.local else values
        return values, observer.written

    def _compare_with_single(self, observer: Observer, batch: Any, together: Tensor) -> Tensor:
        """Run every sample alone, to see what each operation does with samples, and that they do not interact."""
        tolerance = FLOAT32 if self.precise else TOLERANCE
        found = []
        for k in range(len(together)):
            sample = take(batch, k, k + 1)
            single = Observer(self.parameters, tensors(sample))
            with single:
                alone = score_alone(self.scores, sample, k)
            if not self.local:
                check_same_alone(alone.detach(), together, k, tolerance)
            found.append(alone if self.local else alone.detach())
            for path, split in compare(single, observer).items():  # a sample may take a short cut: no padding, no mask
                if self.splits.get(path) is None:
                    self.splits[path] = split
        values = torch.cat(found)
        if self.local:
            check_same_alone(values.detach().sum(0, keepdim=True), together, 0, tolerance)
        return values

    def _record(self, batch: Any) -> dict[str, Group]:
        """The uses of every parameter, with the gradients of what came of them."""
        groups: list[Group] = []
        recorder = Recorder(self.parameters, Plans(self.splits), groups.append, keeps=True)
        with torch.autograd.set_multithreading_enabled(False), recorder:
            values = self.scores(batch)
            backward_to_activations(recorder, values.sum(1, keepdim=True), self.parameters.values())
        return {name: group for group in groups for name in group.names}

    def _compare(self, values: Tensor, group_of: dict[str, Group]) -> tuple[dict[str, str], set[str], Sums]:
        """Compare each group's routes with autograd as soon as its gradients are there.

        Returns:
            The routes found; the parameters whose gradient is zero; the gradients of those for which none was.
        """
        weights = _weights(len(values)).to(values)
        routes: dict[str, str] = {}
        norms: dict[str, float] = {}
        waiting: Sums = {}
        broken: list[str] = []

        def arrived(name: str, parameter: Tensor) -> None:
            assert parameter.grad is not None
            expected = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            parameter.grad = None
            norms[name] = float(expected.norm())
            if not math.isfinite(norms[name]):
                broken.append(name)
            waiting[name] = expected
            group = group_of.get(name)
            if group is not None and group.names <= waiting.keys():
                route = self._route(group, waiting, norms, weights, 0.0)
                if route is not None:
                    routes.update(dict.fromkeys(group.names, route))
                    for done in group.names:
                        del waiting[done], group_of[done]

        hooks = []
        for name, parameter in self.parameters.items():
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: arrived(name, p)))
        try:
            run_backward((weights * values.sum(1)).sum(), list(self.parameters.values()), retain_graph=False)
        finally:
            for hook in hooks:
                hook.remove()
        refuse_broken([name for name in self.parameters if name in broken])
        self.whole = math.hypot(*norms.values())
        for name in self.parameters.keys() - waiting.keys() - routes.keys():
            waiting[name] = torch.zeros_like(self.parameters[name])
        for name in [name for name in self.parameters if name in waiting]:  # zero up to rounding, or not ruled
            group = group_of.get(name, Group(frozenset((name,))))
            own = self._route(group, waiting, norms, weights, self.whole) if name in waiting else None
            for member in group.names & waiting.keys() if own is not None else ():
                routes[member] = (own if group.uses else UNUSED) or BY_SAMPLE
                del waiting[member]
        routes.update(dict.fromkeys(waiting, BY_SAMPLE))
        zero = {n for n, parameter in self.parameters.items() if not norms.get(n) and parameter.numel()}
        unproven = {n for n in zero if routes[n] not in (BY_SAMPLE, UNUSED)}
        return routes, unproven, waiting

    def _route(
        self, group: Group, expected: Sums, norms: Mapping[str, float], weights: Tensor, whole: float
    ) -> str | None:
        """The first route that gives a group's expected gradients, up to rounding relative to them or the `whole`."""
        names = sorted(group.names)
        original = list(group.uses)
        for minor in (False, True):
            uses = _with_minor(original, len(weights)) if minor else original
            if uses is None:
                break
            group.uses = uses
            for route in (BY_RULE, BY_OPERATION):
                found = {name: torch.zeros_like(expected[name], dtype=wide_dtype(expected[name])) for name in names}
                try:
                    if route == BY_OPERATION:
                        if uses:
                            add_by_operation(found, self.parameters, group, len(weights), signed, weights=weights)
                    elif len(group.names) == 1:
                        own = self.parameters[names[0]]
                        add_by_rule(found[names[0]], own, uses, len(weights), signed, weights=weights)
                    else:
                        continue
                except (NoRuleError, RuntimeError):
                    continue
                if not any(
                    _differs(found[name], expected[name], norms.get(name, 0.0), whole, exactly=self.precise)
                    for name in names
                ):
                    if minor:
                        self._note_minor(uses)
                    return route
        group.uses = original
        return None

    def _note_minor(self, uses: list[tuple[Call, str]]) -> None:
        for call, place in uses:
            self.splits[path_of(call.values[place], call.function, place)] = call.splits[place]

    def _check_slow(self, batch: Any, size: int, expected: Sums) -> None:
        """Where no route gave autograd's gradients, those of the samples alone must."""
        found = {name: torch.zeros_like(grad) for name, grad in expected.items()}
        parameters = {name: self.parameters[name] for name in expected}
        for k, weight in enumerate(_weights(size)):
            value = score_alone(self.scores, take(batch, k, k + 1), k)
            for name, grad in gradients(value.sum(), parameters).items():
                found[name] += weight * grad
        differing = sorted(
            name
            for name, grad in found.items()
            if _differs(grad, expected[name], float(expected[name].norm()), self.whole, exactly=False)
        )
        if differing:
            raise samples_interact(f"the gradient of {', '.join(differing[:3])}")


def _weights(num_samples: int) -> Tensor:
    """(B,), powers of two, unlike for neighbours."""
    return torch.tensor([1.0, 4.0, 2.0, 8.0]).repeat(num_samples // 4 + 1)[:num_samples]


def _with_minor(uses: list[tuple[Call, str]], num_samples: int) -> list[tuple[Call, str]] | None:
    """The same uses, if some dimension holds more than samples, with neighbours in it from different samples."""

    def turned(axis: Axis | None) -> Axis | None:
        return None if axis is None else axis._replace(minor=axis.folded)

    calls: dict[int, Call] = {}
    folded = False
    for call, _ in uses:
        assert call.grad is not None
        splits = {
            place: Split(turned(split.out), {other: turned(axis) for other, axis in split.args.items()})
            for place, split in call.splits.items()
        }
        folded = folded or any(s.out is not None and call.grad.shape[s.out.dim] != num_samples for s in splits.values())
        calls.setdefault(id(call), replace(call, splits=splits))
    return [(calls[id(call)], place) for call, place in uses] if folded else None


def _private(model: nn.Module, dtype: torch.dtype | None, served: bool) -> nn.Module:
    """A clone that shares nothing with the model, in another precision if one is given."""
    clone = shadow(model, private=named_parameters(model), dtype=dtype, served=served)
    for buffer in clone.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype or buffer.dtype)
    for module in clone.modules():
        if isinstance(module, nn.Embedding) and "weight" in module._parameters:
            module.sparse = True  # autograd's gradient of a large table would be mostly zeros
    return clone


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _same_numbers(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever precision; without copies of their size."""
    parts = zip(left.detach().reshape(-1).split(CHUNK), right.detach().reshape(-1).split(CHUNK), strict=True)
    return all(torch.equal(part, other.to(part.dtype)) for part, other in parts)


def _differs(found: Tensor, expected: Tensor, norm: float, whole: float, *, exactly: bool) -> bool:
    """Whether an error is beyond rounding: relative to the gradient's norm, or to a part of the model's.

    What was found is overwritten with the difference.
    """
    tolerance, floor = (1e-6, 1e-4) if exactly else (_rounding(expected),) * 2
    scale = max(norm, floor * whole)  # a gradient of zero in exact arithmetic is only rounding
    return not float(found.sub_(expected).norm()) <= tolerance * scale


def _rounding(gradient: Tensor) -> float:
    """What the numbers behind a gradient may differ by: on CUDA, float32 may mean TF32's ten bits."""
    if gradient.is_cuda and gradient.dtype == torch.float32:
        return 2.0**-5
    return max(FLOAT32, math.sqrt(torch.finfo(gradient.dtype).eps))
