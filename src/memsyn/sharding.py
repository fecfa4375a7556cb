"""Tensors of which each process holds a part: DTensors, as `fully_shard` makes of parameters.

Owns what a process holds of a tensor, how parts become a tensor again, and sums over parts. Must not know models.
Nothing here imports torch.distributed.tensor before a DTensor is met: the import takes a second.

Words: a tensor is sharded if its values are cut between processes along one dimension. Each process holds a part. The
mesh is the grid of processes; the placement says, for each of its dimensions, whether values are cut or repeated.

    weight (5, 8), Shard(0), 2 processes    process 0 holds rows 0 to 2, process 1 rows 3 and 4
    weight (2, 8), Shard(0), 4 processes    processes 0 and 1 hold a row each, the others a part (0, 8)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from memsyn.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor, of which this process holds a part."""
    own = tensor if type(tensor) is not torch.nn.Parameter else tensor.data
    return type(own).__name__ == "DTensor"  # by its name: importing the class takes a second


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
    from torch.distributed.tensor import DTensor

    whole = like.shape if shape is None else shape
    found = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=whole, stride=_contiguous(whole)
    )
    # `from_local` moves a part to the device of the mesh, also that of a parameter that is kept on the CPU.
    return found if part.device.type == like.device_mesh.device_type else found.to(part.device)


