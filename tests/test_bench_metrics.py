"""Metrics on a matrix worked out by hand, and what is made of them: the table and the picture."""

import struct

import pytest
from rich.console import Console

from memsyn.bench.metrics import average_accuracy, forgetting, learning_accuracy, spread
from memsyn.bench.plots import plot_accuracy
from memsyn.bench.record import TaskRecord
from memsyn.bench.report import markdown_table, rich_table
from memsyn.bench.settings import Settings

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
