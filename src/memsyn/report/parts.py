"""What a page is made of: tables, charts and sections, as plain values.

Owns their form. A chart carries its numbers as a table too, for who cannot see it, and for pages without scripts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from memsyn.report.styles import Style

SHOWN = (".4g", ".1f", ".0f")
"""The ways in which charts write a number."""
BYTES = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
"""In one of each unit."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    value: float | None = None
    """What its column is sorted by; None goes last, or for words by the text."""
    best: bool = False

    @property
    def hidden_value(self) -> float | None:
        """The value, if the text does not say it."""
        return None if self.value is None or self.text == f"{self.value:.4g}" else brief(self.value)


@dataclass(frozen=True)
class Table:
    """A table; its first column is words."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    @property
    def wordy(self) -> list[bool]:
        """For each column, whether it holds no number."""
        return [all(row[place].value is None for row in self.rows) for place in range(len(self.columns))]


@dataclass(frozen=True)
class LegendEntry:
    """One of a legend."""

    name: str
    style: Style
    shown: bool = True
    """From the start; else once it is clicked."""


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        title: what it shows, a finding.
        figure: `data` and `layout` as Plotly has them; the names in them are inert.
        table: its numbers.
        series: what its legend toggles: traces whose `legendgroup` is the entry's place in it.
        name: what the picture's file is called.
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
    """Text as it is, line by line."""

    kind: ClassVar[str] = "lines"
    lines: Sequence[str]


@dataclass(frozen=True)
class Scene:
    """A picture, what it shows, and what was retrieved for it."""

    image: str
    """PNG, base64."""
    text: str
    found: Sequence[tuple[str, Sequence[str]]]
    """By whom or when, and the names that were found, the nearest first. The right one is set apart."""


@dataclass(frozen=True)
class Scenes:
    """A strip of them."""

    kind: ClassVar[str] = "scenes"
    scenes: Sequence[Scene]


Part = str | Table | Chart | Panels | Lines | Scenes


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    heading: str
    parts: Sequence[Part]
    label: str | None = None
    """In the list of contents; None: the heading; empty: it is not listed."""

    @property
    def link(self) -> str:
        """What the list of contents says."""
        return self.heading if self.label is None else self.label


@dataclass(frozen=True)
class Page:
    """A page: what it is, the headline, and the rest."""

    title: str
    headline: str
    lead: str
    sections: Sequence[Section]

    def charts(self) -> list[Chart]:
        """All of them, in order."""
        found: list[Chart] = []
        for section in self.sections:
            for part in section.parts:
                found += part.charts if isinstance(part, Panels) else [part] if isinstance(part, Chart) else []
        return found


def brief(value: float) -> float:
    """The number with five digits, or as many more as it takes for charts to write it as they would write it whole."""
    return next(
        short
        for digits in range(5, 18)
        if all(f"{(short := float(f'{value:.{digits}g}')):{form}}" == f"{value:{form}}" for form in SHOWN)
    )


def number_cell(text: str, best: bool = False) -> Cell:
    """A cell that is sorted by the number it starts with, if it does, in bytes if a unit of them follows."""
    found = re.match(r"([+-]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?)(?: ([kMG]?B)\b)?", text)
    return Cell(text, float(found[1].replace(",", "")) * BYTES.get(found[2], 1.0) if found else None, best)
