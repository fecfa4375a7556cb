"""The recorder: keeps each use of a parameter during a forward pass, until its output gradient arrives.

Owns cutting the graph between values and samples, and grouping the parameters that are used together. Must not know
formulas.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
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
    keep_call,
    path_of,
    tensors_of,
    unneeded_places,
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
    """Parameters that must be measured together, and their uses.

    Two parameters are in one group if a value is computed from both. For `W = scale * direction`, the gradient of each
    use of W must be split between `scale` and `direction`. So neither can be measured before all uses of W have their
    gradients.
    """

    names: frozenset[str]
    uses: list[tuple[Call, str]] = field(default_factory=list)
    """Each call, and the place of the value in it."""
    num_waiting: int = 0
    """The number of calls that still wait for their gradient."""

    def calls(self) -> list[Call]:
        """The calls of the uses, each once."""
        # Most parameters have one use, and every batch comes through here for each of them.
        return [self.uses[0][0]] if len(self.uses) == 1 else unique(call for call, _ in self.uses)


def group_holding(groups: dict[str, ParameterGroup], names: frozenset[str]) -> ParameterGroup:
    """The group of these parameters. If they are in several groups, merge these into one.

    {a} and {b} become {a, b} when a value is computed from a and b.

    Args:
        groups: parameter -> its group; new groups are added.
        names: the parameters.
    """
    if len(names) == 1:
        (name,) = names
        own = groups.get(name)
        if own is None:
            own = groups[name] = ParameterGroup(names)
        return own
    found = unique(group for name in names if (group := groups.get(name)) is not None)
    if len(found) == 1 and names <= found[0].names:
        return found[0]
    group = ParameterGroup(names.union(*(other.names for other in found)))
    for other in found:
        group.uses += other.uses
    groups.update(dict.fromkeys(group.names, group))
    return group


class Plan(NamedTuple):
    """What the recorder does with an operation that takes values."""

    splits: Mapping[str, Split] | None
    """Place of a value -> split; None if the batch axes are not known."""
    makes_value: bool
    """Whether the result is another value, computed only from parameters."""
    unneeded: frozenset[str | None]
    """The places of tensors that no rule needs."""


@final
class Plans:
    """The plans of all operations that the route check has seen. Each plan is made once, then kept."""

    def __init__(self, splits: Mapping[ValuePath, Split | None]) -> None:
        self._splits = splits
        self._made: dict[tuple[Any, ...], Plan] = {}

    def find(self, function: Function, values: Mapping[str, Value]) -> Plan:
        """The plan for an operation that takes these values."""
        key = (function, *[(place, value.path) for place, value in values.items()])
        plan = self._made.get(key)
        if plan is None:
            plan = self._made[key] = self._make(function, values)
        return plan

    def _make(self, function: Function, values: Mapping[str, Value]) -> Plan:
        splits = {place: self._splits.get(path_of(value, function, place)) for place, value in values.items()}
        known = {place: split for place, split in splits.items() if split is not None}
        makes_value = {split.out is None for split in known.values()}
        # Leave the operation to autograd if the batch axes of an argument are not known, or if one argument was seen
        # with a result that is a value, and another with a result that depends on samples.
        if len(known) < len(values) or len(makes_value) > 1:
            return Plan(None, False, frozenset())
        return Plan(known, all(makes_value), unneeded_places(function, values))


class _AliasFromRoot(torch.autograd.Function):
    """An alias of a tensor, with the root as its input: the graph starts at the root, not at the parameters."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root: Tensor) -> Tensor:
        # Not `tensor.view_as(tensor)`: its result is a view for autograd, and a hook on it would miss in-place changes.
        return tensor.new_empty(0).set_(tensor)  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros(())


