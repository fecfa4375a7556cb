"""Results of several files together, for `memsyn-bench results`: pairs, strengths, adaptation, facts.

Owns which files belong together, their tables, and the sentences about them. Every number in a sentence is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from memsyn_bench.methods.registry import METHODS
from memsyn_bench.results.findings import (
    ALONE,
    FINETUNE,
    FROZEN,
    MAS,
    NONE,
    Findings,
    Group,
    Numbers,
    compared,
    difference,
    estimate,
    mean,
)
from memsyn_bench.results.markdown import escape, table
from memsyn_bench.results.mas_strengths import hindsight, sensitivity, with_strength
from memsyn_bench.results.metrics import Matrix, diagonal, forgetting
from memsyn_bench.results.one_head import GIVEN, one_head, said_of_one_head
from memsyn_bench.results.plasticity import plasticity_section, said_of_plasticity
from memsyn_bench.results.sources import compares_sources, measured_on, said_of_sources
from memsyn_bench.sequences.sequences import find_sequence

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
        heading: the group's first file -> the heading of the group's page.
        page: the group's first file -> the page's name.
        key: what the files of one group have in common; None for a file that is not of the kind.
        describe: group -> the page's text.
        title: the heading of the kind's section on the page at a glance.
        glance: (link -> the group of the page it leads to, all files) -> that section's text.
        least: the smallest number of files in a group.
        own_pages: whether each file has a page of its own, and a row in the tables at a glance.
    """

    heading: Callable[[Findings], str]
    page: Callable[[Findings], str]
    key: Callable[[Findings], Hashable]
    describe: Callable[[Group], str]
    title: str
    glance: Callable[[Mapping[str, Group], Sequence[Findings]], str]
    least: int = 1
    own_pages: bool = False


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
    rows = []
    for method, (family, images) in PAIR_ROWS.items():
        if any(method in found.results for found in group):
            cells = [_pair_cell(found, method) for found in group]
            rows.append([escape(family), images or NONE, *cells, estimate(drops[method])])
    columns = ["Method", "Importance on", *(" → ".join(map(escape, found.tasks)) for found in group), "Mean drop"]
    note = (
        "A cell: accuracy on the first task after the second (its change) / accuracy on the second, in percent, means "
        "over the seeds. Mean drop: over the pairs, in points, of the seeds that have finished every pair."
    )
    said = f"{said_of_pairs(group)} {_said_of_test_images(group)}".strip()
    return "\n\n".join(filter(None, [said, table(columns, rows), note]))


def said_of_pairs(group: Group) -> str:
    """How much the first task drops, and what the second reaches, mean over the pairs."""
    drops = {method: over_pairs(group, method, forgetting) for method in (FINETUNE, MAS, LOCAL)}
    said = [
        f"{method} drops {estimate(numbers)} points on the first task, mean over the pairs."
        for method, numbers in drops.items()
        if numbers
    ]
    frozen = over_pairs(group, FROZEN, _on_second)
    for method in (MAS, LOCAL):
        apart = difference(over_pairs(group, method, _on_second), frozen)
        if apart:
            words = compared(apart, "above a frozen backbone", "below a frozen backbone")
            said.append(f"On the second task {method} ends {words}, mean over the pairs.")
    return " ".join(said)


def _said_of_test_images(group: Group) -> str:
    """What importance from test images changes."""
    said = []
    for method in (MAS, LOCAL):
        for images, words in (("test", "test images"), ("both", "training and test images")):
            drops, others = (over_pairs(group, name, forgetting) for name in (f"{method}-{images}", method))
            apart = difference(drops, others)
            if apart:
                said.append(
                    f"With importance from {words} instead of training images {method} drops "
                    f"{compared(apart, 'more', 'less')}."
                )
    return " ".join(said)


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


def adaptation(group: Group) -> str:
    """What is kept on the classes in use and on the others, and what the new tasks reach, file by file."""
    note = (
        "Classes in use, other classes: accuracy after the last task on those of the earlier tasks and, in brackets, "
        "in percent of what it was when they were learned. New tasks: accuracy when learned, from the second task on."
    )
    return "\n\n".join([*map(_adaptation_of_run, group), note])


def _adaptation_columns(found: Findings) -> dict[str, Callable[[str], Numbers]]:
    return {
        "classes in use": lambda method: kept(found, method, "in-use")[0],
        "other classes": lambda method: kept(found, method, "other-classes")[0],
        "new tasks": lambda method: found.by_seed(method, lambda matrix: fmean(diagonal(matrix)[1:])),
    }


def _adaptation_of_run(found: Findings) -> str:
    columns = _adaptation_columns(found)
    rows = []
    for method in found.ranked:
        use, others = (f" ({estimate(kept(found, method, scoring)[1])})" for scoring in ("in-use", "other-classes"))
        cells = [estimate(numbers(method)) for numbers in columns.values()]
        rows.append([escape(method), cells[0] + use, cells[1] + others, cells[2]])
    header = ["Method", *(f"{name.capitalize()} (%)" for name in columns)]
    return f"{said_of_adaptation(found)}\n\n{table(header, rows)}"


