"""Protection by a penalty: the gradient form and the proximal form.

Owns which parameters of an optimizer are pulled, when, and by how much. The arithmetic is in `penalty`, all knowledge
of single optimizers in `optimizers`. Must not keep state on the model or its parameters, but for hooks on `state_dict`.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memsyn.errors import MemsynError, NotProtectedWarning, OptionError, ProtectionError, StrengthWarning
from memsyn.parameters import layer_of, same_values, wide_dtype
from memsyn.protecting.adapter_penalty import AdapterPenalty, adapter_slots, check_low_rank
from memsyn.protecting.optimizers import (
    GRADIENT,
    PROJECTED,
    PROXIMAL,
    Stepping,
    checked_form,
    known_kind,
    largest_stable_pull,
    step_size,
)
from memsyn.protecting.overshoot import Overshoot
from memsyn.protecting.penalty import (
    Preconditioner,
    ProtectedWeights,
    add_gradients_,
    check_placed,
    check_tensors,
    distances,
    known_rows,
    num_held,
    pull_,
)
from memsyn.protecting.predicting import Watched
from memsyn.protecting.protection import Protection, Report, is_protected
from memsyn.protecting.strength import checked_strength
from memsyn.sharding.exchange import part_beside, placed_like
from memsyn.sharding.parts import any_sharded, is_sharded, local_part, reshard
from memsyn.sharding.sums import largest_over_parts, summed_over_parts
from memsyn.torch_private import version_of
from memsyn.values.directions import excerpt
from memsyn.values.memory import Memory, check_fit, check_model
from memsyn.weights_in_effect import parameters_by_name


class _Slot(NamedTuple):
    """A protected parameter in its optimizer."""

    name: str
    parameter: nn.Parameter
    group: dict[str, Any]
    protected: ProtectedWeights
    """Of a sharded parameter, the part that this process holds."""
    is_cut: bool

    def rows(self, tensor: Tensor) -> Tensor:
        """The known rows that this process holds of a tensor like the parameter: its gradient, an optimizer's state."""
        if not self.is_cut:
            return known_rows(tensor, self.protected.omega)
        check_placed(tensor, self.parameter, self.name)
        return known_rows(local_part(tensor), self.protected.omega)

    def mark(self) -> int | float:
        """A number that changes when the parameter is written to. Steps do not count up the version of a DTensor."""
        if not self.is_cut:
            return version_of(self.parameter)
        return float(torch.linalg.vector_norm(self.protected.parameter, dtype=self.protected.anchor.dtype))


class _Held(NamedTuple):
    """What is protected; of sharded parameters the parts that lie beside those of this process."""

    memory: Memory
    excerpts: dict[str, Tensor]
    """Values of those parts of the anchor: torch.distributed.checkpoint overwrites them before `load_state_dict`."""


class _Sums(NamedTuple):
    """Sums over a protected weight."""

    bound: float
    penalty: float
    """Without the strength."""
    important: float
    """How many of its numbers have importance."""
    known: float
    """How many of its numbers the memory knows."""
    held: float
    """How many of its numbers a step pulls back by more than half of their distance."""


_Pulls = tuple[list[ProtectedWeights], list[float | Tensor], list[Preconditioner] | None]
"""The arguments of `pull_`: parameters, for each the strength times its step size, and its preconditioner if any."""


