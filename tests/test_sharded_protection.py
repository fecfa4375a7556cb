"""Protection of models under fully_shard, in two and in four processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import memsyn
from memsyn.parameters import refuse_other_sharding

SCRIPT = Path(__file__).with_name("sharded_protection.py")


def run(num_processes: int, folder: Path, *checks: str) -> list[str]:
    """Run checks in processes that torchrun starts; returns the names of those that each process has ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    environment = {**os.environ, "SHARDED_FOLDER": str(folder), "PYTHONPATH": os.pathsep.join([*sys.path, "."])}
    done = subprocess.run(
        [*command, str(SCRIPT), *checks], capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr.count(" is done") == num_processes
    return [check for check in checks if len(re.findall(rf"{check}: \d", done.stderr)) == num_processes]


def test_steps_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    checks = ["all_steps", "accumulation", "scaler", "converted", "exception"]
    assert run(2, tmp_path, *checks) == checks


def test_steps_in_four_processes_are_those_of_one_and_go_on_in_two_and_one(tmp_path: Path) -> None:
    several = ["grown", "no_communication", "penalty", "state", "still", "adapters", "memory_in_parts"]
    several += ["refusals", "some_steps", "policies", "save"]
    assert run(4, tmp_path, *several) == several
    assert run(2, tmp_path, "load", "refusals") == ["load", "refusals"]
    alone = [sys.executable, "-c", "from tests import sharded_protection as own; own.go_on_alone()"]
    environment = {**os.environ, "SHARDED_FOLDER": str(tmp_path)}
    done = subprocess.run(alone, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]


def test_other_ways_of_sharding_are_refused_with_what_to_use() -> None:
    model = nn.Linear(2, 2)
    refuse_other_sharding(model)
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [torch.ones(3, 2)], progress=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.weight.ds_id = 0  # as deepspeed.zero.Init does, which also leaves the values (0,)
    with pytest.raises(memsyn.ModelError, match=r"DeepSpeed's ZeRO-3, .* Use fully_shard .* fsdp_version: 2"):
        memsyn.protect(optimizer, model, memory)
    with pytest.raises(memsyn.ModelError, match="Use fully_shard"):
        memsyn.measure(model, [torch.ones(3, 2)], progress=False)
    del model.weight.ds_id
    old = type("FullyShardedDataParallel", (nn.Linear,), {})(2, 2)
    with pytest.raises(memsyn.ModelError, match="by FullyShardedDataParallel, which memsyn cannot read"):
        memsyn.protect(optimizer, old, memory)
