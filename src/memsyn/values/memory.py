"""The value Memory: what a model has learned so far, as an anchor and an importance per weight.

Owns consolidation and its rules, merging, and the check that a memory fits a model. Never changes a model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from memsyn.errors import (
    LostParametersWarning,
    MemoryFileError,
    MismatchError,
    MovedWeightsWarning,
    NewParametersWarning,
    OptionError,
)
from memsyn.parameters import fingerprint, named_parameters, trainable_parameters
from memsyn.storage.reading_and_writing import (
    FACTORS,
    IMPORTANCE,
    MEMORY,
    Groups,
    checked_count,
    read,
    record,
    well_formed,
    write,
)
from memsyn.values.consolidation import MERGED, Consolidation
from memsyn.values.directions import RANK, Directions, consolidated, merged
from memsyn.values.display import counted, html_text, size_in_memory
from memsyn.values.factors import BOTH, INPUTS_ALONE, KroneckerFactors
from memsyn.values.importance import (
    Importance,
    LayerSummary,
    check_same_shapes,
    counted_weights,
    html_by_layer,
    summarize,
)

Fold = Callable[[Tensor, Tensor, int, int, float], Tensor]

RULES: dict[str, Fold] = {
    "sum": lambda old, new, num_old, num_new, decay: old + new,
    # Not (n old + n' new) / (n + n'), since n old may overflow.
    "mean": lambda old, new, num_old, num_new, decay: old.lerp(new, num_new / (num_old + num_new)),
    "ema": lambda old, new, num_old, num_new, decay: decay * old + (1 - decay) * new,
    "max": lambda old, new, num_old, num_new, decay: old.maximum(new),
}
"""Rule -> (old, new, samples of old, samples of new, decay) -> the consolidated importance."""

DECAY = 0.5
"""The default share of the old importance in rule `ema`."""


@final
@dataclass(frozen=True, eq=False)
class Memory:
    """What `protect` needs of the old data: an importance per weight with an anchor, directions per matrix, or both.

    Attributes:
        anchor: the weights theta* when the memory was last consolidated.
        importance: Omega, the mean over samples; not negative, with the same names and shapes.
        history: the consolidations, oldest first.
        counts: parameter name -> on how many samples its importance was measured: the weights of rule `mean`.
        directions: what is kept of Kronecker factors; None without.
    """

    anchor: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    history: tuple[Consolidation, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    directions: Directions | None = None

    def __repr__(self) -> str:
        own, words = self.directions, []
        if self.importance:
            of = [" of ".join(reversed(self.quantity))] if self.quantity else []
            words.append(f"importance of {', '.join([*counted_weights(self.importance), *of])}")
        if own is not None:
            of = [" of ".join(reversed(self.directions_quantity))] if self.directions_quantity else []
            words.append(f"directions of {', '.join([own.in_words(), *of])}")
        if self.history:
            words.append(f"{counted(len(self.history), 'consolidation')}, {counted(self.num_samples, 'sample')}")
        tensors = [tensor for members in self.groups().values() for tensor in members.values()]
        return f"Memory({'; '.join([*words, size_in_memory(tensors)]) if words else 'empty'})"

    def _repr_html_(self) -> str:
        own = self.directions
        if own is None:
            return html_by_layer(repr(self), self.importance)
        first = html_by_layer(repr(self), self.importance) if self.importance else html_text(repr(self))
        return f"<div>{first}{own._repr_html_()}</div>"

    @classmethod
    def empty(cls) -> Memory:
        """A memory before the first consolidation."""
        return cls()

    @property
    def num_samples(self) -> int:
        """Samples of all consolidations together."""
        return sum(entry.num_samples for entry in self.history)

    @property
    def quantity(self) -> tuple[str, str] | None:
        """Objective and magnitude of the importance; None before it was first consolidated."""
        return self._quantity(of_factors=False)

    @property
    def directions_quantity(self) -> tuple[str, str] | None:
        """Objective of the directions, and which second moments; None without directions."""
        return self._quantity(of_factors=True)

    def _quantity(self, *, of_factors: bool) -> tuple[str, str] | None:
        """Objective and magnitude of the last consolidation of an importance, or of factors."""
        entries = [entry for entry in self.history if (entry.magnitude in (BOTH, INPUTS_ALONE)) == of_factors]
        return (entries[-1].objective, entries[-1].magnitude) if entries else None

    @property
    def names(self) -> set[str]:
        """The parameters that the memory knows."""
        own = set() if self.directions is None else self.directions.names() | self.directions.free
        return self.importance.keys() | own

    def consolidate(
        self,
        model: nn.Module,
        importance: Importance | KroneckerFactors,
        *,
        rule: str = "sum",
        decay: float | None = None,
        label: str | None = None,
        rank: int | None = RANK,
    ) -> Memory:
        """A new memory that includes `importance`, with the anchor at the model's present weights.

        With Omega the old importance, over N samples, and Omega' the mean of the new one, over N' samples:
        `sum`: Omega + Omega' (the paper's code); `mean`: (N Omega + N' Omega') / (N + N'); `ema`: decay Omega +
        (1 - decay) Omega'; `max`: the larger of the two. If only one side has a parameter, or a row of one, its value
        is kept. Parameters that the model has lost are dropped, with a warning.

        Kronecker factors become directions; the importance and its anchor stay as they are. A and S of each
        consolidation are scaled to mean eigenvalue 1. Then A is combined by the rule (`max` is not for matrices), and S
        averaged in the same proportion. Of each, `rank` eigenvectors are kept, and the mean of the other eigenvalues.

        Args:
            model: the model the importance was measured on, with the same weights.
            importance: importance or factors, from `measure` or from an `Observer`.
            rule: one of `sum`, `mean`, `ema`, `max`.
            decay: for rule `ema`, from 0 (only the new importance) to 1 (only the old); 0.5 by default.
            label: a name for what was learned, shown in the history.
            rank: for factors: how many eigenvectors of each matrix are kept; None keeps all. Matrices up to twice as
                wide are kept whole.

        Raises:
            OptionError: the rule is unknown, decay is given for another rule, or the label is not text.
            MismatchError: the model lacks a parameter of the importance or all parameters of the memory, or has one in
                another shape (a parameter may have more rows than in the memory).

        Warns:
            MovedWeightsWarning: the importance was measured at other weights than the model has.
        """
        decay = _checked_rule(rule, decay)
        if not isinstance(label, str | None):
            raise OptionError(f"label must be text, got {label!r}.")
        if importance.fingerprint is not None and importance.fingerprint != fingerprint(model):
            warnings.warn(
                "the importance was measured at other weights than the model has now, or at fewer: the anchor would "
                "not be at the measured weights. Consolidate with the model that was observed, before training it.",
                MovedWeightsWarning,
                stacklevel=2,
            )
        if isinstance(importance, KroneckerFactors):
            return self._with_factors(model, importance, rule, decay, label, rank)
        parameters = named_parameters(model)
        check_fit(importance.sums, parameters, "the importance")
        check_fit(self.importance, parameters, "the memory", may_change=True)
        _check_same_quantity(self.quantity or importance.quantity, importance.quantity, "the importance", "folded")
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
        anchor = {name: parameters[name].detach().clone() for name in omega}
        entry = Consolidation.now(
            anchor,
            num_samples=importance.num_samples,
            rule=rule,
            decay=decay,
            objective=importance.objective,
            magnitude=importance.magnitude,
            label=label,
        )
        return Memory(anchor, omega, (*self.history, entry), counts, self.directions)

    def _with_factors(
        self,
        model: nn.Module,
        factors: KroneckerFactors,
        rule: str,
        decay: float | None,
        label: str | None,
        rank: int | None,
    ) -> Memory:
        """`consolidate` for factors."""
        if rule == "max":
            raise OptionError("rule='max' is for importances: of matrices there is no maximum. Use sum, mean or ema.")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise OptionError(f"rank must be a whole number, at least 1, or None; got {rank!r}.")
        _check_same_quantity(self.directions_quantity or factors.quantity, factors.quantity, "the factors", "folded")
        parameters = named_parameters(model)
        old = _present(self.directions or Directions(), parameters)
        new = consolidated(Directions(), factors, (0.0, 1.0), rank)
        missing = sorted((new.names() | new.free) - parameters.keys())
        if missing:
            raise MismatchError(
                f"the factors are of another architecture: the model lacks {', '.join(missing)}. Use the model "
                "they were measured on."
            )
        earlier = sum(entry.num_samples for entry in self.history if entry.magnitude in (BOTH, INPUTS_ALONE))
        share = factors.num_samples / (earlier + factors.num_samples)
        weights = {"sum": (1.0, 1.0), "mean": (1 - share, share), "ema": (decay or 0.0, 1 - (decay or 0.0))}[rule]
        directions = consolidated(old, factors, weights, rank)
        entry = Consolidation.now(
            {name: parameters[name].detach() for name in sorted(directions.names() | directions.free)},
            num_samples=factors.num_samples,
            rule=rule,
            decay=decay,
            objective=factors.objective,
            magnitude=factors.magnitude,
            label=label,
        )
        return replace(self, history=(*self.history, entry), directions=directions)

    def predicted_change(
        self, model: nn.Module | Mapping[str, Tensor], reference: nn.Module | Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """Layer -> the mean squared change of the outputs on the remembered data, to second order; no data are needed.

        tr(S D A D^T), for the change D from the reference to the model (see `KroneckerFactors`). The total change is
        the sum over layers, if their effects do not cancel. If only inputs were measured, it is tr(D A D^T): the mean
        squared change of each layer's own output.

        Args:
            model: a model, or its weights by name (a state_dict).
            reference: the weights that were measured; by default the anchor, if the memory holds an importance.

        Raises:
            OptionError: the memory holds no directions, or there is no reference.
            MismatchError: a weight is missing.
        """
        if self.directions is None:
            raise OptionError(
                "the memory holds no directions: measure with estimator='kronecker', and consolidate the result."
            )
        if reference is None and not self.directions.names() <= self.anchor.keys():
            raise OptionError("the memory holds no anchor: give the weights that were measured as reference=.")
        before = self.anchor if reference is None else reference
        sides = [dict(side) if isinstance(side, Mapping) else named_parameters(side) for side in (before, model)]
        return self.directions.predicted_change(sides[0], sides[1])

    def merge(self, other: Memory) -> Memory:
        """The memory of the samples of both, for replicas that each consolidated once, at the same weights.

        Omega = (n Omega_1 + n' Omega_2) / (n + n'), with n and n' the samples on which each measured the parameter.
        This equals one memory of all samples, up to rounding. Memories of several consolidations may share a past,
        which would count twice: add up their importances instead, and consolidate once.

        Raises:
            MismatchError: the anchors differ, a memory has consolidated never or more than once, or the quantities
                differ.
        """
        for memory in (self, other):
            if not memory.history or any(entry.rule != MERGED for entry in memory.history[1:]):
                raise MismatchError(
                    f"only memories of one consolidation each can be merged, and one has {len(memory.history)}: a past "
                    "that they share would count twice. Merge importances or factors, and consolidate the result once."
                )
        if self.directions is not None and other.directions is not None:
            return self._merge_directions(other, other.directions)
        if self.directions is not None or other.directions is not None or None in (self.quantity, other.quantity):
            raise MismatchError("one memory holds an importance, the other directions: they cannot be merged.")
        assert self.quantity is not None
        assert other.quantity is not None
        _check_same_quantity(self.quantity, other.quantity, "the other memory", "merged")
        check_same_shapes(self.anchor, other.anchor, "the first memory", "the second memory")
        moved = [name for name, value in self.anchor.items() if not torch.equal(value, other.anchor[name].to(value))]
        if moved:
            raise MismatchError(
                f"the anchors of {len(moved)} of {len(self.anchor)} parameters differ (the first is {moved[0]}). Only "
                "memories of the same weights, from replicas of one model, can be merged."
            )
        n, m = ({name: own.counts.get(name, own.num_samples) for name in self.anchor} for own in (self, other))
        omega = {
            name: RULES["mean"](mine, other.importance[name].to(mine), n[name], m[name], 0.0)
            for name, mine in self.importance.items()
        }
        counts = {name: n[name] + m[name] for name in omega}
        merged = tuple(replace(entry, rule=MERGED) for entry in other.history)
        return Memory(self.anchor, omega, self.history + merged, counts)

    def _merge_directions(self, other: Memory, directions: Directions) -> Memory:
        """`merge` for memories of directions alone."""
        own, their = self.directions_quantity, other.directions_quantity
        if self.importance or other.importance or own != their or self.directions is None:
            raise MismatchError(
                "memories with directions can be merged if both hold nothing else, and the same second moments. Merge "
                "the factors, and consolidate the result once."
            )
        if self.history[0].fingerprint != other.history[0].fingerprint:
            raise MismatchError("the memories are of different weights. Only replicas of one model can be merged.")
        history = self.history + tuple(replace(entry, rule=MERGED) for entry in other.history)
        counts = self.num_samples, other.num_samples
        return replace(self, history=history, directions=merged(self.directions, directions, counts))

    def summary(self) -> list[LayerSummary]:
        """Per layer its share of the total importance, mean, maximum and concentration, in the model's order."""
        return summarize(self.importance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file atomically, tensor by tensor.

        Args:
            path: the file, or any URL that fsspec knows (`s3://`, `gs://`, ...; the extra `remote`). A file at a URL is
                written to a local temporary file, then uploaded. Object stores show the old file until the upload is
                complete; a server that shows files as they arrive (`sftp://`, `ftp://`) may keep half a file, which
                will not load.

        Raises:
            MemoryFileError: the file cannot be written; an old file stays.
            MismatchError: anchor and importance have different parameters.
            OptionError: a count is not a whole number.
        """
        check_same_shapes(self.anchor, self.importance, "the anchor", "the importance")
        try:
            for count in self.counts.values():
                checked_count(count)
        except ValueError as error:
            raise OptionError(f"the memory's counts: {error}.") from None
        write(path, MEMORY, self.header(), self.groups())

    def header(self) -> dict[str, Any]:
        """The entries of a file's metadata."""
        known = {} if self.directions is None else {"directions": self.directions.header()}
        return {"history": [asdict(entry) for entry in self.history], "counts": self.counts, **known}

    def groups(self) -> Groups:
        """The tensors of a file, by group and name."""
        known = {} if self.directions is None else self.directions.groups()
        return {"anchor": self.anchor, "importance": self.importance, **known}

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, like: nn.Module | None = None) -> Memory:
        """Read a file that `save` wrote.

        Args:
            path: the file, or its URL (`simplecache::s3://...` keeps a local copy).
            like: the model of the memory: names and shapes are checked, and tensors are put on the devices of its
                parameters. None: tensors are on the CPU.

        Raises:
            MemoryFileError: the file is missing, damaged, not a memory, or of a newer format.
            MismatchError: the memory is of another architecture than `like`.

        Warns:
            MovedWeightsWarning: the weights of `like` differ from the anchor.
        """
        memory = cls.from_file(path, *read(path, MEMORY))
        if like is None:
            return memory
        memory.check(like)
        parameters = named_parameters(like)
        moved = [n for n, anchor in memory.anchor.items() if n in parameters and not _stands_at(parameters[n], anchor)]
        if not memory.anchor and memory.directions is not None:
            names = sorted(memory.names & parameters.keys())
            is_same = memory.history[-1].fingerprint == fingerprint({n: parameters[n].detach() for n in names})
            moved = [] if is_same else names
        if moved:
            warnings.warn(
                f"{len(moved)} of {len(memory.names)} parameters (the first is {moved[0]}) have other weights in the "
                f"model than at the last consolidation of {path}. This is right if the model was trained since. If "
                "not, load its weights first: protect would pull the model towards the weights of another one.",
                MovedWeightsWarning,
                stacklevel=2,
            )

        def placed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: tensor.to(parameters[n].device) if n in parameters else tensor for n, tensor in tensors.items()}

        anchor, importance = placed(memory.anchor), placed(memory.importance)
        return replace(memory, anchor=anchor, importance=importance)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], header: Mapping[str, Any], groups: Groups) -> Memory:
        """The memory in the header and groups that `storage.reading_and_writing.read` returned.

        Raises:
            MemoryFileError: they are not as `save` writes them.
        """
        with well_formed(path):
            history = tuple(record(Consolidation, entry) for entry in header["history"])
            counts = {str(name): checked_count(samples) for name, samples in header["counts"].items()}
            directions = None
            if "directions" in header:
                directions = Directions.from_file(header["directions"], groups)
            memory = cls(groups["anchor"], groups["importance"], history, counts, directions)
            if directions is not None and memory.directions_quantity is None:
                raise ValueError("it holds directions, and no consolidation of factors in its history")
            check_same_shapes(memory.anchor, memory.importance, "the anchor", "the importance")
            return memory

    def check(self, model: nn.Module) -> None:
        """Check that the memory fits a model; warn of parameters that only one of the two has.

        A parameter may have more rows than in the memory, as a head with more classes has: the new rows are free.

        Raises:
            MismatchError: the model has no parameter of the memory, or has one in another shape; the error names it.
        """
        parameters = named_parameters(model)
        check_fit(self.importance, parameters, "the memory", may_change=True)
        if self.directions is not None:
            self.directions.check(parameters)
        known = self.names
        new = [name for name in trainable_parameters(model) if name not in known]
        if new and known:
            warnings.warn(
                f"{len(new)} parameters of the model are not in the memory and stay free to change: {', '.join(new)}",
                NewParametersWarning,
                stacklevel=3,
            )


