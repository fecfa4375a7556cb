"""The value Memory: what a model has learned so far, as an anchor and an importance per weight.

Owns consolidation and its rules, merging, and the check that a memory fits a model. Never changes a model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from memsyn.errors import (
    LostParametersWarning,
    MemoryFileError,
    MismatchError,
    MovedStatisticsWarning,
    MovedWeightsWarning,
    NewParametersWarning,
    OptionError,
)
from memsyn.parameters import (
    Patterns,
    chosen_names,
    fingerprint,
    fitted,
    moved_statistics,
    named_parameters,
    only_those,
    same_values,
    statistics,
    statistics_beside,
    under_new_names,
    way_out,
    weights,
    wide_dtype,
)
from memsyn.sharding.exchange import failing_in_all, first_process, gathered, text_told_by, told_by
from memsyn.sharding.parts import cut_like, from_part, is_sharded, local_part, on_parts, one_sharded
from memsyn.sharding.sums import summed_over_parts
from memsyn.storage.checkpoints import checkpoint_entries
from memsyn.storage.reading_and_writing import (
    FACTORS,
    IMPORTANCE,
    MEMORY,
    STATISTICS,
    Groups,
    checked,
    checked_count,
    read,
    record,
    well_formed,
    write,
)
from memsyn.values.consolidation import MERGED, Consolidation
from memsyn.values.directions import GROUPS, RANK, Directions, consolidated, directions_alone, excerpt, merged
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
from memsyn.values.parts import from_checkpoint, in_parts, read_for
from memsyn.weights_in_effect import WeightsInEffect, free_names, moving_parameters, weights_by_name

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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

    Of a sharded model (`fully_shard`) anchor and importance are DTensors, cut as the parameters: each process holds its
    part. Directions and statistics are whole and equal in all processes. Then `consolidate`, `merge`, `matches`,
    `summary`, `predicted_change`, `save`, and `load` with `like` must be called by all processes together, in the same
    order. If parameters are kept on the CPU (`CPUOffloadPolicy`) and processes talk by NCCL alone, pieces pass through
    the GPU.

    Attributes:
        anchor: the weights theta* when the memory was last consolidated.
        importance: Omega, the mean over samples; not negative, with the same names and shapes.
        history: the consolidations, oldest first.
        counts: parameter name -> on how many samples its importance was measured: the weights of rule `mean`.
        directions: what is kept of Kronecker factors; None without.
        statistics: the model's floating point buffers at the last consolidation, by name: running statistics above all.
            Outputs depend on them. Only buffers of the `state_dict` with finite values are kept.
    """

    anchor: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    history: tuple[Consolidation, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    directions: Directions | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)

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

    def select(self, *, only: Patterns | None = None, exclude: Patterns | None = None) -> Memory:
        """The memory of some of its parameters: importance, anchor, counts, directions and statistics of these alone.

        The fingerprint of the last consolidation becomes unknown, since it covers all parameters.

        Args:
            only: names, or patterns as in `fnmatch`, of the parameters to keep; None: all. `*` matches dots too.
            exclude: names or patterns of the parameters to leave out, such as `head.*` of a head that was replaced.

        Raises:
            OptionError: a pattern matches no parameter of the memory, or none is left.

        Example:
            >>> import torch, memsyn
            >>> weights = {"body.weight": torch.ones(2), "head.weight": torch.ones(3)}
            >>> memsyn.Memory(weights, weights).select(exclude="head.*").names
            {'body.weight'}
        """
        return self._only(chosen_names(self.names, only, exclude), only, exclude)

    def _only(self, names: Collection[str], only: Patterns | None, exclude: Patterns | None) -> Memory:
        if self.names <= set(names):
            return replace(self)
        anchor, importance = only_those(self.anchor, names), only_those(self.importance, names)
        directions = None if self.directions is None else self.directions.only(names)
        if directions is not None and not directions.names() | directions.free:
            directions = None
        beside = statistics_beside(self.statistics, self.names, names, only, exclude)
        return Memory(
            anchor,
            importance,
            _of_unknown_weights(self.history),
            only_those(self.counts, names),
            directions,
            only_those(self.statistics, beside),
        )

    def held_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a model by which what the memory holds can move, for a memory under the model's names.

        With adapters of PEFT these are the weights of the base model, and the adapters that change them.
        """
        free = frozenset[str]() if self.directions is None else self.directions.free
        return moving_parameters(model, self.names - free)

    def matches(self, model: nn.Module) -> bool:
        """Whether the model has the weights and statistics of the last consolidation, bit for bit.

        True if the fingerprint in the last entry of the history is that of the model's parameters of the same names,
        and `statistics` are the model's. Parameters that the memory does not hold may have any values. False if the
        fingerprint is unknown: nothing was consolidated, or the memory was renamed or selected from. Of a sharded
        model, the statistics of the first process count.
        """
        entry = self.history[-1] if self.history else None
        if entry is None or entry.fingerprint is None:
            return False
        own = self.directions
        is_of_factors = own is not None and entry.magnitude in (BOTH, INPUTS_ALONE)
        names = own.names() | own.free if own is not None and is_of_factors else set(self.anchor)
        parameters = weights_by_name(model, names)
        if not names <= parameters.keys():
            return False
        like = one_sharded(moving_parameters(model, names).values())
        has_moved = bool(moved_statistics(self.statistics, model))
        if like is not None:  # statistics may differ between processes, and no process may leave the others waiting
            has_moved = bool(text_told_by(first_process(like), "moved" if has_moved else "", like))
        return not has_moved and entry.fingerprint == fingerprint({n: parameters[n].detach() for n in sorted(names)})

    def renamed(self, names: Mapping[str, str]) -> Memory:
        """The same memory with other names: old name -> new name; names that are not given stay.

        The fingerprint of the last consolidation becomes unknown, since it covers the names.
        """
        if not names:
            return self
        anchor, importance = under_new_names(self.anchor, names), under_new_names(self.importance, names)
        counts = under_new_names(self.counts, names)
        history = _of_unknown_weights(self.history)
        directions = None if self.directions is None else self.directions.renamed(names)
        statistics = under_new_names(self.statistics, names)
        return Memory(anchor, importance, history, counts, directions, statistics)

    def fitted(self, model: nn.Module) -> Memory:
        """The memory under the model's names, if they differ by a prefix (`module.`, `net.`) or in a known way.

        Raises:
            MismatchError: the names fit in more than one way; the error says which submodule to give.

        Warns:
            RenamedParametersWarning: names differ.
        """
        fit = fitted(self.names, weights_by_name(model, self.names), stacklevel=4)
        return self.renamed(fit.names | {name: fit.own(name) for name in self.statistics if fit.names})

    def consolidate(
        self,
        model: nn.Module,
        importance: Importance | KroneckerFactors,
        *,
        rule: str = "sum",
        decay: float | None = None,
        label: str | None = None,
        rank: int | None = RANK,
        only: Patterns | None = None,
        exclude: Patterns | None = None,
    ) -> Memory:
        """A new memory that includes `importance`, with the anchor at the model's present weights and statistics.

        Omega is the old importance, over N samples, and Omega' the mean of the new one, over N' samples. The rules:

        - `sum`: Omega + Omega' (the paper's code)
        - `mean`: (N Omega + N' Omega') / (N + N')
        - `ema`: decay Omega + (1 - decay) Omega'
        - `max`: the larger of the two

        If only one side has a parameter, or a row of one, its value
        is kept. Parameters that the model has lost are dropped, with a warning.

        Kronecker factors become directions; the importance and its anchor stay as they are. A and S of each
        consolidation are scaled to mean eigenvalue 1. Then A is combined by the rule (`max` is not for matrices), and S
        averaged in the same proportion. Of each, `rank` eigenvectors are kept, and the mean of the other eigenvalues.

        Of a sharded model, anchor and importance become DTensors, cut as its parameters. What is whole, as `load` gives
        it, is cut without communication. Eigenvectors are computed one matrix at a time by each process, of different
        matrices, and told to the others. If a sharded parameter has more rows than a sharded memory, the old importance
        of that parameter is gathered.

        Args:
            model: the model the importance was measured on, with the same weights.
            importance: importance or factors, from `measure` or from an `Observer`.
            rule: one of `sum`, `mean`, `ema`, `max`.
            decay: for rule `ema`, from 0 (only the new importance) to 1 (only the old); 0.5 by default.
            label: a name for what was learned, shown in the history.
            rank: for factors: how many eigenvectors of each matrix are kept; None keeps all. Matrices up to twice as
                wide are kept whole.
            only, exclude: which parameters the new memory has, as `select` takes them. What is left out is taken
                neither from the importance nor from the old memory. To forget a head that was replaced and take in the
                new one, use `memory.select(exclude="head.*").consolidate(...)`.

        Raises:
            OptionError: the rule is unknown, decay is given for another rule, the label is not text, or a pattern
                matches no parameter.
            MismatchError: the model lacks a parameter of the importance or all parameters of the memory, or has one in
                another shape (a parameter may have more rows than in the memory); or memory and model are not both
                sharded.
            ModelError: importance, memory and model are cut in different ways.

        Warns:
            MovedWeightsWarning: the importance was measured at other weights than the model has.
            RenamedParametersWarning: the names of the memory or the importance differ from the model's in a known way.
        """
        decay = _checked_rule(rule, decay)
        if not isinstance(label, str | None):
            raise OptionError(f"label must be text, got {label!r}.")
        memory, importance, chosen = self._together(model, importance, only, exclude)
        if isinstance(importance, KroneckerFactors):
            return memory._with_factors(model, importance, rule, decay, label, rank, chosen)
        parameters = weights_by_name(model, importance.names)
        check_fit(importance.sums, parameters, "the importance")
        check_fit(memory.importance, parameters, "the memory", may_change=True)
        _check_same_quantity(memory.quantity or importance.quantity, importance.quantity, "the importance", "folded")
        new, old, count = importance.mean(), memory.importance, importance.num_samples

        def fold(name: str, before: Tensor, after: Tensor) -> Tensor:
            return RULES[rule](before.to(after), after, memory.counts.get(name, 0), count, decay or 0.0)

        omega = {
            name: _folded(old.get(name), new.get(name), parameters[name], partial(fold, name))
            for name in parameters
            if name in old or name in new
        }
        counts = {name: memory.counts.get(name, 0) + (count if name in new else 0) for name in omega}
        anchor = {name: on_parts(_copy, parameters[name].detach()) for name in omega}
        entry = Consolidation.now(
            anchor,
            num_samples=importance.num_samples,
            rule=rule,
            decay=decay,
            objective=importance.objective,
            magnitude=importance.magnitude,
            label=label,
        )
        return Memory(anchor, omega, (*memory.history, entry), counts, memory.directions, _kept_statistics(model))

    def _together(
        self,
        model: nn.Module,
        importance: Importance | KroneckerFactors,
        only: Patterns | None,
        exclude: Patterns | None,
    ) -> tuple[Memory, Importance | KroneckerFactors, set[str] | None]:
        """The memory and an importance under the model's names, with the chosen parameters alone, if some are chosen.

        Factors are selected later, when they are directions.
        """
        parameters = weights_by_name(model, importance.names)
        fit = fitted(importance.names, parameters, "the importance", stacklevel=4)
        if importance.fingerprint is not None:
            present: nn.Module | Mapping[str, Tensor] = model
            if isinstance(parameters, WeightsInEffect):
                present = parameters.with_buffers(model)
            if fit.names:
                known = weights(model) if isinstance(present, nn.Module) else present
                present = {fit.known(name): tensor for name, tensor in known.items()}
            if importance.fingerprint != fingerprint(present):
                warnings.warn(
                    "the importance was measured at other weights than the model has now, or at fewer: the anchor "
                    "would not be at the measured weights. Consolidate with the model that was observed, before "
                    "training it.",
                    MovedWeightsWarning,
                    stacklevel=3,
                )
        memory, importance = self.fitted(model), importance.renamed(fit.names)
        if only is None and exclude is None:
            return memory, importance, None
        chosen = chosen_names(memory.names | importance.names, only, exclude)
        own = importance if isinstance(importance, KroneckerFactors) else importance.only(chosen)
        return memory._only(chosen, only, exclude), own, chosen

    def _with_factors(
        self,
        model: nn.Module,
        factors: KroneckerFactors,
        rule: str,
        decay: float | None,
        label: str | None,
        rank: int | None,
        chosen: set[str] | None,
    ) -> Memory:
        """`consolidate` for factors."""
        if rule == "max":
            raise OptionError("rule='max' is for importances: of matrices there is no maximum. Use sum, mean or ema.")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise OptionError(f"rank must be a whole number, at least 1, or None; got {rank!r}.")
        _check_same_quantity(self.directions_quantity or factors.quantity, factors.quantity, "the factors", "folded")
        parameters = weights_by_name(model, factors.names)
        old = _present(self.directions or Directions(), parameters)
        new = directions_alone(factors, rank)
        missing = sorted((new.names() | new.free) - parameters.keys())
        if missing:
            raise MismatchError(
                f"the factors are of another architecture: the model lacks {', '.join(missing)}. Use the model "
                "they were measured on."
            )
        earlier = sum(entry.num_samples for entry in self.history if entry.magnitude in (BOTH, INPUTS_ALONE))
        share = factors.num_samples / (earlier + factors.num_samples)
        masses = {"sum": (1.0, 1.0), "mean": (1 - share, share), "ema": (decay or 0.0, 1 - (decay or 0.0))}[rule]
        directions = consolidated(old, factors, masses, rank, new)
        directions = directions if chosen is None else directions.only(chosen)
        excerpts = {name: excerpt(parameters[name]) for name in sorted(directions.names())}
        directions = replace(directions, excerpts=excerpts)
        entry = Consolidation.now(
            {name: parameters[name].detach() for name in sorted(directions.names() | directions.free)},
            num_samples=factors.num_samples,
            rule=rule,
            decay=decay,
            objective=factors.objective,
            magnitude=factors.magnitude,
            label=label,
        )
        history = (*self.history, entry)
        return replace(self, history=history, directions=directions, statistics=_kept_statistics(model))

    def predicted_change(
        self, model: nn.Module | Mapping[str, Tensor], reference: nn.Module | Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """Layer -> the mean squared change of the outputs on the remembered data, to second order; no data are needed.

        tr(S D A D^T), for the change D from the reference to the model (see `KroneckerFactors`). The total change is
        the sum over layers, if their effects do not cancel. If only inputs were measured, it is tr(D A D^T): the mean
        squared change of each layer's own output. Of sharded weights, the change of one is gathered at a time.

        Args:
            model: a model, or its weights by name (a state_dict).
            reference: the weights that were measured; by default the anchor, if the memory holds an importance.

        Raises:
            OptionError: the memory holds no directions, or there is no reference.
            MismatchError: a weight is missing.

        Warns:
            RenamedParametersWarning: the names of a side differ from the memory's in a known way.
        """
        if self.directions is None:
            raise OptionError(
                "the memory holds no directions: measure with estimator='kronecker', and consolidate the result."
            )
        if reference is None and not self.directions.names() <= self.anchor.keys():
            raise OptionError("the memory holds no anchor: give the weights that were measured as reference=.")
        before = self.anchor if reference is None else reference
        names = self.directions.names()
        sides = [dict(side if isinstance(side, Mapping) else weights_by_name(side, names)) for side in (before, model)]
        for side in sides:
            new = fitted(names, side).names
            side |= {name: side[new[name]] for name in names if new.get(name) in side}
        return self.directions.predicted_change(sides[0], sides[1])

    def merge(self, other: Memory) -> Memory:
        """The memory of the samples of both, for replicas that each consolidated once, at the same weights.

        Omega = (n Omega_1 + n' Omega_2) / (n + n'), with n and n' the samples on which each measured the parameter.
        This equals one memory of all samples, up to rounding. Memories of several consolidations may share a past,
        which would count twice: add up their importances instead, and consolidate once.

        Raises:
            MismatchError: the anchors or statistics differ, a memory has consolidated never or more than once, or the
                quantities differ.
        """
        for memory in (self, other):
            if not memory.history or any(entry.rule != MERGED for entry in memory.history[1:]):
                raise MismatchError(
                    f"only memories of one consolidation each can be merged, and one has {len(memory.history)}: a past "
                    "that they share would count twice. Merge importances or factors, and consolidate the result once."
                )
        known = {**other.statistics, **self.statistics}
        other_values = [n for n, t in known.items() if not same_values(t, other.statistics.get(n, t))]
        if other_values:
            raise MismatchError(
                f"{len(other_values)} of {len(known)} statistics (the first is {other_values[0]}) differ. Only "
                "memories of one model, with the same weights and running statistics, can be merged."
            )
        if self.directions is not None and other.directions is not None:
            return replace(self._merge_directions(other, other.directions), statistics=known)
        if self.directions is not None or other.directions is not None or None in (self.quantity, other.quantity):
            raise MismatchError("one memory holds an importance, the other directions: they cannot be merged.")
        assert self.quantity is not None
        assert other.quantity is not None
        _check_same_quantity(self.quantity, other.quantity, "the other memory", "merged")
        check_same_shapes(self.anchor, other.anchor, "the first memory", "the second memory")
        moved = _differing((name, value, other.anchor[name]) for name, value in self.anchor.items())
        if moved:
            raise MismatchError(
                f"the anchors of {len(moved)} of {len(self.anchor)} parameters differ (the first is {moved[0]}). Only "
                "memories of the same weights, from replicas of one model, can be merged."
            )
        n, m = ({name: own.counts.get(name, own.num_samples) for name in self.anchor} for own in (self, other))
        omega = {
            name: on_parts(partial(_weighted_mean, n[name], m[name]), mine, other.importance[name])
            for name, mine in self.importance.items()
        }
        counts = {name: n[name] + m[name] for name in omega}
        merged = tuple(replace(entry, rule=MERGED) for entry in other.history)
        return Memory(self.anchor, omega, self.history + merged, counts, statistics=known)

    def _merge_directions(self, other: Memory, directions: Directions) -> Memory:
        """`merge` for memories of directions alone."""
        own, their = self.directions_quantity, other.directions_quantity
        if self.importance or other.importance or own != their or self.directions is None:
            raise MismatchError(
                "memories with directions can be merged if both hold nothing else, and the same second moments. Merge "
                "the factors, and consolidate the result once."
            )
        if self.history[0].fingerprint != other.history[0].fingerprint or directions.differs(self.directions):
            raise MismatchError("the memories are of different weights. Only replicas of one model can be merged.")
        history = self.history + tuple(replace(entry, rule=MERGED) for entry in other.history)
        counts = self.num_samples, other.num_samples
        return replace(self, history=history, directions=merged(self.directions, directions, counts))

    def summary(self) -> list[LayerSummary]:
        """Per layer its share of the total importance, mean, maximum and concentration, in the model's order.

        Of a sharded importance, one layer is gathered at a time: all processes must call it together.
        """
        return summarize(self.importance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file atomically, tensor by tensor.

        If tensors are sharded, all processes must call it together. The first one writes: the others send it their
        parts, piece by piece, and raise its error if it fails. No tensor is gathered, and the file is the same as that
        of one process. To let each process write its part, see `state_dict`.

        Args:
            path: the file, or any URL that fsspec knows (`s3://`, `gs://`, ...; the extra `remote`). A file at a URL is
                written to a local temporary file, then uploaded. Object stores show the old file until the upload is
                complete; a server that shows files as they arrive (`sftp://`, `ftp://`) may keep half a file, which
                will not load.

        Raises:
            MemoryFileError: the file cannot be written; an old file stays.
            MismatchError: anchor and importance have different parameters.
            ModelError: tensors are cut between different processes.
            OptionError: a count is not a whole number.
        """
        self._check_consistency()
        write(path, MEMORY, self.header(), self.groups())

    def _check_consistency(self) -> None:
        """Check what a file may not hold."""
        check_same_shapes(self.anchor, self.importance, "the anchor", "the importance")
        try:
            for name, count in self.counts.items():
                checked_count(count, name)
        except ValueError as error:
            raise OptionError(f"the memory's counts: {error}.") from None

    def state_dict(self) -> dict[str, Tensor]:
        """The memory as tensors by name, for torch.distributed.checkpoint: each process writes its parts.

        Beside the tensors, `anchor/<parameter>` and so on, it has a header: the JSON of a file's metadata, as bytes.

        Raises:
            MismatchError, OptionError: as for `save`.

        Example:
            `torch.distributed.checkpoint.save({"memory": memory.state_dict()}, checkpoint_id=folder)` in all processes,
            and then `Memory.from_checkpoint(folder)`.

            >>> import torch, memsyn
            >>> memory = memsyn.Memory({"weight": torch.ones(2)}, {"weight": torch.ones(2)})
            >>> sorted(memory.state_dict())
            ['anchor/weight', 'importance/weight', 'memsyn']
        """
        self._check_consistency()
        return checkpoint_entries(MEMORY, self.header(), self.groups())

    @classmethod
    def from_checkpoint(
        cls, folder: str | os.PathLike[str], *, key: str | None = None, like: nn.Module | None = None
    ) -> Memory:
        """Read what `state_dict` gave to torch.distributed.checkpoint, in any number of processes.

        Each process reads what it holds. Torch reads the checkpoint's own `.metadata` by pickle, which can run code:
        load only checkpoints that you trust. A file that `save` wrote has no pickle.

        Args:
            folder: the checkpoint.
            key: where the memory is in the dict that was saved: `memory` for `{"memory": memory.state_dict()}`, and ""
                if it is the dict. None: the checkpoint holds one value of memsyn.
            like: as for `load`. If it is sharded, tensors are cut as its parameters. None: they are whole, on the CPU.

        Raises:
            MemoryFileError: the checkpoint is missing or damaged, or does not hold one memory at `key`.
            ProcessError: another process could not read it, if `like` is sharded.
            MismatchError: the memory is of another architecture than `like`.

        Warns:
            MovedWeightsWarning, MovedStatisticsWarning, RenamedParametersWarning: as for `load`.
        """
        with failing_in_all(_sharded_parameter(like)):
            memory = cls.from_file(folder, *from_checkpoint(folder, MEMORY, key, like))
        return memory if like is None else memory.fitted(like)._of_model(like, folder)

    def header(self) -> dict[str, Any]:
        """The entries of a file's metadata."""
        known = {} if self.directions is None else {"directions": self.directions.header()}
        return {"history": [asdict(entry) for entry in self.history], "counts": self.counts, **known}

    def groups(self) -> Groups:
        """The tensors of a file, by group and name."""
        known = {} if self.directions is None else self.directions.groups()
        known |= {STATISTICS: self.statistics} if self.statistics else {}
        return {"anchor": self.anchor, "importance": self.importance, **known}

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, like: nn.Module | None = None) -> Memory:
        """Read a file that `save` wrote.

        Args:
            path: the file, or its URL (`simplecache::s3://...` keeps a local copy).
            like: the model of the memory: names and shapes are checked, and tensors are put on the devices of its
                parameters. The memory gets the model's names, as `fitted` gives them. If it is sharded, all processes
                must call `load` together: the file stays on the disk while it is read, and each process keeps its part
                of the tensors (of a file at a URL, each reads the whole first). None: tensors are on the CPU.

        Raises:
            MemoryFileError: the file is missing, damaged, not a memory, or of a newer format.
            ProcessError: another process could not read it, if `like` is sharded.
            MismatchError: the memory is of another architecture than `like`. If a part was replaced, load without
                `like`, and `select` the rest.

        Warns:
            MovedWeightsWarning: the weights of `like` differ from the anchor.
            MovedStatisticsWarning: its running statistics, or other buffers, differ from the memory's.
            RenamedParametersWarning: the names of the memory differ from the model's in a known way.
        """
        with failing_in_all(_sharded_parameter(like)):
            header, groups = read_for(path, MEMORY, like)
            memory = cls.from_file(path, header, in_parts(groups, like))
        return memory if like is None else memory.fitted(like)._of_model(like, path)

    def _of_model(self, like: nn.Module, path: str | os.PathLike[str]) -> Memory:
        """The memory on the model's devices, whose names it has; `load` says what is checked and warned of."""
        check_model(self, like, stacklevel=4)
        parameters = weights_by_name(like, self.names)
        moved = _differing((n, anchor, parameters[n]) for n, anchor in self.anchor.items() if n in parameters)
        if not self.anchor and self.directions is not None:
            names, mark = sorted(self.names & parameters.keys()), self.history[-1].fingerprint
            if mark is None:  # the memory has other names than when it was consolidated
                moved = self.directions.moved(parameters)
            elif mark != fingerprint({n: parameters[n].detach() for n in names}):
                moved = names
        if moved:
            warnings.warn(
                f"{len(moved)} of {len(self.names)} parameters (the first is {moved[0]}) have other weights in the "
                f"model than at the last consolidation of {path}. This is right if the model was trained since. If "
                "not, load its weights first: protect would pull the model towards the weights of another one.",
                MovedWeightsWarning,
                stacklevel=3,
            )

        warn_of_moved_statistics(self.statistics, like, stacklevel=4)
        places = {**statistics(like), **parameters}

        def placed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {n: t.to(local_part(places[n]).device) if n in places else t for n, t in tensors.items()}

        groups = [placed(tensors) for tensors in (self.anchor, self.importance, self.statistics)]
        return replace(self, anchor=groups[0], importance=groups[1], statistics=groups[2])

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], header: Mapping[str, Any], groups: Groups) -> Memory:
        """The memory in the header and groups that `storage.reading_and_writing.read` returned.

        Raises:
            MemoryFileError: they are not as `save` writes them.
        """
        with well_formed(path):
            entries = enumerate(checked(list, header["history"], "history"))
            history = tuple(record(Consolidation, checked(dict, own, f"history.{number}")) for number, own in entries)
            for number, entry in enumerate(history):
                checked_count(entry.num_samples, f"history.{number}.num_samples", 1)
                if entry.decay is not None and not 0 <= entry.decay <= 1:
                    raise ValueError(f"history.{number}.decay is {entry.decay!r:.40}; expected 0 to 1, or null")
            counts = {
                name: checked_count(samples, f"counts.{name}")
                for name, samples in checked(dict, header["counts"], "counts").items()
            }
            measured = sum(entry.num_samples for entry in history)
            directions = None
            lost = [group for group in GROUPS if groups.get(group)]
            if lost and "directions" not in header:
                raise KeyError(f"directions, of which {lost[0]} holds tensors")
            if "directions" in header:
                directions = Directions.from_file(checked(dict, header["directions"], "directions"), groups)
                _check_counts(directions, history)
            for name, samples in counts.items():
                if name not in groups["importance"] or (history and samples > measured):
                    raise ValueError(
                        f"counts.{name} is {samples}; expected a parameter, and at most the {measured} samples measured"
                    )
            kept = groups.get(STATISTICS, {})
            memory = cls(groups["anchor"], groups["importance"], history, counts, directions, kept)
            if kept.keys() & memory.names:
                raise ValueError(f"{min(kept.keys() & memory.names)} is a parameter, and a statistic too")
            if directions is not None and memory.directions_quantity is None:
                raise ValueError("it holds directions, and no consolidation of factors in its history")
            check_same_shapes(memory.anchor, memory.importance, "the anchor", "the importance")
            return memory

    def check(self, model: nn.Module) -> None:
        """Check that the memory fits a model; warn of parameters that only one of the two has.

        A parameter may have more rows than in the memory, as a head with more classes has: the new rows are free. With
        one shared head the new classes then take the answers of the old ones; `protect` warns of it.

        Raises:
            MismatchError: the model has no parameter of the memory, or has one in another shape; the error names it.
                `select(exclude=...)` leaves such parameters out.

        Warns:
            NewParametersWarning, LostParametersWarning: only the model, or only the memory has a parameter.
            RenamedParametersWarning: the memory's names differ from the model's in a known way.
        """
        check_model(self.fitted(model), model)


