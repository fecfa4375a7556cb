"""Processes that measure a share of the samples each.

Owns adding up what they found, and that all of them end the same way. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memsyn.engine.routes import BY_OPERATION, BY_RULE, BY_SAMPLE, UNUSED
from memsyn.errors import ProcessError
from memsyn.torch_private import compiled_original

ProcessGroup = Any
"""A torch.distributed.ProcessGroup, which a torch built without it does not have."""

_FASTEST_FIRST = (UNUSED, BY_RULE, BY_OPERATION, BY_SAMPLE)


def group_of(model: nn.Module) -> ProcessGroup | None:
    """The processes among which a DistributedDataParallel model is; None for any other."""
    model = compiled_original(model) or model
    return model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None


def rank_and_size(group: ProcessGroup | None) -> list[int]:
    """Which process this is, and of how many."""
    return [0, 1] if group is None else [dist.get_rank(group), dist.get_world_size(group)]


@contextmanager
def fail_together(group: ProcessGroup | None, device: torch.device) -> Iterator[None]:
    """If this fails in one process, it fails in all: none waits for what never comes.

    Raises:
        ProcessError: it failed in another process.
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
        flag = torch.tensor([int(failed)], device=device)
        dist.all_reduce(flag, group=group)
        if int(flag) and not failed:
            raise ProcessError(
                f"measuring failed in {int(flag)} other of {dist.get_world_size(group)} processes; theirs say why."
            )


def sum_over_processes(
    sums: Mapping[str, Tensor], num_samples: int, routes: Mapping[str, str], group: ProcessGroup
) -> tuple[int, dict[str, str]]:
    """Add the sums of all processes, in place, in each of them.

    Returns:
        The samples of all, and for each parameter the slowest of its routes.
    """
    names, device = sorted(sums), next(iter(sums.values())).device  # each process may have met them in its own order
    count = torch.tensor([num_samples], device=device)
    dist.all_reduce(count, group=group)
    slowest = torch.tensor([_FASTEST_FIRST.index(routes[name]) for name in names], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    for name in names:
        whole = sums[name].contiguous()
        dist.all_reduce(whole, group=group)
        sums[name].copy_(whole)
    return int(count), {name: _FASTEST_FIRST[index] for name, index in zip(names, slowest.tolist(), strict=True)}
