"""The parts of a page as plain values: the judgement, the tree of layers, tables, charts and sections.

Owns their fields, and how numbers are written for people. A chart also holds its numbers as a table, for readers who
cannot see it and pages without scripts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from memsyn.report.styles import Style

SHOWN = (".4g", ".1f", ".0f")
"""The formats in which charts write a number."""
MOST_ROWS = 40
"""The most rows in a chart; tables have all."""
LEAST = 1e-4
"""Numbers below are not written out."""
BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
"""Unit -> bytes."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    value: float | None = None
    """The number by which its column is sorted; None is sorted last, and a column of words by the text."""
    best: bool = False

    @property
    def hidden_value(self) -> float | None:
        """The value if the text does not show it exactly."""
        return None if self.value is None or self.text == f"{self.value:.4g}" else brief(self.value)


@dataclass(frozen=True)
class Table:
    """A table; its first column holds words."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    @property
    def wordy(self) -> list[bool]:
        """For each column, whether it holds only words."""
        return [all(row[place].value is None for row in self.rows) for place in range(len(self.columns))]


@dataclass(frozen=True)
class LegendEntry:
    """One entry of a legend."""

    name: str
    style: Style
    shown: bool = True
    """Whether its series is visible at first; if not, a click shows it."""


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        title: what it shows, a finding.
        figure: `data` and `layout` for Plotly; names in them are escaped.
        table: its numbers.
        series: the legend. Entry i shows and hides the traces whose `legendgroup` is i.
        name: the name of the picture's file.
        note: how to read it.
    """

    kind: ClassVar[str] = "chart"
    title: str
    figure: dict[str, Any]
    table: Table
    name: str
    series: Sequence[LegendEntry] = ()
    note: str = ""


@dataclass(frozen=True)
class Panels:
    """Small charts side by side with one legend; one table for all."""

    kind: ClassVar[str] = "panels"
    title: str
    charts: Sequence[Chart]
    note: str = ""
    series: Sequence[LegendEntry] = ()


@dataclass(frozen=True)
class Lines:
    """Preformatted text, line by line."""

    kind: ClassVar[str] = "lines"
    lines: Sequence[str]


@dataclass(frozen=True)
class Scene:
    """A picture, a description, and what was retrieved for it."""

    image: str
    """PNG, base64."""
    text: str
    found: Sequence[tuple[str, Sequence[str]]]
    """(Who or when, names that were found, the nearest first); the right name is highlighted."""


@dataclass(frozen=True)
class Scenes:
    """A row of scenes."""

    kind: ClassVar[str] = "scenes"
    scenes: Sequence[Scene]


@dataclass(frozen=True)
class Branch:
    """One row of a tree: a layer, or a block with the rows of its layers."""

    name: str
    text: str
    """Its number, in words."""
    level: int
    """The colour: 0 (hardly anything) to 4 (most)."""
    branches: Sequence[Branch] = ()
    num_layers: int = 1


@dataclass(frozen=True)
class Tree:
    """The layers of a model, folded by block. `key` says what share of `of` each colour stands for, from level 0 on."""

    kind: ClassVar[str] = "tree"
    title: str
    branches: Sequence[Branch]
    key: Sequence[str]
    of: str
    note: str


Part = str | Table | Chart | Panels | Lines | Scenes | Tree


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    heading: str
    parts: Sequence[Part]
    label: str | None = None
    """The text in the list of contents; None: the heading; empty: not listed."""

    @property
    def link(self) -> str:
        """The text in the list of contents."""
        return self.heading if self.label is None else self.label


@dataclass(frozen=True)
class Bar:
    """One bar of a judgement. Lengths are shares of the longest possible bar, 0 to 1."""

    label: str
    text: str
    length: float
    interval: tuple[float, float] | None = None
    """The ends of the 95% interval."""


TONES = {"good": "✓", "warning": "!", "bad": "✕", "unknown": "?"}
"""Tone of an answer -> its sign, so that it is not told by its colour alone."""


@dataclass(frozen=True)
class Judgement:
    """What a page begins with, for a reader who decides and does not know the method.

    Attributes:
        answer: one or two words, such as "Safe".
        tone: a key of `TONES`.
        headline: one sentence: what it means.
        number: the one number that decides; empty if there is none.
        meaning: the words after the number.
        interval: its 95% interval in words, or why it has none.
        rule: the thresholds.
        bars: one for old and one for new.
        mark: where the threshold is on the bars, and its words.
        steps: what else to know, and what to do next.
    """

    answer: str
    tone: str
    headline: str
    number: str = ""
    meaning: str = ""
    interval: str = ""
    rule: str = ""
    bars: Sequence[Bar] = ()
    mark: tuple[float, str] | None = None
    steps: Sequence[str] = ()

    @property
    def sign(self) -> str:
        """The sign beside the answer."""
        return TONES[self.tone]


@dataclass(frozen=True)
class Page:
    """A page: title, headline, lead and sections.

    A page with a judgement begins with it, and its headline is the judgement's. Sections in `behind` are folded.
    """

    title: str
    headline: str
    lead: str
    sections: Sequence[Section]
    judgement: Judgement | None = None
    behind: Sequence[Section] = ()

    def charts(self) -> list[Chart]:
        """All charts, in order."""
        found: list[Chart] = []
        for section in (*self.sections, *self.behind):
            for part in section.parts:
                found += part.charts if isinstance(part, Panels) else [part] if isinstance(part, Chart) else []
        return found


def plain_number(value: float, digits: int = 3) -> str:
    """A number for people, without an exponent: "5,160", "0.0544"."""
    if not math.isfinite(value):
        return "not finite"
    if value and abs(value) < LEAST:
        return f"less than {LEAST:.4f}" if value > 0 else f"above -{LEAST:.4f}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if places else text


def share_text(share: float) -> str:
    """A share for people: "1.2%", "less than 0.1%", "over 99.9%"; a large one in times."""
    if not math.isfinite(share):
        return "any amount"
    if 0 < share < 0.0005:
        return "less than 0.1%"
    if 0.9995 <= share < 1:
        return "over 99.9%"
    if share >= 10:
        return f"{share:,.0f} times" if share < 1e6 else "over a million times"
    return "0%" if share == 0 else "100%" if share == 1 else f"{100 * share:.1f}%"


def share_cell(share: float | None) -> Cell:
    """A cell with a share in words; None is an empty cell."""
    return Cell("") if share is None else Cell(share_text(share), share)


def plain_cell(value: float | None) -> Cell:
    """A cell with a number in words; None and NaN are empty cells."""
    return Cell("") if value is None or math.isnan(value) else Cell(plain_number(value), value)


def brief(value: float) -> float:
    """The number rounded to five digits, or to more if a chart would otherwise write it differently."""
    return next(
        short
        for digits in range(5, 18)
        if all(f"{(short := float(f'{value:.{digits}g}')):{form}}" == f"{value:{form}}" for form in SHOWN)
    )


def number_cell(text: str, best: bool = False) -> Cell:
    """A cell that is sorted by the number its text starts with; "1.5 MB" is sorted as 1,500,000."""
    found = re.match(r"([+-]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?)(?: ([kMG]?B)\b)?", text)
    return Cell(text, float(found[1].replace(",", "")) * BYTES.get(found[2], 1.0) if found else None, best)
