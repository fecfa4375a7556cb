"""What a person sees of a value: a short text in a terminal, a small table in a notebook, a report in words."""

import copy
import html
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

import memsyn
from memsyn.values.directions import Directions
from memsyn.values.memory import Memory


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Linear(30, 5))


def measured(estimator: str) -> Any:
    model = a_model()
    return memsyn.measure(model, [torch.randn(8, 20)] * 2, estimator=estimator, progress=False)


@pytest.fixture
def values() -> dict[str, Any]:
    """One of each value that a user may hold."""
    importance, factors = measured("mas"), measured("kronecker")
    memory = Memory.empty().consolidate(a_model(), importance)
    both = memory.consolidate(a_model(), factors)
    directions = both.directions
    assert directions is not None
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, strength=0.5)
    return {
        "importance": importance,
        "factors": factors,
        "memory": memory,
        "memory of both": both,
        "empty memory": Memory.empty(),
        "directions": directions,
        "handle": handle,
        "report": handle.report(),
        "kept alive": optimizer,
    }


WEIGHTS = 20 * 30 + 30 + 30 + 30 + 30 * 5 + 5
SIZE = 4 * WEIGHTS
PREDICTED = "Outputs on the remembered data are predicted"


def test_a_repr_says_what_is_held_and_holds_no_tensor(values: dict[str, Any]) -> None:
    assert (WEIGHTS, SIZE) == (845, 3380)
    assert repr(values["importance"]) == (
        "Importance(6 parameters, 845 weights, 16 samples, abs of squared_l2_norm, 3.4 kB)"
    )
    # Two matrices with their biases (30 x 21 and 5 x 31), and the weight and bias of the norm.
    moments = 2 * (21**2 + 30**2 + 31**2 + 5**2 - 21**2 - 30**2 - 31**2 - 5**2) + 21**2 + 30**2 + 31**2 + 5**2 + 2
    size = 4 * (moments + 2 * 30)
    assert repr(values["factors"]) == (
        "KroneckerFactors(2 matrices, 2 other parameters, 845 weights, 16 samples, second moments of inputs and output "
        f"gradients of signed_outputs, {size / 1e3:.1f} kB)"
    )
    assert repr(values["memory"]) == (
        "Memory(importance of 6 parameters, 845 weights, abs of squared_l2_norm; 1 consolidation, 16 samples; 6.8 kB)"
    )
    assert repr(values["memory of both"]).startswith(
        "Memory(importance of 6 parameters, 845 weights, abs of squared_l2_norm; directions of 2 matrices, 2 other "
        "parameters, 845 weights, second moments of inputs and output gradients of signed_outputs; 2 consolidations, "
        "32 samples; "
    )
    assert repr(values["empty memory"]) == "Memory(empty)"
    assert repr(values["directions"]).startswith(
        "Directions(2 matrices, 2 other parameters, 845 weights, up to 64 eigenvectors of each side, "
    )
    assert repr(values["handle"]) == "Protection(proximal form, strength 0.5, of SGD)"
    assert repr(values["report"]) == "Report(proximal form, 845 weights, penalty 0, bound 0, 0.0% held)"


def test_a_large_value_is_as_short(values: dict[str, Any]) -> None:
    sums = {f"blocks.{index}.weight": torch.rand(40, 40) for index in range(200)}
    for value in (memsyn.Importance(sums, 3), Memory(sums, sums), *values["directions"].layers.values()):
        assert len(repr(value)) < 800
    assert len(repr(values["directions"].diagonal)) < 200
    assert "tensor" not in "".join(repr(value) for name, value in values.items() if name != "kept alive")


