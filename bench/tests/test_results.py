"""The pages of runs: every number in them against one worked out here, and what they say of odd files."""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import typer
from bench.tests import tiny

from memsyn import MemsynError
from memsyn_bench.cli import app
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.pages.results_pages import results_pages
from memsyn_bench.results.findings import Findings, read_findings
from memsyn_bench.results.sections import commands, readable, row_commands
from memsyn_bench.running.record import (
    RESULTS_FILE,
    Run,
    StrengthRecord,
    TaskRecord,
    append_run,
    append_strength,
    append_task,
)
from memsyn_bench.sequences.sequences import SEQUENCES, default_settings
from memsyn_bench.settings import Settings, parse_strength

SETTINGS = Settings(sequence="tiny", size=8, epochs=2)
DOCS = Path(__file__).parents[2] / "docs"
T = {1: 12.7062047, 2: 4.3026527}
"""t_{0.975} of one and two degrees of freedom, from tables."""
COSTS = {"seconds": 1.5, "strength": None, "kept": (100, 2500), "working": 3_000_000}


@pytest.fixture(autouse=True)
def _sequences(monkeypatch):
    tiny.register(monkeypatch)


def write(path, found, settings=SETTINGS, *, num_tasks=None, scores=None, names=None, choices=()):
    """A result file of method -> seed -> accuracy matrix."""
    num_tasks = num_tasks or max(len(matrix) for seeds in found.values() for matrix in seeds.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    append_run(path, settings, num_tasks)
    for choice in choices:
        append_strength(path, choice)
    for method, seeds in found.items():
        for seed, matrix in seeds.items():
            for task, row in enumerate(matrix):
                append_task(
                    path,
                    TaskRecord(
                        method, seed, task, (names or ["one", "two", "three"])[task], tuple(row), 0.1, 0.0,
                        COSTS["seconds"], settings.fingerprint, METHODS[method].strength if method in METHODS else None,
                        COSTS["kept"][min(task, 1)], COSTS["working"],
                        scores={name: values[method][seed][task] for name, values in (scores or {}).items()},
                    ),
                )  # fmt: skip
    return path


def page(*paths):
    """The pages of runs and groups, one after the other."""
    return "\n".join(
        results_pages([read_findings(path) for path in paths], Path("nowhere/results.md")).details.values()
    )


def rows(text, *, table=0, heading=""):
    """The cells of one table: first cell -> the others by column."""
    tables = re.findall(r"(?:^\|.*\|\n)+", text[text.index(heading) :], re.MULTILINE)
    header, _, *lines = (re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in tables[table].splitlines())
    columns = [cell.strip() for cell in header[1:]]
    return {line[0].strip(): dict(zip(columns, map(str.strip, line[1:]), strict=True)) for line in lines}


def interval(*values):
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.1f} ± {T[len(values) - 1] * deviation / math.sqrt(len(values)):.1f}"


MATRICES = {
    "finetune": {0: [[80.0], [40.0, 90.0]], 1: [[82.0], [50.0, 88.0]], 2: [[84.0], [42.0, 92.0]]},
    "joint": {0: [[80.0], [85.0, 93.0]], 1: [[82.0], [86.0, 91.0]], 2: [[84.0], [84.0, 95.0]]},
    "alone": {0: [[80.0], [1.0, 91.0]], 1: [[82.0], [2.0, 90.0]], 2: [[84.0], [3.0, 95.0]]},
    "mas": {0: [[80.0], [78.0, 86.0]], 1: [[82.0], [83.0, 85.0]], 2: [[84.0], [82.0, 90.0]]},
}
AVERAGES = {"finetune": (65.0, 69.0, 67.0), "mas": (82.0, 84.0, 86.0), "joint": (89.0, 88.5, 89.5)}


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "first.jsonl", MATRICES)


def test_the_accuracy_table_holds_what_the_definitions_give(path):
    cells = rows(page(path))
    assert list(cells) == ["finetune", "**mas**", "*store data, see test images, or are references:*", "joint", "alone"]
    assert cells["finetune"] == {
        "Average accuracy (%)": interval(*AVERAGES["finetune"]),
        "Minus mas (points)": f"-{interval(17.0, 15.0, 19.0)}",
        "Forgetting (points)": interval(40.0, 32.0, 42.0),
        "When learned (%)": interval(85.0, 85.0, 88.0),
        "Forward transfer (points)": interval(-1.0, -2.0, -3.0),
        "Intransigence (points)": interval(1.5, 1.5, 1.5),
    }
    assert cells["**mas**"]["Average accuracy (%)"] == f"**{interval(*AVERAGES['mas'])}**"
    assert cells["**mas**"]["Minus mas (points)"] == "–"
    assert cells["**mas**"]["Forgetting (points)"] == interval(2.0, -1.0, 2.0)
    assert cells["joint"]["Minus mas (points)"] == f"+{interval(7.0, 4.5, 3.5)}"
    assert cells["joint"]["Intransigence (points)"] == "–"


