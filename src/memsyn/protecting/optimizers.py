"""How far torch's optimizers move a weight for a gradient, and which form of protection suits each.

Owns the names of the forms, and all knowledge of single optimizers and of what wraps them.
"""

from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from memsyn.errors import OptionError, ProtectionError
from memsyn.protecting.penalty import Preconditioner
from memsyn.torch_private import own_step

GRADIENT: Final = "gradient"
PROXIMAL: Final = "proximal"
PROJECTED: Final = "projected"
AUTO: Final = "auto"
FORMS: Final = {
    GRADIENT: "add the penalty's gradient to .grad just before the optimizer's step",
    PROXIMAL: "pull the weights back just after the optimizer's step, by the penalty's proximal step",
    PROJECTED: "damp each step's change of the weights in the directions that the old tasks use",
}

KNOWN: Final = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""How far a gradient moves a weight is known of these, and of subclasses that take over their `step`."""

INNER: Final = ("optimizer", "base_optimizer", "base", "original_optimizer", "_optimizer", "_base_optimizer")
"""The attributes in which wrappers such as Lookahead, SAM or Accelerate's keep the optimizer that they step."""

PASSING: Final = ("accelerate", "lightning", "pytorch_lightning", "lightning_fabric")
"""The packages whose wrappers leave the weights alone. Others may move them, as Lookahead does."""


class Stepping(NamedTuple):
    """The optimizer whose `step` moves the weights."""

    optimizer: Optimizer
    wrappers: tuple[Any, ...]
    """What is around it, from the outside in."""

    @property
    def moved_by_wrapper(self) -> bool:
        """Whether a wrapper may move weights too: all but those of `PASSING`."""
        return any(type(wrapper).__module__.split(".")[0] not in PASSING for wrapper in self.wrappers)


def stepping_optimizer(given: object) -> Stepping:
    """The innermost torch optimizer that calls its hooks.

    Raises:
        OptionError: there is no torch optimizer.
        ProtectionError: none of the optimizers calls hooks.
    """
    chain: list[Any] = [given]
    while (inner := _inner(chain[-1])) is not None and all(inner is not one for one in chain):
        chain.append(inner)
    for index in reversed(range(len(chain))):
        if isinstance(chain[index], Optimizer) and "_optimizer_step_pre_hooks" in vars(chain[index]):
            return Stepping(chain[index], tuple(chain[:index]))
    name = type(given).__name__
    if not isinstance(given, Optimizer):
        raise OptionError(f"optimizer must be a torch.optim.Optimizer, or hold one as .optimizer; got {name}.")
    raise ProtectionError(
        f"{name} did not call Optimizer.__init__, so that it calls no hooks, and it holds no optimizer as "
        f"{', '.join(f'.{attribute}' for attribute in INNER[:3])}. Pass the torch optimizer inside it to protect, or "
        "call super().__init__(params, defaults) in its __init__."
    )


def _inner(wrapper: object) -> Optimizer | None:
    """The optimizer that a wrapper holds."""
    found = (getattr(wrapper, attribute, None) for attribute in INNER)
    return next((inner for inner in found if isinstance(inner, Optimizer)), None)


def known_kind(optimizer: Optimizer) -> type[Optimizer] | None:
    """The class of `KNOWN` whose `step` the optimizer runs; None if it runs another."""
    return _kind_of(type(optimizer))  # type: ignore[arg-type]


@cache
def _kind_of(own: type[Optimizer]) -> type[Optimizer] | None:
    return next((kind for kind in KNOWN if issubclass(own, kind) and own_step(kind) is own_step(own)), None)


def best_form(optimizer: Optimizer) -> str:
    """The form for form="auto" and a memory of importance; the measurements are in docs/decisions.md."""
    return GRADIENT if known_kind(optimizer) is None else PROXIMAL


def checked_form(form: object, optimizer: Optimizer) -> str:
    """A form that suits the optimizer.

    Raises:
        OptionError: the form is unknown, or does not work with this optimizer.
    """
    if not (isinstance(form, str) and form in FORMS):
        raise OptionError(f"form must be one of {AUTO}, {', '.join(FORMS)}; got {form!r}.")
    if form == PROXIMAL and isinstance(optimizer, torch.optim.LBFGS):
        raise OptionError("LBFGS must see the penalty in the loss that it minimises: use form='gradient' or 'auto'.")
    if form == PROXIMAL and known_kind(optimizer) is None:
        raise OptionError(
            f"form='proximal' needs to know how far a gradient moves a weight, which is known of SGD, Adam, AdamW and "
            f"subclasses that do not override step; {type(optimizer).__name__} has a step of its own. Use "
            "form='gradient' or 'auto'."
        )
    if form == PROJECTED and isinstance(optimizer, torch.optim.LBFGS):
        raise OptionError(
            "LBFGS takes several steps inside one, and builds on them: its changes cannot be projected. Use another "
            "optimizer, or an importance with form='gradient'."
        )
    return form


class StepSize(NamedTuple):
    """A constant gradient g moves a weight by size * g in a step, or by size * g / preconditioner."""

    size: float | Tensor
    preconditioner: Preconditioner | None


def step_size(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> StepSize | None:
    """How far a unit of gradient moves a parameter now, momentum (mu) and dampening (d) included.

    SGD: lr (1 - d) / (1 - mu), the sum of the momentum buffer's geometric series. Adam and AdamW: lr, divided by
    sqrt(v / (1 - beta2^t)) + eps; None before a parameter's first step. Not for optimizers that are not known.
    """
    size: float | Tensor = group["lr"]
    if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
        return StepSize(size * ((1 - group["dampening"]) / (1 - group["momentum"])), None)
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        state = optimizer.state.get(parameter)
        if not state:
            return None
        steps, beta = state["step"], group["betas"][1]
        if isinstance(steps, Tensor) and steps.is_cuda:
            # `float(steps)` would wait for the GPU.
            steps = steps.clamp_min(1.0)
        else:
            steps = float(steps)
            if steps < 1:  # GradScaler made it skip its first step
                return None
        squares = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        # sqrt(v / (1 - beta^t)) is root * sqrt(v). After the first step, with beta 0.999, root is 31.6.
        return StepSize(size, Preconditioner(squares, (1 - beta**steps) ** -0.5, group["eps"]))
    return StepSize(size, None)


def largest_stable_pull(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """The largest curvature at which gradient descent is stable; infinite if the optimizer normalises its steps.

    SGD on a quadratic of curvature h is stable while lr h (1 - d) < 2 (1 + mu), with Nesterov's momentum while lr h <
    2 (1 + mu) / (1 + 2 mu): at the limit, an eigenvalue of its two-step recursion is -1. Weight decay adds to h. Of
    optimizers that are not known, the smallest such limit is taken: a momentum of 1 of Nesterov's, 4 / 3.
    """
    kind = known_kind(optimizer)
    if kind is None and not isinstance(optimizer, torch.optim.LBFGS):
        rate = float(group.get("lr") or 0.0)
        return 4 / 3 / rate if rate > 0 else 0.0
    if kind is not torch.optim.SGD:
        return float("inf")
    momentum = float(group["momentum"])
    size = float(group["lr"]) * (1 - group["dampening"] if momentum else 1.0)
    limit = 2 * (1 + momentum) / (1 + 2 * momentum if group["nesterov"] else 1.0)
    return max(0.0, limit / size - float(group["weight_decay"])) if size > 0 else float("inf")


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether an optimizer keeps weights as `z` too, and swaps averages in and out by `eval` and `train`."""
    return any("train_mode" in group for group in optimizer.param_groups)
