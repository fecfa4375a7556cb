"""The old model of a comparison: a clone of the new one with the weights and statistics of a reference.

Owns reading a reference: a model, a state_dict, or a memory. Must not change the user's model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memsyn.adapters import has_adapters, plain_model, speaks_of_adapters
from memsyn.errors import MismatchError, OptionError
from memsyn.measuring.model_copy import check_measurable, model_copy
from memsyn.parameters import canonical_name, fitted, named_parameters, same_values, statistics, unwrap
from memsyn.values.memory import Memory, check_fit, has_grown

Reference = nn.Module | Mapping[str, Tensor] | Memory
"""What stands for the old model: itself, its state_dict, or a memory with an anchor."""


class OldModel(NamedTuple):
    """The clone that is run as the old model.

    Attributes:
        model: the clone, in evaluation mode.
        taken: names of parameters and statistics that the reference does not hold, so that they are the new model's.
    """

    model: nn.Module
    taken: tuple[str, ...] = ()


def old_model(model: nn.Module, reference: Reference) -> OldModel:
    """The old model that a reference stands for.

    Raises:
        OptionError: the reference is something else, or a memory without an anchor.
        MismatchError: it is of another model.

    Warns:
        RenamedParametersWarning: its names differ from the model's in a known way.
        LostParametersWarning: it has parameters that the model does not have.
    """
    if isinstance(reference, nn.Module):
        check_measurable(reference)
        return OldModel(model_copy(reference))
    if isinstance(reference, Memory):
        whose, values = "the memory", anchor_of(reference)
    elif isinstance(reference, Mapping) and all(isinstance(value, Tensor) for value in reference.values()):
        whose, values = "the reference", {canonical_name(name): value for name, value in reference.items()}
    else:
        raise OptionError(
            f"expected as reference the old model, its state_dict or a Memory; got a {type(reference).__name__}."
        )
    own = named_parameters(model)
    # Buffers alone say nothing of names that differ by a prefix.
    known = reference.names if isinstance(reference, Memory) else values.keys()
    fit = fitted(known, _places(model), whose, stacklevel=4)
    values = {fit.own(name) if fit.names else name: value for name, value in values.items()}
    clone = model_copy(model, private=own)
    places = _places(clone)
    _check_places(values, places, whose)
    with torch.no_grad():
        for name, value in values.items():
            if name in places:
                places[name].copy_(value)
    held = {id(places[name]) for name in values if name in places}
    mine = {**named_parameters(clone), **statistics(clone)}
    return OldModel(clone, tuple(name for name, tensor in mine.items() if id(tensor) not in held))


def without_adapters(model: nn.Module, reference: Reference) -> nn.Module:
    """The model under the names of a reference: if it has adapters of PEFT and the reference has none, the base model.

    Its weights are those in effect.
    """
    names = () if isinstance(reference, nn.Module) else reference.names if isinstance(reference, Memory) else reference
    if isinstance(reference, nn.Module) or not has_adapters(model) or speaks_of_adapters(model, names):
        return model
    return plain_model(unwrap(model))


def anchor_of(memory: Memory) -> dict[str, Tensor]:
    """The weights and statistics of the old model, as a memory holds them.

    Raises:
        OptionError: it holds no anchor, or one that is older than its directions.
    """
    if not memory.anchor:
        held = "is empty" if memory.directions is None else "holds directions alone, and no anchor (the old weights)"
        raise OptionError(
            f"the memory {held}: give the old model or its state_dict as reference, or consolidate an importance too, "
            "which keeps the weights."
        )
    stale = [] if memory.directions is None else memory.directions.moved(memory.anchor)
    if stale:
        raise OptionError(
            f"the memory's anchor is older than its directions ({len(stale)} parameters differ, the first is "
            f"{stale[0]}), so it is not the model as it was last: give the old model or its state_dict as reference."
        )
    return {**memory.anchor, **memory.statistics}


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> tensor of the model's state_dict; a tied parameter has all of its names."""
    state = unwrap(model).state_dict(keep_vars=True)
    return {canonical_name(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _check_places(values: Mapping[str, Tensor], places: Mapping[str, Tensor], whose: str) -> None:
    """Check that the values of a reference have places in the model.

    Raises:
        MismatchError: none has, or one has another shape.

    Warns:
        LostParametersWarning: some have no place.
    """
    grown = [name for name, value in values.items() if name in places and has_grown(value, places[name])]
    if grown:
        raise MismatchError(
            f"{grown[0]} has {len(places[grown[0]])} rows in the model and {len(values[grown[0]])} in {whose}: a part "
            "of the model has grown. Give the old model itself as reference, with the outputs that both have: "
            f"forward=lambda model, batch: model(batch)[:, :{len(values[grown[0]])}]"
        )
    check_fit(values, places, whose, may_change=True, stacklevel=6)


def moved_buffers(old: nn.Module, new: nn.Module) -> tuple[str, ...]:
    """Names of the statistics that both models have in the same shape, with other values."""
    mine, theirs = statistics(old), statistics(new)
    shared = [name for name in mine if name in theirs and mine[name].shape == theirs[name].shape]
    return tuple(name for name in shared if not same_values(theirs[name], mine[name].to(theirs[name].device)))


def with_statistics_of(old: nn.Module, model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """A clone of the model with some statistics of the old one."""
    clone = model_copy(model)
    mine, theirs = statistics(clone), statistics(old)
    with torch.no_grad():
        for name in names:
            mine[name].copy_(theirs[name])
    return clone
