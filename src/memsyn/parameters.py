"""The names of a model's parameters, the same in memory, in errors and on disk.

Owns unwrapping (DataParallel, DistributedDataParallel, torch.compile), the canonical name of every parameter and
statistic, its layer, and the fingerprint of weights. Must not change the model.
"""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from memsyn.torch_private import compiled_original, persistent_buffers, uncompiled_name


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
    """The name of a parameter in the user's own module, without the part that `torch.compile` adds."""
    return uncompiled_name(name)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter of the unwrapped model. A tied parameter has its first name."""
    return {canonical_name(name): parameter for name, parameter in unwrap(model).named_parameters()}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter, for the parameters that require a gradient."""
    return {name: p for name, p in named_parameters(model).items() if p.requires_grad}


def layer_of(name: str) -> str:
    """The layer of a parameter, for tables and reports: its name up to the last dot.

    A parameter of the model itself has no dot in its name and is a layer of its own: an empty name would hide it.

    Example:
        >>> layer_of("encoder.0.weight"), layer_of("position_table")
        ('encoder.0', 'position_table')
    """
    return name.rpartition(".")[0] or name


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that the model's output depends on: its parameters, and its floating point buffers."""
    buffers = {canonical_name(name): buffer for name, buffer in unwrap(model).named_buffers()}
    return {**named_parameters(model), **{name: b for name, b in buffers.items() if b.is_floating_point()}}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> floating point buffer that a state_dict holds: above all running statistics.

    Outputs depend on them as they do on parameters, but no optimizer moves them. A shared buffer has its first name.
    Buffers without values (lazy, or on the meta device) and sparse ones are left out.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in unwrap(model).named_modules():
        for name, buffer in persistent_buffers(module):
            has_values = not isinstance(buffer, UninitializedBuffer) and not buffer.is_meta
            if has_values and buffer.is_floating_point() and buffer.layout == torch.strided:
                found.setdefault(id(buffer), (canonical_name(f"{prefix}.{name}".lstrip(".")), buffer))
    return dict(found.values())


def moved_statistics(remembered: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Names of the remembered statistics that the model has with other values, in another shape, or not at all."""
    present = statistics(model)
    return [n for n, values in remembered.items() if n not in present or not same_values(present[n], values)]


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, and the same values in the dtype of the first; NaN is equal to NaN."""
    if one.shape != other.shape:
        return False
    one, other = (tensor.detach().to(one).to(wide_dtype(one)) for tensor in (one, other))
    return bool(((one == other) | ((one != one) & (other != other))).all())


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype for sums and penalties of a tensor: float32 at least, since half precision overflows."""
    return torch.float32 if tensor.dtype.itemsize == 1 else torch.promote_types(tensor.dtype, torch.float32)


def fingerprint(of: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 of a model's weights, bit for bit: "sha256:" and 64 hexadecimal digits.

    `Importance.fingerprint` says at which weights an importance
    was measured, if it is known. Names, dtypes, shapes and bytes count; the order, the device and the strides do not.
    At most one tensor is copied at a time.

    Args:
        of: a model, of which parameters and floating point buffers count; or tensors by name.

    Example:
        >>> import torch, memsyn
        >>> model = torch.nn.Linear(2, 1)
        >>> before = memsyn.fingerprint(model)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1)
        >>> memsyn.fingerprint(model) == before
        False
    """
    tensors = weights(of) if isinstance(of, nn.Module) else of
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if hasattr(tensor, "full_tensor"):  # a DTensor
            tensor = tensor.full_tensor()
        tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor.resolve_conj().resolve_neg()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"