class Cells(HTMLParser):
    """The rows of the tables of a page, cell by cell, and the tags that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_notebook_shows_a_table_by_layer(values: dict[str, Any]) -> None:
    importance = memsyn.Importance({"a.weight": torch.tensor([2.0, 4.0, 0.0]), "a.bias": torch.tensor([6.0]),
                                    "b.weight": torch.tensor([[4.0]])}, 2)  # fmt: skip
    assert Cells(importance._repr_html_()).rows == [
        ["layer", "weights", "share", "mean", "max", "top tenth"],
        ["a", "4", "75.0%", "1.5", "3", "50.0%"],
        ["b", "1", "25.0%", "2", "2", "100.0%"],
    ]
    factors = Cells(values["factors"]._repr_html_()).rows
    assert factors[0] == ["layer", "weights", "inputs", "outputs", "positions", "kept as"]
    assert factors[1:] == [["0", "630", "21", "30", "16", "matrices"], ["2", "155", "31", "5", "16", "matrices"]]
    directions = Cells(values["directions"]._repr_html_()).rows
    assert directions[0] == ["layer", "weights", "inputs x outputs", "kept", "room", "tasks"]
    assert [row[:4] for row in directions[1:]] == [["0", "630", "21 x 30", "21 x 30"], ["2", "155", "31 x 5", "31 x 5"]]
    both = Cells(values["memory of both"]._repr_html_()).rows
    assert both == [*Cells(values["memory"]._repr_html_()).rows, *directions]
    assert Cells(values["handle"]._repr_html_()).rows[0] == ["layer", "moved", "share of what moved"]
    assert Cells(Memory.empty()._repr_html_()).rows == []
    assert "Memory(empty)" in Memory.empty()._repr_html_()


def test_a_tied_weight_is_two_matrices_and_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 5)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.table(tokens) @ self.table.weight.T

    model = Tied()
    factors = memsyn.measure(model, [torch.tensor([[1, 2], [3, 4]])], estimator="kronecker", progress=False)
    memory = Memory.empty().consolidate(model, factors)
    for value in (factors, memory, memory.directions):
        assert re.search(r"2 matrices, 0 other parameters, 35 weights", repr(value)), repr(value)


def test_a_table_shows_the_thirty_largest_layers_and_counts_the_others() -> None:
    sums = {f"block{index}.weight": torch.full((10,), float(index)) for index in range(100)}
    rows = Cells(memsyn.Importance(sums, 1)._repr_html_()).rows
    assert [row[0] for row in rows[1:-1]] == [f"block{index}" for index in range(70, 100)]
    assert rows[-1] == ["70 more layers, with a smaller share each"]


def test_a_table_of_a_projection_shows_the_layers_with_the_least_room() -> None:
    room = {f"block{index}": index / 100 for index in range(40)}
    layers = {"norm": 0.9, **dict.fromkeys(room, 0.5)}
    report = memsyn.Report(0.0, 0.0, layers, 0.5, room, form="projected", strength=10.0, num_weights=9)
    rows = Cells(report._repr_html_()).rows
    assert rows[:2] == [["layer", "taken away", "room"], ["block0", "50.0%", "0.0%"]]
    assert [row[0] for row in rows[1:-1]] == [f"block{index}" for index in range(30)]
    assert rows[-1] == ["11 more layers, without matrices or with more room each"]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>.weight", '"><img src=x onerror=alert(1)>.weight',
                                  "\x1b[31m\u202ered.weight", "n" * 100_000])  # fmt: skip
def test_names_are_shown_as_text(name: str) -> None:
    """They may come from the file of a stranger."""
    memory = Memory({name: torch.zeros(2)}, {name: torch.ones(2)})
    model = nn.Module()
    report = memsyn.Report(0.5, 1.0, {name.rpartition(".")[0] or name: 1.0}, 0.5, form="proximal", num_weights=2)
    for text in (memory._repr_html_(), report._repr_html_()):
        page = Cells(text)
        assert page.tags <= {"div", "table", "thead", "tbody", "tr", "th", "td", "br"}
        assert {key for key, _ in page.attributes} <= {"style", "colspan", "scope"}
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)
        assert len(text) < 5_000
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", str(report))
    assert len(str(report)) < 1_000
    del model


def test_a_page_needs_nothing_from_elsewhere(values: dict[str, Any]) -> None:
    for value in values.values():
        if hasattr(value, "_repr_html_"):
            text = value._repr_html_()
            assert not re.search(r"https?:|src=|url\(|@import|<link|<script|class=|id=", text)
            assert html.unescape(text).isprintable() or "\n" in text


def test_what_is_very_large_is_not_summed_up_for_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memsyn.values.importance.SUMMED", 10)
    found = memsyn.Importance({"a.weight": torch.ones(11)}, 1)._repr_html_()
    assert Cells(found).rows == []
    assert "summary() has the layers" in found


def trained(memory: Memory, strength: Any, steps: int = 3, **options: Any) -> tuple[memsyn.Protection, nn.Module, Any]:
    model = a_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = memsyn.protect(optimizer, model, memory, strength=strength, **options)
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
    return handle, model, optimizer


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_a_report_of_a_penalty_in_words(values: dict[str, Any], form: str) -> None:
    handle, _, _ = trained(values["memory"], 0.01, form=form)
    report = handle.report()
    unknown, first, second, third, fourth = str(report).splitlines()
    assert unknown.startswith(
        "How far outputs on the remembered data have changed is not known: the memory holds no dir"
    )
    assert first == f"Protected: 845 weights, by the {form} form at strength 0.01."
    assert second == (
        f"Held: {report.held:.1%}. A step pulls these weights back by more than half of their distance to the anchor. "
        f"The other {1 - report.held:.1%} have room to move."
    )
    assert third == (
        f"Moved: the penalty is {report.penalty:.3g}. To first order, the mean squared output norm on the measured "
        f"data has changed by at most {report.bound:.3g}."
    )
    shares = sorted(((value / report.bound, name) for name, value in report.layers.items()), reverse=True)
    assert fourth == f"Moved most: {', '.join(f'{name} ({share:.1%})' for share, name in shares)}."
    assert report.strength == 0.01


def test_a_report_names_three_layers_and_counts_the_others() -> None:
    layers = {f"block{index}": float(index) for index in range(10)}
    report = memsyn.Report(1.0, 45.0, layers, 0.25, form="gradient", strength=1.0, num_weights=10)
    assert str(report).splitlines()[-1] == (
        "Moved most: block9 (20.0%), block8 (17.8%), block7 (15.6%) and 7 more layers."
    )


def test_a_report_says_what_is_not_known_and_what_is_not_protected() -> None:
    report = memsyn.Report(
        1.0, 2.0, {"0": 2.0}, math.nan, moved_statistics=2, form="gradient", strength=1.0, num_weights=9
    )
    lines = str(report).splitlines()
    assert lines[1] == "Held: not known. How far a step moves these weights is not known."
    assert lines[-1] == (
        "Not protected: 2 statistics, such as running means. Their values are not those that the memory remembers, and "
        "the outputs on old data have changed with them."
    )
    assert "2 moved statistics" in repr(report)


def test_a_report_before_anything_has_moved(values: dict[str, Any]) -> None:
    handle, _, _ = trained(values["memory"], 0.01, steps=0)
    assert str(handle.report()).splitlines()[-1] == "Moved: nothing. All weights stand at the anchor."


def test_a_report_of_a_projection_in_words(values: dict[str, Any]) -> None:
    memory = replace(values["memory of both"])
    handle, _, _ = trained(memory, 10.0, steps=0)
    change, first, second, third = str(handle.report()).splitlines()
    assert change == f"{PREDICTED} to be as they were: no remembered weight has moved."
    assert first == "Protected: 845 weights, by the projected form at strength 10."
    assert second == "Taken away: nothing so far. No step has been projected yet."
    handle, _, _ = trained(memory, 10.0)
    handle.flush()
    report = handle.report()
    change, first, second, third = str(report).splitlines()
    assert change.startswith(f"{PREDICTED} to have changed by {report.change:.1%}, most by ")
    most = sorted(((share, name) for name, share in report.layers.items()), reverse=True)
    assert second == (
        f"Taken away: {report.held:.1%} of the last change; most in "
        f"{', '.join(f'{name} ({share:.1%})' for share, name in most)}."
    )
    assert third == (
        f"Room: more than half of a step remains in {min(report.room.values()):.1%} "
        f"({min(report.room, key=report.room.__getitem__)}) to {max(report.room.values()):.1%} "
        f"({max(report.room, key=report.room.__getitem__)}) of the directions of a layer."
    )


def test_a_report_says_when_nothing_is_protected(values: dict[str, Any]) -> None:
    for memory in (values["memory"], replace(values["memory of both"])):
        handle, model, optimizer = trained(memory, 0.0)
        assert str(handle.report()).splitlines()[1:] == ["Nothing is protected: the strength is 0."]
        assert "Nothing is protected" in handle._repr_html_()
        handle.remove()
        handle = memsyn.protect(optimizer, model, memory)
        assert str(handle.report()).splitlines()[1].startswith("Protected: 845 weights")
        handle.remove()
        says = "Nothing is protected: protection was removed, or the optimizer holds no weight that has importance."
        assert str(handle.report()).splitlines()[1:] == [says]
        handle = memsyn.protect(optimizer, model, memory)
        optimizer.param_groups.clear()
        assert str(handle.report()).splitlines()[1:] == [says]
    weights = {name: torch.zeros_like(value) for name, value in values["memory"].importance.items()}
    handle, _, _ = trained(Memory(values["memory"].anchor, weights), 1.0)
    assert str(handle.report()).splitlines()[1:] == [says]


def test_the_counts_of_an_observer(tmp_path: Any) -> None:
    with memsyn.Observer(a_model(), tmp_path / "it.safetensors", rate=1.0, min_samples=1) as observer:
        observer.observe(torch.randn(3, 20))
        assert observer.flush()
        stats = observer.stats()
    assert repr(stats).startswith("Stats(3 seen, 3 sampled, 3 measured, 1 version of the weights, ")
    failed = replace(stats, dropped=2, errors=1, last_error="RuntimeError: " + "x" * 1_000)
    assert "2 dropped, " in repr(failed)
    assert "1 error, the last: RuntimeError: xxx" in repr(failed)
    assert len(repr(failed)) < 300
    rows = Cells(replace(failed, last_error="<b>")._repr_html_()).rows
    assert rows[:3] == [["count", "value"], ["seen", "3"], ["sampled", "3"]]
    assert ["last_error", "<b>"] in rows
    assert len(rows) == 18


def test_a_copy_is_shown_alike(values: dict[str, Any]) -> None:
    for name in ("importance", "factors", "memory", "directions"):
        assert repr(copy.deepcopy(values[name])) == repr(values[name])
    assert isinstance(values["directions"], Directions)
