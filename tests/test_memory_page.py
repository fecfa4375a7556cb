"""The pages of memories, as values: their numbers, and that the options that write them do, or say why not."""

import json
import math
import re
import sys

import pytest
import torch
from plotly import graph_objects
from safetensors.torch import save_file
from torch import nn

from memsyn import Importance, Memory, MismatchError
from memsyn.report.memory_page import difference_page, memory_page
from memsyn.report.names import inert, json_in_html, shortened
from memsyn.report.parts import MOST_ROWS, Table, number_cell, plain_number, share_text
from memsyn.values.display import printable
from tests.commands import call

MOVED = "What moved since the anchor"


def make(values=(4.0, 1.0, 3.0, 2.0), label=None, anchor=1.0):
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(anchor)
    sums = {"0.weight": torch.tensor([values[:2]]), "1.weight": torch.tensor(values[2:])[:, None]}
    return Memory.empty().consolidate(model, Importance(sums, 1), label=label)


def cells(table):
    return [[cell.text for cell in row] for row in table.rows]


def tables(page):
    sections = (*page.sections, *page.behind)
    return {s.heading: [part for part in s.parts if isinstance(part, Table)] for s in sections}


def chart(page, name):
    return next(chart for chart in page.charts() if chart.name == name)


def section(page, heading):
    return next(own for own in (*page.sections, *page.behind) if own.heading == heading)


def test_the_page_of_a_memory_says_what_it_holds():
    page = memory_page(make(label="faces"), "m")
    assert page.judgement.answer == "Ready"
    assert page.headline == page.judgement.headline == "This memory can judge a new model on inputs without labels."
    assert (page.judgement.number, page.judgement.meaning) == ("50.0%", "of the weights hold half of the importance")
    assert [bar.length for bar in page.judgement.bars] == [0.5, 0.5]
    assert page.lead == "Memory of 4 weights, measured on 1 sample."
    (tree,) = section(page, "Where the importance is").parts
    assert tree.title == "0 holds 50.0% of all importance"
    assert [(row.name, row.text, row.level) for row in tree.branches] == [("0", "50.0%", 4), ("1", "50.0%", 4)]
    assert [own.heading for own in page.behind] == [
        "Layers", "How the importance is spread", "The most important units", "Consolidations",
    ]  # fmt: skip
    assert section(page, "Layers").parts[0] == "Measured: abs of squared_l2_norm."
    # 4 1 | 3 2: the average weight of all has 2.5
    assert cells(tables(page)["Layers"][0]) == [
        ["0", "2", "50.0%", "1", "1.6", "80.0%"],
        ["1", "2", "50.0%", "1", "1.2", "60.0%"],
    ]
    (entry,) = cells(tables(page)["Consolidations"][0])
    assert entry[1:5] == ["1", "sum", "faces", "abs of squared_l2_norm"]
    assert chart(page, "units").figure["data"][0]["x"] == pytest.approx([50.0, 30.0, 20.0])
    assert cells(chart(page, "lorenz").table) == [["all weights", "0.250", "50.0%", "70.0%", "16.0%", "1.6%"]]


def test_an_importance_has_a_page_and_an_empty_memory_too():
    page = memory_page(Importance({"a.weight": torch.ones(2, 2)}, 7), "i")
    assert page.lead == "Importance of 4 weights, measured on 7 samples."
    assert page.judgement.answer == "Not yet a memory"
    assert page.headline == "This file holds a measured importance: a memory is made from it."
    assert "Consolidations" not in tables(page)
    empty = memory_page(Memory.empty(), "e")
    assert (empty.judgement.answer, empty.headline, empty.charts()) == ("Empty", "Nothing is remembered yet.", [])
    assert empty.sections == []


def test_what_moved_since_the_anchor():
    weights = {"0.weight": torch.tensor([[1.0, 4.0]]), "1.weight": torch.ones(2, 1)}
    found = chart(memory_page(make(), "m", weights), "moved")
    assert cells(found.table) == [["0", "3", f"{100 * 3 / math.sqrt(2):.3g}"], ["1", "0", "0"]]
    assert "farthest off in 0: 212.1%" in found.title
    page = memory_page(make(), "m", {"0.weight": torch.ones(1, 2)})
    assert "Not among the weights, and left out: 1.weight." in section(page, MOVED).parts
    with pytest.raises(
        MismatchError, match=r"0\.weight is missing, for example\. Give the state_dict of the same model"
    ):
        memory_page(make(), "m", {"other": torch.ones(1)})


def test_weights_of_another_shape_are_left_out_and_named():
    page = memory_page(make(), "m", {"0.weight": torch.ones(1, 3), "1.weight": torch.full((2, 1), 3.0)})
    assert "Of another shape, and left out: 0.weight." in section(page, MOVED).parts
    assert cells(chart(page, "moved").table) == [["1", f"{8**0.5:.3g}", "200"]]


