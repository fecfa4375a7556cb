"""Which parameters are protected, by name: only=, exclude=, wrappers' prefixes, and weights that were drawn anew."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

import memsyn
from memsyn.integrations.lightning import MemsynCallback
from memsyn.parameters import chosen_names, renaming
from memsyn.report.memory_page import memory_page

DATA = torch.randn(64, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.randint(6, (64,), generator=torch.Generator().manual_seed(2))


class Classifier(nn.Module):
    def __init__(self, num_classes: int = 6, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16))
        self.head = nn.Linear(16, num_classes)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Wrapper(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


ESTIMATORS = ["mas", "kronecker"]


def learned(model: nn.Module, *estimators: str) -> memsyn.Memory:
    memory = memsyn.Memory.empty()
    for estimator in estimators:
        memory = memory.consolidate(model, memsyn.measure(model, [DATA], estimator=estimator, progress=False))
    return memory


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 20) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(DATA), LABELS % model(DATA).shape[1]).backward()
        optimizer.step()


def with_new_head(model: Classifier, num_classes: int = 6, seed: int = 7) -> Classifier:
    changed = copy.deepcopy(model)
    torch.manual_seed(seed)
    changed.head = nn.Linear(16, num_classes).double()
    return changed


# Names and patterns


def test_patterns_choose_names_as_in_fnmatch() -> None:
    names = ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]
    assert chosen_names(names, None, None) == set(names)
    assert chosen_names(names, "head.*", None) == {"head.weight", "head.bias"}
    assert chosen_names(names, None, ["*.bias", "head.weight"]) == {"body.0.weight"}
    assert chosen_names(names, "*.weight", "head.*") == {"body.0.weight"}
    assert chosen_names(["a[0]", "a0"], "a[0]", None) == {"a[0]", "a0"}  # a name, and a pattern


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exclude": "haed.*"},
            r"exclude='haed.\*' matches none of the memory's 6 parameters. Near names: head.bias, head.weight",
        ),
        ({"only": ["body.*", "classifier"]}, "only='classifier' matches none"),
        ({"only": "body.*", "exclude": "*"}, "leave none of the memory's 6 parameters"),
        ({"only": 3}, "only must be a name or pattern, or a list of them; got 3"),
        ({"exclude": ["head.*", None]}, "exclude must be a name or pattern"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_near_names(options: dict[str, Any], message: str) -> None:
    model = Classifier()
    memory = learned(model, "mas")
    for act in (
        lambda: memory.select(**options),
        lambda: memsyn.penalty(model, memory, **options),
        lambda: memsyn.protect(sgd(model), model, memory, **options),
        lambda: memory.consolidate(model, memsyn.measure(model, [DATA], progress=False), **options),
    ):
        with pytest.raises(memsyn.OptionError, match=message):
            act()


def test_a_part_of_a_memory() -> None:
    model = Classifier()
    memory = learned(model, "mas", "kronecker")
    part = memory.select(exclude="head.weight")
    assert part.names == memory.names - {"head.weight"}
    assert part.anchor.keys() == part.importance.keys() == part.counts.keys() == part.names
    assert torch.equal(part.importance["head.bias"], memory.importance["head.bias"])
    assert [entry.when for entry in part.history] == [entry.when for entry in memory.history]
    assert part.history[-1].fingerprint is None
    assert memory.select() is not memory
    assert memory.select().names == memory.names
    assert part.directions is not None
    assert memory.directions is not None
    assert part.directions.names() == part.names
    assert part.directions.excerpts.keys() == part.names
    # The bias without its weight: its input is 1, so its second moment A is 1, over the scale of the whole matrix.
    whole = memory.directions.layers["head.weight"]
    alone = part.directions.layers["head.bias"]
    assert alone.inputs.dense().item() == pytest.approx(float(whole.inputs.dense()[0, -1, -1]), rel=1e-9)
    assert torch.equal(alone.outputs.dense(), whole.outputs.dense())
    # The weight without its bias: A without the last row and column.
    bare = memory.select(exclude="head.bias").directions.layers["head.weight"]
    assert torch.allclose(bare.inputs.dense(), whole.inputs.dense()[:, :-1, :-1], rtol=1e-9, atol=1e-12)
    assert memory.select(only="body.2.*").directions.layers == {}


def test_a_part_of_a_memory_is_saved_and_projected(tmp_path) -> None:
    """The bias alone, from a file, is damped by 1 / (1 + c a ((1 - mu) s_i + mu)) in the eigenvectors of S."""
    model = Classifier()
    part = learned(model, "kronecker").select(only="head.bias")
    part.save(tmp_path / "part")
    part = memsyn.Memory.load(tmp_path / "part")
    layer = part.directions.layers["head.bias"]
    a, s = layer.inputs.dense()[0, 0, 0], layer.outputs.dense()[0]
    identity = torch.eye(6, dtype=torch.float64)
    damping = torch.linalg.inv(identity + 10 * a * (0.9 * s + 0.1 * identity))
    change = {}
    for protected in (False, True):
        trained = copy.deepcopy(model)
        optimizer = sgd(trained)
        if protected:
            with pytest.warns(memsyn.NewParametersWarning):
                memsyn.protect(optimizer, trained, part, every=1)
        before = trained.head.bias.detach().clone()
        train(trained, optimizer, 1)
        change[protected] = trained.head.bias.detach() - before
    # The gradient is damped before the step, and the change after it.
    assert torch.allclose(change[True], damping @ damping @ change[False], rtol=1e-6, atol=1e-12)


def test_a_penalty_of_some_parameters_is_its_formula() -> None:
    model = Classifier()
    memory = learned(model, "mas")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    expected = sum(float(memory.importance[name].sum()) * 0.01 for name in memory.names if name.startswith("body.0"))
    assert float(memsyn.penalty(model, memory, only="body.0.*").detach()) == pytest.approx(expected, rel=1e-9)
    rest = float(memsyn.penalty(model, memory, exclude="body.0.*").detach())
    assert rest + expected == pytest.approx(float(memsyn.penalty(model, memory).detach()), rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_consolidating_some_parameters(estimator: str) -> None:
    model = Classifier()
    memory = learned(model, estimator)
    found = memsyn.measure(model, [2 * DATA], estimator=estimator, progress=False)
    whole = memory.consolidate(model, found)
    part = memory.consolidate(model, found, exclude=["head.bias", "body.*"])
    assert part.names == {"head.weight"}
    if part.directions is None:
        assert torch.equal(part.importance["head.weight"], whole.importance["head.weight"])
    else:
        expected = whole.directions.layers["head.weight"].inputs.dense()[:, :-1, :-1]
        assert torch.allclose(part.directions.layers["head.weight"].inputs.dense(), expected, atol=1e-9)
    assert memory.select(exclude="head.*").consolidate(model, found).names == memory.names
    assert memory.consolidate(model, found, only="head.*").history[-1].num_samples == 64


def test_a_bias_that_was_left_out_comes_back_with_nothing_known_of_it() -> None:
    model = Classifier()
    memory = learned(model, "kronecker")
    found = memsyn.measure(model, [2 * DATA], estimator="kronecker", progress=False)
    again = memory.select(exclude="head.bias").consolidate(model, found)
    old = memory.directions.layers["head.weight"].inputs.dense().clone()
    old[:, -1, :], old[:, :, -1] = 0.0, 0.0
    new = memsyn.Memory.empty().consolidate(model, found).directions.layers["head.weight"].inputs.dense()
    assert torch.allclose(again.directions.layers["head.weight"].inputs.dense(), old + new, atol=1e-9)


# Heads that were replaced


@pytest.mark.parametrize("form", ["proximal", "gradient", "projected"])
def test_a_new_head_under_the_old_name_needs_a_decision(form: str) -> None:
    model = Classifier()
    memory = learned(model, "kronecker" if form == "projected" else "mas")
    changed = with_new_head(model)
    with pytest.raises(memsyn.ProtectionError, match=r"1 parameters look newly initialised.*head\.weight") as error:
        memsyn.protect(sgd(changed), changed, memory, form=form)
    assert "exclude=['head.bias', 'head.weight']" in str(error.value)
    assert "only=['*', 'head.weight']" in str(error.value)


@pytest.mark.parametrize("form", ["proximal", "gradient", "projected"])
@pytest.mark.parametrize("num_classes", [3, 6, 9])
def test_a_head_that_is_excluded_trains_as_without_protection_bit_for_bit(form: str, num_classes: int) -> None:
    model = Classifier()
    memory = learned(model, "kronecker" if form == "projected" else "mas")
    found = []
    for exclude in ("head.*", "*"):
        changed = with_new_head(model, num_classes)
        for parameter in changed.body.parameters():
            parameter.requires_grad_(False)  # so that the head's own training alone is seen
        optimizer = sgd(changed)
        if exclude == "head.*":
            memsyn.protect(optimizer, changed, memory, form=form, exclude=exclude, strength=1.0)
        train(changed, optimizer)
        found.append(changed.head.weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], with_new_head(model, num_classes).head.weight)


def test_a_new_head_was_pulled_to_the_old_one() -> None:
    """What `protect` refuses now: kept on purpose, the new head goes to the old one's values."""
    model = Classifier()
    memory = learned(model, "mas")
    distances = {}
    for options in ({"only": ["*", "head.weight", "head.bias"]}, {"exclude": "head.*"}):
        changed = with_new_head(model)
        optimizer = sgd(changed)
        memsyn.protect(optimizer, changed, memory, strength=100.0, **options)
        before = float((changed.head.weight.detach() - memory.anchor["head.weight"]).norm())
        train(changed, optimizer)
        distances[next(iter(options))] = (
            before,
            float((changed.head.weight.detach() - memory.anchor["head.weight"]).norm()),
        )
    assert distances["only"][1] < 0.1 * distances["only"][0]
    assert distances["exclude"][1] > 0.9 * distances["exclude"][0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_head_with_fewer_outputs_is_an_error_that_names_the_way_out(estimator: str) -> None:
    model = Classifier()
    memory = learned(model, estimator)
    changed = with_new_head(model, 3)
    acts: list[Callable[[], Any]] = [
        lambda: memsyn.protect(sgd(changed), changed, memory),
        lambda: memory.check(changed),
    ]
    if estimator == "mas":
        acts.append(lambda: memsyn.penalty(changed, memory))
    for act in acts:
        with pytest.raises(memsyn.MismatchError, match=r"exclude=\['head.bias', 'head.weight'\]"):
            act()
    found = memsyn.measure(changed, [DATA], estimator=estimator, progress=False)
    with pytest.raises(memsyn.MismatchError, match=r"exclude=\['head.bias', 'head.weight'\]"):
        memory.consolidate(changed, found)
    again = memory.select(exclude=["head.weight", "head.bias"]).consolidate(changed, found)
    assert again.names == memory.names
    again.check(changed)


INITS: dict[str, Callable[[Tensor], Any]] = {
    "kaiming": nn.init.kaiming_uniform_,
    "xavier": nn.init.xavier_normal_,
    "normal": lambda weight: nn.init.normal_(weight, std=0.02),
    "zeros": nn.init.zeros_,
    "orthogonal": nn.init.orthogonal_,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("init", INITS)
def test_weights_drawn_anew_are_found(init: str, estimator: str, seed: int) -> None:
    model = Classifier()
    train(model, sgd(model), 50)
    memory = learned(model, estimator)
    torch.manual_seed(seed)
    INITS[init](model.body[0].weight.data)
    with pytest.raises(memsyn.ProtectionError, match=r"body\.0\.weight"):
        memsyn.protect(sgd(model), model, memory)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_not_taken_for_new(estimator: str) -> None:
    """Long training without protection, biases and norms, a zero bias, a tiny matrix, an anchor of zeros."""
    model = Classifier()
    train(model, sgd(model), 50)
    nn.init.zeros_(model.head.bias)
    memory = learned(model, estimator)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), 500)
    nn.init.zeros_(model.body[0].bias)
    nn.init.ones_(model.body[2].weight)
    with pytest.warns(memsyn.MovedWeightsWarning, match=r"body\.0\.bias \(1\)") as said:
        memsyn.protect(sgd(model), model, memory)
    assert len(said) == 1
    assert "head.bias" not in str(said[0].message)  # its anchor is zero: there is no scale
    small = nn.Linear(5, 5)
    known = memsyn.Memory.empty().consolidate(small, memsyn.measure(small, [torch.ones(2, 5)], progress=False))
    torch.manual_seed(3)
    small.reset_parameters()
    with pytest.warns(memsyn.MovedWeightsWarning, match=r"as far from their anchor.*weight"):
        memsyn.protect(sgd(small), small, known)
    memsyn.protect(sgd(small), small, known, only="bias")  # five values are not reported


