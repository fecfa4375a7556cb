"""The background thread: what it survives, when it answers, and how much time it takes."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsyn
from memsyn.live import segment_files, weights_versions, worker
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


# What ends nothing


class StrangeError(BaseException):
    """No Exception: most handlers do not see it."""


STRANGE = [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), StrangeError("odd"), MemoryError()]


@pytest.mark.parametrize("place", ["forward", "busy", "write", "fingerprint", "take"])
@pytest.mark.parametrize("error", STRANGE, ids=lambda error: type(error).__name__)
def test_no_exception_ends_the_thread(
    place: str, error: BaseException, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches, left = a_model(), requests(3), [error, error]

    def failing(real: Any) -> Any:
        def call(*args: Any, **given: Any) -> Any:
            if left:
                raise left.pop()
            return real(*args, **given)

        return call

    given: dict[str, Any] = {}
    if place == "forward":
        given = {"forward": failing(lambda clone, inputs: clone(inputs))}
    elif place == "busy":
        given = {"busy": failing(lambda: False)}
    elif place == "write":
        monkeypatch.setattr(segment_files, "write", failing(segment_files.write))
    elif place == "fingerprint":
        monkeypatch.setattr(weights_versions, "fingerprint", failing(weights_versions.fingerprint))
    else:
        monkeypatch.setattr(RequestQueue, "take", failing(RequestQueue.take))
    with begin(model, store, max_batch=1, **given) as observer:
        end = time.monotonic() + 10
        while left and time.monotonic() < end:
            observer.observe(batches[0])
            if place == "busy":  # a flush does not ask
                time.sleep(0.01)
            else:
                observer.flush(10)
        assert observer.flush(10) or place != "busy"
        assert not left
        before = observer.stats().measured
        for batch in batches:
            observer.observe(batch)
        assert observer.flush(10)
        stats = observer.stats()
        assert (stats.measured - before, stats.waiting) == (6, 0)
        assert stats.errors == (1 if (place, type(error)) == ("forward", MemoryError) else 2)  # tried twice
        assert stats.sampled == stats.measured + stats.dropped + stats.invalid + stats.stale
        assert type(error).__name__ in str(stats.last_error)
        assert memsyn.Importance.load(store).num_samples == stats.measured


def test_a_thread_that_ends_leaves_nobody_waiting(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nothing should end it: here, its loop fails. Samples are dropped, and the store is free again."""
    model, batch, go = a_model(), requests(1)[0], threading.Event()

    def failing(self: Any, stream: Any) -> None:
        assert go.wait(10)
        raise SystemExit

    answers: list[bool] = []
    with monkeypatch.context() as patch:
        patch.setattr(worker.Worker, "_work_until_closed", failing)
        observer = begin(model, store)
        observer.observe(batch)
        waiting = threading.Thread(target=lambda: answers.append(observer.flush(30)))
        waiting.start()
        while not observer._worker._signals._flushes:
            time.sleep(0.001)
        go.set()
        waiting.join(10)
        observer._worker._thread.join(10)
    assert answers == [False]
    observer.observe(batch)
    began = time.monotonic()
    assert not observer.flush(30)
    observer.close(30)
    assert time.monotonic() - began < 5
    stats = observer.stats()
    assert (stats.sampled, stats.dropped, stats.waiting, stats.last_error) == (1, 1, 0, "SystemExit: ")
    with begin(model, store) as again:
        again.observe(batch)
        assert again.flush()


