"""Where in a forward pass parameters meet samples: every operation that takes a parameter, or a function of some.

Owns following parameters through the operations of a model, whatever modules it is made of, and finding the
dimension in which each tensor keeps its samples. Knows no formulas.

Words: a value is a tensor computed of parameters alone (a parameter, its transpose, a normalised weight, the rows of
a table for places); a use is an operation that brings a value and samples together; a path is how a value came from
its parameter, as names of operations, and is the same in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memsyn.decompositions import DECOMPOSITIONS
from memsyn.rules import OPERATIONS, Axis, Rule

Path = tuple[str, ...]
Function = Callable[..., Any]


@dataclass(eq=False, frozen=True)
class Value:
    """A tensor computed of parameters alone, with its graph back to them."""

    tensor: Tensor
    names: frozenset[str]
    path: Path


class Split(NamedTuple):
    """What the operation at a path does with samples."""

    out: Axis | None
    """Where its output keeps them; None if it only makes another value."""
    args: Mapping[str, Axis | None]
    """Where each of its tensors keeps them."""


@dataclass(eq=False)
class Call:
    """A use: one operation on values and samples, and the gradient of what came out."""

    function: Function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    values: Mapping[str, Value]
    """The values among its tensors, by place."""
    splits: Mapping[str, Split]
    """What it does with samples, as each value's rule should see it."""
    tensors: dict[str, Tensor]
    """The tensors that the rules of its values need, or all, without their graphs."""
    versions: dict[str, int]
    places: frozenset[str]
    """Of all its tensors."""
    grad: Tensor | None = None

    def is_intact(self) -> bool:
        """Whether nothing changed since the operation saw it."""
        return all(self.tensors[place]._version == version for place, version in self.versions.items())


def rule_of(function: Function, place: str) -> Rule | None:
    """The rule for an argument of an operation."""
    operation = OPERATIONS.get(function)
    return operation.rules.get(place) if operation else None


def name_of(function: Function) -> str:
    """A name for what torch hands to a function mode."""
    return getattr(function, "__name__", type(function).__name__)


def path_of(value: Value, function: Function, place: str) -> Path:
    """The path of a value's use, or of a further value."""
    return (*value.path, f"{name_of(function)}.{place}")


