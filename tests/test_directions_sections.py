"""The parts of a page about directions: their numbers, and which charts there are."""

import json

from plotly import graph_objects

from memsyn import Importance, Memory
from memsyn.report.directions_sections import ROOM_NOTE, overlap_tree, room_changes, room_parts, room_tree
from memsyn.report.memory_page import difference_page, memory_page
from memsyn.report.names import json_in_html
from memsyn.report.parts import MOST_ROWS, Chart, Table
from memsyn.values.comparison import DirectionsChange
from memsyn.values.directions import Directions, DirectionsSummary
from tests import kronecker
from tests.test_memory_page import MOVED, cells, chart, section, tables


def beside_an_importance():
    model = kronecker.model()
    sums = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return kronecker.memory(0).consolidate(model, Importance(sums, 1))


def test_a_memory_of_directions_has_a_page_of_its_room():
    page = memory_page(kronecker.memory(0, 1), "m")
    assert (page.judgement.answer, page.judgement.tone) == ("Ready", "warning")
    assert page.headline == "This memory can judge a new model if the old weights are given too."
    # A third of 6 weights, and nothing of 2.
    assert (page.judgement.number, page.judgement.meaning) == ("25.0%", "of the room to learn something new is free")
    assert [bar.length for bar in page.judgement.bars] == [0.25, 0.75]
    assert page.lead == "Memory of 8 weights, measured on 8 samples."
    (tree,) = section(page, "Where the room is").parts
    assert tree.title == "1 has the least room left: 0%"
    assert [(row.name, row.text, row.level) for row in tree.branches] == [("0", "66.7%", 4), ("1", "100%", 4)]
    assert [own.heading for own in page.behind] == ["Room that is left", "Consolidations"]
    parts = section(page, "Room that is left").parts
    assert parts[0] == ROOM_NOTE
    assert "at the default strength of a projection, 10;" in ROOM_NOTE
    assert cells(tables(page)["Room that is left"][0]) == [
        ["0", "3", "2", "3", "2", "33.3", "2", "16", "8"],
        ["1", "2", "1", "2", "1", "0.0", "2", "8", "8"],
    ]
    room = chart(page, "room")
    assert room.title == "1 has the least room left: 0% of its directions"
    assert [round(length) for length in room.figure["data"][0]["x"]] == [33, 0]
    assert parts[-2:] == [
        "No matrices, and kept as squared gradients: 2.weight.",
        "Measured, but no output relied on them: 2.bias.",
    ]
    assert [row[3] for row in cells(tables(page)["Consolidations"][0])] == ["task 0", "task 1"]


def test_a_block_has_the_mean_room_of_its_weights():
    one = DirectionsSummary("a.x", 6, 2, 2, 2, 2, 0.25, 1.0, 8, 4)
    other = DirectionsSummary("a.y", 2, 2, 2, 2, 2, 1.0, 1.0, 8, 4)
    (row,) = room_tree([one, other]).branches
    assert (row.name, row.text) == ("a", f"{100 * (6 * 0.75 + 2 * 0) / 8:.1f}%")


def test_a_memory_with_an_importance_too_has_both():
    page = memory_page(beside_an_importance(), "m")
    headings = [own.heading for own in page.behind]
    assert headings[0] == "Layers"
    assert headings[-2:] == ["Room that is left", "Consolidations"]
    assert page.judgement.meaning == "of the weights hold half of the importance"
    weights = {name: parameter.detach() for name, parameter in kronecker.model().named_parameters()}
    assert MOVED in tables(memory_page(beside_an_importance(), "m", weights))


def test_factors_have_a_page_of_what_they_fill():
    page = memory_page(kronecker.factors(), "f")
    assert page.headline == "This file holds measured factors: a memory is made from it."
    assert page.lead == "Factors of 8 weights, measured on 4 samples."
    assert section(page, "Layers").parts[0].startswith("Measured: second moments of inputs and output gradients")
    assert cells(tables(page)["Layers"][0]) == [
        ["0", "3", "1.0", "0.0", "2", "2.0", "0.0"],
        ["1", "2", "1.6", "0.0", "1", "1.0", "0.0"],
    ]
    room = section(page, "Room that is left").parts
    assert room[0] == "This is the room that a memory of these factors alone leaves."
    rows = cells(tables(memory_page(kronecker.factors(outputs=False), "f"))["Layers"][0])
    assert [row[-2:] for row in rows] == [["", ""], ["", ""]]


def test_rooms_side_by_side():
    page = difference_page(kronecker.memory(0), kronecker.memory(0, 1), ("a", "b"))
    # Overlaps of 0.707 x 1 and 1 x 1.
    assert (page.judgement.answer, page.judgement.number) == ("Small difference", "85.4%")
    assert page.judgement.meaning == "of the directions that matter are the same"
    assert page.judgement.mark == (0.8, "a small difference: at least 80%")
    (tree,) = section(page, "Where the directions differ").parts
    assert tree.title == "The directions differ most in 0: 29.3%"
    assert [(row.name, row.text, row.level) for row in tree.branches] == [("0", "29.3%", 3), ("1", "0%", 0)]
    assert page.lead == "A: a, memory of 4 samples. B: b, memory of 8 samples."
    assert cells(tables(page)["Room that is left"][0]) == [
        ["0", "66.7", "33.3", "0.707", "1.000"],
        ["1", "0.0", "0.0", "1.000", "1.000"],
    ]
    assert [own.heading for own in page.behind] == ["Room that is left", "Consolidations of A", "Consolidations of B"]
    assert [one.name for one in page.charts()] == ["rooms"]
    assert chart(page, "rooms").title == "The room of 0 goes from 66.7% to 33.3%"
    page = difference_page(beside_an_importance(), Memory.empty(), ("a", "b"))
    assert chart(page, "rooms").title == "No layer is in both"
    assert cells(tables(page)["Room that is left"][0])[0] == ["0", "66.7", "", "", ""]
    assert "Layers" in tables(page)
    same = difference_page(kronecker.factors(), kronecker.factors(), ("a", "b"))
    assert same.headline == "A and B hold the same, bit for bit."


def test_layers_that_only_one_has_are_not_in_the_tree_of_differences():
    changes = [DirectionsChange("a", 0.5, 0.5, 0.5, None), DirectionsChange("b", 0.5, None, None, None)]
    assert [row.name for row in overlap_tree(changes).branches] == ["a"]


def test_what_is_not_there_is_said():
    assert room_parts(Directions(free=frozenset({"w"}))) == [
        "No weight matrix has directions yet.",
        "Measured, but no output relied on them: w.",
    ]


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
