"""A pass over a batch in which the uses of parameters are kept until their gradients come.

Owns cutting the graph between values and samples, and handing over what was used together. Knows no formulas.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsyn.engine.calls import (
    Call,
    Function,
    Path,
    Split,
    Value,
    arguments,
    changes_its_input,
    path_of,
    replaced,
    rule_of,
    tensors_of,
)
from memsyn.engine.tracer import Tracer
from memsyn.errors import ModelError


@dataclass(eq=False)
class Group:
    """Parameters that are measured together, since some value is computed of several; and their uses."""

    names: frozenset[str]
    uses: list[tuple[Call, str]] = field(default_factory=list)
    """Calls, and the place of the value in each."""
    num_waiting: int = 0


SAVE_NO_OUTPUT = frozenset((F.linear, torch.matmul, Tensor.matmul, torch.addmm, F.embedding))
"""Operations whose backward pass does not read what they gave."""


LARGE = frozenset[str | None](("input", "other", "mat1"))
"""Arguments that hold activations, and are kept only for a rule that needs them."""


class Plan(NamedTuple):
    """What to do with one way of calling an operation."""

    splits: Mapping[str, Split] | None
    """What it does with samples, by the place of each value; None if that is not known."""
    makes_value: bool
    """Whether nothing but a further value comes of it."""
    ruled: bool
    """Whether every value has a rule."""
    unneeded: frozenset[str | None]
    """The places of tensors that no rule of its values needs."""


@final
class Plans:
    """The plans of all operations that the guard has seen, each made once."""

    def __init__(self, splits: Mapping[Path, Split | None]) -> None:
        self._splits = splits
        self._made: dict[tuple[Any, ...], Plan] = {}

    def find(self, function: Function, met: Mapping[str, Value]) -> Plan:
        """What to do with an operation that takes these values."""
        key = (function, *[(place, value.path) for place, value in met.items()])
        plan = self._made.get(key)
        if plan is None:
            plan = self._made[key] = self._make(function, met)
        return plan

    def _make(self, function: Function, met: Mapping[str, Value]) -> Plan:
        splits = {place: self._splits.get(path_of(value, function, place)) for place, value in met.items()}
        known = {place: split for place, split in splits.items() if split is not None}
        makes_value = {split.out is None for split in known.values()}
        if len(known) < len(met) or len(makes_value) > 1:
            return Plan(None, False, False, frozenset())
        rules = [rule for place in met if (rule := rule_of(function, place)) is not None]
        ruled = len(rules) == len(met)
        unneeded = LARGE - {rule.operand for rule in rules} - met.keys() if ruled else frozenset()
        return Plan(known, all(makes_value), ruled, unneeded)


class _Alias(torch.autograd.Function):
    """The same numbers in the same memory, differentiable if they were not, and no view.

    The graph begins at the root, in place of the parameters; and a hook on a view would miss the gradient if the view
    is changed in place.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root: Tensor) -> Tensor:
        return tensor.new_empty(0).set_(tensor)  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros(())