def arguments(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments by place: their name where it is known, else their number; parts of a list as place.number."""
    operation = OPERATIONS.get(function)
    names = operation.arguments if operation else ()
    for index, value in enumerate(args):
        yield from _parts(names[index] if index < len(names) else str(index), value)
    for name, value in kwargs.items():
        yield from _parts(name, value)


def _parts(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
        for index, part in enumerate(value):
            yield f"{place}.{index}", part
    else:
        yield place, value


def replaced(
    function: Function, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Mapping[str, Tensor | None]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with other tensors at some places."""
    operation = OPERATIONS.get(function)
    names = operation.arguments if operation else ()

    def put(place: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
            return type(value)([tensors.get(f"{place}.{index}", part) for index, part in enumerate(value)])
        return tensors.get(place, value)

    return (
        [put(names[index] if index < len(names) else str(index), value) for index, value in enumerate(args)],
        {name: put(name, value) for name, value in kwargs.items()},
    )


def changes_its_input(function: Function, kwargs: Mapping[str, Any]) -> bool:
    """Whether the operation writes to its first argument."""
    name = name_of(function)
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or "out" in kwargs


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [part for part in output if isinstance(part, Tensor)] if isinstance(output, (list, tuple)) else []


class _Tracer(TorchFunctionMode):
    """Sees every operation; `meet` handles those that take a value."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.values = {id(p): Value(p, frozenset((name,)), (name,)) for name, p in parameters.items()}

    def __torch_function__(
        self, function: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and (self._holds(args) or (kwargs and self._holds(kwargs.values()))):
            if function in DECOMPOSITIONS:
                with self:
                    return DECOMPOSITIONS[function](*args, **kwargs)
            return self.meet(function, args, kwargs)
        return self.pass_by(function, args, kwargs)

    def _holds(self, args: Iterable[Any]) -> bool:
        values = self.values
        return any(id(arg) in values or (type(arg) in (list, tuple) and self._holds(arg)) for arg in args)

    def meet(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def pass_by(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return function(*args, **kwargs)

    def _met(self, tensors: Mapping[str, Tensor]) -> dict[str, Value]:
        return {place: self.values[id(tensor)] for place, tensor in tensors.items() if id(tensor) in self.values}

    def _follow(self, function: Function, met: Mapping[str, Value], output: Any) -> None:
        """What was computed of values is a value."""
        place, first = next(iter(met.items()))
        names = frozenset().union(*(value.names for value in met.values()))
        for index, tensor in enumerate(_tensors(output)):
            if tensor.requires_grad and id(tensor) not in self.values:
                path = (*first.path, f"{name_of(function)}.{place}.{index}")
                self.values[id(tensor)] = Value(tensor, names, path)


class _Event(NamedTuple):
    """An operation that took a value, while only looking."""

    with_samples: bool
    out: torch.Size | None
    args: dict[str, torch.Size]


@final
class Observer(_Tracer):
    """Looks on while a batch passes: what the operations at each path did, and with which shapes. Changes nothing."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], batch: Iterable[Tensor]) -> None:
        super().__init__(parameters)
        self.events: dict[Path, list[_Event]] = {}
        self._samples = {id(tensor): tensor for tensor in batch}

    def pass_by(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        output = function(*args, **kwargs)
        given = [value for _, value in arguments(function, args, kwargs) if isinstance(value, Tensor)]
        if any(map(self._is_of_samples, given)):
            self._mark(output, args if changes_its_input(function, kwargs) else ())
        return output

    def meet(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        tensors = {place: v for place, v in arguments(function, args, kwargs) if isinstance(v, Tensor)}
        shapes = {place: tensor.shape for place, tensor in tensors.items()}
        met = self._met(tensors)
        with_samples = any(self._is_of_samples(t) for place, t in tensors.items() if place not in met)
        output = function(*args, **kwargs)
        changed = changes_its_input(function, kwargs)
        result = args[0] if output is None and changed else output
        if with_samples:
            self._mark(result, args if changed else ())
        if not any(tensor.requires_grad for tensor in _tensors(result)):
            return output
        spoilt = changed and id(args[0]) in self.values
        out = result.shape if isinstance(result, Tensor) and not spoilt else None
        for place, value in met.items():
            self.events.setdefault(path_of(value, function, place), []).append(_Event(with_samples, out, shapes))
        if not with_samples:
            self._follow(function, met, result)
        return output

    def _is_of_samples(self, tensor: Tensor) -> bool:
        known = id(tensor) in self._samples
        return known or (tensor.grad_fn is not None and id(tensor) not in self.values)

    def _mark(self, output: Any, changed: Sequence[Any]) -> None:
        for tensor in (*_tensors(output), *(arg for arg in changed[:1] if isinstance(arg, Tensor))):
            self._samples[id(tensor)] = tensor


def compare(one: Observer, two: Observer) -> dict[Path, Split | None]:
    """What each path does with samples: the dimension that doubles when there are twice as many. None if unclear."""
    return {path: _compare(one.events.get(path, []), events) for path, events in two.events.items()}


def _compare(ones: Sequence[_Event], twos: Sequence[_Event]) -> Split | None:
    if len(ones) != len(twos):
        return None
    merged: Split | None = None
    for one, two in zip(ones, twos, strict=True):
        split = _compare_events(one, two)
        merged = split if merged is None else _merge(merged, split)
        if merged is None:
            return None
    return merged


def _merge(left: Split, right: Split | None) -> Split | None:
    """Two uses at one path must keep their samples in the same places; one may take fewer tensors."""
    if right is None or left.out != right.out:
        return None
    if any(left.args[place] != right.args[place] for place in left.args.keys() & right.args.keys()):
        return None
    return Split(left.out, {**left.args, **right.args})


def _compare_events(one: _Event, two: _Event) -> Split | None:
    if one.args.keys() != two.args.keys():
        return None
    try:
        args = {place: _doubled(one.args[place], shape) for place, shape in two.args.items()}
        if one.out is None or two.out is None:
            return Split(None, {}) if not two.with_samples and one.out is two.out and not any(args.values()) else None
        out = _doubled(one.out, two.out)
    except ValueError:
        return None
    if out is None:
        return None if two.with_samples else Split(None, {})
    return Split(out, args)


def _doubled(one: torch.Size, two: torch.Size) -> Axis | None:
    dims = [dim for dim, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if not dims:
        return None
    if len(dims) > 1 or two[dims[0]] != 2 * one[dims[0]]:
        raise ValueError
    return Axis(dims[0])


def guess(observer: Observer, num_samples: int) -> dict[Path, Split | None]:
    """The same from a batch that cannot be cut: a dimension as long as there are samples, or a multiple, is theirs."""

    def axis(shape: torch.Size) -> Axis | None:
        exact = [dim for dim, size in enumerate(shape) if size == num_samples]
        folded = [dim for dim, size in enumerate(shape[:1]) if size % num_samples == 0]
        return Axis((exact or folded)[0]) if exact or folded else None

    found: dict[Path, Split | None] = {}
    for path, (event, *_) in observer.events.items():
        out = axis(event.out) if event.out is not None else None
        if out is None:
            found[path] = None if event.with_samples else Split(None, {})
        else:
            found[path] = Split(out, {place: axis(shape) for place, shape in event.args.items()})
    return found


@dataclass(eq=False)
class Group:
    """Parameters that are measured together, since some value is computed of several; and their uses."""

    names: frozenset[str]
    uses: list[tuple[Call, str]] = field(default_factory=list)
    """Calls, and the place of the value in each."""
    num_waiting: int = 0


@final
class Recorder(_Tracer):
    """Cuts the graph between values and samples, and hands each group of parameters over when its gradients came.

    Nothing but the graph may hold a tensor longer than that: freshly freed memory is what makes the pass fast.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        splits: Mapping[Path, Split | None],
        consume: Callable[[Group], None],
    ) -> None:
        super().__init__(parameters)
        self.splits, self.consume = splits, consume
        self.leaves: list[Tensor] = []
        self.unknown: set[str] = set()
        """Parameters used where nothing is known about the samples."""
        self._calls: list[Call] = []
        self._groups: dict[str, Group] = {}
        self._passive = False

    def meet(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        tensors = {place: v for place, v in arguments(function, args, kwargs) if isinstance(v, Tensor)}
        met = self._met(tensors)
        splits = {place: self.splits.get(path_of(value, function, place)) for place, value in met.items()}
        known = {place: split for place, split in splits.items() if split is not None}
        makes_value = [split.out is None for split in known.values()]
        if len(known) < len(met) or any(makes_value) != all(makes_value):
            output = function(*args, **kwargs)
            result = args[0] if output is None and changes_its_input(function, kwargs) else output
            if any(tensor.requires_grad for tensor in _tensors(result)):
                self.unknown.update(*(value.names for value in met.values()))
            return output
        if all(makes_value):
            output = function(*args, **kwargs)
            self._follow(function, met, output)
            return output
        return self._use(function, args, kwargs, tensors, met, known)

    def _use(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        met: Mapping[str, Value],
        splits: Mapping[str, Split],
    ) -> Any:
        kept: dict[str, Tensor] = {}
        changed = changes_its_input(function, kwargs)
        if not self._passive:
            kept = self._keep(function, tensors, met)
            if changed:  # what is there now is what it needs
                kept = {place: t.clone() if t.data_ptr() == args[0].data_ptr() else t for place, t in kept.items()}
        cut = {place: value.tensor.detach() for place, value in met.items()}
        new_args, new_kwargs = replaced(function, args, kwargs, cut)
        output = function(*new_args, **new_kwargs)
        result = args[0] if output is None else output
        if not result.requires_grad:  # nothing before this is differentiable: the graph begins here
            if changed:
                leaf = result.new_zeros((), requires_grad=True)
                result.add_(leaf)
            else:
                leaf = result.detach().requires_grad_()
                output = result = leaf.clone()  # a leaf could not be changed in place by what follows
            if not self._passive:
                self.leaves.append(leaf)
        elif result._is_view() and not changed:  # a later change in place would pass by a hook on a view
            output = result = result.clone()
        if not self._passive:
            versions = {place: tensor._version for place, tensor in kept.items()}
            stripped, named = replaced(function, args, kwargs, dict.fromkeys(tensors))
            call = Call(function, tuple(stripped), named, dict(met), splits, kept, versions, frozenset(tensors))
            result.register_hook(partial(self._on_grad, call))
            self._calls.append(call)
        return output

    @staticmethod
    def _keep(function: Function, tensors: Mapping[str, Tensor], met: Mapping[str, Value]) -> dict[str, Tensor]:
        """Only what the rules of the values need, or everything if one has none; and small things like statistics."""
        rules = [rule_of(function, place) for place in met]
        if all(rule is not None for rule in rules):
            operands = {rule.operand for rule in rules if rule is not None}
            large = {"input", "other", "mat1"} - operands
            return {place: t.detach() for place, t in tensors.items() if place not in large or place in met}
        return {place: tensor.detach() for place, tensor in tensors.items()}

    def start_backward(self, *, last: bool) -> None:
        """All uses are known now: group the parameters that share a value, for one backward pass."""
        self._passive = True
        for call in self._calls:
            call.grad = None
            for place, value in call.values.items():
                self._group(value.names).uses.append((call, place))
        for group in {id(group): group for group in self._groups.values()}.values():
            group.num_waiting = len({id(call) for call, _ in group.uses})
        if last:
            self._calls.clear()

    def _group(self, names: frozenset[str]) -> Group:
        found = {id(g): g for name in names if (g := self._groups.get(name)) is not None}
        if len(found) == 1 and names <= next(iter(found.values())).names:
            return next(iter(found.values()))
        group = Group(names.union(*(g.names for g in found.values())))
        for other in found.values():
            group.uses += other.uses
        self._groups.update(dict.fromkeys(group.names, group))
        return group

    def _on_grad(self, call: Call, grad: Tensor) -> None:
        call.grad = grad
        with torch._C.DisableTorchFunction():
            names = {name for value in call.values.values() for name in value.names}
            for group in {id(g): g for name in names if (g := self._groups.get(name)) is not None}.values():
                group.num_waiting -= 1
                if group.num_waiting == 0:
                    self._hand_over(group)

    def _hand_over(self, group: Group) -> None:
        for name in group.names:
            del self._groups[name]
        if group.names & self.unknown:
            self.unknown |= group.names
            return
        group.uses = [(call, place) for call, place in group.uses if call.grad is not None]
        self.consume(group)

    def finish(self) -> None:
        """Hand over the groups of which some uses, or all, had no part in the objective."""
        with torch._C.DisableTorchFunction():
            for group in list({id(group): group for group in self._groups.values()}.values()):
                self._hand_over(group)
