"""memsyn bench: compare methods on sequences of tasks."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from memsyn.bench.methods.registry import METHODS
from memsyn.bench.plots import plot_accuracy
from memsyn.bench.report import markdown_table, rich_table
from memsyn.bench.results import write_results
from memsyn.bench.runner import run
from memsyn.bench.sequences import SEQUENCES, find_sequence
from memsyn.bench.settings import OWN, Settings, strength_of
from memsyn.cli.screen import plain_errors

bench = typer.Typer(no_args_is_help=True, help="Compare methods on a sequence of tasks.")


@bench.command("list")
def list_() -> None:
    """Say which sequences and methods there are."""
    for heading, members in (
        ("Sequences", {name: sequence.summary for name, sequence in SEQUENCES.items()}),
        ("Methods", {name: method.summary for name, method in METHODS.items()}),
    ):
        typer.echo(heading)
        for name, summary in members.items():
            typer.echo(f"  {name:<17} {summary}")


@bench.command("run")
def run_(
    sequence: Annotated[str, typer.Argument(help="Which tasks, as named by `memsyn bench list`.")],
    methods: Annotated[str, typer.Option(help="Methods to compare, with commas between.")] = "finetune,mas",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 3,
    size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels.", show_default="the sequence's first")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over each task's images.")] = Settings.epochs,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = Settings.batch_size,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = Settings.lr,
    warmup: Annotated[int, typer.Option(help="Epochs, of these, in which heads learn alone.")] = Settings.warmup,
    strength: Annotated[
        str, typer.Option(help="A number for all; own: each method's default; chosen: by validation data.")
    ] = OWN,
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/SEQUENCE")] = None,
) -> None:
    """Run methods through a sequence of tasks, one after the other.

    Prints a row of the accuracy matrix after each task, and a table at the end. The run's folder then holds
    results.jsonl, table.md, accuracy.png and the memory of each method and seed. The same command continues a run
    that was cut off.

    Example: memsyn bench run emoji8 --methods finetune,mas --seeds 3
    """
    folder = Path("runs", sequence) if out is None else out
    with plain_errors():
        settings = Settings(
            sequence=sequence,
            size=find_sequence(sequence).sizes[0] if size is None else size,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            warmup=warmup,
            strength=strength_of(strength),
        )
        try:
            results = run(settings, methods=[name.strip() for name in methods.split(",")], num_seeds=seeds, out=folder)
        except KeyboardInterrupt:
            typer.echo(f"stopped; the same command continues: {shlex.join(['memsyn', *sys.argv[1:]])}", err=True)
            raise typer.Exit(130) from None
        Console().print(rich_table(results, settings))
        (folder / "table.md").write_text(markdown_table(results, settings), encoding="utf-8")
        plot_accuracy(results, settings, folder / "accuracy.png")
        typer.echo(f"Results, memories, table.md and accuracy.png are in {folder}.")


@bench.command("results")
def results_(
    files: Annotated[list[Path], typer.Argument(help="results.jsonl of runs, or copies named after them.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page to write.", show_default="printed")] = None,
) -> None:
    """Make one Markdown page of what runs found.

    Tables of each run with 95% intervals and differences from MAS seed by seed, and of runs that belong together:
    pairs of tasks, strengths, adaptation, facts. Seeds that are not finished are left out and named. With -o, pictures
    go to a folder beside the page.

    Example: memsyn bench results docs/results/*.jsonl -o docs/results.md
    """
    with plain_errors():
        page = write_results(files, out)
    if out is None:
        typer.echo(page, nl=False)
    else:
        typer.echo(f"Wrote {out} from {len(files)} file{'s' * (len(files) > 1)}.")
