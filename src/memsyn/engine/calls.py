"""Calls: single operations on values and samples, with their arguments.

Owns reading and rebuilding the arguments of operations.

Words:

- A value is a tensor that is computed only from parameters: a parameter, its transpose, a normalised weight, the rows
  of a position table.
- The path of a value says how it was computed, as names of operations: ("0.weight", "t.input.0") is the transpose of
  the parameter `0.weight`. A path is the same in every batch, so the result of the route check at a path holds for
  later batches.
- A place is the name of an argument ("weight"), or its number if the name is not known ("1").
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from memsyn.kernels.operations import Function, name_of, operation_of
from memsyn.kernels.rules import Axis
from memsyn.torch_private import version_of

ValuePath = tuple[str, ...]


class Value(NamedTuple):
    """A tensor that is computed only from parameters, with its graph back to them."""

    tensor: Tensor
    names: frozenset[str]
    path: ValuePath


class Split(NamedTuple):
    """The batch axes of the operation at a path: of its output and of its arguments.

    For `F.linear(x, W)` with x (B, 8): Split(Axis(0), {"input": Axis(0), "weight": None}).
    """

    out: Axis | None
    """The batch axis of the output; None if the output is another value."""
    args: Mapping[str, Axis | None]
    """Place -> the batch axis of this tensor; None if the tensor is the same for all samples."""


def split_from(plain: Sequence[Any] | None) -> Split | None:
    """Read a split, or None, from its JSON form."""

    def axis(parts: Sequence[Any] | None) -> Axis | None:
        return None if parts is None else Axis(*parts)

    return None if plain is None else Split(axis(plain[0]), {place: axis(own) for place, own in plain[1].items()})


@dataclass(eq=False)
class Call:
    """One operation on values and samples, with its arguments and later its output gradient."""

    function: Function
    options: Mapping[str, Any]
    """Place -> argument, for all arguments that are not tensors."""
    values: Mapping[str, Value]
    """Place -> value, for the tensors that are values."""
    splits: Mapping[str, Split]
    """Place of a value -> the split that this value's rule uses."""
    tensors: dict[str, Tensor]
    """Place -> tensor without its graph: the tensors that the rules need, or all tensors."""
    versions: dict[str, int]
    """Place -> autograd's version of the tensor after the operation ran."""
    again: tuple[Sequence[Any], Mapping[str, Any]] | None
    """The arguments without tensors, for another call with other tensors; None if some tensors were not kept."""
    grad: Tensor | None = None
    """The output gradient."""
    num_groups: int = 0
    """The number of parameter groups that still have to read this call."""
    is_alone: bool = False
    """Whether its values are parameters that no other call uses in this pass."""

    def is_intact(self) -> bool:
        """Whether no kept tensor was written to after the operation ran."""
        for place, version in self.versions.items():  # noqa: SIM110 (for each parameter and batch: no generator)
            if version_of(self.tensors[place]) != version:
                return False
        return True


def path_of(value: Value, function: Function, place: str) -> ValuePath:
    """The path of an operation that takes the value at this place."""
    return (*value.path, f"{name_of(function)}.{place}")


def arguments(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by place. The parts of a list or tuple of tensors have places of their own.

    `torch.cat([a, b], 1)` gives {"0.0": a, "0.1": b, "1": 1}; `F.linear(x, W)` gives {"input": x, "weight": W}.
    """
    names = operation_of(function).arguments
    if _are_plain(args, kwargs, names):
        return dict(zip(names, args, strict=False))
    found: dict[str, Any] = {}
    for index, value in enumerate(args):
        place = names[index] if index < len(names) else str(index)
        if _holds_tensors(value):
            found.update((f"{place}.{number}", part) for number, part in enumerate(value))
        else:
            found[place] = value
    for place, value in kwargs.items():
        if _holds_tensors(value):
            found.update((f"{place}.{number}", part) for number, part in enumerate(value))
        else:
            found[place] = value
    return found


def _are_plain(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether all arguments have a name and none is a list, as in most calls."""
    return not kwargs and len(args) <= len(names) and list not in (kinds := [*map(type, args)]) and tuple not in kinds


def _holds_tensors(value: Any) -> bool:
    return type(value) is not Tensor and isinstance(value, (list, tuple)) and any(isinstance(p, Tensor) for p in value)


def with_tensors(
    function: Function, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Mapping[str, Tensor | None]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments (args, kwargs) with the tensors at some places replaced."""
    names = operation_of(function).arguments
    if _are_plain(args, kwargs, names):
        return [*map(tensors.get, names, args)], {}

    def put(place: str, value: Any) -> Any:
        if _holds_tensors(value):
            return type(value)([tensors.get(f"{place}.{number}", part) for number, part in enumerate(value)])
        return tensors.get(place, value)

    return (
        [put(names[index] if index < len(names) else str(index), value) for index, value in enumerate(args)],
        {place: put(place, value) for place, value in kwargs.items()},
    )


def changes_its_input(function: Function, kwargs: Mapping[str, Any]) -> bool:
    """Whether the operation writes in-place: to its first argument, or to `out`."""
    # `add_` writes to its input and `__add__` does not. `__setitem__` is the exception: it does.
    name = name_of(function)
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or "out" in kwargs


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in an operation's output."""
    if isinstance(output, Tensor):
        return [output]
    return [part for part in output if isinstance(part, Tensor)] if isinstance(output, (list, tuple)) else []


def unneeded_places(function: Function, values: Mapping[str, Value]) -> frozenset[str | None]:
    """The places of tensors that no rule needs, if each value has a rule."""
    operation = operation_of(function)
    rules = [rule for place in values if (rule := operation.rules.get(place)) is not None]
    if len(rules) < len(values):
        return frozenset()
    # For F.linear(x, W, b), the rule of W needs x. If only b is trainable, x is not kept.
    return operation.activations - {rule.operand for rule in rules} - values.keys()


def keep_call(
    function: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    given: Mapping[str, Any],
    values: Mapping[str, Value],
    splits: Mapping[str, Split],
    unneeded: Container[str | None],
    *,
    changed: bool,
) -> Call:
    """Make a call of an operation that has not run yet.

    It keeps the tensors that the rules need, and small ones such as statistics. If a value has no rule, it keeps all
    tensors.

    Args:
        function, args, kwargs: the operation.
        given: the arguments by place.
        values, splits: as in `Call`.
        unneeded: places of tensors that are not kept.
        changed: whether the operation writes to its input.
    """
    kept: dict[str, Tensor] = {}
    options: dict[str, Any] = {}
    for place, value in given.items():
        if not isinstance(value, Tensor):
            options[place] = value
        elif place not in unneeded:
            kept[place] = value.detach()
    # If a tensor was not kept, the operation cannot run again, and only a rule can measure it.
    again = None
    if len(kept) + len(options) == len(given):
        again = with_tensors(function, args, kwargs, dict.fromkeys(kept))
    if changed:  # the rules need the input before the change
        first = args[0].data_ptr()
        kept = {place: t.clone() if t.data_ptr() == first else t for place, t in kept.items()}
    return Call(function, options, values, splits, kept, {}, again)
