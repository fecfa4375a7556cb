"""Makes charts from numbers: lines, marks, bars and heat maps, each with a table of its numbers.

Owns axes with units, hover texts and sizes. The page's style sheet owns the colours of text and grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from memsyn.report.names import inert, shortened
from memsyn.report.parts import Cell, Chart, LegendEntry, Table, brief, plain_number
from memsyn.report.styles import INK, OPEN, Style

PlotlyAxis = dict[str, Any]

APART, REACH = 0.1, 0.3
"""For marks at the same x: the distance between neighbours, and the largest distance of a mark from its x."""
CLEAR = "rgba(0,0,0,0)"


@dataclass(frozen=True)
class Series:
    """The points of one line or one set of bars. NaN is a gap.

    Attributes:
        halves: half the width of each point's interval; infinite or NaN for no interval.
        words: the first words of each point's hover text; by default its x.
        shown: whether it is visible at first; if not, a click on its name in the legend shows it.
    """

    name: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    halves: Sequence[float] = ()
    words: Sequence[str] = ()
    shown: bool = True


def axis(title: str, **more: Any) -> PlotlyAxis:
    """An axis with its title, which names the unit."""
    return {"title": {"text": inert(title), "standoff": 8}, "automargin": True, **more}


def logarithmic(title: str) -> PlotlyAxis:
    """An axis of powers of ten, which are written out: 0.01, 1, 1,000."""
    return axis(title, type="log", dtick=1, tickformat=",~r")


def finite(values: Sequence[float]) -> list[float | None]:
    """Values for JSON, in few digits: NaN and infinities become None."""
    short = [brief(value) if math.isfinite(value) else None for value in values]
    return [int(value) if value is not None and value.is_integer() else value for value in short]


def figure(data: list[dict[str, Any]], x: PlotlyAxis, y: PlotlyAxis, height: int) -> dict[str, Any]:
    """A Plotly figure: data and layout."""
    layout = {
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 12, "b": 44},
        "showlegend": False,
        "xaxis": x,
        "yaxis": y,
        "hoverlabel": {"namelength": 60},
        "uirevision": "kept",
    }
    return {"data": data, "layout": layout}


def lines(
    title: str,
    series: Sequence[Series],
    x: PlotlyAxis,
    y: PlotlyAxis,
    *,
    name: str,
    mode: str = "lines+markers",
    height: int = 340,
    dodge: bool = False,
    note: str = "",
) -> Chart:
    """A chart with a line, or marks, for each series. With `dodge`, points at the same whole x are put side by side."""
    data, legend = [], []
    shifts = _shifts([one.shown for one in series]) if dodge else [0.0] * len(series)
    for place, (one, shift) in enumerate(zip(series, shifts, strict=True)):
        before = f"{'%{text}, ' if one.words else ''}%{{x:{'.0f' if dodge else '.4~r'}}}, "
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": mode,
            "name": inert(one.name),
            "legendgroup": str(place),
            "visible": one.shown,
            "x": finite([value + shift for value in one.x]),
            "y": finite(one.y),
            "line": {"color": one.style.colour, "dash": one.style.dash, "width": 2},
            "marker": {"color": one.style.colour, "symbol": one.style.marker, "size": 7},
            "hovertemplate": f"{before}%{{y:.4~r}}<extra>%{{fullData.name}}</extra>",
        }
        if one.words:
            trace["text"] = [inert(word) for word in one.words]
        if any(map(math.isfinite, one.halves)):
            bars = finite([half if math.isfinite(half) else 0 for half in one.halves])
            trace["error_y"] = {"type": "data", "array": bars, "thickness": 0.8, "width": 2, "color": one.style.colour}
        data.append(trace)
        legend.append(_entry(one, marks="markers" in mode, line="lines" in mode))
    shown = legend if len(series) > 1 else ()
    return Chart(title, figure(data, x, y, height), points_table(series, x, y), name, shown, note)


def _entry(one: Series, *, marks: bool, line: bool) -> LegendEntry:
    """A legend entry with the mark and the line only if they are drawn."""
    style = one.style._replace(marker=one.style.marker if marks else "", dash=one.style.dash if line else "")
    return LegendEntry(one.name, style, one.shown)


def _shifts(shown: Sequence[bool]) -> list[float]:
    """How far each series is moved sideways: those visible at first evenly over the whole reach, the others between."""
    last, first = max(1, len(shown) - 1), [place for place, one in enumerate(shown) if one]
    reach = min(REACH, APART * (len(shown) - 1) / 2)
    own = [round(rank * last / max(1, len(first) - 1)) for rank in range(len(first))]
    left = [slot for slot in range(len(shown)) if slot not in own]
    others = [place for place, one in enumerate(shown) if not one]
    slots = dict(zip([*first, *others], [*own, *left], strict=True))
    return [2 * reach * slots[place] / last - reach for place in range(len(shown))]


def points_table(series: Sequence[Series], x: PlotlyAxis, y: PlotlyAxis) -> Table:
    """A table with a row for each point."""
    columns = [
        "Series",
        _words(x),
        _words(y),
        *(["± half of the 95% interval"] if any(s.halves for s in series) else []),
    ]
    rows = []
    for one in series:
        for place, (a, b) in enumerate(zip(one.x, one.y, strict=True)):
            words = f" {one.words[place]}" if one.words else ""
            halves = [_cell(one.halves[place] if one.halves else math.nan)] if len(columns) > 3 else []
            rows.append([Cell(f"{one.name}{words}"), _cell(a), _cell(b), *halves])
    return Table(columns, rows)


def bars(
    title: str,
    labels: Sequence[str],
    series: Sequence[Series],
    unit: PlotlyAxis,
    *,
    name: str,
    rows: str = "layer",
    styles: Sequence[Style] = (),
    marks: bool = False,
) -> Chart:
    """Horizontal bars, a row for each label, the first on top. A series' x are the lengths; its y is not used.

    `marks` draws points with intervals in place of bars, for an axis that does not start at zero. `styles` gives each
    row its own style. A series whose marker is `OPEN` has bars that are not filled. `rows` is the name of a row.
    """
    data, legend = [], []
    for place, one in enumerate(series):
        colours: Any = [style.colour for style in styles] or one.style.colour
        symbols: Any = [style.marker for style in styles] or one.style.marker
        trace: dict[str, Any] = {
            "type": "scatter" if marks else "bar",
            "name": inert(one.name),
            "legendgroup": str(place),
            "x": finite(one.x),
            "y": list(range(len(labels))),
            "customdata": [inert(label) for label in labels],
            "hovertemplate": "%{customdata}: %{x:.4~r}<extra>%{fullData.name}</extra>",
            "marker": {"color": colours, **({"symbol": symbols, "size": 10} if marks else {})},
        }
        trace |= {"mode": "markers"} if marks else {"orientation": "h"}
        if one.style.marker == OPEN:
            trace["marker"] = {"color": CLEAR, "line": {"color": colours, "width": 1.5}}
        if any(map(math.isfinite, one.halves)):
            halves = finite([half if math.isfinite(half) else 0 for half in one.halves])
            trace["error_x"] = {"type": "data", "array": halves, "thickness": 1, "width": 3, "color": INK}
        data.append(trace)
        box = one if marks or one.style.marker == OPEN else replace(one, style=one.style._replace(marker="square"))
        legend.append(_entry(box, marks=True, line=False))
    rows_axis = axis(rows, **_names(labels), autorange="reversed", zeroline=False)
    height = 76 + max(60, len(labels) * (14 + 12 * len(series)))
    table = Table(
        [rows.capitalize(), *(one.name or _words(unit) for one in series)],
        [
            [Cell(label), *(_cell(one.x[row], one.halves[row] if one.halves else math.nan) for one in series)]
            for row, label in enumerate(labels)
        ],
        _words(unit) if len(series) > 1 else "",
    )
    return Chart(title, figure(data, unit, rows_axis, height), table, name, legend if len(series) > 1 else ())


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    x: PlotlyAxis,
    y: PlotlyAxis,
    *,
    name: str,
    hover: str,
    highest: float | None = None,
    ticks: Sequence[str] = (),
    written: bool = False,
) -> Chart:
    """A heat map, the first row on top; NaN is an empty cell.

    The hover text of a cell is its row, its column and `hover`, the number with its unit; the page's script puts in the
    names. `ticks` are shorter names of the columns for the axis. `written` writes the numbers into the cells.
    """
    title_of_rows = _words(y)
    data = {
        "type": "heatmap",
        "x": list(range(len(columns))),
        "y": list(range(len(rows))),
        "z": [finite(row) for row in values],
        "meta": {"rows": [inert(row) for row in rows], "columns": [inert(column) for column in columns]},
        "hovertemplate": f"{title_of_rows} %{{customdata[0]}}, %{{customdata[1]}}: {hover}<extra></extra>",
        "hoverongaps": False,
        "colorscale": "Cividis",
        "zmin": 0,
        "showscale": not written,
        "xgap": 1,
        "ygap": 1,
    }
    if highest is not None:
        data["zmax"] = highest
    if written:
        data["texttemplate"] = "%{z:.0f}"
    else:
        unit = hover.partition("}")[2]
        data["colorbar"] = {"thickness": 10, "len": 0.9, "title": {"text": unit, "side": "right"}}
    x = {**x, **_names(ticks or columns), "showgrid": False, "zeroline": False}
    y = {**y, **_names(rows), "autorange": "reversed", "showgrid": False, "zeroline": False}
    cells = [[Cell(row), *map(_cell, line)] for row, line in zip(rows, values, strict=True)]
    return Chart(
        title,
        figure([data], x, y, 84 + 24 * max(4, len(rows))),
        Table([title_of_rows.capitalize(), *columns], cells),
        name,
    )


def _names(names: Sequence[str]) -> PlotlyAxis:
    """Axis options for ticks with names."""
    return {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [inert(shortened(n)) for n in names]}


def _words(found: PlotlyAxis) -> str:
    text: str = found["title"]["text"]
    return text


def _cell(value: float, half: float = math.nan) -> Cell:
    if not math.isfinite(value):
        return Cell("")
    return Cell(plain_number(value, 4) + (f" ± {plain_number(half, 2)}" if math.isfinite(half) else ""), value)
