"""Batches whose samples are not in the first dimension: each is measured as a loop over its samples would."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

import memsyn
from memsyn.batches import in_samples
from tests.cases import Lambda
from tests.reference import errors
from tests.zoo import transformer

LENGTHS = (5, 2, 3)
GENERATOR = torch.Generator().manual_seed(0)
SEQUENCES = [torch.randn(length, 4, generator=GENERATOR, dtype=torch.float64) for length in LENGTHS]
IMAGES = [torch.randn(3, height, 7, generator=GENERATOR, dtype=torch.float64) for height in (5, 6, 9, 5)]
LABELS = torch.tensor([2, 0, 1])


def truth(model: nn.Module, samples: list[Any], run: Callable[[nn.Module, Any], Tensor]) -> dict[str, Tensor]:
    """1/N sum_k |d ||F(x_k)||^2 / d theta|, by a loop over the samples."""
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample in samples:
        score = run(model, sample).square().sum()
        for total, grad in zip(totals.values(), torch.autograd.grad(score, list(model.parameters())), strict=True):
            total += grad.abs()
    return {name: total / len(samples) for name, total in totals.items()}


def assert_exact(found: memsyn.Importance, expected: dict[str, Tensor], num_samples: int) -> None:
    assert found.num_samples == num_samples
    assert max(errors(found.mean(), expected).values()) <= 1e-9


def build(run: Callable[..., Any], **layers: Any) -> nn.Module:
    torch.manual_seed(0)
    return Lambda(run, **{name: make() for name, make in layers.items()}).double()


def reader(run: Callable[..., Any] | None = None) -> nn.Module:
    """Reads a list of sequences (length, 4) of any lengths, and gives a row for each."""

    def read(m: Any, sequences: list[Tensor]) -> Tensor:
        return torch.stack([m.head(torch.tanh(m.body(own)).mean(0)) for own in sequences])

    return build(run or read, body=lambda: nn.Linear(4, 5), head=lambda: nn.Linear(5, 3))


def viewer() -> nn.Module:
    def view(m: Any, images: list[Tensor]) -> Tensor:
        return torch.stack([m.head(torch.tanh(m.conv(own.unsqueeze(0))).mean((2, 3))[0]) for own in images])

    return build(view, conv=lambda: nn.Conv2d(3, 4, 3), head=lambda: nn.Linear(4, 2))


def alone(model: nn.Module, sample: Tensor) -> Tensor:
    return model([sample])


FORMS: dict[str, tuple[Callable[[list[Tensor]], Any], Any]] = {
    "a list": (lambda parts: list(parts), None),
    "a tuple": (lambda parts: tuple(parts), None),
    "a list and labels": (lambda parts: (list(parts), LABELS), None),
    "two tuples, as a collate function of detection gives": (
        lambda parts: (tuple(parts), ({"a": 1},) * len(parts)),
        None,
    ),
    "a mapping, with forward": (lambda parts: {"own": list(parts)}, lambda m, b: m(b["own"])),
    "a list, with forward": (lambda parts: list(parts), lambda m, b: m(b)),
    "two lists, with forward": (lambda parts: [list(parts), [{"a": 1}] * len(parts)], lambda m, b: m(b[0])),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["sequences", "images"])
def test_a_list_of_tensors_of_unlike_sizes_is_as_many_samples(name: str, kind: str) -> None:
    form, forward = FORMS[name]
    model, parts = (reader(), SEQUENCES) if kind == "sequences" else (viewer(), IMAGES)
    found = memsyn.measure(model, [form(parts), form(parts[1:])], forward=forward, progress=False)
    assert_exact(found, truth(model, [*parts, *parts[1:]], alone), 2 * len(parts) - 1)


def test_labels_go_with_the_items_of_a_list() -> None:
    model = reader()
    found = memsyn.measure(model, [(SEQUENCES, LABELS)], estimator="fisher-empirical", progress=False)
    padded = rnn.pad_sequence(SEQUENCES, batch_first=True)

    def read(m: Any, x: Tensor) -> Tensor:
        counts = (x != 0).any(2, keepdim=True)
        return m.head((torch.tanh(m.body(x)) * counts).sum(1) / counts.sum(1))

    expected = memsyn.measure(reader(read), [(padded, LABELS)], estimator="fisher-empirical", progress=False)
    assert_exact(found, expected.mean(), 3)


@pytest.mark.parametrize("estimator", ["mas-local", "kronecker", "inputs"])
def test_lists_are_measured_by_every_estimator(estimator: str) -> None:
    model, equal = reader(), [torch.randn(3, 4, generator=GENERATOR, dtype=torch.float64) for _ in range(4)]
    stacked = reader(lambda m, x: m.head(torch.tanh(m.body(x)).mean(1)))
    options: dict[str, Any] = {"estimator": estimator, "progress": False}
    found = memsyn.measure(model, [[own] for own in equal], split=lambda own: [(own,)], **options)
    expected = memsyn.measure(stacked, [torch.stack(equal)], **options)
    assert found.num_samples == 4
    assert found.sums.keys() == expected.sums.keys()
    assert max(errors(found.sums, expected.sums).values()) <= 1e-9


def test_max_samples_counts_the_items_of_a_list() -> None:
    found = memsyn.measure(reader(), [SEQUENCES, SEQUENCES], max_samples=4, progress=False)
    assert_exact(found, truth(reader(), [*SEQUENCES, SEQUENCES[0]], alone), 4)


def test_a_packed_sequence_is_as_many_samples_as_sequences() -> None:
    def last(m: Any, packed: rnn.PackedSequence) -> Tensor:
        return m.head(m.rnn(packed)[1][0])

    model = build(last, rnn=lambda: nn.GRU(4, 5), head=lambda: nn.Linear(5, 3))
    expected = truth(model, SEQUENCES, lambda m, own: m(rnn.pack_sequence([own])))
    packed = rnn.pack_sequence(SEQUENCES, enforce_sorted=False)
    for batch in (packed, (packed, LABELS)):
        assert_exact(memsyn.measure(model, [batch], progress=False), expected, 3)
    found = memsyn.measure(model, [{"own": packed}], forward=lambda m, b: m(b["own"]), progress=False)
    assert_exact(found, expected, 3)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_as_many_samples_as_components(layout: torch.layout) -> None:
    model = reader(lambda m, x: torch.stack([m.head(torch.tanh(m.body(own)).mean(0)) for own in x.unbind()]))
    batch = torch.nested.nested_tensor(SEQUENCES, layout=layout)
    assert_exact(memsyn.measure(model, [batch], progress=False), truth(reader(), SEQUENCES, alone), 3)


# One output row


def bag(m: Any, instances: Tensor) -> Tensor:
    """A bag of instances (any, 4) -> one row, by attention over the instances."""
    hidden = torch.tanh(m.body(instances))
    return m.head(m.attention(hidden).softmax(0).T @ hidden)


def bags() -> nn.Module:
    return build(
        bag, body=lambda: nn.Linear(4, 5), attention=lambda: nn.Linear(5, 1, bias=False), head=lambda: nn.Linear(5, 3)
    )


@pytest.mark.filterwarnings("ignore::memsyn.SlowParametersWarning")
def test_a_batch_with_one_output_row_is_one_sample() -> None:
    model = bags()
    expected = truth(model, SEQUENCES, lambda m, own: m(own))
    assert_exact(memsyn.measure(model, SEQUENCES, progress=False), expected, 3)
    given = [{"own": own} for own in SEQUENCES]
    assert_exact(memsyn.measure(model, given, forward=lambda m, b: m(b["own"]), progress=False), expected, 3)
    held = [SimpleNamespace(own=own) for own in SEQUENCES]  # an object that memsyn cannot look into
    assert_exact(memsyn.measure(model, held, forward=lambda m, b: m(b.own), progress=False), expected, 3)


@pytest.mark.parametrize("estimator", ["mas-local", "kronecker"])
def test_a_bag_is_one_sample_for_other_estimators(estimator: str) -> None:
    options: dict[str, Any] = {"estimator": estimator, "progress": False}
    found = memsyn.measure(bags(), SEQUENCES, **options)
    expected = memsyn.measure(bags(), SEQUENCES, split=lambda own: [own], **options)
    assert found.num_samples == expected.num_samples == 3
    assert all(torch.equal(found.sums[name], total) for name, total in expected.sums.items())


def test_a_bag_must_be_split_where_sums_are_added_in_the_forward_pass() -> None:
    for batches in ([SEQUENCES[0]], [SEQUENCES[0][:1], *SEQUENCES[1:]]):
        with pytest.raises(memsyn.OutputError, match=r"split=lambda batch: \["):
            memsyn.measure(bags(), batches, estimator="inputs", progress=False)
    model = nn.Linear(4, 3).double()
    bagged = Lambda(lambda m, x: m.a(x).sum(0, keepdim=True) if len(x) == 2 else m.a(x), a=model)
    for estimator in ("mas-local", "kronecker", "inputs"):
        with pytest.raises(memsyn.OutputError, match=r"taken for 2 samples|for 2 samples its shape is \(1, 3\)"):
            memsyn.measure(bagged, [SEQUENCES[0], SEQUENCES[1]], estimator=estimator, progress=False)


def test_max_samples_cuts_no_bag() -> None:
    with pytest.raises(memsyn.OutputError, match="first dimension must be the samples"):
        memsyn.measure(bags(), SEQUENCES, max_samples=2, progress=False)
    found = memsyn.measure(bags(), SEQUENCES, max_samples=2, split=lambda own: [own], progress=False)
    assert_exact(found, truth(bags(), SEQUENCES[:2], lambda m, own: m(own)), 2)


# Graphs


def convolve(m: Any, x: Tensor, edge_index: Tensor, batch: Tensor, count: int) -> Tensor:
    """Sums over neighbours, and the mean of each graph."""
    received = torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])
    hidden = torch.tanh(m.own(x) + m.neighbours(received))
    sums = torch.zeros(count, hidden.shape[1], dtype=x.dtype).index_add(0, batch, hidden)
    return m.head(sums / torch.bincount(batch, minlength=count)[:, None])


class Graph:
    """What torch_geometric's Data is."""

    def __init__(self, x: Tensor, edge_index: Tensor) -> None:
        self.x, self.edge_index = x, edge_index


