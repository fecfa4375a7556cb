"""Observer: importance from the traffic that a model serves.

Owns what may be asked for, and that nothing of the work reaches the caller. What is taken and where it waits is in
`traffic`, when it is measured in `worker`, the sums are in `ledger`.
"""

from __future__ import annotations

import atexit
import inspect
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memsyn.batches import model_input, num_samples, picked, tensors
from memsyn.errors import BatchError, MemoryFileError, ModelError, OptionError
from memsyn.live.request_queue import Budget, Taken, Traffic, Watch
from memsyn.live.segment_sums import Ledger
from memsyn.live.window import Window
from memsyn.live.worker import Worker
from memsyn.measuring.measurement import Forward
from memsyn.measuring.model_copy import Onlooker, check_measurable, refuse_foreign_hooks
from memsyn.measuring.objectives import ESTIMATORS, Estimator, find_estimator
from memsyn.parameters import trainable_parameters, unwrap
from memsyn.values.importance import Importance


@dataclass(frozen=True)
class Stats:
    """What an observer has done so far. Counts are of samples.

    `sampled` are measured, dropped, stale, invalid, or waiting.
    """

    seen: int
    """Samples of the requests that were shown."""
    sampled: int
    """Those of them that were chosen."""
    measured: int
    """Those of them whose importance is in the sums."""
    waiting: int
    """Those of them that are in the queue or being measured."""
    dropped: int
    """Not measured, for want of room in the queue or because something failed."""
    stale: int
    """Not measured because the weights that answered them were gone."""
    invalid: int
    """Left out: their output or gradient was NaN or infinite, or the model failed on them."""
    capped: int
    """Scaled down to `cap`."""
    errors: int
    """How often something failed."""
    last_error: str | None
    seconds: float
    """Spent measuring and storing; on a busy machine that is more than what it took of a core."""
    lag: float
    """How long the oldest sample in the queue has been waiting, in seconds."""
    versions: int
    """Sets of weights that were measured."""
    stored: float | None
    """When the sums were last written, in seconds since 1970."""


