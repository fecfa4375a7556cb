"""A pass over a batch in which the uses of parameters are kept until their gradients come.

Owns cutting the graph between values and samples, and handing over what was used together. Knows no formulas.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, TypeVar, final

import torch
from torch import Tensor, nn

from memsyn.engine.calls import (
    Call,
    Split,
    Value,
    ValuePath,
    arguments,
    changes_its_input,
    path_of,
    tensors_of,
    with_tensors,
)
from memsyn.engine.tracer import Tracer
from memsyn.kernels.operations import Function, operation_of
from memsyn.torch_private import is_view, unviewed, version_of, without_function_modes

Item = TypeVar("Item")


def unique(items: Iterable[Item]) -> list[Item]:
    """The items in order, each object once."""
    return list({id(item): item for item in items}.values())


@dataclass(eq=False)
class ParameterGroup:
    """Parameters that are measured together, since some value is computed of several; and their uses.

    Two parameters are in one group if a value is computed of both: with `W = scale * direction`, the gradient of one
    use of W has to be split between `scale` and `direction`, so neither can be measured before all uses of W have their
    gradients.
    """

    names: frozenset[str]
    uses: list[tuple[Call, str]] = field(default_factory=list)
    """Calls, and the place of the value in each."""
    num_waiting: int = 0
    """Calls whose gradient has yet to come."""


class Plan(NamedTuple):
    """What to do with one way of calling an operation."""

    splits: Mapping[str, Split] | None
    """What it does with samples, by the place of each value; None if that is not known."""
    makes_value: bool
    """Whether nothing but a further value comes of it."""
    unneeded: frozenset[str | None]
    """The places of tensors that no rule of its values needs."""


@final
class Plans:
    """The plans of all operations that the route check has seen, each made once."""

    def __init__(self, splits: Mapping[ValuePath, Split | None]) -> None:
        self._splits = splits
        self._made: dict[tuple[Any, ...], Plan] = {}

    def find(self, function: Function, values: Mapping[str, Value]) -> Plan:
        """What to do with an operation that takes these values."""
        key = (function, *[(place, value.path) for place, value in values.items()])
        plan = self._made.get(key)
        if plan is None:
            plan = self._made[key] = self._make(function, values)
        return plan

    def _make(self, function: Function, values: Mapping[str, Value]) -> Plan:
        splits = {place: self._splits.get(path_of(value, function, place)) for place, value in values.items()}
        known = {place: split for place, split in splits.items() if split is not None}
        makes_value = {split.out is None for split in known.values()}
        if len(known) < len(values) or len(makes_value) > 1:
            return Plan(None, False, frozenset())
        operation = operation_of(function)
        rules = [rule for place in values if (rule := operation.rules.get(place)) is not None]
        ruled = len(rules) == len(values)
        unneeded = operation.activations - {rule.operand for rule in rules} - values.keys() if ruled else frozenset()
        return Plan(known, all(makes_value), unneeded)


class _AliasFromRoot(torch.autograd.Function):
    """The same numbers in the same memory, as the result of the root: the graph begins there, not at the parameters."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root: Tensor) -> Tensor:
        return tensor.new_empty(0).set_(tensor)  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros(())


def attach_to_root(result: Tensor, root: Tensor, *, changed: bool, saves_output: bool) -> Tensor:
    """The result of an operation whose parameters were detached, in a form whose gradient a hook can catch.

    The result must be part of the graph, and no view to autograd: a hook on a view would miss the gradient if somebody
    later writes to the view in place. The cases:

    | the operation wrote to its input | the result requires a gradient | it is a view | what is done            |
    |----------------------------------|--------------------------------|--------------|-------------------------|
    | yes                              | no                             | either       | add the root in place   |
    | yes                              | yes                            | either       | nothing                 |
    | no                               | no                             | either       | an alias made of root   |
    | no                               | yes                            | yes          | an alias that is no view, or a copy if the backward pass reads the output |
    | no                               | yes                            | no           | nothing                 |

    The second column is "yes" when an activation before it has a graph already; the first layer of a network is a "no".
    `F.linear` of a (B, T, in) input is a view of the (B T, out) product, for instance.
    """  # noqa: E501
    if changed:
        return result if result.requires_grad else result.add_(root)
    if not result.requires_grad:
        alias: Tensor = _AliasFromRoot.apply(result, root)  # type: ignore[no-untyped-call]
        return alias
    if is_view(result):
        return result.clone() if saves_output else unviewed(result)
    return result


class _Phase(Enum):
    """Where a pass is."""

    FORWARD = "uses are recorded, and may get gradients already"
    BACKWARD = "uses get gradients, and groups are handed over; what runs again for a checkpoint is not recorded"


