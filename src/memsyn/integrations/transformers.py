"""A callback for Hugging Face's Trainer that protects a memory and measures at the end. Needs `transformers`."""

from typing import Any, final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memsyn import Memory, Protection, Relative, measure, protect
from memsyn.integrations.processes import all_processes


@final
class MemsynCallback(TrainerCallback):
    """Protects a memory while a Trainer trains, and consolidates it when training ends.

    The penalty is logged as `penalty`. When training ends, the importance is measured on the training set, through the
    Trainer's own loader and collator, and consolidated into `memory`. To resume from a checkpoint, give the same memory
    again.

    Args:
        memory: the memory to protect; `Memory.empty()` for a first task.
        strength, form: as `protect` takes them.
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
        strength: float | Relative = Relative(),
        form: str = "auto",
        max_samples: int | None = None,
    ) -> None:
        self.memory = memory
        self.protection: Protection | None = None
        self._strength, self._form, self._max_samples = strength, form, max_samples

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Protect the memory."""
        self._stop()  # a training before this one may have been interrupted
        if self.memory.importance:
            optimizer = given["optimizer"]
            own = getattr(
                optimizer, "optimizer", optimizer
            )  # accelerate wraps it, and calls the inner step with its hooks
            self.protection = protect(own, given["model"], self.memory, strength=self._strength, form=self._form)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Add the penalty to the logs, beside the loss, and to the history."""
        logs = given["logs"]
        if self.protection is not None and "loss" in logs:
            logs["penalty"] = state.log_history[-1]["penalty"] = self.protection.value()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Measure, and consolidate."""
        self._stop()
        if self._max_samples != 0:
            importance = measure(
                given["model"],
                given["train_dataloader"],
                max_samples=self._max_samples,
                group=all_processes(),
                progress=not args.disable_tqdm,
            )
            self.memory = self.memory.consolidate(given["model"], importance)

    def _stop(self) -> None:
        if self.protection is not None:
            self.protection.remove()
            self.protection = None
