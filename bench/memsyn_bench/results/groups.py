"""Results of several files together, for `memsyn-bench results`: pairs, strengths, adaptation, facts.

Owns which files belong together, their tables, and the sentences about them. Every number in a sentence is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean

from memsyn_bench.methods.registry import METHODS
from memsyn_bench.results.findings import (
    ALONE,
    FINETUNE,
    FROZEN,
    MAS,
    NONE,
    Findings,
    Numbers,
    compared,
    difference,
    estimate,
    mean,
)
from memsyn_bench.results.markdown import escape, table
from memsyn_bench.results.metrics import Matrix, diagonal, forgetting
from memsyn_bench.sequences.sequences import find_sequence
from memsyn_bench.settings import OWN

Group = list[Findings]

LOCAL, IN_USE, SI = "mas-local", "mas-in-use", "si"
PAIR_ROWS = {
    FINETUNE: (FINETUNE, ""),
    FROZEN: (FROZEN, ""),
    MAS: ("mas", "train"),
    "mas-test": ("mas", "test"),
    "mas-both": ("mas", "both"),
    LOCAL: ("mas-local", "train"),
    "mas-local-test": ("mas-local", "test"),
    "mas-local-both": ("mas-local", "both"),
}
"""The rows of the pairs' table: the method's family and what importance is measured on."""


@dataclass(frozen=True)
class GroupKind:
    """A kind of group.

    Attributes:
        heading: the group's first file -> the heading of the section.
        key: what the files of one group have in common; None for a file that is not of the kind.
        least: the smallest number of files in a group.
        describe: group -> the section's text.
    """

    heading: Callable[[Findings], str]
    key: Callable[[Findings], Hashable]
    describe: Callable[[Group], str]
    least: int = 1


def in_groups(files: Sequence[Findings]) -> tuple[list[tuple[GroupKind, Group]], list[Findings]]:
    """The groups, in the order of `KINDS`, each file in the first that takes it; and the files in none."""
    left, groups = list(files), []
    for kind in KINDS:
        by_key: dict[Hashable, Group] = {}
        for found in left:
            key = kind.key(found) if found.methods else None
            if key is not None:
                by_key.setdefault(key, []).append(found)
        for group in by_key.values():
            if len(group) >= kind.least:
                groups.append((kind, group))
                left = [found for found in left if found not in group]
    return groups, left


def pairs(group: Group) -> str:
    """The first task before and after the second, and the second, as in the paper's Table 3."""
    drops = {method: over_pairs(group, method, forgetting) for method in PAIR_ROWS}
    learned = {method: over_pairs(group, method, _on_second) for method in (FROZEN, MAS, LOCAL)}
    rows = []
    for method, (family, images) in PAIR_ROWS.items():
        if any(method in found.results for found in group):
            cells = [_pair_cell(found, method) for found in group]
            rows.append([escape(family), images or NONE, *cells, estimate(drops[method])])
    columns = ["Method", "Importance on", *(" → ".join(map(escape, found.tasks)) for found in group), "Mean drop"]
    said = [
        f"{method} drops {estimate(drops[method])} points on the first task, mean over the pairs."
        for method in (FINETUNE, MAS, LOCAL)
        if drops[method]
    ]
    for method in (MAS, LOCAL):
        apart = difference(learned[method], learned[FROZEN])
        if apart:
            words = compared(apart, "above a frozen backbone", "below a frozen backbone")
            said.append(f"On the second task {method} ends {words}, mean over the pairs.")
        for images in ("test", "both"):
            apart = difference(drops[f"{method}-{images}"], drops[method])
            if apart:
                words = {"test": "test images", "both": "training and test images"}[images]
                said.append(
                    f"With importance from {words} instead of training images {method} drops "
                    f"{compared(apart, 'more', 'less')}."
                )
    note = (
        "A cell: accuracy on the first task after the second (its change) / accuracy on the second, in percent, means "
        "over the seeds. Mean drop: over the pairs, in points, of the seeds that have finished every pair."
    )
    return "\n\n".join(filter(None, [" ".join(said), table(columns, rows), note]))


