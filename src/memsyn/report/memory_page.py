"""The page of a memory, an importance or factors, and the page of two of them side by side.

Owns the choice of charts and their texts; the numbers come from `summary`, `comparison` and `distribution`. What
is said of directions is in `directions_sections`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from memsyn.errors import MismatchError
from memsyn.parameters import renaming
from memsyn.report.charts import Series, axis, bars, heat, lines, logarithmic
from memsyn.report.directions_sections import (
    MOST_ROWS,
    factor_parts,
    room_change_headline,
    room_changes,
    room_headline,
    room_parts,
)
from memsyn.report.distribution import Lorenz, histograms, lorenz, top_units
from memsyn.report.names import short_fingerprint
from memsyn.report.parts import Cell, Chart, Page, Part, Section, Table, number_cell
from memsyn.report.styles import FIRST_STYLE, GREY, SECOND_STYLE, Style
from memsyn.values.comparison import Difference, LayerChange, diff
from memsyn.values.consolidation import Consolidation
from memsyn.values.directions import Directions
from memsyn.values.factors import KroneckerFactors
from memsyn.values.importance import LayerSummary, summarize
from memsyn.values.memory import Held, Memory, directions_of, kind_of, omega_of

NUM_UNITS = 20
EVEN_STYLE = Style(GREY, "x", "dot")
SHARE = "share of all importance (%)"
UNITS_NOTE = (
    "A unit is one row of a layer's parameters: a neuron or a filter with its bias, or a token of an embedding. If "
    "weights are stored as (inputs, outputs), a row is an input."
)


def memory_page(held: Held, name: str, weights: Mapping[str, Tensor] | None = None) -> Page:
    """The page of one file; with a model's `weights`, also how far they are from the anchor."""
    directions = directions_of(held)
    if isinstance(held, KroneckerFactors) or (directions is not None and not omega_of(held)):
        return _directions_page(held, name, directions or Directions())
    layers, curve = held.summary(), lorenz(omega_of(held))
    sections = [
        Section("Layers", _layers(layers)),
        Section("How the importance is spread", _spread(held, curve)),
        Section("The most important units", [UNITS_NOTE, _units(held)] if curve else ["No unit is important yet."]),
    ]
    if isinstance(held, Memory):
        if directions is not None:
            sections.append(Section("Room that is left", room_parts(directions)))
        if weights is not None:
            sections.append(Section("What moved since the anchor", _moved_since(held, weights)))
        sections.append(Section("Consolidations", _history(held.history)))
    num_weights = sum(layer.num_weights for layer in layers)
    size = f"{num_weights:,} weights in {len(layers)} layers"
    measured = _quantity(_measured(held))
    lead = f"{kind_of(held).capitalize()} of {size}, measured on {held.num_samples:,} samples{measured}."
    return Page(name, _headline(curve, layers), lead, sections)


def _directions_page(held: Held, name: str, directions: Directions) -> Page:
    """The page of factors, or of a memory without an importance."""
    layers = directions.summary()
    sections = [Section("Room that is left", room_parts(directions))]
    if isinstance(held, KroneckerFactors):
        own = "This is the room that a memory of these factors alone leaves."
        sections = [
            Section("Layers", factor_parts(held.summary())),
            Section("Room that is left", [own, *sections[0].parts]),
        ]
    elif isinstance(held, Memory):
        sections.append(Section("Consolidations", _history(held.history)))
    size = f"{sum(layer.num_weights for layer in layers):,} weights in {len(layers)} matrices"
    lead = (
        f"{kind_of(held).capitalize()} of {size}, measured on {held.num_samples:,} samples{_quantity(_measured(held))}."
    )
    return Page(name, room_headline(layers), lead, sections)


