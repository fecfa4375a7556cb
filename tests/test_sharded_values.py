"""Values of which each process holds a part: two, three and four real processes against one."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import memsyn
from memsyn.sharding import exchange
from memsyn.storage.checkpoints import HEADER
from tests.sharded_values import check_same, check_same_directions, check_same_memory, expected_after, measured

SCRIPT = Path(__file__).with_name("sharded_values.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs of 4, 3 and 2 processes, one after the other, have left."""
    found = tmp_path_factory.mktemp("sharded")
    for count in (4, 3, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        done = subprocess.run(
            [*command, str(SCRIPT), str(found)], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[:6000]
        assert all(f"process {rank} is done" in done.stderr for rank in range(count))
    return found


def test_processes_agree_with_one(folder: Path) -> None:
    """4 processes have saved, 3 loaded, learned and saved, then 2: one process loads, and so does its own memory."""
    expected = expected_after(3)
    from_parts = memsyn.Memory.from_checkpoint(folder / "checkpoint-3", key="memory")
    from_file = memsyn.Memory.load(folder / "memory-3.safetensors")
    for found in (from_parts, from_file):
        check_same_memory(found, expected, exactly=False)
        assert found.directions is not None
        assert expected.directions is not None
        check_same_directions(found.directions, expected.directions)
        assert type(found.anchor["table.weight"]) is torch.Tensor
    importance = memsyn.Importance.from_checkpoint(folder / "checkpoint-3", key="importance")
    check_same(importance.sums, measured(2).sums)
    assert (importance.num_samples, importance.routes) == (measured(2).num_samples, measured(2).routes)


def save(value: memsyn.Memory | memsyn.Importance, folder: Path, **more: object) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save({"memory": value.state_dict(), **more}, checkpoint_id=folder)


def a_memory() -> memsyn.Memory:
    model = torch.nn.Linear(3, 2)
    sums = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    return memsyn.Memory.empty().consolidate(model, memsyn.Importance(sums, 4), label="first")


def test_a_checkpoint_of_one_process(tmp_path: Path) -> None:
    memory, model = a_memory(), torch.nn.Linear(3, 2)
    model.load_state_dict(memory.anchor)
    save(memory, tmp_path / "a", model=model.state_dict())
    for found in (
        memsyn.Memory.from_checkpoint(tmp_path / "a"),
        memsyn.Memory.from_checkpoint(str(tmp_path / "a"), key="memory", like=model),
    ):
        check_same_memory(found, memory)
        assert found.history == memory.history
        assert found.matches(model)
    with pytest.raises(
        memsyn.MemoryFileError, match="expected one value of memsyn at 'mem'; it holds some at: 'memory'"
    ):
        memsyn.Memory.from_checkpoint(tmp_path / "a", key="mem")
    with pytest.raises(memsyn.MemoryFileError, match="is of kind 'memory'; expected 'importance'"):
        memsyn.Importance.from_checkpoint(tmp_path / "a")
    model.bias.data += 1
    with pytest.warns(memsyn.MovedWeightsWarning, match="the first is bias"):
        memsyn.Memory.from_checkpoint(tmp_path / "a", like=model)


def test_errors_of_checkpoints_say_what_is_wrong(tmp_path: Path) -> None:
    memory = a_memory()
    with pytest.raises(memsyn.MemoryFileError, match="missing is no checkpoint of torch"):
        memsyn.Memory.from_checkpoint(tmp_path / "missing")
    save(memory, tmp_path / "two", other=memory.state_dict())
    with pytest.raises(memsyn.MemoryFileError, match="it holds some at: 'memory', 'other'"):
        memsyn.Memory.from_checkpoint(tmp_path / "two")
    check_same_memory(memsyn.Memory.from_checkpoint(tmp_path / "two", key="other"), memory)
    for name, change, says in (
        ("text", {HEADER: torch.tensor(list(b"{"), dtype=torch.uint8)}, "is no header of memsyn"),
        ("list", {HEADER: torch.tensor(list(b"[]"), dtype=torch.uint8)}, "is no header of memsyn"),
        (
            "newer",
            {HEADER: torch.tensor(list(json.dumps({"format": 99}).encode()), dtype=torch.uint8)},
            "has format 99",
        ),
        ("nan", {"anchor/bias": torch.tensor([1.0, float("nan")])}, "anchor/bias holds NaN"),
        ("negative", {"importance/bias": torch.tensor([1.0, -1.0])}, "importance/bias holds negative"),
        ("more", {"anchor/extra": torch.ones(2)}, "its tensors are not those that its metadata names"),
    ):
        broken = mock.Mock(state_dict=lambda change=change: {**memory.state_dict(), **change})
        save(broken, tmp_path / name)
        with pytest.raises(memsyn.MemoryFileError, match=says):
            memsyn.Memory.from_checkpoint(tmp_path / name)
    save(memory, tmp_path / "cut")
    next((tmp_path / "cut").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(memsyn.MemoryFileError, match="cut could not be read"):
        memsyn.Memory.from_checkpoint(tmp_path / "cut")
    (tmp_path / "cut" / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(memsyn.MemoryFileError, match="cut could not be read"):
        memsyn.Memory.from_checkpoint(tmp_path / "cut")


def test_parts_on_the_cpu_pass_through_the_gpu_if_only_that_can_be_sent() -> None:
    """With `CPUOffloadPolicy` parameters are on the CPU. NCCL alone sends nothing from there."""
    cpu, mesh = torch.device("cpu"), SimpleNamespace(device_type="cuda")
    for known, device in (("cuda:nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo,cuda:gloo", "cpu")):
        with mock.patch.object(dist, "get_backend_config", return_value=known):
            assert exchange.wire_device(cpu, mesh).type == device
