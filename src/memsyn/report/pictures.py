"""Draws charts as PNG pictures with matplotlib, from the Plotly figures that `charts` makes.

Owns the translation of those figures, not of Plotly in general. Opens no window and uses no global state.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from memsyn.errors import MemsynError
from memsyn.report.names import file_name, needed
from memsyn.report.parts import Chart, LegendEntry, plain_number
from memsyn.report.styles import OPEN
from memsyn.values.display import printable

MATPLOTLIB_MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "triangle-down": "v", "cross": "P", "x": "X",
    "star": "*", "square-open": "s", "": "",
}  # fmt: skip
MATPLOTLIB_DASHES: dict[str, Any] = {
    "solid": "-", "dash": (0, (6, 3)), "dot": ":", "dashdot": "-.", "longdash": (0, (10, 3)), "": "",
}  # fmt: skip


def write_pictures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write each chart to `folder`, under its name; return the files.

    Raises:
        MemsynError: a file cannot be written, or matplotlib is missing.
    """
    figures = needed("matplotlib.figure")
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts:
            names = (f"{file_name(chart.name)}{f'-{n}' if n > 1 else ''}.png" for n in count(1))
            path = next(folder / name for name in names if folder / name not in written)
            figure = figures.Figure(figsize=(6.4, chart.figure["layout"]["height"] / 90), dpi=150, layout="constrained")
            _draw(figure, chart)
            figure.savefig(path)
            written.append(path)
    except OSError as error:
        raise MemsynError(f"{folder} cannot be written: {error.strerror}. Name another folder.") from error
    return written


def _draw(figure: Any, chart: Chart) -> None:
    axes = figure.add_subplot()
    figure.suptitle(_plain(chart.title), fontsize="medium", wrap=True)
    for trace in (trace for trace in chart.figure["data"] if trace.get("visible", True)):
        {"scatter": _points, "bar": _bars, "heatmap": _heat}[trace["type"]](axes, trace, len(chart.figure["data"]))
    layout = chart.figure["layout"]
    for which, axis in (("x", layout["xaxis"]), ("y", layout["yaxis"])):
        getattr(axes, f"set_{which}label")(_plain(html.unescape(axis["title"]["text"])))
        if axis.get("type") == "log":
            getattr(axes, f"set_{which}scale")("log")
        if "ticktext" in axis:
            labels = [_plain(html.unescape(text)) for text in axis["ticktext"]]
            rotation = {"rotation": 90} if which == "x" and max(map(len, labels), default=0) > 3 else {}
            getattr(axes, f"set_{which}ticks")(axis["tickvals"], labels, **rotation)
            continue
        getattr(axes, f"{which}axis").set_major_formatter(lambda value, _: plain_number(value, 6))
        if "range" in axis:
            getattr(axes, f"set_{which}lim")(*axis["range"])
    if layout["yaxis"].get("autorange") == "reversed" and not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    if chart.series:
        handles = [_handle(entry) for entry in chart.series if entry.shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")


def _handle(entry: LegendEntry) -> Any:
    """The mark of a legend entry."""
    style = entry.style
    return needed("matplotlib.lines").Line2D(
        [], [], color=style.colour, marker=MATPLOTLIB_MARKERS[style.marker], linestyle=MATPLOTLIB_DASHES[style.dash],
        label=_plain(entry.name), fillstyle="none" if style.marker == OPEN else "full",
    )  # fmt: skip


def _points(axes: Any, trace: dict[str, Any], _: int) -> None:
    """Draw a line with marks; if the marks have their own colours, each mark is drawn alone."""
    nan = float("nan")
    x, y = ([nan if value is None else value for value in trace[key]] for key in "xy")
    marker, error = trace["marker"], {key: trace.get(f"error_{key}", {}).get("array") for key in "xy"}
    if isinstance(marker["color"], list):
        for place, (colour, symbol) in enumerate(zip(marker["color"], marker["symbol"], strict=True)):
            half = [error["x"][place]] if error["x"] else None
            axes.errorbar(x[place], y[place], xerr=half, color=colour, marker=MATPLOTLIB_MARKERS[symbol], capsize=3)
        return
    axes.errorbar(
        x, y, xerr=error["x"], yerr=error["y"], color=marker["color"], capsize=2, elinewidth=0.8,
        marker=MATPLOTLIB_MARKERS[marker["symbol"]] if "markers" in trace["mode"] else "",
        linestyle=MATPLOTLIB_DASHES[trace["line"]["dash"]] if "lines" in trace["mode"] else "",
    )  # fmt: skip


def _bars(axes: Any, trace: dict[str, Any], num_traces: int) -> None:
    thick = 0.8 / num_traces
    shift = (int(trace["legendgroup"]) - (num_traces - 1) / 2) * thick
    places, lengths = [place + shift for place in trace["y"]], [value or 0 for value in trace["x"]]
    marker, halves = trace["marker"], trace.get("error_x", {}).get("array")
    look = {"color": "none", "edgecolor": marker["line"]["color"]} if "line" in marker else {"color": marker["color"]}
    axes.barh(places, lengths, thick, xerr=halves, capsize=3, **look)


def _heat(axes: Any, trace: dict[str, Any], _: int) -> None:
    nan = float("nan")
    values = [[nan if value is None else value for value in row] for row in trace["z"]]
    shown = axes.imshow(values, cmap="cividis", vmin=0, vmax=trace.get("zmax"), aspect="auto", interpolation="nearest")
    if "texttemplate" not in trace:
        axes.figure.colorbar(shown, ax=axes, label=_plain(trace["colorbar"]["title"]["text"]))
        return
    for row, line in enumerate(trace["z"]):
        for column, value in enumerate(line):
            if value is not None:
                ink = "white" if value < 0.6 * trace.get("zmax", 100) else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize="small", color=ink)


def _plain(text: str) -> str:
    """Text that matplotlib draws as it is: a $ would begin a formula."""
    return printable(text).replace("$", r"\$")
