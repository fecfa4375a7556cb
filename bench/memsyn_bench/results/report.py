"""The table at the end of a run, for the terminal and as Markdown: the same cells in both.

Owns words and layout; the numbers come from `metrics`.
"""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from memsyn_bench.results.markdown import escape, table
from memsyn_bench.results.metrics import Matrix, average_accuracy, forgetting, learning_accuracy, spread
from memsyn_bench.running.record import Results
from memsyn_bench.settings import Settings, training_words

COLUMNS: dict[str, Callable[[Matrix], float]] = {
    "Average accuracy (%)": average_accuracy,
    "Forgetting (points)": forgetting,
    "When learned (%)": learning_accuracy,
}
"""The table's columns after the method."""

MEANINGS = (
    "Average accuracy: over all tasks after the last one. Forgetting: the mean drop from right after learning a "
    "task to the end; below 0 is gain. When learned: the mean accuracy right after learning each task."
)


def accuracy_matrices(results: Results) -> dict[str, list[Matrix]]:
    """Method -> the accuracy matrix of each seed."""
    return {
        method: [[record.accuracies for record in records] for records in seeds.values()]
        for method, seeds in results.items()
    }


def cells(results: Results) -> list[list[str]]:
    """The table's rows: a method and its numbers over the seeds."""
    return [
        [method, *(str(spread([number(matrix) for matrix in of_seeds])) for number in COLUMNS.values())]
        for method, of_seeds in accuracy_matrices(results).items()
    ]


def title(settings: Settings, num_seeds: int) -> str:
    """The sequence, size and number of seeds of a run, in words, and the optimizer if it is not Adam."""
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
    optimizer = "" if settings.optimizer == Settings.optimizer else f"{settings.optimizer}, "
    return f"{settings.sequence}, {settings.size}x{settings.size}, {optimizer}{seeds}"


def note(settings: Settings, num_seeds: int) -> str:
    """How to read the numbers, and with which settings they were made."""
    how = {1: "One seed: no spread is known.", 2: "Mean over two seeds and, in brackets, both."}
    spreads = how.get(num_seeds, "Mean over the seeds ± standard deviation.")
    return f"{MEANINGS} {spreads} {training_words(settings)}"


def rich_table(results: Results, settings: Settings) -> Table:
    """The table for the terminal."""
    num_seeds = max(map(len, results.values()))
    found = Table(title=title(settings, num_seeds), caption=note(settings, num_seeds), caption_justify="left")
    found.add_column("Method")
    for column in COLUMNS:
        found.add_column(column, justify="right")
    for row in cells(results):
        found.add_row(*row)
    return found


def markdown_table(results: Results, settings: Settings) -> str:
    """The same table for a document."""
    num_seeds = max(map(len, results.values()))
    rows = [[escape(method), *numbers] for method, *numbers in cells(results)]
    heading, below = title(settings, num_seeds), note(settings, num_seeds)
    return f"**{heading}**\n\n{table(['Method', *COLUMNS], rows)}\n\n{below}\n"
