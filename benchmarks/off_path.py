"""What disturbs a thread that serves less: measuring in another thread, or in another process.

Serves one request after the other in the main thread, in turn without a measurer, with one in a thread, and with one
in a process (spawned, fed by a multiprocessing queue). Both hold a copy of the model, take what is queued in batches of
at most 32, and sleep to keep their share of one core. Prints a Markdown table: the median over the rounds of throughput
and of the 99th percentile of a request's time, over those of the same round without, with the smallest and largest.
"""

import argparse
import copy
import multiprocessing
import queue
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from memsyn.batches import Given
from memsyn.bench.networks import SmallConvNet
from memsyn.objectives import find_estimator
from memsyn.parameters import trainable_parameters
from memsyn.products import workspace
from memsyn.run import Run

BATCH = 32
SHARE = 0.1
RATES = (0.01, 1.0)


def mlp() -> tuple[nn.Module, Tensor]:
    layers = (nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))
    return nn.Sequential(*layers), torch.randn(1, 784)


def conv() -> tuple[nn.Module, Tensor]:
    body = SmallConvNet(widths=(16, 32, 64, 64))
    return nn.Sequential(body, nn.Linear(body.num_features, 10)), torch.randn(1, 3, 32, 32)


SUBJECTS = {"MLP": mlp, "conv net": conv}


def keep_measuring(model: nn.Module, waiting: Any, stopped: Any, ready: Any) -> None:
    torch.set_num_threads(1)
    model = copy.deepcopy(model)
    trainable = trainable_parameters(model)
    run = Run(model, trainable, torch.device("cpu"), None, find_estimator("mas"), False)
    index = 0
    with workspace():
        while not stopped.is_set():
            batch: list[Any] = []
            with suppress(queue.Empty):
                batch.append(waiting.get(timeout=0.02))
                while len(batch) < BATCH:
                    batch.append(waiting.get_nowait())
            if not batch:
                continue
            start = time.thread_time()
            run.add(Given(torch.from_numpy(np.concatenate(batch))), index)
            ready.set()
            index += 1
            time.sleep((time.thread_time() - start) * (1 / SHARE - 1))


def serve(model: nn.Module, image: Tensor, seconds: float, waiting: Any, rate: float) -> tuple[float, float]:
    """Requests a second, and the 99th percentile of their times."""
    taken, due = [], 0.0
    end = time.perf_counter() + seconds
    with torch.inference_mode():
        while (start := time.perf_counter()) < end:
            model(image)
            due += rate
            if waiting is not None and due >= 1:
                due -= 1
                with suppress(queue.Full):
                    waiting.put_nowait(image.numpy().copy())
            taken.append(time.perf_counter() - start)
    return len(taken) / seconds, float(np.quantile(taken, 0.99))


def measured(way: str, model: nn.Module, image: Tensor, seconds: float, rate: float) -> tuple[float, float]:
    if way == "none":
        return serve(model, image, seconds, None, rate)
    process = multiprocessing.get_context("spawn")
    waiting: Any = queue.Queue(64) if way == "thread" else process.Queue(64)
    stopped, ready = (kind() for kind in [threading.Event if way == "thread" else process.Event] * 2)
    begin: Callable[..., Any] = threading.Thread if way == "thread" else process.Process
    worker = begin(target=keep_measuring, args=(model, waiting, stopped, ready), daemon=True)
    worker.start()
    for _ in range(2):
        waiting.put(image.numpy().copy())
    ready.wait()
    try:
        return serve(model, image, seconds, waiting, rate)
    finally:
        stopped.set()
        if way == "process":
            waiting.cancel_join_thread()
        worker.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | rate | way | throughput | p99 |\n|---|---|---|---|---|")
    for name, make in SUBJECTS.items():
        model, image = make()
        model.eval()
        for rate in RATES:
            found: dict[str, list[tuple[float, float]]] = {"thread": [], "process": []}
            for _ in tqdm(range(given.rounds), f"{name}, {rate}"):
                whole = measured("none", model, image, given.seconds, rate)
                for way, ratios in found.items():
                    own = measured(way, model, image, given.seconds, rate)
                    ratios.append((own[0] / whole[0], own[1] / whole[1]))
            for way, ratios in found.items():
                cells = [
                    f"{statistics.median(column):.3f} ({min(column):.3f}-{max(column):.3f})"
                    for column in zip(*ratios, strict=True)
                ]
                print(f"| {name} | {rate:.0%} | {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