def check_model(memory: Memory, model: nn.Module, known: Collection[str] = (), stacklevel: int = 3) -> None:
    """`Memory.check`, for a memory under the model's names; without a warning of the parameters in `known`."""
    parameters = weights_by_name(model, memory.names)
    check_fit(memory.importance, parameters, "the memory", may_change=True, stacklevel=stacklevel + 2)
    if memory.directions is not None:
        memory.directions.check(parameters)
        lost = memory.directions.names() - parameters.keys() - memory.importance.keys()
        warn_of_lost(sorted(lost), "the memory", stacklevel + 1)
    names = memory.names
    new = free_names(model, names | set(known))
    if new and names:
        warnings.warn(
            f"{len(new)} parameters of the model are not in the memory and stay free to change: {', '.join(new)}",
            NewParametersWarning,
            stacklevel=stacklevel,
        )


def _check_counts(directions: Directions, history: tuple[Consolidation, ...]) -> None:
    """Refuse directions of more tasks or samples than were consolidated.

    Raises:
        ValueError: names the entry.
    """
    entries = [entry for entry in history if entry.magnitude in (BOTH, INPUTS_ALONE)]
    samples = sum(entry.num_samples for entry in entries)
    masses = {"mass": directions.mass}
    masses |= {f"numbers.{key}.mass": own.mass for key, own in directions.layers.items()}
    masses |= {f"diagonal.{name}": own.mass for name, own in directions.diagonal.items()}
    for what, mass in masses.items():
        if mass > len(entries) + 0.01:  # rounding
            raise ValueError(
                f"directions.{what} is {mass:g}; expected at most {len(entries)}, the tasks in the history"
            )
    for key, own in directions.layers.items():
        if own.counts[1] > samples:
            raise ValueError(f"directions.numbers.{key}.counts is {own.counts}, but there are {samples} samples")


