"""Lightning with manual optimisation and several optimizers, and Fabric, against the same loop in plain torch.

Automatic optimisation, resuming and `fit` twice are in test_integrations and test_training_end. docs/trainers.md names
these tests in its table.
"""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import memsyn
from memsyn.integrations.lightning import MemsynCallback
from tests.test_integrations import change, directions_of, fit
from tests.training import a_task, assert_close

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers: many, and not ours

FORMS = ["projected", "proximal", "gradient"]
OLD = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).double()


class Manual(pl.LightningModule):
    """A body and a head, each with an optimizer. The body is stepped every second batch, as in many GANs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
        self.automatic_optimization = False
        self.memory: memsyn.Memory | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def training_step(self, batch: Any, index: int) -> None:
        of_body, of_head = self.optimizers()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer, every in ((of_head, 1), (of_body, 2)):
            if index % every == every - 1:
                self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
                if self.memory is not None:
                    self._add_gradient_of_penalty(optimizer.param_groups[0]["params"])
                optimizer.step()
                optimizer.zero_grad()

    def _add_gradient_of_penalty(self, parameters: list[Tensor]) -> None:
        assert self.memory is not None
        pull = torch.autograd.grad(0.5 * memsyn.penalty(self, self.memory), parameters)
        for parameter, own in zip(parameters, pull, strict=True):
            assert parameter.grad is not None
            parameter.grad += own

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.body.parameters(), 0.02), torch.optim.SGD(self.head.parameters(), 0.05)], []


def test_manual_optimisation_of_two_optimizers_equals_the_loss_term(tmp_path: Path) -> None:
    mine, twin = Manual(), Manual()
    memory = memsyn.Memory.empty().consolidate(mine, memsyn.measure(mine, [OLD], progress=False))
    twin.memory = memory
    callback = MemsynCallback(memory, strength=0.5, form="gradient")
    trainer = fit(mine, tmp_path, [callback])
    fit(twin, tmp_path, [])
    assert_close(mine, twin, rtol=1e-6)
    assert float(trainer.callback_metrics["memsyn/penalty"]) > 0
    assert callback.protections == []
    assert [entry.num_samples for entry in callback.memory.history] == [10, 24]


def test_manual_optimisation_with_a_projection_resumes_and_fits_twice(tmp_path: Path) -> None:
    start = Manual()
    memory = directions_of(start, [OLD])
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    whole, resumed, free = Manual(), Manual(), Manual()
    callback = MemsynCallback(memory)
    fit(whole, tmp_path, [callback, saver], enable_checkpointing=True)
    fit(resumed, tmp_path, [MemsynCallback(memory)], ckpt_path=next(tmp_path.glob("epoch=0-*.ckpt")))
    assert_close(resumed, whole, rtol=1e-6)
    fit(free, tmp_path, [])
    assert change(memory, whole, start) < 0.5 * change(memory, free, start)
    # A second `fit` is a second task: its data are others than those of the first.
    fit(whole, tmp_path, [callback])
    assert [entry.num_samples for entry in callback.memory.history] == [10, 24, 24]


def task(form: str) -> tuple[nn.Module, memsyn.Memory, TensorDataset]:
    model, memory, data, targets = a_task(torch.float32)
    return model, directions_of(model, [data]) if form == "projected" else memory, TensorDataset(data, targets)


def run(fabric: Fabric, model: Any, optimizer: Any, loader: Any) -> None:
    """Fabric's loop, with accumulation over two batches and clipping."""
    for k, (data, targets) in enumerate(loader):
        with fabric.no_backward_sync(model, enabled=k % 2 == 0):
            fabric.backward(F.cross_entropy(model(data), targets) / 2)
        if k % 2:
            fabric.clip_gradients(model, optimizer, max_norm=0.2)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("form", FORMS)
def test_fabric_equals_the_plain_loop(form: str) -> None:
    start, memory, data = task(form)
    mine, twin = copy.deepcopy(start), copy.deepcopy(start)
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(mine, torch.optim.Adam(mine.parameters(), 0.05))
    loader = fabric.setup_dataloaders(DataLoader(data, 5))
    handle = memsyn.protect(optimizer, model, memory, strength=0.5, form=form)
    plain = torch.optim.Adam(twin.parameters(), 0.05)
    other = memsyn.protect(plain, twin, memory, strength=0.5, form=form)
    for _ in range(5):
        run(fabric, model, optimizer, loader)
        for k, (x, y) in enumerate(DataLoader(data, 5)):
            (F.cross_entropy(twin(x), y) / 2).backward()
            if k % 2:
                nn.utils.clip_grad_norm_(twin.parameters(), 0.2)
                plain.step()
                plain.zero_grad()
    handle.remove()
    other.remove()
    assert_close(mine, twin, rtol=1e-5)
    found = memsyn.measure(model, loader, progress=False)
    expected = memsyn.measure(twin, DataLoader(data, 5), progress=False)
    torch.testing.assert_close(found.mean(), expected.mean(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_fabric_saves_and_loads(form: str, tmp_path: Path) -> None:
    start, memory, data = task(form)

    def begun(strength: float) -> tuple[Fabric, dict[str, Any]]:
        fabric, own = Fabric(accelerator="cpu", devices=1), copy.deepcopy(start)
        model, optimizer = fabric.setup(own, torch.optim.Adam(own.parameters(), 0.05))
        handle = memsyn.protect(optimizer, model, memory, strength=strength, form=form)
        return fabric, {"model": model, "optimizer": optimizer, "protection": handle}

    def trained(fabric: Fabric, state: dict[str, Any]) -> None:
        run(fabric, state["model"], state["optimizer"], DataLoader(data, 5))

    fabric, state = begun(0.5)
    trained(fabric, state)
    fabric.save(tmp_path / "state.ckpt", state)
    trained(fabric, state)
    state["protection"].flush()
    whole = state["model"]
    fabric, state = begun(7.0)  # the saved strength comes back with the state
    fabric.load(tmp_path / "state.ckpt", state)
    assert state["protection"].strength == 0.5
    trained(fabric, state)
    state["protection"].flush()
    assert_close(state["model"], whole, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_fabric_in_bfloat16(precision: str) -> None:
    start, memory, data = task("projected")
    moved = {}
    for strength in (0.0, 10.0):
        fabric, own = Fabric(accelerator="cpu", devices=1, precision=precision), copy.deepcopy(start)
        model, optimizer = fabric.setup(own, torch.optim.SGD(own.parameters(), 0.1))
        memsyn.protect(optimizer, model, memory, strength=strength)
        for _ in range(5):
            run(fabric, model, optimizer, DataLoader(data, 5))
        model.state_dict()  # projects, as what is saved must be
        moved[strength] = change(memory, copy.deepcopy(own).float(), start)
        x = data.tensors[0].to(own[0].weight.dtype)  # what is measured is the module itself: Fabric casts nothing there
        found = memsyn.measure(model, [x], progress=False)
        assert found.sums.keys() == dict(start.named_parameters()).keys()
    assert 0 < moved[10.0] < 0.5 * moved[0.0]
