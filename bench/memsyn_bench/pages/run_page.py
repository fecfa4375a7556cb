"""The report of runs: `memsyn-bench report`, one HTML page, made from files alone.

Owns the page's order. Its tables and sentences come from `sections` and `groups`, as in the Markdown page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from memsyn import MemsynError
from memsyn.report.page import write_report
from memsyn.report.parts import Cell, Lines, Page, Part, Scene, Scenes, Section, Table, number_cell
from memsyn_bench.pages.run_charts import averages, chosen, costs, group_charts, matrix_charts, over_time, tradeoff
from memsyn_bench.results.findings import FINETUNE, MAS, Findings, Group, estimate, read_findings
from memsyn_bench.results.groups import in_groups, pairs
from memsyn_bench.results.markdown import blocks, plain
from memsyn_bench.results.mas_strengths import sensitivity
from memsyn_bench.results.metrics import forgetting
from memsyn_bench.results.report import title
from memsyn_bench.results.sections import (
    APART,
    READING,
    accuracy_table,
    commands,
    cost_table,
    quantity,
    sentences,
    strength_table,
    unfinished,
)
from memsyn_bench.running.examples import EXAMPLES_FILE, Example, read_examples
from memsyn_bench.running.record import RESULTS_FILE
from memsyn_bench.settings import training_words

EXAMPLES_SAY = (
    "Test images of the first task (seed 0), and the texts of that task whose vectors are nearest: then, right after "
    "it was learned, and at the end, after all tasks."
)


def read_runs(paths: Sequence[Path]) -> list[tuple[Findings, Sequence[Scene]]]:
    """The findings and examples of run folders, or of result files by themselves.

    Raises:
        MemsynError: a file cannot be read or is damaged, or a run is named twice, or two have one name.
    """
    files = [path / RESULTS_FILE if path.is_dir() else path for path in paths]
    twice = [str(file) for file in files if [other.resolve() for other in files].count(file.resolve()) > 1]
    if twice:
        raise MemsynError(f"{twice[0]} is named more than once: name every run once.")
    runs: list[tuple[Findings, Sequence[Scene]]] = [
        (read_findings(file), _scenes(read_examples(_examples_of(file)))) for file in files
    ]
    named: dict[str, Path] = {}
    for file, (found, _) in zip(files, runs, strict=True):
        if found.name in named:
            raise MemsynError(
                f"{named[found.name]} and {file} are both of a run called {found.name}, and would be mixed up: rename "
                "one of the folders, or copy its file to another name."
            )
        named[found.name] = file
    return runs


def run_page(runs: Sequence[tuple[Findings, Sequence[Scene]]]) -> Page:
    """The page: groups of runs first, then each run."""
    files = [found for found, _ in runs]
    several = len(files) > 1
    sections: list[Section] = []
    groups = in_groups(files)[0]
    together: Group = []
    for kind, group in groups:
        sections.append(
            Section(plain(kind.heading(group[0])), [*_parts(kind.describe(group)), *group_charts(group, kind.describe)])
        )
        together += group if len(group) > 1 and kind.describe in (pairs, sensitivity) else []
    for found, scenes in runs:
        short = found in together and len(found.methods) == 1
        own = [_methods(found), _settings(found)] if short else _sections(found, scenes)
        sections += (
            [Section(f"{found.name}: {one.heading}", one.parts, "" if n else found.name) for n, one in enumerate(own)]
            if several
            else own
        )
    sections.append(Section("How to read the numbers", _parts(READING.replace("\n- ", "\n\n- "))))
    if several:
        return Page(f"memsyn-bench report: {len(files)} runs", overview(files), "", sections)
    said = [plain(sentence) for sentence in sentences(files[0])]
    return Page(files[0].name, headline(files[0]), " ".join(said), sections)


def write_run_page(runs: Sequence[tuple[Findings, Sequence[Scene]]], html: Path | None, png: Path | None) -> None:
    """Write the page, and its charts as pictures to a folder; either may be None.

    Raises:
        MemsynError: a file cannot be written, or what it needs is missing.
    """
    write_report(run_page(runs), html, png)


def overview(files: Sequence[Findings]) -> str:
    """Several runs in one sentence."""
    both = [(found.averages(MAS), found.averages(FINETUNE)) for found in files]
    gains = [fmean(mas.values()) - fmean(finetune.values()) for mas, finetune in both if mas and finetune]
    if not gains:
        return f"{len(files)} runs of {', '.join(dict.fromkeys(found.run.settings.sequence for found in files))}."
    above = "all" if min(gains) > 0 else f"{sum(gain > 0 for gain in gains)} of"
    return (
        f"In {above} {len(gains)} runs mas ends above finetune: by {fmean(gains):.1f} points on average, "
        f"{min(gains):.1f} to {max(gains):.1f}."
    )


def headline(found: Findings) -> str:
    """The run in one sentence."""
    settings, known = found.run.settings, [m for m in (MAS, FINETUNE) if m in found.results]
    if not found.methods:
        return f"{found.name}: no seed has learned every task yet."
    if not known:
        num_seeds = max(map(len, found.results.values()))
        return plain(sentences(found)[0]) if sentences(found) else title(settings, num_seeds)
    words = [
        f"{method} ends at {estimate(found.averages(method))}% and forgets "
        f"{estimate(found.by_seed(method, forgetting))} points"
        for method in known
    ]
    return f"On {settings.sequence} {'; '.join(words)}."


def _examples_of(file: Path) -> Path:
    """The file of examples beside a run's `results.jsonl`; beside a copy `NAME.jsonl`, `NAME.examples.json`."""
    return file.with_name(EXAMPLES_FILE if file.name == RESULTS_FILE else f"{file.stem}.{EXAMPLES_FILE}")


