"""The sections of a page about directions: how much room is left per layer, and how two files' directions differ.

Owns their charts and texts; the numbers come from the summaries of directions and factors, and from `comparison`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from memsyn.report.charts import Series, axis, bars
from memsyn.report.module_tree import layer_tree
from memsyn.report.parts import MOST_ROWS, Cell, Part, Table, Tree, number_cell, plain_cell, share_text
from memsyn.report.styles import FIRST_STYLE, SECOND_STYLE
from memsyn.values.comparison import DirectionsChange
from memsyn.values.directions import STRENGTH, Directions, DirectionsSummary
from memsyn.values.factors import FactorSummary

ROOM_AXIS = "room: share of directions (%)"
ROOM_NOTE = (
    "Room is the share of a layer's directions in which more than half of a training step remains, at the default "
    f"strength of a projection, {STRENGTH:g}; in the other directions, what was learned before limits the step."
)


def room_tree(layers: Sequence[DirectionsSummary]) -> Tree:
    """How much of each layer is in use; of a block the mean over its weights."""
    used = {layer.layer: (1 - layer.room, layer.num_weights) for layer in layers}
    most = max(used, key=lambda layer: used[layer][0])
    return layer_tree(
        f"{most} has the least room left: {share_text(1 - used[most][0])}",
        list(used),
        lambda own: sum(used[n][0] * used[n][1] for n in own) / max(1, sum(used[n][1] for n in own)),
        of="a layer's directions",
        note="The number is the share of a layer's directions that old tasks use. The rest is room for new ones.",
    )


def overlap_tree(layers: Sequence[DirectionsChange]) -> Tree:
    """How much the directions of each layer differ; of a block the mean over its layers."""
    differ = {layer.layer: 1 - layer.overlap for layer in layers if layer.overlap is not None}
    most = max(differ, key=lambda layer: differ[layer])
    return layer_tree(
        f"The directions differ most in {most}: {share_text(differ[most])}",
        list(differ),
        lambda own: sum(differ[layer] for layer in own) / len(own),
        of="a layer's directions",
        note="The number is 1 minus the overlap of the directions in A and B.",
    )


def room_parts(directions: Directions) -> list[Part]:
    """A chart of the room that is left in each layer, and what is kept of it."""
    layers = directions.summary()
    others = [
        f"{what}: {', '.join(names)}."
        for what, names in (
            ("No matrices, and kept as squared gradients", list(directions.diagonal)),
            ("Measured, but no output relied on them", sorted(directions.free)),
        )
        if names
    ]
    if not layers:
        return ["No weight matrix has directions yet.", *others]
    rows = [
        [
            Cell(layer.layer),
            number_cell(f"{layer.inputs:,}"),
            number_cell(f"{layer.outputs:,}"),
            number_cell(f"{layer.kept_inputs:,}"),
            number_cell("" if layer.kept_outputs is None else f"{layer.kept_outputs:,}"),
            Cell(f"{100 * layer.room:.1f}", layer.room),
            plain_cell(layer.mass),
            number_cell(f"{layer.num_positions:,}"),
            number_cell(f"{layer.num_samples:,}"),
        ]
        for layer in layers
    ]
    columns = ["Layer", "Inputs", "Outputs", "Kept of inputs", "Kept of outputs", "Room (%)", "Tasks"]
    table = Table(
        [*columns, "Positions", "Samples"], rows, "Kept: the number of eigenvectors. Tasks: how many were added up."
    )
    shown = [layers[place] for place in _least([layer.room for layer in layers])]
    least = min(shown, key=lambda layer: layer.room)
    chart = bars(
        f"{least.layer} has the least room left: {100 * least.room:.0f}% of its directions",
        [layer.layer for layer in shown],
        [Series("room", FIRST_STYLE, [100 * layer.room for layer in shown], [])],
        axis(ROOM_AXIS, range=[0, 100]),
        name="room",
    )
    return [ROOM_NOTE, *_left_out(len(layers) - len(shown)), chart, table, *others]


def factor_parts(layers: Sequence[FactorSummary]) -> list[Part]:
    """How many directions the inputs and output gradients of each layer fill."""
    rows = [
        [
            Cell(layer.layer),
            number_cell(f"{layer.inputs:,}"),
            number_cell(f"{layer.input_dimension:.1f}"),
            number_cell(f"{100 * layer.input_lost:.1f}"),
            number_cell(f"{layer.outputs:,}"),
            number_cell("" if layer.output_dimension is None else f"{layer.output_dimension:.1f}"),
            number_cell("" if layer.output_lost is None else f"{100 * layer.output_lost:.1f}"),
        ]
        for layer in layers
    ]
    columns = ["Layer", "Inputs", "Filled", "Lost (%)", "Outputs", "Filled", "Lost (%)"]
    caption = (
        "Filled: how many directions of the inputs, or of the output gradients, are in use: tr(M)^2 / tr(M^2) of their "
        "second moment M. Lost: the share of tr(M) that a sketch lost."
    )
    return [Table(columns, rows, caption)]


def room_changes(layers: Sequence[DirectionsChange]) -> list[Part]:
    """The room of two files side by side, and how much their directions overlap."""
    rows = [
        [
            Cell(layer.layer),
            *(number_cell("" if room is None else f"{100 * room:.1f}") for room in (layer.room_a, layer.room_b)),
            *(number_cell("" if o is None else f"{o:.3f}") for o in (layer.input_overlap, layer.output_overlap)),
        ]
        for layer in layers
    ]
    caption = "Overlap of two second moments M and N: tr(M N) / (||M|| ||N||), from 0 (none in common) to 1 (the same)."
    columns = ["Layer", "Room A (%)", "Room B (%)", "Overlap of inputs", "Overlap of outputs"]
    rooms = [[_percent(layer.room_a), _percent(layer.room_b)] for layer in layers]
    places = _least([min((room for room in pair if not math.isnan(room)), default=100.0) for pair in rooms])
    shown = [(layers[place].layer, rooms[place]) for place in places]
    known = [(one, other, layer.layer) for (one, other), layer in zip(rooms, layers, strict=True) if one + other >= 0]
    one, other, most = max(known, key=lambda own: abs(own[1] - own[0]), default=(0.0, 0.0, ""))
    chart = bars(
        f"The room of {most} goes from {one:.1f}% to {other:.1f}%" if known else "No layer is in both",
        [layer for layer, _ in shown],
        [
            Series("A", FIRST_STYLE, [r[0] for _, r in shown], []),
            Series("B", SECOND_STYLE, [r[1] for _, r in shown], []),
        ],
        axis(ROOM_AXIS, range=[0, 100]),
        name="rooms",
    )
    return [ROOM_NOTE, *_left_out(len(layers) - len(shown)), chart, Table(columns, rows, caption)]


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share


def _least(numbers: Sequence[float]) -> list[int]:
    """The places of the `MOST_ROWS` least numbers, in their order."""
    return sorted(sorted(range(len(numbers)), key=lambda place: numbers[place])[:MOST_ROWS])


def _left_out(num: int) -> list[Part]:
    return [f"The chart shows the {MOST_ROWS} layers with the least room; {num} are left out."] if num else []
