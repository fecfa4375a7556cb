"""The command `memsyn-bench`: compare methods on sequences of tasks."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from memsyn import MemsynError, OptionError
from memsyn.cli.screen import plain_errors, say
from memsyn_bench.extensions import NamedEntries
from memsyn_bench.language.experiment import (
    MEMORY_TEXTS,
    Experiment,
    LanguageRecord,
    LanguageSettings,
    parse_method,
    run_language,
)
from memsyn_bench.language.methods import LANGUAGE_METHODS
from memsyn_bench.language.model import PRECISIONS, load_smollm2
from memsyn_bench.language.page import language_page
from memsyn_bench.language.questions import all_questions
from memsyn_bench.language.texts import DOMAINS
from memsyn_bench.methods.registry import METHODS, MethodEntry
from memsyn_bench.optimizers import OPTIMIZERS
from memsyn_bench.pages.export import write_mlflow, write_tensorboard
from memsyn_bench.pages.plots import plot_accuracy
from memsyn_bench.pages.results_pages import write_results
from memsyn_bench.pages.run_page import read_runs, write_run_page
from memsyn_bench.results.report import markdown_table, rich_table
from memsyn_bench.running.runner import run
from memsyn_bench.sequences.sequences import SEQUENCES, TaskSequence, default_settings
from memsyn_bench.settings import OWN, parse_strength

ITS_OWN = "the sequence's own"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memsyn-bench {version('memsyn-bench')}")
        raise typer.Exit


@app.callback()
def memsyn_bench(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compare methods on a sequence of tasks."""


@app.command("list")
def list_() -> None:
    """Say which sequences and methods there are."""
    errors = [*_print_entries("Sequences", SEQUENCES), *_print_entries("Methods", METHODS)]
    with plain_errors():
        if errors:
            raise MemsynError("\n".join(map(str, errors)))


def _print_entries(heading: str, entries: NamedEntries[TaskSequence] | NamedEntries[MethodEntry]) -> list[MemsynError]:
    """Print a line for each entry that can be used; return the errors of the others."""
    usable, errors = entries.usable()
    typer.echo(heading)
    for name, entry in usable.items():
        typer.echo(f"  {name:<17} {entry.summary}")
    return errors


@app.command("run")
def run_(
    sequence: Annotated[str, typer.Argument(help="Which tasks, as named by `memsyn-bench list`.")],
    methods: Annotated[str, typer.Option(help="Methods to compare, separated by commas.")] = "finetune,mas",
    seeds: Annotated[int, typer.Option(help="Number of seeds: 0, 1, ...")] = 3,
    size: Annotated[int | None, typer.Option(help="Side of the images in pixels.", show_default=ITS_OWN)] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over each task's images.", show_default=ITS_OWN)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step.", show_default=ITS_OWN)] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", show_default=f"{ITS_OWN}, scaled for the optimizer")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Number of first epochs in which only heads are trained.", show_default=ITS_OWN)
    ] = None,
    strength: Annotated[
        str, typer.Option(help="A number for all methods; own: each method's default; chosen: by validation data.")
    ] = OWN,
    optimizer: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.", show_default=ITS_OWN)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/SEQUENCE")] = None,
) -> None:
    """Run methods through a sequence of tasks, one after the other.

    Prints a row of the accuracy matrix after each task, and a table at the end. The run's folder then holds
    results.jsonl, table.md, accuracy.png and the memory of each method and seed. The same command continues a run
    that was cut off.

    Example: memsyn-bench run emoji8 --methods finetune,mas --seeds 3
    """
    folder = Path("runs", sequence) if out is None else out
    with plain_errors():
        options = {"size": size, "epochs": epochs, "batch_size": batch_size, "lr": lr, "warmup": warmup}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        own = default_settings(sequence, optimizer=optimizer)
        if epochs is not None:
            given.setdefault("warmup", min(own.warmup, max(epochs, 0)))
        settings = replace(own, strength=parse_strength(strength), **given)
        try:
            results = run(settings, methods=[name.strip() for name in methods.split(",")], num_seeds=seeds, out=folder)
        except KeyboardInterrupt:
            typer.echo(f"stopped; the same command continues: {shlex.join(['memsyn-bench', *sys.argv[1:]])}", err=True)
            raise typer.Exit(130) from None
        Console().print(rich_table(results, settings))
        (folder / "table.md").write_text(markdown_table(results, settings), encoding="utf-8")
        plot_accuracy(results, settings, folder / "accuracy.png")
        typer.echo(f"Results, memories, table.md and accuracy.png are in {folder}.")


