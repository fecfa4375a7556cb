"""LoRA in Hugging Face's Trainer and in TRL with the callback: the weights in effect are held, measured and logged.

docs/trainers.md names these tests in its tables.
"""

import copy
import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import use_adapter

import memsyn
from memsyn.integrations.transformers import MemsynCallback
from tests import test_trainers_trl as trl_tests
from tests.test_integrations import bert, change, directions_of, padded, sentences
from tests.test_trainers_transformers import FEATURES, run

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers: many, and not ours

EMPTY = memsyn.Memory.empty()
CHANGE = "memsyn/predicted_change"
memory, start, tokenizer = trl_tests.memory, trl_tests.start, trl_tests.tokenizer


def lora(model: nn.Module) -> Any:
    """A copy of the model of sentences with adapters, the same ones each time. Its head trains as a copy."""
    torch.manual_seed(2)
    targets = ["query", "value", "dense"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=["classifier"])
    return peft.get_peft_model(copy.deepcopy(model), config)


def layers(model: nn.Module) -> dict[str, Any]:
    """The weight's name in the base model -> the layer of PEFT."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {f"{name.removeprefix('base_model.model.')}.weight": layer for name, layer in found.items()}


def in_effect(model: Any) -> dict[str, Tensor]:
    """The weights in effect by PEFT's own formula, by the names of the base model; differentiable."""
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", ""): p
        for name, p in model.named_parameters()
        if "lora_" not in name and "original_module" not in name
    }
    changes = {name: layer.get_delta_weight("default") for name, layer in layers(model).items()}
    return found | {name: layer.base_layer.weight + changes[name] for name, layer in layers(model).items()}


def plain(model: Any, base: nn.Module) -> nn.Module:
    """The base model with the weights in effect."""
    merged = copy.deepcopy(base)
    merged.load_state_dict({name: value.detach() for name, value in in_effect(model).items()}, strict=False)
    return merged


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / (expected.norm() + 1e-6))


@pytest.fixture(scope="module")
def old() -> nn.Module:
    return bert()


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    gc.freeze()  # each training collects garbage, and need not look through the libraries
    with mock.patch.dict(os.environ):  # torch_compile writes to it
        yield
    gc.unfreeze()


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_with_a_penalty(feature: str, old: nn.Module, tmp_path: Path) -> None:
    importance = memsyn.measure(old, DataLoader(sentences(0), 8, collate_fn=padded), progress=False)
    memory = EMPTY.consolidate(old, importance)

    class Term(Trainer):
        """sum Omega (W + s B A - W*)^2, written out."""

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
            found = super().compute_loss(model, inputs, return_outputs, **others)
            if return_outputs:  # in an evaluation
                return found
            weights = in_effect(model)
            terms = [(memory.importance[n] * (weights[n] - memory.anchor[n]).square()).sum() for n in memory.names]
            return found + 0.5 * sum(terms) / self.args.gradient_accumulation_steps

    callback = MemsynCallback(memory, strength=0.5, form="gradient")
    begun = dict(lora(old).named_parameters())
    mine, trainer = run(feature, lora(old), tmp_path / "mine", callback)
    # Compiled by this backend, the model computes the same.
    twin, _ = run("plain" if feature == "torch_compile" else feature, lora(old), tmp_path / "twin", None, Term)
    for name, expected in twin.named_parameters():
        moved = expected - begun[name]
        assert bool(moved.any()) == expected.requires_grad, name
        error = mine.get_parameter(name) - expected
        assert float(error.norm()) <= (0.02 if feature == "bf16" else 1e-3) * float(moved.norm()), name
    assert trainer.state.global_step == {"early stopping": 4, "accumulation": 2}.get(feature, 6)
    # What is measured: the weights in effect that the training leaves, under the names of the base model.
    assert [entry.num_samples for entry in callback.memory.history] == [24, 16 if feature == "early stopping" else 24]
    assert callback.memory.names == memory.names == dict(old.named_parameters()).keys()
    merged = plain(mine, old)
    for name, parameter in merged.named_parameters():
        assert torch.allclose(callback.memory.anchor[name], parameter, rtol=1e-6, atol=1e-7), name
    if feature != "early stopping":
        found = memsyn.measure(merged, DataLoader(sentences(1), 4, collate_fn=padded), progress=False)
        for name, expected in memory.consolidate(merged, found).importance.items():
            assert relative(callback.memory.importance[name], expected) <= (0.05 if feature == "bf16" else 1e-3), name


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_with_a_projection(feature: str, old: nn.Module, tmp_path: Path) -> None:
    memory = directions_of(old, DataLoader(sentences(0), 8, collate_fn=padded))
    callback = MemsynCallback(memory, protect_options={"reference": old.state_dict()})
    mine, trainer = run(feature, lora(old), tmp_path / "mine", callback)
    free, _ = run(feature, lora(old), tmp_path / "free", None)
    assert change(memory, plain(mine, old), old) < 0.5 * change(memory, plain(free, old), old)
    assert callback.memory.names == memory.names
    assert [entry.num_samples for entry in callback.memory.history] == [24, 16 if feature == "early stopping" else 24]
    logged = [entry[CHANGE] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) > 0 < min(logged)


