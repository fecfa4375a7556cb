"""Protection in trainers of other people, run for real, against the penalty as a term of their loss."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import memsyn
from memsyn.integrations.lightning import MemsynCallback as LightningCallback
from memsyn.integrations.transformers import MemsynCallback as TrainerCallback
from tests import reference

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers: many, and not ours


# Hugging Face


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=12,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def sentences(seed: int, count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, 30, (n,), generator=generator), "labels": int(n % 3)} for n in lengths]


def padded(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator of the user's."""
    ids = nn.utils.rnn.pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


class Penalised(Trainer):
    """What people write without a callback."""

    memory: memsyn.Memory
    strength: float

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
        loss = super().compute_loss(model, inputs, **others)
        return loss + self.strength * memsyn.penalty(model, self.memory) / self.args.gradient_accumulation_steps


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2,
        "optim": "adamw_torch", "logging_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "seed": 1, "max_grad_norm": 0.0, **options,
    }  # fmt: skip
    return TrainingArguments(**given)


@pytest.fixture(scope="module")
def learned() -> tuple[nn.Module, memsyn.Memory]:
    model = bert()
    importance = memsyn.measure(model, DataLoader(sentences(0), 8, collate_fn=padded), progress=False)
    return model, memsyn.Memory.empty().consolidate(model, importance)