@final
class Penalising(Protection):
    """The gradient form and the proximal form: the importance of a memory is protected by a penalty."""

    def __init__(
        self,
        found: Stepping,
        model: nn.Module,
        memory: Memory,
        strength: float,
        form: str,
        device: torch.device | None,
        importance_dtype: torch.dtype | None,
        watched: Watched,
    ) -> None:
        self.strength, self.form = strength, form
        self._held_as = device, importance_dtype
        self._take(memory, model)
        self._stepped: list[_Slot] = []
        """What the step in progress moves: the parameters that had a gradient before it."""
        self._marks: list[int | float] | None = []
        """Of the parameters before a step, until a gradient was found on one."""
        super().__init__(found, model, memory.importance.keys(), watched)
        try:
            self._find_slots(found.optimizer)
        except MemsynError:
            self._let_go()
            raise

    def value(self) -> float:
        """The penalty now: lambda sum Omega (theta - theta*)^2 over the protected parameters.

        Of a model under `fully_shard`, all processes must call it together.
        """
        return self.strength * sum(own.penalty for _, own in self._sums())

    def report(self) -> Report:
        """How far outputs are predicted to have changed, how far the weights have moved, and the share that is held.

        Of a model under `fully_shard`, all processes must call it together, and all get the same.
        """
        self._check_acted()
        found, optimizer = self._sums(), self._optimizer()
        layers: dict[str, float] = {}
        for name, own in found:
            layers[layer_of(name)] = layers.get(layer_of(name), 0.0) + own.bound
        is_known = optimizer is not None and known_kind(optimizer) is not None and not self._adapted.slots
        important = int(sum(own.important for _, own in found))
        report = Report(
            self.strength * sum(own.penalty for _, own in found),
            sum(layers.values()),
            layers,
            sum(own.held for _, own in found) / max(1.0, sum(own.known for _, own in found)) if is_known else math.nan,
            form=self.form,
            strength=self.strength,
            num_weights=important if optimizer is not None and is_protected(optimizer) else 0,
        )
        return self._with_outputs(report)

    def _sums(self) -> list[tuple[str, _Sums]]:
        """Sums over each protected weight, over all processes, by its name."""
        reshard(self._model)
        slots, optimizer = self._now(), self._optimizer()
        names = [*(slot.name for slot in slots), *(slot.name for slot in self._adapted.slots)]
        sums = [[0.0] * 5 for _ in names]
        for index, moved, omega in distances(self._protected_now()):
            own = sums[index]
            own[0] += float((omega * moved.abs()).sum())
            own[2] += int(omega.count_nonzero())
            own[3] += omega.numel()
            own[1] += float((omega * moved.square_()).sum())
        if optimizer is not None and known_kind(optimizer) is not None:
            for own, slot in zip(sums, slots, strict=False):
                own[4] = float(sum(num_held(*pulls) for pulls in self._pulls(optimizer, [slot], self.strength)))
        likes = [*(slot.parameter for slot in slots), *(slot.layer.base.weight for slot in self._adapted.slots)]
        if any_sharded(likes):
            parts = [torch.tensor(own, dtype=torch.float64) for own in sums]
            sums = [own.tolist() for own in summed_over_parts(parts, likes)]
        return list(zip(names, (_Sums(*own) for own in sums), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Strength, form and the memory's values, as tensors and plain values, for `load_state_dict`.

        Those of sharded parameters are DTensors, in the memory of this handle: what torch.distributed.checkpoint loads
        into them acts at once.
        """
        return {
            "strength": self.strength,
            "form": self.form,
            "anchor": dict(self._held.memory.anchor),
            "importance": dict(self._held.memory.importance),
            "statistics": dict(self._watched.statistics.remembered),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the strength, form, anchor and importance of a saved handle.

        Raises:
            OptionError: the state did not come from `state_dict`.
            MismatchError: the state is of another architecture.
        """
        if not state.keys() >= {"strength", "form", "anchor", "importance"}:
            raise OptionError(f"expected the state of a Protection, got the keys {', '.join(map(str, state))}.")
        own, remembered = dict(state["importance"]), dict(state.get("statistics", {}))
        memory = Memory(dict(state["anchor"]), own, statistics=remembered).fitted(self._model)
        check_model(memory, self._model, parameters_by_name(self._model, memory.names))  # `protect` said what is free
        optimizer = self._optimizer()
        form = str(state["form"]) if optimizer is None else checked_form(state["form"], optimizer)
        if form == PROJECTED:
            raise OptionError("the state is of form='projected': protect with that form, then load it.")
        self.strength, self.form = checked_strength(state["strength"]), form
        before, excerpts = self._held.memory.anchor, self._held.excerpts
        self._take(memory, self._model)
        self._restored(is_same=self._is_anchor(before, excerpts))
        self._watched.statistics.take(
            memory.statistics if "statistics" in state else self._watched.statistics.remembered
        )

    def _take(self, memory: Memory, model: nn.Module) -> None:
        """Hold a memory, of sharded parameters the parts that lie beside those of this process."""
        dtype = self._held_as[1]
        reshard(model)
        own = parameters_by_name(model, memory.names)
        anchor = {name: placed_like(old, own[name]) if name in own else old for name, old in memory.anchor.items()}
        importance = {
            name: (placed_like(omega, own[name]) if name in own else omega).to(dtype or omega.dtype)
            for name, omega in memory.importance.items()
        }
        self._held = _Held(
            Memory(anchor, importance),
            {name: excerpt(local_part(old)) for name, old in anchor.items() if is_sharded(old)},
        )
        self._slots: list[_Slot] = []
        self._seen: list[Any] = []

    def _is_anchor(self, before: Mapping[str, Tensor], excerpts: Mapping[str, Tensor]) -> bool:
        """Whether an anchor is that of now, in all processes."""
        now = self._held.memory.anchor
        whole = {name for name in before.keys() & now.keys() if not any_sharded([before[name], now[name]])}
        differs = any(not same_values(before[name], now[name]) for name in whole)
        parts = excerpts.keys() & self._held.excerpts.keys()
        differs |= any(not same_values(excerpts[name], self._held.excerpts[name]) for name in parts)
        return not any(largest_over_parts([float(differs)], list(now.values())))

    def _now(self) -> list[_Slot]:
        optimizer = self._optimizer()
        if optimizer is not None:
            self._find_slots(optimizer)
        return self._slots

    def _protected_now(self) -> Iterator[ProtectedWeights]:
        """The protected weights; those in effect are computed one at a time."""
        yield from (slot.protected for slot in self._now())
        yield from (slot.protected() for slot in self._adapted.slots)

    def _find_slots(self, optimizer: Optimizer) -> None:
        """Look for the protected parameters again if the optimizer's parameters have changed.

        They have changed if one was added, removed, moved to another device, reshaped, or put into another group.
        """
        groups = optimizer.param_groups
        # `_hold` keeps views of the weights. So the address counts: if `p.data` was replaced, the views are old. That
        # of a DTensor is always 0: all processes find slots again, or none does, since they may talk about them.
        seen = [
            key
            for group in groups
            for p in group["params"]
            for key in (id(p), p.data_ptr(), p.shape, p.dtype, p.device, id(group))
        ]
        if seen == self._seen:
            self._renew_views()
            return
        reshard(self._model)
        known = self._held.memory.importance.keys()
        slots = adapter_slots(self._model, self._held.memory, *self._held_as)
        if self.form == PROXIMAL:
            check_low_rank(slots, OptionError)
        self._adapted = AdapterPenalty(slots)
        through = {slot.name for slot in slots}
        own = parameters_by_name(self._model, known)
        names = {id(p): name for name, p in own.items() if name in known and name not in through}
        self._slots = []
        for group in groups:
            for parameter in group["params"]:
                name = names.get(id(parameter))
                if name is not None:
                    held = self._hold(name, parameter)
                    self._slots.append(_Slot(name, parameter, group, held, is_sharded(parameter)))
        self._seen = seen
        is_cut = any(slot.is_cut for slot in self._slots)
        self._most: dict[int, float] = self._largest_of_parts(optimizer) if is_cut and self.form == GRADIENT else {}
        self._unstable: dict[int, Overshoot | None] = {}
        """Index of a group -> the weights that are watched; None if a warning was given in their place."""

    def _renew_views(self) -> None:
        """Of sharded parameters that were given other memory: `fully_shard` pads parts in the first forward pass."""
        for index, slot in enumerate(self._slots):
            if not slot.is_cut:
                continue
            part = slot.rows(slot.parameter)
            if part.numel() and part.data_ptr() != slot.protected.parameter.data_ptr():
                self._slots[index] = slot._replace(protected=slot.protected._replace(parameter=part))
                self._unstable = {}

    def _largest_of_parts(self, optimizer: Optimizer) -> dict[int, float]:
        """Index of a group -> the largest importance, over all processes: each must know when a step is unstable."""
        largest = [self._largest(group) for group in optimizer.param_groups]
        return dict(enumerate(largest_over_parts(largest, [slot.parameter for slot in self._slots])))

    def _largest(self, group: dict[str, Any]) -> float:
        """The largest importance in a group, of what this process holds."""
        omegas = [s.protected.omega for s in self._slots if s.group is group and s.protected.omega.numel()]
        return max((float(omega.max()) for omega in omegas), default=0.0)

    def _hold(self, name: str, parameter: nn.Parameter) -> ProtectedWeights:
        """Anchor and importance in float32 at least, on the parameter's device or on `device`."""
        check_tensors({name: parameter})
        check_fit({name: self._held.memory.importance[name]}, {name: parameter}, "the memory", may_change=True)
        own = local_part(parameter)
        device, dtype = self._held_as[0] or own.device, wide_dtype(own)
        omega = part_beside(self._held.memory.importance[name], parameter).to(device, self._held_as[1] or dtype)
        anchor = part_beside(self._held.memory.anchor[name], parameter).to(device, dtype)
        if anchor.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
            anchor = anchor.clone()  # a memory made by hand may hold the weights themselves, which move
        return ProtectedWeights(known_rows(own, omega), anchor, omega)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._acted, self._stepped = True, []
        if not self.strength:
            return None
        if self._marks is not None:
            self._find_slots(optimizer)
            self._marks = [slot.mark() for slot in self._slots]
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._begin(optimizer)
            return None
        # optimizer.step(closure) runs this hook, then closure(), then the update:
        #   hook        adds 2 lambda Omega (theta - theta*) to .grad
        #   closure()   calls zero_grad(), which discards it, and backward()
        # So the closure is replaced by one that adds the gradient at its end. The hook's args are (optimizer, closure).
        penalised = self._penalised(optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": penalised}
        return (args[0], penalised, *args[2:]), kwargs

    def _penalised(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The gradient form: a closure of the penalised loss, which adds the gradient and returns the value, which a
        line search needs. The proximal form: the closure, and a look at the gradients.
        """

        def run() -> Any:
            loss = closure()
            self._begin(optimizer)
            return loss if loss is None or self.form != GRADIENT else loss + self.value()

        return run

    def _begin(self, optimizer: Optimizer) -> None:
        """Gradients are there, and the update comes next. A step may end in `zero_grad()`: later is too late."""
        self._stepped = self._with_gradients(optimizer)
        if any(slot.is_sharded for slot in self._adapted.slots):
            reshard(self._model)
        has_moved = bool(self._adapted.slots) and self._adapted.begin(optimizer, self.form, self.strength)
        self._marks = None if self._stepped or has_moved else self._marks
        if self.form == GRADIENT and self._stepped:
            self._add_gradients(optimizer, self._stepped)

    def _add_gradients(self, optimizer: Optimizer, slots: list[_Slot]) -> None:
        self._check_stable(optimizer)
        gradients = [slot.rows(slot.parameter.grad) for slot in slots]  # type: ignore[arg-type]
        # With maximize=True a weight moves along its gradient, so the pull towards the anchor needs the other sign.
        factors = [-self.strength if slot.group.get("maximize") else self.strength for slot in slots]
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler when a fused optimizer unscales
        add_gradients_(gradients, [slot.protected for slot in slots], factors, scale)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._marks is not None and self.strength:
            self._check_gradients(optimizer)
        if self.form != PROXIMAL:
            return
        # GradScaler sets it to 1 if a fused optimizer must skip this step: then the pull is skipped too. A product does
        # not wait for the GPU, as a comparison would.
        found_inf = getattr(optimizer, "found_inf", None)
        strength = self.strength if found_inf is None else self.strength * (1 - found_inf)
        for pulls in self._pulls(optimizer, self._stepped, strength):
            pull_(*pulls)
        if self._adapted.slots:
            self._adapted.pull(optimizer, strength)

    def _check_gradients(self, optimizer: Optimizer) -> None:
        """Warn once if the first steps move weights without a gradient, so that nothing holds them."""
        pairs = zip(self._slots, self._marks or (), strict=False)
        moved = [slot.name for slot, old in pairs if slot.mark() != old]
        if moved:
            self._marks = None
            warnings.warn(
                f"a step of {type(optimizer).__name__} has moved {moved[0]}, and no protected parameter had a gradient "
                "before it: nothing was protected. Its gradients must be in .grad when step is called, or be computed "
                "by the closure that is passed to it.",
                NotProtectedWarning,
                stacklevel=5,
            )

    @staticmethod
    def _pulls(optimizer: Optimizer, slots: Sequence[_Slot], strength: float | Tensor) -> Iterator[_Pulls]:
        """The parameters that were stepped: first those with a preconditioner, then those without."""
        sizes = [(slot, step_size(optimizer, slot.group, slot.parameter)) for slot in slots]
        known = [(slot, step) for slot, step in sizes if step is not None]
        for chosen in (
            [(slot, step) for slot, step in known if step.preconditioner is not None],
            [(slot, step) for slot, step in known if step.preconditioner is None],
        ):
            preconditioners = [
                own._replace(squares=slot.rows(own.squares))
                for slot, step in chosen
                if (own := step.preconditioner) is not None
            ]
            if chosen:
                factors = [step.size * strength for _, step in chosen]
                yield [slot.protected for slot, _ in chosen], factors, preconditioners or None

    def _with_gradients(self, optimizer: Optimizer) -> list[_Slot]:
        self._find_slots(optimizer)
        slots = [slot for slot in self._slots if slot.parameter.grad is not None]
        if any(slot.parameter.grad.is_sparse for slot in slots):  # type: ignore[union-attr]
            raise ProtectionError("a protected parameter has a sparse gradient: make its embedding with sparse=False.")
        return slots

    def _check_stable(self, optimizer: Optimizer) -> None:
        """Warn before the gradient form diverges: once per group, and again if a group was stable in between.

        Of an optimizer whose step is not known, nobody can say before: an error if it diverges.
        """
        for index, group in enumerate(optimizer.param_groups):
            limit = largest_stable_pull(optimizer, group)
            if index not in self._most and math.isfinite(limit):
                self._most[index] = self._largest(group)
            most = self._most.get(index, 0.0)
            if 2 * self.strength * most <= limit:
                self._unstable.pop(index, None)
            elif known_kind(optimizer) is None:
                self._check_overshoot(optimizer, index, limit / (2 * most))
            elif index not in self._unstable:
                self._unstable[index] = None
                warnings.warn(
                    f"strength {self.strength:g} is too large for the gradient form at this learning rate: beyond "
                    f"{limit / (2 * most):.3g} the pull overshoots, and training diverges. Use form='proximal', which "
                    "no strength can make diverge, or a smaller strength or learning rate.",
                    StrengthWarning,
                    stacklevel=7,
                )

    def _check_overshoot(self, optimizer: Optimizer, index: int, safe: float) -> None:
        group = optimizer.param_groups[index]
        watched = self._unstable.get(index)
        if watched is None:
            chosen = [s.protected for s in self._slots if s.group is group and s.protected.omega.numel()]
            self._unstable[index] = Overshoot(chosen)
        elif watched.diverges(float(group.get("lr") or 0.0)):
            raise ProtectionError(
                f"strength {self.strength:g} makes {type(optimizer).__name__} diverge: its steps grow with the "
                "gradient, and throw weights beyond their anchor, further each time. At this learning rate, gradient "
                f"descent is stable up to {safe:.3g}. Load the weights from before, and use a smaller strength or "
                "learning rate, or SGD, Adam or AdamW, which hold any strength with form='proximal'."
            )
