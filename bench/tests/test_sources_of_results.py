"""The section about what memories are measured on: its table and sentences, against numbers by hand."""

import pytest
from bench.tests import tiny
from bench.tests.test_results import interval, rows, write

from memsyn_bench.methods.registry import METHODS
from memsyn_bench.methods.sources import NEXT, NOISE, PUBLIC, TEST
from memsyn_bench.results.findings import NONE, read_findings
from memsyn_bench.results.sources import ENDINGS, FAMILIES, compares_sources, measured_on


@pytest.fixture(autouse=True)
def _sequences(monkeypatch):
    tiny.register(monkeypatch)


ENDS = {  # accuracy on the first task after the second, by seed
    "finetune": (40.0, 50.0),
    "mas": (78.0, 82.0),
    "mas-test": (79.0, 83.0),
    "mas-noise": (60.0, 70.0),
    "projected": (76.0, 78.0),
    "projected-new": (75.0, 78.0),
}


def found(tmp_path, name="x", ends=ENDS):
    matrices = {
        method: {seed: [[80.0], [end, 90.0]] for seed, end in enumerate(of_seeds)} for method, of_seeds in ends.items()
    }
    return read_findings(write(tmp_path / f"{name}.jsonl", matrices))


def test_the_table_is_of_accuracy_forgetting_and_the_paired_difference(tmp_path):
    lines = measured_on([found(tmp_path)]).split("\n\n")[1].splitlines()
    assert lines[0] == (
        "| Memory | Measured on | x: average accuracy (%) | x: forgetting (points) | "
        "x: minus old training images (points) |"
    )
    assert lines[2:] == [
        f"| MAS | old training images | {interval(84.0, 86.0)} | {interval(2.0, -2.0)} | {NONE} |",
        f"| MAS | test images of the old task | {interval(84.5, 86.5)} | {interval(1.0, -3.0)} | +0.5 ± 0.0 |",
        f"| MAS | noise | {interval(75.0, 80.0)} | {interval(20.0, 10.0)} | -{interval(9.0, 6.0)} |",
        f"| projection | old training images | {interval(83.0, 84.0)} | {interval(4.0, 2.0)} | {NONE} |",
        f"| projection | the next task's images | {interval(82.5, 84.0)} | {interval(5.0, 2.0)} | "
        f"-{interval(0.5, 0.0)} |",
        f"| none | {NONE} | {interval(65.0, 70.0)} | {interval(40.0, 30.0)} | {NONE} |",
    ]


def test_the_sentences_name_the_best_and_the_worst_of_the_other_sources(tmp_path):
    text = measured_on([found(tmp_path)])
    assert (
        "On x the best other source is test images of the old task: 0.5 ± 0.0 points above MAS of the old training "
        "images."
    ) in text
    assert (
        f"the worst other source is noise: {interval(9.0, 6.0)} points below MAS of the old training images (" in text
    )
    assert "above projection" not in text
    assert "below projection" not in text, "one other source is no choice"


def test_several_files_stand_side_by_side_and_what_one_lacks_is_a_dash(tmp_path):
    files = [found(tmp_path, "x"), found(tmp_path, "y", {"mas": (70.0, 71.0), "mas-public": (69.0, 72.0)})]
    cells = [line for line in measured_on(files).splitlines() if line.startswith("| MAS | public")]
    assert cells == [
        f"| MAS | public images of something else | {NONE} | {NONE} | {NONE} | {interval(79.5, 81.0)} | "
        f"{interval(11.0, 8.0)} | +{interval(-0.5, 0.5)} |"
    ]
    assert rows(measured_on(files))  # a table that is read back


def test_a_seed_that_one_side_lacks_is_in_no_difference(tmp_path):
    text = measured_on([found(tmp_path, ends={"mas": (78.0, 82.0, 80.0), "mas-public": (77.0, 80.0)})])
    assert f"| -{interval(0.5, 1.0)} |" in text


def test_files_of_this_section_have_a_memory_of_other_images(tmp_path):
    assert compares_sources(found(tmp_path))
    assert not compares_sources(found(tmp_path, "z", {"mas": (1.0, 2.0), "mas-test": (1.0, 2.0)}))


def test_every_source_is_a_method_and_every_method_of_a_source_is_here():
    names = {f"{family}{end}" for family in FAMILIES for end in ENDINGS}
    assert names <= set(METHODS)
    words = {source.words for source in (TEST, PUBLIC, NEXT, NOISE)}
    of_sources = {name for name, entry in METHODS.items() if entry.summary.endswith(tuple(words))}
    assert of_sources - names == {"mas-local-test"}
