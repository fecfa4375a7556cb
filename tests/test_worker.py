"""The background thread: what it survives, when it answers, and how much time it takes."""

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from memsyn.live import worker
from memsyn.live.request_queue import RequestQueue
from memsyn.live.worker import TimeBudget
from tests.serving import a_model, begin, requests

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "traffic.safetensors"


def test_a_fork_of_the_process_does_nothing(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]
    with begin(model, store) as observer:
        observer.observe(batch)
        assert observer.flush()
        child = os.fork()
        if not child:
            try:
                observer.observe(batch)
                assert not observer.flush()
                observer.close()
                os._exit(observer.stats().seen)
            finally:
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        observer.observe(batch)
        assert observer.flush()
        assert observer.importance().num_samples == 2


def test_nothing_ends_the_thread(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an endless interval, nor an error where none is expected."""
    model, batch, failures = a_model(), requests(1)[0], [1, 1, 1]
    take = RequestQueue.take

    def failing(self: RequestQueue, most: int) -> Any:
        if failures:
            failures.pop()
            raise RuntimeError("unforeseen")
        return take(self, most)

    monkeypatch.setattr(RequestQueue, "take", failing)
    with begin(model, store, interval=float("inf"), budget=1e-300) as observer:
        for count in (1, 2):
            observer.observe(batch)
            assert observer.flush()
            assert observer.stats().measured == count
            time.sleep(0.05)
        assert (observer.stats().errors, observer.stats().last_error) == (3, "RuntimeError: unforeseen")


def test_who_waits_is_told_of_the_end(store: Path) -> None:
    model, batch = a_model(), requests(1)[0]
    busy, free, answers = threading.Event(), threading.Event(), []

    def forward(clone: nn.Module, inputs: Tensor) -> Tensor:
        busy.set()
        free.wait()
        return clone(inputs)

    observer = begin(model, store, forward=forward, max_batch=1)
    observer.observe(batch)
    assert busy.wait(10)
    waiting = threading.Thread(target=lambda: answers.append(observer.flush(60)))
    waiting.start()
    while not observer._worker._signals._flushes:
        time.sleep(0.001)
    observer.close(0.0)
    began = time.monotonic()
    free.set()
    waiting.join(30)
    assert answers == [False]
    assert time.monotonic() - began < 20


def test_rest_keeps_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the work takes."""
    now, generator = 100.0, random.Random(0)
    monkeypatch.setattr(worker.time, "monotonic", lambda: now)
    budget, begin = TimeBudget(0.1), now
    for _ in range(1000):
        began = now
        now += generator.choice([0.001, 0.5, 0.02])
        budget.spend(began)
        assert budget.ready >= now
        now = budget.ready
    assert budget.seconds / (now - begin) == pytest.approx(0.1)
