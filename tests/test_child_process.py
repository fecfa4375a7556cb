"""A pass in another process gives what the same pass gives here, or says why it cannot."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import memsyn
from memsyn.errors import ModelError
from memsyn.live.child_process import Process
from memsyn.live.segment_sums import Ledger
from memsyn.live.window import Window
from memsyn.measuring.measurement import Run
from memsyn.measuring.objectives import ESTIMATORS
from tests.apart import Cached, Elsewhere, Fatal, Gated, Shifted, Slow, Stray, first_half
from tests.serving import a_model, assert_same, begin, measured, requests


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMSYN_TEST_STORE", str(tmp_path / "other.safetensors"))
    return tmp_path / "traffic.safetensors"


def child_of(observer: memsyn.Observer) -> subprocess.Popen[bytes]:
    process = observer._process
    assert process is not None
    assert process._child is not None
    return process._child


def normalised() -> nn.Module:
    conv = nn.Conv2d(1, 3, 3).to(memory_format=torch.channels_last)
    linear = prune.l1_unstructured(nn.Linear(48, 2), "weight", 10)
    return nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), linear).double().eval()


@pytest.mark.parametrize("estimator", ["mas", "mas-local"])
def test_the_sums_are_those_of_measure(estimator: str, store: Path) -> None:
    images = [torch.randn(1 + k % 3, 1, 6, 6, dtype=torch.float64) for k in range(12)]
    cases: list[tuple[nn.Module, list[Any], Any]] = [
        (a_model(), requests(30), None),
        (Gated(), [{"x": batch, "gate": 0.5} for batch in requests(9)], None),
        (a_model(), requests(9), first_half),
        (normalised(), images, None),
    ]
    for index, (model, batches, forward) in enumerate(cases[: 4 if estimator == "mas" else 1]):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        place = store.with_name(f"{index}.safetensors")
        with begin(model, place, estimator=estimator, forward=forward, process=True) as observer:
            for batch in batches:
                observer.observe(batch)
            assert observer.flush()
            assert observer.stats().last_error is None
            assert child_of(observer).poll() is None
            assert_same(memsyn.Importance.load(place), measured(model, batches, estimator=estimator, forward=forward))
            child = child_of(observer)
        assert child.returncode is not None
        assert not (store.parent / "other.safetensors").exists(), "an observer in the process that measures"
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_fails_there_is_said_here(store: Path) -> None:
    model, batches = a_model(), requests(12)
    with begin(model, store, process=True, cap=0.5) as observer:
        for batch in batches:
            observer.observe(batch)
        observer.observe(torch.full((2, 4), torch.nan, dtype=torch.float64))
        observer.observe(torch.zeros(1, 3, dtype=torch.float64))
        assert observer.flush()
        stats = observer.stats()
        assert (stats.invalid, stats.dropped) == (3, 0)
        assert "the model failed on it" in str(stats.last_error)
        assert_same(observer.importance(), measured(model, batches))


def test_other_weights_go_to_the_same_process(store: Path) -> None:
    model = a_model()
    with begin(model, store, process=True) as observer:
        children = set()
        for seed in (0, 1, 2):
            model.load_state_dict(a_model(seed).state_dict())
            batches = requests(6, seed)
            for batch in batches:
                observer.observe(batch)
            assert observer.flush()
            assert_same(observer.importance(), measured(model, batches))
            children.add(child_of(observer))
        assert len(children) == 1
        assert observer.stats().versions == 3


def test_a_process_that_dies_loses_its_batch_and_is_replaced_twice(
    store: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = Fatal(4, 2).double()
    Fatal.home = os.getpid()
    good = [batch for batch in requests(12) if len(batch) == 1]
    bad = torch.full((1, 4), 13.0, dtype=torch.float64)
    with begin(model, store, process=None, max_batch=1) as observer:
        for k, (batch, lost) in enumerate([(good[0], 1), (good[1], 2), (good[2], 3)]):
            observer.observe(batch)
            observer.observe(bad)
            assert observer.flush()
            stats = observer.stats()
            assert (stats.dropped, stats.errors) == (lost, lost), k
        assert "ended (exit status 7)" in str(stats.last_error)
        for batch in (good[3], bad):
            observer.observe(batch)
        assert observer.flush()
        assert_same(observer.importance(), measured(model, [*good[:4], bad]))
    assert "a model may print" in capfd.readouterr().err
    assert ["ended 3 times, the last time with exit status 7" in record.getMessage() for record in caplog.records] == [
        False,
        True,
    ]


def test_deaths_before_a_steady_time_do_not_count(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memsyn.live.child_process.STEADY", 1)
    Fatal.home = os.getpid()
    with begin(Fatal(4, 2).double(), store, process=None, max_batch=1) as observer:
        for _ in range(4):
            observer.observe(torch.ones(1, 4, dtype=torch.float64))
            observer.observe(torch.full((1, 4), 13.0, dtype=torch.float64))
            assert observer.flush()
        observer.observe(torch.ones(1, 4, dtype=torch.float64))
        assert observer.flush()
        assert (observer.stats().measured, observer.stats().dropped) == (5, 4)
        assert child_of(observer).poll() is None


def test_a_model_that_was_moved_is_measured_where_it_is(store: Path) -> None:
    process, model = Process(required=False), nn.Linear(4, 2, device="meta")
    ledger = Ledger(
        model, Window, forward=None, estimator=ESTIMATORS["mas"], cap=None, store=store, fingerprint="", process=process
    )
    assert process.refused
    assert type(ledger.run) is Run


def local_class() -> nn.Module:
    class Local(nn.Linear):
        pass

    return Local(4, 2).double()


def elsewhere() -> nn.Module:
    Elsewhere.home = os.getpid()
    return Elsewhere(4, 2).double()


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 2).double())


@pytest.mark.parametrize(
    ("make", "told"),
    [(local_class, "Local"), (parametrized, "parametrized"), (elsewhere, "another importance")],
)
def test_what_cannot_be_sent_is_measured_in_a_thread_or_refused(
    make: Any, told: str, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, batches = make(), requests(8)
    with caplog.at_level(logging.WARNING, "memsyn"), begin(model, store, process=None) as observer:
        for batch in batches:
            observer.observe(batch)
        assert observer.flush()
        assert observer.stats().last_error is None
        assert_same(observer.importance(), measured(model, batches))
    assert [told in record.getMessage() for record in caplog.records] == [True]
    with begin(model, store, process=True) as observer:
        observer.observe(batches[0])
        assert observer.flush()
        assert told in str(observer.stats().last_error)
        assert observer.stats().measured == 0


def test_a_forward_without_a_name_is_measured_in_a_thread(store: Path) -> None:
    model, batches = a_model(), requests(5)

    def forward(model: nn.Module, batch: Tensor) -> Any:
        return model(batch)

    with begin(model, store, process=None, forward=forward) as observer:
        for batch in batches:
            observer.observe(batch)
        assert observer.flush()
        assert_same(observer.importance(), measured(model, batches))


@pytest.mark.parametrize("process", [None, True])
@pytest.mark.parametrize(("make", "told"), [(Cached, "twice"), (Stray, "itself")])
def test_what_cannot_be_measured_here_is_not_measured_there(make: Any, told: str, process: Any, store: Path) -> None:
    with begin(make(), store, process=process) as observer:
        observer.observe(requests(1)[0])
        assert observer.flush()
        assert told in str(observer.stats().last_error)
        assert observer.stats().measured == 0


def test_a_batch_that_shows_nothing_proves_nothing(store: Path) -> None:
    Elsewhere.home = os.getpid()
    model, batches = Elsewhere(4, 2, bias=False).double(), requests(6)
    with begin(model, store, process=None, max_batch=1) as observer:
        observer.observe(torch.zeros(1, 4, dtype=torch.float64))
        for batch in batches:
            observer.observe(batch)
        assert observer.flush()
        assert_same(observer.importance(), measured(model, [torch.zeros(1, 4, dtype=torch.float64), *batches]))


def test_a_parameter_that_showed_nothing_is_compared_later(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    Shifted.home = os.getpid()
    model, batches = Shifted(4, 2).double(), [torch.zeros(1, 4, dtype=torch.float64), *requests(6)]
    with begin(model, store, process=None, max_batch=1) as observer:
        for batch in batches:
            observer.observe(batch)
        assert observer.flush()
        assert_same(observer.importance(), measured(model, batches))
    assert ["another importance of weight" in record.getMessage() for record in caplog.records] == [True]


def test_it_ends_with_the_observer_though_it_is_at_work(store: Path) -> None:
    Slow.home = os.getpid()
    observer = begin(Slow(4, 2).double(), store, process=True, max_batch=2, budget=100.0)
    one, two = (torch.ones(size, 4, dtype=torch.float64) for size in (1, 2))
    observer.observe(one)
    assert observer.flush()
    observer.observe(two)
    child, end = child_of(observer), time.monotonic() + 60
    while Path(f"/proc/{child.pid}/wchan").read_text() == "pipe_read":
        assert time.monotonic() < end
        time.sleep(0.01)
    observer.close(timeout=0.1)
    assert child.poll() is not None
    assert observer.stats().measured == 1
    assert observer._process is not None
    with pytest.raises(ModelError, match="closed"):
        observer._process.ask({}, [])
    observer._worker._thread.join(30)
    assert "the observer is closed" in str(observer.stats().last_error)
    assert child.stdin is not None
    assert child.stdin.closed


def test_no_process_outlives_a_service_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, torch, memsyn\n"
        "from memsyn.live.child_process import Process\n"
        "observer = memsyn.Observer(torch.nn.Linear(4, 2), sys.argv[1], rate=1.0, process=True)\n"
        "observer.observe(torch.ones(1, 4))\n"
        "observer.flush()\n"
        "print(observer._process._child.pid, flush=True)\n"
        "import time; time.sleep(600)\n"
    )
    service = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "it.safetensors")], stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    child = int(service.stdout.readline())
    os.kill(child, 0)
    service.send_signal(signal.SIGKILL)
    service.communicate()
    end = time.monotonic() + 30
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_fork_leaves_the_process_to_its_owner(store: Path) -> None:
    with begin(a_model(), store, process=True) as observer:
        observer.observe(requests(1)[0])
        assert observer.flush()
        pid = os.fork()
        if pid == 0:
            observer.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert child_of(observer).poll() is None


def test_it_needs_an_interpreter(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ModelError, match="no Python interpreter"):
        Process(required=True).ask({}, [])
    model, batches = a_model(), requests(5)
    with begin(model, store, process=None) as observer:
        for batch in batches:
            observer.observe(batch)
        assert observer.flush()
        assert_same(observer.importance(), measured(model, batches))
