"""The page of a memory, an importance or factors, and the page of two of them side by side.

Owns the choice of trees, tables and charts and their texts; the numbers come from `summary`, `comparison` and
`distribution`. What is said of directions is in `directions_sections`, of new weights in `weights_page`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from memsyn.comparing.verdict import MAX_CHANGE
from memsyn.report.charts import Series, axis, bars, lines
from memsyn.report.directions_sections import factor_parts, overlap_tree, room_changes, room_parts, room_tree
from memsyn.report.distribution import Lorenz, lorenz, top_units
from memsyn.report.judgements import judge_difference, judge_held, judge_prediction, predicted
from memsyn.report.module_tree import layer_tree
from memsyn.report.names import short_fingerprint
from memsyn.report.parts import (
    MOST_ROWS,
    Cell,
    Chart,
    Page,
    Part,
    Section,
    Table,
    Tree,
    number_cell,
    plain_cell,
    share_cell,
    share_text,
)
from memsyn.report.styles import FIRST_STYLE, GREY, SECOND_STYLE, Style
from memsyn.report.weights_page import WHERE, change_sections, change_tree, moved_parts
from memsyn.values.comparison import Difference, LayerChange, diff
from memsyn.values.consolidation import Consolidation
from memsyn.values.directions import Directions
from memsyn.values.display import counted
from memsyn.values.factors import KroneckerFactors
from memsyn.values.importance import LayerSummary
from memsyn.values.memory import Held, Memory, directions_of, kind_of, omega_of

NUM_UNITS = 20
EVEN_STYLE = Style(GREY, "x", "dot")
SHARE = "share of all importance (%)"
UNITS_NOTE = (
    "A unit is one row of a layer's parameters: a neuron or a filter with its bias, or a token of an embedding. If "
    "weights are stored as (inputs, outputs), a row is an input."
)


def memory_page(held: Held, name: str, weights: Mapping[str, Tensor] | None = None) -> Page:
    """The page of one file; with a model's `weights`, also whether they are safe, and where they changed."""
    directions, curve = directions_of(held), lorenz(omega_of(held))
    rooms = [] if directions is None else directions.summary()
    layers = [] if isinstance(held, KroneckerFactors) else held.summary()
    judgement = judge_held(held, curve, rooms)
    sections, changes = [], []
    if isinstance(held, Memory) and weights is not None:
        prediction = predicted(held, weights)
        judgement = judge_prediction(prediction, MAX_CHANGE)
        sections = [Section(WHERE, change_tree(held, weights, prediction, None, MAX_CHANGE))]
        changes = change_sections(held, weights, prediction)
    elif curve is not None:
        sections = [Section("Where the importance is", [_importance_tree(layers)])]
    elif rooms:
        sections = [Section("Where the room is", [room_tree(rooms)])]
    size = sum(layer.num_weights for layer in layers or rooms)
    lead = (
        f"{kind_of(held).capitalize()} of {counted(size, 'weight')}, measured on {counted(held.num_samples, 'sample')}."
    )
    behind = [*changes, *_sections(held, layers, curve, directions)]
    return Page(name, judgement.headline, lead, sections, judgement, behind)


def _sections(
    held: Held, layers: Sequence[LayerSummary], curve: Lorenz | None, directions: Directions | None
) -> list[Section]:
    """The tables and charts of one file."""
    sections = []
    if isinstance(held, KroneckerFactors):
        sections.append(Section("Layers", [*_measured(held), *factor_parts(held.summary())]))
    elif layers:
        sections.append(Section("Layers", [*_measured(held), _layers(layers)]))
    if curve is not None:
        title = f"Half of the importance lies in {share_text(curve.half)} of the weights"
        sections += [
            Section("How the importance is spread", [_lorenz_chart(curve, title)]),
            Section("The most important units", [UNITS_NOTE, _units(held)]),
        ]
    if directions is not None:
        own = ["This is the room that a memory of these factors alone leaves."]
        room = room_parts(directions)
        sections.append(Section("Room that is left", [*own, *room] if isinstance(held, KroneckerFactors) else room))
    if isinstance(held, Memory):
        sections.append(Section("Consolidations", _history(held.history)))
    return sections


