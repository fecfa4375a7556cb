"""Pictures of a run: the accuracy of every task over time, with a panel for each method.

Owns layout and colours. Uses matplotlib's figure without pyplot: no window, no global state.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from memsyn_bench.results.metrics import Matrix, average_accuracy, forgetting, spread
from memsyn_bench.results.report import accuracy_matrices, title
from memsyn_bench.running.record import Results
from memsyn_bench.settings import Settings

COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#AA4499")
"""Paul Tol's scheme "muted", whose colours differ for every kind of colour vision."""
MARKERS = "osD^vP*X"


def plot_accuracy(results: Results, settings: Settings, path: Path) -> None:
    """Write a picture (PNG): for each method, each task's test accuracy after every task from its own on.

    Lines are means over the seeds, bands go from the lowest seed to the highest; the black line is the mean over the
    tasks learned so far.
    """
    of_methods = accuracy_matrices(results)
    names = [record.name for record in next(iter(next(iter(results.values())).values()))]
    figure = Figure(figsize=(2.2 + 4.2 * len(of_methods), 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(of_methods), sharey=True, squeeze=False)[0]
    for panel, (method, of_seeds) in zip(panels, of_methods.items(), strict=True):
        _draw(panel, of_seeds, names)
        averages, drops = (spread([number(matrix) for matrix in of_seeds]) for number in (average_accuracy, forgetting))
        panel.set_title(f"{method}\naverage accuracy {averages}, forgetting {drops}", fontsize="medium")
    panels[0].set_ylabel("accuracy on the task's test images (%)")
    num_seeds = max(map(len, results.values()))
    bands = " (mean, lowest to highest)" if num_seeds > 1 else ""
    figure.suptitle(f"Accuracy of every task while the next ones are learned\n{title(settings, num_seeds)}{bands}")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right center", title="task", frameon=False)
    figure.savefig(path)


def _draw(panel: Axes, of_seeds: list[Matrix], names: list[str]) -> None:
    """One method's panel."""
    num_tasks = len(names)
    for task, name in enumerate(names):
        times = range(task + 1, num_tasks + 1)
        values = [[matrix[time - 1][task] for matrix in of_seeds] for time in times]
        colour = COLOURS[task % len(COLOURS)]
        marker = MARKERS[task % len(MARKERS)]
        panel.plot(times, [fmean(v) for v in values], color=colour, marker=marker, markersize=5, label=name)
        panel.fill_between(times, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
    means = [fmean(fmean(matrix[time]) for matrix in of_seeds) for time in range(num_tasks)]
    panel.plot(range(1, num_tasks + 1), means, color="black", linewidth=2.5, label="mean so far")
    panel.set_xlabel("tasks learned")
    panel.set_xticks(range(1, num_tasks + 1))
    panel.set_ylim(0, 100)
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def plot_strengths(strengths: list[float], curves: dict[str, list[list[float]]], heading: str, path: Path) -> None:
    """Write a picture (PNG): against the strength, on a logarithmic axis, with a panel for each quantity.

    `curves`: quantity -> for each strength its values of every seed. Lines are means over the seeds, bands go from the
    lowest seed to the highest.
    """
    figure = Figure(figsize=(4.6 * len(curves), 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (name, values), colour in zip(panels, curves.items(), COLOURS, strict=False):
        panel.plot(strengths, [fmean(v) for v in values], color=colour, marker="o", markersize=5)
        panel.fill_between(
            strengths, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0
        )
        panel.set_xscale("log")
        panel.set_xlabel("strength")
        panel.set_title(name, fontsize="medium")
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading)
    figure.savefig(path)


def plot_plasticity(curves: dict[str, dict[str, list[list[float]]]], heading: str, path: Path) -> None:
    """Write a picture (PNG): over the tasks, with a panel for each quantity and a line for each method.

    `curves`: quantity -> method -> for each task its values of every seed. Lines are means over the seeds, bands go
    from the lowest seed to the highest. A method has one colour in all panels.
    """
    methods = list(dict.fromkeys(method for lines in curves.values() for method in lines))
    figure = Figure(figsize=(1.6 + 4.6 * len(curves), 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (name, lines) in zip(panels, curves.items(), strict=True):
        for method, values in lines.items():
            colour = COLOURS[methods.index(method) % len(COLOURS)]
            tasks = range(1, len(values) + 1)
            low, high = [min(v) for v in values], [max(v) for v in values]
            panel.plot(tasks, [fmean(v) for v in values], color=colour, label=method)
            panel.fill_between(tasks, low, high, color=colour, alpha=0.15, lw=0)
        panel.set_xlabel("tasks learned")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_title(name, fontsize="medium")
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    found = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend([found[method] for method in methods], methods, loc="outside right center", frameon=False)
    figure.suptitle(heading)
    figure.savefig(path)
