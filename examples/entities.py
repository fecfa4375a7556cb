"""Teach a tagger of named entities a new kind of text with Hugging Face's Trainer, and keep the old kind.

Persons and places in news first, firms and places in orders then. pip install 'memsyn[transformers]'
"""

import copy
import random
import tempfile
from typing import Any

import torch
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments

from memsyn import Memory
from memsyn.integrations.transformers import MemsynCallback

TAGS = {  # the tag of each name by the kind of text: 1 person, 2 place, 3 firm, and 0 for all other words
    "news": {"Ada": 1, "Ben": 1, "Cleo": 1, "Dan": 1, "Rome": 2, "Oslo": 2, "Lima": 2, "Bonn": 2},
    "orders": {"Acme": 3, "Bolt": 3, "Cargo": 3, "Delta": 3, "Kiel": 2, "Nice": 2, "Pisa": 2, "Vigo": 2},
}
OTHERS = "met left in two to from near owes sends the a new old by for with".split()
WORDS = [*TAGS["news"], *TAGS["orders"], *OTHERS]


def sentences(kind: str, seed: int) -> list[dict[str, Any]]:
    draw, rows = random.Random(seed), []
    for _ in range(128):
        words = [draw.choice(list(TAGS[kind]) if draw.random() < 0.4 else OTHERS) for _ in range(9)]
        rows.append({"input_ids": [WORDS.index(w) for w in words], "labels": [TAGS[kind].get(w, 0) for w in words]})
    return rows


def trained(model: Any, kind: str, callbacks: list[Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=150, learning_rate=3e-3, per_device_train_batch_size=32, seed=0, use_cpu=True,
            report_to=[], save_strategy="no", logging_steps=150, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=sentences(kind, 0), callbacks=callbacks)
        trainer.train()
    return trainer.model.eval()


def recall(model: Any, kind: str) -> str:  # of the names, how many get their tag
    rows = sentences(kind, 1)
    tokens, tags = (torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels"))
    right = model(tokens).logits.argmax(-1) == tags
    return f"{float(right[tags > 0].float().mean()):.0%}"


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, num_labels=4, **sizes)
    first = MemsynCallback(Memory.empty(), estimator="kronecker")  # measures when the training ends
    start = trained(BertForTokenClassification(config), "news", [first])
    for name, callbacks in {"fine-tuned": [], "with memsyn": [MemsynCallback(first.memory)]}.items():
        model = trained(start, "orders", callbacks)
        print(f"{name}: old {recall(start, 'news')} -> {recall(model, 'news')}, new {recall(model, 'orders')}")
