"""Which form of protection suits which optimizer, and which strengths it bears.

Tasks learned one after the other by a network with a head for each, MAS between them (importances summed), for every
optimizer, form, strength and seed; strength 0 is no protection. Each result is a line of JSON in `--out`, and what is
there is not run again. Prints, per data set and optimizer, the average accuracy over all tasks in the end, mean and
standard deviation over seeds.

    split-fashion   Fashion-MNIST in five tasks of two classes, an MLP 784-256-256, one epoch a task in batches of 64
    emoji8          the eight tasks of `memsyn bench run emoji8`, with 5 epochs a task

Fashion-MNIST is read from the folder of Debian's package dataset-fashion-mnist, or from --fashion.
"""

import argparse
import gzip
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from tqdm import tqdm

import memsyn
from memsyn.bench.drawings import augment, load_emoji8
from memsyn.bench.networks import MultiHead
from memsyn.bench.sequences import pretrained_network

FASHION = Path("/usr/share/datasets/fashion-mnist")
OPTIMIZERS: dict[str, dict[str, Callable[[Any], Optimizer]]] = {
    "split-fashion": {
        "sgd": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9),
        "adam": lambda parameters: Adam(parameters, lr=1e-3),
        "adamw": lambda parameters: AdamW(parameters, lr=1e-3),
    },
    "emoji8": {
        "sgd": lambda parameters: SGD(parameters, lr=0.03, momentum=0.9),
        "adam": lambda parameters: Adam(parameters, lr=3e-3),
        "adamw": lambda parameters: AdamW(parameters, lr=3e-3),
    },
}
FORMS = ("gradient", "proximal")
STRENGTHS = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e6)


@dataclass(frozen=True)
class Part:
    """One task."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Problem:
    """Tasks, and how they are learned."""

    parts: Sequence[Part]
    build: Callable[[torch.Generator], nn.Module]
    epochs: int
    batch_size: int
    augment: Callable[[Tensor, torch.Generator], Tensor]


def fashion(folder: Path) -> Problem:
    def read(name: str, header: int) -> np.ndarray[Any, Any]:
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    def images(kind: str) -> Tensor:
        return torch.from_numpy(read(f"{kind}-images-idx3-ubyte.gz", 16).copy()).view(-1, 784).float() / 255

    def labels(kind: str) -> Tensor:
        return torch.from_numpy(read(f"{kind}-labels-idx1-ubyte.gz", 8).copy()).long()

    (x, y), (test_x, test_y) = ((images(kind), labels(kind)) for kind in ("train", "t10k"))
    parts = []
    for first in range(0, 10, 2):
        own, test = y // 2 == first // 2, test_y // 2 == first // 2
        parts.append(Part(x[own], y[own] - first, test_x[test], test_y[test] - first))

    def build(generator: torch.Generator) -> nn.Module:
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        body = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        return MultiHead(body, 256, head_sizes=[2] * 5)

    return Problem(parts, build, 1, 64, lambda batch, generator: batch)


def emoji8() -> Problem:
    tasks = load_emoji8(32)
    parts = [Part(task.train_images, task.train_labels, task.test_images, task.test_labels) for task in tasks]
    return Problem(parts, lambda generator: pretrained_network(tasks, generator), 5, 16, augment)


Make = Callable[[Any], Optimizer]


def through_head(index: int, model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images, index)
    return logits


def learn(problem: Problem, make: Make, form: str, strength: float, seed: int) -> list[list[float]]:
    """The accuracy of each task so far, after each task."""
    generator = torch.Generator().manual_seed(seed)
    model = problem.build(generator)
    memory, matrix = memsyn.Memory.empty(), []
    for index, part in enumerate(problem.parts):
        optimizer = make(model.parameters())
        if memory.importance and strength:
            memsyn.protect(optimizer, model, memory, strength=strength, form=form)
        for _ in range(problem.epochs):
            for chosen in torch.randperm(len(part.labels), generator=generator).split(problem.batch_size):
                optimizer.zero_grad()
                logits = model(problem.augment(part.images[chosen], generator), index)
                F.cross_entropy(logits, part.labels[chosen]).backward()
                optimizer.step()
        if strength and all(bool(p.isfinite().all()) for p in model.parameters()):
            importance = memsyn.measure(
                model,
                part.images.split(200),
                forward=partial(through_head, index),
                max_samples=2000,
                progress=False,
            )
            memory = memory.consolidate(model, importance)
        with torch.inference_mode():
            matrix.append(
                [
                    float((model(own.test_images, head).argmax(1) == own.test_labels).float().mean())
                    for head, own in enumerate(problem.parts[: index + 1])
                ]
            )
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            break
    return matrix


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
    parser.add_argument("data", nargs="*", default=list(OPTIMIZERS), help=f"of {', '.join(OPTIMIZERS)}; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/forms.jsonl"))
    parser.add_argument("--fashion", type=Path, default=FASHION, help=f"default {FASHION}")
    options = parser.parse_args()
    warnings.simplefilter("ignore", memsyn.StrengthWarning)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(line["data"], line["optimizer"], line["form"], line["strength"], line["seed"]) for line in lines}
    problems = {name: fashion(options.fashion) if name == "split-fashion" else emoji8() for name in options.data}
    grid = [
        (name, optimizer, form, strength, seed)
        for seed, name in itertools.product(range(options.seeds), problems)
        for optimizer, form, strength in itertools.product(OPTIMIZERS[name], FORMS, STRENGTHS)
    ]
    for key in tqdm([key for key in grid if key not in done], unit="run"):
        name, optimizer, form, strength, seed = key
        matrix = learn(problems[name], OPTIMIZERS[name][optimizer], form, strength, seed)
        line = dict(zip(("data", "optimizer", "form", "strength", "seed"), key, strict=True)) | {"accuracy": matrix}
        lines.append(line)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
    print(summarise(lines, {name: len(problem.parts) for name, problem in problems.items()}))


if __name__ == "__main__":
    main()
