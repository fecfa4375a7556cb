"""What the callbacks of trainers measure when training ends, at which weights, and what they say before the first step.

Run with the real trainers. The expected values are those of `measure` on the batches and weights that are meant.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import schedulefree
import torch
import torch.nn.functional as F
import transformers
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from transformers import BertConfig, BertForQuestionAnswering, T5Config, T5ForConditionalGeneration, Trainer

import memsyn
from memsyn.integrations.lightning import MemsynCallback as LightningCallback
from memsyn.integrations.transformers import MemsynCallback as TrainerCallback
from tests.test_integrations import KINDS, BrokenError, Module, arguments, bert, padded, sentences

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers: many, and not ours

EMPTY = memsyn.Memory.empty()


def assert_measured(memory: memsyn.Memory, model: nn.Module, batches: Any, forward: Any = None) -> None:
    """The memory holds one measurement, on these batches, at the model's present weights."""
    found = memsyn.measure(model, batches, forward=forward, progress=False)
    assert [entry.num_samples for entry in memory.history] == [found.num_samples]
    expected = EMPTY.consolidate(model, found)
    torch.testing.assert_close(memory.anchor, expected.anchor, rtol=0, atol=0)
    torch.testing.assert_close(memory.importance, expected.importance, rtol=1e-4, atol=1e-5)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Hugging Face


def trainer_of(model: nn.Module, folder: Path, callbacks: list[Any], data: Any = None, **options: Any) -> Trainer:
    kind, collator = options.pop("kind", Trainer), options.pop("data_collator", padded)
    return kind(
        model,
        arguments(folder, **options),
        train_dataset=sentences(1) if data is None else data,
        eval_dataset=sentences(2),
        data_collator=collator,
        callbacks=callbacks,
    )


class Pairs(Trainer):
    """Learns preferences: the chosen answer has a larger first logit than the rejected one."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
        chosen, rejected = (model(input_ids=inputs[key]).logits[:, 0] for key in ("chosen", "rejected"))
        return -F.logsigmoid(chosen - rejected).mean()


def stacked(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in samples[0]}


def answers() -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12,
    )  # fmt: skip
    ids = torch.randint(1, 30, (8, 6))
    return BertForQuestionAnswering(config).eval(), [
        {"input_ids": row, "start_positions": 1, "end_positions": 2} for row in ids
    ]


def translations() -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    ids = torch.randint(1, 30, (8, 6))
    return T5ForConditionalGeneration(config).eval(), [{"input_ids": row, "labels": row[:4]} for row in ids]


def preferences() -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    ids = torch.randint(1, 30, (8, 2, 6))
    return bert(), [{"chosen": one[0], "rejected": one[1]} for one in ids]


HARD: dict[str, Any] = {
    "question answering": (answers, Trainer, r"OutputError|start_logits", lambda m, b: m(**b).start_logits),
    "T5": (translations, Trainer, r"model failed on it", lambda m, b: m(**b).logits),
    "pairs": (preferences, Pairs, r"model failed on it", lambda m, b: m(input_ids=b["chosen"]).logits),
}


@pytest.mark.parametrize("case", HARD)
def test_a_trainer_that_cannot_be_measured_says_so_before_the_first_step(case: str, tmp_path: Path) -> None:
    make, kind, text, forward = HARD[case]
    model, data = make()
    start = weights(model)
    options = {"kind": kind, "data_collator": stacked, "max_steps": 2, "remove_unused_columns": False}
    trainer = trainer_of(model, tmp_path, [TrainerCallback(EMPTY)], data, **options)
    with pytest.raises(memsyn.MemsynError, match=rf"before training.*({text}).*forward=.*data=.*max_samples=0"):
        trainer.train()
    assert trainer.state.global_step == 0
    torch.testing.assert_close(weights(model), start, rtol=0, atol=0)
    callback = TrainerCallback(EMPTY, forward=forward)
    trainer_of(model, tmp_path, [callback], data, **options).train()
    assert_measured(callback.memory, model, DataLoader(data, 4, collate_fn=stacked), forward)


class Noisy(Dataset[Any]):
    """Draws from torch's generator for each sample."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.randint(1, 30, (5,)), "labels": index % 3}


