"""The pages of memories, as values: their numbers, and that the options that write them do, or say why not."""

import json
import math
import sys

import pytest
import torch
from plotly import graph_objects
from safetensors.torch import save_file
from torch import nn

from memsyn import Importance, Memory, MismatchError
from memsyn.report.memory_page import MOST_ROWS, difference_page, memory_page
from memsyn.report.names import inert, json_in_html, shortened
from memsyn.report.parts import Table, number_cell
from memsyn.values.display import printable
from tests.commands import call


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
    return {s.heading: [part for part in s.parts if isinstance(part, Table)] for s in page.sections}


def chart(page, name):
    return next(chart for chart in page.charts() if chart.name == name)


def test_the_page_of_a_memory_says_what_it_holds():
    page = memory_page(make(label="faces"), "m")
    assert page.headline == "50.0% of the weights hold half of the importance; 50% of it lies in 0."
    assert page.lead == "Memory of 4 weights in 2 layers, measured on 1 samples: abs of squared_l2_norm."
    assert cells(tables(page)["Layers"][0]) == [
        ["0", "2", "50.0", "2.5", "4", "80.0"],
        ["1", "2", "50.0", "2.5", "3", "60.0"],
    ]
    (entry,) = cells(tables(page)["Consolidations"][0])
    assert entry[1:5] == ["1", "sum", "faces", "abs of squared_l2_norm"]
    assert chart(page, "units").figure["data"][0]["x"] == pytest.approx([50.0, 30.0, 20.0])
    assert cells(chart(page, "lorenz").table) == [["all weights", "0.250", "50.00", "70.0", "16.0", "1.6"]]


def test_an_importance_has_a_page_and_an_empty_memory_too():
    page = memory_page(Importance({"a.weight": torch.ones(2, 2)}, 7), "i")
    assert page.lead.startswith("Importance of 4 weights in 1 layers, measured on 7 samples")
    assert "Consolidations" not in tables(page)
    empty = memory_page(Memory.empty(), "e")
    assert (empty.headline, empty.charts()) == ("Nothing in it is important yet.", [])


def test_what_moved_since_the_anchor():
    weights = {"0.weight": torch.tensor([[1.0, 4.0]]), "1.weight": torch.ones(2, 1)}
    found = chart(memory_page(make(), "m", weights), "moved")
    assert cells(found.table) == [["0", "3", f"{100 * 3 / math.sqrt(2):.3g}"], ["1", "0", "0"]]
    assert "farthest off in 0: 212.1%" in found.title
    page = memory_page(make(), "m", {"0.weight": torch.ones(1, 2)})
    assert "Not among the weights, and left out: 1.weight." in page.sections[3].parts
    with pytest.raises(
        MismatchError, match=r"0\.weight is missing, for example\. Give the state_dict of the same model"
    ):
        memory_page(make(), "m", {"other": torch.ones(1)})


def test_weights_of_another_shape_are_left_out_and_named():
    page = memory_page(make(), "m", {"0.weight": torch.ones(1, 3), "1.weight": torch.full((2, 1), 3.0)})
    assert "Of another shape, and left out: 0.weight." in page.sections[3].parts
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
    assert "Not among the weights, and left out: 0.bias." in page.sections[3].parts


def test_nothing_is_compared_with_an_empty_memory():
    page = memory_page(Memory.empty(), "m", {"0.weight": torch.ones(1)})
    assert page.sections[3].parts == ["There is nothing to compare."]


def test_a_layer_without_weights_is_empty_in_every_chart():
    page = memory_page(Importance({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(0, 5)}, 1), "m")
    assert chart(page, "histogram").figure["data"][0]["z"][-1] == [0.0]


@pytest.mark.parametrize(
    ("values", "span"), [((2.0, 2e-3, 0, 0), "3"), ((2.0, 2.0, 2e-3, 2e-4), "1"), ((2.0, 5.0, 2.0, 2.0), "0.5")]
)
def test_the_histogram_says_how_far_apart_the_classes_are(values, span):
    assert f"lie up to {span} powers of ten apart" in chart(memory_page(make(values), "m"), "histogram").title


def test_two_memories_side_by_side():
    page = difference_page(make(), make((1.0, 1.0, 4.0, 4.0), anchor=2.0), ("a", "b"))
    assert page.headline == "From A to B the importance shifts most in 1: +30.0 points of its share."
    assert cells(tables(page)["Layers"][0]) == [
        ["0", "50.0", "20.0", "-30.0", "5", "2"],
        ["1", "50.0", "80.0", "+30.0", "5", "8"],
    ]
    assert [row[2] for row in cells(chart(page, "moved").table)] == ["100", "100"]
    assert chart(page, "units B").title.startswith("B: The 3 most important units hold 100.0%")
    assert {one.name for one in page.charts()} >= {"histogram A", "histogram B", "units A", "units B", "lorenz"}
    empty = difference_page(Memory.empty(), make(), ("a", "b"))
    assert {one.name for one in empty.charts()} >= {"histogram B", "units B"}
    same = difference_page(make(), make(), ("a", "b"))
    assert same.headline == "A and B hold the same, bit for bit."


def test_charts_show_the_layers_with_most_and_tables_all():
    memory = Importance({f"l{n}.w": torch.full((2,), float(n)) for n in range(MOST_ROWS + 5)}, 1)
    page = memory_page(memory, "m")
    assert len(tables(page)["Layers"][0].rows) == MOST_ROWS + 5
    shares = chart(page, "layers-share")
    assert [row[0] for row in cells(shares.table)] == [f"l{n}" for n in range(5, MOST_ROWS + 5)]
    assert f"The charts show the {MOST_ROWS} layers with the largest share; 5 are left out." in page.sections[0].parts


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
    assert pictures == [f"{n}.png" for n in ("histogram", "layers-share", "layers-size", "lorenz", "moved", "units")]
    assert all((folder / "png" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    result = call("diff", "a", "b", "--html", "d.html", "--json", code=1)
    assert json.loads(result.stdout)["same"] is False
    assert "shifts most in 1" in (folder / "d.html").read_text()


def test_what_cannot_be_written_or_read_says_so(folder):
    said = call("inspect", "a", "--html", "nowhere/a.html", code=1).stderr
    assert "nowhere/a.html cannot be written: No such file or directory. Name another file." in " ".join(said.split())
    assert "a cannot be written" in call("inspect", "a", "--png", "a", code=1).stderr
    assert "--weights needs a memory file" in call("inspect", "a", "--weights", "b", code=1).stderr
    said = call("inspect", "a", "--html", "a.html", "--weights", "c.safetensors", code=1).stderr
    assert "c.safetensors could not be read" in said


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
