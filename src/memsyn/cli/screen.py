"""What the commands print: errors, JSON, tables.

Owns layout and words. Names and labels come from files that strangers may have written: control characters and markup
in them are printed as text, never interpreted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memsyn import Consolidation, Importance, LayerSummary, Memory, MemsynError
from memsyn.report.names import printable, short_fingerprint
from memsyn.values.comparison import Difference, LayerChange
from memsyn.values.memory import kind_of


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print an error of ours in red and exit with 1."""
    try:
        yield
    except MemsynError as error:
        lines = "\n".join(printable(line) for line in str(error).splitlines())
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {lines}", style="red", markup=False)
        raise typer.Exit(1) from None


def say(line: str) -> None:
    """Print one line of text, without markup."""
    typer.echo(printable(line))


def say_json(value: dict[str, Any]) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(value, indent=2))


def count_of_samples(count: int) -> str:
    """A count for people: "1 sample", "1,200 samples"."""
    return f"{count:,} sample{'' if count == 1 else 's'}"


def describe(held: Memory | Importance) -> str:
    """A file in a few words: "memory of 1,200 samples"."""
    return f"{kind_of(held)} of {count_of_samples(held.num_samples)}"


def print_memory(memory: Memory) -> None:
    """Print a memory's layers and history."""
    console = Console(highlight=False)
    console.print(_layers(f"Memory of {count_of_samples(memory.num_samples)}", memory.summary()))
    if memory.history:
        say(f"Measured: {_quantity(memory)}.")
        console.print(_history(memory.history))


def print_importance(importance: Importance) -> None:
    """Print an importance's layers, and how it was measured."""
    console = Console(highlight=False)
    console.print(_layers(f"Importance over {count_of_samples(importance.num_samples)}", importance.summary()))
    known = f", at the weights {importance.fingerprint[:15]}" if importance.fingerprint else ""
    say(f"Measured: {_quantity(importance)}, a mean over samples{known}.")
    routes = sorted(by_route(importance).items(), key=lambda item: -len(item[1]))
    for rank, (route, names) in enumerate(routes):
        listed = f": {', '.join(names)}" if rank else ""  # the most frequent route needs no list
        say(f"Computed by {route!r}: {len(names)} of {len(importance.sums)} parameters{listed}")


def by_route(importance: Importance) -> dict[str, list[str]]:
    """Route -> the parameters that were measured by it."""
    routes: dict[str, list[str]] = {}
    for name in importance.sums:
        if name in importance.routes:
            routes.setdefault(importance.routes[name], []).append(name)
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


def print_difference(a: Memory | Importance, b: Memory | Importance, found: Difference) -> None:
    """Print a comparison, layer by layer."""
    say(f"A: {describe(a)}. B: {describe(b)}.")
    if a.quantity != b.quantity:
        say(f"They are of different quantities: {_quantity(a)}, and {_quantity(b)}. Compare shares, not totals.")
    Console(highlight=False).print(_changes(found.layers))
    for names, where in (
        (found.only_in_a, "only in A"),
        (found.only_in_b, "only in B"),
        (found.reshaped, "in different shapes"),
    ):
        if names:
            say(f"{where[0].upper()}{where[1:]}: {', '.join(names)}")
    say("The same, bit for bit." if found.same else "They differ.")


def _quantity(held: Memory | Importance) -> str:
    return "nothing" if held.quantity is None else f"{held.quantity[1]} of {held.quantity[0]}"


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