def difference_page(a: Held, b: Held, names: tuple[str, str]) -> Page:
    """The page of two files, A and B.

    Raises:
        MismatchError: one holds an importance, the other directions or factors.
    """
    found, both = diff(a, b), (("A", names[0], a), ("B", names[1], b))
    judgement = judge_difference(found)
    quantities = [own.quantity for own in (a, b) if omega_of(own)]
    if len(set(quantities)) > 1:
        steps = (*judgement.steps, "A and B were measured in different ways, so a difference was to be expected.")
        judgement = replace(judgement, steps=steps)
    sections, behind = [], []
    if found.shifted:
        sections.append(Section("Where the importance moved", [_shift_tree(found.layers, found.shifted)]))
    elif found.overlap is not None and not found.same and found.shifted is None:
        sections.append(Section("Where the directions differ", [overlap_tree(found.directions)]))
    if found.layers or not found.directions:
        behind.append(Section("Layers", _changes(found)))
    if found.directions:
        behind.append(Section("Room that is left", room_changes(found.directions)))
    if any(layer.moved is not None for layer in found.layers):
        behind.append(Section("Where the anchors moved", moved_parts(found.layers, "the anchor of B", "A's anchor")))
    for which, _, held in both:
        if isinstance(held, Memory):
            behind.append(Section(f"Consolidations of {which}", _history(held.history)))
    lead = " ".join(
        f"{which}: {name}, {kind_of(held)} of {counted(held.num_samples, 'sample')}." for which, name, held in both
    )
    return Page(" and ".join(names), judgement.headline, lead, sections, judgement, behind)


def _importance_tree(layers: Sequence[LayerSummary]) -> Tree:
    shares = {layer.layer: layer.share for layer in layers}
    most = max(shares, key=lambda layer: shares[layer])
    return layer_tree(
        f"{most} holds {share_text(shares[most])} of all importance",
        list(shares),
        lambda own: sum(shares[layer] for layer in own),
        of="all importance",
        note="The number is a layer's share of all importance: how much the outputs on old data depend on its weights.",
    )


def _shift_tree(layers: Sequence[LayerChange], whole: float) -> Tree:
    shifts = {layer.layer: layer.shifted for layer in layers}
    most = max(shifts, key=lambda layer: shifts[layer])
    return layer_tree(
        f"Most moved in {most}: {share_text(shifts[most])} of all importance",
        list(shifts),
        lambda own: sum(shifts[layer] for layer in own),
        of="what moved",
        note="The number is the share of all importance that left or reached the weights of a layer. The layers add up "
        "to the number at the top.",
        whole=whole,
    )


def _measured(held: Held) -> list[Part]:
    """What a file holds, in the words of its history."""
    return [f"Measured: {held.quantity[1]} of {held.quantity[0]}."] if held.quantity else []


def _layers(layers: Sequence[LayerSummary]) -> Table:
    total = sum(layer.mean * layer.num_weights for layer in layers)
    average = total / max(1, sum(layer.num_weights for layer in layers)) or 1.0
    columns = ["Layer", "Weights", "Share", "Average weight", "Largest weight", "Top tenth"]
    rows = [
        [
            Cell(layer.layer),
            number_cell(f"{layer.num_weights:,}"),
            share_cell(layer.share),
            plain_cell(layer.mean / average),
            plain_cell(layer.max / average),
            share_cell(layer.concentration),
        ]
        for layer in layers
    ]
    caption = (
        "Average and largest weight: their importance, in multiples of the average over all layers. Top tenth: the "
        "share of the layer's importance in its most important tenth of weights."
    )
    return Table(columns, rows, caption)


