"""Forged checkpoints with right checksums: each is refused, or ends with the same sums as before."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import memsyn
from tests.forgeries import forgeries
from tests.sealing import put_together, taken_apart

pytestmark = pytest.mark.soak


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


class CutOffError(RuntimeError):
    """In the middle of a pass."""


def a_loader() -> DataLoader[tuple[Tensor, ...]]:
    """It shuffles by torch's generator, whose state is in the file."""
    data = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data), batch_size=4, shuffle=True)


def checkpoint(path: Path, at: int) -> memsyn.Importance:
    """Leave the checkpoint of a pass that was cut off; returns what the whole pass measures."""
    calls = 0

    def forward(model: nn.Module, batch: list[Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise CutOffError
        return model(batch[0])

    limit = 10**9
    torch.manual_seed(2)
    whole = memsyn.measure(a_model(), a_loader(), forward=forward, progress=False)
    checked, calls, limit = calls - 10, 0, 10**9
    torch.manual_seed(2)
    limit = checked + at
    with pytest.raises(memsyn.MemsynError):
        memsyn.measure(a_model(), a_loader(), forward=forward, progress=False, checkpoint=path, every=0)
    return whole


def plain(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return model(batch[0])


def resumed(path: Path) -> memsyn.Importance:
    torch.manual_seed(3)
    return memsyn.measure(a_model(), a_loader(), forward=plain, progress=False, checkpoint=path, every=1e9)


@pytest.mark.parametrize("at", [5, 9])
def test_forged_checkpoints_are_refused(at: int, soak: bool, tmp_path: Path) -> None:
    """Before there was a seal, sums, counts and routes were taken as the file had them."""
    path = tmp_path / "pass.ckpt"
    expected = checkpoint(path, at)
    whole = path.read_bytes()
    shutil.copy(path, tmp_path / "whole")
    assert_same(resumed(path), expected)
    every, outcomes = list(forgeries(whole)), Counter[str]()
    for forgery in every if soak else random.Random(0).sample(every, len(every) // 20):
        path.write_bytes(forgery.content)
        try:
            found = resumed(path)
        except (memsyn.MemoryFileError, memsyn.MismatchError, memsyn.BatchError) as error:
            outcomes["refused" if str(path) in str(error) else f"{forgery}: {error}"] += 1
        else:
            assert_same(found, expected, str(forgery))
            outcomes["same"] += 1
    print(f"\ncheckpoints after {at} batches: {dict(outcomes)}")
    assert outcomes.keys() <= {"refused", "same"}
    assert outcomes["refused"] > 10 * outcomes["same"]


def assert_same(found: memsyn.Importance, expected: memsyn.Importance, what: str = "") -> None:
    assert (found.num_samples, found.routes, found.quantity) == (
        expected.num_samples,
        expected.routes,
        expected.quantity,
    ), what
    assert all(torch.equal(found.sums[name], total) for name, total in expected.sums.items()), what


def test_a_forger_without_the_batches_makes_no_older_file_of_it(tmp_path: Path) -> None:
    """A file of an older memsyn has no seal, and the digest of its batches instead."""
    path = tmp_path / "pass.ckpt"
    checkpoint(path, 9)
    entry, header, data = taken_apart(path.read_bytes())
    for digest in ("", entry["checkpoint"]["batches"], "0" * 64):
        older = {k: v for k, v in entry["checkpoint"].items() if k not in ("batches", "seal")} | {"digest": digest}
        path.write_bytes(put_together({**entry, "checkpoint": older}, header, data))
        with pytest.raises(memsyn.BatchError, match=r"the first 9 batches are not those that the checkpoint"):
            resumed(path)
        path.write_bytes(put_together({**entry, "checkpoint": {**older, "num_batches": 0}}, header, data))
        with pytest.raises(memsyn.MemoryFileError, match="num_batches is 0; expected a count from 1"):
            resumed(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("generator", "00" * 16, "its generator is no state of torch's"),
        ("generator", "", "its generator is no state of torch's"),
        ("num_samples", 35, "was changed since it was written: its seal"),
        ("num_samples", 7, "num_samples is 32 and 7, after 9 batches: they are not of one pass"),
        ("num_added", 3, "num_samples is 32 and 36, after 3 batches"),
        ("splits", [], "was changed since it was written: its seal is not that of its sums, counts and settings"),
        ("unproven", ["x"], "was changed since it was written: its seal"),
    ],
)  # fmt: skip
def test_what_a_forged_checkpoint_says(field: str, value: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pass.ckpt"
    checkpoint(path, 9)
    entry, header, data = taken_apart(path.read_bytes())
    entry["checkpoint"][field] = value
    path.write_bytes(put_together(entry, header, data))
    with pytest.raises(memsyn.MemoryFileError, match=message):
        resumed(path)
    assert path.exists()