class Graphs(Graph):
    """What torch_geometric's Batch is: the nodes of all graphs, whose they are (`batch`), where each begins (`ptr`)."""

    @classmethod
    def from_data_list(cls, graphs: list[Graph]) -> "Graphs":
        sizes = torch.tensor([len(graph.x) for graph in graphs])
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        edges = [graph.edge_index + start for graph, start in zip(graphs, ptr.tolist(), strict=False)]
        joined = cls(torch.cat([graph.x for graph in graphs]), torch.cat(edges, 1))
        joined.ptr, joined.batch = ptr, torch.arange(len(graphs)).repeat_interleave(sizes)
        return joined

    def to_data_list(self) -> list[Graph]:
        graphs = []
        for k, (start, stop) in enumerate(zip(self.ptr[:-1].tolist(), self.ptr[1:].tolist(), strict=True)):
            own = self.batch[self.edge_index[0]] == k
            graphs.append(Graph(self.x[start:stop], self.edge_index[:, own] - start))
        return graphs


GRAPHS = [Graph(own, torch.tensor([[0, 1, 1], [1, 0, 1]])) for own in SEQUENCES]


def network(run: Callable[..., Any]) -> nn.Module:
    return build(run, own=lambda: nn.Linear(4, 5), neighbours=lambda: nn.Linear(4, 5), head=lambda: nn.Linear(5, 3))


