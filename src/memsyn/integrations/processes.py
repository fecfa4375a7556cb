"""The processes that a trainer started together, for `measure(group=...)`.

Shared by the callbacks, which run inside a trainer that has set up torch.distributed, or has not.
"""

from typing import Any

import torch.distributed as dist


def all_processes() -> Any:
    """The group of all processes; None in a single one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
