"""A callback for Hugging Face's Trainer that protects a memory and measures at the end. Needs `transformers`."""

from typing import Any, final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memsyn import Estimator, Memory, Protection, Relative, protect
from memsyn.integrations.training_end import extended


@final
class MemsynCallback(TrainerCallback):
    """Protects a memory while a Trainer trains, and consolidates it when training ends.

    The penalty of the penalty forms is logged as `penalty`. The projected form projects before each evaluation and each
    checkpoint of the Trainer, and when training ends. If a callback of yours asks for an evaluation, put it before this
    one; if it evaluates by itself, call `protection.flush()` first. When training ends, importance or factors are
    measured on the training set, through the Trainer's own loader and collator, and consolidated into `memory`. To
    resume from a checkpoint, give the same memory again.

    Args:
        memory: the memory to protect; `Memory.empty()` for a first task.
        strength, form: as `protect` takes them.
        estimator: what to measure at the end, as `measure` takes it. By default, what the memory holds: importance
            ("mas"), factors ("kronecker" or "inputs"), or both in two passes; for an empty memory "mas".
        max_samples: how many samples to measure on, in each process; None for all, 0 for no measuring. With several
            processes the Trainer's sampler repeats a few samples to make the shares equal, and these count twice.

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
        estimator: str | Estimator | None = None,
        max_samples: int | None = None,
    ) -> None:
        self.memory = memory
        self.protection: Protection | None = None
        self._strength, self._form, self._estimator, self._max_samples = strength, form, estimator, max_samples

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Protect the memory."""
        self._stop()  # a training before this one may have been interrupted
        if self.memory.names:
            optimizer = given["optimizer"]
            own = getattr(
                optimizer, "optimizer", optimizer
            )  # accelerate wraps it, and calls the inner step with its hooks
            self.protection = protect(own, given["model"], self.memory, strength=self._strength, form=self._form)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Project the steps that wait before an evaluation or a checkpoint: `on_evaluate` and `on_save` come after."""
        if self.protection is not None and (control.should_evaluate or control.should_save):
            self.protection.flush()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Project the steps that wait: an evaluation or a checkpoint may follow, or the best weights be loaded."""
        if self.protection is not None:
            self.protection.flush()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Add the penalty to the logs, beside the loss, and to the history."""
        logs = given["logs"]
        if self.protection is not None and self.protection.form != "projected" and "loss" in logs:
            logs["penalty"] = state.log_history[-1]["penalty"] = self.protection.value()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Measure, and consolidate."""
        self._stop()
        if self._max_samples != 0:
            self.memory = extended(
                self.memory,
                given["model"],
                given["train_dataloader"],
                estimator=self._estimator,
                max_samples=self._max_samples,
                progress=not args.disable_tqdm,
            )

    def _stop(self) -> None:
        if self.protection is not None:
            self.protection.remove()
            self.protection = None
