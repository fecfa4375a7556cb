"""How the tensors of a value are cut between processes: as the parameters of a model are.

Owns which parameter each tensor is cut as, and along which dimension. A tensor that belongs to no sharded parameter is
whole in every process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from memsyn.matrices import AS_TABLE
from memsyn.parameters import named_parameters, renaming
from memsyn.sharding.parts import any_sharded, cut_whole, empty_cut, is_sharded
from memsyn.storage.checkpoints import read_checkpoint
from memsyn.storage.reading_and_writing import IMPORTANCE, MOMENTS, Groups, read
from memsyn.weights_in_effect import parameters_by_name

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_BY_PARAMETER: Final = frozenset(["anchor", IMPORTANCE, "sum"])
"""The groups whose tensors have the shapes of parameters."""

_BY_MATRIX: Final = frozenset(["inputs", "outputs", "inputs_sketch", "outputs_sketch"])
"""The second moments: (G, n, n) and (G, n, c) are cut along dimension 1, the counts of a table's rows (n,) along 0."""


def read_for(path: str | os.PathLike[str], kind: str, like: nn.Module | None) -> tuple[dict[str, Any], Groups]:
    """The header and whole tensors of a file; they stay on the disk if `in_parts` will cut them for a model."""
    return read(path, kind, mapped=_is_sharded_model(like))


def _is_sharded_model(model: nn.Module | None) -> bool:
    return model is not None and any_sharded(named_parameters(model))


def in_parts(groups: Groups, model: nn.Module | None) -> Groups:
    """Copies of whole tensors, each cut as the parameter of a sharded model; as they are without such a model.

    No process talks to another.
    """
    if model is None or not _is_sharded_model(model):
        return groups
    parameters = _parameters([(group, name) for group, members in groups.items() for name in members], model)

    def cut(group: str, name: str, tensor: Tensor) -> Tensor:
        like = _cut_as(group, name, tensor.shape, parameters)
        return tensor.clone() if like is None else cut_whole(tensor, *like)

    return {group: {name: cut(group, name, t) for name, t in members.items()} for group, members in groups.items()}


def from_checkpoint(
    folder: str | os.PathLike[str], kind: str, key: str | None, like: nn.Module | None
) -> tuple[dict[str, Any], Groups]:
    """The header and tensors of a value in a checkpoint, cut as the parameters of `like`; whole without it."""
    found: list[dict[str, Tensor]] = []

    def allocate(header: Mapping[str, Any], name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if like is None:
            return torch.empty(shape, dtype=dtype)
        if not found:
            found.append(_parameters([(g, n) for g, names in header["groups"].items() for n in names], like))
        group, _, member = name.partition("/")
        cut_as = _cut_as(group, member, shape, found[0])
        return torch.empty(shape, dtype=dtype) if cut_as is None else empty_cut(shape, dtype, *cut_as)

    return read_checkpoint(folder, key, kind, allocate)


def _parameter_of(group: str, name: str) -> str | None:
    """The parameter that a tensor is cut as; None if it is whole in every process."""
    if group in _BY_PARAMETER:
        return name
    side, _, key = name.partition("/")
    is_cut = group == MOMENTS and (side == "diagonal" or side in _BY_MATRIX)
    return key.removesuffix(AS_TABLE) if is_cut else None


def _parameters(members: Iterable[tuple[str, str]], model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by the names that a file gives them."""
    names = {name for group, member in members if (name := _parameter_of(group, member)) is not None}
    own = parameters_by_name(model, names)
    fit = renaming(names, own)
    return {name: own[fit.own(name)] for name in names if fit.own(name) in own}


def _cut_as(
    group: str, name: str, shape: torch.Size, parameters: Mapping[str, Tensor]
) -> tuple[DTensor, int | None] | None:
    """The parameter that a tensor is cut as, and along which dimension; None: as the parameter itself."""
    like = parameters.get(_parameter_of(group, name) or "")
    if like is None or not is_sharded(like):
        return None
    if group == MOMENTS and name.partition("/")[0] in _BY_MATRIX:
        return like, 1 if len(shape) == 3 else 0
    return (like, None) if shape == like.shape else None