def difference_page(a: Held, b: Held, names: tuple[str, str]) -> Page:
    """The page of two files, A and B.

    Raises:
        MismatchError: one holds an importance, the other directions or factors.
    """
    found = diff(a, b)
    both = [("A", a), ("B", b)]
    sections = _importance_sections(found, both) if found.layers or not found.directions else []
    if found.directions:
        sections.append(Section("Room that is left", room_changes(found.directions)))
    if any(layer.moved is not None for layer in found.layers):
        sections.append(Section("Where the anchors moved", _moved(found.layers, "the anchor of B", "A's anchor")))
    for which, held in both:
        if isinstance(held, Memory):
            sections.append(Section(f"Consolidations of {which}", _history(held.history)))
    lead = " ".join(
        f"{which}: {name}, {kind_of(held)} on {held.num_samples:,} samples{_quantity(_measured(held))}."
        for which, name, held in (("A", names[0], a), ("B", names[1], b))
    )
    return Page(" and ".join(names), _difference_headline(found), lead, sections)


def _difference_headline(found: Difference) -> str:
    if found.same:
        return "A and B hold the same, bit for bit."
    most = max(found.layers, key=lambda layer: abs(layer.share_b - layer.share_a), default=None)
    if most is None:
        return room_change_headline(found.directions) or "A and B differ."
    change = 100 * (most.share_b - most.share_a)
    return f"From A to B the importance shifts most in {most.layer}: {change:+.1f} points of its share."


def _importance_sections(found: Difference, both: Sequence[tuple[str, Held]]) -> list[Section]:
    important = [(which, held) for which, held in both if any(bool(own.any()) for own in omega_of(held).values())]
    curves = _both_lorenz(both[0][1], both[1][1])
    return [
        Section("Layers", _changes(found)),
        Section("How the importance is spread", [curves, *(_of(w, _histogram(held)) for w, held in important)]),
        Section("The most important units", [UNITS_NOTE, *(_of(w, _units(held)) for w, held in important)]),
    ]


def _measured(held: Held) -> tuple[str, str] | None:
    """What a file holds: of a memory with directions alone, theirs."""
    return held.quantity or (held.directions_quantity if isinstance(held, Memory) else None)


def _quantity(quantity: tuple[str, str] | None) -> str:
    return f": {quantity[1]} of {quantity[0]}" if quantity else ""


def _headline(curve: Lorenz | None, layers: Sequence[LayerSummary]) -> str:
    if curve is None:
        return "Nothing in it is important yet."
    top = max(layers, key=lambda layer: layer.share)
    return (
        f"{100 * curve.half:.1f}% of the weights hold half of the importance; "
        f"{100 * top.share:.0f}% of it lies in {top.layer}."
    )


def _layers(layers: Sequence[LayerSummary]) -> list[Part]:
    columns = ["Layer", "Weights", "Share (%)", "Mean", "Max", "Top tenth (%)"]
    rows = [
        [
            Cell(layer.layer),
            number_cell(f"{layer.num_weights:,}"),
            Cell(f"{100 * layer.share:.1f}", layer.share),
            Cell(f"{layer.mean:.3g}", layer.mean),
            Cell(f"{layer.max:.3g}", layer.max),
            Cell(f"{100 * layer.concentration:.1f}", layer.concentration),
        ]
        for layer in layers
    ]
    whole = Table(
        columns, rows, "Top tenth: the share of the layer's importance in its most important tenth of weights."
    )
    if not layers:
        return [whole]
    shown = _largest(layers, [layer.share for layer in layers])
    first = max(shown, key=lambda layer: layer.share)
    top = max(shown, key=lambda layer: layer.mean)
    names = [layer.layer for layer in shown]
    shares = bars(
        f"{first.layer} holds {100 * first.share:.0f}% of all importance",
        names,
        [Series("share", FIRST_STYLE, [100 * layer.share for layer in shown], [])],
        axis(SHARE),
        name="layers-share",
    )
    sizes = bars(
        f"A weight of {top.layer} matters most on average: {top.mean:.3g}",
        names,
        [
            Series("mean over the weights", FIRST_STYLE, [layer.mean or math.nan for layer in shown], []),
            Series("largest", SECOND_STYLE, [layer.max or math.nan for layer in shown], []),
        ],
        logarithmic("importance of a weight (units of the objective per unit of weight)"),
        name="layers-size",
        marks=True,
    )
    left = len(layers) - len(shown)
    return [
        whole,
        *([f"The charts show the {MOST_ROWS} layers with the largest share; {left} are left out."] if left else []),
        shares,
        sizes,
    ]