def test_of_tasks_learned_alone_only_what_they_learn_is_said(path):
    text = page(path)
    alone = rows(text)["alone"]
    assert alone.pop("When learned (%)") == interval(85.5, 86.0, 89.5)
    assert set(alone.values()) == {"–"}
    ends = rows(text, heading="Accuracy on each task at the end")
    assert ends["alone (when learned)"] == {"one": interval(80.0, 82.0, 84.0), "two": interval(91.0, 90.0, 95.0)}
    assert ends["mas"] == {"one": interval(78.0, 83.0, 82.0), "two": interval(86.0, 85.0, 90.0)}
    assert "alone:" not in text.split("<details>")[1]


def test_columns_without_their_reference_are_left_out(tmp_path):
    cells = rows(page(write(tmp_path / "x.jsonl", {"finetune": MATRICES["finetune"]})))
    assert set(cells["**finetune**"]) == {"Average accuracy (%)", "Forgetting (points)", "When learned (%)"}


def test_the_whole_matrix_is_there_as_a_mean_over_the_seeds(path):
    folded = page(path).split("<details>")[1].split("</details>")[0]
    assert rows(folded, heading="mas:") == {
        "after one": {"one": "82.0", "two": ""},
        "after two": {"one": f"{(78 + 83 + 82) / 3:.1f}", "two": f"{(86 + 85 + 90) / 3:.1f}"},
    }


def test_time_and_memory_are_of_one_seed(path):
    lines = path.read_text().splitlines()
    slow = json.loads(lines[-1])
    path.write_text("\n".join([*lines[:-1], json.dumps(slow | {"seconds": 900.0}), ""]))  # the median is as it was
    cells = rows(page(path), table=1)
    assert cells["mas"] == {
        "Strength": "1", "Seeds": "3", "Seconds a seed": "3", "Kept after task 1": "100 B",
        "Kept at the end": "2.5 kB", "Working": "3.0 MB",
    }  # fmt: skip
    assert cells["joint"]["Strength"] == "–"
    assert readable(2_000_000_000) == "2.0 GB"


def test_methods_that_store_data_are_never_the_best(path):
    assert {name for name, entry in METHODS.items() if entry.stores_data} == {
        "joint", "rehearsal", "mas-rehearsal", "projected-rehearsal", "projected-lda-rehearsal"
    }  # fmt: skip
    assert "Of the methods that store no data **mas** has the highest average accuracy: 84.0 ± 5.0%." in page(path)


def test_methods_that_look_at_test_images_are_never_the_best(tmp_path):
    better = {"mas-test": {seed: [[80.0], [90.0, 99.0]] for seed in range(3)}}
    assert "ends at 84.0 ± 5.0% and forgets" in page(write(tmp_path / "x.jsonl", {"mas": MATRICES["mas"], **better}))


def test_the_best_is_the_best_on_the_seeds_that_all_rivals_have(tmp_path):
    one = {"ewc": {0: [[80.0], [80.0, 89.0]]}}  # 84.5, where mas has 82 on that seed and 84 over all
    text = page(write(tmp_path / "x.jsonl", {"mas": MATRICES["mas"], **one}))
    assert "**ewc** has the highest" in text
    lucky = {"ewc": {2: [[80.0], [84.0, 86.0]]}}  # 85, where mas has 86 on that seed and 84 over all
    assert "**mas** has the highest" in page(write(tmp_path / "y.jsonl", {"mas": MATRICES["mas"], **lucky}))


def test_the_headline_compares_seed_by_seed(path):
    text = page(path)
    assert "**mas** has the highest average accuracy: 84.0 ± 5.0%. It forgets 1.0 ± 4.3 points." in text
    assert "Seed by seed the next, finetune, ends 17.0 ± 5.0 points below mas." in text
    assert "mas ends 5.0 ± 4.5 points below joint training, which stores all data." in text


