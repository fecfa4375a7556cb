"""Metrics on a matrix worked out by hand, and what is made of them: the table and the picture."""

import struct
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from memsyn import OptionError
from memsyn_bench.pages.plots import plot_accuracy
from memsyn_bench.results.metrics import (
    average_accuracy,
    backward_transfer,
    diagonal,
    forgetting,
    forward_transfer,
    interval,
    intransigence,
    learning_accuracy,
    paired,
    spread,
)
from memsyn_bench.results.report import markdown_table, note, rich_table
from memsyn_bench.running.record import TaskRecord
from memsyn_bench.settings import Settings

MATRIX = [[80.0], [60.0, 90.0], [50.0, 70.0, 100.0]]
SETTINGS = Settings(sequence="tiny", size=8, epochs=2, batch_size=4, lr=0.01, strength=2.0)


def results(*offsets):
    """One method, whose seeds have MATRIX plus an offset each, and a second one that forgets nothing."""

    def records(method, seed, matrix):
        return [
            TaskRecord(method, seed, task, f"task {task}", tuple(row), 0.1, 0.0, 1.0, SETTINGS.fingerprint, None, 0, 0)
            for task, row in enumerate(matrix)
        ]

    return {
        "worse": {s: records("worse", s, [[a + o for a in row] for row in MATRIX]) for s, o in enumerate(offsets)},
        "better": {s: records("better", s, [[80.0], [80.0, 80.0], [80.0] * 3]) for s in range(len(offsets))},
    }


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert average_accuracy(MATRIX) == pytest.approx((50 + 70 + 100) / 3)


def test_forgetting_is_the_mean_drop_of_all_tasks_but_the_last():
    assert forgetting(MATRIX) == pytest.approx(((80 - 50) + (90 - 70)) / 2)
    assert forgetting([[50.0], [60.0, 90.0]]) == -10.0
    assert forgetting([[50.0]]) == 0.0


def test_learning_accuracy_is_the_mean_of_the_diagonal():
    assert learning_accuracy(MATRIX) == pytest.approx(90.0)


def test_backward_transfer_is_the_mean_change_of_all_tasks_but_the_last():
    assert backward_transfer(MATRIX) == pytest.approx(((50 - 80) + (70 - 90)) / 2)
    assert backward_transfer([[50.0]]) == 0.0


def test_forward_transfer_is_the_mean_gain_over_each_task_alone_from_the_second_on():
    assert diagonal(MATRIX) == [80.0, 90.0, 100.0]
    assert forward_transfer(MATRIX, [10.0, 70.0, 95.0]) == pytest.approx(((90 - 70) + (100 - 95)) / 2)
    assert forward_transfer([[50.0]], [10.0]) == 0.0
    with pytest.raises(ValueError, match="zip"):
        forward_transfer(MATRIX, [10.0, 70.0])


def test_intransigence_is_the_mean_shortfall_from_the_reference():
    assert intransigence(MATRIX, [85.0, 95.0, 99.0]) == pytest.approx((5 + 5 - 1) / 3)
    with pytest.raises(ValueError, match="zip"):
        intransigence(MATRIX, [85.0])


@pytest.mark.parametrize(
    ("num", "t"),  # the 97.5% points in every printed table of Student's t
    [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (11, 2.228), (31, 2.042), (121, 1.980)],
)
def test_the_interval_is_t_times_the_standard_error(num, t):
    values = [10.0 * (index % 2) + index for index in range(num)]
    mean = sum(values) / num
    variance = sum((value - mean) ** 2 for value in values) / (num - 1)
    found = interval(values)
    assert (found.mean, found.num_seeds) == (pytest.approx(mean), num)
    assert found.half == pytest.approx(t * (variance / num) ** 0.5, rel=4e-4)


def test_an_interval_covers_the_mean_in_95_of_100_samples():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 5, generator=generator, dtype=torch.float64).tolist()
    covered = sum(abs(found.mean) <= found.half for found in map(interval, samples))
    assert 0.94 < covered / len(samples) < 0.96


def test_a_paired_difference_is_of_seed_by_seed():
    found = paired([70.0, 80.0, 90.0], [69.0, 78.0, 87.0])
    assert str(found) == "2.0 ± 2.5"  # differences 1, 2, 3: 4.303 * 1 / sqrt(3)
    assert found.half < interval([70.0, 80.0, 90.0]).half / 9


def test_intervals_need_two_seeds_and_the_same_ones():
    with pytest.raises(OptionError, match=r"an interval needs at least two seeds, got 1\. Run more seeds"):
        interval([1.0])
    with pytest.raises(OptionError, match="needs the same seeds on both sides, got 2 and 3"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])


def test_nothing_is_minus_nought():
    assert str(spread([-0.04])) == str(spread([-0.0])) == "0.0"
    assert str(interval([-0.05, -0.01])) == "0.0 ± 0.3"
    assert str(spread([-0.06])) == "-0.1"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([70.0], "70.0"),
        ([70.0, 73.0], "71.5 (70.0 to 73.0)"),
        ([70.0, 71.0, 72.0], "71.0 ± 1.0"),
        ([-0.2, -0.1, 0.0, 0.1], "-0.1 ± 0.1"),
    ],
)
def test_spread_fits_the_number_of_seeds(values, text):
    assert str(spread(values)) == text
    assert spread(values).num_seeds == len(values)


def test_markdown_table_to_the_letter():
    assert markdown_table(results(0.0), SETTINGS) == (
        "**tiny, 8x8, 1 seed**\n"
        "\n"
        "| Method | Average accuracy (%) | Forgetting (points) | When learned (%) |\n"
        "|---|---:|---:|---:|\n"
        "| worse | 73.3 | 25.0 | 90.0 |\n"
        "| better | 80.0 | 0.0 | 80.0 |\n"
        "\n"
        "Average accuracy: over all tasks after the last one. Forgetting: the mean drop from right after learning a "
        "task to the end; below 0 is gain. When learned: the mean accuracy right after learning each task. "
        "One seed: no spread is known. 2 epochs a task, Adam, lr 0.01, batch size 4, strength 2.\n"
    )


@pytest.mark.parametrize(
    ("offsets", "cell", "note"),
    [
        ((0.0,), "73.3", "One seed"),
        ((-1.0, 1.0), "73.3 (72.3 to 74.3)", "in brackets, both"),
        ((-1.0, 0.0, 1.0), "73.3 ± 1.0", "± standard deviation"),
    ],
)
def test_both_tables_hold_the_same_cells(offsets, cell, note):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(rich_table(results(*offsets), SETTINGS))
    for text in (capture.get(), markdown_table(results(*offsets), SETTINGS)):
        assert cell in text
        assert note in text


def test_the_picture_is_a_png_as_wide_as_its_panels(tmp_path):
    path = tmp_path / "accuracy.png"
    plot_accuracy(results(-5.0, 0.0), SETTINGS, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1.8 * height > 600


@pytest.mark.parametrize(
    ("strength", "words"),
    [
        (0.5, "strength 0.5."),
        ("own", "each method's own strength."),
        ("chosen", "strengths chosen on validation data."),
    ],
)
def test_the_note_says_how_strengths_were_set(strength, words):
    assert note(replace(SETTINGS, strength=strength), 1).endswith(words)
