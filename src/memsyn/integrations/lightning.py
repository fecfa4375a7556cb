"""A callback for Lightning that protects a memory and measures at the end. Needs the extra `lightning`."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import lightning.pytorch as pl

from memsyn import (
    BatchError,
    Estimator,
    Forward,
    Memory,
    MovedWeightsWarning,
    OptionError,
    Protection,
    Relative,
)
from memsyn.integrations.training_end import (
    CURES,
    RANK,
    FirstBatches,
    Settings,
    Training,
    begun,
    ended,
    failures_as_warnings,
    is_cut_between_processes,
    reported,
    try_batch,
    use_kept_weights,
    warn_without_steps,
)


@final
class MemsynCallback(pl.Callback):
    """Protects a memory while a Trainer trains, and consolidates it when training ends.

    Every optimizer that holds parameters of the memory is protected. The scalars of `Protection.report()` go to the
    Trainer's loggers and its `callback_metrics`: `memsyn/predicted_change` (in the progress bar too), `memsyn/held`,
    `memsyn/moved_statistics` and, of the penalty forms, `memsyn/penalty`. A `max_change` stops a training that forgets;
    the Trainer's `min_epochs` and `min_steps` still hold.

    The projected form projects before each validation and each checkpoint, at the end of each epoch, and when training
    is interrupted; if you evaluate yourself in between, call `flush()` of each of `protections` first. To resume from a
    checkpoint, give the same memory again.

    Before the first step, the first training batch is measured on trial, and the result is thrown away. Module and
    random generators stay as they are. When `fit` ends, importance or factors are measured on the training set and
    consolidated into `memory`. The batches are those that the training read, after the transfer hooks, and at most as
    many, so an endless stream ends. If measuring fails then, a warning says so, and the memory stays as it was.

    The anchor is the weights that the module has when `fit` ends: those that averaging callbacks (SWA, EMA) have put
    there, wherever these callbacks stand in the list. The averaged weights of a schedule-free optimizer are put into
    the module too, and stay there. A `fit` without a step is not measured. If the same callback trains again on the
    same data set objects, that training protects the memory from before, and the new measurement replaces the last one.

    Args:
        memory: the memory to protect; `Memory.empty()` for a first task.
        strength, form: as `protect` takes them.
        protect_options: the other options of `protect`, by name: {"every": 4}.
        estimator: what to measure at the end, as `measure` takes it. By default, what the memory holds: importance
            ("mas"), factors ("kronecker" or "inputs"), or both in two passes; for an empty memory "mas".
        forward: (module, batch) -> output, as `measure` takes it; by default the module is called on the inputs. A
            dict or list of training loaders needs one.
        data: batches to measure in place of the training set; they must be readable more than once.
        max_samples: how many samples to measure on, in each process; None for all, 0 for no measuring. With several
            processes the Trainer's sampler repeats a few samples to make the shares equal, and these count twice.
        report_every: after how many steps a report is made and logged; by default as often as the Trainer logs.
        max_change: training stops once the predicted change of outputs on the remembered data is above it: 0.05 is 5%.
            It is looked at in each report, and at the end of each epoch. The model keeps what it has learned so far.
            In nine of ten cases the measured change is at most 6.3 times that: give a fraction of what you allow.
        rule, decay, label, rank: as `Memory.consolidate` takes them.
        load_best: whether to load the best checkpoint of the ModelCheckpoint that monitors a metric into the module
            when `fit` ends, and to measure there. By default it is not loaded, and a warning says so if it is not the
            last one; False says that the last weights are kept.

    Raises:
        OptionError: an option is unknown, `data` can be read only once, or no ModelCheckpoint monitors a metric; before
            the first step: `max_change` is given, and the memory predicts no change.
        MemsynError: before the first step: the trial has failed. The error says why.

    Warns:
        NotMeasuredWarning: nothing was measured, or nothing could be tried.
        MovedWeightsWarning: the best checkpoint has other weights than the memory.
        ForgettingWarning: training stops, since the predicted change is above `max_change`.
        RepeatedDataWarning: the callback has measured the same data before.

    Example:
        >>> callback = MemsynCallback(memory)                                 # doctest: +SKIP
        >>> Trainer(callbacks=[callback]).fit(module, loader)                 # doctest: +SKIP
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
        load_best: bool | None = None,
    ) -> None:
        self.memory = memory
        self.protections: list[Protection] = []
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
        self._load_best = load_best
        self._training: Training | None = None
        self._first_step: int | None = None
        """The step at which this `fit` began to train; None before that."""
        self._tried = False
        self._reported = 0
        """The step of the last report."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the `fit` before this one: one that has nothing to do calls no other hook before `on_fit_end`."""
        self._first_step, self._tried = None, not self._settings.measures

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Protect the memory. If there are other data to measure, try them."""
        self._stop()  # a training before this one may have been interrupted
        self._first_step = self._reported = trainer.global_step
        kept = self.memory
        if self._settings.measures:
            self._begin(trainer, pl_module)
            assert self._training is not None
            kept = self._training.before
        own = self._settings.kept(kept, pl_module)
        held = {id(parameter) for parameter in own.held_parameters(pl_module).values()}
        for optimizer in trainer.optimizers:
            if any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
                self.protections.append(self._settings.protect(optimizer, pl_module, kept))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Try to measure the first batch. No loader need be opened for it."""
        if not self._tried:
            self._tried = True
            assert self._training is not None
            try_batch(self._training, self._settings, pl_module, [batch])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report as often as was asked for, else as often as the Trainer logs."""
        every: int = self._settings.report_every or trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Each optimizer counts a step, and batches that are accumulated count none.
        if every and trainer.global_step // every > self._reported // every:
            self._report(trainer, pl_module)

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the scalars at the place of the batch's own metrics. Training stops if it has forgotten too much."""
        if not self.protections or trainer.global_step == self._reported:
            return
        self._reported = trainer.global_step
        scalars, stops = reported(self.protections, self._settings, trainer.global_step)
        for name, value in scalars.items():
            pl_module.log(name, value, logger=False, prog_bar=name == "memsyn/predicted_change")
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.should_stop = trainer.should_stop or stops

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Project the steps that wait. A checkpoint needs no hook: the module's `state_dict` projects them."""
        self._flush()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Project the steps that wait: when training ends, another callback may replace the weights before this one."""
        self._flush()
        if self._settings.max_change is not None:
            self._report(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Project the steps that wait, since the weights may be used after an interruption.

        Not those of sharded weights: the other processes may be elsewhere, and this one would wait for them.
        """
        for protection in self.protections:
            if not is_cut_between_processes(protection.optimizer):
                protection.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop protecting. Other callbacks, and the module's own hook, may still replace the weights."""
        self._stop()
        if self._settings.measures:
            for optimizer in trainer.optimizers:
                use_kept_weights(optimizer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, and consolidate."""
        if not self._settings.measures:
            return
        if self._first_step in (None, trainer.global_step):
            warn_without_steps()
            return
        assert self._training is not None
        with failures_as_warnings(), _on_device_of_training(trainer, pl_module):
            self._use_best(trainer)
            num_read = trainer.fit_loop.total_batch_idx + 1
            self._training = ended(
                self._training,
                self._settings,
                pl_module,
                FirstBatches(lambda: _batches(trainer, pl_module), num_read, trainer.num_training_batches),
                progress=trainer.progress_bar_callback is not None,
            )
            assert self._training.after is not None
            self.memory = self._training.after

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what can be checked without a batch."""
        if self._load_best and not _best_checkpoints(trainer):
            raise OptionError(
                "load_best=True needs a ModelCheckpoint with monitor= among the callbacks, and there is none."
            )
        settings, loaders = self._settings, trainer.train_dataloader
        if settings.data is not None:
            self._training = begun(self.memory, (settings.data,), self._training)
            self._tried = True
            try_batch(self._training, settings, pl_module, settings.data)
            return
        # Of a list, the first loader's batch would be taken for the input, and the others for targets.
        if isinstance(loaders, (Mapping, list, tuple)) and settings.forward is None:
            raise BatchError(f"a batch of a {type(loaders).__name__} of training loaders cannot be measured. {CURES}")
        each = trainer.fit_loop._combined_loader.flattened  # type: ignore[union-attr]
        self._training = begun(self.memory, tuple(getattr(one, "dataset", one) for one in each), self._training)

    def _use_best(self, trainer: pl.Trainer) -> None:
        """Load the best checkpoint, or warn that it is not the last one."""
        for best in _best_checkpoints(trainer)[:1]:
            if self._load_best:
                trainer.strategy.load_model_state_dict(trainer.strategy.load_checkpoint(best.best_model_path))
            elif self._load_best is None and best.best_model_score != trainer.callback_metrics.get(best.monitor):
                warnings.warn(
                    f"the memory is made at the last weights. The best checkpoint by {best.monitor!r}, "
                    f"{best.best_model_path}, has others. If you keep those, give MemsynCallback(..., load_best=True); "
                    "if you keep the last ones, load_best=False.",
                    MovedWeightsWarning,
                    stacklevel=4,
                )

    def _flush(self) -> None:
        for protection in self.protections:
            protection.flush()

    def _stop(self) -> None:
        for protection in self.protections:
            protection.remove()
        self.protections = []


def _best_checkpoints(trainer: pl.Trainer) -> list[Any]:
    """The ModelCheckpoints that monitor a metric."""
    found: list[Any] = list(trainer.checkpoint_callbacks)
    return [one for one in found if isinstance(one, pl.callbacks.ModelCheckpoint) and one.monitor is not None]


def _batches(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Any]:
    """The batches of one epoch, as `training_step` gets them: joined, limited, moved, and changed by the hooks."""
    loader: Any = trainer.fit_loop._combined_loader
    for batch, _, index in loader:
        batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), index)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=index)


@contextmanager
def _on_device_of_training(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Move the module back for the measuring: Lightning has moved it to the CPU."""
    left_on = pl_module.device
    pl_module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        pl_module.to(left_on)
