"""What the callbacks of all trainers share: settings, the try before training, reports, and measuring when it ends.

Owns which estimators continue a memory, when a training must stop, which trainings read the same data, and the group of
the processes that a trainer has started. Must not know any trainer.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, final

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from memsyn import (
    Estimator,
    ForgettingWarning,
    Forward,
    KroneckerFactors,
    Memory,
    MemsynError,
    ModelError,
    NotMeasuredWarning,
    OptionError,
    Protection,
    Relative,
    RepeatedDataWarning,
    measure,
    protect,
)
from memsyn.sharding.parts import any_sharded

RANK: Final[int | None] = inspect.signature(Memory.consolidate).parameters["rank"].default

OPTIONS: Final = sorted(
    inspect.signature(protect).parameters.keys() - {"optimizer", "model", "memory", "strength", "form"}
)
"""What `protect` takes beside what the callbacks name themselves."""

CURES: Final = (
    "Say in MemsynCallback(...) how to measure: forward=lambda model, batch: ... runs the model and returns the output "
    "that counts; data= gives other batches to measure; max_samples=0 protects, and measures nothing."
)


@final
@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of a callback, as the classes `MemsynCallback` document them."""

    strength: float | Relative | None
    form: str
    protect_options: Mapping[str, Any] | None
    estimator: str | Estimator | None
    forward: Forward | None
    data: Iterable[Any] | None
    max_samples: int | None
    report_every: int | None
    max_change: float | None
    consolidation: Mapping[str, Any] = field(default_factory=dict)
    """Option of `Memory.consolidate` -> value."""

    def __post_init__(self) -> None:
        unknown = sorted((self.protect_options or {}).keys() - set(OPTIONS))
        if unknown:
            raise OptionError(
                f"protect_options must be options of protect ({', '.join(OPTIONS)}); got {', '.join(unknown)}."
            )
        if isinstance(self.data, Iterator):
            raise OptionError(
                f"data must be batches that can be read more than once, since one is tried before training; got a "
                f"{type(self.data).__name__}. Give a DataLoader or a list of batches."
            )
        counted = self.max_samples is None or (isinstance(self.max_samples, int) and self.max_samples >= 0)
        if not counted:
            raise OptionError(
                f"max_samples must be None (all), 0 (measure nothing) or a whole number above; got {self.max_samples}."
            )
        every, bound = self.report_every, self.max_change
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise OptionError(f"report_every must be a whole number of steps, at least 1, or None; got {every!r}.")
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0):
            raise OptionError(f"max_change must be a number above 0, such as 0.05, or None; got {bound!r}.")

    @property
    def measures(self) -> bool:
        """Whether anything is measured when training ends."""
        return self.max_samples != 0

    def kept(self, memory: Memory, model: nn.Module) -> Memory:
        """The part of a memory that a training protects and extends: without what `only` and `exclude` leave out.

        What was replaced must not be added to what is measured when training ends.
        """
        options = self.protect_options or {}
        if not memory.names:
            return memory
        return memory.fitted(model).select(only=options.get("only"), exclude=options.get("exclude"))

    def protect(self, optimizer: Optimizer, model: nn.Module, memory: Memory) -> Protection:
        """Protect a memory.

        Raises:
            OptionError: training must stop at `max_change`, and the memory does not predict a change.
        """
        handle = protect(
            optimizer, model, memory, strength=self.strength, form=self.form, **(self.protect_options or {})
        )
        unknown = "" if self.max_change is None else handle.report().unknown
        if unknown:
            handle.remove()
            raise OptionError(
                f"max_change={self.max_change:g} stops a training by the predicted change of outputs, and this is not "
                f"known: {unknown} Options of protect go into protect_options=."
            )
        return handle