def _of_unknown_weights(history: tuple[Consolidation, ...]) -> tuple[Consolidation, ...]:
    """The same history, without the fingerprint of the last entry."""
    return (*history[:-1], *(replace(entry, fingerprint=None) for entry in history[-1:]))


def _sharded_parameter(model: nn.Module | None) -> DTensor | None:
    return None if model is None else one_sharded(named_parameters(model).values())


def _kept_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's statistics; of a sharded model, those of the first process.

    A mask may hold infinity, and so may an observer: no file may hold that.
    """
    present, like = statistics(model), _sharded_parameter(model)
    present = {name: gathered(buffer) for name, buffer in present.items()}
    if like is not None:
        present = {name: told_by(first_process(like), buffer, like) for name, buffer in present.items()}
    return {n: b.clone() for n, b in present.items() if bool(b.to(wide_dtype(b)).isfinite().all())}


def warn_of_moved_statistics(remembered: Mapping[str, Tensor], model: nn.Module, *, stacklevel: int) -> None:
    """Warn if the model's statistics are not those that a memory remembers.

    Warns:
        MovedStatisticsWarning: says how many differ, and what to do.
    """
    moved = moved_statistics(remembered, model)
    if moved:
        warnings.warn(
            f"{len(moved)} of {len(remembered)} statistics (the first is {moved[0]}) are not as at the last "
            "consolidation: outputs on old data have changed with them. Load the old ones with "
            "model.load_state_dict(memory.statistics, strict=False), or measure and consolidate the model as it is.",
            MovedStatisticsWarning,
            stacklevel=stacklevel,
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
    warn_of_lost(sorted(directions.names() - parameters.keys()), "the memory", 5)
    return directions.only(parameters)


def _check_same_quantity(mine: tuple[str, str], other: tuple[str, str], whose: str, how: str) -> None:
    if mine != other:
        raise MismatchError(
            f"the memory holds {mine[1]} of {mine[0]}, {whose} {other[1]} of {other[0]}: they cannot be {how}."
        )


def _folded(
    old: Tensor | None, new: Tensor | None, parameter: Tensor, fold: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The consolidated importance of a parameter, cut as the parameter, which may have more rows than the old one.

    Raises:
        MismatchError: an importance is sharded and the parameter is not.
    """
    if not is_sharded(parameter) and any(own is not None and is_sharded(own) for own in (old, new)):
        raise MismatchError(
            f"an importance of shape {tuple(parameter.shape)} is cut between processes, and the model's parameter is "
            "not. Save it, and load it where the model is whole."
        )
    after = None if new is None else cut_like(new, parameter)
    if old is None:
        assert after is not None
        return from_part(after, parameter)
    grown, whole = old.shape != parameter.shape, local_part(parameter)
    before = cut_like(gathered(old) if grown else old, parameter).to(whole.device)
    if after is None:
        more = torch.zeros_like(whole[len(before) :], dtype=before.dtype) if grown else None
        return from_part(before if more is None else torch.cat([before, more]), parameter)
    found = fold(before, after[: len(before)] if grown else after)
    return from_part(torch.cat([found, after[len(before) :]]) if grown else found, parameter)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _weighted_mean(num_one: int, num_other: int, one: Tensor, other: Tensor) -> Tensor:
    return RULES["mean"](one, other.to(one), num_one, num_other, 0.0)


