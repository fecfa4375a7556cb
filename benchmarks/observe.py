"""What an observer costs the thread that serves: throughput and the 99th percentile of a request's time.

Requests of one sample are served one after the other in the main thread, under inference_mode, in blocks in turn:
without an observer, with one that measures in a process or in a thread (attached to the model, a tenth of the time),
and beside a process that does nothing but take a tenth of a core, which shows what the machine itself makes of that.
Each block is compared with the one without of the same round. Prints a Markdown table: the median of the ratios, and
the interval that holds the true median with 95%; the processor time of the serving thread per request, likewise; the
share of its time in which the observer worked; what it measured and dropped.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
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
WAYS = {"process": True, "thread": False}


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
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in (*WAYS, "nothing, a tenth of a core")}
    paused = {name: threading.Event() for name in WAYS}
    spent = dict.fromkeys(WAYS, 0.0)
    observers = {name: begun(model, image, rate, process, paused[name]) for name, process in WAYS.items()}
    for _ in tqdm(range(rounds), f"{title}, {rate:.0%}"):
        without = serve(model, image, seconds)
        on.set()
        blocks = {"nothing, a tenth of a core": serve(model, image, seconds)}
        on.clear()
        for name, observer in observers.items():
            observer.attach()
            paused[name].clear()
            before = observer.stats().seconds
            blocks[name] = serve(model, image, seconds)
            spent[name] += observer.stats().seconds - before
            observer.detach()
            paused[name].set()
            time.sleep(0.5)  # until the batch is done that was begun before
        for name, values in blocks.items():
            found[name].append(tuple(a / b for a, b in zip(values, without, strict=True)))
    for name, ratios in found.items():
        cells, more = [interval(column) for column in zip(*ratios, strict=True)], " | | "
        if name in observers:
            stats = observers[name].stats()
            more = f"{spent[name] / (rounds * seconds):.1%} | {stats.measured} | {stats.dropped}"
            observers[name].close()
        print(f"| {title} | {rate:.0%} | {name} | {' | '.join(cells)} | {more} |", flush=True)


def begun(model: nn.Module, image: Tensor, rate: float, process: bool, paused: threading.Event) -> memsyn.Observer:
    """An observer that has had its first look at the model, which is not what is measured, and rests."""
    store = Path(tempfile.mkdtemp()) / "traffic.safetensors"
    observer = memsyn.Observer(model, store, rate=rate, budget=100 * SHARE, busy=paused.is_set, process=process)
    observer.observe(image.repeat(200, *[1] * (image.ndim - 1)))
    observer.flush(600)
    paused.set()
    return observer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=["mlp", "resnet18"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
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