def test_a_layer_is_compared_by_those_of_its_parameters_that_are_there():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(5.0)
    sums = {"0.weight": torch.ones(1, 2), "0.bias": torch.ones(1)}
    memory = Memory.empty().consolidate(nn.Sequential(model), Importance(sums, 1))
    page = memory_page(memory, "m", {"0.weight": torch.full((1, 2), 3.0)})
    assert cells(chart(page, "moved").table) == [["0", f"{8**0.5:.3g}", "200"]]
    assert "Not among the weights, and left out: 0.bias." in section(page, MOVED).parts


def test_nothing_is_compared_with_an_empty_memory():
    page = memory_page(Memory.empty(), "m", {"0.weight": torch.ones(1)})
    assert page.judgement.answer == "Cannot say"
    assert page.sections[0].parts == ["The memory does not hold what would tell where the change matters."]
    assert MOVED not in tables(page)


def test_changes_count_where_they_matter():
    weights = {"0.weight": torch.tensor([[1.0, 4.0]]), "1.weight": torch.tensor([[0.0], [1.0]])}
    page = memory_page(make(), "m", weights)  # 1 * 3 and 3 * 1 of 6
    (tree,) = section(page, "Where the change is").parts
    assert tree.title == "50.0% of the change that matters is in 0"
    assert [(row.name, row.text) for row in tree.branches] == [("0", "50.0%"), ("1", "50.0%")]
    same = memory_page(make(), "m", {"0.weight": torch.ones(1, 2), "1.weight": torch.ones(2, 1)})
    assert same.sections[0].parts == ["No weight that matters has changed."]


def test_two_memories_side_by_side():
    # Shares 4 1 3 2 of 10, and 1 1 4 4 of 10: 3 of 10 leave the first weight, and 1 + 2 reach the others.
    page = difference_page(make(), make((1.0, 1.0, 4.0, 4.0), anchor=2.0), ("a", "b"))
    assert (page.judgement.answer, page.judgement.number) == ("Large difference", "30.0%")
    assert page.headline == "B protects partly other weights than A."
    assert page.judgement.steps == ["Rank correlation of the weights (Spearman): 0.000; 1 is the same order."]
    assert [(bar.text, bar.length) for bar in page.judgement.bars] == [
        ("100%", 1.0), ("70.0% on the same weights", pytest.approx(0.7)),
    ]  # fmt: skip
    assert page.judgement.mark[0] == 0.85
    assert page.judgement.rule == (
        "Same means: at most 5% moved, and a rank correlation of at least 0.95. Small means: at most 15%, and at least "
        "0.9."
    )
    (tree,) = section(page, "Where the importance moved").parts
    assert [(row.name, row.text) for row in tree.branches] == [("0", "15.0%"), ("1", "15.0%")]
    assert cells(tables(page)["Layers"][0]) == [
        ["0", "50.0%", "20.0%", "-30.0", "15.0%", "0.4"],
        ["1", "50.0%", "80.0%", "+30.0", "15.0%", "1.6"],
    ]
    assert [row[2] for row in cells(chart(page, "moved").table)] == ["100", "100"]
    assert chart(page, "shares").title == "The share of 1 goes from 50.0% to 80.0%"
    empty = difference_page(Memory.empty(), make(), ("a", "b"))
    assert (empty.judgement.answer, empty.judgement.tone) == ("Cannot say", "unknown")
    same = difference_page(make(), make(), ("a", "b"))
    assert same.headline == "A and B hold the same, bit for bit."
    assert (same.judgement.answer, same.sections) == ("Same", [])


def test_other_quantities_are_said():
    one = Importance({"a.weight": torch.tensor([1.0, 2.0])}, 1)
    other = Importance({"a.weight": torch.tensor([1.0, 2.0])}, 1, magnitude="square")
    page = difference_page(one, other, ("a", "b"))
    assert page.judgement.steps[-1] == "A and B were measured in different ways, so a difference was to be expected."


def test_charts_show_the_layers_with_most_and_tables_all():
    memory = Importance({f"l{n}.w": torch.full((2,), float(n)) for n in range(MOST_ROWS + 5)}, 1)
    page = difference_page(memory, Importance({**memory.sums, "l0.w": torch.ones(2)}, 1), ("a", "b"))
    assert len(tables(page)["Layers"][0].rows) == MOST_ROWS + 5
    assert [row[0] for row in cells(chart(page, "shares").table)] == [f"l{n}" for n in range(5, MOST_ROWS + 5)]


def test_no_number_has_an_exponent():
    memory = make((4e-9, 1e-12, 3e7, 2.0))
    for page in (memory_page(memory, "m"), difference_page(memory, make(), ("a", "b"))):
        written = [cell for own in tables(page).values() for table in own for row in cells(table) for cell in row]
        written += [cell for one in page.charts() for row in cells(one.table) for cell in row]
        assert not [cell for cell in written if re.search(r"\de[+-]?\d", cell)]
        assert not any(axis.get("exponentformat") for one in page.charts() for axis in one.figure["layout"].values()
                       if isinstance(axis, dict))  # fmt: skip