def train(
    kind: type[Trainer], model: nn.Module, options: TrainingArguments, callbacks: list[Any], **extra: Any
) -> Trainer:
    trainer = kind(model, options, train_dataset=sentences(1), data_collator=padded, callbacks=callbacks)
    for name, value in extra.items():
        setattr(trainer, name, value)
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3, "max_steps": 2}, {"bf16": True}])
def test_a_trainer_equals_the_loss_term(
    learned: tuple[nn.Module, memsyn.Memory], options: dict[str, Any], tmp_path: Path
) -> None:
    start, memory = learned
    mine, twin = copy.deepcopy(start), copy.deepcopy(start)
    callback = TrainerCallback(memory, strength=0.5, form="gradient", max_samples=0)
    trainer = train(Trainer, mine, arguments(tmp_path, **options), [callback])
    train(Penalised, twin, arguments(tmp_path, **options), [], memory=memory, strength=0.5)
    for found, expected, began in zip(mine.parameters(), twin.parameters(), start.parameters(), strict=True):
        scale = float((expected - began).norm()) + 1e-6
        assert float((found - expected).norm()) / scale < (2e-2 if options.get("bf16") else 1e-3)
    penalties = [entry["memsyn/penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(penalties) == trainer.state.global_step // 2 > 0
    assert penalties[-1] > 0


def test_a_trainer_goes_on_from_a_checkpoint(learned: tuple[nn.Module, memsyn.Memory], tmp_path: Path) -> None:
    start, memory = learned

    def callback() -> TrainerCallback:
        return TrainerCallback(memory, strength=0.5, form="gradient", max_samples=0)

    options = {"save_strategy": "steps", "save_steps": 3}
    whole = copy.deepcopy(start)
    train(Trainer, whole, arguments(tmp_path, **options), [callback()])
    resumed = copy.deepcopy(start)
    trainer = Trainer(
        resumed,
        arguments(tmp_path, **options),
        train_dataset=sentences(1),
        data_collator=padded,
        callbacks=[callback()],
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for found, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_trainer_measures_in_the_end(tmp_path: Path) -> None:
    model = bert()
    callback = TrainerCallback(memsyn.Memory.empty())
    train(Trainer, model, arguments(tmp_path), [callback])
    expected = memsyn.measure(model, DataLoader(sentences(1), 24, collate_fn=padded), progress=False)
    assert callback.memory.num_samples == 24
    assert max(reference.errors(callback.memory.importance, expected.mean()).values()) < 1e-4
    again = TrainerCallback(callback.memory, max_samples=8)
    train(Trainer, model, arguments(tmp_path), [again])
    assert again.memory.num_samples == 32
    assert again.protection is None
    chosen = TrainerCallback(memsyn.Memory.empty(), estimator="inputs", max_samples=8)
    train(Trainer, model, arguments(tmp_path), [chosen])
    assert chosen.memory.importance == {}
    assert chosen.memory.directions_quantity == ("signed_outputs", "second moments of inputs")


def directions_of(model: nn.Module, batches: Any, estimator: str = "kronecker") -> memsyn.Memory:
    found = memsyn.measure(model, batches, estimator=estimator, progress=False)
    return memsyn.Memory.empty().consolidate(model, found)


def change(memory: memsyn.Memory, model: nn.Module, start: nn.Module) -> float:
    return sum(memory.predicted_change(model, start).values())


class Watched(Trainer):
    """Keeps the weights that it evaluates."""

    def prediction_step(self, *given: Any, **options: Any) -> Any:
        weights = [p.detach().clone() for p in self.model.parameters()]  # state_dict() would project them
        self.__dict__.setdefault("seen", []).append(weights)
        return super().prediction_step(*given, **options)


@pytest.mark.parametrize(
    ("options", "every", "count"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, 2, 3),
        ({"eval_strategy": "epoch"}, 6, 1),
        ({"save_strategy": "steps", "save_steps": 3}, 3, 0),
    ],
)
def test_a_trainer_evaluates_and_saves_projected_weights(
    options: dict[str, Any], every: int, count: int, tmp_path: Path
) -> None:
    start = bert()
    memory = directions_of(start, DataLoader(sentences(0), 8, collate_fn=padded))
    models = {name: copy.deepcopy(start) for name in ("mine", "twin", "free")}
    callback = TrainerCallback(memory)
    trainers = {
        name: Watched(
            model,
            arguments(tmp_path / name, per_device_eval_batch_size=24, **options),
            train_dataset=sentences(1),
            eval_dataset=sentences(2),
            data_collator=padded,
            callbacks=[callback] if name == "mine" else [],
        )
        for name, model in models.items()
    }
    handle = memsyn.protect(trainers["twin"].create_optimizer(), models["twin"], memory, every=every)
    for trainer in trainers.values():
        trainer.train()
    handle.remove()
    evaluated = [trainers[name].__dict__.get("seen", []) for name in ("mine", "twin")]
    assert len(evaluated[0]) == len(evaluated[1]) == count
    for mine, twin in zip(*evaluated, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(models["mine"].state_dict(), models["twin"].state_dict(), rtol=1e-5, atol=1e-6)
    if "save_steps" in options:
        saved = [load_file(tmp_path / name / "checkpoint-3" / "model.safetensors") for name in ("mine", "twin")]
        torch.testing.assert_close(*saved, rtol=1e-5, atol=1e-6)
    assert change(memory, models["mine"], start) < 0.5 * change(memory, models["free"], start)
    assert all("memsyn/penalty" not in entry for entry in trainers["mine"].state.log_history)
    assert callback.protection is None
    assert callback.memory.importance == {}
    assert [(entry.num_samples, entry.magnitude) for entry in callback.memory.history] == [
        (24, "second moments of inputs and output gradients")
    ] * 2


# Lightning


class Module(pl.LightningModule):
    def __init__(self, kind: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.kind = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), kind
        self.memory: memsyn.Memory | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.memory is not None:
            loss = loss + 0.5 * memsyn.penalty(self, self.memory)
        return loss

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters())


def fit(
    module: pl.LightningModule, folder: Path, callbacks: list[Any], *, validate: bool = False, **options: Any
) -> pl.Trainer:
    torch.manual_seed(2)
    data = TensorDataset(torch.randn(24, 4).double(), torch.randint(3, (24,)))
    checkpoint = options.pop("ckpt_path", None)
    given: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 1, "enable_checkpointing": False, **options,
    }  # fmt: skip
    trainer = pl.Trainer(callbacks=callbacks, default_root_dir=folder, **given)
    validation = DataLoader(data, 24) if validate else None
    trainer.fit(module, DataLoader(data, 4), validation, ckpt_path=checkpoint)
    return trainer


KINDS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


def lightning_memory(module: pl.LightningModule) -> memsyn.Memory:
    importance = memsyn.measure(module, [torch.randn(10, 4).double()], progress=False)
    return memsyn.Memory.empty().consolidate(module, importance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 1e9}])
