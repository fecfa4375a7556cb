"""protect(optimizer, model, memory): protects a memory inside the step of an optimizer that the user already has.

Owns the options of `protect`. The penalty forms are in `penalising`, the projected form in `projection`.
"""

from collections.abc import Set
from dataclasses import replace
from typing import Final

import torch
from torch import nn
from torch.optim import Optimizer

from memsyn.errors import OptionError, ProtectionError
from memsyn.parameters import Patterns, listed, only_those, refuse_other_sharding
from memsyn.protecting.held_layers import placed_directions
from memsyn.protecting.optimizers import (
    AUTO,
    GRADIENT,
    PROJECTED,
    best_form,
    checked_form,
    is_schedule_free,
    stepping_optimizer,
)
from memsyn.protecting.penalising import Penalising
from memsyn.protecting.penalty import check_tensors
from memsyn.protecting.predicting import OldWeights, Watched, change_predictor
from memsyn.protecting.projection import EVERY, Projecting, checked_every
from memsyn.protecting.protection import Protection, check_optimizer, is_protected
from memsyn.protecting.replaced import check_replaced, warn_of_grown
from memsyn.protecting.statistics import WatchedStatistics
from memsyn.protecting.strength import Relative, checked_strength
from memsyn.sharding.parts import is_sharded, reshard
from memsyn.values.directions import STRENGTH
from memsyn.values.memory import Memory, check_model
from memsyn.weights_in_effect import adapted_weights, parameters_by_name, weights_by_name

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
    freeze_statistics: bool = False,
    only: Patterns | None = None,
    exclude: Patterns | None = None,
    reference: OldWeights | None = None,
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
    (theta + k theta*) / (1 + k) after the step, with k = 2 s lambda Omega. Here s is how far a unit of gradient moves
    the weight in a step: lr / (1 - momentum) for SGD, lr / (sqrt(v) + eps) for Adam. No strength makes the proximal
    form or the projected form diverge. The gradient form may: there is a warning before it does with SGD, and an error
    as soon as it does with an optimizer whose steps are not known.

    The variant of the paper itself is `strength=1.0, form="gradient"`. The proximal form that "auto" takes has the same
    resting place, but another way there: at lambda 1, trainings of 300 steps ended 1 to 17% of their way off the
    paper's (docs/decisions.md).

    Args:
        optimizer: any torch optimizer that holds parameters of the model, or a wrapper such as Lookahead, SAM or
            Accelerate's. Of a wrapper, the optimizer inside is protected: `handle.optimizer` is that, and
            `handle.wrappers` names what is around it. Give the wrapper if there is one: the projected form then
            projects in each step, since the wrapper may average weights. Parameters and groups may be added and removed
            later.
        model: the model of the memory. Parameters that the memory does not know are free to change, with a warning, and
            so are new rows of a parameter. If a head that all classes share grows, protection does not save the old
            classes: the new ones compete with them in the same outputs, and take their answers. Parameters that the
            model has lost are left out, with a warning. If names differ by a prefix (`net.`, `module.`), they are
            found, with a warning. With adapters of PEFT, the weights in effect are held, W + s B A. "auto" takes the
            gradient form if adapters are not of LoRA alone. The projected form damps A of an adapter that adds nothing
            yet (B = 0) once, in place: see docs/adapters.md.
        memory: what is protected, as it is now; protect again after consolidating.
        strength: for the projected form c, a number without a unit, 10 by default; from 1 to 100 it changes little. For
            the penalty forms lambda as in the paper, which uses 1, untuned, or `Relative`, in units of the mean
            importance of a task; `Relative()`, which is 0.01, by default. 0 turns protection off. `tune` finds one.
        form: "projected", "gradient", "proximal", or "auto": projected if the memory holds directions. Else proximal
            where the size of a step is known, that is for SGD, Adam, AdamW and subclasses that do not override `step`,
            and gradient for all others.
        device: where anchor and importance are held; by default beside the weights. "cpu" saves memory of an
            accelerator, and costs a transfer in every step. Not for the projected form.
        importance_dtype: the dtype in which the importance is held; torch.bfloat16 halves its memory, with an error of
            at most 0.4%. Not for the projected form.
        every: the projected form projects the changes of so many steps together. It also projects before `state_dict`
            of the model, the optimizer or the handle, in `flush()` and in `remove()`: call one of them when training
            ends, or before you evaluate.
        freeze_statistics: whether modules with running statistics (BatchNorm) are kept as in evaluation while
            protected, although the loop calls `model.train()`; see `freeze_statistics`. Else their statistics move, and
            outputs on old data with them, however well the weights are held.
        only: names, or patterns as in `fnmatch`, of the memory's parameters to protect; None: all. A parameter that is
            named literally is protected even if it looks newly initialised: `only=["*", "head.weight"]`.
        exclude: names or patterns of parameters to leave free, such as `head.*` of a head that was replaced.
        reference: the model that was measured, or its state_dict, for `report().change`. It is needed only if the
            weights have moved since, as those of a checkpoint, and the memory has no anchor.

    Of a model under `fully_shard` (FSDP2), each process protects the parts that it holds, and all call `protect`
    together. The memory may be whole, as from a file, or sharded as the model is. A step of the penalty forms talks to
    no other process. The projected form sums over processes the directions along which a weight is cut: U^T D of a
    Linear, a few percent of the weight. Where this is over 4 MiB and over an eighth of the weight, the outputs are left
    out, with a warning: the factor is 1 / (1 + c a_j). No step gathers a weight. All processes must together call
    `report()`, `value()`, `flush()`, `remove()` and the `state_dict` of the model. The handle's `state_dict` holds
    DTensors, so that torch.distributed.checkpoint saves the part of each process.

    A name is not an identity: a new head may have the old one's name and shape, and would be pulled to the old weights.
    So the weights are compared with the anchor. A matrix of n >= 64 values looks newly initialised if it is more than
    0.9 ||theta*|| from its anchor and its cosine with it is below 3 / sqrt(n), three standard deviations of unrelated
    vectors. (Of directions, 256 values of each parameter are compared.) Then a decision is needed, by `exclude=` or
    `only=`. Any other parameter of 8 values or more that is so far is named in a warning.

    Returns:
        A handle, with `value()`, `report()`, `flush()`, `state_dict()`, `load_state_dict()` and `remove()`.

        `report().change` is the relative change of outputs on the remembered data, predicted from directions. For it,
        the handle keeps a copy of the weights that the memory knows, if the memory has directions and no anchor.

    Raises:
        ModelError: the model is cut by DeepSpeed's ZeRO-3, or by the old FullyShardedDataParallel.
        OptionError: strength is negative or not finite, the form is unknown or does not suit optimizer or memory, or a
            pattern matches no parameter of the memory.
        MismatchError: the memory is of another architecture than the model, or the reference is not what was measured.
        ProtectionError: the optimizer is protected already, holds no parameter of the memory, or calls no hooks; or a
            parameter looks newly initialised, has a sparse gradient, has no values (device "meta"), or is nested. Also
            if a parameter is cut between processes in a way that the form cannot take.

    Warns:
        NewParametersWarning, LostParametersWarning: only the model, or only the memory has a parameter.
        RenamedParametersWarning: the memory's names differ from the model's in a known way.
        MovedWeightsWarning: a parameter is far from its anchor.
        GrownParametersWarning: a parameter has more rows than the memory knows.
        NotProtectedWarning: protected weights have moved, and the optimizer has made no step. This is looked at when
            the model's `state_dict` is called, and in `report()` and `remove()`.
        OutputSideWarning: matrices of a sharded model are projected by their inputs alone.
        MovedStatisticsWarning: the model's statistics are not those that the memory remembers; and later, once, in the
            step in which they are seen to move.

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
    if not (isinstance(model, nn.Module) and isinstance(memory, Memory)):
        given = ", ".join(type(value).__name__ for value in (optimizer, model, memory))
        raise OptionError(f"expected protect(optimizer, model, memory), got ({given}).")
    refuse_other_sharding(model)
    reshard(model)
    found = stepping_optimizer(optimizer)
    optimizer = found.optimizer
    whole = memory.fitted(model)
    form = checked_form(_form_for(optimizer, model, whole) if form == AUTO else form, optimizer)
    raw = strength if strength is None or isinstance(strength, Relative) else checked_strength(strength)
    if importance_dtype not in IMPORTANCE_DTYPES:
        allowed = ", ".join(map(str, IMPORTANCE_DTYPES))
        raise OptionError(f"importance_dtype must be one of {allowed}; got {importance_dtype!r}.")
    if is_protected(optimizer):
        raise ProtectionError("this optimizer is protected already: call remove() on its first handle.")
    memory = _chosen(whole, model, form, only, exclude)
    if memory.directions is not None:
        own = parameters_by_name(model, memory.names)
        memory = replace(memory, directions=placed_directions(memory.directions, own))
    ignored = whole.statistics.keys() - memory.statistics.keys()
    predictor = change_predictor(memory, whole, model, reference)
    if form == PROJECTED:
        if isinstance(raw, Relative) or device is not None or importance_dtype is not None:
            raise OptionError(
                "the projected form takes a number as strength, and neither Relative nor device nor importance_dtype."
            )
        assert memory.directions is not None
        number = STRENGTH if raw is None else raw
        # A wrapper averages weights between steps, and schedule-free swaps them: no change may wait until then.
        in_each_step = found.moved_by_wrapper or is_schedule_free(optimizer)
        every = checked_every(every)
        statistics = WatchedStatistics(model, memory.statistics, freeze=freeze_statistics, ignored=ignored)
        watched = Watched(statistics, predictor)
        return Projecting(found, model, memory.directions, number, every, in_each_step, watched)
    raw = Relative() if raw is None else raw
    raw = checked_strength(raw.of(memory)) if isinstance(raw, Relative) else raw
    held = check_optimizer(optimizer, model, memory.importance)
    _check_dense_gradients(model, memory, held)
    where = None if device is None else torch.device(device)
    statistics = WatchedStatistics(model, memory.statistics, freeze=freeze_statistics, ignored=ignored)
    watched = Watched(statistics, predictor)
    return Penalising(found, model, memory, raw, form, where, importance_dtype, watched)


