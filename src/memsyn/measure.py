"""measure(model, batches) -> Importance: the loop over the data.

Owns what happens once per run and once per batch: the shadow, the choice of routes and its check, progress, the
state of random generators. Formulas live in `rules`, passes in `routes`.
"""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from memsyn import guard
from memsyn.batches import call, check_iterable, copied, first_samples, model_input, num_samples, to_device
from memsyn.errors import BatchError, MemsynError, ModelError, OptionError, SlowParametersWarning
from memsyn.importance import Importance
from memsyn.objectives import output_tensor, squared_norm
from memsyn.parameters import named_parameters, trainable_parameters, unwrap
from memsyn.routes import (
    BY_SAMPLE,
    add_by_rules,
    add_by_samples,
    check_finite,
    layers_by_rule,
    plan,
    wide_dtype,
)
from memsyn.rules import absolute
from memsyn.shadow import check_measurable, shadow

Forward = Callable[[nn.Module, Any], Any]


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_samples: int | None = None,
    progress: bool = True,
) -> Importance:
    """How much each weight matters to what the model computes, from unlabelled data.

    Omega = 1/N sum_k |d s(F(x_k; theta)) / d theta|, s the squared L2 norm of the raw output, summed over every
    non-batch dimension (Aljundi et al. 2018, Eq. 2). The absolute value is taken per sample, so the result does not
    depend on the batch size, the order or the split of the data. The cost is about one ordinary forward and backward
    pass; parameters for which no rule holds are measured one sample at a time, with a warning that names them.

    The model is measured in eval mode on a stand-in that shares its weights: it stays bit for bit as it was.

    Args:
        model: any module; parameters that do not require a gradient are left out.
        batches: a DataLoader or any iterable of tensors, of (input, target) tuples or lists (the target is not
            looked at), or of mappings (given as keyword arguments, labels left out). The first dimension of every
            tensor is the samples. Batches are moved to the model's device.
        forward: (model, batch) -> output, for everything else. Use the model it is given, not your own.
        max_samples: stop after so many samples.
        progress: show a progress bar.

    Returns:
        The importance of every parameter that requires a gradient, as sums and a count.

    Raises:
        BatchError: there are no samples, or the batches cannot be read.
        ModelError: there is nothing to measure, or the model cannot be cloned.
        OutputError: the output is not one finite, differentiable value or vector per sample.
        SamplesInteractError: the output for one sample depends on the others.

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
    check_measurable(model)
    trainable = trainable_parameters(model)
    if not trainable:
        raise ModelError("the model has no parameter that requires a gradient: there is nothing to measure.")
    device = next(iter(trainable.values())).device
    with (
        _untouched_generators(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        _layers_of_attention(),
    ):
        run = _Run(model, trainable, device, forward)
        limited = first_samples(iter(batches), max_samples)
        bar = tqdm(limited, "measuring", _length(batches, max_samples), disable=not progress, unit="batch")
        for index, batch in enumerate(bar):
            slow = run.add(model_input(batch) if forward is None else batch, index)
            if slow:
                warnings.warn(run.describe(slow), SlowParametersWarning, stacklevel=2)
            bar.set_postfix_str(f"{run.num_samples} samples, {run.num_slow} slow parameters")
    return run.importance()


@final
class _Run:
    """What is known while the batches pass: the sums, and which parameter takes which route."""

    def __init__(
        self, model: nn.Module, trainable: dict[str, nn.Parameter], device: torch.device, forward: Forward | None
    ) -> None:
        self.original, self.device = model, device
        self.forward = call if forward is None else forward
        self.routes = {name: route for name, route in plan(unwrap(model)).items() if name in trainable}
        self.sums = {name: torch.zeros_like(p, dtype=wide_dtype(p)) for name, p in trainable.items()}
        self.num_samples = 0
        self.trusted: set[str] = set()
        self.unproven: set[str] = set()
        self.num_guarded = 0
        self.shadow: nn.Module | None = None
        self.layers: dict[nn.Module, dict[str, str]] = {}

    @property
    def num_slow(self) -> int:
        return sum(route == BY_SAMPLE for route in self.routes.values())

    def add(self, inputs: Any, index: int) -> set[str]:
        """Add one batch; returns the parameters now found to need one sample at a time."""
        size = num_samples(inputs)
        if size == 0:
            return set()
        inputs = to_device(inputs, self.device)
        known = {name for name, route in self.routes.items() if route == BY_SAMPLE and self.num_guarded}
        if self._should_guard(size, index):
            for few in guard.choices(inputs):
                self._guard(few, index)
                if not self.unproven:
                    break
        assert self.shadow is not None
        scores = partial(self._scores, self.shadow, index)
        passed = add_by_rules(self.sums, self.layers, scores, inputs, absolute, trusted=self.trusted)
        self._slow_down(passed.refused)
        slow = {name for name, route in self.routes.items() if route == BY_SAMPLE}
        if slow:
            alone = {name: p for name, p in named_parameters(self.shadow).items() if name in slow}
            add_by_samples(self.sums, alone, scores, inputs, absolute, together=passed.scores)
        self.num_samples += len(passed.scores)
        return slow - known

    def _should_guard(self, size: int | None, index: int) -> bool:
        """Once; again if then there was one sample, which cannot show where the samples are, or no gradient yet."""
        if self.num_guarded < 2:
            return self.num_guarded == 0 or size != 1
        return bool(self.unproven) and index & (index - 1) == 0

    def _guard(self, few: Any, index: int) -> None:
        def run(model: nn.Module, batch: Any, first_sample: int) -> Tensor:
            return self._scores(model, index, batch, first_sample)

        verdict, size = guard.check(self.original, self.routes, run, few), num_samples(few)
        if self.num_guarded < 2:
            self.trusted, self.unproven = verdict.trusted, verdict.unproven
        else:
            self.trusted = (self.trusted | verdict.trusted) - verdict.failed
            self.unproven &= verdict.unproven | (self.trusted - verdict.trusted)
        self.num_guarded = max(self.num_guarded, 2 if size is None else size)
        if self.shadow is None:
            self.shadow = shadow(self.original, private=verdict.written)
            self.layers = layers_by_rule(self.shadow, self.routes)
        self._slow_down(verdict.failed)

    def _slow_down(self, names: set[str]) -> None:
        if names:
            assert self.shadow is not None
            self.routes.update(dict.fromkeys(names, BY_SAMPLE))
            self.layers = layers_by_rule(self.shadow, self.routes)

    def _scores(self, model: nn.Module, batch_index: int, inputs: Any, first_sample: int = 0) -> Tensor:
        if self.num_slow or model is not self.shadow:
            inputs = copied(inputs)  # it will be read again, and the forward pass may change it in place
        try:
            output = self.forward(model, inputs)
        except MemsynError:
            raise
        except Exception as error:
            raise BatchError(
                f"batch {batch_index}: the model failed on it: {type(error).__name__}: {error}. If it wants to be "
                "called in another way, say how: forward=lambda model, batch: ..."
            ) from error
        return squared_norm(
            output_tensor(output),
            num_samples=num_samples(inputs),
            batch_index=batch_index,
            first_sample=first_sample,
        )

    def describe(self, slow: set[str]) -> str:
        """The warning: which layers, and what they are."""
        layers = sorted({name.rpartition(".")[0] for name in slow})
        model = unwrap(self.original)
        named = [f"{layer or 'the model'} ({type(model.get_submodule(layer)).__name__})" for layer in layers]
        return (
            f"{len(slow)} of {len(self.sums)} parameters have no fast rule that holds, and are measured one sample at "
            f"a time: exact, but slow. They are in {', '.join(named)}. Give fewer samples with max_samples=, or freeze "
            "what needs no protection."
        )

    def importance(self) -> Importance:
        """The result, if there is one."""
        if self.num_samples == 0:
            raise BatchError(
                "there are no samples: the loader is empty, or all of its batches are. Nothing was measured."
            )
        check_finite(self.sums)
        return Importance(self.sums, self.num_samples, routes=self.routes)


def _length(batches: object, max_samples: int | None) -> int | None:
    if max_samples is not None or not isinstance(batches, Sized):
        return None
    try:
        return len(batches)
    except TypeError:  # a DataLoader over a stream has the method, but no length
        return None


@contextmanager
def _layers_of_attention() -> Iterator[None]:
    """Let a frozen nn.TransformerEncoderLayer call its layers: its fast path has no backward pass."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


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
