"""Hugging Face Trainer: a callback that protects, and measures in the end. Needs the extra `transformers`."""

from typing import Any, final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from memsyn import Memory, Protection, Relative, measure, protect
from memsyn.measuring.distributed import everyone


@final
class MemsynCallback(TrainerCallback):
    """Protects a memory while a Trainer trains, and folds what was learned into it.

    The penalty goes into the Trainer's logs as `penalty`. When training ends, the importance is measured on the
    training set, through the Trainer's own loader and collator, and `memory` holds what to keep from then on. Resuming
    from a checkpoint needs nothing more than the same memory.

    Args:
        memory: what to keep; `Memory.empty()` for a first task, after which there is something to keep.
        strength, form: as `protect` takes them.
        max_samples: measure on so many samples in each process; on all unless told, and on none if 0. With several
            processes the Trainer's sampler repeats a few samples to make their shares even, and these count twice.

    Example:
        >>> callback = MemsynCallback(memory)                                 # doctest: +SKIP
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
        """Protect what there is."""
        self._stop()  # if the training before was broken off
        if self.memory.importance:
            optimizer = given["optimizer"]
            own = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper calls its step
            self.protection = protect(own, given["model"], self.memory, strength=self._strength, form=self._form)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Note the penalty beside the loss, for other callbacks to log and in the history."""
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
                group=everyone(),
                progress=not args.disable_tqdm,
            )
            self.memory = self.memory.consolidate(given["model"], importance)

    def _stop(self) -> None:
        if self.protection is not None:
            self.protection.remove()
            self.protection = None
