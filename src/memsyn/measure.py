"""measure(model, batches) -> Importance: the loop over the data.

Owns what happens once per run and once per batch: the shadow, the choice of routes and its check, progress, the
state of random generators. Formulas live in `rules`, passes in `routes`.
"""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from memsyn import guard
from memsyn.batches import (
    Given,
    call,
    check_iterable,
    copied,
    first_samples,
    labels_of,
    map_tensors,
    model_input,
    num_samples,
    tensors,
    to_device,
)
from memsyn.calls import Path, Split
from memsyn.distributed import Group, add_up, all_or_none, group_of
from memsyn.errors import BatchError, MemsynError, ModelError, OptionError, SlowParametersWarning
from memsyn.hebbian import Locally, check_seen
from memsyn.importance import Importance
from memsyn.objectives import ESTIMATORS, Estimator, Place, find_estimator, output_tensor, scores, token_mask
from memsyn.parameters import named_parameters, trainable_parameters, unwrap
from memsyn.passes import Passed, Scores, add_batched, add_by_samples, add_by_uses, check_finite
from memsyn.products import workspace
from memsyn.recorder import Plans, Recorder
from memsyn.routes import BY_SAMPLE, UNUSED, wide_dtype
from memsyn.rules import MAGNITUDES
from memsyn.shadow import check_measurable, shadow
from memsyn.tracer import merge