def over_pairs(group: Group, method: str, number: Callable[[Matrix], float]) -> Numbers:
    """Each seed's mean over the pairs, for the seeds that have finished every pair. The drop is `forgetting`."""
    of_pairs = [found.by_seed(method, number) for found in group]
    seeds = sorted(set.intersection(*(set(numbers) for numbers in of_pairs)))
    return {seed: fmean(numbers[seed] for numbers in of_pairs) for seed in seeds}


def _on_second(matrix: Matrix) -> float:
    return matrix[-1][1]


def _pair_cell(found: Findings, method: str) -> str:
    if method not in found.results:
        return NONE
    first = mean(found.by_seed(method, lambda matrix: matrix[-1][0]))
    second = mean(found.by_seed(method, _on_second))
    change = round(-mean(found.by_seed(method, forgetting)), 1) + 0.0  # no minus before a zero
    return f"{first:.1f} ({change:+.1f}) / {second:.1f}"


def strength_of(found: Findings) -> float:
    """The strength that the file was made with; only for files whose strength is a number."""
    strength = found.run.settings.strength
    assert not isinstance(strength, str)
    return strength


def sensitivity(group: Group) -> str:
    """Accuracy and forgetting at each strength, and how wide the plateau is."""
    ordered = sorted(group, key=strength_of)
    rows = [
        [f"{strength_of(found):g}", estimate(found.averages(MAS)), estimate(found.by_seed(MAS, forgetting))]
        for found in ordered
    ]
    means = {strength_of(found): mean(found.averages(MAS)) for found in ordered}
    best = max(means, key=lambda strength: means[strength])
    said = [f"{MAS} has its highest average accuracy, {means[best]:.1f}%, at strength {best:g} of those tried."]
    for points in (1, 2):
        low, high = plateau(means, points)
        said.append(
            f"The widest run of strengths within {points} point{'s' * (points > 1)} of it goes from {low:g} to "
            f"{high:g}: {math.log10(high / low):.1f} orders of magnitude."
        )
    columns = ["Strength", "Average accuracy (%)", "Forgetting (points)"]
    return "\n\n".join([" ".join(said), table(columns, rows)])


def plateau(means: dict[float, float], points: float) -> tuple[float, float]:
    """The ends of the widest run, in orders of magnitude, of neighbouring strengths at most `points` below the best."""
    enough = max(means.values()) - points - 1e-9
    near = [list(run) for fits, run in groupby(sorted(means), lambda strength: means[strength] >= enough) if fits]
    widest = max(near, key=lambda run: run[-1] / run[0])
    return widest[0], widest[-1]


def adaptation(group: Group) -> str:
    """What is kept on the classes in use and on the others, and what the new tasks reach, file by file."""
    note = (
        "Classes in use, other classes: accuracy after the last task on those of the earlier tasks and, in brackets, "
        "in percent of what it was when they were learned. New tasks: accuracy when learned, from the second task on."
    )
    return "\n\n".join([*map(_adaptation_of_run, group), note])


def _adaptation_of_run(found: Findings) -> str:
    columns: dict[str, Callable[[str], Numbers]] = {
        "classes in use": lambda method: kept(found, method, "in-use")[0],
        "other classes": lambda method: kept(found, method, "other-classes")[0],
        "new tasks": lambda method: found.by_seed(method, lambda matrix: fmean(diagonal(matrix)[1:])),
    }
    rows = []
    for method in found.ranked:
        use, others = (f" ({estimate(kept(found, method, scoring)[1])})" for scoring in ("in-use", "other-classes"))
        cells = [estimate(numbers(method)) for numbers in columns.values()]
        rows.append([escape(method), cells[0] + use, cells[1] + others, cells[2]])
    said = []
    for name, numbers in columns.items():
        apart = difference(numbers(IN_USE), numbers(MAS))
        if apart:
            said.append(f"On the {name} {IN_USE} ends {compared(apart, f'above {MAS}', f'below {MAS}')}.")
    header = ["Method", *(f"{name.capitalize()} (%)" for name in columns)]
    return f"{escape(found.name)}: {' '.join(said)}\n\n{table(header, rows)}"


