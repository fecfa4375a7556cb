"""What a memory is worth by the images that it was measured on: the old training images, others, or noise.

Owns which methods are compared, the table, and the sentences about it. Every number is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from memsyn_bench.results.findings import FINETUNE, MAS, NONE, Findings, compared, difference, estimate, signed
from memsyn_bench.results.markdown import escape, table
from memsyn_bench.results.metrics import Interval, forgetting

FAMILIES = {MAS: "MAS", "projected": "projection"}
"""Method that measures on the old training images -> what it is called."""
ENDINGS = {
    "": "old training images",
    "-test": "test images of the old task",
    "-public": "public images of something else",
    "-new": "the next task's images",
    "-noise": "noise",
}
"""The end of a method's name -> what its memory is measured on."""


def compares_sources(found: Findings) -> bool:
    """Whether the file has a memory of public images, of the next task's images, or of noise."""
    ends = ("-public", "-new", "-noise")
    return any(f"{family}{end}" in found.results for family in FAMILIES for end in ends)


def measured_on(group: Sequence[Findings]) -> str:
    """Source by sequence: average accuracy, forgetting, and the difference from the old training images."""
    columns = ["Memory", "Measured on"]
    for found in group:
        of = f"{escape(found.name)}: "
        columns += [
            f"{of}average accuracy (%)", f"{of}forgetting (points)", f"{of}minus old training images (points)",
        ]  # fmt: skip
    rows = [
        [name, words, *(cell for found in group for cell in _source_cells(found, method, family))]
        for family, name in FAMILIES.items()
        for end, words in ENDINGS.items()
        if any((method := f"{family}{end}") in found.results for found in group)
    ]
    if any(FINETUNE in found.results for found in group):
        rows.append(["none", NONE, *(cell for found in group for cell in _source_cells(found, FINETUNE, FINETUNE))])
    note = (
        "The difference is of average accuracies, seed by seed, with its 95% interval. Public images are letters for "
        "drawings, and drawings in grey for letters. The next task's images are measured before it is learned, through "
        "the head of the task before: no old image is used. Noise is normal, each pixel with the mean and the "
        "deviation of the old training images."
    )
    return "\n\n".join(filter(None, [said_of_sources(group), table(columns, rows), note]))


def said_of_sources(group: Sequence[Findings]) -> str:
    """The best and the worst other source of each file and family."""
    return " ".join(sentence for found in group for family in FAMILIES for sentence in _sentences(found, family))


def _source_cells(found: Findings, method: str, reference: str) -> list[str]:
    accuracy, forgotten = estimate(found.averages(method)), estimate(found.by_seed(method, forgetting))
    apart = None if method == reference else _apart(found, method, reference)
    return [accuracy, forgotten, signed(apart)]


def _apart(found: Findings, method: str, reference: str) -> Interval | None:
    return difference(found.averages(method), found.averages(reference))


def _sentences(found: Findings, family: str) -> list[str]:
    """The sources nearest to the old training images and farthest below them, of one file and family."""
    apart = {end: _apart(found, f"{family}{end}", family) for end in ENDINGS if end}
    known = {end: own for end, own in apart.items() if own is not None}
    if len(known) < 2:
        return []
    best, worst = (choose(known, key=lambda end: known[end].mean) for choose in (max, min))
    above, below = (f"{side} {FAMILIES[family]} of the old training images" for side in ("above", "below"))
    return [
        f"On {escape(found.name)} the {which} other source is {ENDINGS[end]}: {compared(known[end], above, below)}."
        for which, end in (("best", best), ("worst", worst))
    ]
