"""Markdown: a table, and text in which nothing is markup that was not meant to be.

Owns the syntax; knows nothing of results.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def escape(text: str) -> str:
    """A name as it is to be read: characters that mean something in Markdown or HTML with a backslash before them."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", text)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are numbers; the cells are Markdown already."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def details(summary: str, content: str) -> str:
    """What is read only if asked for."""
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"
