"""The tracers: watch the operations of a forward pass, and find the batch axis of every tensor.

Owns following parameters through operations, in any kind of module, and finding the dimension that holds the samples
(the batch axis) of each tensor. Must not know formulas.

To find the batch axis, run two samples together, and then each one alone. The dimension that doubles holds the samples:

    alone (1, 5, 8), together (2, 5, 8)    Axis(0): samples first
    alone (5, 1, 8), together (5, 2, 8)    Axis(1): time first, as in an RNN
    alone (4, 8),    together (8, 8)       Axis(0, folded=True): four windows or heads per sample, folded into one
                                           dimension. The route check finds out whether neighbours belong to one sample
    alone (8, 8),    together (8, 8)       None: the tensor is the same for all samples (a mask, a position table)

In these cases the batch axis stays unknown, and the parameter takes another route:

- Two dimensions change, or one dimension changes by another factor than 2.
- The same path was seen with different axes.
- The data chose or reordered the rows (a boolean mask, routing to experts).
- A value was written to in-place.
- Samples went into the operation, but no dimension of its output doubles.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memsyn.engine.calls import Split, Value, ValuePath, arguments, changes_its_input, path_of, tensors_of
from memsyn.engine.decompositions import DECOMPOSITIONS
from memsyn.kernels.operations import Function, name_of, operation_of
from memsyn.kernels.rules import Axis


class Tracer(TorchFunctionMode, ABC):
    """Sees every torch operation.

    Operations that take a value go to `run_with_values`, all others to `run_without_values`.
    """

    decompositions: Mapping[Function, Callable[..., Any]] = DECOMPOSITIONS
    """Function -> its equivalent in plain operations."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        # An id stays valid only while its object lives. Each Value holds its tensor, so its id is not reused.
        self.values = {id(p): Value(p, frozenset((name,)), (name,)) for name, p in parameters.items()}

    def __torch_function__(
        self, function: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and (self._holds(args) or (kwargs and self._holds(kwargs.values()))):
            if function in self.decompositions:
                # Torch switches a mode off while it handles an operation. Here it must see the plain operations inside.
                with self:
                    output = self.decompositions[function](*args, **kwargs)
                if output is not NotImplemented:
                    return output
            return self.run_with_values(function, args, kwargs)
        return self.run_without_values(function, args, kwargs)

    def _holds(self, args: Iterable[Any]) -> bool:
        values = self.values
        for arg in args:  # noqa: SIM110 (every operation comes through here, and a generator takes twice as long)
            if id(arg) in values or (type(arg) in (list, tuple) and self._holds(arg)):
                return True
        return False

    @abstractmethod
    def run_with_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation that takes a value."""

    def run_without_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run any other operation."""
        return function(*args, **kwargs)

    def _follow(self, function: Function, values: Mapping[str, Value], output: Any) -> None:
        """Note the results of an operation on values alone: they are values too."""
        place, first = next(iter(values.items()))
        names = frozenset().union(*(value.names for value in values.values()))
        for index, tensor in enumerate(tensors_of(output)):
            # Some operations return their input itself: `W.contiguous()` is W. Then the old path stays.
            if tensor.requires_grad and id(tensor) not in self.values:
                path = (*first.path, f"{name_of(function)}.{place}.{index}")
                self.values[id(tensor)] = Value(tensor, names, path)


class _Event(NamedTuple):
    """One run of an operation that took a value, as the shape tracer saw it."""

    with_samples: bool
    """Whether an argument depends on samples."""
    in_order: bool
    """Whether all tensors hold the samples in the order of the batch, with the same number of rows per sample."""
    out: torch.Size | None
    """The output's shape; None if the output is not one tensor, or if the operation overwrote a value."""
    args: dict[str, torch.Size]
    """Place -> shape of the tensor."""


@final
class ShapeTracer(Tracer):
    """Notes the operations at each path and the shapes of their tensors during a forward pass. Changes nothing."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], batch: Iterable[Tensor]) -> None:
        super().__init__(parameters)
        self.events: dict[ValuePath, list[_Event]] = {}
        self.written: set[str] = set()
        """Parameters that an operation may write to."""
        self._samples = {id(tensor): tensor for tensor in batch}
        self._selected: dict[int, Tensor] = {}
        """The tensors that depend on samples and have rows that the data chose or reordered."""

    def run_without_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the operation. If an argument depends on samples, mark the result as depending on samples."""
        output = function(*args, **kwargs)
        given = [value for value in arguments(function, args, kwargs).values() if isinstance(value, Tensor)]
        if any(map(self._depends_on_samples, given)):
            self._mark(function, output, given, args if changes_its_input(function, kwargs) else ())
        return output

    def run_with_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the operation, note its shapes, and note whether the result is a value or depends on samples."""
        tensors = {place: v for place, v in arguments(function, args, kwargs).items() if isinstance(v, Tensor)}
        # Before the operation runs, since an in-place one (`squeeze_`) may change the shape of its argument.
        shapes = {place: tensor.shape for place, tensor in tensors.items()}
        values = {place: self.values[id(tensor)] for place, tensor in tensors.items() if id(tensor) in self.values}
        with_samples = any(self._depends_on_samples(t) for place, t in tensors.items() if place not in values)
        output = function(*args, **kwargs)
        changed = changes_its_input(function, kwargs)
        result = args[0] if output is None and changed else output
        if with_samples:
            self._mark(function, result, list(tensors.values()), args if changed else ())
        if not any(tensor.requires_grad for tensor in tensors_of(result)):
            return output
        # With max_norm, a lookup rescales the rows of the table itself.
        if function in (F.embedding, F.embedding_bag) and arguments(function, args, kwargs).get("max_norm") is not None:
            self.written.update(*(value.names for value in values.values()))
        # After an in-place change, a value no longer holds what its path says.
        overwrites_value = changed and id(args[0]) in self.values
        in_order = not any(id(tensor) in self._selected for tensor in (*tensors.values(), *tensors_of(result)))
        out = result.shape if isinstance(result, Tensor) and not overwrites_value else None
        for place, value in values.items():
            self.events.setdefault(path_of(value, function, place), []).append(
                _Event(with_samples, in_order, out, shapes)
            )
        if not with_samples:
            self._follow(function, values, result)
        return output

    def _depends_on_samples(self, tensor: Tensor) -> bool:
        known = id(tensor) in self._samples
        # A tensor with a graph that is not a value was computed from parameters and samples.
        return known or (tensor.grad_fn is not None and id(tensor) not in self.values)

    def _mark(self, function: Function, output: Any, given: Sequence[Tensor], changed: Sequence[Any]) -> None:
        """Mark the result as depending on samples, and as selected if the data chose its rows, now or before.

        A tensor that was written to keeps its own order of rows.
        """
        if changed:
            written = changed[0]
            self._samples[id(written)] = written
            return
        selected = any(id(tensor) in self._selected for tensor in given) or (
            (selects := operation_of(function).selects) is not None and selects(given, self._depends_on_samples)
        )
        for tensor in tensors_of(output):
            self._samples[id(tensor)] = tensor
            if selected:
                self._selected[id(tensor)] = tensor


def splits_between(one: ShapeTracer, two: ShapeTracer) -> dict[ValuePath, Split | None]:
    """Path -> split, from a run with one sample and a run with two; None if the batch axis stays unknown."""
    return {path: _compare(one.events.get(path, []), events) for path, events in two.events.items()}


def _compare(ones: Sequence[_Event], twos: Sequence[_Event]) -> Split | None:
    if len(ones) != len(twos):
        return None
    merged: Split | None = None
    for one, two in zip(ones, twos, strict=True):
        split = _compare_events(one, two)
        merged = split if merged is None else merge(merged, split)
        if merged is None:
            return None
    return merged


def merge(left: Split | None, right: Split | None) -> Split | None:
    """The split that holds for both of two uses at one path; None if their batch axes differ."""
    if left is None or right is None:
        return None
    try:
        args = {
            place: _same(left.args.get(place), right.args.get(place)) for place in left.args.keys() & right.args.keys()
        }
        return Split(_same(left.out, right.out), {**left.args, **right.args, **args})
    except ValueError:
        return None


def _same(left: Axis | None, right: Axis | None) -> Axis | None:
    # The same dimension may hold one row per sample in one use and several in another. Then Axis(0, folded=True) holds
    # for both. Two folded axes must agree in the order of the samples.
    if left is None or right is None or left.dim != right.dim:
        if left != right:
            raise ValueError
        return left
    if left.folded and right.folded and left.minor != right.minor:
        raise ValueError
    return left if left.folded else right


def _compare_events(one: _Event, two: _Event) -> Split | None:
    if one.args.keys() != two.args.keys() or not (one.in_order and two.in_order):
        return None
    try:
        args = {place: _axis_that_doubles(one.args[place], shape) for place, shape in two.args.items()}
        if one.out is None or two.out is None:
            # Several outputs, as of `W.chunk(2)`, are fine if no sample went in: then they are values. Otherwise the
            # batch axes of the outputs are not known.
            return Split(None, {}) if not two.with_samples and one.out is two.out and not any(args.values()) else None
        out = _axis_that_doubles(one.out, two.out)
    except ValueError:
        return None
    if out is None:
        return None if two.with_samples else Split(None, {})
    return Split(out, args)


def _axis_that_doubles(one: torch.Size, two: torch.Size) -> Axis | None:
    # Shapes of different length raise the same ValueError, through `strict`.
    dims = [dim for dim, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if not dims:
        return None
    if len(dims) > 1 or two[dims[0]] != 2 * one[dims[0]]:
        raise ValueError
    return Axis(dims[0], folded=one[dims[0]] > 1)


def guess(traced: ShapeTracer, num_samples: int) -> dict[ValuePath, Split | None]:
    """Path -> split for a batch that cannot be cut into samples, by the sizes of dimensions alone.

    The batch axis is the first dimension as long as the number of samples, or else dimension 0 if its length is a
    multiple. For 6 samples: (6, 8) gives Axis(0), (24, 8) gives Axis(0, folded=True), (5, 8) gives None.
    """

    def axis(shape: torch.Size) -> Axis | None:
        exact = [dim for dim, size in enumerate(shape) if size == num_samples]
        folded = [dim for dim, size in enumerate(shape[:1]) if size % num_samples == 0]
        return Axis((exact or folded)[0], folded=not exact) if exact or folded else None

    found: dict[ValuePath, Split | None] = {}
    for path, (event, *_) in traced.events.items():
        if not event.in_order:
            found[path] = None
            continue
        out = axis(event.out) if event.out is not None else None
        if out is None:
            found[path] = None if event.with_samples else Split(None, {})
        else:
            found[path] = Split(out, {place: axis(shape) for place, shape in event.args.items()})
    return found
