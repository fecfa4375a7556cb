"""Tensors of which each process holds a part: DTensors, as `fully_shard` makes of parameters.

Owns what a process holds of a tensor, and how parts become a tensor again. No process talks to another here. Nothing
imports torch.distributed.tensor before a DTensor is met: the import takes a second.

Words: a tensor is sharded if its values are cut between processes along one dimension. Each process holds a part. The
mesh is the grid of processes; the placement says, for each of its dimensions, whether values are cut or repeated.

    weight (5, 8), Shard(0), 2 processes    process 0 holds rows 0 to 2, process 1 rows 3 and 4
    weight (2, 8), Shard(0), 4 processes    processes 0 and 1 hold a row each, the others a part (0, 8)
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from memsyn.errors import ModelError
from memsyn.sharding.boxes import box_at, cut_dimension, own_box, slices_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return type(tensor).__name__ == "DTensor"  # by its name: importing the class takes a second


def any_sharded(tensors: Sequence[Tensor] | Mapping[str, Tensor]) -> bool:
    """Whether one of some tensors is a DTensor."""
    return any(is_sharded(t) for t in (tensors.values() if isinstance(tensors, Mapping) else tensors))


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory and without its graph; of a plain tensor, all of it."""
    if is_sharded(tensor):
        with torch.no_grad():  # then this is the tensor that is held, and no view of it, at a fifth of the time
            return tensor.to_local()
    return tensor.detach()


def from_part(part: Tensor, like: Tensor, shape: torch.Size | None = None) -> Tensor:
    """A tensor of the mesh and placement of `like`, of which this process holds `part`; of its shape, or another."""
    if not is_sharded(like):
        return part
    return sharded_from(part, like.shape if shape is None else shape, like, like.placements)


def sharded_from(part: Tensor, shape: Sequence[int], like: "DTensor", placements: Sequence[Any]) -> "DTensor":
    """A tensor of the mesh of `like`, of which this process holds a part by these placements."""
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    strides = tuple(math.prod(size[index + 1 :]) for index in range(len(size)))
    found: Any = DTensor.from_local(part, like.device_mesh, placements, run_check=False, shape=size, stride=strides)
    # `from_local` moves a part to the device of the mesh, also that of a parameter that is kept on the CPU.
    whole: DTensor = found if part.device.type == like.device_mesh.device_type else found.to(part.device)
    return whole


def cut_like(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `like`, on its device; no process talks to another.

    A copy of that part alone. If `whole` has fewer rows than `like`, it is the part of the rows that are there.

    Raises:
        ModelError: both are sharded, in different ways.
    """
    if not is_sharded(like):
        return local_part(whole)
    if is_sharded(whole):
        if (whole.device_mesh, whole.placements) != (like.device_mesh, like.placements):
            raise ModelError(
                f"a tensor of shape {tuple(whole.shape)} is cut as {whole.placements}, the parameter as "
                f"{like.placements}, or on another mesh. Save it, and load it with like=model."
            )
        return local_part(whole)
    part = whole.detach()[slices_of(own_box(like))]
    return part.to(local_part(like).device, copy=True, memory_format=torch.contiguous_format)


def rows_held(like: Tensor) -> slice:
    """The rows (indices of dimension 0) of a tensor that this process holds; all rows unless they are cut.

    Raises:
        ModelError: the tensor is cut along another dimension.
    """
    if not is_sharded(like):
        return slice(0, len(like))
    return _rows_at(like, like.device_mesh.get_coordinate() or ())


def all_rows_held(like: Tensor) -> list[slice]:
    """`rows_held` of each process of the mesh of a tensor."""
    if not is_sharded(like):
        return [slice(0, len(like))]
    return [_rows_at(like, place) for place in itertools.product(*map(range, like.device_mesh.shape))]


def _rows_at(like: "DTensor", where: Sequence[int]) -> slice:
    """The rows of a tensor at a place in its mesh.

    Raises:
        ModelError: the tensor is cut along another dimension than 0.
    """
    if any(cut_dimension(place, like.ndim) not in (0, None) for place in like.placements):
        raise ModelError(f"a tensor of shape {tuple(like.shape)} is cut along another dimension than 0.")
    return slice(*box_at(like.shape, like.device_mesh.shape, like.placements, where)[0])


def empty_cut(shape: Sequence[int], dtype: torch.dtype, like: "DTensor", dim: int | None = None) -> "DTensor":
    """A tensor without values that is cut as `like`, or along dimension `dim` between the same processes."""
    from torch.distributed.tensor import Replicate, Shard

    placements = [
        Replicate() if cut_dimension(place, like.ndim) is None else place if dim is None else Shard(dim)
        for place in like.placements
    ]
    where = like.device_mesh.get_coordinate() or ()
    box = box_at(shape, like.device_mesh.shape, placements, where)
    part = torch.empty([stop - start for start, stop in box], dtype=dtype, device=local_part(like).device)
    return sharded_from(part, shape, like, placements)


def cut_whole(whole: Tensor, like: Tensor, dim: int | None = None) -> Tensor:
    """A whole tensor, cut as `like`, or along dimension `dim` between the same processes; none talks to another.

    Unchanged if `like` is no sharded tensor, or `whole` is one.
    """
    if not is_sharded(like) or is_sharded(whole):
        return whole
    found = empty_cut(whole.shape, whole.dtype, like, dim)
    local_part(found).copy_(whole.detach()[slices_of(own_box(found))])
    return found


def on_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of tensors of one shape, number by number; if one of them is sharded, so is the result.

    Whole tensors are cut as the sharded one, and no process talks to another.
    """
    like = next(filter(is_sharded, tensors), None)
    if like is None:
        return function(*tensors)
    return from_part(function(*(cut_like(tensor, like) for tensor in tensors)), like)


def one_sharded(tensors: Iterable[Tensor]) -> "DTensor | None":
    """The first of some tensors that is sharded; None if none is.

    Raises:
        ModelError: some are cut between other processes than others.
    """
    found = [tensor for tensor in tensors if is_sharded(tensor)]
    for tensor in found[1:]:
        check_same_processes(found[0], tensor)
    return found[0] if found else None


def check_same_processes(one: "DTensor", other: "DTensor") -> None:
    """Check that two tensors are cut between the same processes.

    Raises:
        ModelError: they are not.
    """
    meshes = one.device_mesh, other.device_mesh
    ranks = [sorted(mesh.mesh.flatten().tolist()) for mesh in meshes]
    if ranks[0] != ranks[1]:
        raise ModelError(
            f"tensors are cut between different processes: {ranks[0]} and {ranks[1]}. Keep those of each group of "
            "processes in a memory of its own, with select(only=...)."
        )


def reshard(model: "torch.nn.Module") -> None:
    """Let the parameters of a model be those that its optimizer holds: parts, also after a forward pass alone.

    `fully_shard` shows whole parameters, which are other tensors, from a forward pass to the end of a backward pass.
    """
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()  # type: ignore[operator]