@final
class Recorder(Tracer):
    """Cuts the graph between values and samples, and hands each group of parameters over when its gradients came.

    Nothing but the graph may hold a tensor longer than that: freshly freed memory is what makes the pass fast.

    How a group lives, for a weight that two layers share and a bias that one of them has:

        forward     two calls, `linear(x, W, b)` and `linear(h, W)`; each keeps what its rules need
        start       groups {W: both calls, waits for 2}, {b: the first call, waits for 1}; the first call is read by 2
                    groups, the second by 1
        backward    the second call's gradient comes: W waits for 1. The first one's comes: W and b wait for 0 and are
                    handed over. After that no group has to read either call, so their tensors are let go of
        finish      groups that still wait are handed over with the uses that got a gradient: the others had no part in
                    the objective
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plans: Plans,
        consume: Callable[[ParameterGroup], None],
        *,
        keeps: bool = False,
    ) -> None:
        super().__init__(parameters)
        self.plans, self.consume = plans, consume
        self.keeps = keeps
        """Whether calls keep their tensors after their groups were handed over."""
        self.root = torch.zeros((), requires_grad=True)
        """Where the graph begins, in place of the parameters."""
        self.unknown: set[str] = set()
        """Parameters used where nothing is known about the samples."""
        self._calls: list[Call] = []
        self._groups: dict[str, ParameterGroup] = {}
        self._phase = _Phase.FORWARD
        self._is_last = False
        """Whether the present backward pass is the last one over these calls."""

    def run_with_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make a further value, or record a use, as the route check has seen it; leave anything else to autograd."""
        given = arguments(function, args, kwargs)
        values = {place: value for place, argument in given.items() if (value := self.values.get(id(argument)))}
        plan = self.plans.find(function, values)
        if plan.splits is None:
            output = function(*args, **kwargs)
            result = args[0] if output is None and changes_its_input(function, kwargs) else output
            if any(tensor.requires_grad for tensor in tensors_of(result)):
                self.unknown.update(*(value.names for value in values.values()))
            return output
        if plan.makes_value:
            output = function(*args, **kwargs)
            self._follow(function, values, output)
            return output
        return self._record_use(function, args, kwargs, given, values, plan)

    def _record_use(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Mapping[str, Any],
        values: Mapping[str, Value],
        plan: Plan,
    ) -> Any:
        changed = changes_its_input(function, kwargs)
        call = self._keep(function, args, kwargs, given, values, plan) if self._phase is _Phase.FORWARD else None
        if call is not None and changed:  # its rules need the input as it is now
            first = args[0].data_ptr()
            call.tensors = {place: t.clone() if t.data_ptr() == first else t for place, t in call.tensors.items()}
        # The operation runs on detached values, so autograd computes no weight gradient and keeps nothing for one.
        cut = {place: value.tensor.detach() for place, value in values.items()}
        new_args, new_kwargs = with_tensors(function, args, kwargs, cut)
        output = function(*new_args, **new_kwargs)
        saves_output = operation_of(function).saves_output
        result = attach_to_root(
            args[0] if output is None else output, self.root, changed=changed, saves_output=saves_output
        )
        if call is not None:
            # What the rules will read must not change until then: their versions tell (see Call.is_intact).
            call.versions = {place: version_of(tensor) for place, tensor in call.tensors.items()}
            result.register_hook(partial(self._receive_grad, call))
            self._calls.append(call)
        return output if changed else result

    @staticmethod
    def _keep(
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Mapping[str, Any],
        values: Mapping[str, Value],
        plan: Plan,
    ) -> Call:
        """Keep only what the rules of the values need, and small things like statistics; all, if one has no rule."""
        kept: dict[str, Tensor] = {}
        options: dict[str, Any] = {}
        for place, value in given.items():
            if not isinstance(value, Tensor):
                options[place] = value
            elif place not in plan.unneeded:
                kept[place] = value.detach()
        assert plan.splits is not None
        again = None
        if len(kept) + len(options) == len(given):
            again = with_tensors(function, args, kwargs, dict.fromkeys(kept))
        return Call(function, options, values, plan.splits, kept, {}, again)

    def start_backward(self, *, last: bool) -> None:
        """All uses are known now: group the parameters that share a value, for one backward pass."""
        for call in self._calls:
            if self._phase is _Phase.BACKWARD:  # of an objective before
                call.grad = None
            for place, value in call.values.items():
                self._group(value.names).uses.append((call, place))
        for group in unique(self._groups.values()):
            calls = unique(call for call, _ in group.uses)
            group.num_waiting = len(calls)
            for call in calls:
                call.num_groups += 1
        self._phase, self._is_last = _Phase.BACKWARD, last
        if last:
            self._calls.clear()

    def _group(self, names: frozenset[str]) -> ParameterGroup:
        """The group of all these parameters; groups that meet in a value become one."""
        if len(names) == 1:
            (name,) = names
            return self._groups.setdefault(name, ParameterGroup(names))
        found = unique(group for name in names if (group := self._groups.get(name)) is not None)
        if len(found) == 1 and names <= found[0].names:
            return found[0]
        group = ParameterGroup(names.union(*(other.names for other in found)))
        for other in found:
            group.uses += other.uses
        self._groups.update(dict.fromkeys(group.names, group))
        return group

    def _receive_grad(self, call: Call, grad: Tensor) -> None:
        with without_function_modes():
            if self._phase is _Phase.FORWARD:  # somebody differentiates a part of the model that has just run
                call.grad = grad if call.grad is None else call.grad + grad
                return
            call.grad = grad
            names = [name for value in call.values.values() for name in value.names]
            for group in unique(group for name in names if (group := self._groups.get(name)) is not None):
                group.num_waiting -= 1
                if group.num_waiting == 0:
                    self._hand_over(group)

    def _hand_over(self, group: ParameterGroup) -> None:
        for name in group.names:
            del self._groups[name]
        if group.names & self.unknown:
            self.unknown |= group.names
            return
        calls = unique(call for call, _ in group.uses)
        group.uses = [(call, place) for call, place in group.uses if call.grad is not None]
        self.consume(group)
        for call in calls:  # the graph, and with it the call, lives on until the end of the pass
            call.num_groups -= 1
            if call.num_groups == 0 and not self.keeps:
                call.grad = None
                if self._is_last:
                    call.tensors.clear()

    def finish(self) -> None:
        """Hand over the groups of which some uses, or all, had no part in the objective."""
        with without_function_modes():
            for group in unique(self._groups.values()):
                self._hand_over(group)
