"""Whether a network learns the late tasks of a long sequence as well as the early ones, for `memsyn-bench results`.

Owns the section's table and sentences, and the curves of its picture. Every number in a sentence is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, linear_regression

from memsyn_bench.results.findings import NONE, Findings, Numbers, compared, difference, estimate, signed
from memsyn_bench.results.markdown import escape, table
from memsyn_bench.running.plasticity import DEAD_UNITS, FREE_DIRECTIONS
from memsyn_bench.running.record import TaskRecord

WINDOW = 5
"""The number of tasks that are averaged: the first, the middle and the last ones."""
LEARNED_CURVE = "accuracy when learned (%)"
CURVES: dict[str, Callable[[TaskRecord], float | None]] = {
    LEARNED_CURVE: lambda record: record.accuracies[-1],
    f"{DEAD_UNITS} (%)": lambda record: record.plasticity.get(DEAD_UNITS),
    f"{FREE_DIRECTIONS} (%)": lambda record: record.plasticity.get(FREE_DIRECTIONS),
}
"""Quantity -> its value after one task; None if the record does not have it."""


def plasticity_section(found: Findings) -> str:
    """The section's Markdown without a heading; empty if no record of the run says how plastic the network is.

    Windows are the first, middle and last five tasks, or a third of the tasks if that is fewer. The slope is that of a
    least squares line through the accuracy when learned, task by task, for each seed.
    """
    if found.run.num_tasks < 3 or not any(record.plasticity for record in found.run.records):
        return ""
    size = window_size(found.run.num_tasks)
    tasks = f"{size} task{'s' * (size > 1)}"
    middle = (found.run.num_tasks - size) // 2
    windows = {"first": slice(size), "middle": slice(middle, middle + size), "last": slice(-size, None)}
    columns = ["Method", *(f"When learned, {name} {size} (%)" for name in windows)]
    columns += ["Last minus first (points)", "Slope (points / 10 tasks)"]
    columns += [f"{name.capitalize()}, {place} (%)" for name in (DEAD_UNITS, FREE_DIRECTIONS) for place in windows]
    rows = []
    for method in found.methods:
        of = {name: [window_means(found, method, name, window) for window in windows.values()] for name in CURVES}
        learned = of[LEARNED_CURVE]
        apart = difference(learned[-1], learned[0])
        others = [cells for name, cells in of.items() if name != LEARNED_CURVE]
        rows.append(
            [
                escape(method),
                *map(estimate, learned),
                signed(apart),
                estimate(slopes(found, method)),
                *(estimate(numbers) if numbers else NONE for cells in others for numbers in cells),
            ]
        )
    note = (
        f"Means over {tasks}, ± half of the 95% interval over the seeds. When learned: right after a task. Dead "
        "units: hidden units that are 0 on all training images of the task just learned. Free directions: those in "
        "which the projection leaves more than half of a step, the mean over layers weighted by their weights."
    )
    return "\n\n".join([said_of_plasticity(found), table(columns, rows), note])


def said_of_plasticity(found: Findings) -> str:
    """How much better or worse each method learns the last tasks than the first ones."""
    size = window_size(found.run.num_tasks)
    said = []
    for method in found.methods:
        first, last = (window_means(found, method, LEARNED_CURVE, tasks) for tasks in (slice(size), slice(-size, None)))
        apart = difference(last, first)
        if apart is not None:
            words = compared(apart, f"better than the first {size}", f"worse than the first {size}")
            said.append(f"{escape(method)} learns the last {size} tasks {words}.")
    return " ".join(said)


def window_size(num_tasks: int) -> int:
    """Five, or a third of the tasks if that is fewer."""
    return max(1, min(WINDOW, num_tasks // 3))


def window_means(found: Findings, method: str, curve: str, tasks: slice) -> Numbers:
    """Each finished seed's mean of a quantity over some tasks; none for a seed that has not recorded it for all."""
    means: Numbers = {}
    for seed, records in found.results[method].items():
        values = [CURVES[curve](record) for record in records[tasks]]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            means[seed] = fmean(known)
    return means


def slopes(found: Findings, method: str) -> Numbers:
    """Each seed's slope of the accuracy when learned over the tasks, in points for ten tasks."""
    return {
        seed: 10 * linear_regression(range(len(records)), [record.accuracies[-1] for record in records]).slope
        for seed, records in found.results[method].items()
    }


def plasticity_curves(found: Findings) -> dict[str, dict[str, list[list[float]]]]:
    """Quantity -> method -> for each task its values of every finished seed, where all tasks have one."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for name, value in CURVES.items():
        for method, seeds in found.results.items():
            by_task = [
                [own for records in seeds.values() if (own := value(records[task])) is not None]
                for task in range(found.run.num_tasks)
            ]
            if all(by_task):
                curves.setdefault(name, {})[method] = by_task
    return curves