def test_a_model_at_its_anchor_or_near_it_gives_no_warning() -> None:
    model = Classifier()
    for memory in (learned(model, "mas"), learned(model, "kronecker")):
        near = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in near.parameters():
                parameter.mul_(1.5)
        for started in (model, near):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                memsyn.protect(sgd(started), started, memory).remove()
            assert said == []


def test_the_rule_in_numbers() -> None:
    """A matrix of n values, at the anchor's norm and a given cosine with it: new below 3 / sqrt(n)."""
    model = nn.Linear(16, 16, bias=False).double()
    importance = memsyn.Importance({"weight": torch.ones(16, 16)}, 1)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0] = 1.0
    memory = memsyn.Memory.empty().consolidate(model, importance)
    limit = 3 / math.sqrt(256)
    for cosine, new in ((limit + 0.01, False), (limit - 0.01, True), (-0.5, True)):
        with torch.no_grad():
            model.weight[0, 0], model.weight[1, 1] = cosine, math.sqrt(1 - cosine**2)
        if new:
            with pytest.raises(memsyn.ProtectionError, match=f"cosine {cosine:.3f}"):
                memsyn.protect(sgd(model), model, memory)
        else:
            with pytest.warns(memsyn.MovedWeightsWarning, match=r"weight \(1.3\)"):
                memsyn.protect(sgd(model), model, memory)


