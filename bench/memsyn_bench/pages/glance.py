"""The page of results at a glance: every sequence and method in a few tables, and where the rest is.

Owns the page's order, its tables' columns and its words. Every number on it is computed from the records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from memsyn_bench.losses import cross_entropy
from memsyn_bench.methods.registry import BUILT_IN_METHODS, METHODS
from memsyn_bench.results.findings import (
    FINETUNE,
    FROZEN,
    JOINT,
    MAS,
    NONE,
    Findings,
    Group,
    compared,
    difference,
    estimate,
    mean,
)
from memsyn_bench.results.groups import KINDS, GroupKind
from memsyn_bench.results.markdown import escape, table
from memsyn_bench.results.metrics import forgetting, rounded
from memsyn_bench.results.sections import NEAR, kept_bytes, quantity, readable, row_commands
from memsyn_bench.sequences.sequences import find_sequence
from memsyn_bench.settings import CHOSEN

OTHER = "best other"
METHOD_COLUMNS = (FINETUNE, FROZEN, "l2", "ewc", "si", "lwf", MAS, "projected", OTHER, "rehearsal", JOINT)
"""The methods with a column; the best of all others that store no data shares one."""

TOP = """# Results at a glance

What the methods of `memsyn-bench list` reached. This page and those that it links to are written from result files by

    memsyn-bench results docs/results/*.jsonl -o docs/results.md

No number on them is typed. The data are drawings, letters, words and small pictures, not the photographs of the paper.
Networks are smaller too, so the numbers cannot be compared with the paper's. Methods of one row share the network, the
training of the new task, the order of the data and, if a cell does not say otherwise, the seeds.
[How to read the numbers](#how-to-read-the-numbers) is at the end."""

GUIDE = (
    "A cell is a mean over the seeds ± half of its 95% interval (Student's t). One seed has no interval. If a cell has "
    "another number of seeds than the column Seeds, it says so.",
    "Forgot: the mean drop of a task from when it was learned to the end, in points. Below 0 is gain. A method that "
    "learns little forgets little, so read both numbers.",
    "Bold is the highest of the methods that store no data, on the seeds that they share. A dash was not run.",
    f"{OTHER.capitalize()}: the highest of all methods that store no data and have no column. It is picked by these "
    "very numbers, which favours it.",
    f"{JOINT.capitalize()} trains on the data of all tasks so far, rehearsal on a few stored images of each task. "
    f"{FROZEN.capitalize()} trains only heads after the first task.",
    "Strengths are chosen on validation data: on all tasks of the sequence, or in older rows on the first three. The "
    "pages list all strengths that were tried, and on how many tasks. A choice on all tasks sees the future, which "
    "favours the methods that have a strength. The projection has one fixed strength.",
    "Learning rate, batch size and epochs of `emoji8` and of facts come from trials that looked at test results, "
    f"mostly of {FINETUNE} and {MAS}. The loss of facts raises {MAS} and lowers si on validation data "
    "([decisions](decisions.md), [log](log.md)).",
)
"""What the tables' cells mean, and what was chosen how."""


@dataclass(frozen=True)
class Row:
    """A run as a row of the tables.

    Attributes:
        link: to the run's page.
        found: its results.
    """

    link: str
    found: Findings

    @property
    def label(self) -> str:
        """The run's name, linked."""
        return f"[{escape(self.found.name)}]({self.link})"

    @property
    def missing(self) -> list[str]:
        """The methods with a column but without a finished seed."""
        return [method for method in METHOD_COLUMNS if method != OTHER and method not in self.found.results]

    @property
    def num_seeds(self) -> int:
        """The number of seeds that most methods have."""
        counts = [len(seeds) for seeds in self.found.results.values()]
        return max(counts, key=lambda count: (counts.count(count), count))

    @property
    def methods(self) -> dict[str, str]:
        """Column -> the method that stands in it, for the columns that have one."""
        methods = {method: method for method in METHOD_COLUMNS if method in self.found.results}
        others = [method for method in self.found.ranked if method not in METHOD_COLUMNS]
        return methods | ({OTHER: max(others, key=self.found.standing)} if others else {})


def glance_page(
    runs: Mapping[str, Findings],
    groups: Sequence[tuple[str, GroupKind, Group]],
    *,
    published: str = "",
    company: str = "",
    language: str = "",
) -> str:
    """The page.

    Args:
        runs: link -> the run whose page it leads to.
        groups: (link, kind, group) of each group's page.
        published: what is held against published numbers, as Markdown; no section if empty.
        company: a link to the company's experiment, likewise.
        language: the language model's table, likewise.
    """
    rows = _ordered(Row(link, found) for link, found in runs.items() if found.methods)
    files = [*runs.values(), *(found for _, _, group in groups for found in group)]
    parts = [TOP]
    if rows:
        parts += _main_tables(rows)
        parts += ["## What each sequence shows", "\n".join(map(_meaning, rows))]
    for kind in KINDS:
        linked = {link: group for link, own, group in groups if own is kind}
        parts += [f"## {kind.title}", kind.glance(linked, files)] if linked else []
    parts += ["## Held against published numbers", published] if published else []
    parts += ["## A deployed classifier learns new classes", company] if company else []
    parts += ["## A language model", language] if language else []
    parts += ["## How to read the numbers", "\n".join(f"- {line}" for line in GUIDE)]
    parts += ["## All pages", *_list_of_pages(runs, groups), *_rerun(rows)]
    return "\n\n".join(parts) + "\n"


def _ordered(rows: Iterable[Row]) -> list[Row]:
    """Those of accuracy first, each by name."""
    return sorted(rows, key=lambda row: (quantity(row.found.run.settings) != "accuracy", row.found.name))


def _main_tables(rows: Sequence[Row]) -> list[str]:
    """What is remembered and forgotten, which cells are missing, and what is stored."""
    return [
        "## What is remembered",
        "Average accuracy over all tasks after the last one, in percent, and below it the points forgotten.",
        _numbers(rows),
        *_gaps(rows),
        "## What is kept between tasks",
        "Bytes at the end, beside the model. Old data: whether images of earlier tasks are stored. Labels: whether "
        "what is kept is computed from labels, or holds them. The present task's labels train the network in any case.",
        _stored(rows),
    ]


def _numbers(rows: Sequence[Row]) -> str:
    """The average accuracy of each row's methods, the best in bold, and what they forget."""
    lines = []
    for place, row in enumerate(rows):
        word = quantity(row.found.run.settings)
        if word != "accuracy" and (place == 0 or quantity(rows[place - 1].found.run.settings) != word):
            lines.append([f"*{word}:*", *[""] * (1 + len(METHOD_COLUMNS))])
        cells = {column: _cell(row, method) for column, method in row.methods.items()}
        if OTHER in cells:
            cells[OTHER] = f"{escape(row.methods[OTHER])}<br>{cells[OTHER]}"
        lines.append([row.label, str(row.num_seeds), *(cells.get(column, NONE) for column in METHOD_COLUMNS)])
    return table(["Sequence", "Seeds", *METHOD_COLUMNS], lines)


def _cell(row: Row, method: str) -> str:
    found = row.found
    average, count = estimate(found.averages(method)), len(found.results[method])
    lines = [f"**{average}**" if method == found.best() else average]
    lines.append(f"forgot {rounded(mean(found.by_seed(method, forgetting)))}")
    lines += [] if count == row.num_seeds else [f"({_counted(count, 'seed')})"]
    return "<br>".join(lines)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _gaps(rows: Sequence[Row]) -> list[str]:
    """What has a dash: one line for what was not run, one for what cannot be."""
    not_run: list[str] = []
    unfit: list[str] = []
    for row in rows:
        takes_logits = find_sequence(row.found.run.settings.sequence).loss is cross_entropy
        for names, fits in ((not_run, True), (unfit, False)):
            own = [method for method in row.missing if (takes_logits or not METHODS[method].classifies) == fits]
            names += [f"{', '.join(own)} on {escape(row.found.name)}"] if own else []
    own = [escape(row.found.name) for row in rows if row.found.run.settings.strength != CHOSEN]
    lines = {
        "Not run": "; ".join(not_run),
        "Cannot be run, for want of logits of classes": "; ".join(unfit),
        "Run with each method's own strength or a fixed one, not with chosen ones": ", ".join(own),
    }
    return [f"{words}: {names}." for words, names in lines.items() if names]


def _stored(rows: Sequence[Row]) -> str:
    """A row for each method that has a column, and for each that is not built in."""
    methods = [*METHODS, *(method for row in rows for method in row.found.methods)]
    known = dict.fromkeys(name for name in methods if name in METHOD_COLUMNS or name not in BUILT_IN_METHODS)
    lines = []
    for method in known:
        if any(method in row.found.results for row in rows):
            needs = [NONE, NONE]
            if method in METHODS:
                entry = METHODS[method]
                needs = ["yes" if need else "no" for need in (entry.stores_data, entry.needs_labels)]
            cells = [
                readable(kept_bytes(row.found, method, -1)) if method in row.found.results else NONE for row in rows
            ]
            lines.append([escape(method), *needs, *cells])
    return table(["Method", "Old data", "Labels", *(escape(row.found.name) for row in rows)], lines)


def _meaning(row: Row) -> str:
    """What the sequence is, what it shows, and what it does not."""
    own = find_sequence(row.found.run.settings.sequence)
    shows = " ".join(filter(None, [own.shows, *_outcome(row.found)]))
    leaves_open = " ".join(filter(None, [own.leaves_open, *_limits(row.found)]))
    said = [f"- {row.label}: {escape(own.summary)}."]
    said += [f"Shows: {shows}"] if shows else []
    said += [f"Does not show: {leaves_open}"] if leaves_open else []
    return " ".join(said)


def _outcome(found: Findings) -> list[str]:
    """How the best, MAS, fine-tuning and joint training compare, seed by seed."""
    best, said = found.best(), []
    for method, other in ((best, MAS), (MAS, FINETUNE)):
        apart = difference(found.averages(method), found.averages(other)) if method and method != other else None
        if apart and method:
            said.append(f"{escape(method)} ends {compared(apart, f'above {other}', f'below {other}')}.")
    apart = difference(found.averages(JOINT), found.averages(best)) if best else None
    if apart and best:
        words = compared(apart, f"above the best, {escape(best)}", f"below the best, {escape(best)}")
        said.append(f"{JOINT.capitalize()} training ends {words}.")
    return said


def _limits(found: Findings) -> list[str]:
    """Why a row may show less than it seems to: heads suffice, or seeds are few."""
    said = []
    best = found.best()
    apart = difference(found.averages(best), found.averages(FROZEN)) if best else None
    if apart and apart.mean <= NEAR and not find_sequence(found.run.settings.sequence).shares_head:
        near = "is the best" if best == FROZEN else f"ends within {NEAR:g} points ({apart.mean:.1f}) of the best"
        said.append(f"It shows nothing about memory: a frozen backbone {near}.")
    lone = [escape(method) for method, seeds in found.results.items() if len(seeds) == 1]
    if lone:
        said.append(f"No interval is known of a single seed ({', '.join(lone)}).")
    return said


def _list_of_pages(runs: Mapping[str, Findings], groups: Sequence[tuple[str, GroupKind, Group]]) -> list[str]:
    """Links to the pages of runs, with the number of methods, and to those of groups."""
    own = []
    for link, found in runs.items():
        words = _counted(len(found.methods), "method") if found.methods else "nothing has finished yet"
        own.append(f"[{escape(found.name)}]({link}) ({words})")
    together = [f"[{kind.heading(group[0])}]({link}) ({_counted(len(group), 'run')})" for link, kind, group in groups]
    lines = {"Runs by themselves, with all tables": "; ".join(own), "Runs together": "; ".join(together)}
    return [f"{words}: {links}." for words, links in lines.items() if links]


def _rerun(rows: Sequence[Row]) -> list[str]:
    """How to run a row again, with the command of one of them."""
    commands = [command for row in rows for method, command in row_commands(row.found).items() if method == MAS]
    if not commands:
        return []
    return [f"Run any row again: each page has the command of each of its rows, such as\n\n    {commands[0]}"]
