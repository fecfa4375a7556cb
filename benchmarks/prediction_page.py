"""The tables and the picture of docs/prediction.md, from the lines that benchmarks/prediction.py wrote.

Owns the statistics. Knows no networks: it needs numpy and matplotlib alone.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from memsyn.values.ranks import spearman
from memsyn_bench.pages.plots import COLOURS, MARKERS

Line = dict[str, Any]
START, END = "<!-- tables: written by benchmarks/prediction.py -->\n", "<!-- end of tables -->\n"
DRAWS = 400
"""Of the bootstrap."""
LEAST = 1e-6
"""A checkpoint that changes the outputs less is left out of correlations: it changes them by rounding alone."""

GUESSES: dict[str, Callable[[Line], float]] = {
    "predicted": lambda line: line["predicted"],
    "all eigenvectors": lambda line: line["predicted_whole"],
    "8 gradients": lambda line: line["by_gradients"]["8"],
    "64 gradients": lambda line: line["by_gradients"]["64"],
    "bound": lambda line: line["bound"] / line["squared_outputs"],
    "distance": lambda line: line["distance"],
}
"""What is known without data, by what the page calls it."""

TRUTHS: dict[str, Callable[[Line], float]] = {
    "change": lambda line: line["measured"]["change"],
    "mean change": lambda line: line["measured"]["mean_change"],
    "other answers": lambda line: line["measured"]["disagreement"],
    "KL": lambda line: line["measured"]["divergence"],
    "accuracy lost": lambda line: line["measured"]["lost_accuracy"],
}
"""What is measured, by what the page calls it."""


def read(path: Path) -> list[Line]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def moved(lines: Sequence[Line]) -> list[Line]:
    """The checkpoints that change old outputs."""
    return [line for line in lines if line["measured"]["change"] > LEAST]


def correlation(
    lines: Sequence[Line], guess: Callable[[Line], float], truth: Callable[[Line], float]
) -> tuple[float, float, float]:
    """Spearman's correlation, and its 95% interval: a bootstrap of the checkpoints of each sequence."""
    pairs = np.array([[guess(line), truth(line)] for line in lines])
    names = np.array([line["sequence"] for line in lines])
    places = [np.flatnonzero(names == name) for name in dict.fromkeys(names)]
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        chosen = np.concatenate([random.choice(own, len(own)) for own in places])
        drawn.append(spearman(*pairs[chosen].T))
    return spearman(*pairs.T), *np.nanquantile(drawn, (0.025, 0.975)).tolist()


