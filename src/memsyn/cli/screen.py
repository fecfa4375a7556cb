"""What the commands print: errors, JSON, tables.

Owns layout and words. Names and labels come from files that strangers may have written: control characters and markup
in them are printed as text, never interpreted.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memsyn import Consolidation, Importance, KroneckerFactors, LayerSummary, Memory, MemsynError
from memsyn.cli.directions_tables import directions_changes_table, directions_table, factors_table
from memsyn.report.names import short_fingerprint
from memsyn.values.comparison import Difference, LayerChange
from memsyn.values.directions import Directions
from memsyn.values.display import counted, printable
from memsyn.values.memory import Held, kind_of, omega_of

_ClickError: Final[type[BaseException]] = typer.BadParameter.__mro__[2]
"""What click prints itself. New versions of typer hold a click of their own, which has no public name."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print an error of ours in red and exit with 1; code of the user's does not choose the exit code.

    A training script that is imported may end with `sys.exit(0)`, or parse the arguments of our command.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            raise  # rich: nobody reads what is printed
        _print_error(
            f"the code of --model ended the process, with exit code {error.code!r}: nothing was said of the weights. "
            'Keep what a script runs under `if __name__ == "__main__":`.'
        )
        raise typer.Exit(1) from None
    except MemsynError as error:
        _print_error(str(error))
        raise typer.Exit(1) from None


@contextmanager
def no_traceback() -> Iterator[None]:
    """End a command with one line for all that files, disks, memory and pipes can do; `plain_errors` is inside.

    What is left is a fault of memsyn. Python's development mode shows where: PYTHONDEVMODE=1.
    """
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="backslashreplace")  # names from files, on a terminal without Unicode
    try:
        try:
            with plain_errors():
                yield
        finally:
            stdout.flush()
    except (typer.Exit, typer.Abort, _ClickError):
        raise
    except BrokenPipeError:
        _close_stdout()
        raise typer.Exit(1) from None
    except MemoryError:
        _print_error("there is not enough memory for these files. Close other programs, or use a larger machine.")
        raise typer.Exit(1) from None
    except OSError as error:
        where = f"{error.filename}" if error.filename else "a file, or what is printed,"
        _print_error(f"{where} could not be read or written: {error.strerror or error}.")
        _close_stdout()
        raise typer.Exit(1) from None
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        _print_error(
            f"unexpected {type(error).__name__}: {error}. This is a fault of memsyn: please report it, with what "
            "PYTHONDEVMODE=1 prints."
        )
        raise typer.Exit(1) from None


def _close_stdout() -> None:
    """Let Python print what is left to nowhere, so that it does not fail again at the end."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(message: str) -> None:
    lines = "\n".join(printable(line) for line in message.splitlines())
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {lines}", style="red", markup=False)


def say(line: str) -> None:
    """Print one line of text, without markup."""
    typer.echo(printable(line))


def say_json(value: dict[str, Any]) -> None:
    """Print one JSON object; a number that is not finite is null, since JSON has no NaN."""
    typer.echo(json.dumps(_without_nan(value), indent=2, allow_nan=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(held: Held) -> str:
    """A file in a few words: "memory of 1,200 samples"."""
    return f"{kind_of(held)} of {counted(held.num_samples, 'sample')}"


def print_held(held: Held) -> None:
    """Print what a file holds."""
    if isinstance(held, Memory):
        print_memory(held)
    elif isinstance(held, Importance):
        print_importance(held)
    else:
        print_factors(held)


def print_memory(memory: Memory) -> None:
    """Print a memory's layers, directions and history."""
    console, title = Console(highlight=False), f"Memory of {counted(memory.num_samples, 'sample')}"
    if memory.importance or memory.directions is None:
        console.print(_layers(title, memory.summary()))
        if memory.history:
            say(f"Measured: {_quantity(memory.quantity)}.")
    if memory.directions is not None:
        console.print(directions_table("Directions" if memory.importance else title, memory.directions))
        say(f"Measured: {_quantity(memory.directions_quantity)}.")
        _print_others(memory.directions)
    if memory.statistics:
        say(f"Statistics beside the weights: {_some(list(memory.statistics))}")
    if memory.history:
        console.print(_history(memory.history))


def _some(names: Sequence[str]) -> str:
    """A number of names, of which the first is shown: "98, the first is bn1.running_mean"."""
    return f"{len(names):,}, the first is {names[0]}"


def _print_others(directions: Directions) -> None:
    """Print the parameters that have no row in the table of matrices."""
    for names, what in (
        (directions.diagonal, "No matrices, and kept as squared gradients"),
        (sorted(directions.free), "Measured, but no output relied on them"),
    ):
        if names:
            say(f"{what}: {', '.join(names)}")


def print_factors(factors: KroneckerFactors) -> None:
    """Print how many directions of each layer are filled, and how they were measured."""
    title = f"Factors over {counted(factors.num_samples, 'sample')}"
    Console(highlight=False).print(factors_table(title, factors.summary()))
    say(f"Measured: {_quantity(factors.quantity)}{_at(factors.fingerprint)}.")
    diagonal = [name.removeprefix("diagonal/") for name in factors.sums if name.startswith("diagonal/")]
    if diagonal:
        say(f"No matrices, and measured as squared gradients: {', '.join(diagonal)}")
    _print_routes(by_route(factors), len(factors.routes))


