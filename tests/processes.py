"""What two processes do together, started by torchrun from test_distributed.py."""

import copy
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import memsyn
from memsyn.integrations.training_end import Settings, reported


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


def check_union(rank: int) -> None:
    """Uneven and empty shards: every process has the importance of all samples."""
    model = a_model()
    data = torch.randn(13, 1, 6, 6, dtype=torch.float64)
    whole = memsyn.measure(model, [data], progress=False)
    ddp = DistributedDataParallel(model)
    for shards in ((data[:9], data[9:]), (data, data[:0]), (data[:0], data)):
        mine = memsyn.measure(ddp, shards[rank].split(4), progress=False)
        assert mine.num_samples == whole.num_samples == 13
        assert mine.routes == whole.routes
        for name, total in whole.sums.items():
            assert torch.allclose(mine.sums[name], total, rtol=1e-12, atol=1e-14), name
        for total in mine.sums.values():
            dist.all_gather(everyone := [torch.empty_like(total) for _ in range(2)], total)
            assert torch.equal(*everyone)
    alone = memsyn.measure(model, [data[rank : rank + 1]], progress=False)
    assert alone.num_samples == 1
    together = memsyn.measure(model, [data[rank : rank + 1]], progress=False, group=dist.group.WORLD)
    assert together.num_samples == 2


def check_failure(rank: int) -> None:
    """What fails in one process fails in all."""
    ddp = DistributedDataParallel(a_model())
    data = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    batches = [data, data[:, :, :3] if rank else data]
    error, says = (memsyn.BatchError, "batch 1") if rank else (memsyn.ProcessError, "failed in 1 other of 2 processes")
    with pytest.raises(error, match=says):
        memsyn.measure(ddp, batches, progress=False)
    with pytest.raises(memsyn.BatchError, match="no samples"):
        memsyn.measure(ddp, [], progress=False)