@final
class Recorder(Tracer):
    """Cuts the graph between values and samples, and hands each group of parameters over when its gradients came.

    Nothing but the graph may hold a tensor longer than that: freshly freed memory is what makes the pass fast.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        plans: Plans,
        consume: Callable[[Group], None],
        *,
        keeps: bool = False,
        once: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(parameters)
        self.plans, self.consume, self.keeps, self.once = plans, consume, keeps, once
        self.root = torch.zeros((), requires_grad=True)
        """Where the graph begins, in place of the parameters."""
        self.unknown: set[str] = set()
        """Parameters used where nothing is known about the samples."""
        self._calls: list[Call] = []
        self._groups: dict[str, Group] = {}
        self._passive = self._last = False
        self.begun: set[Call] = set()
        """The uses that layers begin with, or that follow them."""
        self.newest: Call | None = None
        self._done: set[str] = set()

    def meet(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Make a further value, or record a use, as the guard has seen it; what it has not seen is left to autograd."""
        given = arguments(function, args, kwargs)
        met = {place: value for place, argument in given.items() if (value := self.values.get(id(argument)))}
        plan = self.plans.find(function, met)
        if plan.splits is None:
            output = function(*args, **kwargs)
            result = args[0] if output is None and changes_its_input(function, kwargs) else output
            if any(tensor.requires_grad for tensor in tensors_of(result)):
                self.unknown.update(*(value.names for value in met.values()))
            return output
        if plan.makes_value:
            output = function(*args, **kwargs)
            self._follow(function, met, output)
            return output
        return self._use(function, args, kwargs, given, met, plan)

    def _use(
        self,
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Mapping[str, Any],
        met: Mapping[str, Value],
        plan: Plan,
    ) -> Any:
        changed = changes_its_input(function, kwargs)
        if self._done:
            self._check_once(met)
        call = None if self._passive else self._keep(function, args, kwargs, given, met, plan)
        if call is not None and changed:  # what is there now is what it needs
            first = args[0].data_ptr()
            call.tensors = {place: t.clone() if t.data_ptr() == first else t for place, t in call.tensors.items()}
        cut = {place: value.tensor.detach() for place, value in met.items()}
        new_args, new_kwargs = replaced(function, args, kwargs, cut)
        output = function(*new_args, **new_kwargs)
        result = args[0] if output is None else output
        if changed and not result.requires_grad:
            result.add_(self.root)
        elif not changed and (result._is_view() or not result.requires_grad):
            if not result.requires_grad:
                result = _Alias.apply(result, self.root)  # type: ignore[no-untyped-call]
            elif function in SAVE_NO_OUTPUT:
                result = torch.ops.aten._unsafe_view(result, result.shape)  # an alias too, and no view to autograd
            else:
                result = result.clone()
            output = result
        if call is not None:
            call.versions = {place: tensor._version for place, tensor in call.tensors.items()}
            result.register_hook(partial(self._on_grad, call))
            self._calls.append(call)
            self.newest = call
        return output

    @staticmethod
    def _keep(
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: Mapping[str, Any],
        met: Mapping[str, Value],
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
            again = replaced(function, args, kwargs, dict.fromkeys(kept))
        return Call(function, options, met, plan.splits, kept, {}, again)

    def start_backward(self, *, last: bool) -> None:
        """All uses are known now: group the parameters that share a value, for one backward pass."""
        for call in self._calls:
            if self._passive:  # of an objective before
                call.grad = None
            for place, value in call.values.items():
                self._group(value.names).uses.append((call, place))
        for group in {id(group): group for group in self._groups.values()}.values():
            group.num_waiting = len({id(call) for call, _ in group.uses})
            for call in {id(call): call for call, _ in group.uses}.values():
                call.num_groups += 1
        self._passive, self._last = True, last
        if last:
            self._calls.clear()

    def _group(self, names: frozenset[str]) -> Group:
        if len(names) == 1:
            (name,) = names
            return self._groups.setdefault(name, Group(names))
        found = {id(g): g for name in names if (g := self._groups.get(name)) is not None}
        if len(found) == 1 and names <= next(iter(found.values())).names:
            return next(iter(found.values()))
        group = Group(names.union(*(g.names for g in found.values())))
        for other in found.values():
            group.uses += other.uses
        self._groups.update(dict.fromkeys(group.names, group))
        return group

    def differentiate(self, y: Tensor) -> None:
        """Take the gradient of 1/2 sum y^2, in the middle of the forward pass, up to the uses nearest to y.

        What is used once is handed over now, and its tensors are let go of.
        """
        if y.requires_grad:
            engine, gradient = torch.autograd.Variable._execution_engine, y.detach()
            engine.run_backward((y,), (gradient,), False, False, (self.root,), True, accumulate_grad=True)
            self.root.grad = None

    def _check_once(self, met: Mapping[str, Value]) -> None:
        again = sorted(name for value in met.values() for name in value.names if name in self._done)
        if again:
            raise ModelError(
                f"{', '.join(again)}: used once in the batch that was looked at first, and more than once in a later "
                "one. Let the first batch be one in which it is used more often."
            )

    def _on_grad(self, call: Call, grad: Tensor) -> None:
        if not self._passive:
            self._at_once(call, grad)
            return
        call.grad = grad
        with torch._C.DisableTorchFunction():
            names = [name for value in call.values.values() for name in value.names]
            for group in {id(g): g for name in names if (g := self._groups.get(name)) is not None}.values():
                group.num_waiting -= 1
                if group.num_waiting == 0:
                    self._hand_over(group)

    def _at_once(self, call: Call, grad: Tensor) -> None:
        """Only what a layer begins with has no further gradients to come."""
        with torch._C.DisableTorchFunction():
            own = [value.names for value in call.values.values()]
            if call not in self.begun or not all(len(names) == 1 and names <= self.once for names in own):
                call.grad = grad.clone() if call.grad is None else call.grad + grad  # the memory is the model's
                return
            call.grad = grad
            for place, value in call.values.items():
                self.consume(Group(value.names, [(call, place)]))
            self._done.update(*own)
            call.grad = None
            call.tensors.clear()
            self._calls.remove(call)

    def _hand_over(self, group: Group) -> None:
        for name in group.names:
            del self._groups[name]
        if group.names & self.unknown:
            self.unknown |= group.names
            return
        calls = {id(call): call for call, _ in group.uses}.values()
        group.uses = [(call, place) for call, place in group.uses if call.grad is not None]
        self.consume(group)
        for call in calls:  # the graph, and with it the call, lives on until the end of the pass
            call.num_groups -= 1
            if call.num_groups == 0 and not self.keeps:
                call.grad = None
                if self._last:
                    call.tensors.clear()

    def finish(self) -> None:
        """Hand over the groups of which some uses, or all, had no part in the objective."""
        with torch._C.DisableTorchFunction():
            for group in list({id(group): group for group in self._groups.values()}.values()):
                self._hand_over(group)
