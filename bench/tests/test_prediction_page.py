"""docs/prediction.md: its tables are those of the lines beside it, and its statistics are what they are called."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from benchmarks import prediction_page as own

from memsyn.comparing.prediction import TIMES

DOCS = Path(__file__).parents[2] / "docs"


def line(sequence, predicted, measured, kind="fine-tuning"):
    facts = {
        "change": measured,
        "mean_change": measured,
        "disagreement": measured / 2,
        "divergence": measured**2,
        "lost_accuracy": measured / 4,
        "linear_change": measured,
    }
    return {
        "sequence": sequence,
        "checkpoint": f"{predicted:g}",
        "kind": kind,
        "predicted": predicted,
        "predicted_whole": predicted,
        "by_gradients": {"8": 2 * measured, "64": measured},
        "squared_outputs": 4.0,
        "bound": 4 / (1 + measured),
        "distance": 1.0 + predicted,
        "measured": facts,
        "layers": {"a": [3 * predicted, 0.6 * measured], "b": [predicted, 0.8 * measured]},
    }


LINES = [line(name, scale * change, change) for name, scale in (("x", 0.5), ("y", 2.0)) for change in (0.1, 0.2, 0.4)]


def test_the_page_has_the_tables_of_its_lines():
    text = (DOCS / "prediction.md").read_text("utf-8")
    between = text.partition(own.START)[2].partition(own.END)[0]
    assert between == f"\n{own.tables(own.read(DOCS / 'prediction.jsonl'))}\n"
    assert "![" in text
    assert (DOCS / "prediction.png").read_bytes().startswith(b"\x89PNG")


def test_the_lines_are_of_four_sequences_and_of_every_kind():
    lines = own.moved(own.read(DOCS / "prediction.jsonl"))
    assert len(lines) >= 50
    assert len({one["sequence"] for one in lines}) == 4
    assert {one["kind"] for one in lines} == {
        "fine-tuning", "penalty", "projection", "frozen body", "LoRA", "average"
    }  # fmt: skip
    keys = [(one["sequence"], one["checkpoint"]) for one in own.read(DOCS / "prediction.jsonl")]
    assert len(set(keys)) == len(keys)


def test_nine_in_ten_measured_changes_are_within_what_a_verdict_allows_for():
    lines = own.moved(own.read(DOCS / "prediction.jsonl"))
    times = np.array([one["measured"]["change"] / one["predicted"] for one in lines])
    assert len(times) == 97
    assert np.quantile(times, 0.9) == pytest.approx(TIMES, abs=0.05)


def test_correlations_are_of_ranks_within_sequences_and_over_all():
    predicted, change, bound = own.GUESSES["predicted"], own.TRUTHS["change"], own.GUESSES["bound"]
    assert own.correlation(LINES[:3], predicted, change) == (1.0, 1.0, 1.0)
    assert own.correlation(LINES[:3], bound, change)[0] == -1.0
    value, low, high = own.correlation(LINES, predicted, change)
    # Ranks of the predictions 0.05 0.1 0.2 0.2 0.4 0.8 and of the changes 0.1 0.2 0.4 0.1 0.2 0.4.
    x, y = [1, 2, 3.5, 3.5, 5, 6], [1.5, 3.5, 5.5, 1.5, 3.5, 5.5]
    mean = 3.5
    expected = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True)) / math.sqrt(
        sum((a - mean) ** 2 for a in x) * sum((b - mean) ** 2 for b in y)
    )
    assert value == pytest.approx(expected)
    assert low < value < high <= 1


def test_what_does_not_change_old_outputs_is_in_no_correlation(tmp_path):
    with_none = [*LINES, line("x", 0.0, 0.0)]
    assert own.correlations(with_none) == own.correlations(LINES)
    assert own.ratios(with_none) == own.ratios(LINES)
    assert own.figures(with_none).count("\n") == own.figures(LINES).count("\n") + 1


def test_ratios_and_layers_are_medians():
    rows = {row.split(" | ")[0]: row.split(" | ")[1:] for row in own.ratios(LINES).splitlines()}
    assert rows["| x"][:2] == ["3", "0.50 (0.50 to 0.50)"]
    assert rows["| y"][1] == "2.00 (2.00 to 2.00)"
    assert rows["| x"][2] == "2.00 (2.00 to 2.00)"
    # The layer whose prediction is larger changes less; both alone are as much as together: 0.6^2 + 0.8^2 = 1.
    assert own.layers(LINES).splitlines()[2] == "| x | - | 0% | 1.56 | 1.00 |"


def test_a_page_keeps_what_is_beside_its_tables(tmp_path):
    source, page = tmp_path / "prediction.jsonl", tmp_path / "prediction.md"
    source.write_text("".join(json.dumps(one) + "\n" for one in LINES), "utf-8")
    page.write_text(f"before\n{own.START}old\n{own.END}after\n", "utf-8")
    for _ in range(2):
        own.write_page(source, tmp_path)
        assert page.read_text("utf-8") == f"before\n{own.START}\n{own.tables(LINES)}\n{own.END}after\n"
    assert (tmp_path / "prediction.png").read_bytes().startswith(b"\x89PNG")