def test_a_rival_that_wins_is_said(tmp_path):
    better = {"ewc": {0: [[80.0], [80.0, 89.0]], 1: [[80.0], [86.0, 83.0]], 2: [[80.0], [85.0, 87.0]]}}
    text = page(write(tmp_path / "x.jsonl", {"mas": MATRICES["mas"], **better}))
    assert f"**ewc** has the highest average accuracy: {interval(84.5, 84.5, 86.0)}%." in text
    assert "mas ends at 84.0 ± 5.0% and forgets 1.0 ± 4.3 points." in text
    assert f"the best, ewc, ends {interval(2.5, 0.5, 0.0)} points above mas (the interval holds 0)." in text


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (2.9, "ends within 3 points (2.9) of the best method that stores no data: this experiment shows nothing"),
        (3.1, "The frozen backbone ends 3.1 points below the best method that stores no data."),
    ],
)
def test_a_frozen_body_near_the_best_shows_nothing_about_memory(tmp_path, gap, words):
    frozen = {seed: [matrix[0], [value - gap for value in matrix[1]]] for seed, matrix in MATRICES["mas"].items()}
    text = page(write(tmp_path / "x.jsonl", {"mas": MATRICES["mas"], "frozen": frozen, "joint": MATRICES["joint"]}))
    assert words in text
    assert ("nothing about memory" in text) == (gap < 3)
    room = interval(*(own - (other - gap) for own, other in zip(AVERAGES["joint"], AVERAGES["mas"], strict=True)))
    assert (f"Joint training itself ends {room} points above the frozen backbone." in text) == (gap < 3)