def reported(protections: Sequence[Protection], settings: Settings, step: int) -> tuple[dict[str, float], bool]:
    """The scalars of the handles of one model, and whether training must stop, the same in all processes.

    Args:
        protections: one or more.
        settings: with `max_change`, or None for no stop.
        step: how many steps were made, for the warning.

    Warns:
        ForgettingWarning: training must stop.
    """
    reports = [protection.report() for protection in protections]
    first, scalars, bound = reports[0], reports[0].scalars(), settings.max_change
    if len(reports) > 1:  # the predicted change and the statistics are of the model, and the same in all
        total = sum(report.num_weights for report in reports)
        held = sum(report.held * report.num_weights / max(1, total) for report in reports)
        whole = replace(first, held=held, penalty=sum(report.penalty for report in reports))
        scalars = whole.scalars()
    if bound is None or first.change is None:
        return scalars, False
    change = _largest_of_processes(first.change, protections[0].optimizer)
    if change <= bound:
        return scalars, False
    warnings.warn(
        f"training stops after step {step}: the predicted change of outputs is {change:.4g}, above "
        f"max_change={bound:g}. {str(first).splitlines()[0]} The model keeps what it has learned so far. To learn more "
        "and forget less, protect with a larger strength, or train with a smaller learning rate.",
        ForgettingWarning,
        stacklevel=4,
    )
    return scalars, True


def is_cut_between_processes(optimizer: Optimizer | None) -> bool:
    """Whether an optimizer holds DTensors, so that a flush may talk to other processes."""
    groups = [] if optimizer is None else optimizer.param_groups
    return any(getattr(p, "device_mesh", None) is not None for group in groups for p in group["params"])


def _largest_of_processes(change: float, optimizer: Optimizer | None) -> float:
    """The largest value of all processes, so that all decide alike."""
    if not (dist.is_available() and dist.is_initialized()) or optimizer is None:
        return change
    # NCCL knows no tensors of the CPU. Weights under `fully_shard` may be kept there, and their mesh is elsewhere.
    first = optimizer.param_groups[0]["params"][0]
    place = getattr(getattr(first, "device_mesh", None), "device_type", first.device)
    largest = torch.tensor(change, dtype=torch.float64, device=place)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


@final
@dataclass(frozen=True)
class Training:
    """One training of a callback.

    Attributes:
        data: the objects that hold the data to measure, or text that stands for one.
        before: the memory that the training protects, and that is extended when it ends.
        after: the memory when it had ended; None before that.
    """

    data: tuple[object, ...]
    before: Memory
    after: Memory | None = None


def begun(memory: Memory, data: tuple[object, ...], last: Training | None) -> Training:
    """A training on `data`. If the training before it read the same objects, it starts from the memory before that one.

    Else a second training on the same data would count every sample twice, and hold the weights where the first one
    left them.
    """
    if last is None or last.after is not memory or not _are_same(last.data, data):
        return Training(data, memory)
    warnings.warn(
        "this callback has measured the same data when its last training ended. So that no sample counts twice, this "
        "training protects the memory from before, and the new measurement will replace the last one. If the data "
        "hold another task now, use a new callback: MemsynCallback(callback.memory).",
        RepeatedDataWarning,
        stacklevel=2,
    )
    return Training(data, last.before, last.after)


def _are_same(mine: tuple[object, ...], other: tuple[object, ...]) -> bool:
    if len(mine) != len(other):
        return False
    return all(a == b if isinstance(a, str) else a is b for a, b in zip(mine, other, strict=True))


@final
class FirstBatches:
    """The first batches of a loader. The loader is opened when the batches are measured, not before.

    Args:
        read: opens the loader. Opening a DataLoader draws random numbers, and `measure` restores the generators.
        limit: how many batches.
        total: how many batches an epoch has; infinity if the loader cannot say.
    """

    def __init__(self, read: Callable[[], Iterable[Any]], limit: int, total: float) -> None:
        self._read, self._count = read, int(min(limit, total))

    def __iter__(self) -> Iterator[Any]:
        return islice(self._read(), self._count)

    def __len__(self) -> int:
        return self._count


