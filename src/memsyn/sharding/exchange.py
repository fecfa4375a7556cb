"""What processes send to one another: parts of tensors, whole ones, text, results and failures.

Owns these messages. All processes of a mesh must call each function together, in the same order. Parts go to one
process block after block, so that no process holds more than its part and a block.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from memsyn.errors import ProcessError
from memsyn.sharding.boxes import Box, blocks_of, common_box, cut_mesh_dimensions, holders_of, own_box, slices_of
from memsyn.sharding.parts import cut_whole, is_sharded, local_part, rows_held, sharded_from

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def wire_device(own: torch.device, mesh: Any) -> torch.device:
    """A device that the processes can send from: that of a tensor, or that of the mesh.

    NCCL alone sends nothing from the CPU, where `fully_shard` may keep parameters. Then pieces pass through the GPU.
    """
    known = {pair.partition(":")[0] for pair in dist.get_backend_config().split(",")}
    return own if own.type in known else torch.device(mesh.device_type)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor in every process, without its graph. All processes must call it together."""
    whole = tensor.detach()
    if not is_sharded(whole):
        return whole
    part = local_part(whole)
    found: Tensor = sharded_from(
        part.to(wire_device(part.device, whole.device_mesh)), whole.shape, whole, whole.placements
    ).full_tensor()
    return found.to(part.device)


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
    return cut_whole(whole, like)


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


def values_at(tensor: Tensor, places: Tensor) -> Tensor:
    """The numbers of a tensor at places of its flat order, in every process; nothing is gathered but these.

    All processes must call it together if the tensor is sharded.
    """
    part = local_part(tensor)
    if not is_sharded(tensor) or not cut_mesh_dimensions(tensor):
        return part.reshape(-1)[places.to(part.device)]
    indices, box = torch.unravel_index(places.cpu(), tensor.shape), own_box(tensor)
    held = torch.ones(len(places), dtype=torch.bool)
    for index, (start, stop) in zip(indices, box, strict=True):
        held &= (start <= index) & (index < stop)
    own = [(index[held] - start).to(part.device) for index, (start, _) in zip(indices, box, strict=True)]
    found = torch.zeros(len(places), dtype=part.dtype, device=part.device)
    found[held.to(part.device)] = part[tuple(own)]
    # Of each number all bytes are zero in all processes but one. So the sum of bytes is exact: -0.0 stays -0.0.
    data = found.view(torch.uint8).to(wire_device(part.device, tensor.device_mesh))
    for dim in cut_mesh_dimensions(tensor):
        dist.all_reduce(data, group=tensor.device_mesh.get_group(dim))
    return data.to(part.device).view(part.dtype)


def pieces_on_first(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """The numbers of a tensor in order, flat and on the CPU, at most `size` at a time; no copy of a plain CPU tensor.

    Of a sharded tensor, only the first process gets them, and the others yield nothing: all processes must iterate
    together, to the end. No process holds more than its part and one piece.
    """
    if not is_sharded(tensor):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        for start in range(0, len(flat), size):
            yield flat[start : start + size]
        return
    holders, own, first = holders_of(tensor), dist.get_rank(), first_process(tensor)
    for block in blocks_of(tensor.shape, size):
        parts = [(rank, common) for rank, box in holders if (common := common_box(box, block)) is not None]
        if own == first:
            pieces = [(box, _received(tensor, rank, box)) for rank, box in parts]
            yield pieces[0][1].reshape(-1) if len(pieces) == 1 else _joined(pieces, block, tensor.dtype).reshape(-1)
        else:
            for box in (box for rank, box in parts if rank == own):
                _send_part(tensor, first, box)


def is_first(tensor: Tensor) -> bool:
    """Whether this process is the first of a tensor's mesh: the one that `pieces_on_first` gives the numbers to."""
    return not is_sharded(tensor) or dist.get_rank() == first_process(tensor)


def first_process(tensor: "DTensor") -> int:
    """The rank of the first process of a tensor's mesh."""
    return int(tensor.device_mesh.mesh.flatten()[0])


def whole_on(tensor: Tensor, rank: int) -> Tensor | None:
    """The whole of a tensor in one process, on the device of its part; None in the others. All must call it together.

    A tensor that is not sharded is whole everywhere.
    """
    if not is_sharded(tensor):
        return local_part(tensor)
    holders, own = holders_of(tensor), dist.get_rank()
    if own != rank:
        for box in (box for holder, box in holders if holder == own):
            _send_part(tensor, rank, box)
        return None
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=local_part(tensor).device)
    for holder, box in holders:
        whole[slices_of(box)] = _received(tensor, holder, box, whole.device)
    return whole


def told_by(rank: int, tensor: Tensor, like: "DTensor") -> Tensor:
    """A tensor of one process, in all processes of the mesh of `like`; the others give one of its shape and dtype."""
    mesh, data = like.device_mesh, tensor.contiguous().reshape(-1).view(torch.uint8)
    data = data.to(wire_device(data.device, mesh))
    place = (mesh.mesh == rank).nonzero()[0].tolist()
    for dim, index in enumerate(place if len(data) else ()):
        # After each dimension, all that differ from the process in the dimensions so far have the tensor.
        group = mesh.get_group(dim)
        dist.broadcast(data, src=dist.get_process_group_ranks(group)[index], group=group)
    return data.to(tensor.device).view(tensor.dtype).reshape(tensor.shape)


