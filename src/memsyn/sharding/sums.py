"""Sums and maxima over the processes that hold parts of a tensor.

Owns these reductions. All processes of a mesh must call them together, in the same order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memsyn.sharding.boxes import cut_mesh_dimensions
from memsyn.sharding.exchange import wire_device
from memsyn.sharding.parts import is_sharded


def summed_over_parts(numbers: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """Sums over whole tensors from sums over parts: `numbers[i]` is a scalar of this process's part of `likes[i]`.

    All processes of the meshes must call it together, with the tensors in the same order.
    """
    found = list(numbers)
    meshes: dict[Any, list[int]] = {}
    for index, like in enumerate(likes):
        if is_sharded(like):
            meshes.setdefault((like.device_mesh, tuple(cut_mesh_dimensions(like))), []).append(index)
    for (mesh, cut), indices in meshes.items():
        total = torch.stack([found[index].double() for index in indices])
        total = _reduced(total, mesh, cut, dist.ReduceOp.SUM)
        for index, own in zip(indices, total.unbind(), strict=True):
            found[index] = own.to(found[index])
    return found


def summed_over_parts_(tensors: Sequence[Tensor], like: Tensor) -> None:
    """Add up tensors over the processes among which `like` is cut, in place, at once. They have one dtype and device.

    All processes of the mesh must call it together.
    """
    if not is_sharded(like):
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat = _reduced(flat, like.device_mesh, cut_mesh_dimensions(like), dist.ReduceOp.SUM).to(flat.device)
    for tensor, own in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(own.view_as(tensor))


def largest_over_parts(numbers: Sequence[float], likes: Sequence[Tensor]) -> list[float]:
    """Each number's largest value over the processes among which one of `likes` is cut. All must call it together."""
    found = torch.tensor(numbers, dtype=torch.float64)
    for like in {(own.device_mesh, own.placements): own for own in likes if is_sharded(own)}.values():
        found = _reduced(found, like.device_mesh, cut_mesh_dimensions(like), dist.ReduceOp.MAX).cpu()
    return found.tolist()


def _reduced(tensor: Tensor, mesh: Any, cut: Sequence[int], operation: Any) -> Tensor:
    """A reduction over some dimensions of a mesh, where its processes can send from."""
    found = tensor.to(wire_device(tensor.device, mesh))
    for dim in cut:
        dist.all_reduce(found, op=operation, group=mesh.get_group(dim))
    return found