def test_excerpts_are_kept_in_files_and_merges_and_may_be_missing(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    data = torch.randn(20, 40)
    one, other = (
        memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [part], estimator="kronecker", progress=False))
        for part in (data[:10], data[10:])
    )
    expected = model.weight.detach().reshape(-1)[torch.arange(256) * 1200 // 256]
    for memory in (one, one.merge(other)):
        memory.save(tmp_path / "m")
        loaded = memsyn.Memory.load(tmp_path / "m", like=model)
        assert torch.equal(loaded.directions.excerpts["weight"], expected)
        assert torch.equal(loaded.directions.excerpts["bias"], model.bias.detach())
    bare = replace(one, directions=replace(one.directions, excerpts={}))
    bare.save(tmp_path / "bare")
    loaded = memsyn.Memory.load(tmp_path / "bare", like=model)
    assert loaded.directions.excerpts == {}
    torch.manual_seed(9)
    model.reset_parameters()
    memsyn.protect(sgd(model), model, loaded)


# Growing heads


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_grown_head_is_said_once(estimator: str) -> None:
    model = Classifier()
    memory = learned(model, estimator)
    grown = with_new_head(model, 9)
    with torch.no_grad():
        grown.head.weight[:6], grown.head.bias[:6] = model.head.weight, model.head.bias
    with pytest.warns(
        memsyn.GrownParametersWarning, match=r"head\.weight \(6 to 9 rows\), head\.bias \(6 to 9 rows\)"
    ) as said:
        handle = memsyn.protect(sgd(grown), grown, memory)
    assert len(said) == 1
    assert "the old classes lose their answers" in str(said[0].message)
    handle.remove()
    memsyn.protect(sgd(grown), grown, memory, exclude="head.*")


# Names with a prefix


def test_factors_under_other_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.LayerNorm(5)).double()
    model[1].weight = model[0].weight  # tied: a matrix and a table
    tokens = torch.randint(5, (8, 3))
    found = memsyn.measure(model, [tokens], estimator="kronecker", progress=False)
    names = {name: f"net.{name}" for name in found.names}
    assert names.keys() == dict(model.named_parameters()).keys()
    expected = memsyn.measure(Wrapper(model), [tokens], estimator="kronecker", progress=False)
    renamed = found.renamed(names)
    assert renamed.matrices == expected.matrices
    assert renamed.routes == expected.routes
    assert renamed.sums.keys() == expected.sums.keys()
    assert all(torch.allclose(total, expected.sums[name]) for name, total in renamed.sums.items())
    directions = memsyn.Memory.empty().consolidate(model, found).renamed(names).directions
    other = memsyn.Memory.empty().consolidate(Wrapper(model), expected).directions
    assert directions.header() == other.header()
    assert [list(group) for group in directions.groups().values()] == [list(group) for group in other.groups().values()]
    assert directions.names() == set(names.values())


