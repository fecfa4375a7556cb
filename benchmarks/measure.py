"""What exact importance costs, relative to an ordinary forward and backward pass of the same batches.

In one run and in turn: the ordinary pass, `memsyn.measure` (shadow, guard and all) over the same batches, the
loop over single samples, and `vmap(grad)` over the whole model. Prints a Markdown table of ratios: the median over
the rounds, and the smallest and largest.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

import memsyn
from models import SUBJECTS


def ordinary(model: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        model.zero_grad()
        model(batch).square().sum().backward()


def measured(model: nn.Module, batches: list[Tensor]) -> None:
    memsyn.measure(model, batches, progress=False)


def one_by_one(model: nn.Module, batches: list[Tensor]) -> None:
    totals = [torch.zeros_like(p) for p in model.parameters()]
    for sample in batches[0].split(1):
        model.zero_grad()
        model(sample).square().sum().backward()
        for total, parameter in zip(totals, model.parameters(), strict=True):
            if parameter.grad is not None:
                total += parameter.grad.abs()


def per_sample_gradients(model: nn.Module, batches: list[Tensor]) -> None:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def score(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, values, (sample.unsqueeze(0),))
        return output.square().sum()

    gradients = torch.vmap(torch.func.grad(score), (None, 0))(parameters, batches[0])
    for gradient in gradients.values():
        gradient.abs().sum(0)


CONTENDERS: dict[str, Callable[[nn.Module, list[Tensor]], None]] = {
    "memsyn": measured,
    "batch of one": one_by_one,
    "vmap(grad)": per_sample_gradients,
}
ONE_BATCH = {"batch of one", "vmap(grad)"}  # they have no cost of their own per run to spread


def seconds(run: Callable[[nn.Module, list[Tensor]], None], model: nn.Module, batches: list[Tensor]) -> float:
    start = time.perf_counter()
    run(model, batches)
    return time.perf_counter() - start


def ratios(name: str, num_batches: int, rounds: int, bar: tqdm) -> dict[str, list[float]]:  # type: ignore[type-arg]
    """Per contender, the cost of a batch over the ordinary cost of a batch, once a round."""
    torch.manual_seed(0)
    model = SUBJECTS[name].model().eval()
    batches = [SUBJECTS[name].batch() for _ in range(num_batches)]
    for run in (ordinary, *CONTENDERS.values()):
        run(model, batches[:1])  # warm up
    found: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for _ in range(rounds):
        plain = seconds(ordinary, model, batches) / num_batches
        for contender, run in CONTENDERS.items():
            cost = seconds(run, model, batches)
            found[contender].append(cost / (1 if contender in ONE_BATCH else num_batches) / plain)
        bar.update()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(SUBJECTS), help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--batches", type=int, default=20, help="batches a run")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved runs of each contender")
    options = parser.parse_args()
    with tqdm(total=len(options.models) * options.rounds, unit="round") as bar:
        rows = {name: ratios(name, options.batches, options.rounds, bar) for name in options.models}
    print(f"| model | {' | '.join(CONTENDERS)} |\n|---|{'---|' * len(CONTENDERS)}")
    for name, found in rows.items():
        cells = [f"{statistics.median(r):.2f}x ({min(r):.2f}-{max(r):.2f})" for r in found.values()]
        print(f"| {name}, batch {len(SUBJECTS[name].batch())} | {' | '.join(cells)} |")
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, float32, {options.batches} batches a run.")


if __name__ == "__main__":
    main()
