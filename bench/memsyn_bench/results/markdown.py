"""Markdown: tables and escaped text, written and read back.

Owns the syntax; knows nothing of results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


def escape(text: str) -> str:
    """A name as literal text: characters with a meaning in Markdown or HTML get a backslash."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", re.sub(r"[\r\n]+", " ", text))


def plain(text: str) -> str:
    """Markdown as plain text, without backslashes and emphasis."""
    return re.sub(r"\\(.)|\*+", lambda found: found[1] or "", text)


def blocks(text: str) -> list[str | list[list[str]]]:
    """Paragraphs and tables, in order: a table as its rows of cells, header first. Cells are Markdown still."""
    found: list[str | list[list[str]]] = []
    for block in text.split("\n\n"):
        if block.startswith("| "):
            lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.split("\n")]
            found.append([[cell.strip() for cell in line] for line in (lines[0], *lines[2:])])
        elif block:
            found.append(block)
    return found


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are numbers; the cells are Markdown already."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def meanings(heading: str, words: Mapping[str, str]) -> str:
    """A table of words and what they mean; the cells are Markdown already."""
    return "\n".join([f"| {heading} | Meaning |", "|---|---|", *(f"| {word} | {own} |" for word, own in words.items())])


def details(summary: str, content: str) -> str:
    """Content that is folded until the reader opens it."""
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"
