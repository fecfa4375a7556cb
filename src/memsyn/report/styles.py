"""The colour, marker and dash of each method in every chart, so that no two differ by colour alone.

Owns the table by method. Most colours are from Okabe and Ito (2008), without yellow, which is too light on white. All
colours can be distinguished with every kind of colour vision, on white and on dark. `INK` stands for the text's colour,
which is light on a dark page.
"""

from __future__ import annotations

import hashlib
from itertools import product
from typing import Final, NamedTuple

INK: Final = "black"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY, VIOLET, BROWN, LEAF = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E", "#9900FF", "#774422", "#88BB66",
)  # fmt: skip
COLOURS: Final = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY, VIOLET, BROWN, LEAF, INK)

MARKERS: Final = {
    "circle": "M14 2a4 4 0 1 0 .01 0z",
    "square": "M10 2h8v8h-8z",
    "diamond": "M14 1l5 5-5 5-5-5z",
    "triangle-up": "M14 1l5 9h-10z",
    "triangle-down": "M14 11l5-9h-10z",
    "cross": "M12.5 1h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
    "x": "M10 1l4 3.5 4-3.5 1.5 1.5-3.8 3.5 3.8 3.5-1.5 1.5-4-3.5-4 3.5-1.5-1.5 3.8-3.5-3.8-3.5z",
    "star": "M14 0l1.6 4.2h4.4l-3.5 2.7 1.3 4.3-3.8-2.6-3.8 2.6 1.3-4.3-3.5-2.7h4.4z",
}
"""Plotly's marker -> its outline as an SVG path, in a legend of 28 by 12."""
OPEN: Final = "square-open"
"""The marker that stands for bars without a fill."""
OUTLINES: Final = {**MARKERS, OPEN: "M9 1h10v10h-10zM11 3v6h6v-6z"}
DASHES: Final = {"solid": "", "dash": "6 3", "dot": "2 2", "dashdot": "6 2 2 2", "longdash": "10 3"}
"""Plotly's dash -> SVG's stroke-dasharray."""


class Style(NamedTuple):
    """How a method or another series is drawn. An empty marker or dash: without marks or without a line."""

    colour: str
    marker: str
    dash: str

    @property
    def outline(self) -> str:
        """The marker as an SVG path."""
        return OUTLINES[self.marker]

    @property
    def dashes(self) -> str:
        """The dash as SVG's stroke-dasharray."""
        return DASHES[self.dash]


FIRST_STYLE, SECOND_STYLE = Style(BLUE, "circle", "solid"), Style(VERMILLION, "square", "dash")
"""Of a page's only series, or of file A; and of file B."""

METHOD_STYLES: Final = {
    "mas": Style(BLUE, "circle", "solid"),
    "mas-local": Style(SKY, "circle", "dash"),
    "mas-test": Style(VIOLET, "square", "dash"),
    "mas-both": Style(VIOLET, "diamond", "dot"),
    "mas-local-test": Style(SKY, "square", "dot"),
    "mas-local-both": Style(LEAF, "diamond", "dashdot"),
    "mas-in-use": Style(LEAF, "star", "longdash"),
    "mas-public": Style(VIOLET, "triangle-up", "solid"),
    "mas-new": Style(BLUE, "triangle-down", "dot"),
    "mas-noise": Style(GREY, "square", "dash"),
    "mas-batched": Style(BROWN, "x", "dash"),
    "mas-rehearsal": Style(BLUE, "cross", "dash"),
    "finetune": Style(VERMILLION, "square", "solid"),
    "joint": Style(INK, "diamond", "dot"),
    "alone": Style(INK, "x", "dashdot"),
    "rehearsal": Style(VERMILLION, "cross", "longdash"),
    "frozen": Style(GREY, "x", "dot"),
    "l2": Style(GREY, "triangle-down", "solid"),
    "lwf": Style(ORANGE, "triangle-up", "solid"),
    "ebll": Style(ORANGE, "triangle-down", "dash"),
    "imm-mean": Style(PURPLE, "cross", "dash"),
    "imm-mode": Style(PURPLE, "star", "solid"),
    "ewc": Style(GREEN, "diamond", "solid"),
    "si": Style(BROWN, "triangle-up", "longdash"),
    "rwalk": Style(GREEN, "triangle-down", "dash"),
    "projected": Style(PURPLE, "square", "dot"),
    "projected-full": Style(ORANGE, "diamond", "dot"),
    "projected-inputs": Style(VERMILLION, "triangle-up", "dot"),
    "projected-test": Style(LEAF, "triangle-up", "dot"),
    "projected-public": Style(BROWN, "circle", "dot"),
    "projected-new": Style(PURPLE, "triangle-up", "longdash"),
    "projected-noise": Style(INK, "star", "dash"),
    "projected-lda": Style(VIOLET, "circle", "longdash"),
    "projected-rehearsal": Style(BROWN, "square", "solid"),
    "projected-lda-rehearsal": Style(BLUE, "square", "longdash"),
    "continual-backprop": Style(LEAF, "circle", "solid"),
    "gpm": Style(GREEN, "square", "dot"),
    "adam-nscl": Style(SKY, "star", "solid"),
}
"""Method of the benchmark -> style. At most four share a colour, and these differ in marker and dash."""

TAKEN: Final = {(style.colour, style.marker) for style in METHOD_STYLES.values()}
FREE: Final = [Style(*look) for look in product(COLOURS, MARKERS, DASHES) if look[:2] not in TAKEN]
"""Styles for other methods."""


def style_of(name: str) -> Style:
    """The style of a method: from the table, or by the name's hash one that is not in the table."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return METHOD_STYLES.get(name) or FREE[int.from_bytes(digest[:4], "big") % len(FREE)]
