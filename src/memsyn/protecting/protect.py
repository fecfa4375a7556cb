"""protect(optimizer, model, memory): protects a memory inside the step of an optimizer that the user already has.

Owns the options of `protect`. The penalty forms are in `penalising`, the projected form in `projection`.
"""

from typing import Final

import torch
from torch import nn
from torch.optim import Optimizer

from memsyn.errors import OptionError, ProtectionError
from memsyn.parameters import named_parameters
from memsyn.protecting.optimizers import AUTO, PROJECTED, best_form, checked_form
from memsyn.protecting.penalising import Penalising
from memsyn.protecting.projection import EVERY, Projecting, checked_every
from memsyn.protecting.protection import Protection, is_protected
from memsyn.protecting.strength import Relative, checked_strength
from memsyn.values.directions import STRENGTH
from memsyn.values.memory import Memory

IMPORTANCE_DTYPES: Final = (None, torch.bfloat16, torch.float32, torch.float64)
"""float16 is not among them: an importance of 65,520 would be infinite."""


def protect(
    optimizer: Optimizer,
    model: nn.Module,
    memory: Memory,
    *,
    strength: float | Relative | None = None,
    form: str = AUTO,
    device: torch.device | str | None = None,
    importance_dtype: torch.dtype | None = None,
    every: int = EVERY,
) -> Protection:
    """Protect what the memory holds while `optimizer` trains `model`. The training loop stays as it is.

    A memory of Kronecker factors is protected by a projection. After the step, with D the change of a weight matrix W
    and its bias, A = V diag(a) V^T the second moment of its inputs and S = U diag(s) U^T that of its output gradients:

        D <- U [(U^T D V)_ij / (1 + c a_j ((1 - mu) s_i + mu))] V^T,  mu = 0.1

    A change is damped where old inputs and old outputs would feel it. Nothing is pulled back, and nothing is read from
    the optimizer, so that weight decay, momentum and unknown optimizers are covered. In each direction a step moves the
    old layer's output at most 1 / (1 + c a_j mu) as far as before (relatives: Zeng et al. 2019; Saha et al. 2021; Kao
    et al. 2021). The steps of `every` steps are projected together: the map is linear, so that the sum is the same.
    Parameters that are no matrices are damped by 1 / (1 + c sum_t ((1 - mu) g_t / mean(g_t) + mu)), with their mean
    squared gradients g.

    A memory of importance is protected by a penalty: training minimises L_new + lambda sum Omega (theta - theta*)^2
    (Aljundi et al. 2018, Eq. 3). The loss you compute stays L_new; the penalty acts inside `optimizer.step()`, once per
    step, however many backward passes came before, and after your own gradient clipping. A parameter without a gradient
    is not touched in that step. The penalty has two forms; the same strength has the same effect in both. The gradient
    form adds 2 lambda Omega (theta - theta*) to `.grad` before the step. The proximal form sets theta to
    (theta + k theta*) / (1 + k) after the step, with k = 2 s lambda Omega, where s is how far a unit of gradient moves
    the weight in a step: lr / (1 - momentum) for SGD, lr / (sqrt(v) + eps) for Adam, lr for others. No strength makes
    the proximal form or the projected form diverge.

    The variant of the paper itself is `strength=1.0, form="gradient"`. The proximal form that "auto" takes has the same
    resting place, but another way there: at lambda 1, trainings of 300 steps ended 1 to 17% of their way off the
    paper's (docs/decisions.md).

    Args:
        optimizer: any torch optimizer that holds parameters of the model. Parameters and groups may be added and
            removed later.
        model: the model of the memory. Parameters that the memory does not know are free to change, with a warning, and
            so are new rows of a parameter. Parameters that the model has lost are left out, with a warning.
        memory: what is protected, as it is now; protect again after consolidating.
        strength: for the projected form c, a number without a unit, 10 by default; from 1 to 100 it changes little. For
            the penalty forms lambda as in the paper, which uses 1, untuned, or `Relative`, in units of the mean
            importance of a task; `Relative()`, which is 0.01, by default. 0 turns protection off. `tune` finds one.
        form: "projected", "gradient", "proximal", or "auto": projected if the memory holds directions. Else gradient
            for LBFGS and for optimizers that normalise their steps in another way than Adam (RMSprop, Adagrad, ...),
            proximal for SGD, Adam, AdamW and all others.
        device: where anchor and importance are held; by default beside the weights. "cpu" saves memory of an
            accelerator, and costs a transfer in every step. Not for the projected form.
        importance_dtype: the dtype in which the importance is held; torch.bfloat16 halves its memory, with an error of
            at most 0.4%. Not for the projected form.
        every: the projected form projects the changes of so many steps together. It also projects before `state_dict`
            of the model, the optimizer or the handle, in `flush()` and in `remove()`: call one of them when training
            ends, or before you evaluate.

    Returns:
        A handle, with `value()`, `report()`, `flush()`, `state_dict()`, `load_state_dict()` and `remove()`.

    Raises:
        OptionError: strength is negative or not finite, or the form is unknown or does not suit optimizer or memory.
        MismatchError: the memory is of another architecture than the model.
        ProtectionError: the optimizer is protected already, or holds no parameter of the memory.

    Example:
        >>> import torch, memsyn
        >>> model = torch.nn.Linear(2, 1)
        >>> factors = memsyn.measure(model, [torch.ones(4, 2)], estimator="kronecker", progress=False)
        >>> memory = memsyn.Memory.empty().consolidate(model, factors)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = memsyn.protect(optimizer, model, memory)
        >>> handle.form
        'projected'
    """
    if not (isinstance(optimizer, Optimizer) and isinstance(model, nn.Module) and isinstance(memory, Memory)):
        given = ", ".join(type(value).__name__ for value in (optimizer, model, memory))
        raise OptionError(f"expected protect(optimizer, model, memory), got ({given}).")
    form = checked_form(_form_for(optimizer, memory) if form == AUTO else form, optimizer)
    raw = strength if strength is None or isinstance(strength, Relative) else checked_strength(strength)
    if importance_dtype not in IMPORTANCE_DTYPES:
        allowed = ", ".join(map(str, IMPORTANCE_DTYPES))
        raise OptionError(f"importance_dtype must be one of {allowed}; got {importance_dtype!r}.")
    if is_protected(optimizer):
        raise ProtectionError("this optimizer is protected already: call remove() on its first handle.")
    _check_holds(memory, form)
    memory.check(model)
    if form == PROJECTED:
        if isinstance(raw, Relative) or device is not None or importance_dtype is not None:
            raise OptionError(
                "the projected form takes a number as strength, and neither Relative nor device nor importance_dtype."
            )
        assert memory.directions is not None
        number = STRENGTH if raw is None else raw
        return Projecting(optimizer, model, memory.directions, number, checked_every(every))
    raw = Relative() if raw is None else raw
    raw = checked_strength(raw.of(memory)) if isinstance(raw, Relative) else raw
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(name in memory.importance and id(p) in held for name, p in named_parameters(model).items()):
        raise ProtectionError(
            f"the optimizer holds none of the memory's {len(memory.importance)} parameters. Was it made from another "
            "model, or before the model was copied or moved?"
        )
    where = None if device is None else torch.device(device)
    return Penalising(optimizer, model, memory, raw, form, where, importance_dtype)


def _form_for(optimizer: Optimizer, memory: Memory) -> str:
    """The form for form="auto": projected where the memory has directions and the optimizer allows it."""
    if memory.directions is not None and not (isinstance(optimizer, torch.optim.LBFGS) and memory.importance):
        return PROJECTED
    return best_form(optimizer)


def _check_holds(memory: Memory, form: str) -> None:
    """Refuse a memory that does not hold what the form protects."""
    if not memory.names:
        raise ProtectionError(
            "the memory is empty and there is nothing to protect: measure the model and consolidate first."
        )
    if form == PROJECTED and memory.directions is None:
        raise OptionError(
            "form='projected' needs Kronecker factors, and the memory holds an importance: measure with "
            "estimator='kronecker', and consolidate the result."
        )
    if form != PROJECTED and not memory.importance:
        raise OptionError(
            f"form={form!r} needs an importance, and the memory holds directions: use form='projected' or 'auto', or "
            "measure with estimator='mas' too."
        )
