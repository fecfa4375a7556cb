"""How far torch's optimizers move a weight for a gradient, and which form of protection suits each.

Owns the names of the forms, and all knowledge of single optimizers.
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from memsyn.errors import OptionError
from memsyn.protecting.penalty import Preconditioner

GRADIENT: Final = "gradient"
PROXIMAL: Final = "proximal"
PROJECTED: Final = "projected"
AUTO: Final = "auto"
FORMS: Final = {
    GRADIENT: "add the penalty's gradient to .grad just before the optimizer's step",
    PROXIMAL: "pull the weights back just after the optimizer's step, by the penalty's proximal step",
    PROJECTED: "damp each step's change of the weights in the directions that the old tasks use",
}

ADAPTIVE: Final = (torch.optim.Adam, torch.optim.AdamW)
"""They divide a gradient by the root of its mean square, kept as `exp_avg_sq`; the proximal step does the same."""

NORMALISING: Final = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    *(getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)),
)
"""Other optimizers whose steps do not grow with the gradient, so that the gradient form cannot diverge."""


def best_form(optimizer: Optimizer) -> str:
    """The form for form="auto"; the measurements are in docs/decisions.md."""
    has_rates = all("lr" in group for group in optimizer.param_groups)
    if not has_rates or isinstance(optimizer, (torch.optim.LBFGS, *NORMALISING)):
        return GRADIENT
    return PROXIMAL


def checked_form(form: object, optimizer: Optimizer) -> str:
    """A form that suits the optimizer.

    Raises:
        OptionError: the form is unknown, or does not work with this optimizer.
    """
    if not (isinstance(form, str) and form in FORMS):
        raise OptionError(f"form must be one of {AUTO}, {', '.join(FORMS)}; got {form!r}.")
    if form == PROXIMAL and isinstance(optimizer, torch.optim.LBFGS):
        raise OptionError("LBFGS must see the penalty in the loss that it minimises: use form='gradient' or 'auto'.")
    if form == PROXIMAL and not all("lr" in group for group in optimizer.param_groups):
        raise OptionError("this optimizer has no 'lr', which the proximal step needs: use form='gradient' or 'auto'.")
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
    sqrt(v / (1 - beta2^t)) + eps; None before a parameter's first step. Any other optimizer: lr.
    """
    size: float | Tensor = group["lr"]
    if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
        return StepSize(size * ((1 - group["dampening"]) / (1 - group["momentum"])), None)
    if isinstance(optimizer, ADAPTIVE):
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
    2 (1 + mu) / (1 + 2 mu): at the limit, an eigenvalue of its two-step recursion is -1. Weight decay adds to h.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return float("inf")
    momentum = float(group["momentum"])
    size = float(group["lr"]) * (1 - group["dampening"] if momentum else 1.0)
    limit = 2 * (1 + momentum) / (1 + 2 * momentum if group["nesterov"] else 1.0)
    return max(0.0, limit / size - float(group["weight_decay"])) if size > 0 else float("inf")