def said_of_adaptation(found: Findings) -> str:
    """How importance of the classes in use alone compares with that of all."""
    said = []
    for name, numbers in _adaptation_columns(found).items():
        apart = difference(numbers(IN_USE), numbers(MAS))
        if apart:
            said.append(f"On the {name} {IN_USE} ends {compared(apart, f'above {MAS}', f'below {MAS}')}.")
    return f"{escape(found.name)}: {' '.join(said)}"


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
    rows = [[escape(found.name), *(estimate(over_all(found, method)) for method in methods)] for found in group]
    note = "Mean average precision over all facts after the last task, in percent:"
    said = [_order(found) for found in group]
    return "\n\n".join([*filter(None, said), note, table(["", *map(escape, methods)], rows)])


def said_of_facts(group: Group) -> str:
    """How MAS, SI and fine-tuning compare, file by file."""
    return " ".join(filter(None, map(_order, group)))


def over_all(found: Findings, method: str) -> Numbers:
    """Each seed's mean average precision over all facts after the last task, else the mean over the tasks."""
    return found.scores(method, "retrieval-over-all") or found.averages(method)


def _order(found: Findings) -> str:
    numbers = {method: over_all(found, method) for method in (MAS, SI, FINETUNE)}
    means = {method: mean(numbers[method]) for method in (MAS, SI, FINETUNE) if numbers.get(method)}
    ordered = sorted(means, key=lambda method: -means[method])
    said = [
        f"{escape(found.name)}, over all facts: {' > '.join(f'{method} {means[method]:.1f}' for method in ordered)}."
    ]
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


def _scored(*scorings: str) -> Callable[[Findings], Hashable]:
    """A key of the files whose sequence has one of these scorings, and several tasks."""

    def key(found: Findings) -> Hashable:
        known = find_sequence(found.run.settings.sequence).scorings
        return True if found.run.num_tasks > 1 and set(scorings) & set(known) else None

    return key


def _place(found: Findings) -> str:
    return f"{found.run.settings.size}x{found.run.settings.size}"


def _each(
    heading: Callable[[Findings], str], said: Callable[[Group], str]
) -> Callable[[Mapping[str, Group], Sequence[Findings]], str]:
    """At a glance: what is said of each group, after a link to its page."""

    def glance(groups: Mapping[str, Group], files: Sequence[Findings]) -> str:
        return "\n\n".join(f"[{heading(group[0])}]({link}): {said(group)}" for link, group in groups.items())

    return glance


def _of_strengths(found: Findings) -> str:
    return f"Strengths of {MAS}: {escape(found.run.settings.sequence)}, {_place(found)}"


def _of_pairs(found: Findings) -> str:
    return f"Pairs from the network of {_pairs_base(found)}, {_place(found)}"


def _of_adaptation(found: Findings) -> str:
    return "Adaptation: importance of the classes in use alone"


def _of_facts(found: Findings) -> str:
    return "Facts: mean average precision"


PLASTICITY = GroupKind(
    heading=lambda found: f"Learning on over {found.run.num_tasks} tasks: {escape(found.name)}",
    page=lambda found: f"plasticity-on-{found.name}",
    key=lambda found: found.name if any(record.plasticity for record in found.run.records) else None,
    describe=lambda group: "\n\n".join(map(plasticity_section, group)),
    title="Learning on over many tasks",
    glance=_each(lambda found: escape(found.name), lambda group: " ".join(map(said_of_plasticity, group))),
)
SENSITIVITY = GroupKind(
    heading=_of_strengths,
    page=lambda found: f"strengths-of-{MAS}-on-{found.run.settings.sequence}",
    key=with_strength,
    describe=sensitivity,
    title="MAS at its best strength in hindsight",
    glance=hindsight,
    least=2,
)
KINDS = (
    SENSITIVITY,  # first: a pair at several strengths is no several pairs
    GroupKind(
        heading=_of_pairs,
        page=lambda found: f"pairs-of-{_pairs_base(found)}",
        key=_as_pair,
        describe=pairs,
        title="Pairs of tasks",
        glance=_each(_of_pairs, said_of_pairs),
    ),
    GroupKind(
        heading=_of_adaptation,
        page=lambda found: "adaptation-to-classes-in-use",
        key=_scored("in-use", "retrieval-in-use"),
        describe=adaptation,
        title="Adaptation to what is in use",
        glance=_each(_of_adaptation, lambda group: " ".join(map(said_of_adaptation, group))),
    ),
    GroupKind(
        heading=_of_facts,
        page=lambda found: "facts-compared",
        key=_scored("retrieval"),
        describe=facts,
        title="Facts, all of them together",
        glance=_each(_of_facts, said_of_facts),
        own_pages=True,
    ),
    GroupKind(
        heading=lambda found: "Which unlabelled data",
        page=lambda found: "which-unlabelled-data",
        key=lambda found: True if compares_sources(found) else None,
        describe=measured_on,
        title="Which unlabelled data?",
        glance=_each(lambda found: "Memories measured on other images", said_of_sources),
    ),
    GroupKind(
        heading=lambda found: "One head over all classes",
        page=lambda found: "one-head",
        key=_scored(GIVEN),
        describe=one_head,
        title="One head over all classes",
        glance=_each(lambda found: "Average accuracy over all classes (%)", said_of_one_head),
    ),
    PLASTICITY,
)
"""All of them, in the order of the page. A new kind is one more entry."""