# TRL

CONFIG = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])


def fine_tuned(kind: Any, options: Any, model: nn.Module, data: Any, tokenizer: Any, callbacks: list[Any]) -> Any:
    """A trainer of TRL that has trained adapters. Around a model without any, TRL puts them itself."""
    trainer = kind(
        model,
        args=options,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        peft_config=None if isinstance(model, peft.PeftModel) else CONFIG,
        callbacks=callbacks,
    )
    trainer.train()
    assert isinstance(trainer.model, peft.PeftModel)
    return trainer


def assert_changes_are_logged(trainer: Any, memory: memsyn.Memory, kept: nn.Module, start: nn.Module) -> None:
    """While adapters move, and the last one is that of the weights in effect."""
    logged = [entry[CHANGE] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) > 1
    assert min(logged) > 0
    scale = memory.directions.squared_outputs
    assert logged[-1] == pytest.approx((change(memory, kept, start) / scale) ** 0.5, rel=0.1)  # steps wait


@pytest.mark.parametrize("estimator", ["mas", "kronecker"])
@pytest.mark.parametrize("layout", ["padded", "bf16", "accumulation", "packed", "packed, bf16", "padding-free"])
def test_sft_puts_adapters_around_the_model_itself(
    layout: str, estimator: str, start: nn.Module, memory: memsyn.Memory, tokenizer: Any, tmp_path: Path
) -> None:
    documents = trl_tests.documents(tokenizer)
    if estimator == "mas":
        memory = EMPTY.consolidate(start, memsyn.measure(start, documents, progress=False))

    def trained(*callbacks: Any) -> Any:
        options = SFTConfig(**trl_tests.options(tmp_path, logging_steps=2, **trl_tests.LAYOUTS[layout]))
        data = {"text": trl_tests.TEXTS}
        return fine_tuned(SFTTrainer, options, copy.deepcopy(start), data, tokenizer, [*callbacks])

    callback = MemsynCallback(memory, strength=1.0 if estimator == "mas" else None)
    mine, free = trained(callback), trained()
    kept, lost = plain(mine.model, start), plain(free.model, start)
    if estimator == "kronecker":
        assert change(memory, kept, start) < 0.5 * change(memory, lost, start)
        assert_changes_are_logged(mine, memory, kept, start)
    else:
        assert 0 < float(memsyn.penalty(kept, memory)) < 0.5 * float(memsyn.penalty(lost, memory))
    # What is measured: the weights in effect, on each document by itself, under the names of the base model.
    assert callback.memory.names == memory.names
    assert callback.memory.history[-1].num_samples == len(trl_tests.TEXTS)
    expected = memory.consolidate(kept, memsyn.measure(kept, documents, estimator=estimator, progress=False))
    tolerance = 0.05 if "bf16" in layout else 1e-3
    assert bool(expected.importance) == (estimator == "mas")
    for name, value in expected.importance.items():
        assert relative(callback.memory.importance[name], value) <= tolerance, name
    if estimator == "kronecker":
        # Factors are estimates: their random signs go by the order of the samples, which the Trainer shuffles.
        assert change(callback.memory, lost, kept) == pytest.approx(change(expected, lost, kept), rel=0.1)


PREFERENCES: dict[str, dict[str, Any]] = {
    "adapters off": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "bf16": {"bf16": True},
    "copy of adapters": {},  # of a model with adapters that were trained before
}


