"""`docs/results.md` and the folder beside it: what `memsyn-bench results` makes of files of results.

Owns which pages there are, their names, and how they are written. Their texts come from `glance`, `sections`, `groups`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from memsyn import MemsynError
from memsyn_bench.language.page import last_table
from memsyn_bench.pages.glance import glance_page
from memsyn_bench.pages.plots import plot_plasticity, plot_strengths
from memsyn_bench.results.findings import MAS, Findings, Group, read_findings
from memsyn_bench.results.groups import PLASTICITY, SENSITIVITY, GroupKind, in_groups
from memsyn_bench.results.markdown import details, escape
from memsyn_bench.results.mas_strengths import strength_of
from memsyn_bench.results.metrics import average_accuracy, forgetting
from memsyn_bench.results.plasticity import plasticity_curves
from memsyn_bench.results.report import title
from memsyn_bench.results.sections import READING, row_commands, section

GroupPicture = tuple[Group, Callable[[Group, Path], None]]
PUBLISHED = "published"
"""The page that is written by hand, if there is one; no page of a run takes its name."""
LANGUAGE = Path("language") / "results.jsonl"
"""The language model's results, beside the page at a glance, if there are any."""

AGAIN = """The command above the tables makes all their rows. `OMP_NUM_THREADS=1` before it sets the number of threads.
With the same versions, threads and kind of processor it gives the same digits, except for seconds. Another processor
rounds sums differently, and training amplifies that: one seed's accuracy on a task can then differ by points. Older
files do not say which processor made them. If a strength was chosen on the first three tasks, as older versions did, a
row's own command has it as a number: `--strength chosen` tries all tasks now."""


@dataclass(frozen=True)
class ResultsPages:
    """All pages, not yet written.

    Attributes:
        glance: the page at a glance.
        details: page's name -> text.
        pictures: picture's name -> the group that it shows, and how it is drawn.
    """

    glance: str
    details: dict[str, str]
    pictures: dict[str, GroupPicture]


def write_results(paths: Sequence[Path], out: Path | None = None) -> ResultsPages:
    """The pages of these files. With `out`, the page at a glance goes there, the others to a folder of its name.

    Without, nothing is written, and links are as if the folder of the first file were the folder of the pages.

    Raises:
        MemsynError: a file cannot be read, or a page or a picture cannot be written or would overwrite a file to read.
    """
    files = [read_findings(path) for path in paths]
    own = paths[0].resolve().parent
    place = own.parent / f"{own.name}.md" if out is None else out
    if place.suffix != ".md":
        raise MemsynError(f"{place}: the page must end in .md, for a folder beside it has its name. Use another -o.")
    pages = results_pages(files, place)
    if out is not None:
        _write(pages, out, {path.resolve() for path in paths})
    return pages


def results_pages(files: Sequence[Findings], place: Path) -> ResultsPages:
    """The pages as they are with the page at a glance at `place`; what lies beside it is taken in.

    Raises:
        MemsynError: what lies beside it cannot be read.
    """
    groups, single = in_groups(sorted(files, key=lambda found: found.name))
    single += [found for kind, group in groups if kind.own_pages for found in group]
    names = {PUBLISHED, "company"}
    runs = {_free(found.name, names): found for found in sorted(single, key=lambda found: found.name)}
    together = [(_free(kind.page(group[0]), names), kind, group) for kind, group in groups]
    pictures: dict[str, GroupPicture] = {}
    texts = {name: _run_page(found) for name, found in runs.items()}
    taken: set[str] = set()
    for name, kind, group in together:
        picture = ""
        if kind in PICTURES:
            word, draw = PICTURES[kind]
            picture = f"{_free(f'{word}-{group[0].run.settings.sequence}', taken)}.png"
            pictures[picture] = (group, draw)
        texts[name] = _group_page(kind, group, picture, {id(found): own for own, found in runs.items()})
    home = f"[All results](../{quote(place.name)})"

    def link(name: str) -> str:
        return f"{quote(place.stem)}/{quote(name)}.md"

    glance = glance_page(
        {link(name): found for name, found in runs.items()},
        [(link(name), kind, group) for name, kind, group in together],
        published=_published(place),
        company=_company(place),
        language=_language(place),
    )
    return ResultsPages(glance, {name: f"{home}\n\n{text}\n" for name, text in texts.items()}, pictures)


