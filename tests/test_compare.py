"""compare against its definitions, and against everything that could make its numbers mean something else."""

import copy
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsyn
from memsyn import Memory, compare
from memsyn.comparing.verdict import Comparison
from tests import story
from tests.test_padding import SPEECH, TEXT, build_of, clip, sentences

DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


def a_model(seed: int = 0, classes: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, classes)).double().eval()


def moved(model: nn.Module, by: float = 0.3) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for k, parameter in enumerate(other.parameters()):
            parameter += by * normal(*parameter.shape, seed=50 + k)
    return other


def found(model: nn.Module, reference: Any, batches: Any, **options: Any) -> Comparison:
    return compare(model, reference, batches, progress=False, **options)


def assert_same(one: Comparison, other: Comparison, tolerance: float = 1e-12) -> None:
    for name in ("same", "change", "norms", "divergence"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None)
        if left is not None:
            assert torch.allclose(left, right, rtol=tolerance, atol=tolerance), name


# Definitions


def test_classes_are_the_largest_logits() -> None:
    old, new, x = a_model(), moved(a_model()), normal(60, 4, seed=1)
    result = found(new, old, [x[:40], x[40:]])
    assert result.kind == "classes"
    with torch.no_grad():
        for k in range(60):
            y, z = old(x[k]).tolist(), new(x[k]).tolist()
            assert result.same[k] == (y.index(max(y)) == z.index(max(z)))
            change = math.sqrt(sum((b - a) ** 2 for a, b in zip(y, z, strict=True))) / math.hypot(*y)
            assert float(result.change[k]) == pytest.approx(change, rel=1e-12)
            p, q = ([math.exp(own) / sum(map(math.exp, row)) for own in row] for row in (y, z))
            divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert float(result.divergence[k]) == pytest.approx(divergence, rel=1e-9)
    assert 0.2 < result.agreement < 0.98
    assert result.agreement == pytest.approx(float(result.same.mean()))
    expected = np.quantile(result.change.numpy(), [0.5, 0.9, 0.99])
    assert list(result.change_quantiles.values()) == pytest.approx(list(expected), rel=1e-12)
    assert result.mean_change == pytest.approx(float(result.change.mean()))
    order = sorted(range(60), key=lambda k: (float(result.same[k]), -float(result.change[k])))
    assert result.worst(7) == order[:7]


def test_a_model_is_the_same_as_itself() -> None:
    model = a_model()
    result = found(model, model, [normal(130, 4)])
    assert (result.agreement, result.mean_change, result.mean_divergence) == (1.0, 0.0, 0.0)
    assert result.verdict().answer == "safe"


