"""Charts from numbers: lines, marks, bars and heat maps, each with its table.

Owns what all pictures have in common: axes with units, hover texts, sizes. Colours of text and grid are the page's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memsyn.report.names import inert, shortened
from memsyn.report.parts import Cell, Chart, Table
from memsyn.report.styles import INK, Style

Axis = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """Points of one kind. NaN is a gap.

    Attributes:
        halves: of the points' intervals, infinite or NaN for none.
        words: of each point, what hovering says first; its x unless given.
    """

    name: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    halves: Sequence[float] = ()
    words: Sequence[str] = ()


def axis(title: str, **more: Any) -> Axis:
    """An axis with its title, which names the unit."""
    return {"title": {"text": inert(title)}, "automargin": True, **more}


def logarithmic(title: str) -> Axis:
    """An axis of powers of ten."""
    return axis(title, type="log", dtick=1, exponentformat="power")


def finite(values: Sequence[float]) -> list[float | None]:
    """As JSON has them: what is no finite number is none."""
    return [value if math.isfinite(value) else None for value in values]


def figure(data: list[dict[str, Any]], x: Axis, y: Axis, height: int) -> dict[str, Any]:
    """Data and layout."""
    layout = {
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 32, "b": 44},
        "showlegend": False,
        "xaxis": x,
        "yaxis": y,
        "hoverlabel": {"namelength": 60},
        "uirevision": "kept",
    }
    return {"data": data, "layout": layout}


def lines(
    title: str, series: Sequence[Series], x: Axis, y: Axis, *, name: str, mode: str = "lines+markers", height: int = 340
) -> Chart:
    """A line, or marks, for each series."""
    data = []
    for place, one in enumerate(series):
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": mode,
            "name": inert(one.name),
            "legendgroup": str(place),
            "x": finite(one.x),
            "y": finite(one.y),
            "line": {"color": one.style.colour, "dash": one.style.dash, "width": 2},
            "marker": {"color": one.style.colour, "symbol": one.style.marker, "size": 8},
            "text": [inert(word) for word in one.words] or [""] * len(one.x),
            "hovertemplate": "%{text} %{x}, %{y:.4~g}<extra>%{fullData.name}</extra>",
        }
        if any(map(math.isfinite, one.halves)):
            bars = [half if math.isfinite(half) else 0 for half in one.halves]
            trace["error_y"] = {"type": "data", "array": bars, "thickness": 1, "width": 3, "color": one.style.colour}
        data.append(trace)
    return Chart(
        title,
        figure(data, x, y, height),
        points_table(series, x, y),
        name,
        [(one.name, one.style) for one in series] if len(series) > 1 else (),
    )


def points_table(series: Sequence[Series], x: Axis, y: Axis) -> Table:
    """A row for each point."""
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
    unit: Axis,
    *,
    name: str,
    styles: Sequence[Style] = (),
    marks: bool = False,
) -> Chart:
    """Horizontal bars, a row for each label, first on top; the series' x are the lengths and y is not read.

    With `marks` points with their intervals take the bars' place, as on an axis that does not start at zero. `styles`
    are the rows' own, for a single series.
    """
    data = []
    places = list(range(len(labels)))
    for place, one in enumerate(series):
        colours: Any = [style.colour for style in styles] or one.style.colour
        symbols: Any = [style.marker for style in styles] or one.style.marker
        trace: dict[str, Any] = {
            "type": "scatter" if marks else "bar",
            "name": inert(one.name),
            "legendgroup": str(place),
            "x": finite(one.x),
            "y": places,
            "customdata": [inert(label) for label in labels],
            "hovertemplate": "%{customdata}: %{x:.4~g}<extra>%{fullData.name}</extra>",
            "marker": {"color": colours, **({"symbol": symbols, "size": 10} if marks else {})},
        }
        trace |= {"mode": "markers"} if marks else {"orientation": "h"}
        if any(map(math.isfinite, one.halves)):
            halves = [half if math.isfinite(half) else 0 for half in one.halves]
            trace["error_x"] = {"type": "data", "array": halves, "thickness": 1.5, "width": 4, "color": INK}
        data.append(trace)
    rows_axis = axis("", **_names(labels), autorange="reversed", zeroline=False)
    height = 76 + max(60, len(labels) * (14 + 12 * len(series)))
    table = Table(
        ["Name", *(one.name or _words(unit) for one in series)],
        [
            [Cell(label), *(_cell(one.x[row], one.halves[row] if one.halves else math.nan) for one in series)]
            for row, label in enumerate(labels)
        ],
        _words(unit) if len(series) > 1 else "",
    )
    legend = [(one.name, one.style) for one in series] if len(series) > 1 else ()
    return Chart(title, figure(data, unit, rows_axis, height), table, name, legend)


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    x: Axis,
    y: Axis,
    *,
    name: str,
    hover: str,
    highest: float | None = None,
    ticks: Sequence[str] = (),
    written: bool = False,
) -> Chart:
    """A heat map, first row on top; NaN stays empty. Hovering says row, column and `hover` with the number.

    `ticks` are the columns' names on the axis, where those are too long; `written` puts the numbers into the map.
    """
    data = {
        "type": "heatmap",
        "x": list(range(len(columns))),
        "y": list(range(len(rows))),
        "z": [finite(row) for row in values],
        "customdata": [[[inert(row), inert(column)] for column in columns] for row in rows],
        "hovertemplate": f"%{{customdata[0]}}, %{{customdata[1]}}: {hover}<extra></extra>",
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
        data["colorbar"] = {"thickness": 10, "len": 0.9, "title": {"text": ""}}
    x = {**x, **_names(ticks or columns), "showgrid": False, "zeroline": False}
    y = {**y, **_names(rows), "autorange": "reversed", "showgrid": False, "zeroline": False}
    cells = [[Cell(row), *map(_cell, line)] for row, line in zip(rows, values, strict=True)]
    return Chart(title, figure([data], x, y, 84 + 24 * max(4, len(rows))), Table(["Name", *columns], cells), name)


def _names(names: Sequence[str]) -> Axis:
    """Ticks with names."""
    return {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [inert(shortened(n)) for n in names]}


def _words(found: Axis) -> str:
    text: str = found["title"]["text"]
    return text


def _cell(value: float, half: float = math.nan) -> Cell:
    if not math.isfinite(value):
        return Cell("")
    return Cell(f"{value:.4g}" + (f" ± {half:.2g}" if math.isfinite(half) else ""), value)
