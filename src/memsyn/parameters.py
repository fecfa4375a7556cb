"""The names of a model's parameters, the same in memory, in errors and on disk.

Owns unwrapping (DataParallel, DistributedDataParallel, torch.compile), the canonical name of every parameter, and the
fingerprint of named tensors. Must not change the model.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from memsyn.torch_private import compiled_original, uncompiled_name


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DataParallel, DistributedDataParallel or a compiled model."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif (original := compiled_original(model)) is not None:
            model = original
        else:
            return model


def canonical_name(name: str) -> str:
    """The name that a parameter has in the user's own module."""
    return uncompiled_name(name)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of the unwrapped model by its canonical name; a tied one by its first name."""
    return {canonical_name(name): parameter for name, parameter in unwrap(model).named_parameters()}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by canonical name."""
    return {name: p for name, p in named_parameters(model).items() if p.requires_grad}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All numbers that what the model computes depends on: its parameters, and its buffers of floating point."""
    buffers = {canonical_name(name): buffer for name, buffer in unwrap(model).named_buffers()}
    return {**named_parameters(model), **{name: b for name, b in buffers.items() if b.is_floating_point()}}


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What sums and penalties are computed in: float32 at least, since half precision overflows."""
    return torch.promote_types(tensor.dtype, torch.float32)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, bit for bit: "sha256:" and 64 hexadecimal digits.

    Names, dtypes, shapes and bytes count; the order in the mapping, the device and the strides do not. No more than one
    tensor is copied at a time.

    Example:
        >>> import torch
        >>> ones = torch.ones(2, 3)
        >>> fingerprint({"a": ones, "b": ones}) == fingerprint({"b": ones.clone(), "a": ones})
        True
        >>> fingerprint({"a": ones}) == fingerprint({"a": ones.half()})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if hasattr(tensor, "full_tensor"):  # a DTensor
            tensor = tensor.full_tensor()
        tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor.resolve_conj().resolve_neg()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