class Tagger(nn.Module):
    """Logits for each token, (B, T, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.table(input_ids))


def tagged(length: int) -> dict[str, Tensor]:
    """Two texts, of 4 and 2 tokens, padded to `length`."""
    ids = torch.zeros(2, length, dtype=torch.int64)
    ids[0, :4], ids[1, :2] = torch.tensor([4, 7, 2, 9]), torch.tensor([1, 3])
    mask = torch.arange(length) < torch.tensor([[4], [2]])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids}


def test_of_tokens_the_positions_that_count_are_shared() -> None:
    torch.manual_seed(0)
    old = Tagger().double().eval()
    new = moved(old, 1.0)
    result = found(new, old, [tagged(4)])
    assert result.kind == "tokens"
    for k, text in enumerate(([4, 7, 2, 9], [1, 3])):
        with torch.no_grad():
            y, z = old(torch.tensor(text)), new(torch.tensor(text))
        assert float(result.same[k]) == pytest.approx(float((y.argmax(1) == z.argmax(1)).double().mean()))
        assert float(result.change[k]) == pytest.approx(float((z - y).norm() / y.norm()), rel=1e-12)
        divergence = F.kl_div(z.log_softmax(1), y.log_softmax(1), log_target=True, reduction="sum") / len(text)
        assert float(result.divergence[k]) == pytest.approx(float(divergence), rel=1e-9)
    for length in (5, 9):
        assert_same(found(new, old, [tagged(length)]), result)
    one_by_one = [{"input_ids": torch.tensor([text])} for text in ([4, 7, 2, 9], [1, 3])]
    assert_same(found(new, old, one_by_one), result)


@pytest.mark.parametrize(
    ("model", "kind"), [("BertForSequenceClassification", "classes"), ("BertForTokenClassification", "tokens")]
)
def test_models_of_transformers_with_padding(model: str, kind: str) -> None:
    old = build_of(model, "BertConfig", **TEXT, num_labels=3).double()
    new = moved(old, 0.05)
    expected = found(new, old, [{"input_ids": sentences(4)["input_ids"]}])
    assert expected.kind == kind
    assert_same(found(new, old, [sentences(9)]), expected, 1e-9)
    importance = memsyn.measure(old, [sentences(9)], progress=False)
    assert_same(found(new, Memory.empty().consolidate(old, importance), [sentences(9)]), expected, 1e-9)


def test_frames_of_padding_do_not_count() -> None:
    old = build_of("Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH, feat_extract_norm="layer").double()
    new = moved(old, 0.02)
    expected = found(new, old, [{"input_values": clip(0)["input_values"]}])
    assert expected.kind == "tokens"
    assert_same(found(new, old, [clip(100)]), expected, 1e-6)


def test_hidden_states_of_transformers_are_no_logits() -> None:
    model = build_of("BertModel", "BertConfig", **TEXT).double()
    with pytest.raises(memsyn.OptionError, match=r"'last_hidden_state' of shape \(4, 16\).* may be several kinds"):
        found(model, model, [sentences(4)])


def test_values_are_the_same_within_a_tolerance() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    result = found(moved_to(model, 1.04), model, [torch.ones(3, 1).double()])
    assert (result.kind, result.agreement, result.divergence) == ("values", 1.0, None)
    assert result.mean_change == pytest.approx(0.04)
    result = found(moved_to(model, 1.04), model, [torch.ones(3, 1).double()], tolerance=0.039)
    assert result.agreement == 0.0
    table = found(moved(a_model()), a_model(), [normal(9, 4)], kind="values", tolerance=0.5)
    assert table.same.tolist() == (table.change <= 0.5).double().tolist()


def moved_to(model: nn.Module, value: float) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(value)
    return other


def test_embeddings_keep_their_nearest_neighbour() -> None:
    old, new, x = a_model(), moved(a_model(), 0.5), normal(40, 4, seed=1)
    x[7] = x[3]  # twice in the data: which of the two is nearest to a third is rounding
    result = found(new, old, [x[:13], x[13:]], kind="embeddings")
    with torch.no_grad():
        for k in range(40):
            others = [j for j in range(40) if j != k]
            cosines = [F.cosine_similarity(m(x[k : k + 1]), m(x[others])) for m in (old, new)]
            same = cosines[1][int(cosines[0].argmax())] >= cosines[1].max() - 1e-9
            assert result.same[k] == float(same)
    assert 0.1 < result.agreement < 0.95
    assert result.divergence is None
    with pytest.raises(memsyn.BatchError, match="one sample alone"):
        found(new, old, [x[:1]], kind="embeddings")


class Named(nn.Module):
    """An output in a mapping, under a name."""

    def __init__(self, name: str, *, unit: bool = False) -> None:
        super().__init__()
        self.inner, self.name, self.unit = a_model(), name, unit

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        y = F.normalize(y, dim=-1) if self.unit else y
        return {self.name: y} if self.name else y


@pytest.mark.parametrize(
    ("name", "shape", "unit", "kind"),
    [
        ("", (6, 4), False, "classes"),
        ("logits", (6, 4), False, "classes"),
        ("logits", (6, 3, 4), False, "tokens"),
        ("embeddings", (6, 4), False, "embeddings"),
        ("image_embeds", (6, 4), True, "embeddings"),
        ("", (6, 4), True, None),
        ("", (6, 3, 4), False, None),
        ("last_hidden_state", (6, 4), False, None),
        ("logits", (6, 2, 3, 4), False, None),
    ],
)
def test_the_kind_of_answers_is_told_or_asked_for(name: str, shape: Any, unit: bool, kind: str | None) -> None:
    model = Named(name, unit=unit)
    if kind is None:
        with pytest.raises(
            memsyn.OptionError, match=r"may be several kinds of answers. Say which, with kind=: 'classes'"
        ):
            found(model, model, [normal(*shape)])
        assert found(model, model, [normal(*shape)], kind="values").reason == "kind="
        return
    result = found(model, model, [normal(*shape)])
    assert result.kind == kind
    assert result.reason in str(result)


def test_probabilities_are_no_logits() -> None:
    old = nn.Sequential(a_model(), nn.Softmax(1))
    result = found(moved(old), old, [normal(20, 4)])
    assert result.kind == "classes"
    assert result.divergence is None
    logs = nn.Sequential(a_model(), nn.LogSoftmax(1))
    expected = found(moved(a_model()), a_model(), [normal(20, 4)])
    assert torch.allclose(found(moved(logs), logs, [normal(20, 4)]).divergence, expected.divergence)


# What the numbers must not depend on


@pytest.mark.parametrize("size", [1, 3, 7, 30])
@pytest.mark.parametrize("kind", ["classes", "values", "embeddings"])
def test_the_batch_size_does_not_matter(size: int, kind: str) -> None:
    old, new, x = a_model(), moved(a_model()), normal(30, 4)
    assert_same(found(new, old, list(x.split(size)), kind=kind), found(new, old, [x], kind=kind))


def test_the_order_does_not_matter() -> None:
    old, new, x = a_model(), moved(a_model()), normal(30, 4)
    order = torch.randperm(30, generator=generator())
    one, other = found(new, old, [x]), found(new, old, [x[order]])
    assert torch.allclose(one.change[order], other.change, rtol=1e-12)
    assert torch.equal(one.same[order], other.same)
    assert one.mean_change == pytest.approx(other.mean_change, rel=1e-12)


def test_batches_are_read_as_by_measure() -> None:
    old, new, x = a_model(), moved(a_model()), normal(12, 4)
    expected = found(new, old, [x])
    targets = torch.zeros(12)
    assert_same(found(new, old, [(x, targets)]), expected)
    assert_same(found(new, old, [{"input": x, "labels": targets}]), expected)
    assert_same(found(new, old, [[own] for own in x[:, None]]), expected)
    assert_same(found(new, old, [x[:0], x]), expected)
    assert_same(found(new, old, [x], split=lambda batch: list(batch[:, None])), expected)
    assert_same(found(new, old, [{"a": x}], forward=lambda model, batch: model(batch["a"])), expected)
    assert_same(found(new, old, [x[:8], x[8:], x], max_samples=12), expected)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=5)
    assert_same(found(new, old, loader), expected)


def test_lists_of_images_and_bags_are_samples() -> None:
    class OverImages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = a_model()

        def forward(self, images: Any) -> Tensor:
            if not isinstance(images, list):
                raise TypeError("expected a list of images")
            return torch.cat([self.inner(image).mean((0, 1))[None] for image in images])

    old = OverImages()
    new = moved(old)
    images = [normal(3, height, 4, seed=height) for height in (5, 6, 7)]
    expected = found(new, old, [image[None] for image in images], forward=lambda model, batch: model(list(batch)))
    assert expected.num_samples == 3
    assert_same(found(new, old, [images]), expected)
    bag = nn.Sequential(a_model(), Pooled())
    result = found(moved(bag), bag, [normal(9, 4)])
    assert result.num_samples == 1


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True)


def test_dropout_and_train_mode_do_not_count() -> None:
    old = nn.Sequential(a_model(), nn.Dropout(0.5), nn.BatchNorm1d(5)).double()
    new = moved(old)
    expected = found(new.eval(), old.eval(), [normal(20, 4)])
    assert_same(found(new.train(), old.train(), [normal(20, 4)]), expected)


# References


def consolidated(model: nn.Module, estimator: str = "mas", memory: Memory | None = None) -> Memory:
    importance = memsyn.measure(model, [normal(20, 4)], estimator=estimator, progress=False)
    return (memory or Memory.empty()).consolidate(model, importance)


def with_statistics() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for k in range(20):
            model.train()(1 + normal(30, 4, seed=k))
    return model.eval()


def test_a_model_its_state_and_its_memory_are_one_reference() -> None:
    torch.manual_seed(0)
    old = with_statistics()
    memory, state = consolidated(old), copy.deepcopy(old.state_dict())
    new = moved(old)
    with torch.no_grad():
        new[1].running_mean += 0.1
    x = [normal(25, 4)]
    expected = found(new, old, x)
    for reference in (state, memory):
        result = found(new, reference, x)
        assert_same(result, expected, 0.0)
        assert result.moved_statistics == expected.moved_statistics == ("1.running_mean",)
        assert result.taken == ()
    compiled = torch.compile(new, backend="eager")
    assert_same(found(compiled, {f"_orig_mod.{name}": value for name, value in state.items()}, x), expected, 0.0)


def test_embeddings_that_became_one_vector_have_no_neighbour_in_common() -> None:
    torch.manual_seed(0)
    old, x = nn.Linear(4, 6), [torch.randn(40, 4)]
    for value in (0.0, math.nan):
        new = copy.deepcopy(old)
        with torch.no_grad():
            new.weight.fill_(value)
        # The first of all ties is the nearest: by chance it is the old one.
        assert found(new, old, x, kind="embeddings").agreement <= 0.1


def test_what_a_memory_does_not_hold_is_taken_from_the_model_and_said() -> None:
    old = a_model()
    memory = consolidated(old).select(only="0.*")
    new = moved(old)
    mixed = copy.deepcopy(new)
    mixed[0].load_state_dict(old[0].state_dict())
    result = found(new, memory, [normal(20, 4)])
    assert_same(result, found(new, mixed, [normal(20, 4)]), 0.0)
    assert result.taken == ("2.weight", "2.bias")
    assert "does not hold 2 of the model's tensors, such as 2.weight. Both sides have the new model's" in str(result)
    part = {name: value for name, value in old.state_dict().items() if name.startswith("0.")}
    assert found(new, part, [normal(20, 4)]).taken == ("2.weight", "2.bias")


def test_tied_weights_and_wrapped_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.last.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).tanh())

    torch.manual_seed(0)
    old = Tied().double()
    new = moved(old)
    assert_same(found(new, old.state_dict(), [normal(9, 4)]), found(new, old, [normal(9, 4)]), 0.0)
    state = {name: value for name, value in old.state_dict().items() if name != "last.weight"}
    assert found(new, state, [normal(9, 4)]).taken == ()
    wrapped = nn.ModuleDict({"net": new})
    with pytest.warns(memsyn.RenamedParametersWarning, match="first.bias is net.first.bias"):
        result = found(wrapped, state, [normal(9, 4)], forward=lambda model, batch: model["net"](batch))
    assert_same(result, found(new, old, [normal(9, 4)]), 0.0)


def test_references_that_are_no_old_model() -> None:
    model, x = a_model(), [normal(9, 4)]
    directions = consolidated(model, "kronecker")
    with pytest.raises(memsyn.OptionError, match=r"holds directions alone, and no anchor .*give the old model or its"):
        found(model, directions, x)
    with pytest.raises(memsyn.OptionError, match=r"the memory is empty: give the old model or its state_dict"):
        found(model, Memory.empty(), x)
    memory, later = consolidated(model), moved(model)
    with pytest.raises(memsyn.OptionError, match=r"anchor is older than its directions \(4 parameters differ"):
        found(later, consolidated(later, "kronecker", memory), x)
    with pytest.raises(memsyn.MismatchError, match="of another architecture: the model lacks"):
        found(Tagger(), memory, x)
    with pytest.raises(memsyn.MismatchError, match="of another architecture: reshaped: "):
        found(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)).double(), memory, x)
    with pytest.raises(
        memsyn.MismatchError, match=r"2.weight has 7 rows in the model and 5 in the memory: .*\[:, :5\]"
    ):
        found(a_model(classes=7), memory, x)
    with pytest.raises(memsyn.OptionError, match="expected as reference the old model, its state_dict or a Memory"):
        found(model, memsyn.measure(model, x, progress=False), x)
    with pytest.raises(memsyn.ModelError, match=r"expected a torch\.nn\.Module"):
        found(memory, model, x)  # type: ignore[arg-type]


def test_a_grown_head_is_compared_by_the_old_classes() -> None:
    old, grown = a_model(), a_model(classes=7)
    with torch.no_grad():
        grown[2].weight[:5], grown[2].bias[:5] = old[2].weight + 0.1, old[2].bias
        grown[0].load_state_dict(old[0].state_dict())
    narrow = copy.deepcopy(old)
    with torch.no_grad():
        narrow[2].weight += 0.1
    result = found(grown, old, [normal(30, 4)], forward=lambda model, batch: model(batch)[:, :5], kind="classes")
    assert_same(result, found(narrow, old, [normal(30, 4)]))
    message = r"old model has the shape \(30, 5\), that of new model \(30, 7\). Choose the outputs that both have"
    with pytest.raises(memsyn.OutputError, match=message):
        found(grown, old, [normal(30, 4)])


# No side effects


def test_both_models_stay_as_they_were() -> None:
    new, old = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), a_model()).double(), None
    new.train()[2].eval()
    old = moved(new)
    before = [{name: value.clone() for name, value in own.state_dict().items()} for own in (new, old)]
    modes = [[module.training for module in own.modules()] for own in (new, old)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(normal(20, 4), batch_size=7, shuffle=True)

    def fails(model: nn.Module, batch: Tensor) -> Tensor:
        if len(batch) == 6:
            raise RuntimeError("the last batch")
        return model(batch)

    found(new, old, loader)
    with pytest.raises(memsyn.BatchError, match="the last batch"):
        found(new, old, loader, forward=fails)
    assert torch.equal(torch.get_rng_state(), state)
    for own, values, mode in zip((new, old), before, modes, strict=True):
        assert all(torch.equal(own.state_dict()[name], value) for name, value in values.items())
        assert [module.training for module in own.modules()] == mode
        assert all(parameter.grad is None for parameter in own.parameters())


def test_a_model_may_write_into_its_inputs() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = a_model()

        def forward(self, x: Tensor) -> Tensor:
            x *= 2
            return self.inner(x)

    old, x = Writes(), normal(10, 4)
    kept = x.clone()
    result = found(moved(old), old, [x])
    assert torch.equal(x, kept)
    assert_same(result, found(moved(a_model()), a_model(), [2 * x]))


# Bad input


def test_bad_data_is_named() -> None:
    model = a_model()
    for batches in ([], [normal(0, 4)]):
        with pytest.raises(memsyn.BatchError, match="there are no samples"):
            found(model, model, batches)
    with pytest.raises(memsyn.BatchError, match="expected batches, got one tensor"):
        found(model, model, normal(3, 4))
    with pytest.raises(memsyn.BatchError, match="batch 0: the model failed on it"):
        found(model, model, [normal(3, 9)])
    with pytest.raises(memsyn.OutputError, match="the output's first dimension must be the samples"):
        found(model, model, [normal(3, 4)], forward=lambda model, batch: model(batch).mean())
    with pytest.raises(memsyn.OutputError, match=r"the output is torch.int64.*Return the raw outputs"):
        found(model, model, [normal(3, 4)], forward=lambda model, batch: model(batch).argmax(1))
    x = normal(5, 4)
    x[3, 0] = math.nan
    with pytest.raises(memsyn.OutputError, match="batch 0, sample 3: an output of the old model is NaN or infinite"):
        found(model, model, [x])
    empty = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])}
    tagger = Tagger()
    with pytest.raises(memsyn.OutputError, match="batch 0, sample 1: no position of it counts"):
        found(tagger, tagger, [empty])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "labels"}, "kind must be auto, classes, tokens, values, embeddings; got 'labels'"),
        ({"tolerance": 0}, "tolerance must be a number above 0"),
        ({"max_samples": 0}, "max_samples must be a whole number"),
        ({"segments": "a"}, "segments must be a list with the name of each sample's segment"),
        ({"segments": ["a", "b"]}, "segments names 2 samples, and the batches hold 3"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(memsyn.OptionError, match=message):
        found(a_model(), a_model(), [normal(3, 4)], **options)


@pytest.mark.parametrize("kind", ["tokens", "classes", "embeddings"])
def test_outputs_must_fit_the_kind(kind: str) -> None:
    model = nn.Linear(4, 1).double() if kind == "classes" else a_model()
    x = normal(3, 2, 4) if kind == "embeddings" else normal(3, 4)
    with pytest.raises(memsyn.OutputError, match=f"kind='{kind}' is .*; the output has the shape"):
        found(model, model, [x], kind=kind)


def test_a_model_that_is_not_deterministic_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = a_model()

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.inner(x), 0.5)  # in evaluation mode too

    with pytest.raises(memsyn.SamplesInteractError, match="the old model gives other outputs for the same batch"):
        found(a_model(), Noisy(), [normal(9, 4)])
    with pytest.raises(memsyn.SamplesInteractError, match="the new model gives other outputs for the same batch"):
        found(Noisy(), a_model(), [normal(9, 4)])


def test_samples_that_interact_are_refused() -> None:
    model = nn.Sequential(a_model(), nn.BatchNorm1d(5, track_running_stats=False)).double()
    with pytest.raises(
        memsyn.SamplesInteractError, match="gives another output for 2 samples alone than in their batch"
    ):
        found(model, model, [normal(9, 4)])


def test_a_forward_that_runs_the_users_model_is_refused() -> None:
    new, old = moved(a_model()), a_model()
    for one in (new, old):
        with pytest.raises(memsyn.ModelError, match="the forward pass uses your model itself"):
            found(new, old, [normal(9, 4)], forward=lambda model, batch, one=one: one(batch))


def test_outputs_that_are_not_finite_have_changed_without_bound() -> None:
    old = a_model()
    for kind in ("classes", "values", "embeddings"):
        result = found(moved_to(old, math.nan), old, [normal(200, 4)], kind=kind)
        assert result.mean_change == math.inf
        assert result.verdict().answer == "broken"
        assert result.to_json()["mean_change"] is None
        json.dumps(result.to_json(), allow_nan=False)
        if kind != "embeddings":
            assert result.agreement == 0.0
    zero = moved_to(old, 0.0)
    assert found(old, zero, [normal(3, 4)], kind="values").change.tolist() == [math.inf] * 3
    assert found(zero, zero, [normal(3, 4)], kind="values").change.tolist() == [0.0] * 3


# The story


def test_a_careless_training_is_broken_and_its_cause_is_named() -> None:
    old = story.trained()
    memory, x = story.remembered(old), [story.requests()]
    careless = copy.deepcopy(old)
    story.learn(careless, lr=1e-4)
    result = found(careless, memory, x)
    with torch.no_grad():
        shares = (careless(x[0]).argmax(1) == old(x[0]).argmax(1)).double()
    assert torch.equal(result.same, shares)
    # No weight of the old path has moved by 0.2% of its length.
    changes = [
        float((after - before).detach().norm() / before.detach().norm())
        for (name, after), before in zip(careless.named_parameters(), old.parameters(), strict=True)
        if not name.startswith("new.")
    ]
    assert max(changes) < 0.002
    verdict = result.verdict()
    assert verdict.answer == "broken"
    assert result.agreement < 0.6
    assert result.moved_statistics == ("body.1.running_mean", "body.1.running_var")
    assert result.with_old_statistics is not None
    assert result.with_old_statistics.agreement == 1.0
    assert result.with_old_statistics.verdict().answer == "safe"
    for words in (
        "The cause: 2 running statistics moved (the first is body.1.running_mean), as those of BatchNorm",
        "train with freeze_statistics=True",
    ):
        assert words in verdict.sentence
    mended = copy.deepcopy(careless)
    mended.load_state_dict(memory.statistics, strict=False)
    after = found(mended, memory, x)
    assert_same(after, result.with_old_statistics, 0.0)
    difference = after.minus(result)
    assert difference.agreement == pytest.approx(1 - result.agreement)
    assert difference.agreement_interval.lower > 0.3
    assert str(difference).startswith("Of the same 400 samples: same answer +")


def test_a_protected_training_is_safe() -> None:
    old = story.trained()
    memory = story.remembered(old)
    model = copy.deepcopy(old)
    story.learn(model, memory)
    x, y = story.points(story.NEW, 300, seed=9, shift=6.0)
    assert float((model.new_answers(x).argmax(1) == y).double().mean()) > 0.98
    result = found(model, memory, [story.requests()])
    assert (result.moved_statistics, result.with_old_statistics) == ((), None)
    assert str(result.verdict()).startswith("Safe. 100.0% of 400 samples give the same answer (95% interval 99.0%")


def test_statistics_that_are_not_the_cause_are_not_blamed() -> None:
    old = with_statistics()
    new = moved(old, 1.0)
    with torch.no_grad():
        new[1].running_mean += 1e-6
    result = found(new, old, [normal(200, 4)])
    assert result.verdict().answer == "broken"
    assert ("not the cause" in result.verdict().sentence) or ("A part of the cause" in result.verdict().sentence)
    assert "The cause:" not in result.verdict().sentence


# The value


def made(same: list[float], change: list[float], **options: Any) -> Comparison:
    values = [torch.tensor(own, dtype=DOUBLE) for own in (same, change)]
    return Comparison("classes", "made", *values, torch.ones(len(same), dtype=DOUBLE), **options)


@pytest.mark.parametrize(
    ("same", "count", "change", "answer"),
    [
        (1_000, 1_000, 0.01, "safe"),
        (990, 1_000, 0.01, "safe"),  # 98.2% to 99.5%
        (976, 1_000, 0.01, "at risk"),  # 96.5% to 98.4%
        (965, 1_000, 0.01, "at risk"),  # 95.2% to 97.5%
        (950, 1_000, 0.01, "broken"),  # 93.5% to 96.2%
        (1_000, 1_000, 0.06, "broken"),
        (125, 125, 0.01, "safe"),
        (124, 124, 0.01, "cannot say"),
        (5, 5, 0.01, "cannot say"),
        (32, 33, 0.01, "at risk"),
        (0, 5, 0.01, "broken"),
        (1, 1, 0.01, "cannot say"),
    ],
)
def test_the_verdict_is_where_the_intervals_lie(same: int, count: int, change: float, answer: str) -> None:
    result = made([1.0] * same + [0.0] * (count - same), [change] * count)
    verdict = result.verdict()
    assert verdict.answer == answer
    assert str(verdict).startswith(f"{answer.capitalize()}. ")
    assert "at least 97.0% is asked for" in verdict.sentence
    assert ("give at least 125" in verdict.sentence) == (answer == "cannot say")


def test_an_interval_of_the_change_that_holds_the_threshold_is_a_risk() -> None:
    result = made([1.0] * 200, [0.0, 0.099] * 100)
    assert result.change_interval.lower < 0.05 < result.change_interval.upper
    assert result.verdict().answer == "at risk"
    assert result.verdict(max_change=0.07).answer == "safe"
    assert result.verdict(max_change=0.03).answer == "broken"
    assert result.verdict(min_agreement=0.5, max_change=0.07).answer == "safe"


@pytest.mark.parametrize("options", [{"min_agreement": 1.0}, {"min_agreement": -0.1}, {"min_agreement": "all"}])
def test_a_share_of_all_samples_cannot_be_asked_for(options: dict[str, Any]) -> None:
    with pytest.raises(memsyn.OptionError, match="min_agreement must be from 0 to below 1"):
        made([1.0], [0.0]).verdict(**options)


@pytest.mark.parametrize("value", [-1.0, math.nan, True, None])
def test_thresholds_of_change_are_checked(value: Any) -> None:
    with pytest.raises(memsyn.OptionError, match="max_change must be a number"):
        made([1.0], [0.0]).verdict(max_change=value)


def test_segments() -> None:
    old, new, x = a_model(), moved(a_model()), normal(30, 4)
    names = ["north", "south", "south"] * 10
    result = found(new, old, [x[:17], x[17:]], segments=names)
    parts = result.by_segment()
    assert list(parts) == ["north", "south"]
    assert_same(parts["north"], found(new, old, [x[::3]]))
    assert parts["south"].num_samples == 20
    assert f"Same answer by segment: north {parts['north'].agreement:.1%}, south" in str(result)
    assert result.to_json()["segments"]["south"]["agreement"] == pytest.approx(parts["south"].agreement)
    assert "<td" in result._repr_html_()
    assert "north" in result._repr_html_()
    with pytest.raises(memsyn.OptionError, match="no segments were given"):
        found(new, old, [x]).by_segment()


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    old, x = a_model(), [normal(300, 4)]
    before, after = found(moved(old, 0.3), old, x), found(moved(old, 0.2), old, x)
    difference = after.minus(before)
    assert difference.change == pytest.approx(after.mean_change - before.mean_change)
    width = sum(own.change_interval.upper - own.change_interval.lower for own in (before, after))
    assert difference.change_interval.upper - difference.change_interval.lower < width / 2
    assert difference.change_interval.upper < 0
    assert difference.agreement == pytest.approx(after.agreement - before.agreement)
    reverse = before.minus(after)
    assert reverse.agreement_interval.lower == pytest.approx(-difference.agreement_interval.upper)
    for other in (
        found(old, old, [normal(300, 4, seed=5)]),
        found(old, old, [normal(7, 4)]),
        replace(before, kind="values"),
    ):
        with pytest.raises(memsyn.MismatchError, match="expected two comparisons of the same samples"):
            after.minus(other)


def test_a_comparison_is_shown_in_words() -> None:
    old = a_model()
    result = found(moved(old, 0.01), old, [normal(200, 4)])
    words = str(result)
    assert words.startswith("Compared: 200 samples. Answers are classes: the largest of the logits")
    assert f"Same answer: {result.agreement:.1%} (95% interval " in words
    assert "50% of samples up to " in words
    assert "KL divergence from the old model: 0.0" in words
    assert "e-" not in words
    assert len(repr(result)) < 300
    assert result._repr_html_().startswith("<div")
    facts = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert facts["num_samples"] == 200
    assert facts["agreement_interval"] == list(result.agreement_interval)
    assert facts["change_quantiles"]["0.9"] == result.change_quantiles[0.9]
    huge = str(made([0.0, 1.0], [1e30, 12.0]))
    assert "over a million times on average" in huge
