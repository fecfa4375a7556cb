"""A callback for Lightning that protects a memory and measures at the end. Needs the extra `lightning`."""

from typing import Any, final

import lightning.pytorch as pl

from memsyn import Estimator, Forward, Memory, Protection, Relative, protect
from memsyn.integrations.training_end import extended


@final
class MemsynCallback(pl.Callback):
    """Protects a memory while a Trainer trains, and consolidates it when training ends.

    Every optimizer that holds parameters of the memory is protected. The penalty of the penalty forms is logged as
    `penalty`. The projected form projects before each validation and each checkpoint, and when training ends or is
    interrupted; if you evaluate yourself in between, call `flush()` of each of `protections` first. When training ends,
    importance or factors are measured on the training set and consolidated into `memory`. To resume from a checkpoint,
    give the same memory again.

    Args:
        memory: the memory to protect; `Memory.empty()` for a first task.
        strength, form: as `protect` takes them.
        estimator: what to measure at the end, as `measure` takes it. By default, what the memory holds: importance
            ("mas"), factors ("kronecker" or "inputs"), or both in two passes; for an empty memory "mas".
        max_samples: how many samples to measure on, in each process; None for all, 0 for no measuring. With several
            processes the Trainer's sampler repeats a few samples to make the shares equal, and these count twice.
        forward: (module, batch) -> output, as `measure` takes it; by default the module is called on the inputs.

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
        estimator: str | Estimator | None = None,
        max_samples: int | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.memory = memory
        self.protections: list[Protection] = []
        self._strength, self._form, self._estimator = strength, form, estimator
        self._max_samples, self._forward = max_samples, forward

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Protect the memory."""
        self._stop()  # a training before this one may have been interrupted
        memory = self.memory.fitted(pl_module)
        free = memory.directions.free if memory.directions is not None else frozenset()
        held = {id(p) for name, p in pl_module.named_parameters() if name in memory.names - free}
        for optimizer in trainer.optimizers:
            if any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
                self.protections.append(protect(optimizer, pl_module, memory, strength=self._strength, form=self._form))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the penalty as often as the Trainer logs."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        penalties = [protection for protection in self.protections if protection.form != "projected"]
        if penalties and trainer.global_step % every == 0:
            pl_module.log("penalty", sum(protection.value() for protection in penalties))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Project the steps that wait. A checkpoint needs no hook: the module's `state_dict` projects them."""
        self._flush()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Project the steps that wait, since the weights may be used after an interruption."""
        self._flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, and consolidate."""
        self._stop()
        if self._max_samples == 0:
            return
        assert trainer.train_dataloader is not None
        self.memory = extended(
            self.memory,
            pl_module,
            trainer.train_dataloader,
            estimator=self._estimator,
            forward=self._forward,
            max_samples=self._max_samples,
            progress=trainer.progress_bar_callback is not None,
        )

    def _flush(self) -> None:
        for protection in self.protections:
            protection.flush()

    def _stop(self) -> None:
        for protection in self.protections:
            protection.remove()
        self.protections = []
