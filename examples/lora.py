"""Teach a language model by LoRA with Hugging Face's Trainer, and keep what the base model knew.

It counts in ones, and learns to count in threes. Needs no network and no GPU. pip install 'memsyn[transformers]' peft
"""

import copy
import tempfile
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from memsyn import Memory
from memsyn.integrations.transformers import MemsynCallback

COUNT, JUMP = 16, 17  # the first token of a text says how it goes on; tokens 0 to 15 are the numbers


def texts(first: int, step: int) -> list[dict[str, Any]]:
    rows = [[first, *((start + step * k) % 16 for k in range(8))] for start in range(16)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trained(model: Any, data: list[dict[str, Any]], callbacks: list[Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=150, learning_rate=3e-3, per_device_train_batch_size=16, seed=0, use_cpu=True,
            report_to=[], save_strategy="no", logging_steps=150, disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    return model.eval()


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def accuracy(model: Any, data: list[dict[str, Any]]) -> float:
    tokens = torch.tensor([row["input_ids"] for row in data])
    return float((model(tokens).logits[:, 1:-1].argmax(-1) == tokens[:, 2:]).float().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    old, new = texts(COUNT, 1), texts(JUMP, 3)
    first = MemsynCallback(Memory.empty(), estimator="kronecker")  # measures when the training ends
    base = trained(LlamaForCausalLM(LlamaConfig(vocab_size=18, **sizes)), old, [first])
    for name, callbacks in {"fine-tuned": [], "with memsyn": [MemsynCallback(first.memory)]}.items():
        model = trained(adapted(base), new, callbacks)
        print(f"{name}: old {accuracy(base, old):.0%} -> {accuracy(model, old):.0%}, new {accuracy(model, new):.0%}")
