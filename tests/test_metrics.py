"""The metrics of an observer: names, units, counts, the table in the docs, and a Prometheus that reads them."""

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import torch
from torch import Tensor, nn

import memsyn
from tests.serving import a_model, begin, requests

client = pytest.importorskip("prometheus_client", reason="needs the extra observe: make install brings it")
from memsyn.integrations.prometheus import export  # noqa: E402

ROOT = Path(__file__).parents[1]
Found = TypeVar("Found")

PROMETHEUS = pytest.mark.skipif(  # never in CI, which installs it
    not (shutil.which("prometheus") and shutil.which("promtool")) and os.environ.get("CI") != "true",
    reason="needs Debian's package prometheus: apt-get install prometheus",
)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "traffic.safetensors"


def scraped(registry: Any) -> dict[str, float]:
    """What one scrape reads: sample with its labels -> value."""
    lines = client.generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def awaited(read: Callable[[], Found], is_there: Callable[[Found], bool], seconds: float = 20.0) -> Found:
    """The first reading that is as expected, or the last one in time."""
    end = time.monotonic() + seconds
    while not is_there(found := read()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def exported(store: Path) -> dict[str, tuple[str, str]]:
    """Metric -> its type and its help."""
    registry = client.CollectorRegistry()
    with begin(a_model(), store) as observer:
        export(observer, registry, memory=store)
        text = client.generate_latest(registry).decode()
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    return {name: (kind, helps[name]) for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)}


def table() -> list[tuple[str, str, str]]:
    """The rows of the docs: name, type, unit."""
    section = (ROOT / "docs" / "live.md").read_text(encoding="utf-8").split("\n## Metrics\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)[^|]*` \| (\w+) \| ([^|]+) \|", section, re.MULTILINE)


def test_the_table_in_the_docs_has_what_is_exported(store: Path) -> None:
    found = {(name, kind) for name, (kind, _) in exported(store).items()}
    assert {(name, kind) for name, kind, _ in table()} == found
    assert len(table()) == len(found)


def test_names_follow_the_rules_of_prometheus(store: Path) -> None:
    units = {name: unit for name, _, unit in table()}
    for name, (kind, _) in exported(store).items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert ("_seconds" in name) == (units[name] == "seconds"), name
        assert re.fullmatch(r"memsyn_observer_[a-z_]+", name)


@PROMETHEUS
def test_promtool_has_nothing_to_say_of_the_names(store: Path) -> None:
    registry = client.CollectorRegistry()
    with begin(a_model(), store) as observer:
        export(observer, registry)
        text = client.generate_latest(registry)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


class Moody(nn.Module):
    """Gives NaN for a 7."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.where(x == 7, math.nan, x))


def test_each_sample_is_dropped_for_one_reason(store: Path) -> None:
    model, registry = Moody(), client.CollectorRegistry()
    observer = begin(model, store, room=4)
    export(observer, registry)
    observer.observe(torch.full((4, 1), 1.0))
    assert observer.flush()
    observer.observe(torch.full((6, 1), 1.0))  # two too many
    assert observer.flush()
    observer.observe(torch.full((3, 1), 7.0))
    assert observer.flush()
    handle = model.register_forward_hook(lambda *given: None)  # it may compute: nothing can be measured
    observer.observe(torch.full((2, 1), 1.0))
    observer.flush()
    handle.remove()
    found = scraped(registry)
    reasons = {
        name.split('"')[1]: value for name, value in found.items() if name.startswith("memsyn_observer_dropped_total")
    }
    assert reasons == {"queue_full": 2, "error": 2, "invalid": 3, "stale": 0, "closed": 0}
    assert found["memsyn_observer_measured_total"] == 8
    assert found["memsyn_observer_sampled_total"] == 8 + sum(reasons.values())
    observer.close()


def test_samples_that_wait_when_an_observer_is_closed_are_dropped(store: Path) -> None:
    registry = client.CollectorRegistry()
    observer = begin(a_model(), store, max_batch=2, busy=lambda: True)
    export(observer, registry)
    for batch in requests(9):
        observer.observe(batch)
    observer.close()
    found = scraped(registry)
    closed = found['memsyn_observer_dropped_total{reason="closed"}']
    assert found["memsyn_observer_measured_total"] == 18 - closed
    assert closed >= 15
    assert found["memsyn_observer_waiting"] == 0


def test_the_store_ages(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the observer's begin, so that a store that was never written is seen too."""
    registry = client.CollectorRegistry()
    with begin(a_model(), store) as observer:
        export(observer, registry)
        later = time.time() + 3600
        monkeypatch.setattr("memsyn.integrations.prometheus.time.time", lambda: later)
        assert scraped(registry)["memsyn_observer_store_age_seconds"] == pytest.approx(3600, abs=30)
        monkeypatch.undo()
        observer.observe(requests(1)[0])
        assert observer.flush()
        assert 0 <= scraped(registry)["memsyn_observer_store_age_seconds"] < 30