def test_a_frozen_body_is_no_floor_where_the_head_is_shared(tmp_path, monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", replace(tiny.SEQUENCE, shares_head=True))
    for gap in (2.9, 3.1):
        frozen = {seed: [matrix[0], [value - gap for value in matrix[1]]] for seed, matrix in MATRICES["mas"].items()}
        text = page(write(tmp_path / f"{gap}.jsonl", {"mas": MATRICES["mas"], "frozen": frozen}))
        forgotten = interval(2.0 + gap, -1.0 + gap, 2.0 + gap)
        assert f"frozen backbone is no floor here: the tasks share its head, which forgets {forgotten} points." in text
        assert "nothing about memory" not in text


def test_a_frozen_body_is_compared_on_shared_seeds_alone(tmp_path):
    found = {"mas": {0: MATRICES["mas"][0]}, "frozen": {1: MATRICES["finetune"][1]}}
    assert "The frozen backbone" not in page(write(tmp_path / "x.jsonl", found))


def test_a_frozen_body_that_is_the_best_is_said_to_be(tmp_path):
    text = page(write(tmp_path / "x.jsonl", {"mas": MATRICES["finetune"], "frozen": MATRICES["mas"]}))
    assert "**frozen** has the highest" in text
    assert (
        "The frozen backbone is the best method that stores no data: this experiment shows nothing about memory."
        in text
    )


def test_unfinished_seeds_are_left_out_and_named(tmp_path):
    found = {"finetune": MATRICES["finetune"], "mas": {**MATRICES["mas"], 1: [[0.0]]}, "si": {0: [[50.0]]}}
    text = page(write(tmp_path / "x.jsonl", found))
    assert "Not finished, and left out: si seed 0 (1 of 2 tasks), mas seed 1 (1 of 2 tasks)." in text
    cells = rows(text)
    assert "si" not in cells
    assert cells["**mas**"]["Average accuracy (%)"] == f"**{interval(82.0, 86.0)}**"
    assert cells["finetune"]["Minus mas (points)"] == f"-{interval(17.0, 19.0)}"
    assert rows(text, table=1)["mas"]["Seeds"] == "2"
    assert "tiny, 8x8, 3 seeds, of some methods fewer: three kinds of noise." in text


def test_a_run_in_its_first_seed_says_nothing_but_that(tmp_path):
    text = page(write(tmp_path / "x.jsonl", {"mas": {0: [[80.0], [78.0, 86.0]]}}, num_tasks=3))
    assert "mas seed 0 (2 of 3 tasks)" in text
    assert "|" not in text


def test_of_one_method_nothing_is_compared(tmp_path):
    text = page(write(tmp_path / "x.jsonl", {"mas": MATRICES["mas"]}))
    assert "\n\nmas ends at 84.0 ± 5.0% and forgets 1.0 ± 4.3 points.\n\n" in text
    assert set(rows(text)["**mas**"]) == {"Average accuracy (%)", "Forgetting (points)", "When learned (%)"}


def test_one_seed_has_no_interval(tmp_path):
    found = {method: {0: MATRICES[method][0]} for method in ("finetune", "mas")}
    text = page(write(tmp_path / "x.jsonl", found))
    assert rows(text)["finetune"] == {
        "Average accuracy (%)": "65.0", "Minus mas (points)": "-17.0", "Forgetting (points)": "40.0",
        "When learned (%)": "85.0",
    }  # fmt: skip
    assert "Of a single seed no interval is known" in text
    assert "finetune, ends 17.0 points below mas (one seed: no interval is known)." in text


def test_other_scorings_have_columns(tmp_path):
    scores = {"class-incremental": {"mas": {0: [(50.0,), (10.0, 30.0)], 1: [(50.0,), (20.0, 40.0)]}}}
    found = {"mas": {seed: MATRICES["mas"][seed] for seed in (0, 1)}}
    text = page(write(tmp_path / "x.jsonl", found, scores=scores))
    assert rows(text)["**mas**"]["Class-incremental (%)"] == interval(20.0, 30.0)


def test_how_strengths_were_chosen_is_a_table(tmp_path):
    choice = StrengthRecord("mas", 10.0, (1.0, 10.0), (60.04, 70.0), SETTINGS.fingerprint)
    text = page(write(tmp_path / "x.jsonl", {"mas": MATRICES["mas"]}, choices=[choice]))
    assert rows(text, heading="How the strengths")["mas"] == {
        "Chosen": "10", "Tasks": "2 of 2", "Candidate: score": "1: 60.0, 10: 70.0 (chosen, at the edge)"
    }  # fmt: skip


def test_a_strength_chosen_on_the_first_tasks_is_a_number_in_the_command_of_its_row(tmp_path):
    """`--strength chosen` would try all tasks now, and may find another one."""
    of_all = StrengthRecord("mas", 10.0, (1.0, 10.0), (60.0, 70.0), SETTINGS.fingerprint, num_tasks=2)
    settings = replace(SETTINGS, strength="chosen")
    for choice, words in ((of_all, "--strength chosen"), (replace(of_all, num_tasks=1), "--strength 10")):
        run = Run(settings, 2, ("here",), (), (choice,))
        found = Findings("x", run, {"mas": {0: []}, "finetune": {0: []}}, ())
        assert words in row_commands(found)["mas"]
        assert "--strength chosen" in row_commands(found)["finetune"]


@pytest.mark.parametrize(
    ("strength", "scores", "words"),
    [
        (1.0, (60.0, 70.0, 65.0), "0.1: 60.0, 1: 70.0 (chosen), 10: 65.0"),
        (1.0, (70.0, 70.0, 65.0), "0.1: 70.0, 1: 70.0 (chosen of 2 equals), 10: 65.0"),
        (10.0, (70.0, 70.0, 70.0), "0.1: 70.0, 1: 70.0, 10: 70.0 (chosen of 3 equals, at the edge)"),
        (0.1, (70.0, 60.0, 65.0), "0.1: 70.0 (chosen, at the edge), 1: 60.0, 10: 65.0"),
    ],
)
def test_a_choice_among_equals_or_at_the_edge_is_said(tmp_path, strength, scores, words):
    choice = StrengthRecord("mas", strength, (0.1, 1.0, 10.0), scores, SETTINGS.fingerprint)
    text = page(write(tmp_path / "x.jsonl", {"mas": MATRICES["mas"]}, choices=[choice]))
    assert rows(text, heading="How the strengths")["mas"]["Candidate: score"] == words


def test_odd_names_stay_in_their_cells(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS.entries, "a|b", METHODS["si"])
    text = page(write(tmp_path / "x.jsonl", {"a|b": MATRICES["mas"]}, names=["Food | Drink", "<b>_x_"]))
    assert list(rows(text)) == [r"**a\|b**"]
    assert list(rows(text, heading="at the end (%)")[r"a\|b"]) == [r"Food \| Drink", r"\<b\>\_x\_"]


def test_a_method_that_this_version_does_not_know_comes_last(tmp_path):
    found = {"gone": MATRICES["finetune"], "mas": MATRICES["mas"], "finetune": MATRICES["finetune"]}
    assert list(rows(page(write(tmp_path / "x.jsonl", found)))) == ["finetune", "**mas**", "gone"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sequence": "emoji8", "size": 64, "epochs": 10, "batch_size": 8, "lr": 1e-05, "warmup": 3, "strength": 0.125},
        {"strength": "chosen"},
        {"strength": 100.0},
        {"sequence": "split-fashion", "size": 28, "epochs": 2, "batch_size": 64, "lr": 1e-3},
        {"optimizer": "sgd"},  # with Adam's learning rate
        {"optimizer": "sgd", "lr": 0.03},
    ],
)
def test_the_command_makes_the_same_settings(tmp_path, changes):
    settings = replace(SETTINGS, **{"epochs": Settings.epochs, **changes})
    found = {method: {0: MATRICES[method][0], 1: [[1.0]]} for method in ("finetune", "mas")}
    path = write(tmp_path / "x.jsonl", found | {"si": {0: [[1.0]]}}, settings)
    first, second = (line.split() for line in commands(read_findings(path)))
    assert first[:2] == second[:2] == ["memsyn-bench", "run"]
    command = typer.main.get_command(app).commands["run"]
    options = command.make_context("run", first[2:]).params
    assert (options.pop("methods"), options.pop("seeds"), options.pop("out")) == ("finetune,mas", 2, Path("runs/x"))
    options["strength"] = parse_strength(options["strength"])
    given = {name: value for name, value in options.items() if value is not None}
    own = default_settings(settings.sequence, optimizer=settings.optimizer)
    assert replace(own, **given) == settings
    assert " ".join(second).startswith(f"memsyn-bench run {settings.sequence} --methods si --seeds 1")
    own = {**asdict(own), "optimizer": "adam"}
    assert len(first) == 9 + 2 * sum(own[name] != value for name, value in asdict(settings).items())


