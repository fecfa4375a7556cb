"""The report of runs, as values: the same numbers as the Markdown page's, charts that Plotly knows, what is refused."""

import base64
import json
import math
from dataclasses import replace
from itertools import combinations, pairwise
from random import Random

import pytest
from bench.tests import tiny
from bench.tests.commands import call
from bench.tests.test_results import MATRICES, SETTINGS, interval, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plotly import graph_objects
from tests.test_memory_page import cells, chart, tables

from memsyn import MemsynError
from memsyn.report.names import json_in_html
from memsyn.report.page import html_of
from memsyn.report.parts import Panels, Table, brief
from memsyn.report.styles import COLOURS, INK, METHOD_STYLES, Style, style_of
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.pages.run_page import read_runs, run_page
from memsyn_bench.results.findings import Findings, read_findings
from memsyn_bench.results.markdown import blocks, escape, plain, table
from memsyn_bench.results.sections import accuracy_table
from memsyn_bench.running.examples import EXAMPLES_FILE
from memsyn_bench.running.record import RESULTS_FILE, Run, StrengthRecord, TaskRecord, append_run

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="  # one pixel
CHOICES = (StrengthRecord("mas", 1.0, (0.1, 1.0, 10.0), (70.0, 72.0, 71.0), SETTINGS.fingerprint),)


@pytest.fixture(autouse=True)
def _sequences(monkeypatch):
    tiny.register(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "first" / RESULTS_FILE, MATRICES, choices=CHOICES)
    return tmp_path / "first"


def page(*paths):
    return run_page(read_runs(paths))


def test_the_headline_says_what_mas_and_fine_tuning_come_to(folder):
    mas, finetune = interval(82.0, 84.0, 86.0), interval(65.0, 69.0, 67.0)
    assert page(folder).headline == (
        f"On tiny mas ends at {mas}% and forgets {interval(2.0, -1.0, 2.0)} points; finetune ends at {finetune}% and "
        f"forgets {interval(40.0, 32.0, 42.0)} points."
    )


def test_the_headline_of_several_runs_compares_mas_and_fine_tuning(tmp_path):
    lower = {0: [[10.0], [10.0, 10.0]]}
    paths = [
        write(tmp_path / "a.jsonl", {"mas": MATRICES["mas"], "finetune": MATRICES["finetune"]}),
        write(tmp_path / "b.jsonl", {"mas": MATRICES["mas"], "finetune": lower}),
        write(tmp_path / "c.jsonl", {"finetune": lower}),
    ]
    assert page(*paths[:2]).headline == (
        "In all 2 runs mas ends above finetune: by 45.5 points on average, 17.0 to 74.0."
    )
    write(tmp_path / "c.jsonl", {"mas": lower, "finetune": MATRICES["finetune"]})
    found = page(*paths)
    assert found.headline == "In 2 of 3 runs mas ends above finetune: by 11.3 points on average, -57.0 to 74.0."
    assert found.title == "memsyn-bench report: 3 runs"


def test_the_headline_of_references_alone_counts_the_seeds(tmp_path):
    path = write(tmp_path / "a.jsonl", {"alone": MATRICES["alone"]})
    assert page(path).headline == "tiny, 8x8, 3 seeds"


def test_the_table_of_methods_is_the_markdown_pages(folder):
    (found,) = tables(page(folder))["Methods"]
    (rows,) = blocks(accuracy_table(read_findings(folder / RESULTS_FILE)))
    rows = [[plain(cell) for cell in row] for row in rows if not row[0].startswith("*store")]
    shown = [[cell.removesuffix(" †") for cell in row] for row in cells(found)]
    assert [list(found.columns), *shown] == rows
    assert [row[0] for row in cells(found)] == ["finetune", "mas", "joint †", "alone †"]
    assert [[cell.best for cell in row][:2] for row in found.rows][:2] == [[False, False], [True, True]]
    assert [row[1].value for row in found.rows] == [67.0, 84.0, 89.0, None]