def _largest(layers: Sequence[LayerSummary], numbers: Sequence[float]) -> list[LayerSummary]:
    """The `MOST_ROWS` layers with the largest numbers, in the model's order."""
    kept = sorted(sorted(range(len(layers)), key=lambda place: -numbers[place])[:MOST_ROWS])
    return [layers[place] for place in kept]


def _spread(held: Held, curve: Lorenz | None) -> list[Part]:
    if curve is None:
        return ["No weight is important yet."]
    return [
        _lorenz_chart(
            [("all weights", FIRST_STYLE, curve)],
            f"Half of the importance lies in {100 * curve.half:.1f}% of the weights",
        ),
        _histogram(held),
    ]


def _both_lorenz(a: Held, b: Held) -> Chart:
    one, other = (lorenz(omega_of(held)) for held in (a, b))
    ginis = [curve.gini if curve else 0.0 for curve in (one, other)]
    title = f"Gini coefficient {ginis[0]:.2f} in A and {ginis[1]:.2f} in B"
    return _lorenz_chart([("A", FIRST_STYLE, one), ("B", SECOND_STYLE, other)], title)


def _of(which: str, chart: Chart) -> Chart:
    """A chart of file A or B, with its letter in the title and the name."""
    return replace(chart, title=f"{which}: {chart.title}", name=f"{chart.name} {which}")


def _lorenz_chart(curves: Sequence[tuple[str, Style, Lorenz | None]], title: str) -> Chart:
    series, rows = [], []
    for name, style, curve in curves:
        if curve is None:
            continue
        x, y = ([100 * value for value in values] for values in (curve.weights, curve.held))
        series.append(Series(name, style, x, y))
        rows.append(
            [Cell(name), number_cell(f"{curve.gini:.3f}"), number_cell(f"{100 * curve.half:.2f}")]
            + [number_cell(f"{100 - y[round(share * (len(y) - 1))]:.1f}") for share in (0.5, 0.9, 0.99)]
        )
    series.append(Series("if all weights mattered alike", EVEN_STYLE, [0, 100], [0, 100]))
    chart = lines(
        title,
        series,
        axis("weights, the least important first (%)", range=[0, 100]),
        axis("importance that they hold (%)", range=[0, 100]),
        name="lorenz",
        mode="lines",
    )
    top = ["held by the top 50% (%)", "by the top 10% (%)", "by the top 1% (%)"]
    return replace(chart, table=Table(["Weights", "Gini coefficient", "weights that hold half (%)", *top], rows))


def _histogram(held: Held) -> Chart:
    found = histograms(omega_of(held))
    layers = summarize(omega_of(held))
    names = [layer.layer for layer in _largest(layers, [layer.share for layer in layers])]
    ends = ("less", *(f"{10**exponent:.3g}" for exponent in found.exponents))
    last = len(ends) - 1
    empty = min(next((place for place, share in enumerate(found.shares[name]) if share), last) for name in names)
    classes = ["less" if not place else f"from {end}" for place, end in enumerate(ends)][empty:]
    ticks = ["" if place == 1 or (place and found.exponents[place - 1] % 1) else end for place, end in enumerate(ends)][
        empty:
    ]
    values = [[100 * share for share in found.shares[name]][empty:] for name in names]
    spans = {name: _span(found.shares[name]) for name in names}
    widest = max(names, key=lambda name: spans[name])
    return heat(
        f"The classes with over 1% of a layer's weights lie up to {spans[widest]:g} powers of ten apart ({widest})",
        names,
        classes,
        values,
        axis("importance of a weight; colour: share of the layer's weights (%)"),
        axis("layer"),
        name="histogram",
        hover="%{z:.1f}% of the layer's weights",
        ticks=ticks,
    )


