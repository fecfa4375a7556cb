"""One operation that takes values and samples, as it was called.

Owns reading and rebuilding the arguments of operations.

Words: a value is a tensor computed of parameters alone (a parameter, its transpose, a normalised weight, the rows of a
position table). The path of a value says how it was computed, as names of operations: ("0.weight", "t.input.0") is the
transpose of the parameter `0.weight`. It is the same in every batch, so what the route check has seen at a path holds
for later batches. A place is the name of an argument ("weight"), or its number where the name is not known ("1").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from memsyn.kernels.operations import Function, name_of, operation_of
from memsyn.kernels.rules import Axis
from memsyn.torch_private import version_of

ValuePath = tuple[str, ...]


@dataclass(eq=False, frozen=True)
class Value:
    """A tensor computed of parameters alone, with its graph back to them."""

    tensor: Tensor
    names: frozenset[str]
    path: ValuePath


class Split(NamedTuple):
    """What the operation at a path does with samples."""

    out: Axis | None
    """Where its output keeps them; None if it only makes another value."""
    args: Mapping[str, Axis | None]
    """Where each of its tensors keeps them."""


def split_from(plain: Sequence[Any] | None) -> Split | None:
    """A split, or that there is none, from what JSON makes of it."""

    def axis(parts: Sequence[Any] | None) -> Axis | None:
        return None if parts is None else Axis(*parts)

    return None if plain is None else Split(axis(plain[0]), {place: axis(own) for place, own in plain[1].items()})


@dataclass(eq=False)
class Call:
    """A use: one operation on values and samples, and the gradient of what came out."""

    function: Function
    options: Mapping[str, Any]
    """Its arguments that are no tensors, by place."""
    values: Mapping[str, Value]
    """The values among its tensors, by place."""
    splits: Mapping[str, Split]
    """What it does with samples, as each value's rule should see it."""
    tensors: dict[str, Tensor]
    """The tensors that the rules of its values need, or all, without their graphs."""
    versions: dict[str, int]
    again: tuple[Sequence[Any], Mapping[str, Any]] | None
    """Its arguments without the tensors, to call it again with others; None if not all tensors were kept."""
    grad: Tensor | None = None
    num_groups: int = 0
    """How many groups of parameters have yet to read it."""

    def is_intact(self) -> bool:
        """Whether nothing changed since the operation saw it."""
        return all(version_of(self.tensors[place]) == version for place, version in self.versions.items())


def path_of(value: Value, function: Function, place: str) -> ValuePath:
    """The path of a value's use, or of a further value."""
    return (*value.path, f"{name_of(function)}.{place}")


def arguments(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by place: their name where it is known, else their number; parts of a list as place.number."""
    names = operation_of(function).arguments
    if len(args) <= len(names) and list not in map(type, args) and tuple not in map(type, args) and not kwargs:
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


def _holds_tensors(value: Any) -> bool:
    return type(value) is not Tensor and isinstance(value, (list, tuple)) and any(isinstance(p, Tensor) for p in value)


def with_tensors(
    function: Function, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Mapping[str, Tensor | None]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with other tensors at some places."""
    names = operation_of(function).arguments

    def put(place: str, value: Any) -> Any:
        if _holds_tensors(value):
            return type(value)([tensors.get(f"{place}.{number}", part) for number, part in enumerate(value)])
        return tensors.get(place, value)

    return (
        [put(names[index] if index < len(names) else str(index), value) for index, value in enumerate(args)],
        {place: put(place, value) for place, value in kwargs.items()},
    )


def changes_its_input(function: Function, kwargs: Mapping[str, Any]) -> bool:
    """Whether the operation writes to its first argument."""
    name = name_of(function)
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or "out" in kwargs


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors an operation gave."""
    if isinstance(output, Tensor):
        return [output]
    return [part for part in output if isinstance(part, Tensor)] if isinstance(output, (list, tuple)) else []