def test_a_batch_of_graphs_is_as_many_samples_as_graphs() -> None:
    model = network(lambda m, data: convolve(m, data.x, data.edge_index, data.batch, len(data.ptr) - 1))
    expected = truth(model, GRAPHS, lambda m, own: m(Graphs.from_data_list([own])))
    joined = Graphs.from_data_list(GRAPHS)
    assert_exact(memsyn.measure(model, [joined], progress=False), expected, 3)
    assert_exact(memsyn.measure(model, [(joined, LABELS)], progress=False), expected, 3)
    found = memsyn.measure(model, [joined], forward=lambda m, b: m(b), max_samples=2, progress=False)
    assert_exact(found, truth(model, GRAPHS[:2], lambda m, own: m(Graphs.from_data_list([own]))), 2)


def test_a_joined_graph_in_a_mapping_needs_to_be_split() -> None:
    model = network(lambda m, x, edge_index, batch: convolve(m, x, edge_index, batch, int(batch.max()) + 1))
    joined = Graphs.from_data_list(GRAPHS)
    given = {"x": joined.x, "edge_index": joined.edge_index, "batch": joined.batch}
    with pytest.raises(
        memsyn.MemsynError,
        match=r"shape \(10, 4\) was taken for 10 samples, but the model's output has the shape \(3, 3\).*split=",
    ):
        memsyn.measure(model, [given], progress=False)

    def split(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        zeros = {"batch": torch.zeros(10, dtype=torch.int64)}
        return [
            {"x": own.x, "edge_index": own.edge_index, "batch": zeros["batch"][: len(own.x)]}
            for own in joined.to_data_list()
        ]

    expected = truth(model, split(given), lambda m, own: m(**own))
    assert_exact(memsyn.measure(model, [given], split=split, progress=False), expected, 3)


def test_split_gives_a_list() -> None:
    with pytest.raises(memsyn.BatchError, match="split must give a list of batches of one sample each; got a Tensor"):
        memsyn.measure(reader(), [SEQUENCES], split=lambda batch: batch[0], progress=False)


# Packed rows


TEXTS = [torch.tensor([[5, 8, 2]]), torch.tensor([[5, 6]]), torch.tensor([[9, 3, 3, 7]])]


def llama(*, use_cache: bool = False) -> nn.Module:
    """With a cache, it lets the sequences of a row see each other."""
    torch.manual_seed(0)
    build = transformer(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        use_cache=use_cache,
    )
    return build("sdpa").double().eval()


def row(**more: Any) -> dict[str, Any]:
    positions = torch.cat([torch.arange(text.shape[1]) for text in TEXTS])[None]
    return {"input_ids": torch.cat(TEXTS, 1), "position_ids": positions, **more}


def test_packed_sequences_count_as_samples_each() -> None:
    model = llama()
    expected = memsyn.measure(model, [{"input_ids": text} for text in TEXTS], progress=False).mean()
    edges = torch.tensor([0, 3, 5, 9], dtype=torch.int32)
    more = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 4, "max_length_k": 4}
    for batch in (row(), row(labels=row()["input_ids"]), row(**more)):
        assert_exact(memsyn.measure(model, [batch], progress=False), expected, 3)
    found = memsyn.measure(model, [row()], forward=lambda m, b: m(**b).logits, progress=False)
    assert_exact(found, expected, 3)