def cut_like(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `like`; no process talks to another.

    A view, so that of a tensor that is mapped from a file no other part is read. Leading dimensions may be longer or
    shorter than those of `like` if it is not sharded.
    """
    if not is_sharded(like) or is_sharded(whole):
        return local_part(whole)
    part = whole.detach()
    for index, place in enumerate(like.placements):
        if type(place).__name__ == "Shard":
            length = part.shape[place.dim]  # type: ignore[attr-defined]
            step = math.ceil(length / like.device_mesh.size(index))
            start = min(length, step * like.device_mesh.get_local_rank(index))
            part = part.narrow(place.dim, start, min(step, length - start))  # type: ignore[attr-defined]
        elif not place.is_replicate():
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(whole.detach(), like.device_mesh, like.placements, src_data_rank=None).to_local()
    return part


def rows_held(like: Tensor) -> slice:
    """The rows (indices of dimension 0) of a tensor that this process holds; all rows unless they are cut.

    Raises:
        ModelError: the tensor is cut along another dimension.
    """
    if not is_sharded(like):
        return slice(0, len(like))
    return _rows_at(like, [like.device_mesh.get_local_rank(index) for index in range(like.device_mesh.ndim)])


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor in every process, without its graph. All processes must call it together."""
    if not is_sharded(tensor):
        return tensor.detach()
    own, place = tensor.detach(), tensor.device_mesh.device_type
    found: Any = own if own.device.type == place else from_part(local_part(own).to(place), own)
    whole: Tensor = found.full_tensor()
    return whole.to(own.device)


def summed_over_parts(numbers: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """Sums over whole tensors from sums over parts: `numbers[i]` is a scalar of this process's part of `likes[i]`.

    All processes of the meshes must call it together, with the tensors in the same order.
    """
    found = list(numbers)
    meshes: dict[Any, list[int]] = {}
    for index, like in enumerate(likes):
        if is_sharded(like):
            meshes.setdefault((like.device_mesh, _cut_dims(like)), []).append(index)
    for (mesh, cut), indices in meshes.items():
        total = torch.stack([found[index].double() for index in indices])
        total = _reduced(total, mesh, cut, dist.ReduceOp.SUM)
        for index, own in zip(indices, total.unbind(), strict=True):
            found[index] = own.to(found[index])
    return found


def pieces_on_first(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """The numbers of a tensor in order, flat and on the CPU, at most `size` at a time; no copy of a plain CPU tensor.

    Of a sharded tensor, only the first process gets them, part after part, and the others yield nothing: all processes
    must iterate together. If the parts do not follow one another in the tensor's order, it is gathered first.
    """
    if not is_sharded(tensor):
        yield from _pieces(local_part(tensor), size)
        return
    mesh, cut = tensor.device_mesh, [index for index, place in enumerate(tensor.placements) if place.is_shard()]
    place: Any = tensor.placements[cut[0]] if len(cut) == 1 else None
    if place is None or type(place).__name__ != "Shard" or math.prod(tensor.shape[: place.dim]) != 1:
        whole = gathered(tensor)
        if is_first(tensor):
            yield from _pieces(whole, size)
        return
    ranks = mesh.mesh.movedim(cut[0], 0).reshape(mesh.size(cut[0]), -1)[:, 0].tolist()  # of the first copy
    own, group = dist.get_rank(), mesh.get_group(cut[0])
    if own not in ranks:
        return
    length, step = tensor.shape[place.dim], math.ceil(tensor.shape[place.dim] / len(ranks))
    row = tensor.numel() // max(1, length)
    for index, rank in enumerate(ranks):
        count = row * max(0, min(step, length - index * step))
        if rank == ranks[0] == own:
            yield from _pieces(local_part(tensor), size)
        elif own == ranks[0]:
            for start in range(0, count, size):
                piece = torch.empty(min(size, count - start), dtype=tensor.dtype, device=local_part(tensor).device)
                dist.recv(piece, src=rank, group=group)
                yield piece.cpu()
        elif own == rank:
            for piece in local_part(tensor).contiguous().reshape(-1).split(size) if count else ():
                dist.send(piece, dst=ranks[0], group=group)


def is_first(tensor: Tensor) -> bool:
    """Whether this process is the first of a tensor's mesh: the one that `pieces_on_first` gives the numbers to."""
    return not is_sharded(tensor) or dist.get_rank() == int(tensor.device_mesh.mesh.flatten()[0])


def _pieces(own: Tensor, size: int) -> Iterator[Tensor]:
    flat = own.cpu().contiguous().reshape(-1)
    for start in range(0, len(flat), size):
        yield flat[start : start + size]


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))


def all_rows_held(like: Tensor) -> list[slice]:
    """`rows_held` of each process of the mesh of a tensor."""
    if not is_sharded(like):
        return [slice(0, len(like))]
    return [_rows_at(like, place) for place in product(*map(range, like.device_mesh.shape))]


def _rows_at(like: "DTensor", place: Sequence[int]) -> slice:
    """The rows of a tensor at a place in its mesh."""
    if any(own.is_shard() and not own.is_shard(0) for own in like.placements):
        raise ModelError(f"a tensor of shape {tuple(like.shape)} is cut along another dimension than 0.")
    start, num_rows = 0, len(like)
    for index, own in enumerate(like.placements):
        if own.is_shard():
            step = math.ceil(num_rows / like.device_mesh.size(index))
            first = min(num_rows, step * place[index])
            start, num_rows = start + first, min(step, num_rows - first)
    return slice(start, start + num_rows)


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor as `like` is placed, in memory of its own if it had to be cut or gathered: a DTensor, or a whole tensor.

    No process talks to another if the tensor is whole, or is placed like `like` already. Else it is gathered, and all
    processes must call this together.
    """
    if not is_sharded(like):
        return gathered(tensor)
    if is_sharded(tensor) and (tensor.device_mesh, tensor.placements) == (like.device_mesh, like.placements):
        return tensor.detach()
    whole = gathered(tensor)
    return from_part(cut_like(whole, like).clone(memory_format=torch.contiguous_format), like, whole.shape)


def redistributed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A DTensor as `like` is placed, such as a gradient that is still to be summed. All processes must call it."""
    return tensor.redistribute(like.device_mesh, like.placements) if is_sharded(tensor) and is_sharded(like) else tensor


def part_beside(tensor: Tensor, like: Tensor) -> Tensor:
    """The rows of a tensor that lie beside those which this process holds of `like`; `like` may have more rows.

        tensor (3, 8), like (5, 8), 2 processes    process 0 holds rows 0 to 2 of both, process 1 a part (0, 8)

    All processes must call it together if a DTensor is not placed like `like`: it is gathered.
    """
    if tensor.shape == like.shape:
        return local_part(placed_like(tensor, like))
    held = rows_held(like)
    return gathered(tensor)[held.start : held.stop]


def summed_over_parts_(tensors: Sequence[Tensor], like: Tensor) -> None:
    """Add up tensors over the processes among which `like` is cut, in place, at once. They have one dtype and device.

    All processes of the mesh must call it together.
    """
    if not is_sharded(like):
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat = _reduced(flat, like.device_mesh, _cut_dims(like), dist.ReduceOp.SUM).to(flat.device)
    for tensor, own in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(own.view_as(tensor))


def largest_over_parts(numbers: Sequence[float], likes: Sequence[Tensor]) -> list[float]:
    """Each number's largest value over the processes among which one of `likes` is cut. All must call it together."""
    found = torch.tensor(numbers, dtype=torch.float64)
    for like in {(own.device_mesh, own.placements): own for own in likes if is_sharded(own)}.values():
        found = _reduced(found, like.device_mesh, _cut_dims(like), dist.ReduceOp.MAX).cpu()
    return found.tolist()


def _cut_dims(like: "DTensor") -> tuple[int, ...]:
    """The dimensions of the mesh along which a tensor is cut."""
    return tuple(dim for dim, place in enumerate(like.placements) if place.is_shard())


def _reduced(tensor: Tensor, mesh: Any, cut: Sequence[int], operation: Any) -> Tensor:
    """On the device of the mesh: parameters that are kept on the CPU belong to a mesh of accelerators."""
    found = tensor.to(mesh.device_type) if tensor.device.type != mesh.device_type else tensor
    for dim in cut:
        dist.all_reduce(found, op=operation, group=mesh.get_group(dim))
    return found


def reshard(model: "torch.nn.Module") -> None:
    """Let the parameters of a model be those that its optimizer holds: parts, also after a forward pass alone.

    `fully_shard` shows whole parameters, which are other tensors, from a forward pass to the end of a backward pass.
    """
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()  # type: ignore[operator]