def test_the_charts_hold_the_seeds_numbers(folder):
    found = page(folder)
    tradeoff = chart(found, "tradeoff")
    traces = {trace["name"]: trace for trace in tradeoff.figure["data"]}
    assert traces["finetune"]["x"] == [40.0, 32.0, 42.0]  # forgetting
    assert traces["finetune"]["y"] == [85.0, 85.0, 88.0]  # when learned
    assert "alone" not in traces
    assert tradeoff.title == "mas forgets least (1.0 points), finetune learns best (86.0%)"
    first = {trace["name"]: trace for trace in chart(found, "task 1").figure["data"]}
    assert first["mas"]["x"] == pytest.approx([1.1, 2.1])  # the last of three, a tenth beside the middle one
    assert first["joint"]["x"] == pytest.approx([1.0, 2.0])
    assert first["mas"]["hovertemplate"].startswith("%{x:.0f}, ")
    assert first["mas"]["y"] == pytest.approx([82.0, 81.0])
    half = float(interval(78.0, 83.0, 82.0).split(" ± ")[1])
    assert first["mas"]["error_y"]["array"][1] == pytest.approx(half, abs=0.05)
    assert chart(found, "task 1").title == "one: 44% (finetune) to 85% (joint)"
    assert chart(found, "matrix mas").figure["data"][0]["z"] == [[82.0, None], [81.0, 87.0]]
    assert chart(found, "strengths-chosen").figure["data"][0]["y"] == [70.0, 72.0, 71.0]
    assert chart(found, "seconds").figure["data"][0]["x"] == [3.0, 3.0, 3.0, 3.0]
    assert chart(found, "kept").figure["data"][0]["x"] == [0.0025] * 4


def test_every_chart_is_one_of_plotlys_with_axes_and_numbers(folder):
    for one in page(folder).charts():
        graph_objects.Figure(one.figure)  # raises for what Plotly does not know
        assert one.title
        assert all(one.figure["layout"][which]["title"]["text"] for which in ("xaxis", "yaxis"))
        assert one.table.rows
        assert json.loads(json_in_html(one.figure)) == one.figure


def test_it_says_how_to_repeat_the_run(folder):
    repeat = page(folder).sections[-2]
    assert repeat.heading == "To repeat it"
    assert repeat.parts[0].lines[0].startswith("memsyn-bench run tiny --methods finetune,joint,alone,mas --seeds 3")
    assert ["epochs", "2"] in cells(next(part for part in repeat.parts if isinstance(part, Table)))


def test_unfinished_runs_have_a_page_too(tmp_path):
    path = write(tmp_path / "a.jsonl", {"mas": {0: [[50.0]]}}, num_tasks=2)
    assert page(path).headline == "a: no seed has learned every task yet."
    assert [section.heading for section in page(path).sections][:2] == ["Methods", "To repeat it"]
    assert page(path).sections[0].parts
    append_run(tmp_path / "b.jsonl", SETTINGS, 2)
    assert page(tmp_path / "b.jsonl").charts() == []


def test_several_runs_come_on_one_page_with_what_they_say_together(tmp_path):
    for strength in (0.1, 1.0):
        write(tmp_path / f"s{strength}.jsonl", {"mas": MATRICES["mas"]}, replace(SETTINGS, strength=strength))
    found = page(tmp_path / "s0.1.jsonl", tmp_path / "s1.0.jsonl")
    assert found.headline == "2 runs of tiny."
    assert chart(found, "strength average accuracy").figure["data"][0]["x"] == [0.1, 1.0]
    assert chart(found, "strength forgetting").figure["data"][0]["y"] == [1.0, 1.0]
    assert "s0.1: Methods" in tables(found)
    headings = [section.heading for section in found.sections]
    assert "s0.1: Task by task" not in headings
    assert [section.link for section in found.sections if section.link][1:] == [
        "s0.1",
        "s1.0",
        "How to read the numbers",
    ]
    write(tmp_path / "s1.0.jsonl", MATRICES, replace(SETTINGS, strength=1.0))
    headings = [section.heading for section in page(tmp_path / "s0.1.jsonl", tmp_path / "s1.0.jsonl").sections]
    assert {f"s1.0: {which}" for which in ("Task by task", "Learning and forgetting", "Time and memory")} <= {*headings}