@app.command("report")
def report_(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their results.jsonl.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="The HTML page to write.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the charts as pictures.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(metavar="DIR", help="Write scalars for TensorBoard.")] = None,
    mlflow: Annotated[str | None, typer.Option(metavar="URI", help="Log to an MLflow store or server.")] = None,
) -> None:
    """Make one page with charts of runs, which opens in any browser without a network.

    On request the same records go to pictures, TensorBoard and MLflow (sqlite:///FILE, or a server's address).

    Example: memsyn-bench report runs/demo -o report.html
    """
    with plain_errors():
        if not (out or png or tensorboard or mlflow):
            raise OptionError("there is nothing to write: say -o report.html, --png, --tensorboard or --mlflow.")
        found = read_runs(runs)
        if out or png:
            write_run_page(found, out, png)
        if tensorboard:
            write_tensorboard([one for one, _ in found], tensorboard)
        if mlflow:
            write_mlflow([one for one, _ in found], mlflow)
    written = ", ".join(str(place) for place in (out, png, tensorboard, mlflow) if place)
    say(f"Wrote {written} from {len(runs)} run{'s' * (len(runs) > 1)}.")


@app.command("results")
def results_(
    files: Annotated[list[Path], typer.Argument(help="results.jsonl of runs, or copies named after them.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page at a glance.", show_default="printed")
    ] = None,
) -> None:
    """Make Markdown pages of the results of runs: one at a glance, and one for each run or group of runs.

    The page at a glance has every sequence and method, with 95% intervals. With -o, the other pages go to a folder of
    its name beside it: tables of each run, and of runs that belong together (pairs of tasks, strengths, adaptation,
    facts). Unfinished seeds are left out and named.

    Example: memsyn-bench results docs/results/*.jsonl -o docs/results.md
    """
    with plain_errors():
        pages = write_results(files, out)
    if out is None:
        typer.echo(pages.glance, nl=False)
    else:
        others = f"{len(pages.details)} page{'s' * (len(pages.details) > 1)} to {out.with_suffix('')}"
        typer.echo(f"Wrote {out} and {others} from {len(files)} file{'s' * (len(files) > 1)}.")


@app.command("language")
def language_(
    methods: Annotated[
        str,
        typer.Option(help=f"Of {', '.join(LANGUAGE_METHODS)}; each with @lr=, @strength=, @blocks=NUMBER, if wanted."),
    ] = "finetune,lora,projected-inputs",
    domains: Annotated[str, typer.Option(help=f"In this order: of {', '.join(DOMAINS)}.")] = ",".join(DOMAINS),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds: 0, 1, ...")] = 1,
    steps: Annotated[int, typer.Option(help="Steps for each domain.")] = LanguageSettings().steps,
    memory: Annotated[str, typer.Option(help=f"The memory's text: of {', '.join(MEMORY_TEXTS)}.")] = MEMORY_TEXTS[0],
    precision: Annotated[
        str, typer.Option(help=f"Of products: {' or '.join(PRECISIONS)}.")
    ] = LanguageSettings().precision,
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/language"),
) -> None:
    """Let SmolLM2-135M learn domains in a row, and ask it what it knew before.

    Prints a line after each domain. The folder then holds language.jsonl, and lines of other options go into the same
    file. The same command continues a run that was cut off. On 2 cores, a step takes 1 to 3 seconds.

    Example: memsyn-bench language --methods finetune,lora,projected-inputs@strength=30
    """
    with plain_errors():
        settings = LanguageSettings(steps=steps, memory_text=memory, precision=precision)
        names = [name.strip() for name in methods.split(",")]
        for name in names:
            parse_method(name, settings)
        chosen = [name.strip() for name in domains.split(",")]
        experiment = Experiment.prepared(load_smollm2(), all_questions(), chosen, settings, out)
        run_language(experiment, names, range(seeds), settings, out, _print_language)


def _print_language(record: LanguageRecord) -> None:
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in record.losses.items())
    right = f"{record.flags.count('1')}/{len(record.flags)} right"
    options = [f"lr {record.settings.lr:g}"] if record.settings.lr is not None else []
    options += [f"strength {record.settings.strength:g}"] if record.settings.strength is not None else []
    options += (
        [f"{number} blocks"] if (number := record.settings.num_measured) != LanguageSettings().num_measured else []
    )
    where = f"seed {record.seed}, after {', '.join(record.domains)}: " if record.domains else ""
    typer.echo(f"{' '.join([record.method, *options])}, {where}{losses}, {right}")


@app.command("language-page")
def language_page_(
    file: Annotated[Path, typer.Argument(help="The language.jsonl of a run, or a copy.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page to write.", show_default="printed")] = None,
) -> None:
    """Make one Markdown page of the results of `memsyn-bench language`.

    Example: memsyn-bench language-page docs/language/results.jsonl -o docs/language.md
    """
    with plain_errors():
        page = language_page(file)
    if out is None:
        typer.echo(page, nl=False)
    else:
        out.write_text(page, encoding="utf-8")
        typer.echo(f"Wrote {out}.")
