"""One pass over the data: what is known while the batches pass.

Owns the stand-in, the choice of routes and when it is checked, the sums, and what it takes to go on with them later.
Must not know about loaders, progress or files.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memsyn.batches import (
    Given,
    call,
    copied,
    map_tensors,
    num_samples,
    tensors,
    to_device,
)
from memsyn.engine.calls import Path, Split, split_from
from memsyn.engine.passes import Passed, Scores, add_batched, add_by_samples, add_by_uses, check_finite
from memsyn.engine.recorder import Plans, Recorder
from memsyn.engine.routes import BY_SAMPLE, UNUSED
from memsyn.engine.tracer import merge
from memsyn.errors import BatchError, MemsynError
from memsyn.kernels.rules import MAGNITUDES
from memsyn.kernels.running_sums import RunningSums
from memsyn.measuring import route_check
from memsyn.measuring.distributed import Group, add_up
from memsyn.measuring.local_importance import Locally, check_seen
from memsyn.measuring.model_copy import shadow
from memsyn.measuring.objectives import ESTIMATORS, Estimator, Place, output_tensor, scores, token_mask
from memsyn.measuring.resume import State
from memsyn.parameters import (
    canonical_name,
    fingerprint,
    named_parameters,
    trainable_parameters,
    unwrap,
    weights,
    wide_dtype,
)
from memsyn.storage.reading_and_writing import Groups, checked_count
from memsyn.values.importance import Importance, check_same_shapes

Forward = Callable[[nn.Module, Any], Any]


class Run:
    """What is known while the batches pass: the sums, and which parameter takes which route."""

    def __init__(
        self,
        model: nn.Module,
        trainable: dict[str, nn.Parameter],
        device: torch.device,
        forward: Forward | None,
        estimator: Estimator,
        batched: bool,
        *,
        private: bool = False,
    ) -> None:
        self.original, self.device = model, device
        self.private = private
        """Whether to measure on a copy of the weights as they are at the first batch, whatever becomes of the model."""
        self.fingerprint: str | None = None
        """Of that copy."""
        self.forward: Forward = forward or call
        self.masked = forward is None
        self.estimator, self.batched = estimator, batched
        self.labelled = estimator == ESTIMATORS["fisher-empirical"]
        self.magnitude = MAGNITUDES[estimator.magnitude]
        self.factor = float(self.magnitude(torch.tensor(2.0))) if estimator.local else 1.0
        """What the sums are multiplied by in the end: local objectives are half the squared norms."""
        self.routes = dict.fromkeys(trainable, BY_SAMPLE)
        self.splits: dict[Path, Split | None] = {}
        self.plans = Plans(self.splits)
        self.unproven: set[str] = set()
        self.used: set[str] = set()
        """The parameters that local importance has met in layers."""
        self.once: frozenset[str] = frozenset()
        """The parameters with a single use."""
        self.changes_inputs = False
        """Whether the forward pass writes to its batch."""
        self.num_guarded = 0
        """The most samples that a guard looked at together."""
        self.written: set[str] = set()
        """The parameters to which the forward pass writes."""
        self.sums: RunningSums | None = None
        self.num_samples = 0
        self.shadow: nn.Module | None = None
        self.parameters: dict[str, nn.Parameter] = {}

    @property
    def slow(self) -> set[str]:
        """The parameters that need one sample at a time."""
        return {name for name, route in self.routes.items() if route == BY_SAMPLE}

    def add(self, inputs: Given, index: int) -> set[str]:
        """Add one batch; returns the parameters now found to need one sample at a time."""
        size = num_samples(inputs)
        if size == 0:
            return set()
        inputs = to_device(inputs, self.device)
        known = self.slow if self.num_guarded > 1 else set()
        if self._should_guard(size, index):
            self._guard(inputs, index)
        assert self.sums is not None
        self.num_samples += self._add(inputs, index, self.sums.recent)
        self.sums.end_batch(self.num_samples)
        return self.slow - known if self.num_guarded > 1 and not self.batched else set()

    def alone(self, inputs: Given, index: int) -> set[str]:
        """The same, and `sums` hold this batch alone."""
        if self.sums is not None:
            recent = self.sums.recent
            torch._foreach_zero_(list(recent.values()))
            self.sums = RunningSums(recent)
        return self.add(inputs, index)

    def _add(self, inputs: Given, index: int, sums: dict[str, Tensor]) -> int:
        """Add one batch to `sums`; returns its number of samples."""
        run = partial(self._scores_of_shadow, index)
        if self.batched:
            return add_batched(sums, self.parameters, run, inputs, self.magnitude)
        if self.num_guarded == 1:  # a batch of one is an ordinary pass
            return len(add_by_samples(sums, self.parameters, run, inputs, self.magnitude, together=None))
        passed = self._pass(run, inputs, None)
        if passed.unknown:  # something happens here that did not happen before
            self._guard(inputs, index, only=passed.unknown)
            again = self._pass(run, inputs, passed.unknown).refused & passed.unknown
            passed = passed._replace(refused=(passed.refused - passed.unknown) | again)
        self.routes.update(dict.fromkeys(passed.refused, BY_SAMPLE))
        slow = self.slow
        if slow:
            own = {name: self.parameters[name] for name in slow}
            together = None if self.estimator.local else passed.scores
            add_by_samples(sums, own, run, inputs, self.magnitude, together=together)
        return len(passed.scores)

    def _pass(self, run: Scores, inputs: Given, only: set[str] | None) -> Passed:
        assert self.sums is not None
        return add_by_uses(
            self.sums.recent,
            self.parameters,
            run,
            inputs,
            self.magnitude,
            routes=self.routes,
            plans=self.plans,
            unproven=self.unproven,
            only=only,
            once=self.once,
        )

    def _should_guard(self, size: int | None, index: int) -> bool:
        """Once; again if then there was one sample, which cannot show where the samples are, or no gradient yet."""
        if self.num_guarded < 2:
            return self.num_guarded == 0 or size != 1
        return bool(self.unproven) and index & (index - 1) == 0

    def _guard(self, inputs: Given, index: int, only: set[str] | None = None) -> None:
        def run(model: nn.Module, batch: Any, first_sample: int) -> Tensor:
            own = copied(batch)
            values = self._scores(model, index, own, first_sample)
            self.changes_inputs = self.changes_inputs or _differ(tensors(batch), tensors(own))
            return values

        for few in route_check.choices(inputs):
            verdict = route_check.check(
                self.original, self.routes, run, few, local=self.estimator.local, served=self.private
            )
            size = num_samples(few)
            if self.num_guarded < 2:
                self.routes, self.splits, self.unproven = dict(verdict.routes), verdict.splits, verdict.unproven
                self.once = verdict.once
            else:
                self._learn(verdict, only or self.unproven)
            self.plans = Plans(self.splits)
            self.num_guarded = max(self.num_guarded, 2 if size is None else size)
            if self.shadow is None:
                self._clone(verdict.written)
            if self.estimator.local:
                assert self.shadow is not None
                unused = {name: p for name, p in self.parameters.items() if name not in self.used}
                check_seen(partial(self._output, self.shadow, index, copied(few.inputs)), unused)
            if self.num_guarded == 1 or not (self.unproven if only is None else only & self.slow):
                break

    def _learn(self, verdict: route_check.Verdict, names: set[str]) -> None:
        """Take over what a further look has shown about `names`, and what it has shown to be wrong about others."""
        for path, split in verdict.splits.items():
            self.splits[path] = merge(self.splits[path], split) if path in self.splits else split
        for name, route in verdict.routes.items():
            if name in names or route == BY_SAMPLE:
                self.routes[name] = route
        self.unproven = {n for n in self.unproven if n in verdict.unproven} | (names & verdict.unproven)

    def _clone(self, written: set[str]) -> None:
        self.written = written
        own = named_parameters(self.original) if self.private else written
        self.shadow = shadow(self.original, private=own, served=self.private)
        if self.private:
            self.original, self.fingerprint = self.shadow, fingerprint(weights(self.shadow))
        self.parameters = {name: p for name, p in named_parameters(self.shadow).items() if name in self.routes}
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.sums = RunningSums(_zeros(self.parameters))

    def _scores_of_shadow(
        self, batch_index: int, given: Given, first_sample: int = 0, recorder: Recorder | None = None
    ) -> Tensor:
        """Without changing the batch: it is the user's, and may be read again."""
        assert self.shadow is not None
        if self.changes_inputs:
            return self._scores(self.shadow, batch_index, copied(given), first_sample, recorder)
        own = tensors(given)
        versions = [tensor._version for tensor in own]
        alike = map_tensors(given, lambda tensor: tensor)
        values = self._scores(self.shadow, batch_index, alike, first_sample, recorder)
        if versions != [tensor._version for tensor in own]:
            raise BatchError(
                f"batch {batch_index}: the forward pass changed it in place, as it did not change the first batch. Let "
                "it work on copies."
            )
        return values

    def _scores(
        self,
        model: nn.Module,
        batch_index: int,
        given: Given,
        first_sample: int,
        recorder: Recorder | None = None,
    ) -> Tensor:
        size, mask = num_samples(given.inputs), token_mask(given.inputs) if self.masked else None
        if self.estimator.local:
            own = {name: p for name, p in named_parameters(model).items() if name in self.routes}
            encoded = mask is not None and given.inputs.get("attention_mask") is mask
            locally = Locally(own, tensors(given.inputs), mask if encoded else None, recorder)
            with locally:
                output = self._output(model, batch_index, given.inputs)
            self.used |= locally.used
            return locally.scores(tensors(output), size, batch_index)
        output = self._output(model, batch_index, given.inputs)
        with torch._C.DisableTorchFunction():  # no parameter is used any more
            return scores(
                self.estimator.objective,
                output_tensor(output),
                Place(self.num_samples + first_sample, given.labels),
                num_samples=size,
                mask=mask,
                batch_index=batch_index,
                first_in_batch=first_sample,
            )

    def _output(self, model: nn.Module, batch_index: int, inputs: Any) -> Any:
        try:
            return self.forward(model, inputs)
        except MemsynError:
            raise
        except Exception as error:
            raise BatchError(
                f"batch {batch_index}: the model failed on it: {type(error).__name__}: {error}. If it wants to be "
                "called in another way, say how: forward=lambda model, batch: ..."
            ) from error

    def describe(self, slow: set[str]) -> str:
        """The warning: which layers, and what they are."""
        layers = sorted({name.rpartition(".")[0] for name in slow})
        model = unwrap(self.original)
        named = [f"{layer or 'the model'} ({type(model.get_submodule(layer)).__name__})" for layer in layers]
        return (
            f"{len(slow)} of {len(self.routes)} parameters have no fast route that holds, and are measured one sample "
            f"at a time: exact, but slow. They are in {', '.join(named)}. Give fewer samples with max_samples=, or "
            "freeze what needs no protection."
        )

    def importance(self, group: Group | None) -> Importance:
        """The result, if there is one."""
        routes, sums = self.routes, {} if self.sums is None else self.sums.totals()
        if group is not None:
            if not sums:  # no sample came to this process
                sums = _zeros(trainable_parameters(self.original))
                routes = dict.fromkeys(sums, UNUSED)
            self.num_samples, routes = add_up(sums, self.num_samples, routes, group)
        if self.num_samples == 0:
            raise BatchError(
                "there are no samples: the loader is empty, or all of its batches are. Nothing was measured."
            )
        return self.held(sums, self.num_samples, routes)

    def held(self, sums: dict[str, Tensor], num_samples: int, routes: dict[str, str] | None = None) -> Importance:
        """Sums of this pass as what they are; `routes` are its own unless given."""
        check_finite(sums)
        if self.estimator.local:
            sums = {name: total * self.factor for name, total in sums.items()}
        magnitude = f"{self.estimator.magnitude} of the batch mean" if self.batched else self.estimator.magnitude
        own = {} if self.batched else dict(routes or self.routes)
        return Importance(sums, num_samples, own, self.estimator.name, magnitude, self.fingerprint)

    def settings(self) -> dict[str, Any]:
        """What must be the same for a pass to go on."""
        buffers = {canonical_name(name): buffer for name, buffer in unwrap(self.original).named_buffers()}
        return {
            "the weights or buffers": fingerprint({**named_parameters(self.original), **buffers}),
            "which parameters require a gradient": list(self.routes),
            "estimator": [self.estimator.name, self.estimator.magnitude],
            "batched": self.batched,
            "whether there is a forward": not self.masked,
        }

    def state(self) -> State | None:
        """All that a pass needs to go on after the last batch; None if there is nothing yet."""
        if self.sums is None:
            return None
        sums, remainder = self.sums.parts()
        check_finite(remainder)
        known = {
            "num_samples": self.num_samples,
            "num_added": self.sums.num_batches,
            "routes": self.routes,
            "splits": list(self.splits.items()),
            "unproven": sorted(self.unproven),
            "used": sorted(self.used),
            "once": sorted(self.once),
            "written": sorted(self.written),
            "changes_inputs": self.changes_inputs,
            "num_guarded": self.num_guarded,
        }
        return self.held(sums, self.sums.num_folded or self.num_samples), remainder, known

    def restore(self, header: Mapping[str, Any], groups: Groups) -> None:
        """Go on from a state."""
        known = header["checkpoint"]
        self.num_samples = checked_count(known["num_samples"])
        self.routes = {name: known["routes"][name] for name in self.routes}
        self.splits = {tuple(path): split_from(plain) for path, plain in known["splits"]}
        self.plans = Plans(self.splits)
        self.unproven, self.used = set(known["unproven"]), set(known["used"])
        self.once = frozenset(known["once"])
        self.changes_inputs, self.num_guarded = bool(known["changes_inputs"]), checked_count(known["num_guarded"])
        self._clone(set(known["written"]))
        assert self.sums is not None
        for part in (groups["importance"], groups["remainder"] or groups["importance"]):
            check_same_shapes(part, self.sums.recent, "the checkpoint", "the model")
        importance = {name: total / self.factor for name, total in groups["importance"].items()}
        num_folded = header["num_samples"] if groups["remainder"] else 0
        self.sums.restore((importance, groups["remainder"]), checked_count(known["num_added"]), num_folded)


def _zeros(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p, dtype=wide_dtype(p), requires_grad=False) for name, p in parameters.items()}


def _differ(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    return any(
        new._version > 0 or (old.layout == torch.strided and not torch.equal(old, new))
        for old, new in zip(before, after, strict=True)
    )