def try_batch(training: Training, settings: Settings, model: nn.Module, batches: Iterable[Any]) -> None:
    """Measure and consolidate one batch before training, and throw the result away.

    Raises:
        MemsynError: the training could not be measured when it ends.

    Warns:
        NotMeasuredWarning: no batch could be read, so nothing was tried.
    """
    read = False

    def first() -> Iterator[Any]:
        nonlocal read
        for batch in batches:
            read = True
            yield batch
            return

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come when training ends
            before = settings.kept(training.before, model)
            for chosen in _estimators(before, settings):
                _consolidated(before, settings, model, _measured(settings, model, first(), chosen), trial=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if read or isinstance(error, MemsynError):
            kind = type(error) if isinstance(error, MemsynError) else ModelError
            text = str(error) if isinstance(error, MemsynError) else f"{type(error).__name__}: {error}."
            raise kind(f"one batch was tried before training, and cannot be measured: {text} {CURES}") from error
        untried(f"its first batch could not be read ({type(error).__name__}: {error})")


def untried(reason: str) -> None:
    """Warn that no batch could be tried before training."""
    warnings.warn(
        f"whether this training can be measured when it ends is not known: {reason}. {CURES}",
        NotMeasuredWarning,
        stacklevel=3,
    )


@contextmanager
def failures_as_warnings() -> Iterator[None]:
    """Turn an error while measuring into a warning: the training has ended, and its model must not be lost."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"the training has ended, but measuring has failed: {type(error).__name__}: {error} The model has its "
            "trained weights. The memory is as it was, without what this training learned. Measure by hand: "
            "memory.consolidate(model, memsyn.measure(model, batches)).",
            NotMeasuredWarning,
            stacklevel=4,
        )


def warn_without_steps() -> None:
    """Warn that a training made no step, as a finished one that is resumed."""
    warnings.warn(
        "the training made no step, so nothing was measured: the memory is as it was. If the training that made the "
        "steps was not measured, do it by hand: memory.consolidate(model, memsyn.measure(model, batches)).",
        NotMeasuredWarning,
        stacklevel=3,
    )


def use_kept_weights(optimizer: object) -> None:
    """Let a schedule-free optimizer put the averaged weights, which are to be used, in place of those of the steps."""
    switch = getattr(optimizer, "eval", None)
    if callable(switch):
        switch()


def ended(
    training: Training, settings: Settings, model: nn.Module, batches: Iterable[Any], *, progress: bool
) -> Training:
    """The training with the memory after it: one consolidation for each estimator."""
    memory = settings.kept(training.before, model)
    for chosen in _estimators(memory, settings):
        given = batches if settings.data is None else settings.data
        memory = _consolidated(memory, settings, model, _measured(settings, model, given, chosen, progress=progress))
    return replace(training, after=memory)


def _measured(
    settings: Settings,
    model: nn.Module,
    batches: Iterable[Any],
    estimator: str | Estimator,
    *,
    progress: bool = False,
) -> Any:
    # The processes of a sharded model measure together in any case: `measure` takes no group for it.
    is_alone = not (dist.is_available() and dist.is_initialized()) or any_sharded(list(model.parameters()))
    return measure(
        model,
        batches,
        estimator=estimator,
        forward=settings.forward,
        max_samples=settings.max_samples,
        group=None if is_alone else dist.group.WORLD,
        progress=progress,
        weights="effective",
    )


def _consolidated(memory: Memory, settings: Settings, model: nn.Module, found: Any, *, trial: bool = False) -> Memory:
    if trial and isinstance(found, KroneckerFactors):
        # Their eigenvectors may take minutes. The options and the quantity are checked without them.
        found = replace(found, sums={}, matrices={})
    return memory.consolidate(model, found, **settings.consolidation)


def _estimators(memory: Memory, settings: Settings) -> list[str | Estimator]:
    """The given one; else what measures what the memory holds: importance, directions or both."""
    if settings.estimator is not None:
        return [settings.estimator]
    chosen: list[str | Estimator] = ["mas"] if memory.importance or memory.directions is None else []
    if memory.directions_quantity is not None:
        inputs_alone = memory.directions_quantity[1] == "second moments of inputs"
        chosen.append("inputs" if inputs_alone else "kronecker")
    return chosen
