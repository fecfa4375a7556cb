"""Boxes: what the process at a place of a mesh holds of a tensor, by its shape and its placements.

Owns the arithmetic of cuts. Must not talk to other processes, nor know values. A box says for each dimension of a
tensor where it begins and where it ends.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from memsyn.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


Box = tuple[tuple[int, int], ...]
"""Of each dimension, the first index and the end of those that a part holds."""


def cut_dimension(place: Any, ndim: int) -> int | None:
    """The dimension of a tensor along which a placement cuts it; None if it repeats it.

    Raises:
        ModelError: it does neither: processes hold terms of a sum.
    """
    kind = type(place).__name__
    if kind not in ("Shard", "_StridedShard", "Replicate"):
        raise ModelError(f"a tensor is held as {place}; expected one whose values are cut or repeated.")
    return None if kind == "Replicate" else int(place.dim) % max(1, ndim)


def cut_mesh_dimensions(tensor: "DTensor") -> list[int]:
    """The dimensions of a mesh along which a tensor is cut; along the others it is repeated."""
    places = enumerate(tensor.placements)
    return [index for index, place in places if cut_dimension(place, tensor.ndim) is not None]


def box_at(shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Any], where: Sequence[int]) -> Box:
    """What the process at a place of the mesh holds: (5, 8) by Shard(0) at 1 of 2 is rows 3 to 4, ((3, 5), (0, 8))."""
    box = [(0, length) for length in shape]
    is_strided = [type(place).__name__ == "_StridedShard" for place in placements]
    # Tensor parallelism cuts first, then `fully_shard` cuts each part: its mesh dimension is the outer one, and its
    # placement is strided: rows 0 to 7 by (_StridedShard(0), Shard(0)) on (2, 2): at (1, 0) are rows 2 and 3.
    order = [index for index, strided in enumerate(is_strided) if not strided]
    for index in [*order, *(index for index in reversed(range(len(placements))) if is_strided[index])]:
        dim = cut_dimension(placements[index], len(shape))
        if dim is not None:
            start, stop = box[dim]
            step = math.ceil((stop - start) / mesh_shape[index])
            first = min(stop, start + step * where[index])
            box[dim] = first, min(stop, first + step)
    return tuple(box)


def own_box(tensor: "DTensor") -> Box:
    """What this process holds of a tensor."""
    mesh = tensor.device_mesh
    return box_at(tensor.shape, mesh.shape, tensor.placements, mesh.get_coordinate() or ())


def holders_of(tensor: "DTensor") -> list[tuple[int, Box]]:
    """Processes that together hold a tensor once: each rank with its box."""
    mesh, found = tensor.device_mesh, dict[Box, int]()
    for where in itertools.product(*map(range, mesh.shape)):
        box = box_at(tensor.shape, mesh.shape, tensor.placements, where)
        if all(start < stop for start, stop in box):
            found.setdefault(box, int(mesh.mesh[where]))
    return [(rank, box) for box, rank in found.items()]


def blocks_of(shape: Sequence[int], size: int) -> Iterator[Box]:
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
            for inner in blocks_of(shape[1:], size):
                yield ((index, index + 1), *inner)


def common_box(one: Box, other: Box) -> Box | None:
    """What two boxes share; None if they share nothing."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return found if all(start < stop for start, stop in found) else None


def slices_of(box: Box, origin: Box | None = None) -> tuple[slice, ...]:
    """A box as an index, of a tensor that begins at the box `origin`."""
    starts = [0] * len(box) if origin is None else [start for start, _ in origin]
    return tuple(slice(start - first, stop - first) for (start, stop), first in zip(box, starts, strict=True))