@pytest.mark.parametrize(
    ("known", "own", "expected"),
    [
        (["a.w", "b.w"], ["a.w", "b.w", "c.w"], {}),
        (["a.w", "b.w"], ["net.a.w", "net.b.w", "c.w"], {"a.w": "net.a.w", "b.w": "net.b.w"}),
        (["module.a.w", "module.b.w"], ["a.w", "b.w"], {"module.a.w": "a.w", "module.b.w": "b.w"}),
        (["a.w", "b.w", "lost.w"], ["net.a.w", "net.b.w"], {n: f"net.{n}" for n in ("a.w", "b.w", "lost.w")}),
        (["a.w", "b.w", "c.w", "d.w"], ["net.a.w"], {}),  # less than half: another architecture
        (["a.w", "b.w"], ["a.w", "net.b.w"], {}),  # as they are is as good
        (["0.w_g", "0.w_v"], ["0.parametrizations.w.original0", "0.parametrizations.w.original1"], None),
        (["w_orig"], ["parametrizations.w.original"], {"w_orig": "parametrizations.w.original"}),
        (["q.w"], ["base_model.model.q.base_layer.w"], {"q.w": "base_model.model.q.base_layer.w"}),
        (["h.w"], ["h.original_module.w", "h.modules_to_save.default.w"], {"h.w": "h.modules_to_save.default.w"}),
    ],
)
def test_how_names_fit(known: list[str], own: list[str], expected: dict[str, str] | None) -> None:
    expected = dict(zip(known, own, strict=True)) if expected is None else expected
    assert renaming(known, own).names == expected


