"""The table at the end of a run, for the terminal and as Markdown: the same cells in both.

Owns words and layout; the numbers come from `metrics`.
"""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from memsyn.bench.metrics import Matrix, average_accuracy, forgetting, learning_accuracy, spread
from memsyn.bench.record import Results
from memsyn.bench.settings import CHOSEN, OWN, Settings

COLUMNS: dict[str, Callable[[Matrix], float]] = {
    "Average accuracy (%)": average_accuracy,
    "Forgetting (points)": forgetting,
    "When learned (%)": learning_accuracy,
}
"""The table's columns after the method."""


def matrices(results: Results) -> dict[str, list[Matrix]]:
    """Method -> the accuracy matrix of each seed."""
    return {
        method: [[record.accuracies for record in records] for records in seeds.values()]
        for method, seeds in results.items()
    }


def cells(results: Results) -> list[list[str]]:
    """The table's rows: a method and its numbers over the seeds."""
    return [
        [method, *(str(spread([number(matrix) for matrix in of_seeds])) for number in COLUMNS.values())]
        for method, of_seeds in matrices(results).items()
    ]


def title(settings: Settings, num_seeds: int) -> str:
    """What was run."""
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
    return f"{settings.sequence}, {settings.size}x{settings.size}, {seeds}"


def note(settings: Settings, num_seeds: int) -> str:
    """How to read the numbers, and with which settings they were made."""
    how = {1: "One seed: no spread is known.", 2: "Mean over two seeds and, in brackets, both."}
    return (
        "Average accuracy: over all tasks after the last one. Forgetting: the mean drop from right after learning a "
        "task to the end; below 0 is gain. When learned: the mean accuracy right after learning each task. "
        f"{how.get(num_seeds, 'Mean over the seeds ± standard deviation.')} {settings.epochs} epochs a task, Adam, "
        f"lr {settings.lr:g}, batch size {settings.batch_size}, {_strength(settings.strength)}."
    )


def _strength(strength: float | str) -> str:
    words = {OWN: "each method's own strength", CHOSEN: "strengths chosen on validation data of the first two tasks"}
    return words[strength] if isinstance(strength, str) else f"strength {strength:g}"


def rich_table(results: Results, settings: Settings) -> Table:
    """The table for the terminal."""
    num_seeds = max(map(len, results.values()))
    table = Table(title=title(settings, num_seeds), caption=note(settings, num_seeds), caption_justify="left")
    table.add_column("Method")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in cells(results):
        table.add_row(*row)
    return table


def markdown_table(results: Results, settings: Settings) -> str:
    """The same table for a document."""
    num_seeds = max(map(len, results.values()))
    lines = [
        f"**{title(settings, num_seeds)}**\n",
        f"| Method | {' | '.join(COLUMNS)} |",
        f"|---|{'---:|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in cells(results)),
        f"\n{note(settings, num_seeds)}\n",
    ]
    return "\n".join(lines)