def _differing(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> list[str]:
    """The names whose two tensors differ in any process; of a second one with more rows, the first rows count."""
    names, flags, likes = [], [], []
    for name, one, other in pairs:
        like = next(filter(is_sharded, (other, one)), other)
        known, present = (cut_like(_whole_if_grown(own, like), like) for own in (one, other))
        rows = present[: len(known)] if one.shape != other.shape else present
        names.append(name)
        flags.append(torch.tensor(float(not torch.equal(rows, known.to(rows)))))
        likes.append(one if is_sharded(one) else like)  # not a weight in effect, which would be kept
    counts = summed_over_parts(flags, likes)
    return [name for name, count in zip(names, counts, strict=True) if count]


def _whole_if_grown(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor with other rows than a sharded one is cut at other places: it is gathered, to be cut as that one."""
    return gathered(tensor) if is_sharded(like) and tensor.shape != like.shape else tensor


def check_fit(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Any],
    whose: str,
    *,
    may_change: bool = False,
    stacklevel: int = 4,
) -> None:
    """Check that the model has every one of `tensors`, in the same shape.

    Args:
        tensors: by parameter name.
        parameters: the model's.
        whose: the owner of the tensors, for the error.
        may_change: parameters may have more rows; some (not all) may be missing, with a warning.
        stacklevel: of that warning.

    Raises:
        MismatchError: a parameter is missing or has another shape; the error names the way out.
    """
    missing = [name for name in tensors if name not in parameters]
    reshaped = {
        name: f"{name} (expected {tuple(tensor.shape)}, the model has {tuple(parameters[name].shape)})"
        for name, tensor in tensors.items()
        if name in parameters
        and tensor.shape != parameters[name].shape
        and not (may_change and has_grown(tensor, parameters[name]))
    }
    problems = [f"the model lacks {', '.join(missing)}"] if missing else []
    problems += [f"reshaped: {', '.join(reshaped.values())}"] if reshaped else []
    if reshaped or (missing and not (may_change and len(missing) < len(tensors))):
        raise MismatchError(
            f"{whose} is of another architecture: {'; '.join(problems)}. Use the model it was made with, or measure "
            f"this model.{way_out([*missing, *reshaped], tensors)}"
        )
    warn_of_lost(missing, whose, stacklevel)


def warn_of_lost(names: Collection[str], whose: str, stacklevel: int) -> None:
    """Warn of parameters that the model has no longer, if there are any."""
    if names:
        warnings.warn(
            f"{len(names)} parameters of {whose} are no longer in the model and are left out: {', '.join(names)}",
            LostParametersWarning,
            stacklevel=stacklevel,
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


def load_mapped(path: str | os.PathLike[str]) -> Memory:
    """A memory whose tensors stay on the disk until they are used, for memories that are larger than memory.

    Raises:
        MemoryFileError: the file is missing, damaged, no memory, or of a newer format.
    """
    return Memory.from_file(path, *read(path, MEMORY, mapped=True))


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
