"""Exactness on models that other people wrote, measured as a user would: with the model and a batch, and no more."""

import importlib
import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsyn
from memsyn.batches import take
from memsyn.engine.routes import BY_SAMPLE
from tests import reference
from tests.zoo import ZOO, Specimen

KEY_BIASES = frozenset({"*.key.bias", "*.k_proj.bias"})
"""A softmax takes no notice of them: their gradients are zero in exact arithmetic, where no rotation is in between."""


def need(package: str) -> None:
    """Skip where the package is missing; in CI, fail."""
    if os.environ.get("CI"):
        importlib.import_module(package)
    else:
        pytest.importorskip(package, reason=f"{package} is missing: make install brings it")


def build(specimen: Specimen, attention: str | None) -> tuple[nn.Module, Any]:
    for package in specimen.packages:
        need(package)
    torch.manual_seed(0)
    return specimen.model(attention).to(specimen.dtype), specimen.batch()


def num_samples(batch: Tensor | Mapping[str, Tensor]) -> int:
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def truth(specimen: Specimen, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    def run(model: nn.Module, batch: Any, k: int) -> Tensor:
        if isinstance(batch, Tensor):
            return specimen.counted(model(batch[k : k + 1]), batch)
        sample = {key: value[k : k + 1] for key, value in batch.items()}  # padded as it is among the others
        output = model(**sample) if specimen.forward is None else specimen.forward(model, sample)
        return specimen.counted(output, sample)

    return reference.importance(model, batch, num_samples(batch), run)


def matching(names: Iterable[str], patterns: frozenset[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


@pytest.mark.filterwarnings("default::memsyn.SlowParametersWarning")
@pytest.mark.parametrize(
    ("name", "attention"), [(name, attention) for name, specimen in ZOO.items() for attention in specimen.attentions]
)
def test_measure_equals_the_batch_of_one_reference(name: str, attention: str | None) -> None:
    specimen = ZOO[name]
    model, batch = build(specimen, attention)
    expected = truth(specimen, model, batch)
    largest = max(float(value.norm()) for value in expected.values())
    idle = {name for name, value in expected.items() if float(value.norm()) <= 1e-9 * largest}
    assert idle == matching(idle, specimen.idle | KEY_BIASES)
    importance = memsyn.measure(model, [batch], forward=specimen.forward, progress=False)
    found = reference.errors(importance.mean(), expected)
    assert importance.num_samples == num_samples(batch)
    assert {name: error for name, error in found.items() if not error <= specimen.error} == {}
    slow = {name for name, route in importance.routes.items() if route == BY_SAMPLE}
    assert slow == matching(slow, specimen.slow)


PLACES = frozenset({"*position_embedding*.weight", "*wpe.weight", "*embed_positions.weight", "*position_embeddings"})
"""Tables of positions: the batch does not choose the rows, so that they are no inputs of samples."""

NO_MATRICES = {
    "BERT": PLACES,
    "ALBERT": PLACES,
    "CLIP": PLACES,
    "GPT-2": PLACES,
    "BART": frozenset({"*.decoder.embed_positions.weight"}),
    "Whisper": PLACES,
    "ViT": PLACES | {"*cls_token"},
    "T5": frozenset({"*relative_attention_bias.weight"}),
    "Swin": frozenset({"*relative_position_bias_table"}),
    "wav2vec2": frozenset({"*parametrizations.weight.original?"}),
    # One parameter holds the matrices of all experts.
    "Mixtral": frozenset({"*.experts.*_proj"}),
    "Qwen2-MoE": frozenset({"*.experts.*_proj"}),
    # The weight is the left operand of a batched product.
    "Mamba": frozenset({"*.dt_proj.weight", "*.A_log"}),
}
"""Patterns of the parameters of two dimensions or more that are no matrices, by model."""


LARGE = frozenset({"EfficientNet-Lite0, trained", "MiniLM, trained"})
"""They take half of the time of all, and have no operation that the others lack."""


@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
@pytest.mark.parametrize("name", [name for name in ZOO if name not in LARGE])
def test_factors_do_not_depend_on_the_batch_size(name: str) -> None:
    specimen = ZOO[name]
    model, batch = build(specimen, specimen.attentions[0])

    def measured(*batches: Any) -> Any:
        return memsyn.measure(model, batches, forward=specimen.forward, estimator="kronecker", progress=False)

    whole = measured(batch)
    single = measured(*(take(batch, k, k + 1) for k in range(num_samples(batch))))
    taken = {matrix.weight for matrix in whole.matrices.values()}
    weights = {n for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
    patterns = NO_MATRICES.get(name.partition(",")[0], frozenset())
    assert weights - taken == matching(weights, patterns)
    assert all(matching(weights, frozenset({pattern})) for pattern in patterns - PLACES)
    assert single.num_samples == whole.num_samples == num_samples(batch)
    assert single.sums.keys() == whole.sums.keys()
    # Rounding counts by the largest sum of its kind, as where a gradient is zero in exact arithmetic.
    largest: dict[str, float] = {}
    for key, total in whole.sums.items():
        side = key.partition("/")[0]
        largest[side] = max(largest.get(side, 0.0), float(total.abs().max()))
    error = {
        key: float((single.sums[key] - total).abs().max()) / largest[key.partition("/")[0]]
        for key, total in whole.sums.items()
    }
    assert {key: own for key, own in error.items() if not own <= 1e-5} == {}
