"""What Accelerate's `prepare` gives, protected as it is, against the same loop in plain torch.

Two processes are in tests/processes.py. docs/trainers.md names these tests in its table.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import memsyn
from tests.training import a_task, assert_close

FORMS = ["projected", "proximal", "gradient"]


def task(form: str) -> tuple[nn.Module, memsyn.Memory, TensorDataset]:
    model, memory, data, targets = a_task(torch.float32)
    if form == "projected":
        found = memsyn.measure(model, [data], estimator="kronecker", progress=False)
        memory = memsyn.Memory.empty().consolidate(model, found)
    return model, memory, TensorDataset(data, targets)


def accelerator(**options: Any) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **options)


def run(
    engine: Accelerator, model: nn.Module, optimizer: Any, loader: Any, scheduler: Any = None, *, epochs: int = 1
) -> None:
    """The loop of Accelerate's documentation."""
    for _ in range(epochs):
        for data, targets in loader:
            with engine.accumulate(model):
                engine.backward(F.cross_entropy(model(data), targets))
                if engine.sync_gradients:
                    engine.clip_grad_norm_(model.parameters(), 0.2)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("form", FORMS)
def test_prepared_as_they_are_with_accumulation_clipping_and_a_scheduler(form: str) -> None:
    start, memory, data = task(form)
    mine, twin = copy.deepcopy(start), copy.deepcopy(start)
    engine = accelerator(gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    given = engine.prepare(mine, optimizer, DataLoader(data, 5), schedule)
    handle = memsyn.protect(given[1], given[0], memory, strength=0.5)
    assert handle.form == ("proximal" if form == "gradient" else form)
    assert handle.wrappers == ("AcceleratedOptimizer",)
    handle.remove()
    handle = memsyn.protect(given[1], given[0], memory, strength=0.5, form=form)
    run(engine, *given, epochs=5)
    handle.remove()

    plain = torch.optim.AdamW(twin.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(plain, 4)
    handle = memsyn.protect(plain, twin, memory, strength=0.5, form=form)
    for _ in range(5):
        for k, (x, y) in enumerate(DataLoader(data, 5)):
            (F.cross_entropy(twin(x), y) / 2).backward()
            if k % 2:
                nn.utils.clip_grad_norm_(twin.parameters(), 0.2)
                plain.step()
                schedule.step()
                plain.zero_grad()
    handle.remove()
    assert_close(mine, twin, rtol=1e-5)
    free = copy.deepcopy(start)
    run(engine, *engine.prepare(free, torch.optim.AdamW(free.parameters(), lr=0.05), DataLoader(data, 5)), epochs=5)
    assert not torch.allclose(mine[0].weight, free[0].weight, rtol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_mixed_precision(form: str) -> None:
    start, memory, data = task(form)
    moved = {}
    for strength in (0.0, 5.0):
        engine = accelerator(mixed_precision="bf16")
        model = copy.deepcopy(start)
        given = engine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, 5))
        handle = memsyn.protect(given[1], given[0], memory, strength=strength, form=form)
        run(engine, *given, epochs=5)
        handle.remove()
        with torch.no_grad():
            change = model(data.tensors[0]) - start(data.tensors[0])
        moved[strength] = float(change.norm())
        # The prepared model can be measured, and a second task be consolidated.
        found = memsyn.measure(given[0], [data.tensors[0]], progress=False)
        assert found.sums.keys() == dict(start.named_parameters()).keys()
    assert 0 < moved[5.0] < 0.8 * moved[0.0]


@pytest.mark.parametrize("form", FORMS)
def test_save_state_and_load_state(form: str, tmp_path: Path) -> None:
    start, memory, data = task(form)

    def begun(strength: float) -> tuple[Accelerator, tuple[Any, ...], memsyn.Protection]:
        engine = accelerator()
        model = copy.deepcopy(start)
        given = engine.prepare(model, torch.optim.Adam(model.parameters(), lr=0.05), DataLoader(data, 5))
        handle = memsyn.protect(given[1], given[0], memory, strength=strength, form=form)
        engine.register_for_checkpointing(handle)
        return engine, given, handle

    engine, given, handle = begun(0.5)
    run(engine, *given)
    engine.save_state(str(tmp_path))
    run(engine, *given)
    handle.flush()
    whole = given[0]
    engine, given, handle = begun(7.0)  # the saved strength comes back with the state
    run(engine, *given)
    engine.load_state(str(tmp_path))
    assert handle.strength == 0.5
    run(engine, *given)
    handle.flush()
    assert_close(given[0], whole, rtol=1e-5)


def test_a_step_that_is_not_a_step_protects_nothing() -> None:
    """Inside `accumulate`, `optimizer.step()` does nothing but on the last batch: neither may protection."""
    start, memory, data = task("proximal")
    engine = accelerator(gradient_accumulation_steps=4)
    model, optimizer = engine.prepare(start, torch.optim.SGD(start.parameters(), lr=0.1))
    memsyn.protect(optimizer, model, memory, strength=0.5)
    with torch.no_grad():
        model[0].weight.add_(1.0)  # away from the anchor: a pull would show
    before = model[0].weight.detach().clone()
    x, y = data.tensors
    for k in range(4):
        with engine.accumulate(model):
            engine.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(model[0].weight, before) == (k < 3)