def test_the_trial_leaves_a_trainer_as_it_was(tmp_path: Path) -> None:
    ends = []
    for max_samples in (0, 2):
        model = bert()
        model.config.hidden_dropout_prob = 0.1
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        trainer_of(model, tmp_path, [TrainerCallback(EMPTY, max_samples=max_samples)], Noisy(), max_steps=3).train()
        ends.append(weights(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


class Stream(IterableDataset[Any]):
    """Sentences without end. It stops the test if many more are read than training needs."""

    def __init__(self, wrap: Any = lambda sample: sample) -> None:
        self.wrap = wrap

    def __iter__(self) -> Iterator[Any]:
        for seed in range(8):
            yield from map(self.wrap, sentences(seed, 12))
        raise BrokenError("the stream is read without end")


def first_of_stream(count: int) -> list[Any]:
    return [sample for _, sample in zip(range(count), Stream(), strict=False)]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_an_endless_stream_is_measured_as_far_as_a_trainer_read_it(accumulated: int, tmp_path: Path) -> None:
    model, callback = bert(), TrainerCallback(EMPTY)
    options = {"max_steps": 3, "gradient_accumulation_steps": accumulated}
    trainer_of(model, tmp_path, [callback], Stream(), **options).train()
    batches = DataLoader(first_of_stream(12 * accumulated), 4, collate_fn=padded)
    assert_measured(callback.memory, model, batches)


def test_a_stream_that_can_be_read_once_is_not_tried(tmp_path: Path) -> None:
    class Once(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.open = super().__iter__()

        def __iter__(self) -> Iterator[Any]:
            return self.open

    class Kept(Trainer):
        """Keeps what it trains on."""

        def compute_loss(self, model: nn.Module, inputs: Any, *given: Any, **others: Any) -> Any:
            self.__dict__.setdefault("seen", []).append(inputs["input_ids"])
            return super().compute_loss(model, inputs, *given, **others)

    model, callback = bert(), TrainerCallback(EMPTY)
    trainer = trainer_of(model, tmp_path, [callback], Once(), max_steps=2, kind=Kept)
    with pytest.warns(memsyn.NotMeasuredWarning, match=r"is not known: the training set can be read only once.*data="):
        trainer.train()
    expected = [batch["input_ids"] for batch in DataLoader(first_of_stream(8), 4, collate_fn=padded)]
    torch.testing.assert_close(trainer.__dict__["seen"], expected, rtol=0, atol=0)
    assert callback.memory.num_samples == 8


def test_a_loader_that_cannot_be_read_on_trial_is_a_warning(tmp_path: Path) -> None:
    class Keyed(Dataset[Any]):
        """Sentences under keys, which a sampler of its own knows."""

        def __len__(self) -> int:
            return 2

        def __getitem__(self, key: Any) -> Any:
            return sentences(1)[{"a": 0, "b": 1}[key]]

    class Sampled(Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(Keyed(), 2, sampler=["a", "b"], collate_fn=padded)

    callback = TrainerCallback(EMPTY)
    trainer = trainer_of(bert(), tmp_path, [callback], max_steps=2, kind=Sampled)
    with pytest.warns(memsyn.NotMeasuredWarning, match=r"first batch could not be read \(KeyError: 0\)"):
        trainer.train()
    assert callback.memory.num_samples == 2


class FailsInTheEnd:
    """A `forward` that fails once training has changed the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.start = weights(model)

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        if not all(torch.equal(p, self.start[name]) for name, p in model.named_parameters()):
            raise BrokenError("no more")
        return model(batch[0]) if isinstance(batch, list) else model(**batch)


def test_a_trainer_that_cannot_measure_in_the_end_keeps_model_and_memory(tmp_path: Path) -> None:
    model = bert()
    importance = memsyn.measure(model, DataLoader(sentences(0), 8, collate_fn=padded), progress=False)
    memory = EMPTY.consolidate(model, importance)
    start = weights(model)
    callback = TrainerCallback(memory, strength=0.5, forward=FailsInTheEnd(model))
    trainer = trainer_of(model, tmp_path, [callback], max_steps=2)
    with pytest.warns(memsyn.NotMeasuredWarning, match=r"has ended, but measuring has failed.*no more.*as it was"):
        result = trainer.train()
    assert result.global_step == 2
    assert callback.memory is memory
    assert callback.protection is None
    assert not torch.equal(model.classifier.weight, start["classifier.weight"])


def test_a_trainer_measures_the_best_weights_that_it_loads(tmp_path: Path) -> None:
    class Rising(Trainer):
        """Its first evaluation is the best."""

        def evaluate(self, *given: Any, **options: Any) -> dict[str, float]:
            metrics = {**super().evaluate(*given, **options), "eval_rank": float(self.state.global_step)}
            self.log(metrics)
            return metrics

    model, callback = bert(), TrainerCallback(EMPTY)
    options = {
        "load_best_model_at_end": True, "metric_for_best_model": "eval_rank", "greater_is_better": False,
        "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 5,
    }  # fmt: skip
    trainer = trainer_of(model, tmp_path, [callback], kind=Rising, **options)
    trainer.train()
    best = type(model).from_pretrained(tmp_path / "checkpoint-2").eval()
    assert trainer.state.best_global_step == 2
    torch.testing.assert_close(weights(model), weights(best), rtol=0, atol=0)
    torch.testing.assert_close(callback.memory.anchor, weights(best), rtol=0, atol=0)


@pytest.mark.parametrize("best", [False, True])
def test_a_trainer_measures_the_averaged_weights_of_a_schedule_free_optimizer(best: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "max_steps": 6}
    if best:
        options |= {
            "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
            "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 5,
        }  # fmt: skip
    twin, model, callback = bert(), bert(), TrainerCallback(EMPTY)
    plain = trainer_of(twin, tmp_path / "plain", [], **options)
    plain.train()
    if not best:
        plain.optimizer.eval()
    trainer = trainer_of(model, tmp_path / "mine", [callback], **options)
    trainer.train()
    trainer.evaluate()  # calls the optimizer's eval(), which must find the averaged weights in place
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(callback.memory.anchor, weights(model), rtol=0, atol=0)


class Average(transformers.TrainerCallback):
    """Puts the mean of all steps into the model when training ends."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self.seen.append(weights(named["model"]))

    def mean(self) -> dict[str, Tensor]:
        return {name: torch.stack([one[name] for one in self.seen]).mean(0) for name in self.seen[0]}

    def on_train_end(self, *given: Any, **named: Any) -> None:
        named["model"].load_state_dict(self.mean(), strict=False)


@pytest.mark.parametrize("order", [1, -1])
def test_a_trainer_measures_what_another_callback_has_averaged(order: int, tmp_path: Path) -> None:
    model, average, callback = bert(), Average(), TrainerCallback(EMPTY)
    trainer = trainer_of(model, tmp_path, [average, callback][::order])
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == before
    torch.testing.assert_close(callback.memory.anchor, average.mean(), rtol=0, atol=0)
    assert_measured(callback.memory, model, DataLoader(sentences(1), 24, collate_fn=padded))


def test_a_finished_trainer_that_is_resumed_counts_no_sample_again(tmp_path: Path) -> None:
    first = TrainerCallback(EMPTY)
    options = {"save_strategy": "steps", "save_steps": 6}
    trainer_of(bert(), tmp_path, [first], **options).train()
    again = TrainerCallback(first.memory)
    trainer = trainer_of(bert(), tmp_path, [again], **options)
    with pytest.warns(memsyn.NotMeasuredWarning, match=r"made no step"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert again.memory is first.memory
    assert again.memory.num_samples == 24


def test_a_second_training_on_the_same_data_replaces_the_first(tmp_path: Path) -> None:
    class Counter(transformers.TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            protected.append(callback.protection is not None)

    model, data, callback, protected = bert(), sentences(1), TrainerCallback(EMPTY), []
    trainer_of(model, tmp_path, [callback, Counter()], data).train()
    first = callback.memory
    trainer = trainer_of(model, tmp_path, [callback, Counter()], data)
    with pytest.warns(memsyn.RepeatedDataWarning, match=r"new measurement will replace the last one"):
        trainer.train()
    assert protected == [False] * 12  # neither training protects what was learned of the same data
    assert callback.memory is not first
    assert_measured(callback.memory, model, DataLoader(data, 24, collate_fn=padded))
    trainer_of(model, tmp_path, [callback, Counter()], sentences(3)).train()
    assert protected[12:] == [True] * 6
    assert [entry.num_samples for entry in callback.memory.history] == [24, 24]


def test_a_data_set_is_known_by_its_fingerprint(tmp_path: Path) -> None:
    class Rows(list[Any]):
        """Stands for a `datasets.Dataset`: the Trainer makes a new one for each training, with the same fingerprint."""

        _fingerprint = "79c9c98d1d64e0b9"

    model, callback = bert(), TrainerCallback(EMPTY)
    trainer_of(model, tmp_path, [callback], Rows(sentences(1)), max_steps=1).train()
    trainer_of(model, tmp_path, [callback], Rows(sentences(1))).train()
    assert_measured(callback.memory, model, DataLoader(sentences(1), 24, collate_fn=padded))


def test_a_trainer_consolidates_as_it_is_told(tmp_path: Path) -> None:
    model = bert()
    old = EMPTY.consolidate(model, memsyn.measure(model, [padded(sentences(0))], progress=False))
    other = [padded(sentences(5, 6))]
    callback = TrainerCallback(
        old, strength=0.1, rule="ema", decay=0.25, label="second", data=other,
        protect_options={"importance_dtype": torch.bfloat16},
    )  # fmt: skip
    trainer_of(model, tmp_path, [callback], max_steps=2).train()
    assert [(e.num_samples, e.rule, e.decay, e.label) for e in callback.memory.history[1:]] == [
        (6, "ema", 0.25, "second")
    ]
    new = memsyn.measure(model, other, progress=False).mean()
    expected = {name: 0.25 * omega + 0.75 * new[name] for name, omega in old.importance.items()}
    torch.testing.assert_close(callback.memory.importance, expected, rtol=1e-4, atol=1e-6)
    factors = TrainerCallback(EMPTY, estimator="kronecker", rank=3, max_samples=8)
    trainer_of(model, tmp_path, [factors], max_steps=1).train()
    assert factors.memory.directions is not None
    assert factors.memory.directions.rank == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rule": "most"}, r"before training.*rule must be one of"),
        ({"rule": "max", "estimator": "kronecker"}, r"before training.*rule='max' is for importances"),
        ({"estimator": "kronecker", "rank": 0}, r"before training.*rank must be a whole number"),
        ({"estimator": "most"}, r"before training.*estimator must be one of"),
        ({"data": []}, r"before training.*there are no samples"),
    ],
)
def test_wrong_options_of_the_end_are_refused_at_the_beginning(
    options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    trainer = trainer_of(bert(), tmp_path, [TrainerCallback(EMPTY, **options)], max_steps=1)
    with pytest.raises(memsyn.MemsynError, match=text):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", [TrainerCallback, LightningCallback])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"protect_options": {"evry": 4}}, r"protect_options must be options of protect \(device, every, .*got evry"),
        ({"data": iter([])}, r"data must be batches that can be read more than once.*list_iterator"),
        ({"max_samples": -1}, r"max_samples must be None .*got -1"),
    ],
)
def test_a_callback_refuses_wrong_options(kind: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(memsyn.OptionError, match=text):
        kind(EMPTY, **options)


def test_any_other_error_on_trial_says_the_same(tmp_path: Path) -> None:
    def objective(output: Tensor, info: Any) -> Tensor:
        raise KeyError("weights of the classes")

    callback = TrainerCallback(EMPTY, estimator=memsyn.Estimator(objective))
    trainer = trainer_of(bert(), tmp_path, [callback], max_steps=1)
    with pytest.raises(memsyn.ModelError, match=r"before training.*KeyError: 'weights of the classes'.*forward="):
        trainer.train()


def test_running_out_of_memory_on_trial_stays_what_it_is(tmp_path: Path) -> None:
    """A Trainer that looks for a batch size that fits must see it."""

    def forward(model: nn.Module, batch: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        trainer_of(bert(), tmp_path, [TrainerCallback(EMPTY, forward=forward)], max_steps=1).train()


# Lightning


X = torch.randn(24, 4, generator=torch.Generator().manual_seed(3)).double()
DATA = TensorDataset(X, torch.arange(24) % 3)


def fit(module: pl.LightningModule, folder: Path, callbacks: list[Any], loaders: Any = None, **options: Any) -> Any:
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=callbacks, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "max_epochs": 2, "limit_val_batches": 0, **options},
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, 4) if loaders is None else loaders, DataLoader(DATA, 24))
    return trainer


class Several(Module):
    """Trains on a dict or a list of loaders."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        one, other = batch.values() if isinstance(batch, dict) else batch
        return F.cross_entropy(self(one[0]), one[1]) + F.cross_entropy(self(other[0]), other[1])


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_several_loaders_are_refused_before_the_first_step(kind: str, tmp_path: Path) -> None:
    other = TensorDataset(X[:8] + 1, torch.arange(8) % 3)
    pair = [DataLoader(DATA, 4), DataLoader(other, 4)]
    loaders: Any = pair if kind == "list" else dict(zip("ab", pair, strict=True))
    module = Several(KINDS["sgd"])
    start = weights(module)
    with pytest.raises(memsyn.BatchError, match=rf"batch of a {kind} of training loaders.*forward=.*data="):
        fit(module, tmp_path, [LightningCallback(EMPTY)], loaders)
    torch.testing.assert_close(weights(module), start, rtol=0, atol=0)

    def forward(model: Any, batch: Any) -> Tensor:
        one, other = batch.values() if isinstance(batch, dict) else batch
        return torch.cat([model(one[0]), model(other[0])], 1)

    callback = LightningCallback(EMPTY, forward=forward)
    fit(module, tmp_path, [callback], pl.utilities.CombinedLoader(loaders, "min_size"))
    assert_measured(callback.memory, module, [[[X[:8]], [X[:8] + 1]]], forward)
    callback = LightningCallback(EMPTY, data=[X[:5]])
    fit(module, tmp_path, [callback], loaders)
    assert_measured(callback.memory, module, [X[:5]])


class TwoOutputs(Module):
    """Returns two tensors."""

    def forward(self, x: Tensor) -> Any:
        return self.net(x), x

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[0], batch[1])


def test_a_module_that_cannot_be_measured_says_so_before_the_first_step(tmp_path: Path) -> None:
    module = TwoOutputs(KINDS["sgd"])
    start, callback = weights(module), LightningCallback(EMPTY)
    with pytest.raises(memsyn.OutputError, match=r"before training.*tuple of Tensor, Tensor.*forward="):
        fit(module, tmp_path, [callback])
    torch.testing.assert_close(weights(module), start, rtol=0, atol=0)
    assert callback.memory is EMPTY


def test_the_trial_leaves_lightning_as_it_was(tmp_path: Path) -> None:
    ends = []
    for max_samples in (0, None):
        module = Module(KINDS["adam"])
        module.net[1] = nn.Dropout(0.3)
        torch.manual_seed(2)
        loaders = DataLoader(DATA, 4, shuffle=True)
        fit(module, tmp_path, [LightningCallback(EMPTY, max_samples=max_samples)], loaders)
        ends.append(weights(module))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_lightning_measures_an_endless_stream_as_far_as_it_was_read(tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for k in range(1000):
                yield DATA[k % 24]
            raise BrokenError("the stream is read without end")

    module, callback = Module(KINDS["sgd"]), LightningCallback(EMPTY)
    fit(module, tmp_path, [callback], DataLoader(Endless(), 4), max_epochs=-1, max_steps=5)
    assert_measured(callback.memory, module, [X[:20]])
    callback = LightningCallback(EMPTY)
    fit(module, tmp_path, [callback], limit_train_batches=3)
    assert_measured(callback.memory, module, [X[:12]])


AVERAGES: dict[str, Any] = {
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    "mean": WeightAveraging,
    "ema": lambda: EMAWeightAveraging(decay=0.9),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", AVERAGES)
def test_lightning_measures_the_averaged_weights(kind: str, order: int, tmp_path: Path) -> None:
    module, callback = Module(KINDS["sgd"]), LightningCallback(EMPTY)
    average = AVERAGES[kind]()
    fit(module, tmp_path, [average, callback][::order])
    kept = getattr(average._average_model, "module", average._average_model)
    torch.testing.assert_close(callback.memory.anchor, weights(kept), rtol=0, atol=0)
    assert_measured(callback.memory, module, [X])


def test_lightning_measures_what_the_module_puts_in_place_itself(tmp_path: Path) -> None:
    class Own(Module):
        def on_train_end(self) -> None:
            with torch.no_grad():
                self.net[2].bias.fill_(7.0)

    module, callback = Own(KINDS["sgd"]), LightningCallback(EMPTY)
    fit(module, tmp_path, [callback])
    assert callback.memory.anchor["net.2.bias"].tolist() == [7.0] * 3
    assert_measured(callback.memory, module, [X])


def test_lightning_measures_the_averaged_weights_of_a_schedule_free_optimizer(tmp_path: Path) -> None:
    class Free(Module):
        def on_train_start(self) -> None:
            self.optimizers().optimizer.train()

    def free(parameters: Any) -> Any:
        return schedulefree.SGDScheduleFree(parameters, lr=0.1)

    twin, module, callback = Free(free), Free(free), LightningCallback(EMPTY)
    trainer = fit(twin, tmp_path, [])
    trainer.optimizers[0].eval()
    fit(module, tmp_path, [callback])
    torch.testing.assert_close(callback.memory.anchor, weights(twin), rtol=1e-9, atol=1e-12)
    assert_measured(callback.memory, module, [X])


class Scored(Module):
    """Its validation is best after the first epoch."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("rank", float(self.current_epoch))


@pytest.mark.parametrize("load_best", [None, False, True])
def test_lightning_measures_the_best_checkpoint_if_it_is_told_to(load_best: bool | None, tmp_path: Path) -> None:
    module, callback = Scored(KINDS["sgd"]), LightningCallback(EMPTY, load_best=load_best)
    saver = ModelCheckpoint(tmp_path, monitor="rank", filename="best")
    options = {"enable_checkpointing": True, "limit_val_batches": 1.0}
    if load_best is None:
        with pytest.warns(memsyn.MovedWeightsWarning, match=r"best checkpoint by 'rank', .*load_best=True"):
            fit(module, tmp_path, [callback, saver], **options)
    else:
        fit(module, tmp_path, [callback, saver], **options)
    best = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(module.net[0].weight, best["net.0.weight"]) is bool(load_best)
    assert_measured(callback.memory, module, [X])


def test_loading_the_best_needs_a_checkpoint_that_monitors(tmp_path: Path) -> None:
    module = Module(KINDS["sgd"])
    start = weights(module)
    with pytest.raises(memsyn.OptionError, match=r"load_best=True needs a ModelCheckpoint with monitor="):
        fit(module, tmp_path, [LightningCallback(EMPTY, load_best=True)])
    torch.testing.assert_close(weights(module), start, rtol=0, atol=0)


def test_fitting_twice_counts_no_sample_twice(tmp_path: Path) -> None:
    module, callback, loader = Module(KINDS["sgd"]), LightningCallback(EMPTY), DataLoader(DATA, 4)
    trainer = fit(module, tmp_path, [callback], loader)
    first = callback.memory
    with pytest.warns(memsyn.NotMeasuredWarning, match=r"made no step"):
        trainer.fit(module, loader)  # its epochs are done
    assert callback.memory is first
    with pytest.warns(memsyn.RepeatedDataWarning, match=r"replace the last one"):
        fit(module, tmp_path, [callback], DataLoader(DATA, 8))
    assert callback.memory is not first
    assert_measured(callback.memory, module, [X])
    fit(module, tmp_path, [callback], DataLoader(TensorDataset(X + 1, torch.arange(24) % 3), 8))
    assert [entry.num_samples for entry in callback.memory.history] == [24, 24]


def test_a_broken_off_second_training_is_still_a_second_one(tmp_path: Path) -> None:
    class Breaker(pl.Callback):
        def on_train_batch_end(self, *given: Any) -> None:
            raise BrokenError

    module, callback = Module(KINDS["sgd"]), LightningCallback(EMPTY)
    fit(module, tmp_path, [callback])
    with pytest.raises(BrokenError):
        fit(module, tmp_path, [callback, Breaker()])
    assert callback.memory.num_samples == 24
    fit(module, tmp_path, [callback])
    assert_measured(callback.memory, module, [X])


def test_lightning_that_cannot_measure_in_the_end_keeps_module_and_memory(tmp_path: Path) -> None:
    module = Module(KINDS["sgd"])
    memory = EMPTY.consolidate(module, memsyn.measure(module, [X], progress=False))
    start = weights(module)
    callback = LightningCallback(memory, strength=0.1, forward=FailsInTheEnd(module))
    with pytest.warns(memsyn.NotMeasuredWarning, match=r"measuring has failed.*no more.*The model has its trained"):
        trainer = fit(module, tmp_path, [callback])
    assert trainer.state.finished
    assert callback.memory is memory
    assert callback.protections == []
    assert not torch.equal(module.net[0].weight, start["net.0.weight"])


def test_lightning_measures_batches_as_the_hooks_give_them(tmp_path: Path) -> None:
    class Hooked(Module):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch["both"]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 1, batch[1]]

    loader = DataLoader(DATA, 4, collate_fn=lambda rows: {"both": torch.utils.data.default_collate(rows)})
    module, callback = Hooked(KINDS["sgd"]), LightningCallback(EMPTY)
    fit(module, tmp_path, [callback], loader)
    assert_measured(callback.memory, module, [X + 1])


def test_lightning_protects_and_consolidates_as_it_is_told(tmp_path: Path) -> None:
    module = Module(KINDS["sgd"])
    factors = memsyn.measure(module, [X], estimator="kronecker", progress=False)
    old = EMPTY.consolidate(module, factors)
    twin, handles = copy.deepcopy(module), []

    class Own(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            handles.append(memsyn.protect(trainer.optimizers[0], pl_module, old, strength=3.0, every=1))

    callback = LightningCallback(old, strength=3.0, protect_options={"every": 1}, rule="mean", label="b", rank=2)
    fit(module, tmp_path, [callback])
    fit(twin, tmp_path, [Own()])
    torch.testing.assert_close(weights(module), weights(twin), rtol=1e-9, atol=1e-12)
    assert [(entry.rule, entry.label) for entry in callback.memory.history[1:]] == [("mean", "b")]
    assert callback.memory.directions is not None
    assert callback.memory.directions.rank == 2


class TwoParts(pl.LightningModule):
    """A body and a head, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.automatic_optimization = False

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(inputs)))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)], []


@pytest.mark.parametrize("num_classes", [3, 2])
def test_what_is_excluded_is_not_added_to_what_replaced_it(num_classes: int, tmp_path: Path) -> None:
    module = TwoParts()
    memory = EMPTY.consolidate(module, memsyn.measure(module, [X], progress=False))
    module.head = nn.Linear(5, num_classes).double()
    callback = LightningCallback(memory, protect_options={"exclude": "head.*"})
    data = TensorDataset(X, torch.arange(24) % num_classes)
    fit(module, tmp_path, [callback], DataLoader(data, 4), max_epochs=1)
    own = memsyn.measure(module, DataLoader(data, 4), progress=False).mean()
    torch.testing.assert_close(callback.memory.importance["head.weight"], own["head.weight"], rtol=1e-6, atol=0)
    old = memory.importance["body.weight"]
    torch.testing.assert_close(callback.memory.importance["body.weight"], old + own["body.weight"], rtol=1e-6, atol=0)