def _free(name: str, taken: set[str]) -> str:
    """The name, numbered if it is taken; it is taken then."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free)
    return free


def _run_page(found: Findings) -> str:
    """Everything about one run."""
    parts = [section(found, 1)]
    if row_commands(found):
        parts += ["## Run it again", AGAIN, _commands(found)]
    return "\n\n".join([*parts, "## How to read the numbers", READING])


def _commands(found: Findings) -> str:
    """The command of each row, folded; nothing without rows."""
    lines = "\n".join(f"    {command}" for command in row_commands(found).values())
    return details("The command of each row alone", lines) if lines else ""


def _group_page(kind: GroupKind, group: Group, picture: str, own_pages: dict[int, str]) -> str:
    """What the runs of a group say together, and then each, if it has no page of its own."""
    parts = [f"# {kind.heading(group[0])}", kind.describe(group)]
    parts += [f"![{kind.heading(group[0])}]({picture})"] if picture else []
    parts.append("## The runs one by one")
    if kind.own_pages:
        parts.append("\n".join(f"- [{escape(one.name)}]({quote(own_pages[id(one)])}.md)" for one in group))
        return "\n\n".join(parts)
    for found in group:
        parts += [section(found, 3), _commands(found)]
    return "\n\n".join(filter(None, [*parts, "## Run it again", AGAIN, "## How to read the numbers", READING]))


def _published(place: Path) -> str:
    """The opening of the page written by hand, to its first section, and a link to it; empty if there is none."""
    path = place.with_suffix("") / f"{PUBLISHED}.md"
    if not path.exists():
        return ""
    folder = quote(place.stem)
    opening = re.split(r"^## ", _text(path), maxsplit=1, flags=re.MULTILINE)[0]
    opening = re.sub(r"\A# .*\n", "", opening.lstrip()).strip()
    opening = re.sub(r"\]\((?!\w+:|#|/)", f"]({folder}/", opening)
    return f"{opening}\n\n[Held against published numbers, in full]({folder}/{PUBLISHED}.md)"


def _company(place: Path) -> str:
    """A link to the page of `benchmarks/company_story.py`; empty if it is not there."""
    if not (place.with_suffix("") / "company.md").exists():
        return ""
    return (
        "80 classes are deployed, 40 are added in a head of their own: carelessly, with a memory of old, new or public "
        f"images, and with repair. [Answers kept and classes learned]({quote(place.stem)}/company.md)."
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise MemsynError(f"{path} cannot be read: {error.strerror}. Mend it, or move it away.") from error


def _language(place: Path) -> str:
    """The language model's last table, and a link to its page; empty if there are no results beside `place`."""
    path = place.parent / LANGUAGE
    if not path.exists():
        return ""
    return (
        "SmolLM2-135M-Instruct learns domains in a row, and is asked what it knew before. Right: of all questions. "
        f"Lost: right before, wrong now. Learned: in percent of fine-tuning. {last_table(path)}\n\n"
        "All tables and columns are in [language.md](language.md)."
    )


def _write(pages: ResultsPages, out: Path, inputs: set[Path]) -> None:
    folder = out.with_suffix("")
    texts = {out: pages.glance, **{folder / f"{name}.md": text for name, text in pages.details.items()}}
    for path in [*texts, *(folder / name for name in pages.pictures)]:
        if path.resolve() in inputs:
            raise MemsynError(f"{path} is one of the files to read: it stays. Use another -o.")
    path = folder
    try:
        folder.mkdir(exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        for name, (group, draw) in pages.pictures.items():
            path = folder / name
            draw(group, path)
    except OSError as error:
        raise MemsynError(f"{path} cannot be written: {error.strerror}. Use another -o.") from error


def _plot_strengths_of(group: Group, path: Path) -> None:
    """Accuracy and forgetting of MAS against its strength."""
    ordered = sorted(group, key=strength_of)
    columns = {"average accuracy (%)": average_accuracy, "forgetting (points)": forgetting}
    plot_strengths(
        [strength_of(found) for found in ordered],
        {name: [list(found.by_seed(MAS, number).values()) for found in ordered] for name, number in columns.items()},
        f"{MAS}: {title(group[0].run.settings, max(len(found.results[MAS]) for found in group))}",
        path,
    )


def _plot_plasticity_of(group: Group, path: Path) -> None:
    """Accuracy when learned, dead units and free directions, task by task; a group is one run."""
    num_seeds = max(len(seeds) for seeds in group[0].results.values())
    plot_plasticity(plasticity_curves(group[0]), title(group[0].run.settings, num_seeds), path)


PICTURES = {SENSITIVITY: ("sensitivity", _plot_strengths_of), PLASTICITY: ("plasticity", _plot_plasticity_of)}
"""Kind of group -> the first word of its picture's name, and what draws it."""
