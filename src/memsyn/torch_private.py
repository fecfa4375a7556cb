"""Every torch API that is not public, under a name of ours, one small function each.

Owns the use of names that torch may change without notice. Each has a test in tests/test_torch_private.py, so a new
torch shows at once what it has changed. Must not import anything else of the package.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from operator import attrgetter, methodcaller
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode"]

PACKED_SEQUENCES: Final = (torch._pack_padded_sequence, torch._pad_packed_sequence)
"""What torch.nn.utils.rnn calls to pack and unpack sequences, as a function mode sees it."""


without_function_modes: Final[Callable[[], AbstractContextManager[None]]] = torch._C.DisableTorchFunction
"""A context manager: while open, no TorchFunctionMode sees what this thread computes."""

version_of: Final[Callable[[Tensor], int]] = attrgetter("_version")
"""How often the tensor's memory was written to in place, as autograd counts it."""

is_view: Final[Callable[[Tensor], bool]] = methodcaller("_is_view")
"""Whether autograd takes the tensor for a view of another one."""

base_of: Final[Callable[[Tensor], Tensor | None]] = attrgetter("_base")
"""The tensor that a view is a view of; None if it is no view."""


def unviewed(tensor: Tensor) -> Tensor:
    """The same memory and the same graph, but no view: a hook on a view would miss in-place changes of its base.

    Only for a tensor whose memory the operation that made it does not read again in the backward pass.
    """
    alias: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return alias


def is_custom_function(tensor: Tensor) -> bool:
    """Whether a `torch.autograd.Function` of somebody's own made the tensor."""
    return isinstance(tensor.grad_fn, BackwardCFunction)


def compiled_original(model: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` was given, if the model is what it returned."""
    if type(model).__name__ != "OptimizedModule":  # importing its class from torch._dynamo takes seconds
        return None
    original: nn.Module = model._orig_mod  # type: ignore[assignment]
    return original


def uncompiled_name(name: str) -> str:
    """A parameter's name without what `torch.compile` puts into it."""
    return name.replace("_orig_mod.", "")


def forward_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The hooks before and after a module's forward, by key; deleting a key removes the hook."""
    return module._forward_pre_hooks, module._forward_hooks


def remove_backward_hooks(module: nn.Module) -> None:
    """Leave a module without backward hooks."""
    module._backward_hooks.clear()
    module._backward_pre_hooks.clear()


def named_slots(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Every (dictionary, name, value) in which a module itself holds submodules, parameters and buffers."""
    for owner in (module._modules, module._parameters, module._buffers):
        for name, value in owner.items():
            yield owner, name, value


def has_own_parameter(module: nn.Module, name: str) -> bool:
    """Whether the module holds a plain parameter of that name: a parametrized or shared one may be elsewhere."""
    return name in module._parameters