@pytest.mark.parametrize(
    ("known", "own", "message"),
    [
        (
            ["a.w", "b.w"],
            ["s.a.w", "s.b.w", "t.a.w", "t.b.w"],
            r"with 's.' in front \(2\) and with 't.' in front \(2\)",
        ),
        (["a.w", "b.w"], ["s.a.w", "s.b.w", "t.a.w", "t.b.w"], "such as model.s in place of the model"),
        (["0.w", "1.w"], ["0.0.w", "0.1.w", "1.0.w", "1.1.w"], r"such as model.get_submodule\('0'\)"),
        (
            ["a.w", "b.w", "c.w"],
            ["t.a.w", "t.b.w", "t.c.w", "a.w", "b.w"],
            r"'t.' in front \(3\) and as they are \(2\)",
        ),
        (["s.a.w", "t.a.w"], ["a.w"], r"without 's.' \(1\) and without 't.' \(1\). Keep one part.*only='s.\*'"),
    ],
)
def test_names_that_fit_in_two_ways_are_an_error(known: list[str], own: list[str], message: str) -> None:
    with pytest.raises(memsyn.MismatchError, match=message):
        renaming(known, own)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ones_own_wrapper_is_found_everywhere(estimator: str, tmp_path) -> None:
    model = Classifier()
    memory = learned(model, estimator)
    wrapper = Wrapper(copy.deepcopy(model))
    found = r"6 of 6 parameters of the (memory|importance) have other names.*is net\..*give model.net"
    trained = []
    for protected in (model, wrapper):
        own = copy.deepcopy(protected)
        optimizer = sgd(own)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            memsyn.protect(optimizer, own, memory)
        assert [entry.category for entry in said] == [memsyn.RenamedParametersWarning] * (protected is wrapper)
        train(own, optimizer)
        trained.append([p.detach() for p in own.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
    submodule = copy.deepcopy(wrapper)
    memsyn.protect(sgd(submodule), submodule.net, memory)  # as the warning says
    memory.save(tmp_path / "m")
    with pytest.warns(memsyn.RenamedParametersWarning, match=found):
        loaded = memsyn.Memory.load(tmp_path / "m", like=wrapper)
    assert loaded.names == {f"net.{name}" for name in memory.names}
    with pytest.warns(memsyn.RenamedParametersWarning, match=found):
        memory.check(wrapper)
    measured = memsyn.measure(model, [DATA], estimator=estimator, progress=False)
    with pytest.warns(memsyn.RenamedParametersWarning, match=found):
        again = memory.consolidate(wrapper, measured)
    expected = memory.consolidate(model, measured)
    assert again.names == loaded.names
    if estimator == "mas":
        assert torch.equal(again.importance["net.head.weight"], expected.importance["head.weight"])
        with pytest.warns(memsyn.RenamedParametersWarning, match=found):
            assert float(memsyn.penalty(wrapper, memory).detach()) == 0.0
    else:
        layers = again.directions.layers, expected.directions.layers
        assert torch.equal(layers[0]["net.head.weight"].inputs.values, layers[1]["head.weight"].inputs.values)
        with torch.no_grad():
            wrapper.net.head.weight.add_(0.1)
        with pytest.warns(memsyn.RenamedParametersWarning, match=found):
            change = memory.predicted_change(wrapper, reference=model)
        assert change == memory.predicted_change(wrapper.net, reference=model)
        assert change["head"] > 0
    # And back: a memory of the wrapper on the model itself.
    with pytest.warns(memsyn.RenamedParametersWarning, match="net.*rename the file's parameters"):
        memsyn.protect(sgd(model), model, again)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_renamed_memory_of_other_weights_is_noticed(estimator: str, tmp_path) -> None:
    model = Classifier()
    learned(model, estimator).save(tmp_path / "m")
    wrapper = Wrapper(model)
    with torch.no_grad():
        model.head.weight.add_(0.1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        memsyn.Memory.load(tmp_path / "m", like=wrapper)
    assert [entry.category for entry in said] == [memsyn.RenamedParametersWarning, memsyn.MovedWeightsWarning]
    assert "1 of 6 parameters (the first is net.head.weight)" in str(said[1].message)


def test_a_fingerprint_is_of_the_weights_whatever_their_prefix() -> None:
    """Buffers and parameters that were not measured have the prefix too."""
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    found = memsyn.measure(model, [DATA], progress=False)
    known = replace(found, fingerprint=memsyn.fingerprint(model))
    wrapper = Wrapper(model)
    with pytest.warns(memsyn.RenamedParametersWarning) as said:
        memsyn.Memory.empty().consolidate(wrapper, known)
    assert len(said) == 1
    with torch.no_grad():
        model[1].running_mean.add_(1.0)
    with pytest.warns(memsyn.RenamedParametersWarning), pytest.warns(memsyn.MovedWeightsWarning):
        memsyn.Memory.empty().consolidate(wrapper, known)


def test_a_state_of_a_handle_goes_into_a_wrapper() -> None:
    model = Classifier()
    for estimator in ESTIMATORS:
        memory = learned(model, estimator)
        state = memsyn.protect(sgd(model), model, memory, exclude="head.*").state_dict()
        wrapper = Wrapper(copy.deepcopy(model))
        with pytest.warns(memsyn.RenamedParametersWarning):
            handle = memsyn.protect(sgd(wrapper), wrapper, memory)
        with pytest.warns(memsyn.RenamedParametersWarning):
            handle.load_state_dict(state)
        assert handle.report().layers.keys() <= {"net.body.0", "net.body.2", "net.head"}


def test_an_averaged_model_has_the_names_of_its_model() -> None:
    model = Classifier()
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    assert memsyn.fingerprint(averaged) == memsyn.fingerprint(model)
    found = memsyn.measure(averaged, [DATA], progress=False)
    assert found.sums.keys() == dict(model.named_parameters()).keys()
    memory = memsyn.Memory.empty().consolidate(averaged, found)
    memsyn.protect(sgd(model), model, memory)
    memory.check(averaged)
    memory.check(torch.optim.swa_utils.AveragedModel(torch.optim.swa_utils.AveragedModel(model)))


def test_weight_norm_old_and_new_are_one() -> None:
    def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(norm(nn.Linear(8, 16)), nn.Tanh(), nn.Linear(16, 6)).double()

    with pytest.warns(FutureWarning, match="weight_norm"):
        old = normed(nn.utils.weight_norm)
    new = normed(nn.utils.parametrizations.weight_norm)
    memory = learned(old, "mas")
    with pytest.warns(memsyn.RenamedParametersWarning, match=r"2 of 5 .*is 0\.parametrizations\.weight\.original"):
        found = memsyn.penalty(new, memory)
    assert float(found.detach()) == 0.0
    expected = memsyn.measure(new, [DATA], progress=False).mean()
    with pytest.warns(memsyn.RenamedParametersWarning):
        fitted = memory.fitted(new)
    assert fitted.names == expected.keys()
    for name, omega in fitted.importance.items():
        assert torch.allclose(omega, expected[name], rtol=1e-9)


def test_a_module_of_lightning_fabric_has_the_names_of_its_model() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = Classifier()
    memory = learned(model, "mas")
    wrapped, optimizer = fabric.setup(copy.deepcopy(model), sgd(model))
    memory.check(wrapped)
    found = memsyn.measure(wrapped, [DATA], progress=False)
    assert found.sums.keys() == memory.names
    assert all(torch.allclose(found.mean()[name], omega) for name, omega in memory.importance.items())
    assert memsyn.fingerprint(wrapped) == memsyn.fingerprint(model)
    del optimizer


def adapted(model: nn.Module, **options: Any) -> Any:
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **options))


def test_the_base_weights_of_a_model_with_adapters_are_found() -> None:
    model = Classifier()
    memory = learned(model, "mas")
    wrapped = adapted(model, target_modules=["body.0"], modules_to_save=["head"])
    trained = wrapped.base_model.model
    optimizer = sgd(wrapped)
    handle = memsyn.protect(optimizer, wrapped, memory, strength=10.0)
    with torch.no_grad():
        trained.head.modules_to_save.default.bias.add_(0.5)
        trained.body[0].base_layer.bias.add_(0.5)
    names = ("head.bias", "body.0.bias")
    bound = sum(float(memory.importance[name].sum()) * 0.25 for name in names)
    assert handle.value() == pytest.approx(10 * bound, rel=1e-9)


def test_adapters_of_other_weights_than_the_memory_knows_are_not_protected() -> None:
    model = Classifier()
    memory = learned(model, "mas").select(only="head.*")
    wrapped = adapted(model, target_modules=["body.0"])
    adapters = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    with (
        pytest.warns(memsyn.NewParametersWarning, match=r"body\.0\.weight"),
        pytest.raises(memsyn.ProtectionError, match=r"They are frozen and do not move\. What trains"),
    ):
        memsyn.protect(adapters, wrapped, memory)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_fresh_adapter_under_the_old_names_needs_a_decision(estimator: str) -> None:
    """With the same rank it looks newly initialised, with another rank it is reshaped: both name the way out."""
    model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 6))
    data = torch.randn(16, 8)
    torch.manual_seed(0)
    first = adapted(model, target_modules=["0"], init_lora_weights=False)
    memory = memsyn.Memory.empty().consolidate(
        first, memsyn.measure(first, [data], estimator=estimator, weights="adapters", progress=False)
    )
    assert all("lora" in name for name in memory.names)
    torch.manual_seed(1)
    second = adapted(model, target_modules=["0"])
    with pytest.raises(memsyn.ProtectionError, match="lora_B"):
        memsyn.protect(sgd(second), second, memory)
    third = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=1, target_modules=["0"]))
    with pytest.raises(memsyn.MismatchError, match="lora_A"):
        memsyn.protect(sgd(third), third, memory)