def text_told_by(rank: int, text: str, like: "DTensor") -> str:
    """The text of one process, in all processes of the mesh of `like`. All must call it together."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = int(told_by(rank, torch.tensor([len(data)]), like))
    own = data if dist.get_rank() == rank else torch.zeros(length, dtype=torch.uint8)
    return bytes(told_by(rank, own, like).tolist()).decode()


@contextmanager
def failing_in_all(like: "DTensor | None") -> Iterator[None]:
    """If the block fails in one process of the mesh of `like`, it fails in all, so that none waits for another.

    Raises:
        ProcessError: the block failed in another process.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as failure:
        error = failure
    if like is not None:
        mesh, flag = like.device_mesh, torch.tensor([int(error is not None)])
        flag = flag.to(wire_device(flag.device, mesh))
        for dim in range(mesh.ndim):
            dist.all_reduce(flag, group=mesh.get_group(dim))
        if int(flag) and error is None:
            raise ProcessError("this failed in another process. Read the errors of the other processes for the cause.")
    if error is not None:
        raise error


Job = tuple[Callable[..., Sequence[Tensor]], Sequence[Tensor]]
"""A function that returns tensors, and the tensors that it takes: whole ones, whatever is sharded."""


def divided(jobs: Sequence[Job], like: "DTensor | None") -> list[Sequence[Tensor]]:
    """The results of jobs, bit for bit equal in all processes of the mesh of `like`: each process does its share.

    Job i is done by process i modulo their number. It alone gets the job's sharded tensors whole, one job at a time,
    and tells the others its result. All processes must call it together, with the same jobs. Without `like`, this
    process does them all.

    Raises:
        ProcessError: a job failed in another process.
    """
    if like is None:
        return [function(*tensors) for function, tensors in jobs]
    ranks, found, own = like.device_mesh.mesh.flatten().tolist(), list[Sequence[Tensor]](), dist.get_rank()
    for start in range(0, len(jobs), len(ranks)):
        turn = list(zip(ranks, jobs[start:], strict=False))
        mine = None
        for rank, (function, tensors) in turn:
            wholes = [whole_on(tensor, rank) for tensor in tensors]
            mine = (function, wholes) if rank == own else mine
        result, error = _done(*mine) if mine is not None else ((), None)
        del mine
        found += [_result_told_by(rank, result, error, like) for rank, _ in turn]
    return found


def _done(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Any]
) -> tuple[Sequence[Tensor], Exception | None]:
    """The result of a job; if it fails, its error: the other processes wait for one of the two."""
    try:
        return function(*tensors), None
    except Exception as error:
        return (), error


def _result_told_by(rank: int, mine: Sequence[Tensor], error: Exception | None, like: "DTensor") -> list[Tensor]:
    """The tensors that one process has computed, in all processes.

    Raises:
        ProcessError: it has failed, and is another one; its own error if it is this one.
    """
    is_own = dist.get_rank() == rank
    known = [[list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for tensor in mine]
    said = json.loads(
        text_told_by(rank, json.dumps(known if error is None else f"{type(error).__name__}: {error}"), like)
    )
    if isinstance(said, str):
        if is_own and error is not None:
            raise error
        raise ProcessError(f"process {rank} failed: {said}. Read its error for the cause.")
    device = local_part(like).device
    return [
        told_by(rank, mine[index] if is_own else torch.empty(shape, dtype=getattr(torch, dtype), device=device), like)
        for index, (shape, dtype) in enumerate(said)
    ]


def _send_part(tensor: "DTensor", rank: int, box: Box) -> None:
    part = local_part(tensor)[slices_of(box, own_box(tensor))].contiguous()
    dist.send(part.reshape(-1).view(torch.uint8).to(wire_device(part.device, tensor.device_mesh)), dst=rank)


def _received(tensor: "DTensor", rank: int, box: Box, device: torch.device | str = "cpu") -> Tensor:
    """The numbers in a box, which a process sends; of this process itself, its own."""
    if rank == dist.get_rank():
        return local_part(tensor)[slices_of(box, own_box(tensor))].to(device).contiguous()
    shape = [stop - start for start, stop in box]
    wire = wire_device(local_part(tensor).device, tensor.device_mesh)
    data = torch.empty(math.prod(shape) * tensor.dtype.itemsize, dtype=torch.uint8, device=wire)
    dist.recv(data, src=rank)
    return data.to(device).view(tensor.dtype).reshape(shape)


def _joined(pieces: Sequence[tuple[Box, Tensor]], block: Box, dtype: torch.dtype) -> Tensor:
    """The numbers of a block from those of the boxes in it."""
    whole = torch.empty([stop - start for start, stop in block], dtype=dtype)
    for box, piece in pieces:
        whole[slices_of(box, block)] = piece
    return whole
