"""The tree of a model's layers, folded by block, each row with its number and a colour.

Owns the blocks, which are read from dotted names, and the steps of the colours. The numbers come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from memsyn.report.parts import Branch, Tree, share_text

DEEPEST = 8
"""The most dots at which a name is cut."""
STEPS = (0.01, 0.05, 0.2, 0.5)
"""Where the next colour begins, as a share of the whole."""
ITSELF = "(its own weights)"
"""The row of a layer that holds weights, and other layers too."""

Measure = Callable[[Sequence[str]], float]
"""The number of layers together."""


def layer_tree(title: str, layers: Sequence[str], measure: Measure, *, of: str, note: str, whole: float = 1.0) -> Tree:
    """A tree with a row for each layer and each block.

    Args:
        title: what it shows, a finding.
        layers: their names, in the model's order.
        measure: layers -> their number together; of one layer its own.
        of: what the whole is, in words.
        note: how to read it.
        whole: the number of which the steps of the colours are shares.
    """
    ends = [f"{100 * step:g}%" for step in STEPS]
    key = [f"under {ends[0]}", *(f"{a} to {b}" for a, b in pairwise(ends)), f"over {ends[-1]}"]
    parts = [(tuple(layer.split(".", DEEPEST)), layer) for layer in layers]
    return Tree(title, _branches(parts, measure, whole), key, of, note)


def _branches(named: Sequence[tuple[tuple[str, ...], str]], measure: Measure, whole: float) -> list[Branch]:
    """The rows of names that are cut into parts; those with the same first part make one block."""
    blocks: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for parts, layer in named:
        blocks.setdefault(parts[0] if parts else ITSELF, []).append((parts[1:], layer))
    found = []
    for name, inner in blocks.items():
        # A block with one block in it is one row: body.layers.
        while len(inner) > 1 and len({parts[:1] for parts, _ in inner}) == 1:
            name = f"{name}.{inner[0][0][0]}"
            inner = [(parts[1:], layer) for parts, layer in inner]
        value = measure([layer for _, layer in inner])
        text, level = share_text(value), sum(value >= step * whole for step in STEPS) if value else 0
        if len(inner) == 1:
            found.append(Branch(".".join((name, *inner[0][0])), text, level))
        else:
            found.append(Branch(name, text, level, _branches(inner, measure, whole), len(inner)))
    return found
