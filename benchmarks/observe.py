"""What an observer costs the thread that serves: throughput and the 99th percentile of a request's time.

Requests of one sample are served one after the other in the main thread, under inference_mode. Three kinds of blocks
follow each other: without an observer; with an observer that is attached to the model and may work a tenth of the time;
and beside a process that keeps a tenth of a core busy, which shows what that load alone costs on this machine. Each
block is compared with the block without an observer of the same round. Prints a Markdown table: the median of the
ratios with its 95% interval, for throughput, p99 and the serving thread's processor time per request; the share of the
time in which the observer worked; the numbers of samples that it measured and dropped. With `--calls`, another table
instead: the microseconds that one request of one sample costs the serving thread, beside the forward pass.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import threading
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import memsyn
from models import SUBJECTS

RATES = (0.01, 1.0)
SHARE = 0.1
OBSERVED, LOADED = "observer", "a tenth of a core"


def serve(model: nn.Module, image: Tensor, seconds: float) -> tuple[float, float, float]:
    """Requests a second, the 99th percentile of their times, and processor time for each."""
    taken = []
    cpu, end = time.thread_time(), time.perf_counter() + seconds
    with torch.inference_mode():
        while (start := time.perf_counter()) < end:
            model(image)
            taken.append(time.perf_counter() - start)
    return len(taken) / seconds, float(np.quantile(taken, 0.99)), (time.thread_time() - cpu) / len(taken)


def take_a_share(on: Any) -> None:
    """A tenth of a core, in pieces of some milliseconds."""
    while True:
        on.wait()
        end = time.thread_time() + 0.005
        while time.thread_time() < end:
            pass
        time.sleep(0.005 * (1 / SHARE - 1))


def interval(ratios: Sequence[float]) -> str:
    """The median, and order statistics between which the true one lies with 95%."""
    own, count = sorted(ratios), len(ratios)
    below = 0
    while sum(math.comb(count, k) for k in range(below + 1)) / 2**count <= 0.025:
        below += 1
    low, high = own[max(0, below - 1)], own[min(count - 1, count - below)]
    return f"{statistics.median(own):.3f} ({low:.3f}-{high:.3f})"


def compare(model: nn.Module, image: Tensor, rate: float, on: Any, rounds: int, seconds: float, title: str) -> None:
    ratios: dict[str, list[tuple[float, ...]]] = {OBSERVED: [], LOADED: []}
    paused, worked = threading.Event(), 0.0
    observer = begun(model, image, rate, paused)
    for _ in tqdm(range(rounds), f"{title}, {rate:.0%}"):
        without = serve(model, image, seconds)
        on.set()
        blocks = {LOADED: serve(model, image, seconds)}
        on.clear()
        observer.attach()
        paused.clear()
        before = observer.stats().seconds
        blocks[OBSERVED] = serve(model, image, seconds)
        worked += observer.stats().seconds - before
        observer.detach()
        paused.set()
        time.sleep(0.5)  # until the observer has finished the batch that it was measuring
        for name, values in blocks.items():
            ratios[name].append(tuple(a / b for a, b in zip(values, without, strict=True)))
    stats = observer.stats()
    observer.close()
    counts = {OBSERVED: f"{worked / (rounds * seconds):.1%} | {stats.measured} | {stats.dropped}", LOADED: " | | "}
    for name, rows in ratios.items():
        cells = [interval(column) for column in zip(*rows, strict=True)]
        print(f"| {title} | {rate:.0%} | {name} | {' | '.join(cells)} | {counts[name]} |", flush=True)


def begun(model: nn.Module, image: Tensor, rate: float, paused: threading.Event) -> memsyn.Observer:
    """A paused observer that has checked the routes of the model already: that cost is not what is measured here."""
    store = Path(tempfile.mkdtemp()) / "traffic.safetensors"
    observer = memsyn.Observer(model, store, rate=rate, budget=100 * SHARE, busy=paused.is_set, min_samples=1)
    observer.observe(image.repeat(200, *[1] * (image.ndim - 1)))
    observer.flush(600)
    paused.set()
    return observer


class Idle(nn.Module):
    """Does next to nothing, so that the cost of a hook shows; holds tensors, at each of which the observer looks."""

    def __init__(self, num_tensors: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(1) for _ in range(num_tensors))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = inputs * self.weights[0]
        return output


def microseconds(action: Callable[[], Any], count: int = 20_000) -> float:
    """The least of five means over `count` calls: other programs can only add to it."""
    return 1e6 * min(timeit.repeat(action, number=count, repeat=5)) / count


def costs_of_calls(count: int = 20_000) -> Iterator[tuple[int, float, float, float]]:
    """Tensors of the model, rate, microseconds of `observe`, and those that a hook adds to a pass."""
    image = torch.zeros(1, 784)
    for num_tensors in (2, 200):
        for rate in (1e-9, 1.0):
            model = Idle(num_tensors)
            store = Path(tempfile.mkdtemp()) / "traffic.safetensors"
            with memsyn.Observer(model, store, rate=rate, room=10**9, busy=lambda: True) as observer:
                shown = microseconds(partial(observer.observe, image), count)
                plain = microseconds(partial(model, image), count)
                observer.attach()
                yield num_tensors, rate, shown, microseconds(partial(model, image), count) - plain


def print_costs_of_calls() -> None:
    print("| tensors of the model | rate | `observe` | a pass of an attached model, above one without a hook |")
    print("|---:|---:|---:|---:|")
    for num_tensors, rate, shown, added in costs_of_calls():
        print(f"| {num_tensors} | {rate:g} | {shown:.1f} us | {added:.1f} us |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", action="store_true", help="time single requests, beside the forward pass")
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=["mlp", "resnet18"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.calls:
        print_costs_of_calls()
        return
    process = multiprocessing.get_context("spawn")
    on = process.Event()
    worker = process.Process(target=take_a_share, args=(on,), daemon=True)
    worker.start()
    print("| model | rate | beside | throughput | p99 | processor time | at work | measured | dropped |")
    print("|---|---|---|---|---|---|---|---|---|")
    for key in given.models:
        subject = SUBJECTS[key]
        model = subject.model().eval()
        for rate in RATES:
            compare(model, subject.batch()[:1], rate, on, given.rounds, given.seconds, subject.title)
    worker.terminate()


if __name__ == "__main__":
    main()
