"""The parts of a page about directions: their numbers, and which charts there are."""

import json

from plotly import graph_objects

from memsyn import Importance, Memory
from memsyn.report.directions_sections import ROOM_NOTE, room_changes, room_headline, room_parts
from memsyn.report.memory_page import MOST_ROWS, difference_page, memory_page
from memsyn.report.names import json_in_html
from memsyn.report.parts import Chart, Table
from memsyn.values.comparison import DirectionsChange
from memsyn.values.directions import Directions, DirectionsSummary
from tests import kronecker
from tests.test_memory_page import cells, chart, tables


def beside_an_importance():
    model = kronecker.model()
    sums = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return kronecker.memory(0).consolidate(model, Importance(sums, 1))


def test_a_memory_of_directions_has_a_page_of_its_room():
    page = memory_page(kronecker.memory(0, 1), "m")
    assert page.headline == "The least room is left in 1: 0% of its directions. The most is left in 0: 33%."
    assert page.lead == (
        "Memory of 8 weights in 2 matrices, measured on 8 samples: second moments of inputs and output gradients of "
        "signed_outputs."
    )
    assert [section.heading for section in page.sections] == ["Room that is left", "Consolidations"]
    assert page.sections[0].parts[0] == ROOM_NOTE
    assert "at the default strength of a projection, 10;" in ROOM_NOTE
    assert cells(tables(page)["Room that is left"][0]) == [
        ["0", "3", "2", "3", "2", "33.3", "2", "16", "8"],
        ["1", "2", "1", "2", "1", "0.0", "2", "8", "8"],
    ]
    room = chart(page, "room")
    assert room.title == "1 has the least room left: 0% of its directions"
    assert [round(length) for length in room.figure["data"][0]["x"]] == [33, 0]
    assert page.sections[0].parts[-2:] == [
        "No matrices, and kept as squared gradients: 2.weight.",
        "Measured, but no output relied on them: 2.bias.",
    ]
    assert [row[3] for row in cells(tables(page)["Consolidations"][0])] == ["task 0", "task 1"]


def test_a_memory_with_an_importance_too_has_both():
    page = memory_page(beside_an_importance(), "m")
    headings = [section.heading for section in page.sections]
    assert headings[0] == "Layers"
    assert headings[-2:] == ["Room that is left", "Consolidations"]
    assert page.headline.endswith("of it lies in 0.")
    weights = {name: parameter.detach() for name, parameter in kronecker.model().named_parameters()}
    assert "What moved since the anchor" in tables(memory_page(beside_an_importance(), "m", weights))


def test_factors_have_a_page_of_what_they_fill():
    page = memory_page(kronecker.factors(), "f")
    assert page.lead.startswith("Factors of 8 weights in 2 matrices, measured on 4 samples: second moments")
    assert cells(tables(page)["Layers"][0]) == [
        ["0", "3", "1.0", "0.0", "2", "2.0", "0.0"],
        ["1", "2", "1.6", "0.0", "1", "1.0", "0.0"],
    ]
    assert page.sections[1].parts[0] == "This is the room that a memory of these factors alone leaves."
    rows = cells(tables(memory_page(kronecker.factors(outputs=False), "f"))["Layers"][0])
    assert [row[-2:] for row in rows] == [["", ""], ["", ""]]


def test_rooms_side_by_side():
    page = difference_page(kronecker.memory(0), kronecker.memory(0, 1), ("a", "b"))
    assert page.headline == "The room of 0 goes from 66.7% to 33.3%."
    assert "A: a, memory on 4 samples: second moments of inputs" in page.lead
    assert cells(tables(page)["Room that is left"][0]) == [
        ["0", "66.7", "33.3", "0.707", "1.000"],
        ["1", "0.0", "0.0", "1.000", "1.000"],
    ]
    assert [section.heading for section in page.sections] == [
        "Room that is left", "Consolidations of A", "Consolidations of B",
    ]  # fmt: skip
    assert [one.name for one in page.charts()] == ["rooms"]
    page = difference_page(beside_an_importance(), Memory.empty(), ("a", "b"))
    assert chart(page, "rooms").title == "No layer is in both"
    assert cells(tables(page)["Room that is left"][0])[0] == ["0", "66.7", "", "", ""]
    assert "Layers" in tables(page)
    same = difference_page(kronecker.factors(), kronecker.factors(), ("a", "b"))
    assert same.headline == "A and B hold the same, bit for bit."


def test_what_is_not_there_is_said():
    assert room_parts(Directions(free=frozenset({"w"}))) == [
        "No weight matrix has directions yet.",
        "Measured, but no output relied on them: w.",
    ]
    assert room_headline([]) == "Nothing in it is important yet."
    one = DirectionsSummary("a", 4, 2, 2, 2, 2, 0.25, 1.0, 8, 4)
    assert room_headline([one]) == "25% of the directions of a have room left."


def test_charts_show_the_layers_with_the_least_room_and_tables_all():
    changes = [DirectionsChange(f"l{n}", n / 100, n / 100, 1.0, 1.0) for n in range(MOST_ROWS + 5)]
    parts = room_changes(changes)
    assert "The chart shows the 40 layers with the least room; 5 are left out." in parts
    (shown,) = (part for part in parts if isinstance(part, Chart))
    assert [row[0] for row in cells(shown.table)] == [f"l{n}" for n in range(MOST_ROWS)]
    (whole,) = (part for part in parts if isinstance(part, Table))
    assert len(whole.rows) == MOST_ROWS + 5


def test_every_chart_is_one_of_plotlys():
    for page in (
        memory_page(kronecker.memory(0, 1), "m"),
        difference_page(kronecker.memory(0), beside_an_importance(), ("a", "b")),
    ):
        for one in page.charts():
            graph_objects.Figure(one.figure)
            assert all(one.figure["layout"][which]["title"]["text"] for which in ("xaxis", "yaxis"))
            assert json.loads(json_in_html(one.figure)) == one.figure
