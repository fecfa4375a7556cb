"""A stand-in for the user's model that shares its weight storage.

Owns the clone that is measured in place of the user's model: same weights in the same memory, its own buffers,
hooks and flags. Must never write to the user's model.
"""

import copy
from types import MethodType

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from memsyn.errors import ModelError
from memsyn.parameters import unwrap


def shadow(model: nn.Module) -> nn.Module:
    """A structural clone of `model` in eval mode whose frozen parameters alias the model's own storage.

    Measuring hooks, freezes and runs the clone, so the user's model stays bit for bit as it is, and may go on
    serving requests meanwhile. Forward hooks are kept, since they may be part of what the model computes (the
    older `weight_norm` is one); backward hooks are left out. A parameter is copied only where an alias would not do:
    made in inference mode (autograd refuses it), or rewritten by its layer's forward (`Embedding(max_norm=...)`).

    Raises:
        ModelError: a lazy parameter has no shape yet, or the model cannot be cloned.
    """
    model = unwrap(model)
    try:
        clone = copy.deepcopy(model, _aliases(model))
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be cloned for measuring: {type(error).__name__}: {error}. Keep locks, "
            "open files and handles out of the module, or give it a __deepcopy__ that leaves them out."
        ) from error
    for module in clone.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):  # the derivative itself, not a scaled or sparse update
            module.scale_grad_by_freq = module.sparse = False
    return clone.eval()


def _aliases(model: nn.Module) -> dict[int, object]:
    """What deepcopy must not copy: id of the original -> what stands for it in the clone."""
    memo: dict[int, object] = {}
    rewritten = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    }
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(f"{name} has no shape yet: run one batch through the model, then measure it.")
        alias = parameter.detach()
        if id(parameter) in rewritten or parameter.is_inference():
            alias = alias.clone()
        memo[id(parameter)] = nn.Parameter(alias, requires_grad=False)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a cached weight: deepcopy refuses it
                memo[id(value)] = value.detach()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not (isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module)):
                memo[id(hook)] = hook  # else deepcopy would clone whatever the hook belongs to
    return memo
