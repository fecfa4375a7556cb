"""A structural clone of the user's model that shares its weight storage.

Owns the clone that is measured in place of the user's model. It has the same weights in the same memory, but its own
buffers, hooks and flags. Must never write to the user's model.
"""

import copy
from collections.abc import Container, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from memsyn.closures import rebind_closures
from memsyn.errors import ModelError
from memsyn.parameters import canonical_name, unwrap
from memsyn.torch_private import forward_hooks, remove_backward_hooks


class Onlooker:
    """A forward hook that reads, but changes nothing. Clones leave it out, and a copy of it does nothing."""

    def __call__(self, *given: Any) -> None:
        """Read the arguments of a module's call."""

    def __reduce__(self) -> Any:
        return Onlooker, ()


def check_measurable(model: nn.Module) -> None:
    """Refuse models that have no per-sample gradients, or that cannot be measured in this form.

    Raises:
        ModelError: the model is not a module, is scripted, or holds a lazy or complex parameter.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module to measure, got a {type(model).__name__}.")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError("a scripted or traced module cannot be measured: measure the module it was made from.")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(f"{name} has no shape yet: run one batch through the model, then measure it.")
        if parameter.requires_grad and parameter.is_complex():
            raise ModelError(
                f"{name} is complex, but importance is defined for real weights only. Freeze it, or store its real and "
                "imaginary parts as two parameters."
            )


def model_copy(
    model: nn.Module, *, private: Container[str] = (), dtype: torch.dtype | None = None, served: bool = False
) -> nn.Module:
    """A structural clone of `model` in eval mode. Its parameters are frozen and alias the storage of the model's own.

    Measuring hooks, freezes and runs the clone. So the user's model stays bit for bit the same, and may serve requests
    at the same time. The clone sets the training flags itself: a module's own `eval()` may rewrite weights (merge an
    adapter).

    Forward hooks are kept, since they may compute a part of the output (as the older `weight_norm` does). Each
    `Onlooker` and all backward hooks are left out.

    A closure over the model, as of a `forward` that was replaced on the instance, becomes a closure over the clone.

    A parameter is copied, not aliased, in three cases: its name is in `private`; it was made in inference mode, so
    autograd refuses it; or its layer's forward rewrites it (`Embedding(max_norm=...)`).

    Args:
        model: the user's model.
        private: names of parameters to copy.
        dtype: the dtype of copied floating point parameters; None keeps their own.
        served: whether other threads use the model at the same time. Then the hooks that `refuse_foreign_hooks` refuses
            are left out too: they must not see samples of other requests, in another thread.

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
    _check_names(model, clone)
    rebind_closures(model, clone)
    for module in clone.modules():
        module.training = False
        remove_backward_hooks(module)
        for hooks in forward_hooks(module):
            for key in [
                key for key, hook in hooks.items() if isinstance(hook, Onlooker) or (served and _is_foreign(hook))
            ]:
                del hooks[key]
        # These options change the gradient or its layout. Importance needs the plain derivative.
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.scale_grad_by_freq = module.sparse = False
        # In evaluation, on some processors, a 4-bit layer of bitsandbytes packs its weight in another way, and writes
        # that into a state that the clone shares with the user's model.
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
        # With frozen parameters it would use nested tensors, which have no backward pass.
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return clone


def _check_names(model: nn.Module, clone: nn.Module) -> None:
    """Refuse a model whose copy is not built like itself.

    Raises:
        ModelError: names what the copy lacks.
    """
    own, copied = ([*_shapes(module)] for module in (model, clone))
    if own != copied:
        lacks = next((name for name, shape in own if (name, shape) not in copied), "none, but has others")
        raise ModelError(
            f"copy.deepcopy of {type(model).__name__} gives a model with other modules or parameters: it "
            f"lacks {lacks}. Keras models copy themselves so, by saving and loading, and cannot be "
            "measured. Build the network of torch.nn modules, or give the module a __deepcopy__(memo) that copies its "
            "attributes with this memo."
        )


def _shapes(model: nn.Module) -> Iterator[tuple[str, torch.Size | None]]:
    """The names of a model's modules and parameters, and the shapes of the parameters."""
    yield from ((name, None) for name, _ in model.named_modules())
    yield from ((name, parameter.shape) for name, parameter in model.named_parameters())


def refuse_foreign_hooks(model: nn.Module) -> None:
    """Refuse forward hooks if it is unknown whether they change the output or only read.

    Two kinds are accepted as a part of the model: methods of modules, and the hooks of torch.nn.utils (the older
    `weight_norm` and `spectral_norm`, pruning).

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
            f"forward hooks may be part of what the model computes: {', '.join(foreign)}. If they only read, pass "
            "onlookers=True to leave them out. If one of them changes the output, make it a method of a module."
        )


def _is_foreign(hook: object) -> bool:
    if isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module):
        return False
    return not any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__)


def _aliases(model: nn.Module, private: Container[str], dtype: torch.dtype | None) -> dict[int, object]:
    """The memo for deepcopy: id of an object that must not be copied -> its replacement in the clone."""
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
        # A module may have set attributes on the parameter, and read them in its forward pass.
        replacement.__dict__.update(vars(parameter))
        memo[id(parameter)] = replacement
    for module in model.modules():
        for value in (*vars(module).values(), *module.buffers(recurse=False)):
            # A cached weight with a graph, which deepcopy refuses.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for hook in (hook for hooks in forward_hooks(module) for hook in hooks.values()):
            if not (isinstance(hook, MethodType) and isinstance(hook.__self__, nn.Module)):
                # Otherwise deepcopy also clones the object that the hook belongs to.
                memo[id(hook)] = hook
    return memo


def cached_values(model: nn.Module, clone: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor in the clone, for each tensor with a graph that the model has computed from weights and cached."""
    found = {}
    for (name, module), copied in zip(unwrap(model).named_modules(), clone.modules(), strict=True):
        for key, value in vars(module).items():
            alias = vars(copied).get(key)
            if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf and isinstance(alias, Tensor):
                found[f"{name}.{key}".lstrip(".")] = alias
    return found
