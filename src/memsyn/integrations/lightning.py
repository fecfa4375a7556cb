"""A callback for Lightning that protects a memory and measures at the end. Needs the extra `lightning`."""

from typing import Any, final

import lightning.pytorch as pl

from memsyn import Forward, Memory, Protection, Relative, measure, protect
from memsyn.integrations.processes import all_processes


@final
class MemsynCallback(pl.Callback):
    """Protects a memory while a Trainer trains, and consolidates it when training ends.

    Every optimizer that holds parameters of the memory is protected. The penalty is logged as `penalty`. When training
    ends, the importance is measured on the training set and consolidated into `memory`. To resume from a checkpoint,
    give the same memory again.

    Args:
        memory: the memory to protect; `Memory.empty()` for a first task.
        strength, form: as `protect` takes them.
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
        strength: float | Relative = Relative(),
        form: str = "auto",
        max_samples: int | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.memory = memory
        self.protections: list[Protection] = []
        self._strength, self._form, self._max_samples, self._forward = strength, form, max_samples, forward

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Protect the memory."""
        self._stop()  # a training before this one may have been interrupted
        held = {id(p) for name, p in pl_module.named_parameters() if name in self.memory.importance}
        for optimizer in trainer.optimizers:
            if any(id(p) in held for group in optimizer.param_groups for p in group["params"]):
                self.protections.append(
                    protect(optimizer, pl_module, self.memory, strength=self._strength, form=self._form)
                )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the penalty as often as the Trainer logs."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.protections and trainer.global_step % every == 0:
            pl_module.log("penalty", sum(protection.value() for protection in self.protections))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, and consolidate."""
        self._stop()
        if self._max_samples == 0:
            return
        assert trainer.train_dataloader is not None
        importance = measure(
            pl_module,
            trainer.train_dataloader,
            forward=self._forward,
            max_samples=self._max_samples,
            group=all_processes(),
            progress=trainer.progress_bar_callback is not None,
        )
        self.memory = self.memory.consolidate(pl_module, importance)

    def _stop(self) -> None:
        for protection in self.protections:
            protection.remove()
        self.protections = []