def test_errors_and_busy_seconds_count(store: Path) -> None:
    registry = client.CollectorRegistry()
    with begin(a_model(), store) as observer:
        export(observer, registry)
        observer.observe("nothing")
        observer.observe(requests(1)[0])
        assert observer.flush()
        found = scraped(registry)
    assert found["memsyn_observer_errors_total"] == 1
    assert 0 < found["memsyn_observer_busy_seconds_total"] < 30


# Drift


def a_wide_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))


def halves() -> tuple[Tensor, Tensor]:
    """Requests that use the first eight inputs only, and requests that use the others."""
    torch.manual_seed(1)
    first, second = torch.randn(64, 16), torch.randn(64, 16)
    first[:, 8:] *= 0.01
    second[:, :8] *= 0.01
    return first, second


@pytest.mark.parametrize("kind", ["memory", "importance", "path"])
def test_drift_is_seen_against_a_memory(kind: str, store: Path, tmp_path: Path) -> None:
    model, (first, second) = a_wide_model(), halves()
    importance = memsyn.measure(model, [first], progress=False)
    memory = memsyn.Memory.empty().consolidate(model, importance)
    memory.save(tmp_path / "memory.safetensors")
    given = {"memory": memory, "importance": importance, "path": tmp_path / "memory.safetensors"}[kind]
    found = {}
    for name, data in (("same", first), ("other", second)):
        registry = client.CollectorRegistry()
        with begin(model, store.with_name(f"{name}.safetensors"), max_batch=8) as observer:
            export(observer, registry, memory=given)
            for batch in data.split(8):
                observer.observe(batch)
            assert observer.flush()
            read = awaited(
                lambda registry=registry: scraped(registry),  # type: ignore[misc]
                lambda found: not math.isnan(found["memsyn_observer_memory_correlation"]),
            )
            found[name] = read["memsyn_observer_memory_correlation"]
            assert read["memsyn_observer_converged"] == pytest.approx(observer.converged())
            assert found[name] == pytest.approx(observer.correlation(importance.mean()))
    assert found["same"] == pytest.approx(1.0)
    assert found["other"] < 0.5


