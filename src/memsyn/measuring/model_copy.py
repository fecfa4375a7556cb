"""A structural clone of the user's model that shares its weight storage.

Owns the clone that is measured in place of the user's model: same weights in the same memory, its own buffers,
hooks and flags. Must never write to the user's model.
"""

import copy
from collections.abc import Container
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from memsyn.errors import ModelError
from memsyn.parameters import canonical_name, unwrap
from memsyn.torch_private import forward_hooks, remove_backward_hooks


class Onlooker:
    """A hook that only looks on, so that it is left out of clones; a copy of it does nothing."""

    def __call__(self, *given: Any) -> None:
        """Look at what a module is called with."""

    def __reduce__(self) -> Any:
        return Onlooker, ()


def check_measurable(model: nn.Module) -> None:
    """Refuse models whose per-sample gradients do not exist, or cannot be had.

    Raises:
        ModelError: it is no module, was scripted, or holds a lazy or complex parameter.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module to measure, got a {type(model).__name__}.")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError("a scripted or traced module cannot be measured: measure the module it was made from.")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(f"{name} has no shape yet: run one batch through the model, then measure it.")
        if parameter.requires_grad and parameter.is_complex():
            raise ModelError(f"{name} is complex, and importance is of real weights. Freeze it, or hold it as two.")


def model_copy(
    model: nn.Module, *, private: Container[str] = (), dtype: torch.dtype | None = None, served: bool = False
) -> nn.Module:
    """A structural clone of `model`, its modules in eval mode, whose frozen parameters alias the model's own storage.

    Measuring hooks, freezes and runs the clone, so the user's model stays bit for bit as it is, and may go on
    serving requests meanwhile. Forward hooks are kept, since they may be part of what the model computes (the
    older `weight_norm` is one), except each `Onlooker`; backward hooks are left out. The modules' own `eval()` is not
    called: it may rewrite weights (merging an adapter). A parameter is copied only where an alias would not do: named
    in `private`, made in inference mode (autograd refuses it), or rewritten by its layer's forward
    (`Embedding(max_norm=...)`); to `dtype`
    if one is given. Of a model that is `served` meanwhile, the hooks of `refuse_foreign_hooks` are left out too: they
    must not see samples of other requests, in another thread.

    Raises:
        ModelError: the model cannot be cloned.
    """
    model = unwrap(model)
    try:
        clone = copy.deepcopy(model, _aliases(model, private, dtype))
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be cloned for measuring: {type(error).__name__}: {error}. Keep locks, "
            "open files, handles and tensors with a graph out of the module, or give it a __deepcopy__ that leaves "
            "them out."
        ) from error
    for module in clone.modules():
        module.training = False
        remove_backward_hooks(module)
        for hooks in forward_hooks(module):
            for key in [
                key for key, hook in hooks.items() if isinstance(hook, Onlooker) or (served and _is_foreign(hook))
            ]:
                del hooks[key]
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):  # the derivative itself, not a scaled or sparse update
            module.scale_grad_by_freq = module.sparse = False
        if isinstance(module, nn.TransformerEncoder):  # frozen, it would take nested tensors, which have no backward
            module.use_nested_tensor = False
    return clone


def refuse_foreign_hooks(model: nn.Module) -> None:
    """Refuse forward hooks of whom nobody knows whether they compute or only look on.

    Methods of modules compute, and what torch.nn.utils registers: the older `weight_norm` and `spectral_norm`, pruning.

    Raises:
        ModelError: names the hooks and their layers.
    """
    foreign = [
        f"{getattr(hook, '__qualname__', type(hook).__qualname__)} on {name or 'the model'}"
        for name, module in unwrap(model).named_modules()
        for hooks in forward_hooks(module)
        for hook in hooks.values()
        if _is_foreign(hook) and not isinstance(hook, Onlooker)
    ]
    if foreign:
        raise ModelError(
            f"forward hooks may be part of what the model computes: {', '.join(foreign)}. If they only look on, say "
            "onlookers=True, and they are left out; make one that computes a method of a module."
        )


def _is_foreign(hook: object) -> bool:
    if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
        return False
    return not any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__)


def _aliases(model: nn.Module, private: Container[str], dtype: torch.dtype | None) -> dict[int, object]:
    """What deepcopy must not copy: id of the original -> what stands for it in the clone."""
    memo: dict[int, object] = {}
    rewritten = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    }
    for name, parameter in model.named_parameters():
        alias = parameter.detach()
        if canonical_name(name) in private or id(parameter) in rewritten or parameter.is_inference():
            alias = alias.to(dtype if dtype and alias.is_floating_point() else alias.dtype, copy=True)
        replacement = nn.Parameter(alias, requires_grad=False)
        replacement.__dict__.update(vars(parameter))  # what its module may have noted on it
        memo[id(parameter)] = replacement
    for module in model.modules():
        for value in (*vars(module).values(), *module.buffers(recurse=False)):
            if isinstance(value, Tensor) and not value.is_leaf:  # a cached weight: deepcopy refuses it
                memo[id(value)] = value.detach().clone()
        for hook in (hook for hooks in forward_hooks(module) for hook in hooks.values()):
            if not (isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module)):
                memo[id(hook)] = hook  # else deepcopy would clone whatever the hook belongs to
    return memo


def cached_values(model: nn.Module, clone: nn.Module) -> dict[str, Tensor]:
    """The stand-ins in a clone for what its model has computed of weights, with a graph, and kept."""
    found = {}
    for (name, module), copied in zip(unwrap(model).named_modules(), clone.modules(), strict=True):
        for key, value in vars(module).items():
            alias = vars(copied).get(key)
            if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf and isinstance(alias, Tensor):
                found[f"{name}.{key}".lstrip(".")] = alias
    return found
