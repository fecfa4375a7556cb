"""How values are displayed: a short text for `repr`, a small table of HTML for notebooks.

Owns the counts in words, the escapes of names, and the HTML. Must not know what is displayed. Names may come from the
file of a stranger: they are shown as text, never interpreted.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from memsyn.sharding.parts import is_sharded, local_part

LARGEST_TABLE: Final = 30
"""The most layers in a table."""
LONGEST_NAME: Final = 60
"""The most characters of a name in a table or a sentence."""

# Colours are those of the notebook, light or dark; grey lines are seen on both.
_TABLE: Final = "border-collapse:collapse;color:inherit;font-variant-numeric:tabular-nums"
_CELL: Final = "padding:.15em .7em;border-bottom:1px solid rgba(128,128,128,.35);text-align:"


@dataclass(frozen=True)
class LayerRow:
    """A row of a table: the layer's name, the other cells, and the size by which rows of a long table are chosen."""

    layer: str
    cells: Sequence[str]
    size: float


def printable(text: str) -> str:
    """Text in which every character but visible ones and spaces is an escape: "\\x1b[31m" for a terminal's red."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def short_name(name: str) -> str:
    """A printable name; a long one is cut in its middle."""
    half = LONGEST_NAME // 2
    shown = printable(name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}")
    return shown if len(shown) <= LONGEST_NAME else f"{shown[: half - 1]}…{shown[-half:]}"


def counted(count: int, what: str) -> str:
    """A count for people: "1 sample", "1,200 samples"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def percent(value: float) -> str:
    """A share for people: "98.9%"; large ones in times."""
    if value < 10:
        return f"{value:.1%}"
    return f"{value:,.0f} times" if value < 1e6 else "over a million times" if math.isfinite(value) else "any amount"


def counted_matrices(num_matrices: int, num_others: int, num_weights: int) -> str:
    """What factors and directions hold, in words."""
    matrices = f"{num_matrices:,} {'matrix' if num_matrices == 1 else 'matrices'}"
    return f"{matrices}, {counted(num_others, 'other parameter')}, {counted(num_weights, 'weight')}"


def size_in_memory(tensors: Collection[Tensor]) -> str:
    """The bytes of tensors: "845 B", "18.6 MB"; of sharded ones, "18.6 MB in this process"."""
    held, where = [local_part(tensor) for tensor in tensors], ""
    if any(map(is_sharded, tensors)):
        where = " in this process"
    size = float(sum(tensor.numel() * tensor.element_size() for tensor in held))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B{where}" if unit == "B" else f"{size:.1f} {unit}{where}"
        size /= 1000
    return f"{size:,.1f} GB{where}"


def html_text(text: str) -> str:
    """Lines of text as HTML."""
    lines = "<br>".join(html.escape(printable(line)) for line in text.splitlines())
    return f'<div style="padding:.6em 0 .3em">{lines}</div>'


def html_table(title: str, columns: Sequence[str], rows: Sequence[LayerRow], others: str = "") -> str:
    """A table with a row for each layer, at most `LARGEST_TABLE`: the largest ones in their order, and a count.

    Args:
        title: what stands above; it may have several lines.
        columns: the headings, that of the names included.
        rows: the layers.
        others: what is said of the layers that are left out, such as "with a smaller share each".
    """
    kept = sorted(range(len(rows)), key=lambda index: -rows[index].size)[:LARGEST_TABLE]
    body = [_row("td", [short_name(rows[index].layer), *rows[index].cells]) for index in sorted(kept)]
    if len(rows) > len(kept):
        more = f"{counted(len(rows) - len(kept), 'more layer')}, {others}"
        body.append(f'<tr><td colspan="{len(columns)}" style="{_CELL}left">{html.escape(more)}</td></tr>')
    table = f"<thead>{_row('th', columns)}</thead><tbody>{''.join(body)}</tbody>"
    return f'<div>{html_text(title)}<table style="{_TABLE}">{table}</table></div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    """A row, with words at the left and numbers at the right."""
    scope = ' scope="col"' if tag == "th" else ""
    sides = ["left", *["right"] * (len(cells) - 1)]
    written = (
        f'<{tag}{scope} style="{_CELL}{side}">{html.escape(cell)}</{tag}>'
        for cell, side in zip(cells, sides, strict=True)
    )
    return f"<tr>{''.join(written)}</tr>"