def test_a_module_of_lightning_around_the_model_is_protected() -> None:
    """It was not, without a word: no optimizer held a parameter of the memory's names."""

    class Module(pl.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

    model = Classifier()
    for estimator in ESTIMATORS:
        module = Module(copy.deepcopy(model))
        trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
        trainer.strategy.optimizers = [sgd(module)]
        callback = MemsynCallback(learned(model, estimator), strength=2.0, max_samples=0)
        with pytest.warns(memsyn.RenamedParametersWarning, match=r"net\.body"):
            callback.on_train_start(trainer, module)
        (protection,) = callback.protections
        with torch.no_grad():
            module.net.head.bias.add_(0.5)
        expected = 2 * 0.25 * float(callback.memory.importance["head.bias"].sum()) if estimator == "mas" else 0.0
        assert protection.value() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_lost_parameters_are_said_whatever_the_memory_holds(estimator: str) -> None:
    model = Classifier()
    memory = learned(model, estimator)
    changed = copy.deepcopy(model)
    changed.head = nn.Sequential(nn.Linear(16, 6)).double()
    with (
        pytest.warns(memsyn.LostParametersWarning, match=r"2 parameters of the memory .*head\.") as said,
        pytest.warns(memsyn.NewParametersWarning, match=r"head\.0\.weight"),
    ):
        memsyn.protect(sgd(changed), changed, memory)
    assert {entry.filename for entry in said} == {__file__}


def test_a_page_compares_weights_with_a_prefix() -> None:
    model = Classifier()
    memory = learned(model, "mas")
    state = torch.nn.parallel.DataParallel(Wrapper(model)).state_dict()
    page = str(memory_page(memory, "m", state))
    assert "Found under another name: " in page
    assert "body.0.weight is module.net.body.0.weight" in page
    assert "left out" not in page


def test_a_part_of_a_memory_of_directions_is_loaded_without_a_false_alarm(tmp_path: Path) -> None:
    model = Classifier()
    learned(model, "kronecker").select(exclude="head.*").save(tmp_path / "it")
    with pytest.warns(memsyn.NewParametersWarning, match=r"head\.weight"):
        memsyn.Memory.load(tmp_path / "it", like=model)
    with torch.no_grad():
        model.get_parameter("body.0.weight").add_(1)
    with (
        pytest.warns(memsyn.MovedWeightsWarning, match=r"1 of .* \(the first is body\.0\.weight\)"),
        pytest.warns(memsyn.NewParametersWarning, match=r"head\.weight"),
    ):
        memsyn.Memory.load(tmp_path / "it", like=model)


def test_a_small_head_that_was_replaced_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    data = torch.randn(16, 4, dtype=torch.float64)
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [data], progress=False))
    model[2] = nn.Linear(8, 1).double()
    with pytest.warns(memsyn.MovedWeightsWarning, match=r"2\.weight"):
        memsyn.protect(sgd(model), model, memory)