def _checked_rule(rule: str, decay: float | None) -> float | None:
    """The decay of a rule.

    Raises:
        OptionError: the rule is unknown, or the decay is out of range or of another rule.
    """
    if rule not in RULES:
        raise OptionError(f"rule must be one of {', '.join(RULES)}; got {rule!r}.")
    if rule != "ema":
        if decay is not None:
            raise OptionError(f"decay is only for rule='ema'; got decay={decay} with rule={rule!r}.")
        return None
    decay = DECAY if decay is None else decay
    if not 0 <= decay <= 1:
        raise OptionError(f"decay must be from 0 to 1, got {decay}.")
    return decay


def _present(directions: Directions, parameters: Mapping[str, Any]) -> Directions:
    """The directions of parameters that the model still has; the others are dropped, with a warning."""
    lost = sorted(directions.names() - parameters.keys())
    if lost:
        warnings.warn(
            f"{len(lost)} parameters of the memory are no longer in the model and are left out: {', '.join(lost)}",
            LostParametersWarning,
            stacklevel=4,
        )
    return directions.only(parameters)


def _check_same_quantity(mine: tuple[str, str], other: tuple[str, str], whose: str, how: str) -> None:
    if mine != other:
        raise MismatchError(
            f"the memory holds {mine[1]} of {mine[0]}, {whose} {other[1]} of {other[0]}: they cannot be {how}."
        )


