"""How a method looks in every picture: its colour, marker and dash, so that colour never stands alone.

Owns the table by name. The colours are those of Okabe and Ito (2008), told apart with every kind of colour vision, less
yellow, which is lost on white; `INK` becomes the text's own colour, which on dark is light.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

INK: Final = "black"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A",
)  # fmt: skip
COLOURS: Final = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY, INK)

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
"""By Plotly's name, the outline in a legend of 28 by 12."""
DASHES: Final = {"solid": "", "dash": "6 3", "dot": "2 2", "dashdot": "6 2 2 2", "longdash": "10 3"}
"""By Plotly's name, SVG's stroke-dasharray."""


class Style(NamedTuple):
    """How one method, or other series, is drawn."""

    colour: str
    marker: str
    dash: str

    @property
    def outline(self) -> str:
        """Of the marker, for SVG."""
        return MARKERS[self.marker]

    @property
    def dashes(self) -> str:
        """Of the line, for SVG."""
        return DASHES[self.dash]


METHOD_STYLES: Final = {
    "mas": Style(BLUE, "circle", "solid"),
    "mas-local": Style(SKY, "circle", "dash"),
    "mas-test": Style(BLUE, "square", "dash"),
    "mas-both": Style(BLUE, "diamond", "dot"),
    "mas-local-test": Style(SKY, "square", "dot"),
    "mas-local-both": Style(SKY, "diamond", "dashdot"),
    "mas-in-use": Style(BLUE, "star", "dashdot"),
    "mas-batched": Style(BLUE, "x", "longdash"),
    "mas-rehearsal": Style(BLUE, "cross", "solid"),
    "finetune": Style(VERMILLION, "square", "solid"),
    "joint": Style(INK, "diamond", "dot"),
    "alone": Style(INK, "x", "dashdot"),
    "rehearsal": Style(INK, "cross", "dash"),
    "frozen": Style(GREY, "x", "dot"),
    "l2": Style(GREY, "triangle-down", "solid"),
    "lwf": Style(ORANGE, "triangle-up", "solid"),
    "ebll": Style(ORANGE, "triangle-down", "dash"),
    "imm-mean": Style(PURPLE, "cross", "dash"),
    "imm-mode": Style(PURPLE, "star", "solid"),
    "ewc": Style(GREEN, "diamond", "solid"),
    "si": Style(PURPLE, "triangle-up", "longdash"),
    "rwalk": Style(GREEN, "triangle-down", "dash"),
}
"""Of every method of the benchmark; no two look the same."""


def style_of(name: str) -> Style:
    """The same for a name always: from the table, or from the name's hash."""
    if name in METHOD_STYLES:
        return METHOD_STYLES[name]
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return Style(
        COLOURS[digest[0] % len(COLOURS)],
        list(MARKERS)[digest[1] % len(MARKERS)],
        list(DASHES)[digest[2] % len(DASHES)],
    )
