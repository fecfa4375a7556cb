"""Measuring in several processes, each with a part of the samples.

Owns summing their results, and makes all processes fail if one fails. Must not pickle anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memsyn.engine.routes import BY_FACTORS, BY_OPERATION, BY_RULE, BY_SAMPLE, UNUSED
from memsyn.errors import ProcessError
from memsyn.matrices import Matrix
from memsyn.torch_private import compiled_original
from memsyn.values.factors import matrices_from, matrices_header

ProcessGroup = Any
"""A torch.distributed.ProcessGroup. The type is Any, since some builds of torch lack torch.distributed."""

FASTEST_FIRST: Final = (UNUSED, BY_FACTORS, BY_RULE, BY_OPERATION, BY_SAMPLE)
"""The routes in an order in which the maximum of two indices is the slower route."""


def group_of(model: nn.Module) -> ProcessGroup | None:
    """The process group of a DistributedDataParallel model; None for any other model."""
    model = compiled_original(model) or model
    return model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None


def rank_and_size(group: ProcessGroup | None) -> list[int]:
    """[rank of this process, number of processes]; [0, 1] without a group."""
    return [0, 1] if group is None else [dist.get_rank(group), dist.get_world_size(group)]


@contextmanager
def fail_together(group: ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """If the block fails in one process, make it fail in all, so that no process waits forever.

    Raises:
        ProcessError: the block failed in another process.
    """
    if group is None:
        yield
        return
    failed = False
    try:
        yield
    except BaseException:
        failed = True
        raise
    finally:
        # In `finally`, since the other processes wait here for a process that has failed, too.
        flag = torch.tensor([int(failed)], device=device)
        dist.all_reduce(flag, group=group)
        if int(flag) and not failed:
            raise ProcessError(
                f"measuring failed in {int(flag)} other of {dist.get_world_size(group)} processes. Read the errors of "
                "those processes for the cause."
            )


def sum_over_processes(
    sums: Mapping[str, Tensor], num_samples: int, routes: Mapping[str, str], group: ProcessGroup
) -> tuple[int, dict[str, str]]:
    """Replace the sums in every process by the sums over all processes, in-place.

    Returns:
        The number of samples of all processes, and the slowest route of each parameter.
    """
    # All processes must add up the same parameter at the same time, but the order of their dicts may differ.
    names, device = sorted(sums), next(iter(sums.values())).device
    count = torch.tensor([num_samples], device=device)
    dist.all_reduce(count, group=group)
    slowest = torch.tensor([FASTEST_FIRST.index(routes[name]) for name in names], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    for name in names:
        whole = sums[name].contiguous()
        dist.all_reduce(whole, group=group)
        sums[name].copy_(whole)
    return int(count), {name: FASTEST_FIRST[index] for name, index in zip(names, slowest.tolist(), strict=True)}


def share_sums(
    sums: dict[str, Tensor],
    matrices: Mapping[str, Matrix],
    own_names: Iterable[str],
    device: torch.device,
    group: ProcessGroup,
) -> dict[str, Matrix]:
    """Make the sums of factors have the same names in all processes: zeros for what only another process has used.

    Returns:
        The matrices of all processes. A parameter that is a matrix in one process has no other sum in any process.

    Raises:
        ProcessError: a weight was used as a matrix in different ways, or as a matrix in some processes only.
    """
    mine = {
        "sums": {name: [list(total.shape), str(total.dtype).removeprefix("torch.")] for name, total in sums.items()},
        "matrices": matrices_header(matrices),
        "names": sorted(own_names),
        "used": [name for name, total in sums.items() if bool(total.any())],
    }
    everyone = [json.loads(text) for text in gather_text(json.dumps(mine), device, group)]
    shared: dict[str, Matrix] = {}
    for other in everyone:
        for key, matrix in matrices_from(other["matrices"]).items():
            if shared.setdefault(key, matrix) != matrix:
                raise ProcessError(f"{key} was used as a matrix in different ways in two processes.")
    taken = {name for other in everyone for name in other["names"]}
    mixed = sorted(taken & {name for other in everyone for name in other["used"]})
    if mixed:
        raise ProcessError(
            f"{', '.join(mixed)}: one process used it as a matrix, and another in another way. Give each process data "
            "that take all branches of the forward pass, or freeze the parameter."
        )
    for other in everyone:
        for name, (shape, dtype) in other["sums"].items():
            sums.setdefault(name, torch.zeros(shape, dtype=getattr(torch, dtype), device=device))
    for name in taken & sums.keys():
        del sums[name]
    return shared


def gather_text(text: str, device: torch.device, group: ProcessGroup) -> list[str]:
    """The text of every process, in the order of ranks."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(data)], device=device), group=group)
    longest = max(int(length) for length in lengths)
    parts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in lengths]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))), group=group)
    return [bytes(part[: int(n)].tolist()).decode() for part, n in zip(parts, lengths, strict=True)]
