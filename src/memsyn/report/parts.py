"""The parts of a page as plain values: tables, charts and sections.

Owns their fields. A chart also holds its numbers as a table, for readers who cannot see it and pages without scripts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from memsyn.report.styles import Style

SHOWN = (".4g", ".1f", ".0f")
"""The formats in which charts write a number."""
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


Part = str | Table | Chart | Panels | Lines | Scenes


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
class Page:
    """A page: title, headline, lead and sections."""

    title: str
    headline: str
    lead: str
    sections: Sequence[Section]

    def charts(self) -> list[Chart]:
        """All charts, in order."""
        found: list[Chart] = []
        for section in self.sections:
            for part in section.parts:
                found += part.charts if isinstance(part, Panels) else [part] if isinstance(part, Chart) else []
        return found


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