def _lorenz_chart(curve: Lorenz, title: str) -> Chart:
    x, y = ([100 * value for value in values] for values in (curve.weights, curve.held))
    chart = lines(
        title,
        [
            Series("all weights", FIRST_STYLE, x, y),
            Series("if all weights mattered alike", EVEN_STYLE, [0, 100], [0, 100]),
        ],
        axis("weights, the least important first (%)", range=[0, 100]),
        axis("importance that they hold (%)", range=[0, 100]),
        name="lorenz",
        mode="lines",
    )
    held = [share_cell(1 - curve.held[round(share * (len(y) - 1))]) for share in (0.5, 0.9, 0.99)]
    row = [Cell("all weights"), number_cell(f"{curve.gini:.3f}"), share_cell(curve.half), *held]
    top = ["held by the top 50%", "by the top 10%", "by the top 1%"]
    return replace(chart, table=Table(["Weights", "Gini coefficient", "weights that hold half", *top], [row]))


def _units(held: Held) -> Chart:
    units = [unit for unit in top_units(omega_of(held), NUM_UNITS) if unit.total]
    labels = [f"{unit.name} [{unit.row}]" for unit in units]
    together = 100 * sum(unit.share for unit in units)
    title = f"The {len(units)} most important units hold {together:.1f}% of all importance"
    return bars(
        title,
        labels,
        [Series("share", FIRST_STYLE, [100 * unit.share for unit in units], [])],
        axis(SHARE),
        name="units",
        rows="unit",
    )


def _history(history: Sequence[Consolidation]) -> list[Part]:
    columns = ["When (UTC)", "Samples", "Rule", "Label", "Measured", "Weights", "Versions"]
    rows = [
        [
            Cell(entry.when[:16].replace("T", " ")),
            number_cell(f"{entry.num_samples:,}"),
            Cell(entry.rule if entry.decay is None else f"{entry.rule} {entry.decay:g}"),
            Cell(entry.label or ""),
            Cell(f"{entry.magnitude} of {entry.objective}"),
            Cell(short_fingerprint(entry.fingerprint)),
            Cell(", ".join(part for part in (entry.memsyn, entry.torch) if part)),
        ]
        for entry in history
    ]
    if not rows:
        return ["The file has no history."]
    caption = "Oldest first. Weights: the first digits of the anchor's fingerprint. Versions: of memsyn and torch."
    return [Table(columns, rows, caption)]


def _changes(found: Difference) -> list[Part]:
    columns = ["Layer", "Share in A", "Share in B", "Change (points)", "Moved", "B in multiples of A"]
    rows = [
        [
            Cell(layer.layer),
            share_cell(layer.share_a),
            share_cell(layer.share_b),
            number_cell(f"{round(100 * (layer.share_b - layer.share_a), 1) + 0.0:+.1f}"),
            share_cell(layer.shifted),
            plain_cell(layer.total_b / layer.total_a if layer.total_a else None),
        ]
        for layer in found.layers
    ]
    caption = (
        "Moved: the share of all importance that left or reached the layer's weights. B in multiples of A: of the sums "
        "of the layer's importance."
    )
    parts: list[Part] = [found.sentence, Table(columns, rows, caption)]
    for names, where in (
        (found.only_in_a, "Only in A"),
        (found.only_in_b, "Only in B"),
        (found.reshaped, "In different shapes"),
    ):
        if names:
            parts.append(f"{where}: {', '.join(names)}.")
    if found.layers:
        sizes = [max(layer.share_a, layer.share_b) for layer in found.layers]
        shown = [found.layers[p] for p in sorted(sorted(range(len(sizes)), key=lambda p: -sizes[p])[:MOST_ROWS])]
        most = max(shown, key=lambda layer: abs(layer.share_b - layer.share_a))
        parts.append(
            bars(
                f"The share of {most.layer} goes from {share_text(most.share_a)} to {share_text(most.share_b)}",
                [layer.layer for layer in shown],
                [
                    Series("A", FIRST_STYLE, [100 * layer.share_a for layer in shown], []),
                    Series("B", SECOND_STYLE, [100 * layer.share_b for layer in shown], []),
                ],
                axis(SHARE),
                name="shares",
            )
        )
    return parts
