"""The trainer of sentence-transformers with the callback, measured by embeddings.

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
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CosineSimilarityLoss,
    MultipleNegativesRankingLoss,
    TripletLoss,
)
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import memsyn
from memsyn.integrations.sentence_transformers import embeddings
from memsyn.integrations.transformers import MemsynCallback
from tests.test_integrations import change

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers: many, and not ours

EMPTY = memsyn.Memory.empty()
WORDS = "the a cat dog sat ran far bird fish swims deep in sea red blue house tree small big runs".split()  # noqa: SIM905
OLD = [" ".join(WORDS[(3 * k + j * j) % 20] for j in range(2 + k % 5)) for k in range(12)]
NEW = [" ".join(WORDS[(7 * k + 3 * j) % 20] for j in range(3 + k % 4)) for k in range(12)]

LOSSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "pairs": (MultipleNegativesRankingLoss, {"anchor": NEW, "positive": NEW[::-1]}),
    "pairs with scores": (
        CosineSimilarityLoss,
        {"sentence1": NEW, "sentence2": NEW[::-1], "score": [k / 12 for k in range(12)]},
    ),
    "triplets": (TripletLoss, {"anchor": NEW, "positive": NEW[::-1], "negative": OLD}),
}


@pytest.fixture(autouse=True)
def _garbage() -> Iterator[None]:
    gc.freeze()  # each training collects garbage, and need not look through the libraries
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    folder = tmp_path_factory.mktemp("encoder")
    words = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=12,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16), Normalize()], device="cpu").eval()


def plain(model: nn.Module, texts: list[str]) -> Tensor:
    """The definition: pooled, not normalised, and without padding."""
    rows = []
    for text in texts:
        features = model.preprocess([text])
        for module in list(model.children())[:-1]:
            features = module(features)
        rows.append(features["sentence_embedding"])
    return torch.cat(rows)


def test_embeddings_of_a_padded_batch_are_those_of_each_text(start: SentenceTransformer) -> None:
    expected = plain(start, OLD)
    torch.testing.assert_close(embeddings(start, start.preprocess(OLD)), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected.norm(dim=1), torch.ones(12))
    columns = {"b": start.preprocess(OLD), "a": start.preprocess(NEW)}
    pairs = {f"{name}_{key}": value for name, column in columns.items() for key, value in column.items()}
    both = torch.cat([expected, plain(start, NEW)], 1)
    torch.testing.assert_close(embeddings(start, pairs), both, rtol=1e-4, atol=1e-5)
    found = memsyn.measure(
        start, [start.preprocess(OLD[:5]), start.preprocess(OLD[5:])], forward=embeddings, progress=False
    )
    alone = memsyn.measure(start, [start.preprocess([text]) for text in OLD], forward=embeddings, progress=False)
    assert found.num_samples == alone.num_samples == 12
    for name, value in found.sums.items():
        torch.testing.assert_close(value, alone.sums[name], rtol=1e-3, atol=1e-5)
    bare = SentenceTransformer(modules=list(start.children())[:-1], device="cpu").eval()
    torch.testing.assert_close(embeddings(bare, bare.preprocess(OLD)), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_without_inputs_is_an_error(start: SentenceTransformer) -> None:
    with pytest.raises(
        memsyn.BatchError, match=r"expected a batch of the SentenceTransformerTrainer.*keys anchor, label"
    ):
        embeddings(start, {"anchor": OLD, "label": 1})


def trained(
    start: SentenceTransformer, kind: str, folder: Path, callbacks: list[Any], **options: Any
) -> SentenceTransformer:
    model = copy.deepcopy(start)
    loss, columns = LOSSES[kind]
    given = {
        "output_dir": str(folder), "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 1, **options,
    }  # fmt: skip
    arguments = SentenceTransformerTrainingArguments(**given)
    SentenceTransformerTrainer(
        model, arguments, train_dataset=Dataset.from_dict(columns), loss=loss(model), callbacks=callbacks
    ).train()
    return model


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in LOSSES), ("pairs", {"bf16": True}), ("pairs", {"gradient_accumulation_steps": 2})],
)
def test_a_trainer_protects_and_measures_embeddings(
    kind: str, options: dict[str, Any], start: SentenceTransformer, tmp_path: Path
) -> None:
    found = memsyn.measure(start, [start.preprocess(OLD)], estimator="kronecker", forward=embeddings, progress=False)
    memory = EMPTY.consolidate(start, found)
    callback = MemsynCallback(memory, forward=embeddings, estimator="mas")
    mine = trained(start, kind, tmp_path, [callback], **options)
    free = trained(start, kind, tmp_path, [], **options)
    assert change(memory, mine, start) < 0.5 * change(memory, free, start)
    columns = [texts for name, texts in LOSSES[kind][1].items() if name != "score"]
    expected = [
        {f"{k}_{key}": value for k, text in enumerate(row) for key, value in mine.preprocess([text]).items()}
        for row in zip(*columns, strict=True)
    ]
    alone = memsyn.measure(mine, expected, forward=embeddings, progress=False)
    assert callback.memory.history[-1].num_samples == alone.num_samples == 12
    tolerance = 0.05 if "bf16" in options else 1e-3
    for name, value in alone.mean().items():
        assert float((callback.memory.importance[name] - value).norm()) <= tolerance * float(value.norm()) + 1e-7, name


def test_without_its_output_the_trainer_says_how(start: SentenceTransformer, tmp_path: Path) -> None:
    with pytest.raises(memsyn.BatchError, match=r"tried before training.*forward=lambda model, batch"):
        trained(start, "pairs", tmp_path, [MemsynCallback(EMPTY)])
