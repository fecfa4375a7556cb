"""The tables of directions and factors: what is kept of each weight matrix, and how much room is left.

Owns their columns and words. Like `screen`, it prints names from files as text.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from memsyn import FactorSummary
from memsyn.values.comparison import DirectionsChange
from memsyn.values.directions import Directions
from memsyn.values.display import printable

ROOM = (
    "Room: the share of directions in which more than half of a step remains, at the default strength of a projection."
)


def directions_table(title: str, directions: Directions) -> Table:
    """What a memory keeps of each weight matrix."""
    table = _table(
        title,
        f"Kept: eigenvectors of inputs x outputs. Tasks: how many were added up. {ROOM}",
        ("Inputs x outputs", "Kept", "Room", "Tasks", "Positions", "Samples"),
    )
    for layer in directions.summary():
        kept = "-" if layer.kept_outputs is None else f"{layer.kept_outputs:,}"
        table.add_row(
            Text(printable(layer.layer)),
            f"{layer.inputs:,} x {layer.outputs:,}",
            f"{layer.kept_inputs:,} x {kept}",
            f"{layer.room:.1%}",
            f"{layer.mass:.3g}",
            f"{layer.num_positions:,}",
            f"{layer.num_samples:,}",
        )
    return table


def factors_table(title: str, summary: Sequence[FactorSummary]) -> Table:
    """How many directions the inputs and output gradients of each weight matrix fill."""
    table = _table(
        title,
        "Filled: tr(M)^2 / tr(M^2) of the second moment M, by inputs and outputs. Lost: the share of tr(M) that a "
        "sketch lost.",
        ("Inputs", "Filled", "Lost", "Outputs", "Filled", "Lost"),
    )
    for layer in summary:
        of_outputs = ["-", "-"]
        if layer.output_dimension is not None and layer.output_lost is not None:
            of_outputs = [f"{layer.output_dimension:.1f}", f"{layer.output_lost:.1%}"]
        table.add_row(
            Text(printable(layer.layer)),
            f"{layer.inputs:,}",
            f"{layer.input_dimension:.1f}",
            f"{layer.input_lost:.1%}",
            f"{layer.outputs:,}",
            *of_outputs,
        )
    return table


def directions_changes_table(layers: Sequence[DirectionsChange]) -> Table:
    """Where room was taken from A to B, and how much the directions overlap."""
    table = _table(
        "Directions from A to B",
        "Overlap of two second moments M and N: tr(M N) / (||M|| ||N||), from 0 (no direction in common) to 1 (the "
        f"same). {ROOM}",
        ("Room A", "Room B", "Change", "Overlap of inputs", "Overlap of outputs"),
    )
    for layer in layers:
        rooms = ["" if room is None else f"{room:.1%}" for room in (layer.room_a, layer.room_b)]
        overlaps = ["" if own is None else f"{own:.3f}" for own in (layer.input_overlap, layer.output_overlap)]
        change = ""
        if layer.room_a is not None and layer.room_b is not None:
            change = f"{round(100 * (layer.room_b - layer.room_a), 1) + 0.0:+.1f}"
        table.add_row(Text(printable(layer.layer)), *rooms, change, *overlaps)
    return table


def _table(title: str, caption: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("Layer", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