def test_a_name_that_is_no_unicode_is_harmless_everywhere(tmp_path):
    name = "\ud800" + 300 * "x"
    path = write(tmp_path / "a.jsonl", {"mas": MATRICES["mas"], name: MATRICES["mas"]})
    call("report", path, "-o", tmp_path / "a.html", "--png", tmp_path / "png", "--tensorboard", tmp_path / "t")
    assert "\\ud800xxx" in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert len(list((tmp_path / "png").glob("matrix*%ED%A0%80*.png"))) == 1


def test_adaptation_and_facts_have_charts_of_their_own(tmp_path):
    rows = {0: [(60.0,), (50.0, 70.0)]}
    scores = {"in-use": {"mas": rows}, "other-classes": {"mas": {0: [(30.0,), (20.0, 40.0)]}}}
    path = tmp_path / "a.jsonl"
    write(path, {"mas": {0: MATRICES["mas"][0]}}, replace(SETTINGS, sequence="adaptation-x"), scores=scores)
    found = chart(page(path), "adaptation a")
    assert [trace["x"][0] for trace in found.figure["data"]] == [83.333, 66.667]  # 50 of 60, 20 of 30
    assert found.title == "mas keeps most on the classes in use: 83.3%, on the others 66.7%"
    own = [METHOD_STYLES["mas"].colour]
    filled, unfilled = (trace["marker"] for trace in found.figure["data"])
    assert (filled["color"], unfilled["color"], unfilled["line"]["color"]) == (own, "rgba(0,0,0,0)", own)
    assert [entry.style for entry in found.series] == [Style(INK, "square", ""), Style(INK, "square-open", "")]
    path = tmp_path / "b.jsonl"
    lone = {"in-use": scores["in-use"]}
    write(path, {"mas": {0: MATRICES["mas"][0]}}, replace(SETTINGS, sequence="adaptation-x"), scores=lone)
    found = chart(page(path), "adaptation b")
    assert found.title == "mas keeps most on the classes in use: 83.3%"
    assert len(found.figure["data"]) == 1
    assert found.figure["data"][0]["marker"]["color"] == [METHOD_STYLES["mas"].colour]
    path = write(tmp_path / "f.jsonl", MATRICES, replace(SETTINGS, sequence="facts"))
    found = page(path)
    assert chart(found, "facts f").figure["data"][0]["x"] == [89.0, 84.0, 67.0]
    assert "mean average precision" in chart(found, "averages").figure["layout"]["xaxis"]["title"]["text"]


def test_pairs_have_a_chart_of_their_mean_drops(tmp_path):
    paths = []
    for name, by in (("pair-food-animals", 1), ("pair-animals-food", 3)):
        matrices = {
            method: {seed: [[80.0], [80.0 - by * drop, 90.0]] for seed in (0, 1)}
            for method, drop in (("finetune", 20.0), ("mas", 2.0))
        }
        path = tmp_path / f"{name}.jsonl"
        paths.append(write(path, matrices, replace(SETTINGS, sequence=name, size=32), names=["a", "b"]))
    found = chart(page(*paths), "pairs")
    assert found.title == "mas drops least on the first task: 4.0 ± 0.0 points"
    assert found.figure["data"][0]["x"] == [40.0, 4.0]


def test_the_time_is_that_of_the_median_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", MATRICES)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        if entry.get("method") == "mas":
            entry["seconds"] = 900.0 if entry["seed"] == 2 else 4.5
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    assert chart(page(path), "seconds").title == "mas takes 9 s, 3.0 times as long as finetune"


EXAMPLE = {"image": PIXEL, "text": "a <b>cat</b>", "first": {"mas": ["a <b>cat</b>"]}, "last": {"mas": ["dog", "car"]}}


def test_examples_are_shown_if_the_folder_holds_them(folder):
    (folder / EXAMPLES_FILE).write_text(json.dumps([EXAMPLE]))
    text = html_of(page(folder))
    assert f'<img src="data:image/png;base64,{PIXEL}" alt="a &lt;b&gt;cat&lt;/b&gt;">' in text
    assert "<dt>mas, then</dt>\n<dd><strong>a &lt;b&gt;cat&lt;/b&gt;</strong></dd>" in text
    assert "<dt>mas, at the end</dt>\n<dd>dog, car</dd>" in text