def by_sequence(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Sequence -> its checkpoints; last, all of them."""
    names = dict.fromkeys(line["sequence"] for line in lines)
    return {**{name: [line for line in lines if line["sequence"] == name] for name in names}, "all": list(lines)}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]) + "\n"


def correlations(lines: Sequence[Line]) -> str:
    """Of each guess with the measured change, and of the prediction with each measured quantity."""
    groups = by_sequence(moved(lines))
    heads = [f"{name} ({len(own)})" for name, own in groups.items()]

    def cells(guess: Callable[[Line], float], truth: Callable[[Line], float]) -> list[str]:
        found = (correlation(own, guess, truth) for own in groups.values())
        return [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in found]

    first = [[name, *cells(guess, TRUTHS["change"])] for name, guess in GUESSES.items()]
    second = [[name, *cells(GUESSES["predicted"], truth)] for name, truth in TRUTHS.items()]
    third = [[name, *cells(GUESSES["bound"], truth)] for name, truth in TRUTHS.items()]
    return (
        f"With the measured change of the outputs:\n\n{table(['', *heads], first)}\n"
        f"Of the predicted change with everything that was measured:\n\n{table(['', *heads], second)}\n"
        f"Of the bound:\n\n{table(['', *heads], third)}"
    )


def ratios(lines: Sequence[Line]) -> str:
    """Prediction / measurement: the median, and the quantiles 0.1 and 0.9."""

    def cell(own: Sequence[Line], guess: Callable[[Line], float]) -> str:
        found = [guess(line) / TRUTHS["change"](line) for line in own]
        low, middle, high = np.quantile(found, (0.1, 0.5, 0.9))
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    known = moved(lines)
    kinds = {kind: [line for line in known if line["kind"] == kind] for kind in dict.fromkeys(x["kind"] for x in known)}
    guesses = {
        "predicted": GUESSES["predicted"],
        "8 gradients": GUESSES["8 gradients"],
        "64 gradients": GUESSES["64 gradients"],
        "linear part": lambda line: line["measured"]["linear_change"],
    }
    rows = [
        [name, str(len(own)), *(cell(own, guess) for guess in guesses.values())]
        for name, own in {**by_sequence(known), **kinds}.items()
    ]
    return table(["", "checkpoints", *guesses], rows)


def layers(lines: Sequence[Line]) -> str:
    """By layer: whether the prediction ranks layers as they change the outputs alone."""
    rows = []
    for name, own in by_sequence(moved(lines)).items():
        if name != "all":
            several = [line for line in own if len(line["layers"]) > 1]
            pairs = [np.array(list(line["layers"].values())) for line in several]
            within = [spearman(*one.T) for one in pairs if len(one) > 2]
            largest = [one[:, 0].argmax() == one[:, 1].argmax() for one in pairs]
            ratio = np.concatenate([one[:, 0] / one[:, 1].clip(1e-12) for one in pairs])
            alone = [math.hypot(*one[:, 1]) for one in pairs]
            together = [line["measured"]["change"] / part for line, part in zip(several, alone, strict=True)]
            rows.append(
                [
                    name,
                    f"{np.nanmedian(within):.2f}" if within else "-",
                    f"{np.mean(largest):.0%}",
                    f"{np.median(ratio):.2f}",
                    f"{np.median(together):.2f}",
                ]
            )
    heads = ["", "correlation within a checkpoint", "the largest layer is right", "predicted / measured", "together"]
    return table(heads, rows)


def figures(lines: Sequence[Line]) -> str:
    """Every checkpoint."""
    rows = [
        [
            line["sequence"],
            line["checkpoint"],
            f"{line['predicted']:.3f}",
            f"{line['by_gradients']['8']:.3f}",
            f"{line['measured']['change']:.3f}",
            f"{1 - line['measured']['disagreement']:.1%}",
            f"{100 * line['measured']['lost_accuracy']:.1f}",
            f"{GUESSES['bound'](line):.3g}",
        ]
        for line in lines
    ]
    heads = ["sequence", "checkpoint", "predicted", "8 gradients", "measured", "same answers", "points lost", "bound"]
    return table(heads, rows)


def tables(lines: Sequence[Line]) -> str:
    """What stands between the marks of the page."""
    parts = {
        "Rank correlation": correlations(lines),
        "Prediction / measurement": ratios(lines),
        "By layer": layers(lines),
        "Every checkpoint": figures(lines),
    }
    return "\n".join(f"### {title}\n\n{part}" for title, part in parts.items())


def plot(lines: Sequence[Line], path: Path) -> None:
    """Prediction against measurement on logarithmic axes, by sequence, beside the bound."""
    figure = Figure(figsize=(12.6, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    shown = {
        "predicted": "predicted change",
        "8 gradients": "by 8 gradients (trial)",
        "bound": "bound, relative",
    }
    for panel, (name, title) in zip(panels, shown.items(), strict=True):
        for (sequence, own), colour, marker in zip(
            by_sequence(moved(lines)).items(), COLOURS[::2], MARKERS, strict=False
        ):
            if sequence != "all":
                x, y = [GUESSES[name](line) for line in own], [TRUTHS["change"](line) for line in own]
                panel.plot(x, y, marker, color=colour, markersize=6, alpha=0.8, ls="", label=sequence)
        if name != "bound":
            panel.axline((0.01, 0.01), (1, 1), color="black", lw=1, label="prediction = measurement")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("measured change of old outputs")
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(path)


def write_page(source: Path, folder: Path) -> None:
    """Write the tables into prediction.md of the folder, between the marks, and draw prediction.png."""
    lines, page = read(source), folder / "prediction.md"
    before, _, rest = page.read_text("utf-8").partition(START)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{START}\n{tables(lines)}\n{END}{after}", "utf-8")
    plot(lines, folder / "prediction.png")
