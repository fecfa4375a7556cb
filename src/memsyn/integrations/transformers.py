"""A callback for Hugging Face's Trainer that protects a memory and measures at the end. Needs `transformers`."""

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any, final

from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from memsyn import Estimator, Forward, Memory, Protection, Relative
from memsyn.integrations.training_end import (
    RANK,
    FirstBatches,
    Settings,
    Training,
    begun,
    ended,
    failures_as_warnings,
    reported,
    try_batch,
    untried,
    use_kept_weights,
    warn_without_steps,
)


@final
class MemsynCallback(TrainerCallback):
    """Protects a memory while a Trainer trains, and consolidates it when training ends.

    The scalars of `Protection.report()` go into the Trainer's logs beside the loss, and so to TensorBoard and MLflow:
    `memsyn/predicted_change`, `memsyn/held`, `memsyn/moved_statistics` and, of the penalty forms, `memsyn/penalty`. A
    `max_change` stops a training that forgets.

    The projected form projects before each evaluation and each checkpoint of the Trainer, and when training ends. If a
    callback of yours asks for an evaluation, put it before this one; if it evaluates by itself, call
    `protection.flush()` first. To resume from a checkpoint, give the same memory again.

    Before the first step, two samples of the training set are measured on trial, and the result is thrown away. Model
    and random generators stay as they are; a stream that cannot be read twice loses two samples. When training ends,
    importance or factors are measured on the training set, through the Trainer's own loader and collator, and
    consolidated into `memory`. At most as many batches are measured as the training read, so an endless stream ends. If
    measuring fails then, a warning says so, and the memory stays as it was.

    The anchor is the weights that the model has when all callbacks are done, wherever this one stands in the list: the
    averaged ones of an EMA callback, the best ones with `load_best_model_at_end`. The averaged weights of a
    schedule-free optimizer are put into the model first, and stay there. A training without a step is not measured. If
    the same callback trains again on the same data set, that training protects the memory from before, and the new
    measurement replaces the last one.

    Args:
        memory: the memory to protect; `Memory.empty()` for a first task.
        strength, form: as `protect` takes them.
        protect_options: the other options of `protect`, by name: {"every": 4}.
        estimator: what to measure at the end, as `measure` takes it. By default, what the memory holds: importance
            ("mas"), factors ("kronecker" or "inputs"), or both in two passes; for an empty memory "mas".
        forward: (model, batch) -> output, as `measure` takes it; by default the model is called on the batch without
            its labels. Models with several outputs (question answering) and batches of pairs need one.
        data: batches to measure in place of the training set; they must be readable more than once.
        max_samples: how many samples to measure on, in each process; None for all, 0 for no measuring. With several
            processes the Trainer's sampler repeats a few samples to make the shares equal, and these count twice.
        report_every: after how many steps a report is made and logged; by default as often as the Trainer logs.
        max_change: training stops once the predicted change of outputs on the remembered data is above it: 0.05 is 5%.
            It is looked at in each report, and at the end of each epoch. The model keeps what it has learned so far.
            In nine of ten cases the measured change is at most 6.3 times that: give a fraction of what you allow.
        rule, decay, label, rank: as `Memory.consolidate` takes them.

    Raises:
        OptionError: an option is unknown, or `data` can be read only once; when training begins: `max_change` is given,
            and the memory predicts no change.
        MemsynError: when training begins: the trial has failed. The error says why.

    Warns:
        NotMeasuredWarning: nothing was measured, or nothing could be tried.
        ForgettingWarning: training stops, since the predicted change is above `max_change`.
        RepeatedDataWarning: the callback has measured the same data before.

    Example:
        >>> callback = MemsynCallback(memory)                          # doctest: +SKIP
        >>> Trainer(model, arguments, ..., callbacks=[callback]).train()      # doctest: +SKIP
        >>> callback.memory.save("model.memsyn.safetensors")                  # doctest: +SKIP
    """

    def __init__(
        self,
        memory: Memory,
        *,
        strength: float | Relative | None = None,
        form: str = "auto",
        protect_options: Mapping[str, Any] | None = None,
        estimator: str | Estimator | None = None,
        forward: Forward | None = None,
        data: Iterable[Any] | None = None,
        max_samples: int | None = None,
        report_every: int | None = None,
        max_change: float | None = None,
        rule: str = "sum",
        decay: float | None = None,
        label: str | None = None,
        rank: int | None = RANK,
    ) -> None:
        self.memory = memory
        self.protection: Protection | None = None
        self._settings = Settings(
            strength=strength,
            form=form,
            protect_options=protect_options,
            estimator=estimator,
            forward=forward,
            data=data,
            max_samples=max_samples,
            report_every=report_every,
            max_change=max_change,
            consolidation={"rule": rule, "decay": decay, "label": label, "rank": rank},
        )
        self._training: Training | None = None
        self._first_step = 0
        self._scalars: tuple[int, dict[str, float]] | None = None
        """The last report: its step and its scalars."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Try to measure, and protect the memory."""
        self._stop()  # a training before this one may have been interrupted
        self._first_step = state.global_step
        model, loader, data = given["model"], given["train_dataloader"], self._settings.data
        kept = self.memory
        if self._settings.measures:
            self._training = begun(self.memory, (_identity(loader) if data is None else data,), self._training)
            kept = self._training.before
            batches = _first_samples(loader) if data is None else data
            if batches is None:
                untried("the training set can be read only once, so that its first batch must not be taken")
            else:
                try_batch(self._training, self._settings, model, batches)
        if kept.names:
            self.protection = self._settings.protect(given["optimizer"], model, kept)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Report; project the steps that wait before an evaluation or a checkpoint, whose events come after."""
        if self.protection is None:
            return
        every = self._settings.report_every
        if control.should_log if every is None else state.global_step % every == 0:
            control.should_log = True
            self._report(state, control)
        if control.should_evaluate or control.should_save:
            self.protection.flush()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Project the steps that wait, since an evaluation, a checkpoint or the best weights may follow; report."""
        if self.protection is not None:
            self.protection.flush()
            if control.should_log or self._settings.max_change is not None:
                self._report(state, control)
        if control.should_training_stop and self._settings.measures:
            # Now, since the best weights may be loaded before `on_train_end`, and are averaged ones already.
            use_kept_weights(given["optimizer"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Add the scalars of this step's report beside the loss, and to the history."""
        logs = given.pop("logs")
        if self._scalars is None or "loss" not in logs or self._scalars[0] != state.global_step:
            return
        scalars = self._scalars[1]
        logs.update(scalars)
        state.log_history[-1].update(scalars)
        # The Trainer puts the callbacks of `report_to` before those of the user: they have had these logs already.
        for callback in takewhile(lambda one: one is not self, _callbacks()):
            if _is_reporter(callback):
                callback.on_log(args, state, control, logs=dict(scalars), **given)

    def _report(self, state: TrainerState, control: TrainerControl) -> None:
        """Make a report of this step, for the log that follows. Training stops if it has forgotten too much."""
        if self.protection is None or (self._scalars is not None and self._scalars[0] == state.global_step):
            return
        scalars, stops = reported([self.protection], self._settings, state.global_step)
        self._scalars = state.global_step, scalars
        if stops:
            control.should_training_stop = control.should_log = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Measure, and consolidate, as the last of the callbacks: those after this one may replace the weights."""
        self._stop()
        if not self._settings.measures or self._is_called_again():
            return
        if state.global_step == self._first_step:
            warn_without_steps()
            return
        assert self._training is not None
        with failures_as_warnings():
            loader = given["train_dataloader"]
            batches = FirstBatches(
                lambda: loader, state.global_step * args.gradient_accumulation_steps, _num_batches(loader)
            )
            self._training = ended(
                self._training, self._settings, given["model"], batches, progress=not args.disable_tqdm
            )
            assert self._training.after is not None
            self.memory = self._training.after

    def _is_called_again(self) -> bool:
        """Whether this event calls the callback once more, after all others: then it stands at the end of the list."""
        callbacks = _callbacks()
        if callbacks and callbacks[-1] is not self:
            callbacks.append(self)  # the handler is iterating over this list, and comes to it
            return True
        if sum(callback is self for callback in callbacks) > 1:
            callbacks.pop()
        return False

    def _stop(self) -> None:
        if self.protection is not None:
            self.protection.remove()
            self.protection = None
        self._scalars = None


def _is_reporter(callback: object) -> bool:
    """Whether a callback writes logs to a service, as the Trainer's `report_to` makes it."""
    return any(kind.__module__.startswith("transformers.integrations") for kind in type(callback).__mro__)


def _callbacks() -> list[Any]:
    """The list of the callback handler that is calling. No event passes it, so that only the stack has it."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, CallbackHandler):
            return owner.callbacks
        frame = frame.f_back
    return []


def _data_set(loader: Any) -> Any:
    return getattr(loader, "dataset", loader)


def _identity(loader: Any) -> object:
    """What is the same for the same training set.

    For each training, the Trainer makes a new `datasets.Dataset` without the unused columns. Its fingerprint stays.
    """
    data_set = _data_set(loader)
    return getattr(data_set, "_fingerprint", data_set)


def _num_batches(loader: Any) -> float:
    try:
        return len(loader)
    except TypeError:  # a loader of an IterableDataset
        return math.inf


def _first_samples(loader: Any) -> Iterable[Any] | None:
    """A loader of the first two samples. The Trainer's loader stays closed, since opening it changes its generators.

    None if the samples could not be read again.
    """
    data_set = _data_set(loader)
    if isinstance(data_set, Iterator):
        return None
    if isinstance(data_set, IterableDataset) and iter(data_set) is iter(data_set):
        return None  # it hands out the same iterator each time
    if data_set is loader:
        return data_set  # type: ignore[no-any-return]
    size = None if getattr(loader, "batch_sampler", None) is None else 2
    return DataLoader(data_set, size, collate_fn=getattr(loader, "collate_fn", None))