def test_examples_are_of_the_run_that_they_lie_beside(folder):
    (folder / EXAMPLES_FILE).write_text(json.dumps([EXAMPLE]))
    copies = [write(folder / f"{name}.jsonl", MATRICES) for name in "ab"]
    (folder / f"a.{EXAMPLES_FILE}").write_text(json.dumps([EXAMPLE | {"text": "of a"}]))
    found = [[scene.text for scene in scenes] for _, scenes in read_runs([folder, *copies])]
    assert found == [[EXAMPLE["text"]], ["of a"], []]


@pytest.mark.parametrize(
    "examples",
    [
        "no json",
        [{"image": PIXEL, "text": "cat"}],
        [EXAMPLE | {"first": {"mas": [1]}}],
        [EXAMPLE | {"last": {"mas": "dog"}}],
        [EXAMPLE | {"last": ["dog"]}],
        [EXAMPLE | {"image": '"><script>'}],
        [EXAMPLE | {"image": base64.b64encode(b"GIF89a..").decode()}],
        EXAMPLE,
    ],
)
def test_other_examples_are_refused(folder, examples):
    (folder / EXAMPLES_FILE).write_text(examples if isinstance(examples, str) else json.dumps(examples))
    with pytest.raises(MemsynError, match=r"examples\.json holds no examples of memsyn-bench: .* Remove it, or make"):
        page(folder)


def test_a_run_named_twice_is_refused(folder):
    with pytest.raises(MemsynError, match="is named more than once: name every run once"):
        page(folder, folder / RESULTS_FILE)


def test_two_runs_of_one_name_are_refused(tmp_path):
    for parent in ("a", "b"):
        write(tmp_path / parent / "run" / RESULTS_FILE, MATRICES)
    with pytest.raises(MemsynError, match=r"are both of a run called run, .*: rename one of the folders"):
        page(tmp_path / "a" / "run", tmp_path / "b" / "run")


def test_the_strengths_tried_are_words_with_the_chosen_one_marked(folder):
    (row,) = tables(page(folder))["Strengths"][0].rows
    assert [cell.text for cell in row] == ["mas", "1", "2 of 2", "0.1: 70.0, 1: 72.0 (chosen), 10: 71.0"]
    assert row[3].value is None
    assert not row[3].best


def test_accuracy_over_time_is_all_in_the_panel(tmp_path):
    write(tmp_path / "a.jsonl", {"mas": {0: [[11.0], [80.0, 90.0]]}})
    assert chart(page(tmp_path / "a.jsonl"), "task 1").figure["layout"]["yaxis"]["range"][0] <= 11.0


def test_runs_of_facts_keep_their_sections(tmp_path):
    for name in ("f", "g"):
        write(tmp_path / f"{name}.jsonl", MATRICES, replace(SETTINGS, sequence="facts"))
    found = page(tmp_path / "f.jsonl", tmp_path / "g.jsonl")
    assert {"f: Learning and forgetting", "g: Task by task"} <= {section.heading for section in found.sections}


def test_every_method_has_a_look_of_its_own_and_always_the_same():
    assert set(METHOD_STYLES) >= set(METHODS)
    for colour in COLOURS:
        looks = [style for style in METHOD_STYLES.values() if style.colour == colour]
        assert len(looks) <= 4
        assert len({style.marker for style in looks}) == len({style.dash for style in looks}) == len(looks)
    assert style_of("mas") == Style("#0072B2", "circle", "solid")


def test_another_methods_look_is_no_known_ones():
    known = {(style.colour, style.marker) for style in METHOD_STYLES.values()}
    others = [style_of(f"another {number}") for number in range(500)]
    assert not {(style.colour, style.marker) for style in others} & known
    assert len(set(others)) > 200
    assert style_of("another") == style_of("another")


SEEN = {
    "all colours": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}
"""What becomes of linear red, green and blue in eyes of the kind: Machado et al. (2009), severity 1."""