class Branches(nn.Module):
    """A head for samples whose first number is positive, and one for the others; a norm, which is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.LayerNorm(6))
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[int(x[0, 0, 0, 0] > 0)](torch.tanh(self.body(x)))


def check_factors(rank: int, estimator: str) -> None:
    """Uneven and empty shares, and heads that only one process uses: all have the factors of all samples."""
    model = Branches()
    data = torch.randn(13, 1, 6, 6, dtype=torch.float64)
    data[:, 0, 0, 0] = data[:, 0, 0, 0].abs() * torch.tensor([1.0] * 9 + [-1.0] * 4)
    batches = [*data[:9].split(4), *data[9:].split(4)]

    def alone(share: list[Tensor]) -> memsyn.KroneckerFactors:
        found = memsyn.measure(model, share, estimator=estimator, progress=False)
        assert isinstance(found, memsyn.KroneckerFactors)
        return found

    whole = alone(batches)
    assert {"inputs/heads.0.weight", "inputs/heads.1.weight", "diagonal/body.4.weight"} <= whole.sums.keys()
    assert ("outputs/heads.0.weight" in whole.sums) == (estimator == "kronecker")
    ddp = DistributedDataParallel(model)
    for shares in ((batches[:3], batches[3:]), (batches, [data[:0]]), ([], batches)):
        mine = memsyn.measure(ddp, shares[rank], estimator=estimator, progress=False)
        assert isinstance(mine, memsyn.KroneckerFactors)
        assert (mine.num_samples, mine.matrices, mine.routes) == (13, whole.matrices, whole.routes)
        assert mine.sums.keys() == whole.sums.keys()
        # The signs belong to a sample's place in its process. So outputs are those of both shares, each from place 0.
        parts = [alone(share).sums for share in shares if sum(map(len, share))]
        for name, total in whole.sums.items():
            of_signs = estimator == "kronecker" and not name.startswith(("inputs/", "positions/"))
            expected = torch.stack([own[name] for own in parts if name in own]).sum(0) if of_signs else total
            assert torch.allclose(mine.sums[name], expected, rtol=1e-9, atol=1e-12), name
            dist.all_gather(everyone := [torch.empty_like(total) for _ in range(2)], mine.sums[name])
            assert torch.equal(*everyone)


class Reader(nn.Module):
    """Reads one weight in a way that depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 2, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return (x.unsqueeze(1) * self.weight).flatten(1)
        return F.conv1d(x, self.weight, groups=x.shape[1] // 2)


def check_failure_of_factors(rank: int) -> None:
    """What fails in one process fails in all; and no use of a weight is lost."""
    ddp = DistributedDataParallel(Branches())
    data = torch.rand(4, 1, 6, 6, dtype=torch.float64)
    error, says = (memsyn.BatchError, "batch 1") if rank else (memsyn.ProcessError, "failed in 1 other of 2 processes")
    with pytest.raises(error, match=says):
        memsyn.measure(ddp, [data, data[:, :, :3] if rank else data], estimator="kronecker", progress=False)
    with pytest.raises(memsyn.BatchError, match="no samples"):
        memsyn.measure(ddp, [], estimator="kronecker", progress=False)
    reader = DistributedDataParallel(Reader())
    two, four, one = (torch.randn(3, channels, 5, dtype=torch.float64) for channels in (2, 4, 1))
    with pytest.raises(memsyn.ProcessError, match="weight was used as a matrix in different ways in two processes"):
        memsyn.measure(reader, [four if rank else two], estimator="kronecker", progress=False)
    with pytest.raises(memsyn.ProcessError, match="weight: one process used it as a matrix, and another in another"):
        memsyn.measure(reader, [one if rank else two], estimator="kronecker", progress=False)


def check_checkpoints(rank: int) -> None:
    """Cut off in one process, all keep what they have, each in a file of its own, and go on together."""
    ddp = DistributedDataParallel(a_model())
    data = torch.randn(24, 1, 6, 6, dtype=torch.float64)
    mine = data[rank * 12 :][:12].split(3)
    expected = memsyn.measure(ddp, mine, progress=False)

    def broken() -> Iterator[Tensor]:
        yield from mine[:2]
        raise RuntimeError("disk gone")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{rank}.ckpt"
        error, says = (RuntimeError, "disk gone") if rank else (memsyn.ProcessError, "failed in 1 other of 2")
        with pytest.raises(error, match=says):
            memsyn.measure(ddp, broken() if rank else mine, progress=False, checkpoint=path)
        assert memsyn.Importance.load(path).num_samples == (6 if rank else 12)
        content = path.read_bytes()
        dist.all_gather_object(contents := [b"", b""], content)
        path.write_bytes(contents[1 - rank])
        with pytest.raises(memsyn.MismatchError, match="it differs in process"):
            memsyn.measure(ddp, mine, progress=False, checkpoint=path)
        path.write_bytes(content)
        found = memsyn.measure(ddp, mine, progress=False, checkpoint=path)
        assert not path.exists()
    assert found.num_samples == expected.num_samples == 24
    for name, total in expected.sums.items():
        assert torch.equal(found.sums[name], total), name


def check_protection(rank: int, form: str, kind: type[torch.optim.Optimizer]) -> None:
    """The weights stay bit for bit the same in all processes, and are those of one process with all the data."""
    model = a_model()
    twin = copy.deepcopy(model)
    data, targets = torch.randn(8, 1, 6, 6, dtype=torch.float64), torch.randint(3, (8,))
    ddp = DistributedDataParallel(model)
    estimator = "kronecker" if form == "projected" else "mas"
    found = memsyn.measure(ddp, [data[4 * rank :][:4]], estimator=estimator, progress=False)
    memory = memsyn.Memory.empty().consolidate(ddp, found)
    optimizer, other = kind(ddp.parameters(), lr=0.05), kind(twin.parameters(), lr=0.05)
    handles = [
        memsyn.protect(optimizer, ddp, memory, strength=0.5, form=form),
        memsyn.protect(other, twin, memory, strength=0.5, form=form),
    ]

    def step(m: nn.Module, o: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        o.zero_grad()
        F.cross_entropy(m(x), y).backward()
        o.step()

    for _ in range(25 if form == "projected" else 5):  # the projected form projects after every tenth step
        step(ddp, optimizer, data[4 * rank :][:4], targets[4 * rank :][:4])
        step(twin, other, data, targets)
    for handle in handles:
        handle.flush()
        assert form != "projected" or handle.report().held > 0
    for mine, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, expected, rtol=1e-6 if form == "projected" else 1e-9, atol=1e-12)
        dist.all_gather(everyone := [torch.empty_like(mine) for _ in range(2)], mine.detach())
        assert torch.equal(*everyone)


def check_stop(rank: int) -> None:
    """All processes stop a training that one of them must stop."""
    model = a_model()
    found = memsyn.measure(model, [torch.randn(8, 1, 6, 6, dtype=torch.float64)], estimator="kronecker", progress=False)
    memory = memsyn.Memory.empty().consolidate(model, found)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * rank)  # process 0 stays where it is
    callback = Settings(
        strength=None, form="auto", protect_options=None, estimator=None, forward=None, data=None, max_samples=None,
        report_every=None, max_change=1e-6,
    )  # fmt: skip
    handle = callback.protect(optimizer, model, memory)
    assert reported([handle], callback, 0)[1] is False
    model(torch.randn(4, 1, 6, 6, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    handle.flush()
    assert (handle.report().change == 0.0) == (rank == 0)
    with pytest.warns(memsyn.ForgettingWarning, match="training stops after step 1"):
        scalars, stops = reported([handle], callback, 1)
    assert stops
    assert scalars["memsyn/predicted_change"] == handle.report().change


def check_accelerate(rank: int) -> None:
    """What `prepare` gives, in `accumulate`: the weights are those of one process with all the data."""
    model, twin = a_model(), a_model()
    twin.load_state_dict(model.state_dict())
    data, targets = torch.randn(8, 1, 6, 6, dtype=torch.float64), torch.randint(3, (8,))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    other = torch.optim.Adam(twin.parameters(), lr=0.05)
    ddp, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.05))
    assert isinstance(ddp, DistributedDataParallel)
    found = memsyn.measure(ddp, [data[4 * rank :][:4]], progress=False)
    memory = memsyn.Memory.empty().consolidate(ddp, found)
    handles = [memsyn.protect(o, m, memory, strength=0.5) for o, m in ((optimizer, ddp), (other, twin))]
    for _ in range(4):
        for part in (0, 2):
            with accelerator.accumulate(ddp):
                own = slice(4 * rank + part, 4 * rank + part + 2)
                accelerator.backward(F.cross_entropy(ddp(data[own]), targets[own]))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(ddp.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        F.cross_entropy(twin(data), targets).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        other.step()
        other.zero_grad()
    assert handles[0].value() > 0
    for mine, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, expected, rtol=1e-9, atol=1e-12)
        dist.all_gather(everyone := [torch.empty_like(mine) for _ in range(2)], mine.detach())
        assert torch.equal(*everyone)


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    check_union(rank)
    check_failure(rank)
    check_checkpoints(rank)
    for estimator in ("kronecker", "inputs"):
        check_factors(rank, estimator)
    check_failure_of_factors(rank)
    check_stop(rank)
    for form in ("gradient", "proximal", "projected"):
        for kind in (torch.optim.SGD, torch.optim.Adam):
            check_protection(rank, form, kind)
    check_accelerate(rank)
    dist.barrier()  # else one may be gone while the other still reads from it
    dist.destroy_process_group()
    print(f"process {rank} is done", file=sys.stderr, flush=True)
    os._exit(0)  # all is checked: threads of torch were once seen to abort the interpreter's own way out


if __name__ == "__main__":
    main()