def test_packed_sequences_are_told_apart_in_mixed_precision() -> None:
    """In bfloat16 the outputs of a row are those of its sequences to three digits: it is not told by them."""
    model = llama().float()
    expected = memsyn.measure(model, [{"input_ids": text} for text in TEXTS], progress=False).mean()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    found = memsyn.measure(model, [row()], progress=False)
    assert found.num_samples == 3
    assert max(errors(found.mean(), expected).values()) < 0.05


def test_boundaries_without_positions() -> None:
    """Tokens (tokens, width) of all sequences, and where each begins."""

    def read(m: Any, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        starts = cu_seqlens.tolist()
        parts = [m.body(tokens[a:b]).cumsum(0) for a, b in pairwise(starts)]
        assert max(map(len, parts)) == max_seqlen
        return torch.cat(parts)[None]

    model = build(read, body=lambda: nn.Linear(4, 5))
    batch = {"tokens": torch.cat(SEQUENCES), "cu_seqlens": torch.tensor([0, 5, 7, 10]), "max_seqlen": 5}
    expected = truth(model, SEQUENCES, lambda m, own: m.body(own).cumsum(0))
    assert_exact(memsyn.measure(model, [batch], progress=False), expected, 3)


def test_sequences_that_see_each_other_in_a_row_are_an_error() -> None:
    model = build(lambda m, input_ids, position_ids: m.table(input_ids).cumsum(1), table=lambda: nn.Embedding(10, 4))
    for own in (model, llama(use_cache=True)):
        with pytest.raises(memsyn.SamplesInteractError, match=r"its rows hold 3 sequences.*use_cache = False.*split="):
            memsyn.measure(own, [row()], progress=False)
    found = memsyn.measure(model, [row()], split=lambda batch: [batch], progress=False)
    assert_exact(found, truth(model, [row()], lambda m, own: m(**own)), 1)


@pytest.mark.parametrize(
    ("positions", "mask"),
    [
        ([[0, 1, 2, 3]], None),
        ([[0, 1, 5, 6]], None),  # positions that jump
        ([[1, 1, 0, 1]], None),
        ([[0, 0, 0, 1]], [[0, 0, 1, 1]]),  # padding on the left
    ],
)
def test_rows_of_one_sequence_stay_whole(positions: list[list[int]], mask: list[list[int]] | None) -> None:
    batch = {"input_ids": torch.ones(1, 4), "position_ids": torch.tensor(positions)}
    if mask is not None:
        batch["attention_mask"] = torch.tensor(mask)
    assert in_samples(batch, None, has_forward=False) is batch


# Models that write into their inputs


class Encoder(nn.Module):
    """As SentenceTransformer's modules do: adds to the mapping that it gets, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        features.update({"token_embeddings": self.table(features.pop("input_ids")), "states": [features["mask"]]})
        features["mask"] = features["mask"].double().clone()
        return features


class Pooling(nn.Module):
    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        weights = features["mask"][..., None]
        features["sentence_embedding"] = (features["token_embeddings"] * weights).sum(1) / weights.sum(1)
        return features


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("estimator", ["mas", "mas-local", "kronecker", "inputs"])
def test_a_model_may_write_into_its_input_mapping(estimator: str, is_nested: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Encoder(), Pooling()).double()
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    features: dict[str, Any] = {"input_ids": ids, "mask": mask}
    batch = ({"own": features}, LABELS) if is_nested else features

    def forward(m: nn.Module, batch: Any) -> Tensor:
        return m(batch[0]["own"] if is_nested else batch)["sentence_embedding"]

    found = memsyn.measure(model, [batch, batch], forward=forward, estimator=estimator, progress=False)
    assert found.num_samples == 6
    assert features.keys() == {"input_ids", "mask"}
    assert features["input_ids"] is ids
    assert features["mask"] is mask
    if isinstance(found, memsyn.Importance) and estimator == "mas":
        samples = [{"input_ids": ids[k : k + 1], "mask": mask[k : k + 1]} for k in range(3)]
        assert_exact(found, truth(model, samples, lambda m, own: m(own)["sentence_embedding"]), 6)