def test_lightning_equals_the_loss_term(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    if kind == "lbfgs" and options:
        options = {}  # Lightning refuses the rest
    mine, twin = Module(KINDS[kind]), Module(KINDS[kind])
    memory = lightning_memory(mine)
    twin.memory = memory
    trainer = fit(mine, tmp_path, [LightningCallback(memory, strength=0.5, form="gradient", max_samples=0)], **options)
    fit(twin, tmp_path, [], **options)
    for found, expected in zip(mine.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert float(trainer.callback_metrics["memsyn/penalty"]) > 0


def test_lightning_goes_on_from_a_checkpoint_and_measures_in_the_end(tmp_path: Path) -> None:
    module = Module(KINDS["sgd"])
    memory = lightning_memory(module)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    whole = LightningCallback(memory, strength=0.5)
    fit(module, tmp_path, [whole, saver], enable_checkpointing=True)
    resumed = Module(KINDS["sgd"])
    again = LightningCallback(memory, strength=0.5)
    path = next(tmp_path.glob("epoch=0-*.ckpt"))
    fit(resumed, tmp_path, [again], ckpt_path=path)
    for found, expected in zip(resumed.parameters(), module.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert whole.memory.num_samples == again.memory.num_samples == 34
    torch.manual_seed(2)
    data = torch.randn(24, 4).double()
    expected = memory.consolidate(module, memsyn.measure(module, [data], progress=False))
    for name, omega in expected.importance.items():
        assert torch.allclose(whole.memory.importance[name], omega, rtol=1e-4, atol=1e-6)


class Validated(Module):
    """Keeps the weights that it validates. A twin protects its optimizer itself."""

    def __init__(
        self, kind: Callable[[Any], Any], every: int | None = None, memory: memsyn.Memory | None = None
    ) -> None:
        super().__init__(kind)
        self.seen: list[Any] = []
        self.every, self.remembered = every, memory

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.remembered is not None:
            assert self.every is not None
            memsyn.protect(optimizer, self, self.remembered, every=self.every)
        return optimizer

    def validation_step(self, batch: Any, index: int) -> None:
        weights = [p.detach().clone() for p in self.parameters()]  # its state_dict() would project them
        if not self.trainer.sanity_checking:
            self.seen.append(weights)


@pytest.mark.parametrize(
    ("options", "every", "count"),
    [({"validate": True, "val_check_interval": 3}, 3, 4), ({"validate": True}, 6, 2), ({"saves": True}, 3, 0)],
)
def test_lightning_validates_and_saves_projected_weights(
    options: dict[str, Any], every: int, count: int, tmp_path: Path
) -> None:
    options = dict(options)
    start, saves = Validated(KINDS["adam"]), options.pop("saves", False)
    memory = directions_of(start, [torch.randn(10, 4).double()])
    mine, free, callback = Validated(KINDS["adam"]), Validated(KINDS["adam"]), LightningCallback(memory)
    twin = Validated(KINDS["adam"], every, memory)
    for name, module in (("mine", mine), ("twin", twin), ("free", free)):
        own: list[Any] = [callback] if name == "mine" else []
        if saves:  # only then, since saving projects too
            own.append(
                pl.callbacks.ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=3, save_top_k=-1)
            )
        trainer = fit(module, tmp_path, own, enable_checkpointing=saves, **options)
        assert "memsyn/penalty" not in trainer.callback_metrics
    assert len(mine.seen) == len(twin.seen) == count
    torch.testing.assert_close(mine.seen, twin.seen, rtol=1e-9, atol=1e-12)
    if saves:
        paths = [tmp_path / name / "step=9.ckpt" for name in ("mine", "twin")]
        saved = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
        torch.testing.assert_close(*saved, rtol=1e-9, atol=1e-12)
    assert change(memory, mine, start) < 0.5 * change(memory, free, start)
    assert callback.protections == []
    assert [entry.num_samples for entry in callback.memory.history] == [10, 24]


@pytest.mark.parametrize("estimator", ["inputs", "kronecker"])
def test_lightning_measures_what_the_memory_holds(estimator: str, tmp_path: Path) -> None:
    module = Module(KINDS["sgd"])
    memory = directions_of(module, [torch.randn(10, 4).double()], estimator)
    importance = memsyn.measure(module, [torch.randn(10, 4).double()], progress=False)
    callback = LightningCallback(memory.consolidate(module, importance))
    fit(module, tmp_path, [callback])
    old, new = callback.memory.history[:2], callback.memory.history[2:]
    assert {(entry.objective, entry.magnitude) for entry in old} == {(e.objective, e.magnitude) for e in new}
    assert [entry.num_samples for entry in new] == [24, 24]
    chosen = LightningCallback(memsyn.Memory.empty(), estimator=estimator)
    fit(module, tmp_path, [chosen])
    assert chosen.memory.importance == {}
    assert chosen.memory.directions_quantity == memory.directions_quantity


class TwoOptimizers(Module):
    """One optimizer for the network, one for a layer that no output relied on."""

    def __init__(self) -> None:
        super().__init__(KINDS["sgd"])
        self.spare, self.automatic_optimization = nn.Linear(4, 3).double(), False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.net, self.spare)]

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        F.cross_entropy(self(batch[0]) + self.spare(batch[0]), batch[1]).backward()
        for optimizer in self.optimizers():
            optimizer.step()