def kept(found: Findings, method: str, scoring: str) -> tuple[Numbers, Numbers]:
    """Each seed's mean score on all tasks but the last, after the last task; and in percent of the score when learned.

    `scoring` is a scoring of classes; for facts its name in the records begins with `retrieval-`.
    """
    after: Numbers = {}
    share: Numbers = {}
    for seed, records in found.results.get(method, {}).items():
        of_task = [record.scores.get(scoring, record.scores.get(f"retrieval-{scoring}")) for record in records]
        scores = [values for values in of_task if values is not None]
        if len(scores) == len(records):
            after[seed] = fmean(scores[-1][:-1])
            before = fmean(values[-1] for values in scores[:-1])
            if before:
                share[seed] = 100 * after[seed] / before
    return after, share


def facts(group: Group) -> str:
    """Mean average precision over all facts, method by method, and MAS over fine-tuning, file by file."""
    methods = [method for method in METHODS if method != ALONE and any(method in found.results for found in group)]
    rows, said = [], []
    for found in group:
        numbers = {method: over_all(found, method) for method in methods}
        rows.append([escape(found.name), *map(estimate, numbers.values())])
        said.append(_order(found.name, numbers))
    note = "Mean average precision over all facts after the last task, in percent:"
    return "\n\n".join([*filter(None, said), note, table(["", *map(escape, methods)], rows)])


def over_all(found: Findings, method: str) -> Numbers:
    """Each seed's mean average precision over all facts after the last task, else the mean over the tasks."""
    return found.scores(method, "retrieval-over-all") or found.averages(method)


def _order(name: str, numbers: dict[str, Numbers]) -> str:
    """How MAS, SI and fine-tuning compare."""
    means = {method: mean(numbers[method]) for method in (MAS, SI, FINETUNE) if numbers.get(method)}
    ordered = sorted(means, key=lambda method: -means[method])
    said = [f"{escape(name)}, over all facts: {' > '.join(f'{method} {means[method]:.1f}' for method in ordered)}."]
    for method, other in ((MAS, SI), (SI, FINETUNE)):
        apart = difference(numbers.get(method, {}), numbers.get(other, {}))
        if apart:
            said.append(f"{method} ends {compared(apart, f'above {other}', f'below {other}')}.")
    if MAS in means and means.get(FINETUNE):
        said.append(f"{MAS} reaches {means[MAS] / means[FINETUNE]:.2f} times what {FINETUNE} does.")
    return " ".join(said) if means else ""


def _pairs_base(found: Findings) -> str:
    """The sequence whose network a pair starts from."""
    return "-".join(["emoji8", *found.run.settings.sequence.split("-")[3:]])


def _as_pair(found: Findings) -> Hashable:
    settings = found.run.settings
    is_pair = settings.sequence.startswith("pair-") and found.run.num_tasks == 2
    return replace(settings, sequence=_pairs_base(found)) if is_pair else None


def _with_strength(found: Findings) -> Hashable:
    settings = found.run.settings
    varies = not isinstance(settings.strength, str) and settings.strength > 0 and MAS in found.results
    return replace(settings, strength=OWN) if varies else None


def _scored(*scorings: str) -> Callable[[Findings], Hashable]:
    """A key of the files whose sequence has one of these scorings, and several tasks."""

    def key(found: Findings) -> Hashable:
        known = find_sequence(found.run.settings.sequence).scorings
        return True if found.run.num_tasks > 1 and set(scorings) & set(known) else None

    return key


def _place(found: Findings) -> str:
    return f"{found.run.settings.size}x{found.run.settings.size}"


SENSITIVITY = GroupKind(
    lambda found: f"Strengths of {MAS}: {escape(found.run.settings.sequence)}, {_place(found)}",
    _with_strength,
    sensitivity,
    least=2,
)
KINDS = (
    SENSITIVITY,  # first: a pair at several strengths is no several pairs
    GroupKind(lambda found: f"Pairs from the network of {_pairs_base(found)}, {_place(found)}", _as_pair, pairs),
    GroupKind(
        lambda found: "Adaptation: importance of the classes in use alone",
        _scored("in-use", "retrieval-in-use"),
        adaptation,
    ),
    GroupKind(lambda found: "Facts: mean average precision", _scored("retrieval"), facts),
)
"""All of them, in the order of the page."""