def test_the_command_names_the_runs_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, words in (
        (Path("tiny.jsonl"), ""),  # the copy of a run in runs/tiny, where it goes by itself
        (Path("runs/tiny") / RESULTS_FILE, ""),
        (Path("deep/there") / RESULTS_FILE, " --out deep/there"),
    ):
        assert commands(read_findings(write(path, MATRICES)))[0].partition(" --epochs 2")[2] == words


def test_it_says_how_the_file_was_made_and_the_page_is_made_again(path):
    entry = json.loads(path.read_text().splitlines()[0])
    text = page(path)
    assert f"torch {entry['versions']['torch']}" in text
    assert "2 epochs a task, Adam, lr 0.003" in text


def test_the_page_names_the_optimizer_if_it_is_not_adam(path, tmp_path):
    other = write(tmp_path / "other.jsonl", MATRICES, replace(SETTINGS, optimizer="sgd", lr=0.5))
    text = page(path, other)
    assert "tiny, 8x8, 3 seeds: three kinds of noise. 2 epochs a task, Adam, lr 0.003" in text
    assert "tiny, 8x8, sgd, 3 seeds: three kinds of noise. 2 epochs a task, SGD with momentum 0.9, lr 0.5" in text
    assert "--epochs 2 --lr 0.5 --optimizer sgd" in text
    assert "--optimizer" not in page(path)


def test_a_run_in_its_folder_goes_by_the_folders_name(tmp_path):
    assert read_findings(write(tmp_path / "my run" / RESULTS_FILE, MATRICES)).name == "my run"


def test_a_file_of_another_versions_sequence_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", {"mas": MATRICES["mas"]}, replace(SETTINGS, sequence="gone"))
    with pytest.raises(
        MemsynError, match=r"a\.jsonl is of a sequence that cannot be used here: .* Leave the file out, or install"
    ):
        page(path)


def test_what_is_no_result_file_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(MemsynError, match=r"x\.jsonl cannot be read: No such file.* Leave the file out, or make it"):
        read_findings(path)
    path.write_text("")
    with pytest.raises(MemsynError, match=r"x\.jsonl does not say with which settings it was made. Leave the file out"):
        read_findings(path)
    path.write_text('{"kind": "run"}\n')
    with pytest.raises(MemsynError, match=r"x\.jsonl, line 1 is no record of memsyn-bench. Leave the file out"):
        read_findings(path)
    path.unlink()
    append_run(path, SETTINGS, 3)
    whole = path.read_text()
    append_run(path, replace(SETTINGS, lr=1.0), 3)
    with pytest.raises(MemsynError, match=r"x\.jsonl holds runs of several settings. Leave the file out"):
        read_findings(path)
    path.write_text(whole.replace('"lr"', '"speed"'))
    with pytest.raises(MemsynError, match=r"x\.jsonl has settings that this version does not know: .*speed"):
        read_findings(path)