def attach_to_root(result: Tensor, root: Tensor, *, changed: bool, saves_output: bool) -> Tensor:
    """Prepare the result of an operation on detached parameters, so that a hook on it receives its gradient.

    The result must be part of the graph. It must not be a view for autograd: a hook on a view misses the gradient if the
    view is later changed in-place. The cases:

    | the operation wrote to its input | the result requires a gradient | it is a view | what is returned            |
    |----------------------------------|--------------------------------|--------------|-----------------------------|
    | yes                              | no                             | either       | the result + root, in-place |
    | yes                              | yes                            | either       | the result                  |
    | no                               | no                             | either       | an alias made from the root |
    | no                               | yes                            | yes          | an alias that is no view; a copy if the backward pass reads the output |
    | no                               | yes                            | no           | the result                  |

    The second column is "no" in the first layer of a network, and "yes" if an input of the operation already has a
    graph. An example of a view: `F.linear` of a (B, T, in) input is a view of the (B T, out) product.
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
    """The phase of a pass."""

    FORWARD = "uses are recorded; some may already receive gradients"
    BACKWARD = (
        "uses receive gradients, and groups are handed over; operations that a checkpoint repeats are not recorded"
    )


@final
class Recorder(Tracer):
    """Cuts the graph between values and samples, and calls `consume` for each group that has all its gradients.

    After `consume`, only the graph may still hold the tensors. Reusing memory that was just freed makes the pass fast.

    An example: a weight W that two layers share, and a bias b of the first layer.

        forward     Two calls are recorded, `linear(x, W, b)` and `linear(h, W)`. Each keeps what its rules need.
        start       Two groups are made: {W} waits for both calls, {b} waits for the first call. So two groups must read
                    the first call, and one group the second. A call whose parameters have no other use needs no group.
        backward    The gradient of the second call arrives: {W} waits for one more call. The gradient of the first call
                    arrives: {W} and {b} are complete and are consumed. No group needs the calls any more, so their
                    tensors are freed.
        finish      Groups that are still incomplete are consumed with the uses that have a gradient. The objective does
                    not depend on their other uses.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plans: Plans,
        consume: Callable[[frozenset[str], Sequence[tuple[Call, str]]], None],
        *,
        keeps: bool = False,
    ) -> None:
        super().__init__(parameters)
        self.plans, self.consume = plans, consume
        self.keeps = keeps
        """Whether calls keep their tensors after they were consumed."""
        self.root = torch.zeros((), requires_grad=True)
        """The leaf at which the graph starts, in place of the parameters."""
        self.unknown: set[str] = set()
        """Parameters with a use for which no plan is known."""
        self._calls: list[Call] = []
        self._groups: dict[str, ParameterGroup] = {}
        self._phase = _Phase.FORWARD
        self._is_last = False
        """Whether this is the last backward pass over these calls."""

    def run_with_values(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make another value, or record a use, as the plan says. Without a plan, leave the operation to autograd."""
        given = arguments(function, args, kwargs)
        values = {place: value for place, argument in given.items() if (value := self.values.get(id(argument)))}
        plan = self.plans.find(function, values)
        if plan.splits is None:
            output = function(*args, **kwargs)
            result = args[0] if output is None and changes_its_input(function, kwargs) else output
            # A result without a gradient (a shape, a comparison) does not make the parameter matter.
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
        call = None
        if self._phase is _Phase.FORWARD:
            assert plan.splits is not None
            call = keep_call(function, args, kwargs, given, values, plan.splits, plan.unneeded, changed=changed)
        # The operation runs on detached values, so autograd computes no weight gradient and keeps nothing for one.
        kept = {} if call is None or changed else call.tensors
        cut = {place: kept[place] if place in kept else value.tensor.detach() for place, value in values.items()}
        new_args, new_kwargs = with_tensors(function, args, kwargs, cut)
        output = function(*new_args, **new_kwargs)
        saves_output = operation_of(function).saves_output
        result = attach_to_root(
            args[0] if output is None else output, self.root, changed=changed, saves_output=saves_output
        )
        if call is not None:
            # These tensors must not change before the rules read them. `Call.is_intact` compares the versions.
            call.versions = {place: version_of(tensor) for place, tensor in call.tensors.items()}
            result.register_hook(partial(self._receive_grad, call))
            self._calls.append(call)
        # After an in-place operation, the model goes on with the object that was changed, not with a new one.
        return output if changed else result

    def start_backward(self, *, last: bool) -> None:
        """Group the parameters for one backward pass; the forward pass has recorded all uses."""
        counts = Counter([name for call in self._calls for value in call.values.values() for name in value.names])
        for call in self._calls:
            if self._phase is _Phase.BACKWARD:  # the gradient of the previous objective
                call.grad = None
            # Most parameters have one use. Then no other gradient belongs to theirs, and they need no group. But a call
            # that has its gradient already waits in a group for the end.
            names = [name for value in call.values.values() for name in value.names]
            has_others = len(names) > len(call.values) or max(map(counts.__getitem__, names)) > 1
            call.is_alone = call.grad is None and not has_others
            for place, value in () if call.is_alone else call.values.items():
                group_holding(self._groups, value.names).uses.append((call, place))
        for group in unique(self._groups.values()):
            calls = group.calls()
            group.num_waiting = len(calls)
            for call in calls:
                call.num_groups += 1
        self._phase, self._is_last = _Phase.BACKWARD, last
        if last:
            # From here on, only the groups and the graph hold the calls, so each call is freed with them.
            self._calls.clear()

    def _receive_grad(self, call: Call, grad: Tensor) -> None:
        with without_function_modes():
            # The model or a scorer may differentiate a part of the forward pass at once. Groups do not exist yet, so
            # the gradient waits in the call.
            if self._phase is _Phase.FORWARD:
                own = grad.detach()  # with `create_graph=True`, it has a graph
                call.grad = own if call.grad is None else call.grad + own
                return
            call.grad = grad
            if call.is_alone:
                self._hand_over_alone(call)
                return
            names = [name for value in call.values.values() for name in value.names]
            for group in unique([self._groups[name] for name in names if name in self._groups]):
                group.num_waiting -= 1
                if group.num_waiting == 0:
                    self._hand_over(group)

    def _hand_over_alone(self, call: Call) -> None:
        """Hand over a call whose parameters have no other use, and free its tensors."""
        for place, value in call.values.items():
            # A use of the parameter may have been left to autograd.
            if value.names.isdisjoint(self.unknown):
                self.consume(value.names, [(call, place)])
        if not self.keeps:
            call.grad = None
            if self._is_last:
                call.tensors.clear()

    def hand_over_early(self, names: Container[str]) -> set[str]:
        """Hand over, in the forward pass, the calls that have their gradients and use nothing but `names`.

        For a scorer that differentiates parts of the model itself, and knows that each of `names` is used once. Then no
        other gradient belongs to these calls and parameters, and their tensors can be freed now.

        Returns:
            The parameters that were handed over: they must not be used again.
        """
        found: set[str] = set()
        with without_function_modes():
            for call in [call for call in self._calls if call.grad is not None]:
                own = [value.names for value in call.values.values()]
                if all(len(members) == 1 and all(name in names for name in members) for members in own):
                    for place, value in call.values.items():
                        self.consume(value.names, [(call, place)])
                    call.grad = None
                    call.tensors.clear()
                    self._calls.remove(call)
                    found.update(*own)
        return found

    def _hand_over(self, group: ParameterGroup) -> None:
        for name in group.names:
            del self._groups[name]
        # A use was left to autograd. So the recorded uses are not all uses, and their sum would be wrong.
        if group.names & self.unknown:
            self.unknown |= group.names
            return
        # Listed before the uses without a gradient are removed, since their tensors must be freed too.
        calls = group.calls()
        group.uses = [(call, place) for call, place in group.uses if call.grad is not None]
        self.consume(group.names, group.uses)
        # The graph keeps the calls alive until the end of the pass, so free their tensors now.
        for call in calls:
            call.num_groups -= 1
            if call.num_groups == 0 and not self.keeps:
                call.grad = None
                if self._is_last:
                    call.tensors.clear()

    def finish(self) -> None:
        """Hand over the incomplete groups: the objective does not depend on some or all of their uses."""
        with without_function_modes():
            for group in unique(self._groups.values()):
                self._hand_over(group)
