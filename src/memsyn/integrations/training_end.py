"""What the callbacks of all trainers share: their settings, the try before training, and measuring when it ends.

Owns which estimators continue a memory, which trainings read the same data, and the group of the processes that a
trainer has started. Must not know any trainer.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
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
        """Protect a memory that `kept` returned."""
        options = {name: value for name, value in (self.protect_options or {}).items() if name != "exclude"}
        return protect(optimizer, model, memory, strength=self.strength, form=self.form, **options)


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
    return measure(
        model,
        batches,
        estimator=estimator,
        forward=settings.forward,
        max_samples=settings.max_samples,
        group=dist.group.WORLD if dist.is_available() and dist.is_initialized() else None,
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