def test_a_memory_that_comes_later_and_changes_is_read(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memsyn.integrations.prometheus.REFRESH", 0.0)
    model, (first, second) = a_wide_model(), halves()
    path, registry = tmp_path / "memory.safetensors", client.CollectorRegistry()

    def correlation() -> float:
        return scraped(registry)["memsyn_observer_memory_correlation"]

    with begin(model, store) as observer:
        export(observer, registry, memory=path)
        observer.observe(first)
        assert observer.flush()
        assert math.isnan(correlation())
        memsyn.measure(model, [second], progress=False).save(path)
        assert awaited(correlation, lambda found: not math.isnan(found)) < 0.5
        memsyn.measure(model, [first], progress=False).save(path)
        assert awaited(correlation, lambda found: found > 0.5) == pytest.approx(1.0)


def test_a_memory_that_cannot_be_read_is_said_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("memsyn.integrations.prometheus.REFRESH", 0.0)
    path, registry = tmp_path / "memory.safetensors", client.CollectorRegistry()
    path.write_bytes(b"half a file")
    with begin(a_wide_model(), store) as observer:
        export(observer, registry, memory=path)
        for _ in range(5):
            assert math.isnan(scraped(registry)["memsyn_observer_memory_correlation"])
            time.sleep(0.05)
    (said,) = [record.getMessage() for record in caplog.records if "drift" in record.getMessage()]
    assert "memory.safetensors" in said


def test_a_scrape_computes_no_ranks(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service answers a scrape in its event loop: ranks are computed in a thread, at intervals."""
    model, registry, calls = a_wide_model(), client.CollectorRegistry(), []

    def slow(self: memsyn.Observer, *given: Any) -> float:
        calls.append(time.monotonic())
        time.sleep(0.3)
        return 0.75

    monkeypatch.setattr(memsyn.Observer, "converged", slow)
    with begin(model, store) as observer:
        export(observer, registry)
        began = time.monotonic()
        for _ in range(20):
            scraped(registry)
        assert time.monotonic() - began < 0.25
        read = awaited(lambda: scraped(registry), lambda found: found["memsyn_observer_converged"] == 0.75)
        assert read["memsyn_observer_converged"] == 0.75
    assert len(calls) == 1, "once in an interval"


def test_an_observer_of_factors_has_no_correlation(store: Path) -> None:
    with begin(a_wide_model(), store, estimator="kronecker") as observer:
        with pytest.raises(memsyn.OptionError, match="measures factors, not an importance per weight"):
            export(observer, client.CollectorRegistry(), memory=store)
        export(observer, registry := client.CollectorRegistry())
        assert "memsyn_observer_memory_correlation" not in scraped(registry)


def test_correlation_is_of_shared_weights(store: Path) -> None:
    model, (first, _) = a_wide_model(), halves()
    omega = memsyn.measure(model, [first], progress=False).mean()
    with begin(model, store) as observer:
        assert math.isnan(observer.correlation(omega)), "nothing is measured yet"
        observer.observe(first)
        assert observer.flush()
        assert observer.correlation({"other": torch.ones(3)} | omega) == pytest.approx(1.0)
        assert observer.correlation({name: -own for name, own in omega.items()}) == pytest.approx(-1.0)
        assert math.isnan(observer.correlation({"other": torch.ones(3)}))


# A real Prometheus


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Runs Debian's Prometheus; gives a call that starts it on targets, and then asks its HTTP API."""
    servers = []

    def start(targets: str) -> Callable[[str], Any]:
        configured = (ROOT / "deploy" / "prometheus.yml").read_text(encoding="utf-8")
        configured = re.sub(r"targets: \[.*\]", f"targets: [{targets}]", configured)
        configured = re.sub(r"(scrape|evaluation)_interval: \S+", r"\1_interval: 200ms", configured)
        configured = re.sub(r"/etc/prometheus/", f"{ROOT / 'deploy'}/", configured)
        (tmp_path / "prometheus.yml").write_text(configured, encoding="utf-8")
        port = free_port()
        command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", "--log.level=error"]
        command += [f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"]
        servers.append(subprocess.Popen(command))

        def ask(path: str) -> Any:
            try:
                with urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=5) as response:
                    return json.load(response)["data"]
            except OSError:
                return None

        return ask

    yield start
    for server in servers:
        server.terminate()
        server.wait(20)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@PROMETHEUS
def test_prometheus_scrapes_an_observer(prometheus: Any, store: Path) -> None:
    registry = client.CollectorRegistry()
    with begin(a_model(), store) as observer:
        export(observer, registry)
        server, thread = client.start_http_server(0, "127.0.0.1", registry)
        try:
            for batch in requests(20):
                observer.observe(batch)
            assert observer.flush()
            ask = prometheus(f"'127.0.0.1:{server.server_port}'")
            query = "query?" + urlencode({"query": 'sum(memsyn_observer_measured_total{job="memsyn"})'})
            data = awaited(lambda: ask(query), lambda data: bool(data and data["result"]))
            assert float(data["result"][0]["value"][1]) == observer.stats().measured == 39
            rules = awaited(lambda: ask("rules"), lambda data: bool(data and data["groups"]))
            alerts = [rule for group in rules["groups"] for rule in group["rules"]]
            evaluated = awaited(
                lambda: [rule["health"] for group in ask("rules")["groups"] for rule in group["rules"]],
                lambda found: set(found) == {"ok"},
            )
            assert evaluated == ["ok"] * len(alerts)
            assert len(alerts) >= 6
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
