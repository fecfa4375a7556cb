"""The value Memory: what a model has learned so far, as an anchor and an importance per weight.

Owns consolidation and its rules, and the question whether a memory fits a model. Never changes a model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any, final

import torch
from torch import Tensor, nn

from memsyn.errors import LostParametersWarning, MismatchError, NewParametersWarning, OptionError
from memsyn.importance import Importance, LayerSummary, check_same_shapes, summarize
from memsyn.parameters import named_parameters, trainable_parameters
from memsyn.storage import MEMORY, checked_count, read, record, well_formed, write


@dataclass(frozen=True)
class Consolidation:
    """One entry of a memory's history."""

    when: str
    """UTC, ISO 8601."""
    num_samples: int
    rule: str
    decay: float | None
    objective: str
    magnitude: str


Fold = Callable[[Tensor, Tensor, int, int, float], Tensor]

RULES: dict[str, Fold] = {
    "sum": lambda old, new, num_old, num_new, decay: old + new,
    "mean": lambda old, new, num_old, num_new, decay: (old * num_old + new * num_new) / (num_old + num_new),
    "ema": lambda old, new, num_old, num_new, decay: decay * old + (1 - decay) * new,
    "max": lambda old, new, num_old, num_new, decay: old.maximum(new),
}
"""How a new importance is folded into the old one: (old, new, samples of old, samples of new, decay)."""

DECAY = 0.5
"""What `ema` keeps of the old importance unless told otherwise."""