class References(transformers.TrainerCallback):
    """The outputs of the reference after each step."""

    def __init__(self, name: str | None) -> None:
        self.name, self.found = name, list[Tensor]()

    def on_step_end(self, *given: Any, **others: Any) -> None:
        with use_adapter(others["model"], self.name), torch.no_grad():
            self.found.append(others["model"](TOKENS).logits)


TOKENS = torch.arange(3, 15)[None]


@pytest.mark.parametrize("kind", PREFERENCES)
def test_dpo_protects_the_adapters_and_leaves_the_reference_alone(
    kind: str, start: nn.Module, tokenizer: Any, tmp_path: Path
) -> None:
    texts = trl_tests.TEXTS
    data = {"prompt": texts, "chosen": texts[::-1], "rejected": [text[::-1] for text in texts]}
    policy = copy.deepcopy(start)
    if kind == "copy of adapters":
        torch.manual_seed(3)
        policy = peft.get_peft_model(policy, CONFIG)
        for layer in layers(policy).values():
            nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    policy.eval()
    begun = plain(policy, start) if kind == "copy of adapters" else start
    generator = torch.Generator().manual_seed(1)
    memory = directions_of(begun, [{"input_ids": torch.randint(3, 32, (8, 12), generator=generator)}])
    outputs = policy(TOKENS).logits

    def trained(*callbacks: Any) -> Any:
        options = DPOConfig(**trl_tests.options(tmp_path, logging_steps=2, **PREFERENCES[kind]))
        watcher = References("ref" if kind == "copy of adapters" else None)
        trainer = fine_tuned(DPOTrainer, options, copy.deepcopy(policy), data, tokenizer, [*callbacks, watcher])
        assert trainer.ref_model is None
        assert len(watcher.found) == 18
        assert all(torch.equal(found, watcher.found[0]) for found in watcher.found)
        assert kind == "bf16" or torch.equal(watcher.found[0], outputs)
        frozen = {name: p for name, p in trainer.model.get_base_model().named_parameters() if "lora_" not in name}
        own = dict(start.named_parameters())
        assert all(torch.equal(p, own[name.replace(".base_layer", "")]) for name, p in frozen.items())
        return trainer

    callback = MemsynCallback(memory, protect_options={"reference": begun.state_dict()})
    mine, free = trained(callback), trained()
    kept, lost = plain(mine.model, start), plain(free.model, start)
    assert change(memory, kept, begun) < 0.5 * change(memory, lost, begun)
    assert_changes_are_logged(mine, memory, kept, begun)
    # The chosen and the rejected answer to each prompt are samples of their own.
    assert callback.memory.history[-1].num_samples == 2 * len(texts)
    assert callback.memory.names == memory.names


# Stopping and resuming


def test_a_training_of_adapters_stops_once_it_has_forgotten_too_much(old: nn.Module, tmp_path: Path) -> None:
    memory = directions_of(old, DataLoader(sentences(0), 8, collate_fn=padded))
    logged = {}
    for bound in (1e9, None):
        bound = bound or (logged[2] + logged[4]) / 2
        callback = MemsynCallback(memory, max_change=bound, max_samples=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", memsyn.ForgettingWarning)
            _, trainer = run("plain", lora(old), tmp_path, callback)
        logged = {entry["step"]: entry[CHANGE] for entry in trainer.state.log_history if "loss" in entry}
    assert trainer.state.global_step == 4
    assert logged[4] > bound > logged[2] > 0
    assert [str(warning.message) for warning in caught if "training stops after step 4" in str(warning.message)]


@pytest.mark.parametrize("form", ["proximal", "projected"])
def test_a_training_of_adapters_goes_on_from_a_checkpoint(form: str, old: nn.Module, tmp_path: Path) -> None:
    estimator = "mas" if form == "proximal" else "kronecker"
    memory = directions_of(old, DataLoader(sentences(0), 8, collate_fn=padded), estimator)

    def trained(feature: str) -> nn.Module:
        callback = MemsynCallback(memory, form=form, strength=1.0 if form == "proximal" else 10.0, max_samples=0)
        return run(feature, lora(old), tmp_path / feature, callback)[0]

    with mock.patch.dict(FEATURES, whole=FEATURES["resume"]):
        whole = trained("whole")
    resumed = trained("resume")
    for name, expected in whole.named_parameters():
        assert torch.allclose(resumed.get_parameter(name), expected, rtol=1e-4, atol=1e-6), name
