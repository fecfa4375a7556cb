"""One small function for each private name of torch that memsyn uses.

Torch may change these names without notice. Each has a test in tests/test_torch_private.py, so the tests show what a
new version of torch has changed. Must not import any other module of the package.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from operator import attrgetter, methodcaller
from types import CellType, FunctionType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode"]

PACKED_SEQUENCES: Final = (torch._pack_padded_sequence, torch._pad_packed_sequence)
"""The functions that torch.nn.utils.rnn calls to pack and unpack sequences, as a function mode sees them."""


without_function_modes: Final[Callable[[], AbstractContextManager[None]]] = torch._C.DisableTorchFunction
"""A context manager that hides the operations of this thread from every TorchFunctionMode."""

version_of: Final[Callable[[Tensor], int]] = attrgetter("_version")
"""The number of in-place writes to the tensor's memory, as autograd counts them."""

is_view: Final[Callable[[Tensor], bool]] = methodcaller("_is_view")
"""Whether the tensor is a view of another tensor, for autograd."""

base_of: Final[Callable[[Tensor], Tensor | None]] = attrgetter("_base")
"""The base of a view; None if the tensor is not a view."""


foreach_add: Final = torch._foreach_add
foreach_add_: Final = torch._foreach_add_
foreach_addcmul_: Final = torch._foreach_addcmul_
foreach_div: Final = torch._foreach_div
foreach_lerp_: Final = torch._foreach_lerp_
foreach_mul: Final = torch._foreach_mul
foreach_mul_: Final = torch._foreach_mul_
foreach_sqrt: Final = torch._foreach_sqrt
foreach_sub: Final = torch._foreach_sub
foreach_zero_: Final = torch._foreach_zero_
"""One operation on a list of tensors, with one call for all of them where torch can."""


_HOOKED: Final = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__
"""The code of the function that torch puts around the `step` of a class, so that it calls hooks."""


def own_step(kind: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """The `step` that a class of optimizers defines or inherits, without what torch puts around it."""
    step: Any = kind.step
    while getattr(step, "__code__", None) is _HOOKED:
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def num_steps_in_progress(optimizer: torch.optim.Optimizer) -> int:
    """How many calls of an optimizer's `step` are on this thread's stack: 2 if `step` has called `super().step()`."""
    frame, found = sys._getframe(), 0
    while frame is not None:
        if frame.f_code is _HOOKED and frame.f_locals.get("self") is optimizer:
            found += 1
        frame = frame.f_back  # type: ignore[assignment]
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory is exhausted: on the CPU only its text tells."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def unviewed(tensor: Tensor) -> Tensor:
    """An alias with the same memory and graph that is not a view. A hook on a view misses in-place changes of its base.

    Do not use it if the backward pass of the operation that made the tensor reads the tensor again.
    """
    alias: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return alias


def is_custom_function(tensor: Tensor) -> bool:
    """Whether a custom `torch.autograd.Function` made the tensor."""
    return isinstance(tensor.grad_fn, BackwardCFunction)


def compiled_original(model: nn.Module) -> nn.Module | None:
    """The module that was passed to `torch.compile`, if the model is its result; otherwise None."""
    # Told by its class's name: importing the class from torch._dynamo takes seconds.
    if type(model).__name__ != "OptimizedModule" or not type(model).__module__.startswith("torch._dynamo"):
        return None
    original: nn.Module = model._orig_mod  # type: ignore[assignment]
    return original


def uncompiled_name(name: str) -> str:
    """A parameter's name without the part that `torch.compile` adds to it."""
    return name.replace("_orig_mod.", "")


def forward_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The hooks before and after a module's forward, each by key. Delete a key to remove the hook."""
    return module._forward_pre_hooks, module._forward_hooks


def remove_backward_hooks(module: nn.Module) -> None:
    """Remove all backward hooks of a module."""
    module._backward_hooks.clear()
    module._backward_pre_hooks.clear()


def modules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Name -> submodule of a module itself, the dict that the module reads: a shared submodule has all of its names."""
    return module._modules


def named_slots(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(dictionary, name, value) for each submodule, parameter and buffer that the module itself holds."""
    for owner in (module._modules, module._parameters, module._buffers):
        for name, value in owner.items():
            yield owner, name, value


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) for each buffer of the module itself that its `state_dict` holds."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def has_own_parameter(module: nn.Module, name: str) -> bool:
    """Whether the module itself holds a parameter with this name. A parametrized weight is held elsewhere."""
    return name in module._parameters


def copied_function(function: FunctionType, defaults: tuple[Any, ...], closure: tuple[CellType, ...]) -> FunctionType:
    """A function with the code of another, and its own defaults and closure."""
    return FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure)