def _form_for(optimizer: Optimizer, model: nn.Module, memory: Memory) -> str:
    """The form for form="auto": projected where the memory has directions and the optimizer allows it."""
    if memory.directions is not None and not (isinstance(optimizer, torch.optim.LBFGS) and memory.importance):
        return PROJECTED
    adapted = adapted_weights(model, memory.importance.keys())
    can_pull = all(layer.is_low_rank() and not is_sharded(layer.base.weight) for _, layer in adapted)
    return best_form(optimizer) if can_pull else GRADIENT


def _check_dense_gradients(model: nn.Module, memory: Memory, held: Set[int]) -> None:
    """Refuse tables that are known to get sparse gradients: a pull of all their rows would not be sparse."""
    sparse = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse}
    for name, parameter in parameters_by_name(model, memory.names).items():
        if name in memory.importance and id(parameter) in sparse & held and parameter.requires_grad:
            raise ProtectionError(f"{name} gets a sparse gradient: make its embedding with sparse=False.")


def _chosen(memory: Memory, model: nn.Module, form: str, only: Patterns | None, exclude: Patterns | None) -> Memory:
    """The part of a memory that is protected, after the checks that it fits the model."""
    known = memory.names
    only = None if only is None else listed(only, "only")
    memory = memory.select(only=only, exclude=exclude)
    _check_holds(memory, form)
    check_tensors(only_those(parameters_by_name(model, memory.names), memory.names))
    parameters = weights_by_name(model, memory.names)
    check_model(memory, model, known, stacklevel=4)
    check_replaced(memory, parameters, form, only or [])
    warn_of_grown(memory, parameters)
    return memory


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
