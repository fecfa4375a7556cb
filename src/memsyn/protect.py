"""protect(optimizer, model, memory): ties the penalty to an optimizer the user already has.

Owns the hook and its life. The arithmetic is in `penalty`; must not keep state on the model or its parameters.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Final, final
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memsyn.errors import OptionError, ProtectionError
from memsyn.memory import Memory
from memsyn.parameters import named_parameters
from memsyn.penalty import add_gradients_, loss_term

FORMS: Final = {
    "gradient": "add the penalty's gradient to .grad just before the optimizer's step",
}
AUTO: Final = "gradient"

_protected: "WeakSet[Optimizer]" = WeakSet()
"""Which optimizers have a handle in force."""


def protect(
    optimizer: Optimizer, model: nn.Module, memory: Memory, *, strength: float = 1.0, form: str = "auto"
) -> "Protection":
    """Keep what the memory holds while `optimizer` trains `model`: nothing else in the training loop changes.

    Trains on L_new + lambda sum Omega (theta - theta*)^2 (Aljundi et al. 2018, Eq. 3). The loss you compute stays
    L_new; the penalty's gradient, 2 lambda Omega (theta - theta*), is added to `.grad` inside `optimizer.step()`:
    once per step however many backward passes came before, after any clipping of yours. A parameter without a
    gradient in a step is left alone.

    Args:
        optimizer: any torch optimizer that holds parameters of the model.
        model: the model the memory is of. Parameters that the memory does not know are free, with a warning.
        memory: anchor and importance. They are used as they are now; protect again after consolidating.
        strength: lambda as in the paper, which uses 1, untuned. 0 turns protection off.
        form: "gradient", or "auto", which for now is the same.

    Returns:
        A handle, with `value()` and `remove()`.

    Raises:
        OptionError: strength is negative or not finite, or the form is unknown.
        MismatchError: the memory is of another architecture than the model.
        ProtectionError: the optimizer is protected already, or holds no parameter of the memory.

    Example:
        >>> import torch, memsyn
        >>> model = torch.nn.Linear(2, 1)
        >>> importance = memsyn.measure(model, [torch.ones(4, 2)], progress=False)
        >>> memory = memsyn.Memory.empty().consolidate(model, importance)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = memsyn.protect(optimizer, model, memory)
        >>> handle.value()
        0.0
    """
    if not (isinstance(optimizer, Optimizer) and isinstance(model, nn.Module) and isinstance(memory, Memory)):
        given = ", ".join(type(value).__name__ for value in (optimizer, model, memory))
        raise OptionError(f"expected protect(optimizer, model, memory), got ({given}).")
    if isinstance(strength, bool) or not isinstance(strength, Real):
        raise OptionError(f"strength must be a number, got {strength!r}.")
    strength = float(strength)
    if not (math.isfinite(strength) and strength >= 0):
        raise OptionError(f"strength must be finite and not negative, got {strength}.")
    if form not in ("auto", *FORMS):
        raise OptionError(f"form must be one of auto, {', '.join(FORMS)}; got {form!r}.")
    if optimizer in _protected:
        raise ProtectionError("this optimizer is protected already: call remove() on the first handle before.")
    if not memory.importance:
        raise ProtectionError(
            "the memory is empty, there is nothing to protect: measure the model and consolidate first."
        )
    memory.check(model)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    protected = {
        name: parameter
        for name, parameter in named_parameters(model).items()
        if name in memory.importance and id(parameter) in held
    }
    if not protected:
        raise ProtectionError(
            f"the optimizer holds none of the memory's {len(memory.importance)} parameters. Was it made from another "
            "model, or before the model was copied or moved?"
        )
    return Protection(optimizer, protected, memory, strength)


@final
class Protection:
    """The handle of one protected optimizer."""

    def __init__(
        self, optimizer: Optimizer, parameters: dict[str, nn.Parameter], memory: Memory, strength: float
    ) -> None:
        self.strength = strength
        self._parameters = list(parameters.values())
        self._anchors = [_beside(p, memory.anchor[name]) for name, p in parameters.items()]
        self._omegas = [_beside(p, memory.importance[name]) for name, p in parameters.items()]
        self._optimizer = ref(optimizer)  # which holds this object by its hook
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._in_force = True
        _protected.add(optimizer)

    def value(self) -> float:
        """The penalty now: lambda sum Omega (theta - theta*)^2 over the protected parameters."""
        return self.strength * self._sum()

    def remove(self) -> None:
        """Stop protecting; may be called twice."""
        optimizer = self._optimizer()
        if self._in_force and optimizer is not None:
            self._hook.remove()
            _protected.discard(optimizer)
        self._in_force = False

    @torch.no_grad()
    def _sum(self) -> float:
        terms = zip(self._parameters, self._anchors, self._omegas, strict=True)
        return sum(float(loss_term(*term)) for term in terms)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_gradients()
            return None
        # It runs after this hook, and its zero_grad would discard what is added here.
        penalised = self._penalised(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": penalised}
        return (args[0], penalised, *args[2:]), kwargs

    def _penalised(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of the penalised loss: its gradients, and its value, which a line search looks at."""

        def run() -> Any:
            loss = closure()
            self._add_gradients()
            return None if loss is None else loss + self.value()

        return run

    def _add_gradients(self) -> None:
        now = [
            (p.grad, p, anchor, omega)
            for p, anchor, omega in zip(self._parameters, self._anchors, self._omegas, strict=True)
            if p.grad is not None
        ]
        if not now or not self.strength:
            return
        gradients, parameters, anchors, omegas = map(list, zip(*now, strict=True))
        if any(gradient.is_sparse for gradient in gradients):
            raise ProtectionError("a protected parameter has a sparse gradient: build its embedding with sparse=False.")
        scale = getattr(self._optimizer(), "grad_scale", None)  # set by GradScaler when a fused optimizer unscales
        strength = self.strength if scale is None else self.strength * float(scale)
        add_gradients_(gradients, parameters, anchors, omegas, strength)


def _beside(parameter: nn.Parameter, held: Tensor) -> Tensor:
    """A tensor of the memory on the parameter's device, in float32 at least."""
    return held.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
