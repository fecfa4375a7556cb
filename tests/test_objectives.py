"""Estimators against their definitions, one sample at a time; which output counts; padding."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import memsyn
from memsyn.measuring.objectives import ESTIMATORS, SampleInfo, signed_outputs
from tests.cases import CASES, Lambda, integers, normal
from tests.reference import errors, signs

NUM_SAMPLES = 6
Scalars = Callable[[Tensor, int], list[tuple[float, Tensor]]]
"""(logits of one sample, its number) -> (weight, scalar) pairs."""


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


BATCH = normal(4)(NUM_SAMPLES, torch.float64)
LABELS = integers(3)(NUM_SAMPLES, torch.float64)


def truth(model: nn.Module, scalars: Scalars, power: int) -> dict[str, Tensor]:
    """1/N sum_k sum_r weight_kr |d scalar_kr|^power."""
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for k in range(NUM_SAMPLES):
        for weight, scalar in scalars(model(BATCH[k : k + 1])[0], k):
            grads = torch.autograd.grad(scalar, list(parameters.values()), retain_graph=True)
            for name, grad in zip(parameters, grads, strict=True):
                totals[name] += weight * grad.abs() ** power / NUM_SAMPLES
    return totals


def drawn(logits: Tensor, k: int) -> int:
    return int(torch.multinomial(logits.detach().softmax(0), 1, generator=torch.Generator().manual_seed(k)))


DEFINITIONS: dict[str, tuple[Scalars, int]] = {
    "mas": (lambda y, k: [(1.0, (y**2).sum())], 1),
    "mas-probabilities": (lambda y, k: [(1.0, (y.softmax(0) ** 2).sum())], 1),
    "mas-vector": (lambda y, k: [(1.0, part) for part in y], 1),
    "fisher": (
        lambda y, k: [(float(p.detach()), log) for p, log in zip(y.softmax(0), y.log_softmax(0), strict=True)],
        2,
    ),
    "fisher-sampled": (lambda y, k: [(1.0, y.log_softmax(0)[drawn(y, k)])], 2),
    "fisher-empirical": (lambda y, k: [(1.0, y.log_softmax(0)[LABELS[k]])], 2),
}


def test_every_estimator_has_a_definition() -> None:
    assert DEFINITIONS.keys() == ESTIMATORS.keys() - {
        "mas-local",
        "kronecker",
        "inputs",
    }  # see test_local_importance.py, test_factors.py


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("sizes", [[6], [1, 3, 2]])
def test_an_estimator_is_its_definition_however_the_data_are_split(name: str, sizes: list[int]) -> None:
    model = network()
    batches = list(zip(BATCH.split(sizes), LABELS.split(sizes), strict=True))
    found = memsyn.measure(model, batches, estimator=name, progress=False)
    assert max(errors(found.mean(), truth(model, *DEFINITIONS[name])).values()) <= 1e-9
    assert found.quantity == (ESTIMATORS[name].name, ESTIMATORS[name].magnitude)


def test_several_backward_passes_through_every_route() -> None:
    model = Lambda(
        lambda m, x: m.b(torch.tanh(m.a(x) * m.scale)) @ (m.mix + 1),
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 3),
        scale=nn.Parameter(torch.randn(5)),
        mix=nn.Parameter(torch.randn(3, 3)),
    ).double()
    found = memsyn.measure(model, [(BATCH, LABELS)], estimator="fisher", progress=False)
    assert max(errors(found.mean(), truth(model, *DEFINITIONS["fisher"])).values()) <= 1e-9
    assert set(found.routes.values()) == {"rule", "operation"}


@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
def test_several_backward_passes_one_sample_at_a_time() -> None:
    case = CASES["out of sight"]
    model = case.model().double()
    batch = case.batch(5, torch.float64)[:, 0]
    found = memsyn.measure(model, [batch], estimator="mas-vector", progress=False)
    parts = [
        memsyn.measure(
            model, [batch], forward=lambda m, x, c=c: m(x)[:, c], progress=False, estimator=memsyn.Estimator(each)
        )
        for c in range(2)
    ]
    expected = {name: parts[0].sums[name] + parts[1].sums[name] for name in found.sums}
    assert max(errors(found.sums, expected).values()) <= 1e-9


def each(output: Tensor, info: SampleInfo) -> Tensor:
    return output.sum(1)


def test_a_custom_estimator_is_named_after_its_objective() -> None:
    model = network()
    found = memsyn.measure(model, [BATCH], estimator=memsyn.Estimator(each, "square"), progress=False)
    assert found.quantity == ("each", "square")
    assert max(errors(found.mean(), truth(model, lambda y, k: [(1.0, y.sum())], 2)).values()) <= 1e-9
    with pytest.raises(memsyn.MismatchError, match="different quantities"):
        found + memsyn.measure(model, [BATCH], progress=False)


def test_labels_come_from_mappings_too() -> None:
    model = network()
    named = Lambda(lambda m, x: m.net(x), net=model)
    given = [{"x": BATCH, "labels": LABELS}]
    found = memsyn.measure(named, given, estimator="fisher-empirical", progress=False)
    expected = truth(model, *DEFINITIONS["fisher-empirical"])
    assert max(errors({n.removeprefix("net."): v for n, v in found.mean().items()}, expected).values()) <= 1e-9


WRONG: dict[str, tuple[dict[str, Any], Any, type[Exception], str]] = {
    "unknown": ({"estimator": "fischer"}, [BATCH], memsyn.OptionError, "must be one of mas, .*got 'fischer'"),
    "no labels": (
        {"estimator": "fisher-empirical"},
        [BATCH],
        memsyn.BatchError,
        "one class number per sample.*Got none",
    ),
    "soft labels": (
        {"estimator": "fisher-empirical"},
        [(BATCH, torch.rand(6, 3))],
        memsyn.BatchError,
        r"Got torch.float32 of shape \(2, 3\)",
    ),
    "no classes": (
        {"estimator": "fisher", "forward": lambda m, x: m(x).unsqueeze(1)},
        [BATCH],
        memsyn.OutputError,
        r"logits of shape \(samples, classes\).*got \(2, 1, 3\)",
    ),
    "one scalar for all": (
        {"estimator": memsyn.Estimator(lambda output, place: output.sum())},
        [BATCH],
        memsyn.OutputError,
        r"one scalar per sample.*its shape is \(\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_estimators_get_an_error_that_says_what_to_do(name: str) -> None:
    options, batches, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        memsyn.measure(network(), batches, progress=False, **options)


def test_magnitudes_are_two() -> None:
    with pytest.raises(memsyn.OptionError, match="must be one of abs, square; got 'cube'"):
        memsyn.Estimator(each, "cube")


@pytest.mark.parametrize("estimator", ["mas", "fisher"])
def test_batched_is_what_other_libraries_compute(estimator: str) -> None:
    model = network()
    found = memsyn.measure(model, BATCH.split([4, 2]), estimator=estimator, batched=True, progress=False)
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    scalars, power = DEFINITIONS[estimator]
    for part in BATCH.split([4, 2]):
        columns: dict[int, Tensor] = {}
        for y in model(part):
            for r, (weight, scalar) in enumerate(scalars(y, 0)):
                columns[r] = columns.get(r, 0.0) + weight**0.5 * scalar / len(part)
        for column in columns.values():
            grads = torch.autograd.grad(column, list(model.parameters()), retain_graph=True)
            for name, grad in zip(totals, grads, strict=True):
                totals[name] += len(part) * grad.abs() ** power
    assert max(errors(found.sums, totals).values()) <= 1e-9
    assert (found.num_samples, found.magnitude) == (6, f"{ESTIMATORS[estimator].magnitude} of the batch mean")
    exact = memsyn.measure(model, BATCH.split([4, 2]), estimator=estimator, progress=False)
    assert all(bool((found.sums[name] <= exact.sums[name] + 1e-12).all()) for name in exact.sums)
    with pytest.raises(memsyn.MismatchError, match="of the batch mean"):
        exact + found
    single = memsyn.measure(model, BATCH.split(1), estimator=estimator, batched=True, progress=False)
    assert max(errors(single.sums, exact.sums).values()) <= 1e-9


# Padding


class Reader(nn.Module):
    """Tokens that look at each other, but not at padding."""

    def __init__(self, key: str = "") -> None:
        super().__init__()
        self.table, self.head, self.key = nn.Embedding(9, 6), nn.Linear(6, 4), key

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Tensor) -> Any:
        x = self.table(input_ids)
        scores = x @ x.transpose(1, 2)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
        output = self.head(scores.softmax(-1) @ x)
        return {self.key: output, "hidden": x} if self.key else output


def sentence(length: int) -> dict[str, Tensor]:
    ids = torch.zeros(2, length, dtype=torch.int64)
    ids[:, :3] = torch.tensor([[4, 7, 2], [1, 1, 3]])
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < 3).long().expand(2, -1).contiguous()}


@pytest.mark.parametrize("key", ["", "logits", "last_hidden_state"])
def test_a_sentence_weighs_the_same_however_it_is_padded(key: str) -> None:
    torch.manual_seed(0)
    model = Reader(key).double()
    plain = memsyn.measure(model, [{"input_ids": sentence(3)["input_ids"]}], progress=False)
    for length in (3, 6, 12):
        found = memsyn.measure(model, [sentence(length)], progress=False)
        assert max(errors(found.mean(), plain.mean()).values()) <= 1e-9
    counted = memsyn.measure(model, [sentence(12)], forward=lambda m, b: output_of(m(**b)), progress=False)
    assert counted.mean()["head.bias"].sum() > 1.5 * plain.mean()["head.bias"].sum()


def output_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values()))


def test_with_a_decoder_its_own_mask_counts() -> None:
    torch.manual_seed(0)
    model = Reader().double()
    ids, mask = sentence(6).values()
    whole = memsyn.measure(model, [{"input_ids": ids}], progress=False)
    batch = {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(mask)}
    assert max(errors(memsyn.measure(model, [batch], progress=False).mean(), whole.mean()).values()) <= 1e-9
    batch["decoder_attention_mask"] = mask
    assert memsyn.measure(model, [batch], progress=False).mean()["head.bias"].sum() < whole.mean()["head.bias"].sum()


def test_a_padded_output_that_is_not_finite_does_not_matter() -> None:
    model = Lambda(
        lambda m, x, attention_mask: m.a(x).masked_fill(attention_mask[..., None] == 0, torch.inf), a=nn.Linear(4, 2)
    )
    x, mask = normal(3, 4)(5, torch.float32), torch.tensor([[1, 1, 0]]).expand(5, -1).contiguous()
    found = memsyn.measure(model, [{"x": x, "attention_mask": mask}], progress=False)
    expected = memsyn.measure(model.a, [x[:, :2]], progress=False)
    assert torch.allclose(found.sums["a.weight"], expected.sums["weight"], rtol=1e-5)


@pytest.mark.parametrize(
    ("output", "chosen"),
    [
        ({"loss": 0, "logits": 1, "hidden": 2}, 1),
        ({"last_hidden_state": 1, "pooler_output": 2}, 1),
        ({"image_embeds": 1, "last_hidden_state": 2}, 1),
        ({"image_embeds": 1, "text_embeds": 2, "last_hidden_state": 3}, None),
        ({"left": 1, "right": 2}, None),
        ((1,), 1),
    ],
)
def test_which_output_counts(output: Any, chosen: int | None) -> None:
    def tensors(x: Tensor) -> Any:
        if isinstance(output, tuple):
            return tuple(x * part for part in output)
        return {key: x * part for key, part in output.items()}

    model = Lambda(lambda m, x: tensors(m.a(x)), a=nn.Linear(4, 3).double())
    if chosen is None:
        with pytest.raises(memsyn.OutputError, match=r"a mapping with keys .*Say which tensor counts"):
            memsyn.measure(model, [BATCH], progress=False)
    else:
        found = memsyn.measure(model, [BATCH], progress=False)
        expected = memsyn.measure(model.a, [BATCH], progress=False)
        assert torch.allclose(found.sums["a.weight"], chosen**2 * expected.sums["weight"], rtol=1e-9)


class Pair(NamedTuple):
    value: Tensor
    other: Any


@dataclass
class Output(ModelOutput):
    value: Tensor | None = None
    other: Any = None


@dataclass
class Answer:
    value: Tensor


BESIDE: dict[str, Callable[[Tensor], Any]] = {
    "a distribution": lambda y: torch.distributions.Normal(y, 1.0),
    "a nested tuple, as the states of an LSTM": lambda y: (y, y),
    "a list of tensors": lambda y: [y],
    "a dataclass": Answer,
    "an object": lambda y: SimpleNamespace(state=y),
    "a mapping": lambda y: {"state": y},
}


@pytest.mark.parametrize("container", ["tuple", "list", "dict", "named tuple", "ModelOutput"])
@pytest.mark.parametrize("name", BESIDE)
def test_one_tensor_among_objects_that_may_hold_others_is_ambiguous(name: str, container: str) -> None:
    put: dict[str, Callable[[Tensor, Any], Any]] = {
        "tuple": lambda value, other: (other, value),
        "list": lambda value, other: [value, other],
        "dict": lambda value, other: {"value": value, "other": other},
        "named tuple": Pair,
        "ModelOutput": lambda value, other: Output(value=value, other=other),
    }
    model = Lambda(
        lambda m, x: put[container](m.value(x), BESIDE[name](m.other(x))), value=nn.Linear(4, 1), other=nn.Linear(4, 2)
    ).double()
    with pytest.raises(memsyn.OutputError, match=r"nothing else that may hold one; got a .*Say which tensor counts"):
        memsyn.measure(model, [BATCH], progress=False)


@pytest.mark.parametrize("output", [torch.distributions.Categorical, Answer])
def test_an_object_that_is_no_tensor_is_no_output(output: Any) -> None:
    model = Lambda(lambda m, x: output(m.a(x).softmax(1)), a=nn.Linear(4, 3).double())
    with pytest.raises(memsyn.OutputError, match=f"got a {output.__name__}. Say which tensor counts"):
        memsyn.measure(model, [BATCH], progress=False)


def test_a_tensor_beside_numbers_and_text_is_the_output() -> None:
    model = Lambda(lambda m, x: (m.a(x), None, 0.5, "text", (1, [None]), {"lr": np.float64(2)}), a=nn.Linear(4, 3))
    found, expected = (memsyn.measure(m.double(), [BATCH], progress=False) for m in (model, model.a))
    assert torch.equal(found.sums["a.weight"], expected.sums["weight"])


@pytest.mark.parametrize("first", [0, 2**62 + 12345])
@pytest.mark.parametrize("size", [1, 64, 65, 200])
def test_the_signs_of_a_sample_are_mixed_from_its_place(first: int, size: int) -> None:
    outputs = torch.zeros(3, size, requires_grad=True)
    signed_outputs(outputs, SampleInfo(first)).sum().backward()
    assert torch.equal(outputs.grad, torch.stack([signs(first + k, size) for k in range(3)]).float())


def test_signs_of_two_outputs_or_two_samples_are_independent() -> None:
    """Sums of products of signs have mean 0 and variance 1, once divided by the root of their number."""
    outputs = torch.zeros(2000, 200, requires_grad=True)
    signed_outputs(outputs, SampleInfo(0)).sum().backward()
    for own in (outputs.grad, outputs.grad.T):
        pairs = (own.T @ own / len(own) ** 0.5).triu(1)
        count = pairs.count_nonzero() + (pairs == 0).triu(1).sum()
        assert pairs.abs().max() < 6
        assert 0.95 < pairs.square().sum() / count < 1.05
