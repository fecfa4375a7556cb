"""TRL's SFTTrainer and DPOTrainer with the callback: every way to lay out a batch, and the reference model.

docs/trainers.md names these tests in its table.
"""

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import memsyn
from memsyn.integrations.transformers import MemsynCallback
from tests.test_integrations import change, directions_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers: many, and not ours

EMPTY = memsyn.Memory.empty()
TEXTS = ["the cat sat", "a dog ran far", "birds fly", "fish swim deep in the sea", "no", "owls see at night"] * 2

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "packed": {"packing": True},
    "packed, bf16": {"packing": True, "bf16": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "cut into blocks": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
}


@pytest.fixture(autouse=True)
def _garbage() -> Iterator[None]:
    gc.freeze()  # each training collects garbage, and need not look through the libraries
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter."""
    letters = {letter: k for k, letter in enumerate(["<pad>", "<eos>", "<unk>", *" abcdefghijklmnopqrstuvwxyz"])}
    made = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def start() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def memory(start: nn.Module) -> memsyn.Memory:
    generator = torch.Generator().manual_seed(1)
    return directions_of(start, [{"input_ids": torch.randint(3, 32, (8, 12), generator=generator)}])


def options(folder: Path, **given: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "num_train_epochs": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "bf16": False, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 1,
        "max_length": 64, **given,
    }  # fmt: skip


def tuned(
    start: nn.Module, tokenizer: Any, callbacks: list[Any], folder: Path, texts: Any = TEXTS, **given: Any
) -> nn.Module:
    """A copy of the model after supervised fine-tuning."""
    data = Dataset.from_dict(texts if isinstance(texts, dict) else {"text": texts})
    trainer = SFTTrainer(
        copy.deepcopy(start),
        args=SFTConfig(**options(folder, **given)),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer.model


def documents(tokenizer: Any) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.tensor([[*tokenizer(text).input_ids, 1]])} for text in TEXTS]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_protects_and_measures_each_document_by_itself(
    layout: str, start: nn.Module, memory: memsyn.Memory, tokenizer: Any, tmp_path: Path
) -> None:
    given = LAYOUTS[layout]
    callback = MemsynCallback(memory, estimator="mas")
    mine = tuned(start, tokenizer, [callback], tmp_path, **given)
    free = tuned(start, tokenizer, [], tmp_path, **given)
    assert change(memory, mine, start) < 0.5 * change(memory, free, start)
    joined = torch.cat([document["input_ids"][0] for document in documents(tokenizer)])
    if layout == "cut into blocks":  # a block of tokens is a sample, since it does not say where documents begin
        assert callback.memory.history[-1].num_samples == -(-len(joined) // 16)
        return
    found = memsyn.measure(mine, documents(tokenizer), progress=False)
    assert callback.memory.history[-1].num_samples == found.num_samples == len(TEXTS)
    tolerance = 0.05 if "bf16" in layout else 1e-3
    for name, expected in found.mean().items():
        assert float((callback.memory.importance[name] - expected).norm()) <= tolerance * float(expected.norm()), name


def test_sft_on_completions_equals_the_loss_term(start: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    memory = EMPTY.consolidate(start, memsyn.measure(start, documents(tokenizer), progress=False))
    texts = {"prompt": TEXTS, "completion": [text[::-1] for text in TEXTS]}

    class Term(SFTTrainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
            return super().compute_loss(model, inputs, **others) + 0.5 * memsyn.penalty(model, memory)

    callback = MemsynCallback(memory, strength=0.5, form="gradient", max_samples=0)
    given = {"max_grad_norm": 0.0}
    mine = tuned(start, tokenizer, [callback], tmp_path, texts, **given)
    twin = Term(
        copy.deepcopy(start),
        args=SFTConfig(**options(tmp_path, **given)),
        train_dataset=Dataset.from_dict(texts),
        processing_class=tokenizer,
    )
    twin.train()
    for name, expected in twin.model.named_parameters():
        moved = float((expected - start.get_parameter(name)).norm())
        assert float((mine.get_parameter(name) - expected).norm()) < 1e-3 * moved, name


PREFERENCES: dict[str, dict[str, Any]] = {
    "given": {},
    "loaded": {},  # by the name of the model
    "bf16": {"bf16": True},
    "precomputed": {"precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("kind", PREFERENCES)
def test_dpo_protects_the_policy_and_leaves_the_reference_model_alone(
    kind: str, start: nn.Module, memory: memsyn.Memory, tokenizer: Any, tmp_path: Path
) -> None:
    data = Dataset.from_dict({"prompt": TEXTS, "chosen": TEXTS[::-1], "rejected": [text[::-1] for text in TEXTS]})
    start.save_pretrained(tmp_path / "model")
    begun = {name: value.clone() for name, value in start.state_dict().items()}

    def trained(callbacks: list[Any]) -> DPOTrainer:
        policy = LlamaForCausalLM.from_pretrained(tmp_path / "model") if kind == "loaded" else copy.deepcopy(start)
        trainer = DPOTrainer(
            policy,
            ref_model=None if kind == "loaded" else copy.deepcopy(start),
            args=DPOConfig(**options(tmp_path, **PREFERENCES[kind])),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        reference = trainer.ref_model
        trainer.train()
        assert isinstance(reference, nn.Module)
        torch.testing.assert_close(reference.state_dict(), begun, rtol=0, atol=0)
        assert all(parameter.grad is None for parameter in reference.parameters())
        return trainer

    callback = MemsynCallback(memory)
    mine, free = trained([callback]).model, trained([]).model
    assert change(memory, free, start) > 0
    assert change(memory, mine, start) < 0.5 * change(memory, free, start)
    # The chosen and the rejected answer to each prompt are samples of their own.
    assert callback.memory.history[-1].num_samples == 2 * len(TEXTS)
    assert callback.memory.directions_quantity == memory.directions_quantity