def _span(shares: Sequence[float]) -> float:
    """Powers of ten from the first class with over 1% of the weights to the last; the lowest has no lower end."""
    places = [place for place, share in enumerate(shares) if place and share > 0.01]
    return (places[-1] - places[0]) / 2 if places else 0.0


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


def _moved_since(memory: Memory, weights: Mapping[str, Tensor]) -> list[Part]:
    """How far the model's weights are from the anchor: compared as the anchor of a second memory."""
    fit = renaming(memory.anchor.keys(), weights.keys()).names
    weights = dict(weights) | {name: weights[new] for name, new in fit.items() if new in weights}
    present = {n: weights[n] for n in memory.anchor if n in weights and weights[n].shape == memory.anchor[n].shape}
    bare = replace(memory, directions=None)
    found = diff(bare, replace(bare, anchor=present, importance={n: memory.importance[n] for n in present}))
    reshaped = [name for name in memory.anchor if name in weights and name not in present]
    missing = [name for name in memory.anchor if name not in weights]
    said = [
        f"{what}: {', '.join(names)}."
        for what, names in (
            ("Not among the weights, and left out", missing),
            ("Of another shape, and left out", reshaped),
            ("Found under another name", [f"{name} is {new}" for name, new in fit.items() if name in present]),
        )
        if names
    ]
    if memory.anchor and len(missing) == len(memory.anchor):
        raise MismatchError(
            f"the weights hold none of the memory's parameters: {missing[0]} is missing, for example. Give the "
            "state_dict of the same model."
        )
    return [*said, *_moved(found.layers, "the model", "the anchor")]


def _moved(layers: Sequence[LayerChange], what: str, whose: str) -> list[Part]:
    known = [layer for layer in layers if layer.moved is not None]
    if not known:
        return ["There is nothing to compare."]
    ratios = [math.nan if layer.moved_relative is None else 100 * layer.moved_relative for layer in known]
    far = max(known, key=lambda layer: layer.moved_relative or 0.0)
    places = sorted(sorted(range(len(known)), key=lambda place: -(known[place].moved or 0.0))[:MOST_ROWS])
    farthest = 100 * (far.moved_relative or 0.0)
    chart = bars(
        f"{what[0].upper()}{what[1:]} is farthest off in {far.layer}: {farthest:.1f}% of its length",
        [known[place].layer for place in places],
        [Series("distance", FIRST_STYLE, [ratios[place] for place in places], [])],
        axis(f"distance, in % of the length of {whose}"),
        name="moved",
    )
    rows = [
        [Cell(layer.layer), number_cell(f"{layer.moved:.3g}"), number_cell("" if math.isnan(ratio) else f"{ratio:.3g}")]
        for layer, ratio in zip(known, ratios, strict=True)
    ]
    return [replace(chart, table=Table(["Layer", "Distance", f"in % of the length of {whose}"], rows))]


def _changes(found: Difference) -> list[Part]:
    columns = ["Layer", "Share A (%)", "Share B (%)", "Change (points)", "Total A", "Total B"]
    rows = [
        [
            Cell(layer.layer),
            number_cell(f"{100 * layer.share_a:.1f}"),
            number_cell(f"{100 * layer.share_b:.1f}"),
            number_cell(f"{round(100 * (layer.share_b - layer.share_a), 1) + 0.0:+.1f}"),
            number_cell(f"{layer.total_a:.3g}"),
            number_cell(f"{layer.total_b:.3g}"),
        ]
        for layer in found.layers
    ]
    parts: list[Part] = [Table(columns, rows, "Total: the sum of the layer's importance.")]
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
                f"The share of {most.layer} goes from {100 * most.share_a:.1f}% to {100 * most.share_b:.1f}%",
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
