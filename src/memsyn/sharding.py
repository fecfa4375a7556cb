"""Tensors of which each process holds a part: DTensors, as `fully_shard` makes of parameters.

Owns what a process holds of a tensor, how parts become a tensor again, and sums over parts. Must not know models.
Nothing here imports torch.distributed.tensor before a DTensor is met: the import takes a second.

Words: a tensor is sharded if its values are cut between processes along one dimension. Each process holds a part. The
mesh is the grid of processes; the placement says, for each of its dimensions, whether values are cut or repeated.

    weight (5, 8), Shard(0), 2 processes    process 0 holds rows 0 to 2, process 1 rows 3 and 4
    weight (2, 8), Shard(0), 4 processes    processes 0 and 1 hold a row each, the others a part (0, 8)
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from memsyn.errors import ModelError, ProcessError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Box = tuple[tuple[int, int], ...]
"""Of each dimension, the first index and the end of those that a part holds."""


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
    return _sharded(part, like.shape if shape is None else shape, like, like.placements)


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
    part = whole.detach()[_slices(_own_box(like))]
    return part.to(local_part(like).device, copy=True, memory_format=torch.contiguous_format)


def rows_held(like: Tensor) -> slice:
    """The rows (indices of dimension 0) of a tensor that this process holds; all rows unless they are cut.

    Raises:
        ModelError: the tensor is cut along another dimension.
    """
    if not is_sharded(like):
        return slice(0, len(like))
    return _rows_at(like, like.device_mesh.get_coordinate() or ())


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor in every process, without its graph. All processes must call it together."""
    whole = tensor.detach()
    if not is_sharded(whole):
        return whole
    part = local_part(whole)
    found: Tensor = _sharded(
        part.to(_wire(part.device, whole.device_mesh)), whole.shape, whole, whole.placements
    ).full_tensor()
    return found.to(part.device)