Forward = Callable[[nn.Module, Any], Any]


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    estimator: str | Estimator = "mas",
    batched: bool = False,
    group: Group | None = None,
    progress: bool = True,
) -> Importance:
    """How much each weight matters to what the model computes, from unlabelled data.

    Omega = 1/N sum_k |d s(F(x_k; theta)) / d theta|, s the squared L2 norm of the raw output, summed over every
    non-batch dimension (Aljundi et al. 2018, Eq. 2). The absolute value is taken per sample, so the result does not
    depend on the batch size, the order or the split of the data. The cost is about one ordinary forward and backward
    pass; parameters for which no fast route holds are measured one sample at a time, with a warning that names them.

    With estimator="mas-local" every layer is on its own, and forward passes are enough (the same paper; for ReLU it is
    Hebb's rule): Omega_ij = 1/N sum_k |sum_p 2 y_kip phi'(z_kip) a_kjp|, where a is the layer's input, z = W a + b, y =
    phi(z), p a sample's positions or tokens. phi is every elementwise operation and reshape that follows before y meets
    anything else of the sample: an activation, batch normalisation (in eval mode it is elementwise), a table that is
    added. Layers that do not run, or under no_grad, have zero. Padding is left out as far as tensors are (samples,
    tokens, ...) or (samples * tokens, features); with a decoder it counts.

    Tokens that the batch's `attention_mask` (with a decoder, its `decoder_attention_mask`) says are padding do not
    count in outputs (samples, tokens, ...), unless there is a `forward`, which then has to see to that.

    The model is measured in eval mode on a stand-in that shares its weights: it stays bit for bit as it was.

    Args:
        model: any module; parameters that do not require a gradient are left out.
        batches: a DataLoader or any iterable of tensors, of (input, target) tuples or lists (the target is not
            looked at), or of mappings (given as keyword arguments, labels left out). The first dimension of every
            tensor is the samples. Batches are moved to the model's device.
        forward: (model, batch) -> output, for everything else. Use the model it is given, not your own.
        max_samples: stop after so many samples.
        estimator: what to measure: one of `ESTIMATORS` by name, or an `Estimator`. "fisher-empirical" looks at labels.
        batched: take the magnitude of each batch's mean gradient in place of each sample's: what most other libraries
            do. It depends on the batch size, and is too small: for comparisons only.
        group: the processes that measure together, each on batches of its own (or none): all get the importance of
            all their samples. Those of a DistributedDataParallel model, unless told.
        progress: show a progress bar.

    Returns:
        The importance of every parameter that requires a gradient, as sums and a count.

    Raises:
        BatchError: there are no samples, or the batches cannot be read.
        ModelError: there is nothing to measure, or the model cannot be cloned.
        OutputError: the output is not one finite, differentiable value or vector per sample.
        SamplesInteractError: the output for one sample depends on the others.
        ProcessError: another process of the group has failed.

    Example:
        >>> import torch, memsyn
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> data = [torch.tensor([[1.0, 2.0], [3.0, -3.0]])]  # outputs 3 and 0: d y^2 / d w = 2 y x
        >>> memsyn.measure(model, data, progress=False).mean()["weight"].tolist()
        [[3.0, 6.0]]
    """
    check_iterable(batches)
    if max_samples is not None and (not isinstance(max_samples, int) or max_samples < 1):
        raise OptionError(f"max_samples must be a whole number, at least 1; got {max_samples!r}.")
    chosen = find_estimator(estimator)
    check_measurable(model)
    trainable = trainable_parameters(model)
    if not trainable:
        raise ModelError("the model has no parameter that requires a gradient: there is nothing to measure.")
    device = next(iter(trainable.values())).device
    group = group or group_of(model)
    with (
        _untouched_generators(),
        all_or_none(group, device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        workspace(),
    ):
        run = _Run(model, trainable, device, forward, chosen, batched)
        limited = first_samples(iter(batches), max_samples)
        bar = tqdm(limited, "measuring", _length(batches, max_samples), disable=not progress, unit="batch")
        for index, batch in enumerate(bar):
            given = Given(model_input(batch) if forward is None else batch, labels_of(batch) if run.labelled else None)
            slow = run.add(given, index)
            if slow:
                warnings.warn(run.describe(slow), SlowParametersWarning, stacklevel=2)
            bar.set_postfix_str(f"{run.num_samples} samples, {len(run.slow)} slow parameters")
    return run.importance(group)


@final
class _Run:
    """What is known while the batches pass: the sums, and which parameter takes which route."""

    def __init__(
        self,
        model: nn.Module,
        trainable: dict[str, nn.Parameter],
        device: torch.device,
        forward: Forward | None,
        estimator: Estimator,
        batched: bool,
    ) -> None:
        self.original, self.device = model, device
        self.forward: Forward = forward or call
        self.masked = forward is None
        self.estimator, self.batched = estimator, batched
        self.labelled = estimator == ESTIMATORS["fisher-empirical"]
        self.magnitude = MAGNITUDES[estimator.magnitude]
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
        self.sums: dict[str, Tensor] = {}
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
        assert self.shadow is not None
        run = partial(self._scores_of_shadow, index)
        if self.batched:
            self.num_samples += add_batched(self.sums, self.parameters, run, inputs, self.magnitude)
            return set()
        if self.num_guarded == 1:  # a batch of one is an ordinary pass
            alone = add_by_samples(self.sums, self.parameters, run, inputs, self.magnitude, together=None)
            self.num_samples += len(alone)
            return set()
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
            add_by_samples(self.sums, own, run, inputs, self.magnitude, together=together)
        self.num_samples += len(passed.scores)
        return slow - known

    def _pass(self, run: Scores, inputs: Given, only: set[str] | None) -> Passed:
        return add_by_uses(
            self.sums,
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

        for few in guard.choices(inputs):
            verdict = guard.check(self.original, self.routes, run, few, local=self.estimator.local)
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

    def _learn(self, verdict: guard.Verdict, names: set[str]) -> None:
        """Take over what a further look has shown about `names`, and what it has shown to be wrong about others."""
        for path, split in verdict.splits.items():
            self.splits[path] = merge(self.splits[path], split) if path in self.splits else split
        for name, route in verdict.routes.items():
            if name in names or route == BY_SAMPLE:
                self.routes[name] = route
        self.unproven = {n for n in self.unproven if n in verdict.unproven} | (names & verdict.unproven)

    def _clone(self, written: set[str]) -> None:
        self.shadow = shadow(self.original, private=written)
        own = named_parameters(self.shadow)
        self.parameters = {name: parameter for name, parameter in own.items() if name in self.routes}
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.sums = {name: torch.zeros_like(p, dtype=wide_dtype(p)) for name, p in self.parameters.items()}

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
            f"{len(slow)} of {len(self.sums)} parameters have no fast route that holds, and are measured one sample at "
            f"a time: exact, but slow. They are in {', '.join(named)}. Give fewer samples with max_samples=, or freeze "
            "what needs no protection."
        )

    def importance(self, group: Group | None) -> Importance:
        """The result, if there is one."""
        routes = self.routes
        if group is not None:
            if not self.sums:  # no sample came to this process
                trainable = trainable_parameters(self.original)
                self.sums = {name: torch.zeros_like(p, dtype=wide_dtype(p)) for name, p in trainable.items()}
                routes = dict.fromkeys(self.sums, UNUSED)
            self.num_samples, routes = add_up(self.sums, self.num_samples, routes, group)
        if self.num_samples == 0:
            raise BatchError(
                "there are no samples: the loader is empty, or all of its batches are. Nothing was measured."
            )
        check_finite(self.sums)
        if self.estimator.local:  # so far of half the squared norms
            twice = self.magnitude(torch.tensor(2.0))
            self.sums = {name: total * twice.to(total) for name, total in self.sums.items()}
        magnitude = f"{self.estimator.magnitude} of the batch mean" if self.batched else self.estimator.magnitude
        return Importance(self.sums, self.num_samples, {} if self.batched else routes, self.estimator.name, magnitude)


def _differ(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    return any(
        new._version > 0 or (old.layout == torch.strided and not torch.equal(old, new))
        for old, new in zip(before, after, strict=True)
    )


def _length(batches: object, max_samples: int | None) -> int | None:
    if max_samples is not None or not isinstance(batches, Sized):
        return None
    try:
        return len(batches)
    except TypeError:  # a DataLoader over a stream has the method, but no length
        return None


@contextmanager
def _untouched_generators() -> Iterator[None]:
    """Leave the global random generators as they were: iterating a DataLoader draws from torch's."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
