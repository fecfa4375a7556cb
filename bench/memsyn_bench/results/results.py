"""`docs/results.md`: the page that `memsyn-bench results` makes of files of results.

Owns the page's order, its first words, and the files it is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from memsyn import MemsynError
from memsyn_bench.results.findings import MAS, Findings, read_findings
from memsyn_bench.results.groups import SENSITIVITY, Group, in_groups, strength_of
from memsyn_bench.results.markdown import details
from memsyn_bench.results.metrics import average_accuracy, forgetting
from memsyn_bench.results.report import title
from memsyn_bench.results.sections import READING, section

TOP = f"""# Results

What the methods of `memsyn-bench list` reached, run by run. This page is written from result files by

    memsyn-bench results docs/results/*.jsonl -o docs/results.md

and no number on it is typed. Each run stands with the command that makes its file: `results.jsonl` in the run's folder,
copied to `docs/results` under the run's name. The data are drawings, letters and small pictures, not the photographs of
the paper, and the networks are others: the numbers cannot be compared with the paper's. Methods of one run share
network, budget, seeds and the order of the data.

The shared settings were fixed before these runs, and some of them by test results: learning rate, batch size and
epochs of `emoji8` and of facts, and the form of the penalty, come from trials of mostly fine-tuning and {MAS}. The loss
of facts was chosen on validation data, where it raises {MAS} and lowers si. The training of the other sequences was
chosen on validation data or is customary ([decisions](decisions.md), [log](log.md)). Choosing the strengths used no
test data.

{READING}"""


def results_page(files: Sequence[Findings], pictures: dict[str, Group] | None = None) -> str:
    """The page: runs by themselves first, then each group of runs with its own.

    `pictures`, from a link to the group it shows, are linked in the groups' sections.
    """
    groups, single = in_groups(sorted(files, key=lambda found: found.name))
    parts = [TOP, *(section(found, 2) for found in single)]
    for kind, group in groups:
        parts += [f"## {kind.heading(group[0])}", kind.describe(group)]
        parts += [f"![Accuracy and forgetting]({link})" for link, of in (pictures or {}).items() if of == group]
        parts.append(details("The runs one by one", "\n\n".join(section(found, 3) for found in group)))
    return "\n\n".join(parts) + "\n"


PlotStrengths = Callable[[list[float], dict[str, list[list[float]]], str, Path], None]
"""(strengths, quantity -> for each strength its values of every seed, heading, file): writes a picture."""


def write_results(paths: Sequence[Path], out: Path | None = None, *, plot: PlotStrengths) -> str:
    """Return the page of these files; with `out` write it there, and its pictures to a folder of its name beside it.

    Raises:
        MemsynError: a file cannot be read, or the page or a picture not written.
    """
    files = [read_findings(path) for path in paths]
    if out is not None and out.resolve() in [path.resolve() for path in paths]:
        raise MemsynError(f"{out} is one of the files to read: it stays. Use another -o.")
    if out is None:
        return results_page(files)
    pictures = _pictures(files, out.stem)
    page = results_page(files, pictures)
    try:
        for link, group in pictures.items():
            out.with_suffix("").mkdir(parents=True, exist_ok=True)
            _plot_group(group, out.parent / link, plot)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise MemsynError(f"{out} cannot be written: {error.strerror}. Use another -o.") from error
    return page


def _pictures(files: Sequence[Findings], folder: str) -> dict[str, Group]:
    """From link to group: one for each group of strengths, numbered where a sequence has several."""
    links: dict[str, Group] = {}
    for kind, group in in_groups(sorted(files, key=lambda found: found.name))[0]:
        if kind is SENSITIVITY:
            name = f"{folder}/sensitivity-{group[0].run.settings.sequence}"
            number = sum(link.startswith((f"{name}.", f"{name}-")) for link in links) + 1
            links[f"{name}{f'-{number}' if number > 1 else ''}.png"] = group
    return links


def _plot_group(group: Group, path: Path, plot: PlotStrengths) -> None:
    """Accuracy and forgetting of MAS against its strength."""
    ordered = sorted(group, key=strength_of)
    columns = {"average accuracy (%)": average_accuracy, "forgetting (points)": forgetting}
    plot(
        [strength_of(found) for found in ordered],
        {name: [list(found.by_seed(MAS, number).values()) for found in ordered] for name, number in columns.items()},
        f"{MAS}: {title(group[0].run.settings, max(len(found.results[MAS]) for found in group))}",
        path,
    )
