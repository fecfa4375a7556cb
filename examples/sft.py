"""Fine-tune a language model with TRL and keep what it knew: it counts in ones, and learns to count in threes.

Needs no network and no GPU. pip install 'memsyn[trl]'
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from memsyn import Memory
from memsyn.integrations.transformers import MemsynCallback

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()
WORDS = ["<pad>", "<eos>", "count", "jump", *NUMBERS]


def texts(word: str, step: int) -> list[str]:
    return [" ".join([word, *(NUMBERS[(first + step * k) % 16] for k in range(8))]) for first in range(16)]


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def tuned(weights: dict[str, Any], data: list[str], callbacks: list[Any]) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **sizes))
    model.load_state_dict(weights, strict=bool(weights))  # no copy.deepcopy: TRL's forward would run the copied model
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_steps=120, learning_rate=3e-3, per_device_train_batch_size=16, bf16=False, seed=0,
            report_to=[], save_strategy="no", logging_steps=120, disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        given = {"train_dataset": Dataset.from_dict({"text": data}), "processing_class": tokenizer()}
        trainer = SFTTrainer(model, args=arguments, callbacks=callbacks, **given)
        trainer.train()
    return trainer.model.eval()


def accuracy(model: Any, data: list[str]) -> float:
    tokens = torch.tensor(tokenizer()(data).input_ids)
    return float((model(tokens).logits[:, 1:-1].argmax(-1) == tokens[:, 2:]).float().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    old, new = texts("count", 1), texts("jump", 3)
    first = MemsynCallback(Memory.empty(), estimator="kronecker")  # measures when the training ends
    start = tuned({}, old, [first])
    for name, callbacks in {"fine-tuned": [], "with memsyn": [MemsynCallback(first.memory)]}.items():
        model = tuned(start.state_dict(), new, callbacks)
        print(f"{name}: old {accuracy(start, old):.0%} -> {accuracy(model, old):.0%}, new {accuracy(model, new):.0%}")