def summed_over_parts(numbers: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """Sums over whole tensors from sums over parts: `numbers[i]` is a scalar of this process's part of `likes[i]`.

    All processes of the meshes must call it together, with the tensors in the same order.
    """
    found = list(numbers)
    meshes: dict[Any, list[int]] = {}
    for index, like in enumerate(likes):
        if is_sharded(like):
            meshes.setdefault((like.device_mesh, tuple(_cut_mesh_dimensions(like))), []).append(index)
    for (mesh, cut), indices in meshes.items():
        total = torch.stack([found[index].double() for index in indices])
        total = _reduced(total, mesh, cut, dist.ReduceOp.SUM)
        for index, own in zip(indices, total.unbind(), strict=True):
            found[index] = own.to(found[index])
    return found


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
    holders, own, first = _holders(tensor), dist.get_rank(), first_process(tensor)
    for block in _blocks(tensor.shape, size):
        parts = [(rank, common) for rank, box in holders if (common := _common(box, block)) is not None]
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


def on_parts(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of tensors of one shape, number by number; if one of them is sharded, so is the result.

    Whole tensors are cut as the sharded one, and no process talks to another.
    """
    like = next(filter(is_sharded, tensors), None)
    if like is None:
        return function(*tensors)
    return from_part(function(*(cut_like(tensor, like) for tensor in tensors)), like)


def empty_cut(shape: Sequence[int], dtype: torch.dtype, like: "DTensor", dim: int | None = None) -> "DTensor":
    """A tensor without values that is cut as `like`, or along dimension `dim` between the same processes."""
    from torch.distributed.tensor import Replicate, Shard

    placements = [
        Replicate() if _cut_dimension(place, like.ndim) is None else place if dim is None else Shard(dim)
        for place in like.placements
    ]
    where = like.device_mesh.get_coordinate() or ()
    box = _box(shape, like.device_mesh.shape, placements, where)
    part = torch.empty([stop - start for start, stop in box], dtype=dtype, device=local_part(like).device)
    return _sharded(part, shape, like, placements)


def cut_whole(whole: Tensor, like: Tensor, dim: int | None = None) -> Tensor:
    """A whole tensor, cut as `like`, or along dimension `dim` between the same processes; none talks to another.

    Unchanged if `like` is no sharded tensor, or `whole` is one.
    """
    if not is_sharded(like) or is_sharded(whole):
        return whole
    found = empty_cut(whole.shape, whole.dtype, like, dim)
    local_part(found).copy_(whole.detach()[_slices(_own_box(found))])
    return found


def values_at(tensor: Tensor, places: Tensor) -> Tensor:
    """The numbers of a tensor at places of its flat order, in every process; nothing is gathered but these.

    All processes must call it together if the tensor is sharded.
    """
    part = local_part(tensor)
    if not is_sharded(tensor) or not _cut_mesh_dimensions(tensor):
        return part.reshape(-1)[places.to(part.device)]
    indices, box = torch.unravel_index(places.cpu(), tensor.shape), _own_box(tensor)
    held = torch.ones(len(places), dtype=torch.bool)
    for index, (start, stop) in zip(indices, box, strict=True):
        held &= (start <= index) & (index < stop)
    own = [(index[held] - start).to(part.device) for index, (start, _) in zip(indices, box, strict=True)]
    found = torch.zeros(len(places), dtype=part.dtype, device=part.device)
    found[held.to(part.device)] = part[tuple(own)]
    # Of each number all bytes are zero in all processes but one. So the sum of bytes is exact: -0.0 stays -0.0.
    data = found.view(torch.uint8).to(_wire(part.device, tensor.device_mesh))
    for dim in _cut_mesh_dimensions(tensor):
        dist.all_reduce(data, group=tensor.device_mesh.get_group(dim))
    return data.to(part.device).view(part.dtype)


def whole_on(tensor: Tensor, rank: int) -> Tensor | None:
    """The whole of a tensor in one process, on the device of its part; None in the others. All must call it together.

    A tensor that is not sharded is whole everywhere.
    """
    if not is_sharded(tensor):
        return local_part(tensor)
    holders, own = _holders(tensor), dist.get_rank()
    if own != rank:
        for box in (box for holder, box in holders if holder == own):
            _send_part(tensor, rank, box)
        return None
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=local_part(tensor).device)
    for holder, box in holders:
        whole[_slices(box)] = _received(tensor, holder, box, whole.device)
    return whole


def told_by(rank: int, tensor: Tensor, like: "DTensor") -> Tensor:
    """A tensor of one process, in all processes of the mesh of `like`; the others give one of its shape and dtype."""
    mesh, data = like.device_mesh, tensor.contiguous().reshape(-1).view(torch.uint8)
    data = data.to(_wire(data.device, mesh))
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
        flag = flag.to(_wire(flag.device, mesh))
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


def _sharded(part: Tensor, shape: Sequence[int], like: "DTensor", placements: Sequence[Any]) -> "DTensor":
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    strides = tuple(math.prod(size[index + 1 :]) for index in range(len(size)))
    found: Any = DTensor.from_local(part, like.device_mesh, placements, run_check=False, shape=size, stride=strides)
    # `from_local` moves a part to the device of the mesh, also that of a parameter that is kept on the CPU.
    whole: DTensor = found if part.device.type == like.device_mesh.device_type else found.to(part.device)
    return whole


def _cut_dimension(place: Any, ndim: int) -> int | None:
    """The dimension of a tensor along which a placement cuts it; None if it repeats it.

    Raises:
        ModelError: it does neither: processes hold terms of a sum.
    """
    kind = type(place).__name__
    if kind not in ("Shard", "_StridedShard", "Replicate"):
        raise ModelError(f"a tensor is held as {place}; expected one whose values are cut or repeated.")
    return None if kind == "Replicate" else int(place.dim) % max(1, ndim)


def _cut_mesh_dimensions(tensor: "DTensor") -> list[int]:
    """The dimensions of a mesh along which a tensor is cut; along the others it is repeated."""
    places = enumerate(tensor.placements)
    return [index for index, place in places if _cut_dimension(place, tensor.ndim) is not None]


def _box(shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Any], where: Sequence[int]) -> Box:
    """What the process at a place of the mesh holds: (5, 8) by Shard(0) at 1 of 2 is rows 3 to 4, ((3, 5), (0, 8))."""
    box = [(0, length) for length in shape]
    is_strided = [type(place).__name__ == "_StridedShard" for place in placements]
    # Tensor parallelism cuts first, then `fully_shard` cuts each part: its mesh dimension is the outer one, and its
    # placement is strided: rows 0 to 7 by (_StridedShard(0), Shard(0)) on (2, 2): at (1, 0) are rows 2 and 3.
    order = [index for index, strided in enumerate(is_strided) if not strided]
    for index in [*order, *(index for index in reversed(range(len(placements))) if is_strided[index])]:
        dim = _cut_dimension(placements[index], len(shape))
        if dim is not None:
            start, stop = box[dim]
            step = math.ceil((stop - start) / mesh_shape[index])
            first = min(stop, start + step * where[index])
            box[dim] = first, min(stop, first + step)
    return tuple(box)


def _own_box(tensor: "DTensor") -> Box:
    mesh = tensor.device_mesh
    return _box(tensor.shape, mesh.shape, tensor.placements, mesh.get_coordinate() or ())


def _holders(tensor: "DTensor") -> list[tuple[int, Box]]:
    """Processes that together hold a tensor once: each rank with its box."""
    mesh, found = tensor.device_mesh, dict[Box, int]()
    for where in itertools.product(*map(range, mesh.shape)):
        box = _box(tensor.shape, mesh.shape, tensor.placements, where)
        if all(start < stop for start, stop in box):
            found.setdefault(box, int(mesh.mesh[where]))
    return [(rank, box) for box, rank in found.items()]


def _blocks(shape: Sequence[int], size: int) -> Iterator[Box]:
    """Boxes that follow one another in a tensor's order, each of at most `size` numbers."""
    count, row = math.prod(shape), math.prod(shape[1:])
    if count <= size:
        if count:
            yield tuple((0, length) for length in shape)
    elif row <= size:
        for start in range(0, shape[0], size // row):
            yield ((start, min(start + size // row, shape[0])), *((0, length) for length in shape[1:]))
    else:
        for index in range(shape[0]):
            for inner in _blocks(shape[1:], size):
                yield ((index, index + 1), *inner)


def _common(one: Box, other: Box) -> Box | None:
    """What two boxes share; None if they share nothing."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return found if all(start < stop for start, stop in found) else None


def _slices(box: Box, origin: Box | None = None) -> tuple[slice, ...]:
    """A box as an index, of a tensor that begins at the box `origin`."""
    starts = [0] * len(box) if origin is None else [start for start, _ in origin]
    return tuple(slice(start - first, stop - first) for (start, stop), first in zip(box, starts, strict=True))


def _wire(own: torch.device, mesh: Any) -> torch.device:
    """A device that the processes can send from: that of a tensor, or that of the mesh.

    NCCL alone sends nothing from the CPU, where `fully_shard` may keep parameters. Then pieces pass through the GPU.
    """
    known = {pair.partition(":")[0] for pair in dist.get_backend_config().split(",")}
    return own if own.type in known else torch.device(mesh.device_type)


def _send_part(tensor: "DTensor", rank: int, box: Box) -> None:
    part = local_part(tensor)[_slices(box, _own_box(tensor))].contiguous()
    dist.send(part.reshape(-1).view(torch.uint8).to(_wire(part.device, tensor.device_mesh)), dst=rank)


def _received(tensor: "DTensor", rank: int, box: Box, device: torch.device | str = "cpu") -> Tensor:
    """The numbers in a box, which a process sends; of this process itself, its own."""
    if rank == dist.get_rank():
        return local_part(tensor)[_slices(box, _own_box(tensor))].to(device).contiguous()
    shape = [stop - start for start, stop in box]
    wire = _wire(local_part(tensor).device, tensor.device_mesh)
    data = torch.empty(math.prod(shape) * tensor.dtype.itemsize, dtype=torch.uint8, device=wire)
    dist.recv(data, src=rank)
    return data.to(device).view(tensor.dtype).reshape(shape)


def _joined(pieces: Sequence[tuple[Box, Tensor]], block: Box, dtype: torch.dtype) -> Tensor:
    """The numbers of a block from those of the boxes in it."""
    whole = torch.empty([stop - start for start, stop in block], dtype=dtype)
    for box, piece in pieces:
        whole[_slices(box, block)] = piece
    return whole


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
    if any(_cut_dimension(place, like.ndim) not in (0, None) for place in like.placements):
        raise ModelError(f"a tensor of shape {tuple(like.shape)} is cut along another dimension than 0.")
    return slice(*_box(like.shape, like.device_mesh.shape, like.placements, where)[0])


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


def summed_over_parts_(tensors: Sequence[Tensor], like: Tensor) -> None:
    """Add up tensors over the processes among which `like` is cut, in place, at once. They have one dtype and device.

    All processes of the mesh must call it together.
    """
    if not is_sharded(like):
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat = _reduced(flat, like.device_mesh, _cut_mesh_dimensions(like), dist.ReduceOp.SUM).to(flat.device)
    for tensor, own in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(own.view_as(tensor))


def largest_over_parts(numbers: Sequence[float], likes: Sequence[Tensor]) -> list[float]:
    """Each number's largest value over the processes among which one of `likes` is cut. All must call it together."""
    found = torch.tensor(numbers, dtype=torch.float64)
    for like in {(own.device_mesh, own.placements): own for own in likes if is_sharded(own)}.values():
        found = _reduced(found, like.device_mesh, _cut_mesh_dimensions(like), dist.ReduceOp.MAX).cpu()
    return found.tolist()


def _reduced(tensor: Tensor, mesh: Any, cut: Sequence[int], operation: Any) -> Tensor:
    """A reduction over some dimensions of a mesh, where its processes can send from."""
    found = tensor.to(_wire(tensor.device, mesh))
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