def _scenes(examples: Sequence[Example]) -> list[Scene]:
    """Each image with what each method finds, first and last."""
    return [
        Scene(
            example.image,
            example.text,
            [
                (f"{method}, {when}", found[method])
                for method in example.last
                for when, found in (("then", example.first), ("at the end", example.last))
                if method in found
            ],
        )
        for example in examples
    ]


def _sections(found: Findings, scenes: Sequence[Scene]) -> list[Section]:
    """The sections of one run."""
    if not found.methods:
        return [*([_methods(found)] if found.unfinished else []), _settings(found)]
    sections, examples = [_methods(found)], list[Part]([EXAMPLES_SAY, Scenes(scenes)] if scenes else [])
    for heading, parts in (
        ("Examples", examples),
        ("Learning and forgetting", [averages(found), tradeoff(found)]),
        ("Task by task", [over_time(found), matrix_charts(found)]),
        ("Strengths", _strengths(found)),
        ("Time and memory", [*_parts(cost_table(found)), costs(found)]),
    ):
        there: list[Part] = [part for part in parts if part is not None]
        sections += [Section(heading, there)] if there else []
    return [*sections, _settings(found)]


def _methods(found: Findings) -> Section:
    """The table of methods. Those that store data are marked, so that sorting keeps their kind."""
    parts: list[Part] = []
    for block in blocks(accuracy_table(found)) if found.methods else []:
        assert not isinstance(block, str)
        rows = [row for row in block[1:] if not row[0].startswith("*store")]
        apart = {method for method in found.methods if method not in found.ranked}
        parts.append(_table([block[0], *rows], marked=apart))
        if apart:
            parts.append(f"†: {APART}.")
    return Section("Methods", [*parts, *_parts(unfinished(found))])


def _strengths(found: Findings) -> list[Part]:
    chart = chosen(found.run.choices, quantity(found.run.settings))
    return [*_parts(strength_table(found)), *([chart] if chart else [])]


def _settings(found: Findings) -> Section:
    rows = [[Cell(name.replace("_", " ")), Cell(f"{value}")] for name, value in asdict(found.run.settings).items()]
    rows.append([Cell("tasks"), Cell(str(found.run.num_tasks))])
    rows += [[Cell("made with"), Cell(machine)] for machine in found.run.machines]
    return Section(
        "To repeat it", [Lines(commands(found)), training_words(found.run.settings), Table(["Setting", "Value"], rows)]
    )


def _parts(text: str) -> list[Part]:
    """Markdown of the results as parts of a page."""
    return [
        " ".join(plain(block).split()).removeprefix("- ") if isinstance(block, str) else _table(block)
        for block in blocks(text)
    ]


def _table(rows: list[list[str]], marked: set[str] | frozenset[str] = frozenset()) -> Table:
    """Cells that hold a list are words, those with one number are sorted by it."""
    header, *others = rows
    return Table(
        [plain(cell) for cell in header],
        [
            [
                Cell(plain(row[0]) + (" †" if plain(row[0]) in marked else ""), best=row[0].startswith("**")),
                *(
                    Cell(plain(cell)) if ", " in cell else number_cell(plain(cell), cell.startswith("**"))
                    for cell in row[1:]
                ),
            ]
            for row in others
        ],
    )
