"""The page of new weights: a verdict on data or by a memory alone, and where the change is.

Owns its tree, tables and chart, which the page of a memory shares. What it begins with is in `judgements`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from memsyn.comparing.prediction import Prediction
from memsyn.comparing.verdict import Comparison
from memsyn.errors import MismatchError
from memsyn.parameters import layer_of, renaming
from memsyn.report.charts import Series, axis, bars, lines
from memsyn.report.judgements import judge_comparison, judge_prediction, predicted
from memsyn.report.module_tree import layer_tree
from memsyn.report.parts import (
    MOST_ROWS,
    Cell,
    Chart,
    Page,
    Part,
    Section,
    Table,
    plain_cell,
    share_cell,
    share_text,
)
from memsyn.report.styles import FIRST_STYLE
from memsyn.values.comparison import LayerChange, LayerMove, layer_moves
from memsyn.values.display import counted
from memsyn.values.memory import Memory

NUM_WORST = 20
"""The most samples in the table of those that differ most."""
NUM_POINTS = 101
"""Points of the curve of changes."""
WHERE = "Where the change is"


def weights_page(
    memory: Memory,
    weights: Mapping[str, Tensor],
    found: Comparison | Prediction,
    names: tuple[str, str],
    before: Mapping[str, Tensor] | None,
    limits: tuple[float, float],
) -> Page:
    """The page of `compare`.

    Args:
        memory, weights: of the old and the new model.
        found: what was found on data, or predicted.
        names: those of the memory's file and of the weights' file.
        before: the old weights, if not the anchor.
        limits: the least agreement and the largest change.
    """
    min_agreement, max_change = limits
    prediction: Prediction | str
    if isinstance(found, Comparison):
        judgement, verdict = (
            judge_comparison(found, min_agreement, max_change),
            found.verdict(min_agreement, max_change),
        )
        behind = [
            Section("The verdict in full", [str(verdict), *str(found).splitlines()]),
            Section("How far outputs change", [_changes(found), _worst(found)]),
        ]
        prediction = predicted(memory, weights, before)
    else:
        judgement, prediction = judge_prediction(found, max_change), found
        behind = [Section("The verdict in full", [str(found.verdict(max_change))])]
    lead = f"Old model: {names[0]}, a memory of {counted(memory.num_samples, 'sample')}. New model: {names[1]}."
    return Page(
        f"{names[1]} against {names[0]}",
        judgement.headline,
        lead,
        [Section(WHERE, change_tree(memory, weights, prediction, before, max_change))],
        judgement,
        [*behind, *change_sections(memory, weights, prediction, before)],
    )


def change_tree(
    memory: Memory,
    weights: Mapping[str, Tensor],
    prediction: Prediction | str,
    before: Mapping[str, Tensor] | None,
    max_change: float,
) -> list[Part]:
    """Which layers changed where it matters: the predicted change, or else the changes weighted by importance."""
    if isinstance(prediction, Prediction):
        places = {layer_of(name): place for place, name in enumerate(memory.anchor)}
        layers = sorted(prediction.layers, key=lambda layer: places.get(layer, len(places)))
        return _predicted_tree(prediction, layers, max_change)
    own = _under_the_memorys_names(memory, weights)
    old = None if before is None else _under_the_memorys_names(memory, before)
    values = {move.layer: move.weighted for move in layer_moves(memory, own, old)}
    if not values:
        return ["The memory does not hold what would tell where the change matters."]
    odd = [layer for layer, value in values.items() if not math.isfinite(value)]
    if odd:
        return [f"These layers hold weights that are not finite: {', '.join(odd)}."]
    total = sum(values.values())
    if not total:
        return ["No weight that matters has changed."]
    shares = {layer: value / total for layer, value in values.items()}
    most = max(shares, key=lambda layer: shares[layer])
    return [
        layer_tree(
            f"{share_text(shares[most])} of the change that matters is in {most}",
            list(shares),
            lambda layers: sum(shares[layer] for layer in layers),
            of="the change that matters",
            note="The number is a layer's share of all changes, where the change of a weight counts by its importance.",
        )
    ]


def _predicted_tree(prediction: Prediction, order: Sequence[str], max_change: float) -> list[Part]:
    values = prediction.layers
    most = max(values, key=lambda layer: values[layer])
    unseen = " Running statistics moved too; the numbers do not see them." if prediction.moved_statistics else ""
    if not values[most]:
        return [f"No weight that matters has changed.{unseen}"]
    return [
        layer_tree(
            f"{most} changes the outputs most: by {share_text(values[most])}",
            order,
            lambda layers: math.sqrt(sum(values[layer] ** 2 for layer in layers)),
            whole=max_change or values[most],
            of="the allowed change" if max_change else "the largest change",
            note="The number is how far the change of this layer alone is predicted to move the outputs on old data."
            + unseen,
        )
    ]


def change_sections(
    memory: Memory,
    weights: Mapping[str, Tensor],
    prediction: Prediction | str,
    before: Mapping[str, Tensor] | None = None,
) -> list[Section]:
    """The tables of what changed: predicted by layer, and how far the weights are from the old ones."""
    sections = []
    if isinstance(prediction, Prediction):
        rows = [[Cell(layer), share_cell(value)] for layer, value in prediction.layers.items()]
        caption = "sqrt(E ||y' - y||^2 / E ||y||^2) for the change of this layer alone, to second order."
        sections.append(Section("Predicted change of outputs", [Table(["Layer", "Change"], rows, caption)]))
    if memory.anchor:
        sections.append(Section("What moved since the anchor", _moved_since(memory, weights, before)))
    return sections


def _changes(found: Comparison) -> Chart:
    """The curve of changes over samples, the least changed first."""
    ordered = found.change.sort().values
    shares = [place / (NUM_POINTS - 1) for place in range(NUM_POINTS)]
    values = [100 * float(ordered[round(share * (len(ordered) - 1))]) for share in shares]
    half, most, _ = (share_text(value) for value in found.change_quantiles.values())
    return lines(
        f"Half of the outputs change by at most {half}, nine in ten by at most {most}",
        [Series("change", FIRST_STYLE, [100 * share for share in shares], values)],
        axis("samples, the least changed first (%)", range=[0, 100]),
        axis("change of the output (% of its length)", rangemode="tozero"),
        name="changes",
        mode="lines",
    )


def _worst(found: Comparison) -> Table:
    same = {0.0: "no", 1.0: "yes"}
    rows = []
    for index in found.worst(NUM_WORST):
        share = float(found.same[index])
        change = share_cell(float(found.change[index]))
        rows.append([Cell(f"sample {index}"), Cell(same.get(share, share_text(share))), change])
    return Table(["Sample", "Same answer", "Change"], rows, "The samples that differ most; numbered from 0.")


def _under_the_memorys_names(memory: Memory, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    fit = renaming(memory.names, weights.keys()).names
    return dict(weights) | {name: weights[new] for name, new in fit.items() if new in weights}


def _moved_since(memory: Memory, weights: Mapping[str, Tensor], before: Mapping[str, Tensor] | None) -> list[Part]:
    """How far the model's weights are from the old ones, and what cannot be compared."""
    fit = renaming(memory.names, weights.keys()).names
    own = _under_the_memorys_names(memory, weights)
    old = None if before is None else _under_the_memorys_names(memory, before)
    present = {n for n, anchor in memory.anchor.items() if n in own and own[n].shape == anchor.shape}
    missing = [name for name in memory.anchor if name not in own]
    if memory.anchor and len(missing) == len(memory.anchor):
        raise MismatchError(
            f"the weights hold none of the memory's parameters: {missing[0]} is missing, for example. Give the "
            "state_dict of the same model."
        )
    said = [
        f"{what}: {', '.join(names)}."
        for what, names in (
            ("Not among the weights, and left out", missing),
            ("Of another shape, and left out", [n for n in memory.anchor if n in own and n not in present]),
            ("Found under another name", [f"{name} is {new}" for name, new in fit.items() if name in present]),
        )
        if names
    ]
    return [*said, *moved_parts(layer_moves(memory, own, old), "the model", "the anchor")]


def moved_parts(layers: Sequence[LayerChange | LayerMove], what: str, whose: str) -> list[Part]:
    """A chart and a table of how far the weights of each layer moved."""
    known = [layer for layer in layers if layer.moved is not None]
    if not known:
        return ["There is nothing to compare."]
    ratios = [math.nan if layer.moved_relative is None else 100 * layer.moved_relative for layer in known]
    far = max(known, key=lambda layer: layer.moved_relative or 0.0)
    places = sorted(sorted(range(len(known)), key=lambda place: -(known[place].moved or 0.0))[:MOST_ROWS])
    farthest = share_text(far.moved_relative or 0.0)
    chart = bars(
        f"{what[0].upper()}{what[1:]} is farthest off in {far.layer}: {farthest} of its length",
        [known[place].layer for place in places],
        [Series("distance", FIRST_STYLE, [ratios[place] for place in places], [])],
        axis(f"distance, in % of the length of {whose}"),
        name="moved",
    )
    rows = [
        [Cell(layer.layer), plain_cell(layer.moved), plain_cell(ratio)]
        for layer, ratio in zip(known, ratios, strict=True)
    ]
    return [replace(chart, table=Table(["Layer", "Distance", f"in % of the length of {whose}"], rows))]
