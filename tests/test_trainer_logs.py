"""What trainers log of a protection while they train, read back from TensorBoard and MLflow, and the stop."""

import copy
import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import mlflow
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

import memsyn
from memsyn.integrations.lightning import MemsynCallback as LightningCallback
from memsyn.integrations.transformers import MemsynCallback as TrainerCallback
from tests.test_integrations import KINDS, Module, TwoOptimizers, arguments, bert, directions_of, fit, padded, sentences

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers: many, and not ours

CHANGE = "memsyn/predicted_change"
PROJECTED = {CHANGE, "memsyn/held", "memsyn/moved_statistics"}


@pytest.fixture(autouse=True)
def _mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "test")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, of all event files below a folder."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("events.out.tfevents*")):
        reader = EventAccumulator(str(path)).Reload()
        for tag in reader.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in reader.Scalars(tag)})
    return found


def metrics_of_mlflow() -> dict[str, dict[int, float]]:
    """Metric -> step -> value, of the only run."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("test")
    (run,) = client.search_runs([experiment.experiment_id])
    return {
        name: {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        for name in run.data.metrics
    }


# Hugging Face


@pytest.fixture(scope="module")
def start() -> tuple[nn.Module, memsyn.Memory]:
    model = bert()
    return model, directions_of(model, DataLoader(sentences(0), 8, collate_fn=padded))


class AfterSteps(transformers.TrainerCallback):
    """The predicted change after each step, by the memory and a clone of the weights after a projection."""

    def __init__(self, callback: TrainerCallback, memory: memsyn.Memory, old: nn.Module) -> None:
        self.callback, self.memory, self.old = callback, memory, old
        self.changes: dict[int, float | None] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        assert self.callback.protection is not None
        self.changes[state.global_step] = self.callback.protection.report().change


def run(model: nn.Module, folder: Path, callbacks: list[Any], **options: Any) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = Trainer(
        model, arguments(folder, **options), train_dataset=sentences(1), eval_dataset=sentences(2),
        data_collator=padded, callbacks=callbacks,
    )  # fmt: skip
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def test_a_trainer_logs_the_change_to_tensorboard_and_mlflow(start: Any, tmp_path: Path) -> None:
    old, memory = start
    model = copy.deepcopy(old)
    callback = TrainerCallback(memory, max_samples=0)
    watcher = AfterSteps(callback, memory, old)
    options = {"report_to": ["tensorboard", "mlflow"], "eval_strategy": "steps", "eval_steps": 4}
    _, history = run(model, tmp_path / "run", [callback, watcher], **options)
    assert [entry["step"] for entry in history] == [2, 4, 6]
    expected = {step: watcher.changes[step] for step in (2, 4, 6)}
    assert min(expected.values()) > 0
    assert {entry["step"]: entry[CHANGE] for entry in history} == expected
    assert {name for entry in history for name in entry if name.startswith("memsyn/")} == PROJECTED
    board, flow = events(tmp_path / "run"), metrics_of_mlflow()
    for name in PROJECTED:
        values = {entry["step"]: entry[name] for entry in history if name in entry}
        assert board[f"train/{name}"] == pytest.approx(values, rel=1e-6)
        assert flow[name] == pytest.approx(values, rel=1e-6)
    assert list(board["train/loss"]) == [2, 4, 6]


@pytest.mark.parametrize("every", [1, 3])
def test_a_trainer_reports_every_few_steps(every: int, start: Any, tmp_path: Path) -> None:
    old, memory = start
    callback = TrainerCallback(memory, max_samples=0, report_every=every)
    _, history = run(copy.deepcopy(old), tmp_path, [callback], logging_strategy="no")
    assert [entry["step"] for entry in history if CHANGE in entry] == list(range(every, 7, every))


def test_a_trainer_reports_at_the_end_of_an_epoch_if_it_logs_there(start: Any, tmp_path: Path) -> None:
    old, memory = start
    callback = TrainerCallback(memory, max_samples=0)
    _, history = run(
        copy.deepcopy(old), tmp_path, [callback], logging_strategy="epoch", max_steps=-1, num_train_epochs=2
    )
    assert [(entry["step"], CHANGE in entry) for entry in history] == [(6, True), (12, True)]


def test_reports_do_not_change_what_a_trainer_learns(start: Any, tmp_path: Path) -> None:
    old, memory = start
    ends = []
    options: dict[str, Any]
    for options in ({}, {"report_every": 1, "max_change": 1e9, "protect_options": {"reference": old.state_dict()}}):
        model = copy.deepcopy(old)
        trainer, _ = run(model, tmp_path, [TrainerCallback(memory, max_samples=0, **options)])
        trainer.train()  # again, with the same callbacks
        ends.append(model.state_dict())
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_trainer_stops_once_it_has_forgotten_too_much(start: Any, tmp_path: Path) -> None:
    old, memory = start
    changes = AfterSteps(free := TrainerCallback(memory, max_samples=0), memory, old)
    run(copy.deepcopy(old), tmp_path, [free, changes], max_steps=12)
    bound = changes.changes[5]
    assert bound is not None
    first = next(step for step, change in sorted(changes.changes.items()) if change > bound)
    model = copy.deepcopy(old)
    callback = TrainerCallback(memory, report_every=1, max_change=bound)
    with pytest.warns(memsyn.ForgettingWarning) as said:
        trainer, history = run(model, tmp_path / "run", [callback], max_steps=12, report_to=["tensorboard"])
    assert trainer.state.global_step == first
    change = changes.changes[first]
    (text,) = [str(one.message) for one in said if one.category is memsyn.ForgettingWarning]
    assert text.startswith(
        f"training stops after step {first}: the predicted change of outputs is {change:.4g}, above max_change="
        f"{bound:g}. Outputs on the remembered data are predicted to have changed by {change:.1%}, most by "
    )
    assert "The model keeps what it has learned so far." in text
    assert history[-1][CHANGE] == change
    assert events(tmp_path / "run")[f"train/{CHANGE}"][first] == pytest.approx(change, rel=1e-6)
    # The weights are those of the stop, and are measured.
    predicted = memsyn.protect(torch.optim.SGD(model.parameters()), model, memory, reference=old).report().change
    assert predicted == pytest.approx(change, rel=1e-6)
    assert len(callback.memory.history) == 2


def test_a_trainer_that_never_logs_stops_at_the_end_of_an_epoch(start: Any, tmp_path: Path) -> None:
    old, memory = start
    callback = TrainerCallback(memory, max_samples=0, max_change=1e-9)
    trainer, _ = run(copy.deepcopy(old), tmp_path, [callback], logging_strategy="no", max_steps=-1, num_train_epochs=3)
    assert trainer.state.global_step == 6


def test_a_stop_needs_a_memory_that_predicts(start: Any, tmp_path: Path) -> None:
    old, memory = start
    importance = memsyn.measure(old, DataLoader(sentences(0), 8, collate_fn=padded), progress=False)
    mas = memsyn.Memory.empty().consolidate(old, importance)
    moved = copy.deepcopy(old)
    with torch.no_grad():
        moved.classifier.weight += 0.1
    for model, own, says in (
        (copy.deepcopy(old), mas, "max_change=0.05 .* is not known: the memory holds no directions.*kronecker"),
        (moved, memory, r"had moved since the last consolidation.*reference=old_state_dict.*protect_options="),
    ):
        trainer = Trainer(
            model, arguments(tmp_path), train_dataset=sentences(1), data_collator=padded,
            callbacks=[TrainerCallback(own, max_samples=0, max_change=0.05)],
        )  # fmt: skip
        with pytest.raises(memsyn.OptionError, match=says):
            trainer.train()
        assert trainer.state.global_step == 0
    callback = TrainerCallback(
        memory, max_samples=0, max_change=1e9, protect_options={"reference": old.state_dict()}, report_every=1
    )
    _, history = run(moved, tmp_path, [callback])
    assert all(entry[CHANGE] > 0 for entry in history)
    empty = TrainerCallback(memsyn.Memory.empty(), max_samples=0, max_change=0.05)
    trainer, _ = run(copy.deepcopy(old), tmp_path, [empty])
    assert trainer.state.global_step == 6  # there is nothing to forget


@pytest.mark.parametrize("kind", [TrainerCallback, LightningCallback])
def test_the_options_of_reports_are_checked(kind: Any) -> None:
    for every in (0, -1, 1.5, True):
        with pytest.raises(memsyn.OptionError, match=r"report_every must be a whole number of steps, at least 1"):
            kind(memsyn.Memory.empty(), report_every=every)
    for bound in (0, -0.1, float("nan"), "5%", True):
        with pytest.raises(memsyn.OptionError, match=r"max_change must be a number above 0, such as 0\.05"):
            kind(memsyn.Memory.empty(), max_change=bound)


# Lightning


def remembered(module: pl.LightningModule) -> memsyn.Memory:
    generator = torch.Generator().manual_seed(5)
    return directions_of(module, [torch.randn(10, 4, generator=generator).double()])


class Watcher(pl.Callback):
    """The predicted change after each step."""

    def __init__(self, callback: LightningCallback) -> None:
        self.callback, self.changes = callback, dict[int, float | None]()

    def on_train_batch_end(self, trainer: pl.Trainer, *given: Any) -> None:
        self.changes[trainer.global_step] = self.callback.protections[0].report().change


def test_lightning_logs_the_change_to_its_loggers(tmp_path: Path) -> None:
    module = Module(KINDS["adam"])
    callback = LightningCallback(remembered(module), max_samples=0)
    watcher = Watcher(callback)
    loggers = [
        TensorBoardLogger(tmp_path / "board"),
        MLFlowLogger("test", tracking_uri=(tmp_path / "mlruns").as_uri()),
        CSVLogger(tmp_path / "csv"),
    ]
    trainer = fit(module, tmp_path, [callback, watcher], logger=loggers, log_every_n_steps=4)
    # 12 steps; Lightning counts the steps of its loggers from 0.
    expected = {step - 1: watcher.changes[step] for step in (4, 8, 12)}
    assert min(expected.values()) > 0
    assert events(tmp_path / "board")[CHANGE] == pytest.approx(expected, rel=1e-6)
    assert metrics_of_mlflow()[CHANGE] == pytest.approx(expected, rel=1e-6)
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        rows = {int(row["step"]): float(row[CHANGE]) for row in csv.DictReader(file)}
    assert rows == pytest.approx(expected, rel=1e-6)
    assert {name for name in events(tmp_path / "board") if name.startswith("memsyn/")} == PROJECTED
    assert float(trainer.callback_metrics[CHANGE]) == pytest.approx(watcher.changes[12], rel=1e-6)
    assert CHANGE in trainer.progress_bar_metrics


@pytest.mark.parametrize(("options", "steps"), [({}, [3, 6, 9, 12]), ({"accumulate_grad_batches": 2}, [3, 6])])
def test_lightning_reports_every_few_steps(options: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    module = Module(KINDS["adam"])
    callback = LightningCallback(remembered(module), max_samples=0, report_every=3)
    fit(module, tmp_path, [callback], logger=TensorBoardLogger(tmp_path), log_every_n_steps=100, **options)
    assert [step + 1 for step in events(tmp_path)[CHANGE]] == steps


def test_lightning_reports_both_optimizers_as_one_model(tmp_path: Path) -> None:
    class Both(TwoOptimizers):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.net[0], self.net[2])]

    module = Both()
    importance = memsyn.measure(module, [torch.randn(10, 4).double()], progress=False)
    memory = remembered(module).consolidate(module, importance)
    callback = LightningCallback(memory, form="proximal", strength=0.5, max_samples=0)
    seen: list[Any] = []

    class Reports(pl.Callback):
        def on_train_batch_end(self, *given: Any) -> None:
            seen.append([handle.report() for handle in callback.protections])

    fit(module, tmp_path, [callback, Reports()], logger=TensorBoardLogger(tmp_path), log_every_n_steps=4)
    board, last = events(tmp_path), seen[-1]
    assert len(last) == 2
    assert last[0].change == last[1].change
    assert board["memsyn/penalty"][11] == pytest.approx(sum(report.penalty for report in last), rel=1e-6)
    weights = [report.num_weights for report in last]
    held = sum(report.held * count for report, count in zip(last, weights, strict=True)) / sum(weights)
    assert board["memsyn/held"][11] == pytest.approx(held, rel=1e-6)
    assert board[CHANGE][11] == pytest.approx(last[0].change, rel=1e-6)


def test_lightning_stops_once_it_has_forgotten_too_much(tmp_path: Path) -> None:
    old = Module(KINDS["adam"])
    memory = remembered(old)
    free = LightningCallback(memory, max_samples=0)
    watcher = Watcher(free)
    fit(copy.deepcopy(old), tmp_path, [free, watcher])
    bound = watcher.changes[5]
    assert bound is not None
    first = next(step for step, change in sorted(watcher.changes.items()) if change > bound)
    module, callback = copy.deepcopy(old), LightningCallback(memory, max_change=bound)
    with pytest.warns(memsyn.ForgettingWarning, match=rf"training stops after step {first}: .* above max_change="):
        trainer = fit(module, tmp_path, [callback], logger=TensorBoardLogger(tmp_path))
    assert trainer.global_step == first < 12
    assert events(tmp_path)[CHANGE][first - 1] == pytest.approx(watcher.changes[first], rel=1e-6)
    found = memsyn.protect(torch.optim.SGD(module.parameters()), module, memory, reference=old).report()
    assert found.change == pytest.approx(watcher.changes[first], rel=1e-9)
    assert len(callback.memory.history) == 2
    late = LightningCallback(memory, max_samples=0, max_change=1e-9)
    with pytest.warns(memsyn.ForgettingWarning, match="after step 6:"):
        trainer = fit(copy.deepcopy(old), tmp_path, [late], log_every_n_steps=0)  # at the end of the epoch
    assert trainer.global_step == 6


def test_lightning_refuses_a_stop_that_it_cannot_make(tmp_path: Path) -> None:
    module = Module(KINDS["adam"])
    importance = memsyn.measure(module, [torch.randn(10, 4).double()], progress=False)
    callback = LightningCallback(memsyn.Memory.empty().consolidate(module, importance), max_change=0.05)
    with pytest.raises(memsyn.OptionError, match=r"max_change=0\.05 stops a training.*holds no directions"):
        fit(module, tmp_path, [callback])
    assert callback.protections == []
