"""The charts of a run's report: what each shows, and the finding in its title.

Owns titles and axes; the numbers come from `findings`, `metrics`, `sections` and `groups`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from memsyn.report.charts import Series, axis, bars, heat, lines, logarithmic
from memsyn.report.parts import Chart, Panels
from memsyn.report.styles import INK, OPEN, Style, style_of
from memsyn_bench.results.findings import (
    ALONE,
    FINETUNE,
    FROZEN,
    JOINT,
    MAS,
    Findings,
    Group,
    Numbers,
    estimate,
    half,
    mean,
)
from memsyn_bench.results.groups import (
    PAIR_ROWS,
    adaptation,
    facts,
    kept,
    over_all,
    over_pairs,
    pairs,
)
from memsyn_bench.results.mas_strengths import sensitivity, strength_of
from memsyn_bench.results.metrics import average_accuracy, forgetting, learning_accuracy
from memsyn_bench.results.sections import kept_bytes, quantity, readable, seconds
from memsyn_bench.running.record import StrengthRecord

HALVES = (
    "A mark with a bar is the mean over the seeds with its 95% interval; of one seed, the mark alone. Marks "
    "after as many tasks stand side by side."
)
FILLED_BARS, OPEN_BARS = Style(INK, "square", ""), Style(INK, OPEN, "")
FEW = 6
"""The most methods that one chart shows from the start; of more methods only some are shown."""


def averages(found: Findings) -> Chart:
    """The methods by their average accuracy in the end, the best first."""
    methods = sorted((m for m in found.methods if m != ALONE), key=lambda method: -mean(found.averages(method)))
    best, word = found.best(), quantity(found.run.settings)
    title = f"Average {word} after the last task"
    if best is not None:
        first = " highest of those that store no data" if len(found.ranked) > 1 else ""
        title = f"{best} ends{first} at {estimate(found.averages(best))}%"
    numbers = {method: found.averages(method) for method in methods}
    return _by_method(title, numbers, f"average {word} after the last task (%)", "averages", marks=True)


def _by_method(title: str, numbers: dict[str, Numbers], unit: str, name: str, *, marks: bool = False) -> Chart:
    """A row for each method in its own style."""
    methods = list(numbers)
    series = Series("", FILLED_BARS, list(map(mean, numbers.values())), [], list(map(half, numbers.values())))
    styles = [style_of(method) for method in methods]
    return bars(title, methods, [series], axis(unit), name=name, rows="method", styles=styles, marks=marks)


def _first(methods: Sequence[str], *best: str | None) -> tuple[list[str], str]:
    """The methods that are shown from the start, and a note about the others."""
    wanted = [method for method in methods if method in (MAS, FINETUNE, FROZEN, JOINT, *best)]
    if len(methods) <= FEW or not wanted:
        return list(methods), ""
    names = f"{', '.join(wanted[:-1])} and {wanted[-1]}" if len(wanted) > 1 else wanted[0]
    return wanted, f"Of {len(methods)} methods {names} are shown first; click a name to show or hide it."


def tradeoff(found: Findings) -> Chart | None:
    """New tasks against old ones, a mark for each method and seed; none for a single task."""
    methods = [method for method in found.methods if method != ALONE]
    if found.run.num_tasks < 2 or not methods:
        return None
    forgotten = {method: found.by_seed(method, forgetting) for method in methods}
    learned = {method: found.by_seed(method, learning_accuracy) for method in methods}
    ranked = found.ranked or methods
    least = min(ranked, key=lambda method: mean(forgotten[method]))
    fastest = max(ranked, key=lambda method: mean(learned[method]))
    shown, note = _first(methods, found.best(), least, fastest)
    series = [
        Series(
            method,
            style_of(method),
            list(forgotten[method].values()),
            list(learned[method].values()),
            words=[f"seed {seed}" for seed in learned[method]],
            shown=method in shown,
        )
        for method in methods
    ]
    what = quantity(found.run.settings)
    drop, best = round(mean(forgotten[least]), 1) + 0.0, mean(learned[fastest])
    title = f"{least} forgets least ({drop:.1f} points), {fastest} learns best ({best:.1f}%)"
    x = axis("forgetting (points; left is better)")
    y = axis(f"{what} when learned (%)")
    return lines(title, series, x, y, name="tradeoff", mode="markers", height=420, note=note)


def over_time(found: Findings) -> Panels | None:
    """A panel for each task, a line for each method."""
    methods = [method for method in found.methods if method != ALONE]
    if not methods:
        return None
    last = found.run.num_tasks
    shown, note = _first(methods, found.best())
    records = [record for m in methods for seed in found.results[m].values() for record in seed]
    lowest = min((one for record in records for one in record.accuracies if math.isfinite(one)), default=0.0)
    y = axis(f"{quantity(found.run.settings)} (%)", range=[max(0, 10 * math.floor(lowest / 10) - 5), 102])
    x = axis("tasks learned", range=[0.5, last + 0.5], dtick=1 if last <= 10 else 2)
    charts = []
    for task, name in enumerate(found.tasks):
        series = []
        for method in methods:
            numbers = [found.by_seed(method, _entry(after, task)) for after in range(task, last)]
            times = list(range(task + 1, last + 1))
            means, halves = list(map(mean, numbers)), list(map(half, numbers))
            series.append(Series(method, style_of(method), times, means, halves, shown=method in shown))
        charts.append(lines(_ends(name, series), series, x, y, name=f"task {task + 1}", height=240, dodge=True))
    title = "Every task while the next ones are learned"
    return Panels(title, charts, f"{HALVES} {note}".strip(), charts[0].series)


def _entry(after: int, task: int) -> Callable[[Sequence[Sequence[float]]], float]:
    return lambda matrix: matrix[after][task]


def _ends(task: str, series: Sequence[Series]) -> str:
    ends = sorted((one.y[-1], one.name) for one in series)
    (low, worst), (high, best) = ends[0], ends[-1]
    return (
        f"{task}: {low:.0f}% ({worst}) to {high:.0f}% ({best})" if len(ends) > 1 else f"{task}: {high:.1f}% at the end"
    )


def matrix_charts(found: Findings) -> Panels | None:
    """A heat map for each method."""
    methods = [method for method in found.methods if method != ALONE]
    if not methods or found.run.num_tasks < 2:
        return None
    numbers = [str(task + 1) for task in range(found.run.num_tasks)]
    word = quantity(found.run.settings)
    charts = []
    for method in methods:
        values = [
            [
                mean(found.by_seed(method, _entry(after, task))) if task <= after else math.nan
                for task in range(len(numbers))
            ]
            for after in range(len(numbers))
        ]
        ends, drops = mean(found.averages(method)), round(mean(found.by_seed(method, forgetting)), 1) + 0.0
        charts.append(
            heat(
                f"{method} ends at {ends:.1f}%, forgets {drops:.1f}",
                numbers,
                found.tasks,
                values,
                axis(f"{word} on task (%)"),
                axis("after task"),
                name=f"matrix {method}",
                hover=f"{word} %{{z:.1f}}%",
                highest=100,
                ticks=numbers,
                written=True,
            )
        )
    note = "A row after each task, mean over the seeds; dark is 0%, yellow 100%. The tasks: "
    names = ", ".join(f"{number} {name}" for number, name in zip(numbers, found.tasks, strict=True))
    return Panels(f"The {word} matrix of each method", charts, f"{note}{names}.")


def costs(found: Findings) -> Panels:
    """Time and memory."""
    sizes = {method: kept_bytes(found, method, -1) for method in found.methods}
    usual = {method: seconds(found, method) for method in found.methods}
    slowest, biggest = max(usual, key=lambda m: usual[m]), max(sizes, key=lambda m: sizes[m])
    time = f"{slowest} takes {usual[slowest]:.0f} s"
    if FINETUNE in usual and slowest != FINETUNE:
        time += f", {usual[slowest] / usual[FINETUNE]:.1f} times as long as {FINETUNE}"
    in_seconds: dict[str, Numbers] = {method: {0: value} for method, value in usual.items()}
    in_mb: dict[str, Numbers] = {method: {0: size / 1e6} for method, size in sizes.items()}
    charts = [
        _by_method(time, in_seconds, "training, measuring and testing, median of the seeds (s)", "seconds"),
        _by_method(
            f"{biggest} keeps {readable(sizes[biggest])}", in_mb, "kept beside the model at the end (MB)", "kept"
        ),
    ]
    return Panels("What the methods cost", charts)


def chosen(choices: Sequence[StrengthRecord], word: str) -> Chart | None:
    """How the strengths were chosen; None if none was."""
    choices = [choice for choice in choices if choice.candidates]
    if not choices:
        return None
    widest = max(choices, key=lambda choice: max(choice.scores) - min(choice.scores))
    apart = max(widest.scores) - min(widest.scores)
    title = f"The strength matters most to {widest.method}: {apart:.1f} points between the candidates"
    methods = [choice.method for choice in choices]
    shown, note = _first(methods, widest.method)
    series = [Series(c.method, style_of(c.method), c.candidates, c.scores, shown=c.method in shown) for c in choices]
    y = axis(f"validation {word} (%)")
    return lines(title, series, logarithmic("strength"), y, name="strengths-chosen", note=note)


def group_charts(group: Group, describe: Callable[[Group], str]) -> list[Chart]:
    """The charts of a group that `describe` describes; none for kinds that have none."""
    return GROUP_CHARTS[describe](group) if describe in GROUP_CHARTS else []


def _sensitivity_charts(group: Group) -> list[Chart]:
    ordered = sorted(group, key=strength_of)
    strengths = [strength_of(found) for found in ordered]
    charts = []
    for words, number, unit in (
        ("average accuracy", average_accuracy, "%"),
        ("forgetting", forgetting, "points"),
    ):
        numbers = [found.by_seed(MAS, number) for found in ordered]
        series = Series(MAS, style_of(MAS), strengths, list(map(mean, numbers)), list(map(half, numbers)))
        pick = max if number is average_accuracy else min
        best = pick(range(len(strengths)), key=lambda place: series.y[place])
        title = (
            f"{pick.__name__.capitalize()}imum of {MAS}'s {words}: {series.y[best]:.1f} {unit} at {strengths[best]:g}"
        )
        charts.append(
            lines(title, [series], logarithmic("strength"), axis(f"{words} ({unit})"), name=f"strength {words}")
        )
    return charts


def _adaptation_charts(group: Group) -> list[Chart]:
    charts = []
    for found in group:
        methods = [method for method in found.ranked if kept(found, method, "in-use")[1]]
        if not methods:
            continue
        series = []
        for words, scoring, look in (
            ("classes in use", "in-use", FILLED_BARS),
            ("other classes", "other-classes", OPEN_BARS),
        ):
            numbers = [kept(found, method, scoring)[1] for method in methods]
            if any(numbers):
                series.append(Series(words, look, list(map(mean, numbers)), [], list(map(half, numbers))))
        best = max(methods, key=lambda method: mean(kept(found, method, "in-use")[1]))
        use, others = (kept(found, best, scoring)[1] for scoring in ("in-use", "other-classes"))
        title = f"{best} keeps most on the classes in use: {mean(use):.1f}%"
        title += f", on the others {mean(others):.1f}%" if others else ""
        unit = axis("kept of the accuracy on earlier tasks when they were learned (%)")
        styles = [style_of(method) for method in methods]
        name = f"adaptation {found.name}"
        charts.append(bars(title, methods, series, unit, name=name, rows="method", styles=styles))
    return charts


def _facts_charts(group: Group) -> list[Chart]:
    charts = []
    for found in group:
        numbers = {m: over_all(found, m) for m in sorted(found.methods, key=lambda m: -mean(over_all(found, m)))}
        numbers.pop(ALONE, None)
        if numbers:
            best = next(iter(numbers))
            title = f"{found.name}: {best} finds most facts, {estimate(numbers[best])}%"
            unit = "mean average precision over all facts (%)"
            charts.append(_by_method(title, numbers, unit, f"facts {found.name}"))
    return charts


def _pairs_charts(group: Group) -> list[Chart]:
    drops = {method: numbers for method in PAIR_ROWS if (numbers := over_pairs(group, method, forgetting))}
    if not drops:
        return []
    least = min(drops, key=lambda method: mean(drops[method]))
    title = f"{least} drops least on the first task: {estimate(drops[least])} points"
    return [_by_method(title, drops, "mean drop over the pairs (points)", "pairs")]


GROUP_CHARTS: dict[Callable[[Group], str], Callable[[Group], list[Chart]]] = {
    sensitivity: _sensitivity_charts,
    adaptation: _adaptation_charts,
    facts: _facts_charts,
    pairs: _pairs_charts,
}
"""The charts of a group, by the function that describes the group."""