def test_a_thread_that_cannot_begin_leaves_the_store_free(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", failing)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            begin(a_model(), store)
    assert not list(store.parent.iterdir())
    with begin(a_model(), store):
        pass


def test_samples_that_are_left_at_the_end_are_dropped(store: Path) -> None:
    observer = begin(a_model(), store, max_batch=2, budget=1e-6)
    for _ in range(9):
        observer.observe(requests(1)[0])
    observer.close()
    stats = observer.stats()
    assert stats.waiting == 0
    assert stats.measured in (2, 4)  # a batch was measured before the end, or none
    assert stats.measured + stats.dropped == stats.sampled == 9


# Flush


def test_flush_says_what_was_lost_since_the_last_one(store: Path) -> None:
    """Samples that are left out by rule are not lost; nor are those that found no room."""
    model, batch, broken = a_model(), requests(1)[0], [False]

    def forward(clone: nn.Module, inputs: Tensor) -> Tensor:
        if broken[0]:
            raise SystemExit
        return clone(inputs)

    with begin(model, store, forward=forward, room=3, max_batch=3) as observer:
        observer.observe(torch.cat([batch, batch * torch.nan]))
        assert observer.flush()
        assert observer.stats().invalid == 1
        observer.observe(torch.cat([batch] * 5))
        assert observer.flush()
        assert observer.stats().dropped == 2
        broken[0] = True
        observer.observe(torch.cat([batch] * 3))
        while observer.stats().waiting:  # dropped before the flush is asked for
            time.sleep(0.001)
        broken[0] = False
        assert not observer.flush()
        assert observer.flush()
        assert (observer.stats().dropped, observer.stats().last_error) == (5, "SystemExit: ")


def test_sums_that_are_lost_with_their_weights_are_said(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = a_model(), requests(1)[0]

    def failing(*args: object) -> None:
        raise memsyn.MemoryFileError("no room")

    with begin(model, store, max_batch=1) as observer:
        observer.observe(batch)
        while observer.stats().waiting:
            time.sleep(0.001)
        with monkeypatch.context() as patch:
            patch.setattr(segment_files, "write", failing)
            model.load_state_dict(a_model(1).state_dict())
            observer.observe(batch)
            while observer.stats().waiting:
                time.sleep(0.001)
        assert not observer.flush()
        assert observer.flush()
        assert memsyn.Importance.load(store).num_samples == 1


# Forks


def test_no_process_is_left_of_a_killed_service_and_a_fork_keeps_nothing(store: Path) -> None:
    """But the fork itself. The store can be used at once, and goes on."""
    model, batch = a_model(), requests(1)[0]
    read, write = os.pipe()
    service = os.fork()
    if not service:
        with contextlib.suppress(BaseException):
            os.setsid()
            torch.set_num_threads(1)
            observer = begin(model, store)
            observer.observe(batch)
            assert observer.flush()
            if fork := os.fork():
                os.write(write, fork.to_bytes(4, "little"))
            time.sleep(60)
        os._exit(0)
    child = int.from_bytes(os.read(read, 4), "little")
    try:
        assert sorted(members(service)) == [service, child]
        with pytest.raises(memsyn.MemoryFileError, match=r"traffic\.safetensors is in use"):
            begin(model, store)
        os.kill(service, signal.SIGKILL)
        os.waitpid(service, 0)
        assert members(service) == [child]
        with begin(model, store) as again:
            again.observe(batch)
            assert again.flush()
            assert again.importance().num_samples == 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(read)
        os.close(write)


def members(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, own = path.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
            found += [int(path.name)] if int(own) == session and state != "Z" else []
    return found


def test_a_fork_waits_for_no_lock(store: Path) -> None:
    """Though other threads held all of them when the process forked."""
    model, batch = a_model(), requests(1)[0]
    with begin(model, store) as observer:
        observer.attach()
        observer.observe(batch)
        assert observer.flush()
        sums = observer._sums.current
        assert sums is not None
        with sums._lock, observer._queue._lock, observer._log._lock, observer._worker._signals._lock:
            child = os.fork()
            if not child:
                with contextlib.suppress(BaseException):
                    signal.alarm(10)
                    model(batch)
                    observer.observe(batch)
                    assert not observer.flush()
                    assert observer.stats().measured == 1
                    for call in (observer.importance, observer.converged):
                        with pytest.raises(memsyn.ProcessError, match="a fork of the one that measures"):
                            call()
                    observer.close()
                    os._exit(7)
                os._exit(99)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


ENDING = """
import sys, time
import torch
from memsyn.live import observer
from tests.serving import begin

class Slow(torch.nn.Sequential):
    def forward(self, x):
        for _ in range(100_000):
            x = super().forward(x)
        return x

observer.EXIT_WAIT = 0.1
own = begin(Slow(torch.nn.Linear(200, 200)), sys.argv[1], max_batch=1)
own.observe(torch.zeros(1, 200))
time.sleep(1)
if sys.argv[2] == "closed":
    own.close(0.1)
print(own._worker.is_running)
"""
"""A process that ends while its observer measures."""


@pytest.mark.parametrize("how", ["closed", "left open"])
def test_a_process_that_ends_while_a_batch_is_measured_is_not_aborted(store: Path, how: str) -> None:
    """torch aborts a process whose interpreter ends a thread in one of its operations."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ENDING, str(store), how], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "the process ended while samples were measured or stored: they are lost." in done.stderr
    assert time.monotonic() - start < 60
