"""What files of results say together: pairs, strengths, adaptation, facts."""

import pytest
from bench.tests import tiny
from bench.tests.test_results import MATRICES, interval, page, rows, write

from memsyn_bench.results.mas_strengths import plateau
from memsyn_bench.settings import Settings


@pytest.fixture(autouse=True)
def _sequences(monkeypatch):
    tiny.register(monkeypatch)


DROPS = {"finetune": (30.0, 40.0), "mas": (1.0, 2.0), "mas-test": (1.5, 2.0), "mas-local": (3.0, 4.0)}
"""Of two seeds."""


def write_pair(folder, sequence, names, times=1, drops=DROPS):
    matrices = {
        method: {seed: [[80.0 + seed], [80.0 + seed - times * drop, 90.0]] for seed, drop in enumerate(of_seeds)}
        for method, of_seeds in drops.items()
    }
    return write(folder / f"{sequence}.jsonl", matrices, Settings(sequence=sequence, size=32), names=names)


def test_pairs_are_one_table_as_in_the_paper(tmp_path):
    paths = [
        write_pair(tmp_path, "pair-food-animals", ["A|B", "C"]),
        write_pair(tmp_path, "pair-animals-food", ["C", "A|B"], times=3),
    ]
    text = page(*paths)
    section = text[text.index("# Pairs from the network of emoji8, 32x32") :]
    lines = [line for line in section.splitlines() if line.startswith("|")][:6]
    assert lines[0] == r"| Method | Importance on | C → A\|B | A\|B → C | Mean drop |"
    assert lines[2:] == [
        f"| finetune | – | -24.5 (-105.0) / 90.0 | 45.5 (-35.0) / 90.0 | {interval(60.0, 80.0)} |",
        f"| mas | train | 76.0 (-4.5) / 90.0 | 79.0 (-1.5) / 90.0 | {interval(2.0, 4.0)} |",
        f"| mas | test | 75.2 (-5.2) / 90.0 | 78.8 (-1.8) / 90.0 | {interval(3.0, 4.0)} |",
        f"| mas-local | train | 70.0 (-10.5) / 90.0 | 77.0 (-3.5) / 90.0 | {interval(6.0, 8.0)} |",
    ]
    assert f"finetune drops {interval(60.0, 80.0)} points on the first task, mean over the pairs." in text
    assert f"mas drops {interval(2.0, 4.0)} points on the first task" in text
    assert f"mas-local drops {interval(6.0, 8.0)} points on the first task" in text
    assert f"test images instead of training images mas drops {interval(1.0, 0.0)} points more (the interval" in text
    assert "### pair-animals-food" in section


def test_a_method_or_seed_that_a_pair_lacks_is_not_in_the_mean(tmp_path):
    paths = [
        write_pair(tmp_path, "pair-food-animals", ["a", "b"], drops={"finetune": (30.0, 40.0), "mas": (1.0,)}),
        write_pair(tmp_path, "pair-animals-food", ["b", "a"], drops={"finetune": (10.0,)}),
    ]
    section = page(*paths).split("# Pairs")[1]
    assert "| finetune | – | 70.0 (-10.0) / 90.0 | 45.5 (-35.0) / 90.0 | 20.0 |" in section
    assert "| mas | train | – | 79.0 (-1.0) / 90.0 | – |" in section
    assert "finetune drops 20.0 points" in section
    assert "mas drops" not in section


def test_what_mas_learns_of_the_second_task_is_compared_with_a_frozen_body(tmp_path):
    ends = {"frozen": (90.0, 92.0), "mas": (93.0, 93.0), "mas-local": (89.0, 90.0)}
    matrices = {method: {seed: [[80.0], [80.0, end]] for seed, end in enumerate(of)} for method, of in ends.items()}
    section = page(write(tmp_path / "x.jsonl", matrices, Settings(sequence="pair-food-animals", size=32)))
    assert f"On the second task mas ends {interval(3.0, 1.0)} points above a frozen backbone (the interval" in section
    assert (
        f"On the second task mas-local ends {interval(1.0, 2.0)} points below a frozen backbone (the interval"
        in section
    )


def test_pairs_from_another_network_are_another_table(tmp_path):
    names = ("pair-food-animals", "pair-food-animals-scratch")
    text = page(*(write_pair(tmp_path, name, ["a", "b"]) for name in names))
    assert "# Pairs from the network of emoji8, 32x32" in text
    assert "# Pairs from the network of emoji8-scratch, 32x32" in text


@pytest.mark.parametrize(
    ("means", "points", "ends"),
    [
        ({0.1: 50.0, 1.0: 60.0, 10.0: 59.0, 100.0: 58.9}, 1, (1.0, 10.0)),
        ({0.1: 50.0, 1.0: 60.0, 10.0: 59.0, 100.0: 58.9}, 2, (1.0, 100.0)),
        ({1.0: 59.5, 0.1: 59.5, 10.0: 50.0, 20.0: 60.0}, 1, (0.1, 1.0)),
        ({1.0: 60.0, 10.0: 50.0}, 2, (1.0, 1.0)),
        ({0.001: 60.0, 0.1: 60.0, 1.0: 50.0, 10.0: 60.0, 20.0: 60.0}, 1, (0.001, 0.1)),  # in orders of magnitude
    ],
)
def test_the_plateau_is_the_widest_run_near_the_best(means, points, ends):
    assert plateau(means, points) == ends


