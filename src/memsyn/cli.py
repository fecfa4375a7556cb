"""The command `memsyn`: the benchmark and a look into memory files.

Owns options, texts and exit codes: 0 done, 1 an error of ours (one line on stderr), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Table

    from memsyn.bench.learners import METHODS
    from memsyn.bench.plots import plot_accuracy
    from memsyn.bench.report import markdown_table, rich_table
    from memsyn.bench.runner import run
    from memsyn.bench.sequences import SEQUENCES
    from memsyn.bench.settings import Settings
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in {"typer", "rich", "PIL", "matplotlib"}:
        raise
    raise SystemExit(f"the memsyn command needs {missing}: pip install 'memsyn[bench]'") from None

from memsyn import Consolidation, Importance, LayerSummary, Memory, MemsynError
from memsyn.storage import MEMORY, read

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
bench = typer.Typer(no_args_is_help=True, help="Compare methods on a sequence of tasks.")
app.add_typer(bench, name="bench")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Print an error of ours as one red line and exit with 1."""
    try:
        yield
    except MemsynError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memsyn {version('memsyn')}")
        raise typer.Exit


@app.callback()
def memsyn(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Learn something new without forgetting what the model knows (Memory Aware Synapses)."""


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
    methods: Annotated[str, typer.Option(help="Methods to compare, with commas between.")] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 3,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = Settings.size,
    epochs: Annotated[int, typer.Option(help="Passes over each task's images.")] = Settings.epochs,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = Settings.batch_size,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = Settings.lr,
    strength: Annotated[float, typer.Option(help="Weight of the penalty, lambda.")] = Settings.strength,
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/SEQUENCE")] = None,
) -> None:
    """Run methods through a sequence of tasks, one after the other.

    Prints a row of the accuracy matrix after each task, and a table at the end. The run's folder then holds
    results.jsonl, table.md, accuracy.png and the memory of each method and seed. The same command continues a run
    that was cut off.

    Example: memsyn bench run emoji8 --methods finetune,mas --seeds 3
    """
    folder = Path("runs", sequence) if out is None else out
    with _plain_errors():
        settings = Settings(
            sequence=sequence, size=size, epochs=epochs, batch_size=batch_size, lr=lr, strength=strength
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


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A memory or importance file of memsyn.")],
) -> None:
    """Print what a memory or an importance file protects, layer by layer.

    Example: memsyn inspect runs/demo/mas-seed0.memsyn.safetensors
    """
    with _plain_errors():
        held = Memory.load(path) if read(path)[0]["kind"] == MEMORY else Importance.load(path)
    console = Console(highlight=False)
    num_samples = f"{held.num_samples} sample{'' if held.num_samples == 1 else 's'}"
    if isinstance(held, Memory):
        console.print(_layers(f"Memory of {num_samples}", held.summary()))
        console.print(_history(held.history))
    else:
        console.print(_layers(f"Importance over {num_samples}", held.summary()))
        console.print(f"{held.magnitude} of {held.objective}, a mean over samples.")


def _layers(title: str, summary: Sequence[LayerSummary]) -> Table:
    table = Table(
        title=title,
        caption="Top tenth: the share of the layer's importance in its most important tenth of weights.",
        caption_justify="left",
        show_footer=True,
    )
    num_weights = sum(layer.num_weights for layer in summary)
    table.add_column("Layer", "all", overflow="fold")
    table.add_column("Weights", f"{num_weights:,}", justify="right")
    table.add_column("Share", f"{sum(layer.share for layer in summary):.1%}", justify="right")
    for heading in ("Mean", "Max", "Top tenth"):
        table.add_column(heading, justify="right")
    for layer in summary:
        table.add_row(
            layer.layer,
            f"{layer.num_weights:,}",
            f"{layer.share:.1%}",
            f"{layer.mean:.3g}",
            f"{layer.max:.3g}",
            f"{layer.concentration:.1%}",
        )
    return table


def _history(history: Sequence[Consolidation]) -> Table:
    table = Table(title="Consolidations, oldest first")
    table.add_column("When (UTC)")
    table.add_column("Samples", justify="right")
    table.add_column("Rule")
    table.add_column("Importance")
    for entry in history:
        rule = entry.rule if entry.decay is None else f"{entry.rule}, decay {entry.decay:g}"
        table.add_row(entry.when, f"{entry.num_samples:,}", rule, f"{entry.magnitude} of {entry.objective}")
    return table