def print_importance(importance: Importance) -> None:
    """Print an importance's layers, and how it was measured."""
    console = Console(highlight=False)
    console.print(_layers(f"Importance over {counted(importance.num_samples, 'sample')}", importance.summary()))
    say(f"Measured: {_quantity(importance.quantity)}, a mean over samples{_at(importance.fingerprint)}.")
    _print_routes(by_route(importance), len(importance.sums))


def _at(fingerprint: str | None) -> str:
    return f", at the weights {fingerprint[:15]}" if fingerprint else ""


def _print_routes(routes: dict[str, list[str]], num_parameters: int) -> None:
    for rank, (route, names) in enumerate(sorted(routes.items(), key=lambda item: -len(item[1]))):
        listed = f": {', '.join(names)}" if rank else ""  # the most frequent route needs no list
        say(f"Computed by {route!r}: {len(names)} of {num_parameters} parameters{listed}")


def by_route(held: Importance | KroneckerFactors) -> dict[str, list[str]]:
    """Route -> the parameters that were measured by it."""
    routes: dict[str, list[str]] = {}
    for name in held.sums if isinstance(held, Importance) else held.routes:
        if name in held.routes:
            routes.setdefault(held.routes[name], []).append(name)
    return routes


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
            Text(printable(layer.layer)),
            f"{layer.num_weights:,}",
            f"{layer.share:.1%}",
            f"{layer.mean:.3g}",
            f"{layer.max:.3g}",
            f"{layer.concentration:.1%}",
        )
    return table


def _history(history: Sequence[Consolidation]) -> Table:
    table = Table(
        title="Consolidations, oldest first",
        caption="Weights: the first digits of the anchor's fingerprint. Versions: of memsyn and torch.",
        caption_justify="left",
    )
    table.add_column("When (UTC)", no_wrap=True)
    table.add_column("Samples", justify="right")
    for heading in ("Rule", "Label"):
        table.add_column(heading, overflow="fold")
    for heading in ("Weights", "Versions"):
        table.add_column(heading, no_wrap=True)
    for entry in history:
        rule = entry.rule if entry.decay is None else f"{entry.rule} {entry.decay:g}"
        versions = ", ".join(part.partition("+")[0] for part in (entry.memsyn, entry.torch) if part)
        cells = (rule, entry.label or "", short_fingerprint(entry.fingerprint), versions)
        table.add_row(
            Text(printable(entry.when[:16].replace("T", " "))),
            f"{entry.num_samples:,}",
            *(Text(printable(cell)) for cell in cells),
        )
    return table


def print_difference(a: Held, b: Held, found: Difference) -> None:
    """Print a comparison, layer by layer."""
    say(f"A: {describe(a)}. B: {describe(b)}.")
    if a.quantity != b.quantity and omega_of(a) and omega_of(b):
        both = f"{_quantity(a.quantity)}, and {_quantity(b.quantity)}"
        say(f"They are of different quantities: {both}. Compare shares, not totals.")
    one, other = (own.quantity if isinstance(own, KroneckerFactors) else _of_directions(own) for own in (a, b))
    if one and other and one != other:
        say(f"Their directions are of different quantities: {_quantity(one)}, and {_quantity(other)}.")
    console = Console(highlight=False)
    if found.layers or not found.directions:
        console.print(_changes(found.layers))
    if found.directions:
        console.print(directions_changes_table(found.directions))
    for names, where in (
        (found.only_in_a, "only in A"),
        (found.only_in_b, "only in B"),
        (found.reshaped, "in different shapes"),
    ):
        if names:
            say(f"{where[0].upper()}{where[1:]}: {', '.join(names)}")
    if found.statistics:
        say(f"Statistics that differ: {_some(found.statistics)}")
    if not found.same:
        say(found.sentence)
    say("The same, bit for bit." if found.same else "They differ.")


def _of_directions(held: Memory | Importance) -> tuple[str, str] | None:
    return held.directions_quantity if isinstance(held, Memory) else None


def _quantity(quantity: tuple[str, str] | None) -> str:
    return "nothing" if quantity is None else f"{quantity[1]} of {quantity[0]}"


def _changes(layers: Sequence[LayerChange]) -> Table:
    anchors = any(layer.moved is not None for layer in layers)
    table = Table(
        title="Importance from A to B, and where the anchors moved" if anchors else "Importance from A to B",
        caption="Total: the sum of the layer's importance."
        + (" Moved: the norm of the anchors' difference, and its ratio to that of A's anchor." if anchors else ""),
        caption_justify="left",
    )
    table.add_column("Layer", overflow="fold")
    for heading in ("Share A", "Share B", "Change", "Total A", "Total B", *(("Moved", "Ratio") if anchors else ())):
        table.add_column(heading, justify="right")
    for layer in layers:
        moves = [f"{value:.3g}" if value is not None else "" for value in (layer.moved, layer.moved_relative)]
        table.add_row(
            Text(printable(layer.layer)),
            f"{layer.share_a:.1%}",
            f"{layer.share_b:.1%}",
            f"{round(100 * (layer.share_b - layer.share_a), 1) + 0.0:+.1f}",
            f"{layer.total_a:.3g}",
            f"{layer.total_b:.3g}",
            *(moves if anchors else ()),
        )
    return table
