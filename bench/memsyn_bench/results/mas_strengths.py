"""MAS at several strengths: how wide the plateau is, and what hindsight would have chosen.

Owns the tables and sentences of files that differ by their strength alone. Every number in a sentence is computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from memsyn_bench.results.findings import MAS, NONE, Findings, Group, Numbers, difference, estimate, mean, signed
from memsyn_bench.results.markdown import escape, table
from memsyn_bench.results.metrics import forgetting
from memsyn_bench.settings import CHOSEN, OWN


def strength_of(found: Findings) -> float:
    """The strength that the file was made with; only for files whose strength is a number."""
    strength = found.run.settings.strength
    assert not isinstance(strength, str)
    return strength


def sensitivity(group: Group) -> str:
    """Accuracy and forgetting at each strength, and how wide the plateau is."""
    ordered = sorted(group, key=strength_of)
    rows = [
        [f"{strength_of(found):g}", estimate(found.averages(MAS)), estimate(found.by_seed(MAS, forgetting))]
        for found in ordered
    ]
    means = {strength_of(found): mean(found.averages(MAS)) for found in ordered}
    best = max(means, key=lambda strength: means[strength])
    said = [f"{MAS} has its highest average accuracy, {means[best]:.1f}%, at strength {best:g} of those tried."]
    for points in (1, 2):
        low, high = plateau(means, points)
        said.append(
            f"The widest run of strengths within {points} point{'s' * (points > 1)} of it goes from {low:g} to "
            f"{high:g}: {math.log10(high / low):.1f} orders of magnitude."
        )
    columns = ["Strength", "Average accuracy (%)", "Forgetting (points)"]
    return "\n\n".join([" ".join(said), table(columns, rows)])


def plateau(means: dict[float, float], points: float) -> tuple[float, float]:
    """The ends of the widest run, in orders of magnitude, of neighbouring strengths at most `points` below the best."""
    enough = max(means.values()) - points - 1e-9
    near = [list(run) for fits, run in groupby(sorted(means), lambda strength: means[strength] >= enough) if fits]
    widest = max(near, key=lambda run: run[-1] / run[0])
    return widest[0], widest[-1]


def hindsight(groups: Mapping[str, Group], files: Sequence[Findings]) -> str:
    """For each group of strengths: what the protocol chose, and what would have been best on the test data.

    Both are over the seeds that all of them have.
    """
    columns = [
        "Sequence", "Seeds", "Chosen", "Ends at (%)", "In hindsight", "Would end at (%)", "Gain (points)",
        "Best method (%)",
    ]  # fmt: skip
    rows = [_hindsight_row(link, group, files) for link, group in groups.items()]
    return (
        f"Chosen: the strength of {MAS} by validation data, as in the table above. In hindsight: "
        "the strength with the highest average on the test data, of all those that were run. Best method: of the "
        "methods that store no data, at strengths chosen by the protocol. All are over the same seeds, which may be "
        "fewer than above. Hindsight looks at test data, so it cannot be used. It bounds what a better choice of the "
        f"strength could bring.\n\n{table(columns, rows)}"
    )


def _hindsight_row(link: str, group: Group, files: Sequence[Findings]) -> list[str]:
    ends = {strength_of(found): found.averages(MAS) for found in group}
    own, strength = next(((found, choice) for found in files if (choice := _chosen_for(found, group))), (None, None))
    end = own.averages(MAS) if own else {}
    if strength is not None:
        ends[strength] = end
    seeds = set.intersection(*map(set, ends.values()), *([set(end)] if end else []))
    means = {strength: mean(_of_seeds(numbers, seeds)) for strength, numbers in ends.items()}
    best = max(means, key=lambda tried: means[tried]) if seeds else None
    would = _of_seeds(ends[best], seeds) if best is not None else {}
    rival = own.best() if own else None
    end = _of_seeds(end, seeds)
    return [
        f"[{escape(group[0].run.settings.sequence)}]({link})",
        str(len(seeds)),
        NONE if strength is None else f"{strength:g}",
        estimate(end),
        NONE if best is None else f"{best:g}",
        estimate(would),
        signed(difference(would, end)),
        f"{estimate(_of_seeds(own.averages(rival), seeds))} {escape(rival)}" if own and rival else NONE,
    ]


def _chosen_for(found: Findings, group: Group) -> float | None:
    """The strength that was chosen for MAS at the settings of the group; None if the file is of others."""
    same = replace(found.run.settings, strength=OWN) == with_strength(group[0])
    if not same or found.run.settings.strength != CHOSEN or MAS not in found.results:
        return None
    return next((choice.strength for choice in found.run.choices if choice.method == MAS), None)


def _of_seeds(numbers: Numbers, seeds: Collection[int]) -> Numbers:
    return {seed: number for seed, number in numbers.items() if seed in seeds}


def with_strength(found: Findings) -> Hashable:
    """The settings but for the strength; None for a file whose strength is no number above 0, or that has no MAS."""
    settings = found.run.settings
    varies = not isinstance(settings.strength, str) and settings.strength > 0 and MAS in found.results
    return replace(settings, strength=OWN) if varies else None