def lab(colour, eyes):
    """CIE 1976 L*a*b* of a colour as such eyes see it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    r, g, b = (min(1, max(0, sum(m * c for m, c in zip(row, linear, strict=True)))) for row in SEEN[eyes])
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883,
    )
    x, y, z = (c ** (1 / 3) if c > 0.008856 else 7.787 * c + 16 / 116 for c in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("eyes", SEEN)
@pytest.mark.parametrize("ink", ["#1a1c20", "#e8eaed"])
def test_colours_are_told_apart_by_all_eyes(eyes, ink):
    seen = [lab(ink if colour == INK else colour, eyes) for colour in COLOURS]
    assert min(math.dist(one, other) for one, other in combinations(seen, 2)) > 12  # 2.3 is just seen


def many(num_tasks, num_seeds):
    """A run of all methods, as values."""
    rng = Random(0)
    results = {
        method: {
            seed: [
                TaskRecord(
                    method, seed, task, f"Task {task} of things", tuple(rng.uniform(30, 95) for _ in range(task + 1)),
                    0.1, 0.0, 1.5, "f", 1.0, 100, 3_000,
                )
                for task in range(num_tasks)
            ]
            for seed in range(num_seeds)
        }
        for method in METHODS
    }  # fmt: skip
    records = [record for seeds in results.values() for of_seed in seeds.values() for record in of_seed]
    run = Run(replace(SETTINGS, sequence="tiny"), num_tasks, ("here",), tuple(records), ())
    return Findings("many", run, results, ())


def test_a_page_of_all_methods_and_twenty_tasks_is_below_its_bound():
    assert len(html_of(run_page([(many(20, 10), [])])).encode()) < 180_000 * len(METHODS)


def test_of_many_methods_few_are_shown_first_and_the_caption_names_them():
    found = many(3, 2)
    page = run_page([(found, [])])
    panels = next(part for one in page.sections for part in one.parts if isinstance(part, Panels) and part.series)
    best = found.best()
    named = [m for m in METHODS if m in {"mas", "finetune", "frozen", "joint", best}]
    assert [entry.name for entry in panels.series if entry.shown] == named
    assert f"Of {len(METHODS) - 1} methods {', '.join(named[:-1])} and {named[-1]} are shown first" in panels.note
    for one in [*panels.charts, chart(page, "tradeoff")]:
        visible = [trace["name"] for trace in one.figure["data"] if trace["visible"]]
        assert visible == [entry.name for entry in one.series if entry.shown]
        assert set(named) <= set(visible) < set(METHODS)
    assert "are shown first" in chart(page, "tradeoff").note
    shifts = [trace["x"][0] - 1 for trace in panels.charts[0].figure["data"]]
    assert max(map(abs, shifts)) == pytest.approx(0.3)
    assert min(b - a for a, b in pairwise(sorted(shifts))) > 0.6 / len(METHODS)
    first = sorted(s for s, t in zip(shifts, panels.charts[0].figure["data"], strict=True) if t["visible"])
    assert min(b - a for a, b in pairwise(first)) > 0.1


def test_few_methods_are_all_shown(folder):
    assert all(entry.shown for one in page(folder).charts() for entry in one.series)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_short_numbers_are_written_as_the_whole_ones(value):
    for form in (".4g", ".1f", ".0f"):
        assert f"{brief(value):{form}}" == f"{value:{form}}"
    assert brief(value) == pytest.approx(value, rel=1e-4)
    assert len(repr(brief(83.45678))) == 6


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text("a|\\*_<>#~`[]é'", max_size=6), min_size=1, max_size=3))
def test_tables_come_back_from_markdown_as_they_were(names):
    (rows,) = blocks(table(["a"] * len(names), [[escape(name) for name in names]]))
    assert [plain(cell) for cell in rows[1]] == names


def test_the_command_writes_the_page_and_pictures(folder, tmp_path):
    result = call("report", folder, "-o", tmp_path / "r.html", "--png", tmp_path / "png")
    assert " ".join(result.output.split()).endswith("from 1 run.")
    text = (tmp_path / "r.html").read_text()
    assert len(text) < 6_000_000
    names = {path.name for path in (tmp_path / "png").iterdir()}
    assert {"averages.png", "tradeoff.png", "task 1.png", "matrix mas.png", "seconds.png"} <= names
    charts = page(folder).charts()
    assert len(names) == len(charts) == text.count('class="plot"')
    assert all(isinstance(part, Panels) for section in page(folder).sections[2:3] for part in section.parts)


def test_the_command_asks_what_to_write(folder):
    said = call("report", folder, code=1).stderr
    assert "there is nothing to write: say -o report.html, --png, --tensorboard or --mlflow." in said