@final
@dataclass(frozen=True, eq=False)
class Memory:
    """Anchor and importance, keyed by parameter name: what `protect` needs, and all that is left of the old data.

    Attributes:
        anchor: the weights theta* when the memory was last consolidated.
        importance: Omega, not negative, of the same names and shapes.
        history: the consolidations, oldest first.
        counts: on how many samples each parameter's importance was measured: the weights of `mean`.
    """

    anchor: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    history: tuple[Consolidation, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> Memory:
        """The memory of a model that has nothing to remember yet."""
        return cls()

    @property
    def num_samples(self) -> int:
        """Samples of all consolidations together."""
        return sum(entry.num_samples for entry in self.history)

    def consolidate(
        self, model: nn.Module, importance: Importance, *, rule: str = "sum", decay: float | None = None
    ) -> Memory:
        """A new memory with `importance` folded in and the anchor at the model's present weights.

        With Omega the old importance, over N samples, and Omega' the mean of the new one, over N':
        `sum`: Omega + Omega' (the paper's code); `mean`: (N Omega + N' Omega') / (N + N'); `ema`: decay Omega +
        (1 - decay) Omega'; `max`: the larger one. A parameter, or a row of one, that only one side has is taken from
        there; what the model has lost is dropped, with a warning.

        Args:
            model: the model the importance was measured on, with the same weights.
            importance: from `measure`.
            rule: one of `sum`, `mean`, `ema`, `max`.
            decay: for `ema`, from 0 (only the new) to 1 (only the old); 0.5 unless given.

        Raises:
            OptionError: an unknown rule, or a decay out of place.
            MismatchError: the model lacks a parameter of the importance or all of the memory's, or has one in another
                shape (a memory's may have more rows now).
        """
        if rule not in RULES:
            raise OptionError(f"rule must be one of {', '.join(RULES)}; got {rule!r}.")
        if decay is not None and rule != "ema":
            raise OptionError(f"decay belongs to rule='ema'; got decay={decay} with rule={rule!r}.")
        if rule == "ema":
            decay = DECAY if decay is None else decay
            if not 0 <= decay <= 1:
                raise OptionError(f"decay must be from 0 to 1, got {decay}.")
        parameters = named_parameters(model)
        check_fit(importance.sums, parameters, "the importance")
        check_fit(self.importance, parameters, "the memory", may_change=True)
        if self.history and (self.history[-1].objective, self.history[-1].magnitude) != importance.quantity:
            raise MismatchError(
                f"the memory holds {self.history[-1].magnitude} of {self.history[-1].objective}, the importance "
                f"{importance.magnitude} of {importance.objective}: they cannot be folded."
            )
        new, old, count = importance.mean(), self.importance, importance.num_samples
        fold = RULES[rule]

        def folded(name: str) -> Tensor:
            if name not in old:
                return new[name]
            before, whole = old[name].to(parameters[name].device), parameters[name]
            grown = before.shape != whole.shape
            if name not in new:
                return (
                    torch.cat([before, torch.zeros_like(whole[len(before) :], dtype=before.dtype)]) if grown else before
                )
            first = new[name][: len(before)] if grown else new[name]
            found = fold(before.to(first), first, self.counts.get(name, 0), count, decay or 0.0)
            return torch.cat([found, new[name][len(before) :]]) if grown else found

        omega = {name: folded(name) for name in parameters if name in old or name in new}
        counts = {name: self.counts.get(name, 0) + (count if name in new else 0) for name in omega}
        entry = Consolidation(
            when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            num_samples=importance.num_samples,
            rule=rule,
            decay=decay,
            objective=importance.objective,
            magnitude=importance.magnitude,
        )
        anchor = {name: parameters[name].detach().clone() for name in omega}
        return Memory(anchor, omega, (*self.history, entry), counts)

    def summary(self) -> list[LayerSummary]:
        """Per layer its share of the total importance, mean, maximum and concentration."""
        return summarize(self.importance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all, tensor by tensor.

        Args:
            path: the file, or any URL that fsspec knows (`s3://`, `gs://`, ...; the extra `remote`): that is written to
                a local temporary file, then uploaded. Object stores show the old one until the new one is complete; a
                server that shows files as they arrive (`sftp://`, `ftp://`) may keep half of it, which will not load.

        Raises:
            MemoryFileError: the file cannot be written; what was there stays.
        """
        header = {"history": [asdict(entry) for entry in self.history], "counts": self.counts}
        write(path, MEMORY, header, {"anchor": self.anchor, "importance": self.importance})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, like: nn.Module | None = None) -> Memory:
        """Read what `save` wrote.

        Args:
            path: the file, or its URL (`simplecache::s3://...` keeps a local copy).
            like: the model it is for: names and shapes are checked, and tensors go where its parameters are.
                Without it they stay on the CPU.

        Raises:
            MemoryFileError: the file is missing, damaged, not a memory, or of a newer format.
            MismatchError: the memory is of another architecture than `like`.
        """
        header, groups = read(path, MEMORY)
        with well_formed(path):
            history = tuple(record(Consolidation, entry) for entry in header["history"])
            counts = {str(name): checked_count(samples) for name, samples in header["counts"].items()}
            memory = cls(groups["anchor"], groups["importance"], history, counts)
            check_same_shapes(memory.anchor, memory.importance, "the anchor", "the importance")
        if like is None:
            return memory
        memory.check(like)
        parameters = named_parameters(like)

        def placed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: tensor.to(parameters[n].device) if n in parameters else tensor for n, tensor in tensors.items()}

        return cls(placed(memory.anchor), placed(memory.importance), memory.history, memory.counts)

    def check(self, model: nn.Module) -> None:
        """Refuse a model this memory is not of; warn of trainable parameters it does not know, and of lost ones.

        A parameter may have more rows than it had, as a head with more classes does: the new ones are free.

        Raises:
            MismatchError: the model has none of the memory's parameters, or one in another shape; it is named.
        """
        check_fit(self.importance, named_parameters(model), "the memory", may_change=True)
        new = [name for name in trainable_parameters(model) if name not in self.importance]
        if new and self.importance:
            warnings.warn(
                f"{len(new)} parameters of the model are not in the memory and stay free to change: {', '.join(new)}",
                NewParametersWarning,
                stacklevel=3,
            )


def check_fit(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Any], whose: str, *, may_change: bool = False
) -> None:
    """Refuse what is not of this model: every one of `tensors` must be there, in its shape.

    Args:
        tensors: by parameter name.
        parameters: of the model.
        whose: they are, for the error.
        may_change: parameters may have more rows, and some (not all) may be gone, which is warned of.
    """
    missing = [name for name in tensors if name not in parameters]
    reshaped = [
        f"{name} (expected {tuple(tensor.shape)}, the model has {tuple(parameters[name].shape)})"
        for name, tensor in tensors.items()
        if name in parameters
        and tensor.shape != parameters[name].shape
        and not (may_change and has_grown(tensor, parameters[name]))
    ]
    problems = [f"the model lacks {', '.join(missing)}"] if missing else []
    problems += [f"reshaped: {', '.join(reshaped)}"] if reshaped else []
    if reshaped or (missing and not (may_change and len(missing) < len(tensors))):
        raise MismatchError(
            f"{whose} is of another architecture: {'; '.join(problems)}. Use the model it was made with, or measure "
            "this one."
        )
    if missing:
        warnings.warn(
            f"{len(missing)} parameters of {whose} are no longer in the model, and are left out: {', '.join(missing)}",
            LostParametersWarning,
            stacklevel=4,
        )


def has_grown(held: Tensor, parameter: Tensor) -> bool:
    """Whether a parameter has more rows than the memory holds of it, and is the same otherwise."""
    return 0 < held.ndim == parameter.ndim and held.shape[1:] == parameter.shape[1:] and len(held) < len(parameter)