@final
class Observer:
    """Measures importance on samples of the traffic that a model serves, off the path of its requests.

    The sums are those that `memsyn.measure` gives for the samples that were measured: Omega = 1/N sum_k |d s(F(x_k);
    theta) / d theta|. Inputs are never stored; in memory they wait to be measured. That is done on a private copy of
    the weights: sums are always of one set of weights, and other weights begin another file.

    Args:
        model: any module that `measure` takes; it stays bit for bit as it was. Of its forward hooks, methods of modules
            count as what it computes, and those of torch.nn.utils (weight norm, pruning); see `onlookers`.
        store: the file to keep the sums in, or its URL: an importance file, for `Importance.load` and `memsyn merge`.
            If it is there, and of the same weights and settings, sums go on from it; if it is of others, it is kept,
            and another is begun beside it: `name.1a2b3c4d.end`, with eight digits for what they are. Segments have
            files of their own: `name+segment.end`. Each replica needs a store of its own.
        rate: the share of samples that are taken, 0 to 1, each on its own.
        forward: (model, inputs) -> output, as `measure` takes it; inputs is what `observe` was given. By its name the
            store knows it again.
        estimator: one of `ESTIMATORS` by name, or an `Estimator`; "mas-local" needs forward passes only.
        last: a timedelta: older samples are dropped, a seventh of it at a time.
        half_life: a timedelta: samples count 2^(-age / half_life). Neither: all samples count.
        cap: the share of its segment's total that one sample may have, 0 to 1: larger ones are scaled down to it. Until
            10 / cap samples are measured, the limit is ten times their mean.
        budget: percent of its time in which the thread may work, so at most as much of one core.
        room: samples that may wait; others are dropped.
        max_batch: samples measured at once, when so many wait, or the first has waited for half a minute. Large ones
            cost less each, and disturb longer.
        interval: seconds between writes of the store: what a crash may lose, beside the samples that wait.
        busy: called before each batch; while it says True, nothing is measured.
        onlookers: other forward hooks only look on, as a recorder of requests does, and are left out: it must not see
            samples again. Unless this is said they are an error, since they may be part of what the model computes.
        seed: of the choice of samples.

    Raises:
        OptionError: an argument is out of place.
        ModelError: the model cannot be measured, or has hooks that may compute.
        MemoryFileError: the store's folder does not exist.

    Example:
        >>> import tempfile, torch, memsyn
        >>> model, folder = torch.nn.Linear(2, 1, bias=False), tempfile.mkdtemp()
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> with memsyn.Observer(model, f"{folder}/traffic.safetensors", rate=1.0) as observer:
        ...     observer.observe(torch.tensor([[1.0, 2.0], [3.0, -3.0]]))  # outputs 3 and 0: d y^2 / d w = 2 y x
        ...     _ = observer.flush()
        >>> memsyn.Importance.load(f"{folder}/traffic.safetensors").mean()["weight"].tolist()
        [[3.0, 6.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        store: str | os.PathLike[str],
        *,
        rate: float = 0.01,
        forward: Forward | None = None,
        estimator: str | Estimator = "mas",
        last: timedelta | None = None,
        half_life: timedelta | None = None,
        cap: float | None = None,
        budget: float = 10.0,
        room: int = 256,
        max_batch: int = 32,
        interval: float = 60.0,
        busy: Callable[[], bool] | None = None,
        onlookers: bool = False,
        seed: int | None = None,
    ) -> None:
        for name, value, low, high in (
            ("rate", rate, 0, 1),
            ("cap", 1 if cap is None else cap, 0, 1),
            ("budget", budget, 0, 100),
            ("interval", interval, 0, float("inf")),
        ):
            if not isinstance(value, (int, float)) or not low < value <= high:
                raise OptionError(f"{name} must be a number above {low}, up to {high}; got {value!r}.")
        for name, value in (("room", room), ("max_batch", max_batch)):
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be a whole number, at least 1; got {value!r}.")
        chosen = find_estimator(estimator)
        if chosen == ESTIMATORS["fisher-empirical"]:
            raise OptionError("estimator='fisher-empirical' needs labels, which requests do not have.")
        _check(model, onlookers)
        Window(last, half_life)
        if "://" not in str(store) and not Path(store).absolute().parent.is_dir():
            raise MemoryFileError(f"the store {store} cannot be written: its folder does not exist.")

        def begin(fingerprint: str) -> Ledger:
            return Ledger(
                model,
                lambda: Window(last, half_life),
                forward=forward,
                estimator=chosen,
                cap=cap,
                store=store,
                fingerprint=fingerprint,
            )

        self._model, self._forward = model, forward
        self._traffic, self._watch, self._budget = Traffic(rate, room, seed), Watch(model), Budget(budget / 100)
        self._hooks: list[RemovableHandle] = []
        self._worker = Worker(
            model,
            self._traffic,
            self._watch,
            self._budget,
            begin,
            max_batch=max_batch,
            interval=interval,
            busy=busy,
            onlookers=onlookers,
        )
        atexit.register(self.close)

    def observe(self, inputs: Any, *, segment: str | None = None) -> None:
        """Show what the model is, or was, asked: never blocks, never raises; what is taken is copied at once.

        Args:
            inputs: what `measure` takes as a batch, with its samples first; one sample is a batch of one.
            segment: whose sums these samples belong to. There may be 64.
        """
        try:
            if self._worker.is_open:
                self._offer(inputs, segment)
        except Exception as error:
            self._worker.note(error)

    def attach(self) -> None:
        """Observe every forward pass of the model, from now on: its inputs as they come, before any hook of others.

        A single tensor is taken as such, anything else as keyword arguments by the names of the model's `forward`: a
        pass that cannot be called so is left out, as an error. Attached already, this does nothing.
        """
        if self._hooks:
            return
        self._hooks.append(
            self._model.register_forward_pre_hook(_Hook(self._offer_pass), with_kwargs=True, prepend=True)
        )

    def detach(self) -> None:
        """Observe no more forward passes."""
        while self._hooks:
            self._hooks.pop().remove()

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until what is queued is measured and stored, whatever it costs; returns whether it was."""
        return self._worker.flush(timeout)

    def close(self, timeout: float = 10.0) -> None:
        """Measure a last batch, store the sums and end: what waits beyond that is dropped. Also done at exit.

        Waits so many seconds at most.
        """
        atexit.unregister(self.close)
        self.detach()
        self._worker.close(timeout)

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def importance(self, segments: str | Mapping[str, float] | None = None) -> Importance:
        """What was measured at the present weights: of all samples, of a segment, or of several with weights.

        Args:
            segments: a segment's name; or names and weights w: Omega = sum_s w_s Omega_s / sum_s w_s, whatever the
                number of samples of each.

        Raises:
            BatchError: nothing was measured yet.
            OptionError: the weights are negative, not finite, or all zero.
        """
        ledger = self._worker.ledger
        if ledger is None:
            raise BatchError("nothing has been measured yet.")
        return ledger.importance(segments, time.time())

    def converged(self) -> float:
        """How settled the weights' ranking is: Spearman's rank correlation between two halves of the samples, -1 to 1.

        The halves are every other batch since the observer met these weights, of all segments, however old. Some 10^6
        weights at most are ranked, evenly spread. NaN while a half is empty. It costs two numbers per weight.
        """
        ledger = self._worker.ledger
        return math.nan if ledger is None else ledger.converged()

    def stats(self) -> Stats:
        """What has been done so far."""
        traffic, worker = self._traffic, self._worker
        measured, invalid, capped = worker.counts
        return Stats(
            seen=traffic.seen,
            sampled=traffic.taken,
            measured=measured,
            waiting=traffic.held,
            dropped=traffic.dropped,
            stale=worker.stale,
            invalid=invalid,
            capped=capped,
            errors=worker.errors,
            last_error=worker.last_error or None,
            seconds=self._budget.seconds,
            lag=traffic.lag,
            versions=worker.versions,
            stored=worker.stored,
        )

    def _offer(self, inputs: Any, segment: str | None) -> None:
        given = model_input(inputs) if self._forward is None else inputs
        size = num_samples(given)
        if size is None:
            raise BatchError("expected tensors whose first dimension is the samples, got none.")
        if not isinstance(segment, str | None):
            raise OptionError(f"segment must be text, got {segment!r}.")
        rows = self._traffic.choose(size)
        if not rows:
            return
        try:
            own = picked(given, rows)
            on_device = any(tensor.is_cuda for tensor in tensors(own))
            arrived = torch.cuda.current_stream().record_event() if on_device else None
            self._traffic.put(Taken(own, len(rows), segment, self._watch.tag(), time.time(), arrived))
        except BaseException:
            self._traffic.done(len(rows), dropped=len(rows))
            raise
        self._worker.wake()

    def _offer_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass that is about to happen."""
        try:
            inputs: Any = kwargs
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                inputs = args[0]
            elif args:
                inputs = _by_name(unwrap(self._model).forward, args, kwargs)
            self.observe(inputs)
        except Exception as error:
            self._worker.note(error)


def _check(model: nn.Module, onlookers: bool) -> None:
    """Refuse a model that cannot be measured."""
    check_measurable(model)
    if not onlookers:
        refuse_foreign_hooks(model)
    if not trainable_parameters(model):
        raise ModelError("the model has no parameter that requires a gradient: there is nothing to measure.")


def _by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call as keyword arguments."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
            raise BatchError(
                f"forward takes {name!r} by its place only: call observe, with forward= to say how to run."
            )
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named


@final
class _Hook(Onlooker):
    """Sees what a model is called with."""

    def __init__(self, offer: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._offer = offer

    def __call__(self, *given: Any) -> None:
        self._offer(given[1], given[2])
