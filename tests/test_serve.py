"""The service of examples/serve: requests over HTTP, what is observed of them, reloads, and the night's decision."""

import io
import json
import re
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench.tests import tiny
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import memsyn

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve: pip install 'memsyn[serve]'")
pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'memsyn[serve]'")
pytest.importorskip("prometheus_client", reason="needs the extra serve: pip install 'memsyn[serve]'")
Image = pytest.importorskip("PIL.Image", reason="needs the extra serve: pip install 'memsyn[serve]'")

SIDE = 8


class TinyBody(nn.Sequential):
    """What learns three kinds of noise in moments, and forgets them as fast."""

    num_features = 16

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * SIDE**2, 16), nn.Tanh())


@pytest.fixture(scope="module")
def own():
    """The example's modules, with a network and drawings that take moments."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "examples" / "serve")
        import model
        import nightly
        import service
        import train
        import users

        tasks = {name: tiny.make_task(k, SIDE) for k, name in enumerate(("one", "two", "three", "four"))}
        patch.setitem(model.BODIES, "tiny", TinyBody)
        for module in (nightly, users):
            patch.setattr(module, "drawings", lambda side: tasks)
        for module in (train, users):
            patch.setattr(module, "augment", tiny.augment)
        yield SimpleNamespace(model=model, nightly=nightly, service=service, train=train, users=users, tasks=tasks)
    torch.set_num_threads(threads)


@pytest.fixture
def folder(own, tmp_path):
    """With a first version that knows two sections."""
    names = {section: own.tasks[section].class_names for section in ("one", "two")}
    torch.manual_seed(0)
    served = own.model.begin("tiny", SIDE, names)
    lessons = {k: (own.tasks[s].train_images, own.tasks[s].train_labels) for k, s in enumerate(names)}
    own.train.learn(served.network, lessons, own.train.optimizer_of(served.network, 0.01), epochs=15, seed=0)
    own.model.save(served, tmp_path / own.model.FILE)
    return tmp_path


@pytest.fixture
def replica(own, folder):
    """A service that measures every request, at a port of its own."""
    app = own.service.create_app(folder, "1", rate=1.0, budget=100.0, interval=1e6, room=10_000, min_samples=1)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield SimpleNamespace(port=server.servers[0].sockets[0].getsockname()[1], observer=app.state.observer)
    server.should_exit = True
    thread.join()


def call(replica, method, path, body=None):
    connection = HTTPConnection("127.0.0.1", replica.port, timeout=30)
    connection.request(method, path, body)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text if path == "/metrics" else json.loads(text)


def metrics(replica):
    lines = call(replica, "GET", "/metrics")[1].splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def night(own, replica, folder, monkeypatch, *arguments):
    url = f"http://127.0.0.1:{replica.port}"
    given = ["--folder", folder, "--reload", url, "--lr", 0.05, "--epochs", 20, *arguments]
    monkeypatch.setattr(sys, "argv", ["nightly.py", *map(str, given)])
    return own.nightly.main()


def test_a_drawing_is_named_and_observed(own, folder, replica):
    pixels, places, _ = own.users.drawn(["one", "two"], 20, SIDE, seed=3)
    found = own.users.ask([replica.port], ["one", "two"], pixels, places)
    served = own.model.load(folder / own.model.FILE)
    images = (255.0 - pixels) / 127.5
    for image, place, answer in zip(images, places.tolist(), found, strict=True):
        scores = served.network(image[None], place).softmax(1)[0]
        assert answer["names"] == [("a", "b", "c")[k] for k in scores.argsort(descending=True).tolist()]
        assert answer["scores"] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-3)
        assert answer["version"] == 1
    counts = metrics(replica)
    assert counts['serve_requests_total{section="two"}'] == int(places.sum())
    assert counts["memsyn_observer_seen_total"] == counts["memsyn_observer_sampled_total"] == 20
    assert not list(folder.glob("traffic*"))
    assert replica.observer.flush()
    assert metrics(replica)["memsyn_observer_measured_total"] == 20
    batches = [{"inputs": images[places == k], "task": k} for k in (0, 1)]
    expected = memsyn.measure(served.network, batches, progress=False)
    stored = memsyn.Importance.load(folder / "traffic-1.safetensors")
    assert stored.num_samples == 20
    for name, total in expected.sums.items():
        assert torch.allclose(stored.sums[name], total, rtol=1e-4, atol=1e-6), name
    assert {path.name for path in folder.iterdir() if path.suffix != ".lock"} == {
        "model.safetensors",
        "traffic-1.safetensors",
    }, "no input is kept"


def test_what_is_no_drawing_is_refused(own, folder, replica):
    wide = io.BytesIO()
    Image.new("RGB", (own.service.WIDEST + 1, 1)).save(wide, "PNG")
    good = own.users.png(torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    for path, body, status, says in (
        ("/predict/nine", good, 404, "take one of one, two"),
        ("/predict/one", b"nothing", 422, "no PNG"),
        ("/predict/one", good[:-40], 422, "no PNG"),
        ("/predict/one", wide.getvalue(), 422, "1024 at most"),
        ("/predict/one", bytes(own.service.LARGEST + 1), 413, "at most"),
    ):
        found, answer = call(replica, "POST", path, body)
        assert found == status
        assert says in answer["detail"]
    assert call(replica, "POST", "/predict/one", good)[0] == 200
    assert metrics(replica)["memsyn_observer_seen_total"] == 1


def test_a_damaged_version_is_not_loaded(own, folder, replica):
    (folder / own.model.FILE).write_bytes(b"half")
    status, answer = call(replica, "POST", "/reload")
    assert status == 409
    assert "version 1 goes on serving" in answer["detail"]
    assert "train.py" in answer["detail"]
    assert call(replica, "GET", "/healthz")[1]["version"] == 1


LENIENT = ("--min-agreement", 0.9, "--max-change", 0.2)
"""For days of 60 requests."""


def test_the_night_accepts_what_answers_as_before(own, folder, replica, monkeypatch, capsys):
    """And all replicas' sums are in the memory; the observer goes on in another file."""
    right = own.users.day(folder, [replica.port], ["one", "two"], 60, SIDE, seed=1)
    assert right > 0.8
    assert replica.observer.flush()
    served = own.model.load(folder / own.model.FILE)
    with memsyn.Observer(served.network, folder / "traffic-2.safetensors", rate=1.0, min_samples=1) as other:
        other.observe({"inputs": own.tasks["one"].test_images, "task": 0})
        assert other.flush()
    first = (folder / "traffic-1.safetensors").read_bytes()

    assert night(own, replica, folder, monkeypatch, "--learn", "three", "--strength", 100, *LENIENT) == 0
    output = capsys.readouterr().out
    assert "72 samples from 2 replicas" in output
    assert "Compared: 60 samples. Answers are classes" in output
    assert re.search(r"^Same answer by segment: one \d+\.\d%, two \d+\.\d%\.$", output, re.MULTILINE)
    assert re.search(r"^Safe\. \d+\.\d% of 60 samples give the same answer", output, re.MULTILINE)
    assert re.search(r"^  one: \d+ of \d+ right before, \d+ now$", output, re.MULTILINE)
    assert "accepted: version 2 is served." in output
    (entry,) = memsyn.Memory.load(folder / "memory-1.safetensors").history
    assert entry.num_samples == 72
    assert own.model.load(folder / "model-1.safetensors").version == 1
    assert call(replica, "GET", "/healthz")[1] == {"status": "ok", "version": 2, "sections": ["one", "two", "three"]}
    assert metrics(replica)["serve_version"] == 2

    own.users.day(folder, [replica.port], ["one", "two", "three"], 30, SIDE, seed=2)
    assert replica.observer.flush()
    assert (folder / "traffic-1.safetensors").read_bytes() == first
    (after,) = folder.glob("traffic-1.*.safetensors")
    stale = replica.observer.stats().stale
    found = memsyn.Importance.load(after)
    assert found.num_samples == 30 - stale > 0
    assert "heads.2.weight" in found.sums

    fewer = ("--min-agreement", 0.8, "--max-change", 0.2)
    assert night(own, replica, folder, monkeypatch, "--learn", "four", "--strength", 100, *fewer) == 0
    assert f"{30 - stale} samples from 1 replicas" in capsys.readouterr().out, "of the present version alone"
    assert [entry.rule for entry in memsyn.Memory.load(folder / "memory-2.safetensors").history] == ["ema", "ema"]