def test_every_chart_is_one_of_plotlys_with_units_and_numbers():
    charts = memory_page(make(), "m", {"0.weight": torch.ones(1, 2)}).charts()
    charts += difference_page(make(), make((1.0, 1.0, 4.0, 4.0)), ("a", "b")).charts()
    for one in charts:
        graph_objects.Figure(one.figure)  # raises for what Plotly does not know
        assert one.title
        assert all(one.figure["layout"][which]["title"]["text"] for which in ("xaxis", "yaxis"))
        assert one.table.rows
        assert json.loads(json_in_html(one.figure)) == one.figure


def test_names_are_made_harmless():
    assert printable("a\x1b[31m\u202eb\n") == "a\\x1b[31m\\u202eb\\n"
    assert inert("<b>&</b>") == "&lt;b&gt;&amp;&lt;/b&gt;"
    assert json_in_html({"a": "</script>&"}) == '{"a":"\\u003c/script\\u003e\\u0026"}'
    assert shortened("x" * 24) == "x" * 24
    assert shortened("encoder.layer.11.attention.query") == "encoder.lay…tention.query"[:11] + "…" + "ention.query"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (5160.4, "5,160"), (0.05441, "0.0544"), (1.0, "1"), (12.3456, "12.3"), (-0.25, "-0.25"),
        (1e-9, "less than 0.0001"), (-1e-9, "above -0.0001"), (3.98e12, "3,980,000,000,000"), (1e-4, "0.0001"),
        (math.inf, "not finite"), (0.9996, "1"),
    ],
)  # fmt: skip
def test_numbers_are_written_out(value, text):
    assert plain_number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0%"), (1.0, "100%"), (0.012, "1.2%"), (0.0004, "less than 0.1%"), (0.0005, "0.1%"),
        (0.9996, "over 99.9%"), (0.9994, "99.9%"), (1.408, "140.8%"), (12.4, "12 times"), (2e7, "over a million times"),
        (math.inf, "any amount"),
    ],
)  # fmt: skip
def test_shares_are_written_for_people(share, text):
    assert share_text(share) == text


def test_a_cell_is_sorted_by_the_number_it_starts_with():
    found = {
        text: number_cell(text).value for text in ("+7.5 ± 1.2", "-0.3", "1,234", "1.5e+03", "0.1: 97.0", "–", "mas")
    }
    assert found == {
        "+7.5 ± 1.2": 7.5, "-0.3": -0.3, "1,234": 1234.0, "1.5e+03": 1500.0, "0.1: 97.0": 0.1, "–": None, "mas": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"), [("12 B", 12.0), ("850.0 kB", 850e3), ("1.2 MB", 1.2e6), ("2.0 GB", 2e9), ("3 Bs", 3.0)]
)
def test_a_cell_of_bytes_is_sorted_by_their_number(text, value):
    assert number_cell(text).value == pytest.approx(value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make().save("a")
    make((1.0, 1.0, 4.0, 4.0)).save("b")
    return tmp_path


def test_the_options_write_pages_and_pictures(folder):
    torch.save({"module.0.weight": torch.ones(1, 2), "1.weight": torch.full((2, 1), 3.0)}, "w.pt")
    save_file({"0.weight": torch.ones(1, 2), "1.weight": torch.full((2, 1), 3.0)}, "w.safetensors")
    call("inspect", "a", "--png", "png", "--weights", "w.pt")
    call("inspect", "a", "--html", "a.html", "--weights", "w.safetensors")
    assert "farthest off in 1: 200.0%" in (folder / "a.html").read_text()
    pictures = sorted(path.name for path in (folder / "png").iterdir())
    assert pictures == [f"{n}.png" for n in ("lorenz", "moved", "units")]
    assert all((folder / "png" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    result = call("diff", "a", "b", "--html", "d.html", "--json", code=1)
    assert json.loads(result.stdout)["same"] is False
    assert "B protects partly other weights than A." in (folder / "d.html").read_text()


def test_what_cannot_be_written_or_read_says_so(folder):
    said = call("inspect", "a", "--html", "nowhere/a.html", code=1).stderr
    assert "nowhere/a.html cannot be written: No such file or directory. Name another file." in " ".join(said.split())
    assert "a cannot be written" in call("inspect", "a", "--png", "a", code=1).stderr
    assert "--weights needs a memory file" in call("inspect", "a", "--weights", "b", code=1).stderr
    said = call("inspect", "a", "--html", "a.html", "--weights", "c.safetensors", code=1).stderr
    assert "c.safetensors does not exist" in said


def test_a_page_replaces_no_file_but_a_page(folder):
    before = (folder / "a").read_bytes()
    said = call("inspect", "a", "--html", "a", code=1).stderr
    assert "a exists and is not an HTML page; it was not replaced. Name another file." in " ".join(said.split())
    assert (folder / "a").read_bytes() == before
    call("inspect", "a", "--html", "a.html")
    call("inspect", "b", "--html", "a.html")
    (folder / "empty").touch()
    call("inspect", "b", "--html", "empty")
    assert (folder / "empty").read_bytes() == (folder / "a.html").read_bytes()


@pytest.mark.parametrize(("option", "package"), [("--html", "plotly"), ("--html", "jinja2"), ("--png", "matplotlib")])
def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch, option, package):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    said = call("inspect", "a", option, "out", code=1).stderr
    assert f"this needs {package}: pip install 'memsyn[report]'." in said