def write_strengths(folder, means, **changes):
    return [
        write(
            folder / f"strength-{strength}.jsonl",
            {"mas": {seed: [[80.0], [mean - 10 + seed, mean + 10 + seed]] for seed in (0, 1)}},
            Settings(sequence="tiny", size=8, strength=strength, **changes),
        )
        for strength, mean in means.items()
    ]


MEANS = {0.1: 70.0, 1.0: 75.0, 10.0: 74.5, 100.0: 73.5}


def test_strengths_are_one_table_and_a_plateau(tmp_path):
    chosen = write(tmp_path / "chosen.jsonl", MATRICES, Settings(sequence="tiny", size=8, strength="chosen"))
    text = page(*write_strengths(tmp_path, MEANS), chosen)
    section = text[text.index("# Strengths of mas: tiny, 8x8") :]
    assert rows(section)["0.1"] == {
        "Average accuracy (%)": interval(70.0, 71.0), "Forgetting (points)": interval(20.0, 19.0)
    }  # fmt: skip
    assert list(rows(section)) == ["0.1", "1", "10", "100"]
    assert "highest average accuracy, 75.5%, at strength 1 of those tried." in section
    assert "within 1 point of it goes from 1 to 10: 1.0 orders of magnitude." in section
    assert "within 2 points of it goes from 1 to 100: 2.0 orders of magnitude." in section
    assert "(chosen" not in section


def test_other_settings_are_no_other_strengths(tmp_path):
    paths = [*write_strengths(tmp_path, {1.0: 70.0}), *write_strengths(tmp_path, {10.0: 75.0}, epochs=3)]
    assert "# Strengths" not in page(*paths)


def test_a_strength_of_0_has_no_order_of_magnitude(tmp_path):
    section = page(*write_strengths(tmp_path, {0.0: 70.0, **MEANS})).split("# Strengths")[1]
    assert list(rows(section)) == ["0.1", "1", "10", "100"]


@pytest.mark.parametrize("kind", ["", "retrieval-"])
def test_what_is_kept_in_use_is_compared_with_protecting_everything(tmp_path, kind):
    in_use = {"mas": {0: [(50.0,), (45.0, 1.0)], 1: [(40.0,), (30.0, 2.0)]},
              "mas-in-use": {0: [(50.0,), (49.0, 3.0)], 1: [(40.0,), (38.0, 4.0)]}}  # fmt: skip
    others = {"mas": {0: [(0.0,), (0.0, 1.0)], 1: [(40.0,), (20.0, 2.0)]},
              "mas-in-use": {0: [(0.0,), (0.0, 3.0)], 1: [(40.0,), (10.0, 4.0)]}}  # fmt: skip
    matrices = {
        "mas": {0: [[50.0], [45.0, 60.0]], 1: [[40.0], [30.0, 70.0]]},
        "mas-in-use": {0: [[50.0], [45.0, 65.0]], 1: [[40.0], [30.0, 74.0]]},
    }
    path = write(
        tmp_path / "x.jsonl", matrices, Settings(sequence="adaptation-x", size=8),
        scores={f"{kind}in-use": in_use, f"{kind}other-classes": others},
    )  # fmt: skip
    section = page(path).split("# Adaptation")[1]
    assert rows(section)["mas-in-use"] == {
        "Classes in use (%)": f"{interval(49.0, 38.0)} ({interval(98.0, 95.0)})",
        "Other classes (%)": f"{interval(0.0, 10.0)} (25.0)",  # of a seed that had nothing there is no share
        "New tasks (%)": interval(65.0, 74.0),
    }
    assert f"On the classes in use mas-in-use ends {interval(4.0, 8.0)} points above mas (the interval" in section
    assert f"On the other classes mas-in-use ends {interval(0.0, 10.0)} points below mas (the interval" in section
    assert f"On the new tasks mas-in-use ends {interval(5.0, 4.0)} points above mas (the interval" in section


def test_facts_are_mean_average_precision_over_all_of_them(tmp_path):
    matrices = {
        method: {seed: [[30.0], [20.0, 30.0 + seed]] for seed in (0, 1)} for method in ("finetune", "si", "mas")
    }
    over_all = {
        method: {seed: [(50.0,), (value + seed,)] for seed in (0, 1)}
        for method, value in {"finetune": 15.5, "si": 20.0, "mas": 31.5}.items()
    }
    paths = [
        write(tmp_path / f"{name}.jsonl", matrices, Settings(sequence=sequence, size=8), scores=scores)
        for name, sequence, scores in (
            ("facts", "facts", {"retrieval-over-all": over_all}),
            ("kinds", "facts-kinds", {}),
        )
    ]
    section = page(*paths).split("# Facts: mean average precision")[1]
    assert rows(section)["facts"] == {
        "finetune": interval(15.5, 16.5), "si": interval(20.0, 21.0), "mas": interval(31.5, 32.5)
    }  # fmt: skip
    assert rows(section)["kinds"]["mas"] == interval(25.0, 25.5)
    assert "facts, over all facts: mas 32.0 > si 20.5 > finetune 16.0." in section
    assert "mas ends 11.5 ± 0.0 points above si. si ends 4.5 ± 0.0 points above finetune." in section
    assert "mas reaches 2.00 times what finetune does." in section
    own = page(paths[0]).split("## Run it again")[0]
    assert "Mean average precision (%)" in own
    assert "accuracy" not in (own + section.split("[All results]")[0]).lower()


def test_the_order_of_the_files_is_no_matter(tmp_path):
    paths = [*write_strengths(tmp_path, MEANS), write(tmp_path / "a.jsonl", MATRICES)]
    assert page(*paths) == page(*reversed(paths))
