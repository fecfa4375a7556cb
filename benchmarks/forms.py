"""Which form of protection suits which optimizer, and which strengths it bears.

Tasks learned one after the other, MAS between them (importances summed), for every optimizer, form, strength and seed;
strength 0 is no protection. Each result is a line of JSON in `--out`, and what is there is not run again. Prints, per
data set and optimizer, the average accuracy over all tasks in the end, mean and standard deviation over seeds.
"""

import argparse
import itertools
import math
import statistics
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

import memsyn
from problems import PROBLEMS, learn, lines_of

DATA = ("split-fashion", "emoji8")
OPTIMIZERS = ("sgd", "adam", "adamw")
FORMS = ("gradient", "proximal")
STRENGTHS = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e6)


def guard(
    form: str, strength: float, optimizer: Optimizer, model: nn.Module, memory: memsyn.Memory
) -> memsyn.Protection:
    return memsyn.protect(optimizer, model, memory, strength=strength, form=form)


def summarise(lines: Sequence[dict[str, Any]], num_tasks: dict[str, int]) -> str:
    """A table per data set: a row for each optimizer and form, a column for each strength."""
    found: dict[tuple[str, str, str, float], list[float]] = {}
    for line in lines:
        last = line["accuracy"][-1]
        whole = len(line["accuracy"]) == num_tasks[line["data"]]
        key = line["data"], line["optimizer"], line["form"], line["strength"]
        found.setdefault(key, []).append(100 * statistics.fmean(last) if whole else math.nan)
    text = []
    for data in dict.fromkeys(key[0] for key in found):
        text += ["", f"| {data} | " + " | ".join(f"{s:g}" for s in STRENGTHS) + " |", "|---|" + "---|" * len(STRENGTHS)]
        for optimizer, form in dict.fromkeys((key[1], key[2]) for key in found if key[0] == data):
            cells = []
            for strength in STRENGTHS:
                values = found.get((data, optimizer, form, strength), [])
                if any(map(math.isnan, values)):
                    cells.append("NaN")
                elif values:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cells.append(f"{statistics.fmean(values):.1f} ± {spread:.1f}")
                else:
                    cells.append("-")
            text.append(f"| {optimizer}, {form} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", default=DATA, help=f"of {', '.join(DATA)}; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/forms.jsonl"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", memsyn.StrengthWarning)
    problems = {name: PROBLEMS[name]() for name in options.data}

    def run(data: str, optimizer: str, form: str, strength: float, seed: int) -> dict[str, Any]:
        protect = partial(guard, form, strength) if strength else None
        return {"accuracy": learn(problems[data], optimizer, protect, seed).accuracy}

    keys = [
        {"data": data, "optimizer": optimizer, "form": form, "strength": strength, "seed": seed}
        for seed, data in itertools.product(range(options.seeds), problems)
        for optimizer, form, strength in itertools.product(OPTIMIZERS, FORMS, STRENGTHS)
    ]
    print(summarise(lines_of(options.out, keys, run), {name: len(p.parts) for name, p in problems.items()}))


if __name__ == "__main__":
    main()