def test_lightning_leaves_an_optimizer_of_free_parameters_alone(tmp_path: Path) -> None:
    class Counter(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            counts.add(len(callback.protections))

    module, counts = TwoOptimizers(), set[int]()
    memory = directions_of(module, [torch.randn(10, 4).double()])
    assert memory.directions is not None
    assert memory.directions.free == {"spare.weight", "spare.bias"}
    callback = LightningCallback(memory, max_samples=0)
    fit(module, tmp_path, [callback, Counter()])
    assert counts == {1}


class BrokenError(Exception):
    """What stops a training."""


def test_a_trainer_that_was_broken_off_can_train_again(
    learned: tuple[nn.Module, memsyn.Memory], tmp_path: Path
) -> None:
    class Breaker(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **given: Any) -> None:
            raise BrokenError

    start, memory = learned
    callback, breaker = TrainerCallback(memory, max_samples=0), Breaker()
    trainer = Trainer(
        copy.deepcopy(start),
        arguments(tmp_path),
        train_dataset=sentences(1),
        data_collator=padded,
        callbacks=[callback, breaker],
    )
    with pytest.raises(BrokenError):
        trainer.train()
    trainer.remove_callback(breaker)
    trainer.train()
    assert callback.protection is None


@pytest.mark.parametrize("form", ["proximal", "projected"])
def test_lightning_that_was_broken_off_can_train_again(form: str, tmp_path: Path) -> None:
    class Breaker(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise BrokenError

    module = Module(KINDS["sgd"])
    memory = lightning_memory(module) if form == "proximal" else directions_of(module, [torch.randn(10, 4).double()])
    callback = LightningCallback(memory, strength=0.5, max_samples=0)
    with pytest.raises(BrokenError):
        fit(module, tmp_path, [callback, Breaker()])
    assert len(callback.protections) == 1
    assert callback.protections[0].form == form
    assert form == "proximal" or callback.protections[0].report().held > 0  # the step that waited is projected
    fit(module, tmp_path, [callback])
    assert callback.protections == []
