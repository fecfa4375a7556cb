"""What protection costs: a whole training step over the bare one, of the same network on the same data.

In one run and in turn, a step each: the bare step, `memsyn.protect` in its forms, compiled and not, and the penalty as
an autograd loss term. Prints a Markdown table: the median over the rounds of the ratio to the bare step beside it, and
its quartiles.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from tqdm import tqdm

import memsyn
from memsyn.protecting import compiled
from models import SUBJECTS

STRENGTH = 1e-3
SMALLEST = compiled.SMALLEST


@dataclass(frozen=True)
class Case:
    """A network, its batches and its optimizer."""

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    optimizer: Callable[[nn.Module], Optimizer]


def large_mlp() -> nn.Module:
    """784-4200-4200-10: 21 million weights."""
    return nn.Sequential(nn.Linear(784, 4200), nn.ReLU(), nn.Linear(4200, 4200), nn.ReLU(), nn.Linear(4200, 10))


CASES = {
    "mlp-sgd": Case(
        "MLP of 21M weights, batch 32, SGD with momentum",
        large_mlp,
        lambda: torch.randn(32, 784),
        lambda model: SGD(model.parameters(), lr=1e-3, momentum=0.9),
    ),
    "mlp-adam": Case(
        "MLP of 21M weights, batch 32, Adam",
        large_mlp,
        lambda: torch.randn(32, 784),
        lambda model: Adam(model.parameters(), lr=1e-4),
    ),
    "vit-tiny": Case(
        "ViT-Tiny, batch 16, AdamW",
        SUBJECTS["vit-tiny"].model,
        lambda: SUBJECTS["vit-tiny"].batch()[:16],
        lambda model: AdamW(model.parameters(), lr=1e-4),
    ),
    "resnet18": Case(
        "ResNet-18, batch 32, SGD with momentum",
        SUBJECTS["resnet18"].model,
        SUBJECTS["resnet18"].batch,
        lambda model: SGD(model.parameters(), lr=1e-3, momentum=0.9),
    ),
}
CONTENDERS = (
    "gradient",
    "proximal",
    "gradient, not compiled",
    "proximal, not compiled",
    "proximal, importance in bfloat16",
    "autograd loss term",
)


def trainer(case: Case, model: nn.Module, memory: memsyn.Memory | None, how: str) -> Callable[[Tensor, Tensor], None]:
    """One step of training, protected or not."""
    optimizer = case.optimizer(model)
    if memory is not None and how != "autograd loss term":
        dtype = torch.bfloat16 if "bfloat16" in how else None
        memsyn.protect(optimizer, model, memory, strength=STRENGTH, form=how.split(",")[0], importance_dtype=dtype)

    def step(batch: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch), targets)
        if memory is not None and how == "autograd loss term":
            loss = loss + STRENGTH * memsyn.penalty(model, memory)
        loss.backward()
        compiled.SMALLEST = math.inf if "not compiled" in how else SMALLEST
        optimizer.step()

    return step


def compare(case: Case, rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Milliseconds of the bare step, and the ratios of all others to it."""
    torch.manual_seed(0)
    model = case.model().train()
    batch = case.batch()
    outputs = model(batch)
    targets = torch.randint(outputs.shape[-1], outputs.shape[:1])
    parameters = dict(model.named_parameters())
    memory = memsyn.Memory(
        {name: p.detach() + 1e-3 * torch.randn_like(p) for name, p in parameters.items()},
        {name: torch.rand_like(p) for name, p in parameters.items()},
    )
    bare = trainer(case, deepcopy(model), None, "")
    steps = {how: trainer(case, deepcopy(model), memory, how) for how in CONTENDERS}
    times: list[float] = []
    ratios: dict[str, list[float]] = {how: [] for how in steps}
    for turn in tqdm(range(rounds + 3), case.title, unit="round"):
        for how, step in steps.items():
            plain, own = seconds(bare, batch, targets), seconds(step, batch, targets)
            if turn >= 3:  # the first ones make the optimizer's state
                times.append(plain)
                ratios[how].append(own / plain)
    return 1000 * statistics.median(times), ratios


def seconds(step: Callable[[Tensor, Tensor], None], batch: Tensor, targets: Tensor) -> float:
    start = time.perf_counter()
    step(batch, targets)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--rounds", type=int, default=40, help="pairs of steps of each contender (default 40)")
    options = parser.parse_args()
    for name in options.cases:
        if name not in CASES:
            parser.error(f"CASE must be one of {', '.join(CASES)}; got {name!r}")
    print("| case | bare step, ms |", " | ".join(CONTENDERS), "|")
    print("| --- | ---: |", " | ".join(["---"] * len(CONTENDERS)), "|")
    for name in options.cases or CASES:
        milliseconds, ratios = compare(CASES[name], options.rounds)
        cells = []
        for values in ratios.values():
            low, middle, high = statistics.quantiles(values, n=4)
            cells.append(f"{middle:.3f}x ({low:.3f}-{high:.3f})")
        print(f"| {CASES[name].title} | {milliseconds:.1f} |", " | ".join(cells), "|", flush=True)
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"\n{where}, {options.rounds} rounds.")


if __name__ == "__main__":
    main()