def _stands_at(parameter: Tensor, anchor: Tensor) -> bool:
    """Whether a parameter, or the rows of it that the memory knows, has the anchor's values."""
    rows = parameter.detach()[: len(anchor)] if parameter.shape != anchor.shape else parameter.detach()
    return torch.equal(rows, anchor.to(rows))


def check_fit(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Any], whose: str, *, may_change: bool = False
) -> None:
    """Check that the model has every one of `tensors`, in the same shape.

    Args:
        tensors: by parameter name.
        parameters: the model's.
        whose: the owner of the tensors, for the error.
        may_change: parameters may have more rows; some (not all) may be missing, with a warning.

    Raises:
        MismatchError: a parameter is missing or has another shape.
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
            "this model."
        )
    if missing:
        warnings.warn(
            f"{len(missing)} parameters of {whose} are no longer in the model and are left out: {', '.join(missing)}",
            LostParametersWarning,
            stacklevel=4,
        )


def has_grown(held: Tensor, parameter: Tensor) -> bool:
    """Whether a parameter has more rows than the memory holds of it, and is the same otherwise."""
    return 0 < held.ndim == parameter.ndim and held.shape[1:] == parameter.shape[1:] and len(held) < len(parameter)


Held = Memory | Importance | KroneckerFactors

KINDS: dict[str, type[Memory] | type[Importance] | type[KroneckerFactors]] = {
    MEMORY: Memory,
    IMPORTANCE: Importance,
    FACTORS: KroneckerFactors,
}
"""Kind of file -> the value that it holds."""


def kind_of(held: Held) -> str:
    """The kind of the file that holds a value, a key of `KINDS`."""
    return next(kind for kind, own in KINDS.items() if isinstance(held, own))


def omega_of(held: Held) -> dict[str, Tensor]:
    """Omega per parameter: of an importance the mean over its samples; of factors none."""
    if isinstance(held, KroneckerFactors):
        return {}
    return held.importance if isinstance(held, Memory) else held.mean()


def directions_of(held: Held) -> Directions | None:
    """The directions of a memory; of factors those of a memory that consolidated them alone, with all eigenvectors."""
    if isinstance(held, KroneckerFactors):
        return consolidated(Directions(), held, (0.0, 1.0), None)
    return held.directions if isinstance(held, Memory) else None


def load(path: str | os.PathLike[str]) -> Held:
    """Read a memory, an importance or factors, whichever the file holds; tensors are on the CPU.

    Raises:
        MemoryFileError: the file is missing, damaged, none of these, or of a newer format.
    """
    header, groups = read(path)
    kind = str(header.get("kind"))
    if kind not in KINDS:
        raise MemoryFileError(f"{path} is of kind {kind!r}; expected one of {', '.join(KINDS)}.")
    if "checkpoint" in header:
        raise MemoryFileError(
            f"{path} is the checkpoint of a pass that has not ended: call measure again with checkpoint= to finish it."
        )
    return KINDS[kind].from_file(path, header, groups)
