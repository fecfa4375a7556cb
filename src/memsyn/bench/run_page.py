"""The report of runs: `memsyn bench report`, one HTML page, made from files alone.

Owns the page's order. Its tables and sentences are those of `sections` and `groups`, which the Markdown page has too.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from memsyn.bench.findings import FINETUNE, MAS, Findings, estimate, read_findings
from memsyn.bench.groups import Group, in_groups, pairs, sensitivity
from memsyn.bench.markdown import blocks, plain
from memsyn.bench.metrics import forgetting
from memsyn.bench.record import FILE
from memsyn.bench.report import title, training
from memsyn.bench.run_charts import averages, chosen, costs, group_charts, matrices, over_time, tradeoff
from memsyn.bench.sections import (
    READING,
    accuracy_table,
    commands,
    cost_table,
    quantity,
    sentences,
    strength_table,
    unfinished,
)
from memsyn.errors import MemsynError
from memsyn.report.parts import Cell, Lines, Page, Part, Scene, Scenes, Section, Table, number_cell

EXAMPLES = "examples.json"
"""In a run's folder, if it has examples to show: a list of `{"image": PNG as base64, "before": [...], "after": [...]}`,
where `before` and `after` are the names of what is retrieved for the image."""


def read_runs(paths: Sequence[Path]) -> list[tuple[Findings, Sequence[Scene]]]:
    """The findings and examples of run folders, or of result files by themselves.

    Raises:
        MemsynError: a file cannot be read or is damaged, or a run is named twice, or two have one name.
    """
    files = [path / FILE if path.is_dir() else path for path in paths]
    twice = [str(file) for file in files if [other.resolve() for other in files].count(file.resolve()) > 1]
    if twice:
        raise MemsynError(f"{twice[0]} is named more than once: name every run once.")
    runs: list[tuple[Findings, Sequence[Scene]]] = [
        (read_findings(file), read_scenes(file.with_name(EXAMPLES))) for file in files
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
        own = _sections(found, scenes) if found not in together else [_methods(found), _settings(found)]
        sections += [Section(f"{found.name}: {one.heading}", one.parts) for one in own] if several else own
    sections.append(Section("How to read the numbers", _parts(READING.replace("\n- ", "\n\n- "))))
    if several:
        return Page("memsyn bench report", f"{len(files)} runs", " ".join(map(headline, files)), sections)
    said = [plain(sentence) for sentence in sentences(files[0])]
    return Page(files[0].name, headline(files[0]), " ".join(said), sections)


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


def read_scenes(path: Path) -> list[Scene]:
    """The examples of a run; none if there is no file.

    Raises:
        MemsynError: the file is not as `EXAMPLES` says.
    """
    if not path.exists():
        return []
    try:
        return [_scene(entry["image"], entry["before"], entry["after"]) for entry in json.loads(path.read_bytes())]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise MemsynError(
            f"{path} is no list of examples, each with image (a PNG in base64), before and after (lists of names): "
            f"{error!r:.80}. Remove it, or write it again."
        ) from None


def _scene(image: str, before: list[str], after: list[str]) -> Scene:
    try:
        start = base64.b64decode(image, validate=True)[:8]
    except binascii.Error as error:
        raise ValueError(error) from None
    if start != b"\x89PNG\r\n\x1a\n":
        raise ValueError("an image is no PNG")
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in (before, after)):
        raise ValueError("before or after is no list of names")
    return Scene(image, before, after)


def _sections(found: Findings, scenes: Sequence[Scene]) -> list[Section]:
    """All about one run."""
    if not found.methods:
        return [*([_methods(found)] if found.unfinished else []), _settings(found)]
    sections = [_methods(found)]
    for heading, parts in (
        ("Example scenes", [Scenes(scenes)] if scenes else []),
        ("Learning and forgetting", [averages(found), tradeoff(found)]),
        ("Task by task", [over_time(found), matrices(found)]),
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
        apart = {method for method in found.methods if method not in found.rivals}
        parts.append(_table([block[0], *rows], marked=apart))
        if apart:
            parts.append("†: stores data, or is a reference.")
    return Section("Methods", [*parts, *_parts(unfinished(found))])


def _strengths(found: Findings) -> list[Part]:
    chart = chosen(found.run.choices, quantity(found.run.settings))
    return [*_parts(strength_table(found)), *([chart] if chart else [])]


def _settings(found: Findings) -> Section:
    rows = [[Cell(name.replace("_", " ")), Cell(f"{value}")] for name, value in asdict(found.run.settings).items()]
    rows.append([Cell("tasks"), Cell(str(found.run.num_tasks))])
    rows += [[Cell("made with"), Cell(machine)] for machine in found.run.machines]
    return Section(
        "To repeat it", [Lines(commands(found)), training(found.run.settings), Table(["Setting", "Value"], rows)]
    )


def _parts(text: str) -> list[Part]:
    """Markdown of ours as a page's parts."""
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
