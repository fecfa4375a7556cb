"""How to measure a model of sentence-transformers: by its embeddings. Needs `sentence-transformers`.

Owns how the columns of a trainer's batch are told apart. The callback is that of `transformers`, whose Trainer this
trainer extends.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor, nn

from memsyn import BatchError

INPUTS: Final = (
    "input_ids",
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "sentence_embedding",
)
"""The first input of each kind of model: text, images, videos, audio, and words without a network."""


def embeddings(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The embeddings of a batch, for `measure` and `MemsynCallback` as `forward=`.

    A row of the training set is one sample. All of its columns count: an anchor and a positive, say. Embeddings are
    taken before they are normalised, since the squared norm of a normalised one is 1, whatever the weights are.

    Args:
        model: a SentenceTransformer.
        batch: what `model.preprocess(texts)` returns, or a batch of the SentenceTransformerTrainer, whose keys begin
            with the names of the columns.

    Returns:
        (samples, columns * width)

    Raises:
        BatchError: the batch holds no input of a model.

    Example:
        >>> callback = MemsynCallback(memory, forward=embeddings)                                # doctest: +SKIP
        >>> SentenceTransformerTrainer(model, train_dataset=pairs, callbacks=[callback]).train()  # doctest: +SKIP
    """
    return torch.cat([_embedded(model, column) for column in _columns(batch)], 1)


def _columns(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of each column: {"anchor_input_ids": ..., "positive_input_ids": ...} holds those of two."""
    prefixes = dict.fromkeys(key.removesuffix(name) for key in batch for name in INPUTS if key.endswith(name))
    prefixes = {prefix: None for prefix in prefixes if not prefix or prefix.endswith("_")}
    if not prefixes:
        raise BatchError(
            f"expected a batch of the SentenceTransformerTrainer, or what model.preprocess(texts) returns; got the "
            f"keys {', '.join(map(str, batch)) or '(none)'}."
        )
    return [
        {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
        for prefix in prefixes
    ]


def _embedded(model: nn.Module, features: dict[str, Any]) -> Tensor:
    found: list[Tensor] = []
    last = list(model.children())[-1]
    # Read inside the pass, since the model's own `forward` may run in mixed precision.
    hooks = (
        [last.register_forward_pre_hook(lambda module, given: found.append(given[0]["sentence_embedding"]))]
        if isinstance(last, Normalize)
        else []
    )
    try:
        output = model(features)
    finally:
        for hook in hooks:
            hook.remove()
    embedding: Tensor = found[0] if found else output["sentence_embedding"]
    return embedding
