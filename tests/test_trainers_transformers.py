"""Every feature of Hugging Face's Trainer with the callback: against the penalty as a term of the loss, and measured.

docs/trainers.md names these tests in its table.
"""

import copy
import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

import memsyn
from memsyn.integrations.transformers import MemsynCallback
from tests.test_integrations import BrokenError, arguments, bert, change, directions_of, padded, sentences

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers: many, and not ours

EVALUATED: dict[str, Any] = {
    "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2,
    "load_best_model_at_end": True, "metric_for_best_model": "eval_rank", "greater_is_better": False,
}  # fmt: skip

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "load_best_model_at_end": EVALUATED,
    "early stopping": EVALUATED,
    "resume": {"save_strategy": "steps", "save_steps": 3},
    "accumulation": {"gradient_accumulation_steps": 3, "max_steps": 2},
    "bf16": {"bf16": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "adafactor": {"optim": "adafactor"},
}


@pytest.fixture(scope="module")
def old() -> nn.Module:
    return bert()


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    gc.freeze()  # each training collects garbage, and need not look through the libraries
    with mock.patch.dict(os.environ):  # torch_compile writes to it
        yield
    gc.unfreeze()


class Breaker(transformers.TrainerCallback):
    """Breaks a training off after its fourth step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 4:
            raise BrokenError


def run(
    feature: str, start: nn.Module, folder: Path, callback: MemsynCallback | None, kind: type[Trainer] = Trainer
) -> tuple[nn.Module, Trainer]:
    """Train a copy of `start` with a feature. The first evaluation is the best: it has the rank 0."""

    def trainer(*others: transformers.TrainerCallback) -> Trainer:
        ranks = itertools.count()
        return kind(
            copy.deepcopy(start),
            arguments(folder, **FEATURES[feature]),
            train_dataset=sentences(1),
            eval_dataset=sentences(2),
            data_collator=padded,
            compute_metrics=lambda _: {"rank": float(next(ranks))},
            callbacks=[*([callback] if callback else []), *others],
        )

    if feature == "resume":
        with pytest.raises(BrokenError):
            trainer(Breaker()).train()
    found = trainer(*[transformers.EarlyStoppingCallback(1)] * (feature == "early stopping"))
    found.train(resume_from_checkpoint=str(folder / "checkpoint-3") if feature == "resume" else None)
    return found.model, found


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_with_a_penalty(feature: str, old: nn.Module, tmp_path: Path) -> None:
    importance = memsyn.measure(old, DataLoader(sentences(0), 8, collate_fn=padded), progress=False)
    memory = memsyn.Memory.empty().consolidate(old, importance)

    class Term(Trainer):
        """What people write without a callback."""

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
            found = super().compute_loss(model, inputs, return_outputs, **others)
            if return_outputs:  # in an evaluation
                return found
            return found + 0.5 * memsyn.penalty(model, memory) / self.args.gradient_accumulation_steps

    callback = MemsynCallback(memory, strength=0.5, form="gradient")
    mine, trainer = run(feature, old, tmp_path / "mine", callback)
    # Compiled by this backend, the model computes the same.
    twin, _ = run("plain" if feature == "torch_compile" else feature, old, tmp_path / "twin", None, Term)
    begun = dict(old.named_parameters())
    for name, expected in twin.named_parameters():
        if not name.endswith("key.bias"):  # softmax takes it away: its gradient is noise
            scale = float((expected - begun[name]).norm()) + 1e-6
            assert float((mine.get_parameter(name) - expected).norm()) / scale < (0.02 if feature == "bf16" else 1e-3)
    assert trainer.state.global_step == {"early stopping": 4, "accumulation": 2}.get(feature, 6)
    # What is measured: the weights that the training leaves, on each of the 24 samples that it read once.
    assert [entry.num_samples for entry in callback.memory.history] == [24, 16 if feature == "early stopping" else 24]
    for name, parameter in mine.named_parameters():
        assert torch.equal(callback.memory.anchor[name], parameter), name
    if feature != "early stopping":
        found = memsyn.measure(mine, DataLoader(sentences(1), 4, collate_fn=padded), progress=False)
        expected = memory.consolidate(mine, found).importance
        for name, value in callback.memory.importance.items():
            tolerance = 0.05 if feature == "bf16" else 1e-3
            assert float((value - expected[name]).norm()) <= tolerance * float(expected[name].norm()) + 1e-6, name


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_with_a_projection(feature: str, old: nn.Module, tmp_path: Path) -> None:
    memory = directions_of(old, DataLoader(sentences(0), 8, collate_fn=padded))
    callback = MemsynCallback(memory)
    mine, _ = run(feature, old, tmp_path / "mine", callback)
    free, _ = run(feature, old, tmp_path / "free", None)
    assert change(memory, mine, old) < 0.5 * change(memory, free, old)
    assert callback.protection is None
    assert [entry.num_samples for entry in callback.memory.history] == [24, 16 if feature == "early stopping" else 24]