@pytest.mark.parametrize("labels", [True, False])
def test_the_night_refuses_what_forgets_too_much(own, folder, replica, monkeypatch, capsys, labels):
    own.users.day(folder, [replica.port], ["one", "two"], 60, SIDE, seed=1)
    if not labels:  # as a real service has it
        with safe_open(folder / own.users.YESTERDAY, framework="pt") as file:
            kept, facts = {name: file.get_tensor(name) for name in ("pixels", "places")}, file.metadata()
        save_file(kept, folder / own.users.YESTERDAY, facts)
    assert replica.observer.flush()
    before = (folder / own.model.FILE).read_bytes()
    assert night(own, replica, folder, monkeypatch, "--learn", "three", "--strength", 0, *LENIENT) == 1
    output = capsys.readouterr().out
    assert re.search(r"^Broken\. \d+\.\d% of 60 samples give the same answer", output, re.MULTILINE)
    assert ("right before" in output) == labels
    assert "REFUSED: version 1 goes on. Try a larger --strength" in output
    assert (folder / own.model.FILE).read_bytes() == before
    assert call(replica, "GET", "/healthz")[1]["version"] == 1
    assert not (folder / "model-1.safetensors").exists()


def test_the_night_refuses_what_cannot_be_said(own, folder, replica, monkeypatch, capsys):
    """60 requests are too few for the thresholds that nobody set."""
    own.users.day(folder, [replica.port], ["one", "two"], 60, SIDE, seed=1)
    assert replica.observer.flush()
    assert night(own, replica, folder, monkeypatch, "--learn", "three", "--strength", 1e6) == 1
    output = capsys.readouterr().out
    assert "Cannot say. 100.0% of 60 samples give the same answer" in output
    assert "There are too few samples: give at least 125." in output
    assert call(replica, "GET", "/healthz")[1]["version"] == 1


def test_the_night_needs_traffic(own, folder, replica, monkeypatch):
    with pytest.raises(SystemExit, match="no replica has observed version 1"):
        night(own, replica, folder, monkeypatch, "--learn", "three")
    with pytest.raises(SystemExit, match="learn another section"):
        night(own, replica, folder, monkeypatch, "--learn", "two")
