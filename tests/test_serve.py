"""The service of examples/serve: requests over HTTP, what is observed of them, reloads, and the night's decision."""

import io
import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
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
from tests.serving import is_open, png_of_chunks

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
        import admission
        import http_limits
        import model
        import nightly
        import rollback
        import service
        import train
        import users

        tasks = {name: tiny.make_task(k, SIDE) for k, name in enumerate(("one", "two", "three", "four"))}
        patch.setitem(model.BODIES, "tiny", TinyBody)
        for module in (nightly, users):
            patch.setattr(module, "drawings", lambda side: tasks)
        for module in (train, users):
            patch.setattr(module, "augment", tiny.augment)
        modules = (admission, http_limits, model, nightly, rollback, service, train, users)
        yield SimpleNamespace(tasks=tasks, **{module.__name__: module for module in modules})
    torch.set_num_threads(threads)


@pytest.fixture
def folder(own, tmp_path):
    """With a first version that knows two sections."""
    names = {section: own.tasks[section].class_names for section in ("one", "two")}
    torch.manual_seed(0)
    served = own.model.begin("tiny", SIDE, names)
    lessons = {k: (own.tasks[s].train_images, own.tasks[s].train_labels) for k, s in enumerate(names)}
    own.train.learn(served.network, lessons, own.train.optimizer_of(served.network, 0.01), epochs=15, seed=0)
    own.admission.judge(tmp_path, served, "safe", "It is the first version.")
    own.model.save(served, tmp_path / own.model.FILE)
    return tmp_path


TOKEN = "a-secret-for-tests"


@pytest.fixture
def replica(own, folder, monkeypatch):
    """A service that measures every request, at a port of its own."""
    monkeypatch.setenv("SERVE_TOKEN", TOKEN)
    app = own.service.create_app(folder, "1", rate=1.0, budget=100.0, interval=1e6, room=10_000)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **own.http_limits.HTTP_OPTIONS))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield SimpleNamespace(
        port=server.servers[0].sockets[0].getsockname()[1],
        observer=app.state.observer,
        app=app,
        worker=app.state.worker,
    )
    server.should_exit = True
    thread.join()


def call(replica, method, path, body=None, **headers):
    connection = HTTPConnection("127.0.0.1", replica.port, timeout=30)
    if path == "/reload":
        headers = {"Authorization": f"Bearer {TOKEN}", **headers}
    connection.request(method, path, body, headers)
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
    pixels, places, _ = own.users.drawn(["one", "two"], 64, SIDE, seed=3)
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
    assert counts["memsyn_observer_seen_total"] == counts["memsyn_observer_sampled_total"] == 64
    assert not list(folder.glob("traffic*"))
    assert replica.observer.flush()
    assert metrics(replica)["memsyn_observer_measured_total"] == 64
    batches = [{"inputs": images[places == k], "task": k} for k in (0, 1)]
    expected = memsyn.measure(served.network, batches, progress=False)
    stored = memsyn.Importance.load(folder / "traffic-1.safetensors")
    assert stored.num_samples == 64
    for name, total in expected.sums.items():
        assert torch.allclose(stored.sums[name], total, rtol=1e-4, atol=1e-6), name
    verdict = own.admission.beside(folder, "verdict", memsyn.fingerprint(served.network)).name
    seen = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
    assert seen == {"model.safetensors", "traffic-1.safetensors", verdict}, "no input is kept"


def test_what_is_no_drawing_is_refused(own, folder, replica):
    wide = io.BytesIO()
    Image.new("RGB", (own.service.WIDEST + 1, 1)).save(wide, "PNG")
    good = own.users.png(torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    for path, body, status, says in (
        ("/predict/nine", good, 404, "take one of one, two"),
        ("/predict/one", b"nothing", 422, "send one PNG"),
        ("/predict/one", good[:-40], 422, "send one PNG"),
        ("/predict/one", wide.getvalue(), 422, "1024 pixels at most"),
        ("/predict/one", png_of_chunks(60_000, 60_000), 422, "1024 pixels at most"),
        ("/predict/one", png_of_chunks(8, 8, text=2**26), 422, "send one PNG"),
        ("/predict/one", bytes(own.service.LARGEST + 1), 413, "at most"),
    ):
        found, answer = call(replica, "POST", path, body)
        assert found == status
        assert says in answer["detail"]
        assert not re.search(r"0x[0-9a-f]{6}|/tmp|/home|Error", str(answer)), "no address, path or class"
    assert call(replica, "POST", "/predict/one", good)[0] == 200
    assert metrics(replica)["memsyn_observer_seen_total"] == 1


def test_an_upload_that_ends_early_is_one_request_and_no_log(replica, capfd):
    for part in (b"", b"abc"):
        with socket.create_connection(("127.0.0.1", replica.port)) as sender:
            sender.sendall(b"POST /predict/one HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + part)
            time.sleep(0.1)
    assert call(replica, "GET", "/healthz")[0] == 200
    assert capfd.readouterr().err == ""


HALVES = (
    b"",
    b"POST /predict/one HTTP/1.1\r\nHost:",
    b"POST /predict/one HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc",
    b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc",  # answered, and goes on sending
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /hea",  # the second request of a connection
)


def test_half_sent_requests_do_not_stay_open(own, replica, monkeypatch):
    monkeypatch.setattr(own.http_limits, "RECEIVE", 0.5)
    senders = [socket.create_connection(("127.0.0.1", replica.port)) for _ in range(50)]
    for k, sender in enumerate(senders):
        sender.sendall(HALVES[k % len(HALVES)])
    time.sleep(0.2)
    assert sum(map(is_open, senders)) == 50
    for _ in range(4):  # a byte now and then does not help
        for sender in senders:
            with suppress(OSError):
                sender.sendall(b"x")
        time.sleep(0.2)
    assert sum(map(is_open, senders)) == 0
    for sender in senders:
        sender.close()
    assert call(replica, "GET", "/healthz")[0] == 200


def test_half_sent_requests_lock_nobody_out(own, replica, monkeypatch):
    monkeypatch.setattr(own.http_limits, "MOST", 20)
    senders = [socket.create_connection(("127.0.0.1", replica.port)) for _ in range(200)]
    for sender in senders:
        sender.sendall(HALVES[2])
    for _ in range(20):
        assert call(replica, "GET", "/healthz")[0] == 200
    assert sum(map(is_open, senders)) <= 20
    for sender in senders:
        sender.close()


def test_an_answer_that_takes_long_is_waited_for(own, folder, replica, monkeypatch):
    monkeypatch.setattr(own.http_limits, "RECEIVE", 0.3)
    monkeypatch.setattr(own.service, "admitted", lambda folder: time.sleep(1) or own.admission.admitted(folder))
    os.utime(folder / own.model.FILE)
    assert call(replica, "POST", "/reload")[0] == 200


def test_a_reload_needs_the_token(own, folder, replica, monkeypatch):
    for headers, status in (
        ({"Authorization": ""}, 401),
        ({"Authorization": f"Bearer {TOKEN}x"}, 401),
        ({"Authorization": "Bearer \xe9"}, 401),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null", "Authorization": ""}, 403),
    ):
        found, answer = call(replica, "POST", "/reload", **headers)
        assert found == status, headers
        assert TOKEN not in str(answer)
    assert call(replica, "POST", "/reload", Origin=f"http://127.0.0.1:{replica.port}")[0] == 200
    assert call(replica, "GET", "/reload")[0] == 405
    replica.app.state.token = ""
    found, answer = call(replica, "POST", "/reload", Authorization="Bearer ")
    assert (found, answer["detail"]) == (403, "there is no token: set SERVE_TOKEN or SERVE_TOKEN_FILE.")
    monkeypatch.setenv("SERVE_TOKEN_FILE", str(folder / "token"))
    (folder / "token").write_text("another\n")
    assert sys.modules["replicas"].token() == "another"


def test_another_sites_page_cannot_send_drawings(own, replica):
    good = own.users.png(torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    assert call(replica, "POST", "/predict/one", good, Origin="http://evil.example")[0] == 403
    assert metrics(replica)["memsyn_observer_seen_total"] == 0
    assert call(replica, "GET", "/docs")[0] == call(replica, "GET", "/openapi.json")[0] == 404


def next_version(own, folder, change=None, verdict="safe"):
    """Put another version into the folder: with other weights, and another head."""
    served = own.model.load(folder / own.model.FILE)
    section = ("three", "four")[served.version - 1]
    served = own.model.grown(served, section, ("a", "b", "c"), seed=1)
    if change is not None:
        with torch.no_grad():
            change(served.network)
    if verdict is not None:
        own.admission.judge(folder, served, verdict, "It is a test.")
    own.model.save(served, folder / own.model.FILE)
    return served


def to_nan(network):
    network.heads[1].bias[0] = float("nan")


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        (to_nan, "safe", "1 of its tensors hold NaN or infinite values"),
        (lambda network: network.heads[2].weight.fill_(3e38), "safe", "its answers in three are NaN or infinite"),
        (None, None, "its verdict is 'missing', not 'safe'"),
        (None, "broken", "its verdict is 'broken', not 'safe'"),
        (None, "rolled back", "its verdict is 'rolled back', not 'safe'"),
    ],
)
def test_a_version_that_is_not_admitted_is_not_served(own, folder, replica, change, verdict, says):
    good = own.users.png(torch.full((3, SIDE, SIDE), 200, dtype=torch.uint8))
    before = call(replica, "POST", "/predict/one", good)[1]
    next_version(own, folder, change, verdict)
    for _ in range(2):
        status, answer = call(replica, "POST", "/reload")
        assert status == 409
        assert answer["detail"].startswith(f"version 1 goes on serving: {says}")
    assert call(replica, "POST", "/predict/one", good)[1] == before
    assert metrics(replica)['serve_reloads_total{result="refused"}'] == 2
    with pytest.raises(own.admission.AdmissionError, match=re.escape(says)):
        own.service.create_app(folder, "2")


@pytest.mark.parametrize(
    "damage", [b"half", b"", b"\xff" * 200, None, {"side": 10**9}, {"sections": []}, {"version": "x"}, {"body": "no"}]
)
def test_a_damaged_version_is_not_loaded(own, folder, replica, damage, capfd):
    path = folder / own.model.FILE
    if damage is None:
        path.unlink()
    elif isinstance(damage, dict):
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["served"])
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(kept, path, {"served": json.dumps({**facts, **damage})})
    else:
        path.write_bytes(damage)
    status, answer = call(replica, "POST", "/reload")
    assert (status, answer["detail"]) == (
        409,
        "version 1 goes on serving: the file is no model of this service: make one by train.py.",
    )
    assert call(replica, "GET", "/healthz")[1]["version"] == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_version_that_is_overwritten_while_it_is_loaded(own, folder, monkeypatch):
    """`cp` writes into the file. A mapped file that becomes shorter ends the process with SIGBUS."""
    path, real = folder / own.model.FILE, own.model._network
    expected = memsyn.fingerprint(own.model.load(path).network)

    def cut(*given):
        os.truncate(path, 8)
        return real(*given)

    monkeypatch.setattr(own.model, "_network", cut)
    assert memsyn.fingerprint(own.model.load(path).network) == expected


def test_a_model_without_a_finite_answer_is_said(own, folder, replica):
    with torch.no_grad():
        replica.worker.served.network.heads[0].bias.fill_(float("nan"))
    good = own.users.png(torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    assert call(replica, "POST", "/predict/one", good) == (
        503,
        {"detail": "the model has no finite answer to this drawing."},
    )


def test_a_reload_waits_for_nobody_and_makes_nothing_stale(own, folder, replica, monkeypatch):
    """Predictions are answered while a version is built; those that wait to be measured are, at their own weights."""
    pixels, places, _ = own.users.drawn(["one", "two"], 64, SIDE, seed=3)
    own.users.ask([replica.port], ["one", "two"], pixels, places)
    first = own.model.load(folder / own.model.FILE)
    second = next_version(own, folder, lambda network: network.body[1].weight.mul_(1.5))
    built = threading.Event()

    def slow(folder):
        time.sleep(1.5)
        found = own.admission.admitted(folder)
        built.set()
        return found

    monkeypatch.setattr(own.service, "admitted", slow)
    reloading = threading.Thread(target=call, args=(replica, "POST", "/reload"))
    reloading.start()
    good, longest = own.users.png(pixels[0]), 0.0
    while not built.is_set():
        begun = time.monotonic()
        assert call(replica, "POST", "/predict/one", good)[1]["version"] == 1
        longest = max(longest, time.monotonic() - begun)
    reloading.join()
    assert longest < 1.0
    assert call(replica, "POST", "/predict/three", good)[1]["version"] == 2
    stats = replica.observer.stats()
    assert (stats.stale, stats.dropped, stats.waiting) == (0, 0, 1)
    store = memsyn.Importance.load(folder / "traffic-1.safetensors")
    assert store.matches(first.network)
    assert not store.matches(second.network)
    assert store.num_samples == stats.measured >= 65


def test_a_worker_follows_the_file(own, folder, replica):
    next_version(own, folder, verdict="broken")
    time.sleep(1.2)
    assert call(replica, "GET", "/healthz")[1]["version"] == 1
    next_version(own, folder)
    end = time.monotonic() + 10
    while call(replica, "GET", "/healthz")[1]["version"] != 3:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_each_worker_has_a_store_of_its_own(own, folder, monkeypatch):
    """Also if two replicas were given one name; and a place that is given back is taken again."""
    places = [own.service.own_store(folder, "a") for _ in range(3)]
    assert [(place, path.name) for place, path, _ in places] == [
        (1, "traffic-a.safetensors"),
        (2, "traffic-a_2.safetensors"),
        (3, "traffic-a_3.safetensors"),
    ]
    places[1][2].close()
    places.append(own.service.own_store(folder, "a"))
    assert places[-1][0] == 2
    for _, _, lock in places:
        lock.close()
    for text in ("a_2", "../a", ""):
        with pytest.raises(own.service.argparse.ArgumentTypeError, match="take letters, digits and dashes"):
            own.service.replica_name(text)


LENIENT = ("--min-agreement", 0.9, "--max-change", 0.2, "--min-samples", 64)
"""For days of 64 requests."""


def test_the_night_accepts_what_answers_as_before(own, folder, replica, monkeypatch, capsys):
    """And all replicas' sums are in the memory; the observer goes on in another file."""
    right = own.users.day(folder, [replica.port], ["one", "two"], 64, SIDE, seed=1)
    assert right > 0.8
    assert replica.observer.flush()
    served = own.model.load(folder / own.model.FILE)
    with memsyn.Observer(served.network, folder / "traffic-2.safetensors", rate=1.0) as other:
        for _ in range(6):  # 72 drawings
            other.observe({"inputs": own.tasks["one"].test_images, "task": 0})
        assert other.flush()
    first = (folder / "traffic-1.safetensors").read_bytes()

    assert (
        night(own, replica, folder, monkeypatch, "--learn", "three", "--strength", 100, "--min-converged", 0, *LENIENT)
        == 0
    )
    output = capsys.readouterr().out
    assert "136 samples from 2 replicas" in output
    assert re.search(r"^two halves of the stores agree by 0\.\d+ \(Spearman\); 0.0 is asked for$", output, re.MULTILINE)
    assert "Compared: 64 samples. Answers are classes" in output
    assert re.search(r"^Same answer by segment: one \d+\.\d%, two \d+\.\d%\.$", output, re.MULTILINE)
    assert re.search(r"^Safe\. \d+\.\d% of 64 samples give the same answer", output, re.MULTILINE)
    assert re.search(r"^  one: \d+ of \d+ right before, \d+ now$", output, re.MULTILINE)
    assert "accepted: version 2 is served." in output
    memory = memsyn.Memory.load(own.admission.beside(folder, "memory", memsyn.fingerprint(served.network)))
    assert memory.matches(served.network)
    assert [entry.num_samples for entry in memory.history] == [136]
    kept = own.model.load(own.admission.beside(folder, "model", memsyn.fingerprint(served.network)))
    assert (kept.version, kept.parent) == (1, None)
    present = own.model.load(folder / own.model.FILE)
    assert present.parent == memsyn.fingerprint(served.network)
    assert call(replica, "GET", "/healthz")[1] == {"status": "ok", "version": 2, "sections": ["one", "two", "three"]}
    assert metrics(replica)["serve_version"] == 2

    own.users.day(folder, [replica.port], ["one", "two", "three"], 64, SIDE, seed=2)
    assert replica.observer.flush()
    assert (folder / "traffic-1.safetensors").read_bytes() == first
    (after,) = folder.glob("traffic-1.*.safetensors")
    assert replica.observer.stats().stale == 0
    found = memsyn.Importance.load(after)
    assert found.num_samples == 64
    assert "heads.2.weight" in found.sums

    fewer = ("--min-agreement", 0.8, "--max-change", 0.3, "--min-samples", 64)
    assert night(own, replica, folder, monkeypatch, "--learn", "four", "--strength", 100, *fewer) == 0
    assert "64 samples from 1 replicas" in capsys.readouterr().out, "of the present version alone"
    second = memsyn.Memory.load(own.admission.beside(folder, "memory", memsyn.fingerprint(present.network)))
    assert second.matches(present.network)
    assert [entry.rule for entry in second.history] == ["ema", "ema"]


@pytest.mark.parametrize("labels", [True, False])
def test_the_night_refuses_what_forgets_too_much(own, folder, replica, monkeypatch, capsys, labels):
    own.users.day(folder, [replica.port], ["one", "two"], 64, SIDE, seed=1)
    if not labels:  # as a real service has it
        with safe_open(folder / own.users.YESTERDAY, framework="pt") as file:
            kept, facts = {name: file.get_tensor(name) for name in ("pixels", "places")}, file.metadata()
        save_file(kept, folder / own.users.YESTERDAY, facts)
    assert replica.observer.flush()
    before = (folder / own.model.FILE).read_bytes()
    assert night(own, replica, folder, monkeypatch, "--learn", "three", "--strength", 0, *LENIENT) == 1
    output = capsys.readouterr().out
    assert re.search(r"^Broken\. \d+\.\d% of 64 samples give the same answer", output, re.MULTILINE)
    assert ("right before" in output) == labels
    assert "REFUSED: version 1 goes on. Try a larger --strength" in output
    assert (folder / own.model.FILE).read_bytes() == before
    assert call(replica, "GET", "/healthz")[1]["version"] == 1
    assert not list(folder.glob("model-*"))
    assert len(list(folder.glob("verdict-*"))) == 1, "of the first version alone"


def test_the_night_refuses_what_cannot_be_said(own, folder, replica, monkeypatch, capsys):
    """64 requests are too few for the thresholds that nobody set."""
    own.users.day(folder, [replica.port], ["one", "two"], 64, SIDE, seed=1)
    assert replica.observer.flush()
    assert night(own, replica, folder, monkeypatch, "--learn", "three", "--strength", 1e6, "--min-samples", 64) == 1
    output = capsys.readouterr().out
    assert "Cannot say. 100.0% of 64 samples give the same answer" in output
    assert "There are too few samples: give at least 125." in output
    assert call(replica, "GET", "/healthz")[1]["version"] == 1


def test_the_night_needs_traffic(own, folder, replica, monkeypatch):
    with pytest.raises(SystemExit, match="no replica has observed version 1"):
        night(own, replica, folder, monkeypatch, "--learn", "three")
    with pytest.raises(SystemExit, match="learn another section"):
        night(own, replica, folder, monkeypatch, "--learn", "two")


def test_the_night_needs_enough_samples_and_replicas(own, folder, replica, monkeypatch):
    own.users.day(folder, [replica.port], ["one", "two"], 64, SIDE, seed=1)
    assert replica.observer.flush()
    for few in (("--min-samples", 65), ("--min-samples", 1, "--min-replicas", 2), ()):
        with pytest.raises(SystemExit, match="that is too little to learn by"):
            night(own, replica, folder, monkeypatch, "--learn", "three", *few)
    more = ("--reload", "http://a", "http://b", "--min-samples", 64)
    with pytest.raises(SystemExit, match="64 samples and 2 replicas are asked"):
        night(own, replica, folder, monkeypatch, "--learn", "three", *more)
    assert not list(folder.glob("memory-*"))


def test_the_night_needs_halves_that_agree(own, folder, monkeypatch, capsys):
    served = own.model.load(folder / own.model.FILE)
    mark = memsyn.fingerprint(served.network)
    images = own.tasks["one"].test_images
    found = memsyn.measure(served.network, [{"inputs": images, "task": 0}], progress=False)
    replace(found, fingerprint=mark).save(folder / "traffic-a.safetensors")
    noise = {name: torch.rand_like(own_sums) for name, own_sums in found.sums.items()}
    replace(found, sums=noise, fingerprint=mark).save(folder / "traffic-b.safetensors")
    (folder / "traffic-c.safetensors").write_bytes(b"half")
    monkeypatch.setattr(sys, "argv", ["nightly.py", "--folder", str(folder), "--learn", "three", "--min-samples", "1"])
    with pytest.raises(SystemExit, match="the halves rank the weights too differently"):
        own.nightly.main()
    output = capsys.readouterr().out
    assert re.search(r"^left out: .*traffic-c.safetensors", output, re.MULTILINE)
    assert re.search(r"^two halves of the stores agree by -?0\.[01]\d+ \(Spearman\); 0.9 is", output, re.MULTILINE)


def test_one_night_at_a_time(own, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nightly.py", "--folder", str(folder), "--learn", "three"])
    with own.admission.alone(folder), pytest.raises(SystemExit, match="another night or a rollback is at work"):
        own.nightly.main()


@pytest.fixture
def two_versions(own, folder):
    """As after an accepted night: the version before is kept, with its memory."""
    first = own.model.load(folder / own.model.FILE)
    found = memsyn.measure(first.network, [{"inputs": own.tasks["one"].test_images, "task": 0}], progress=False)
    mark = memsyn.fingerprint(first.network)
    memsyn.Memory.empty().consolidate(first.network, found).save(own.admission.beside(folder, "memory", mark))
    own.model.save(first, own.admission.beside(folder, "model", mark))
    return first, next_version(own, folder)


def back(own, folder, monkeypatch, *reload):
    given = ["--reload", *reload] if reload else []
    monkeypatch.setattr(sys, "argv", ["rollback.py", "--folder", str(folder), *given])
    return own.rollback.main()


def test_a_rollback_brings_the_version_before_and_its_memory(own, two_versions, folder, replica, monkeypatch, capsys):
    first, second = two_versions
    assert call(replica, "GET", "/healthz")[1]["version"] == 2
    kept = own.admission.beside(folder, "model", second.parent).read_bytes()
    assert back(own, folder, monkeypatch, f"http://127.0.0.1:{replica.port}") == 0
    assert "version 1 is served again." in capsys.readouterr().out
    assert (folder / own.model.FILE).read_bytes() == kept
    assert call(replica, "GET", "/healthz")[1]["version"] == 1
    memory = own.nightly.memory_of(folder, own.model.load(folder / own.model.FILE))
    assert memory.matches(first.network)
    own.model.save(second, folder / own.model.FILE)
    status, answer = call(replica, "POST", "/reload")
    assert status == 409
    assert "'rolled back', not 'safe'" in answer["detail"]
    own.model.save(first, folder / own.model.FILE)
    with pytest.raises(SystemExit, match="version 1 learned on from none: there is nothing to go back to"):
        back(own, folder, monkeypatch)
    assert back_code(own, two_versions, folder, monkeypatch) == 2, "nobody answers there"


def back_code(own, two_versions, folder, monkeypatch):
    own.model.save(two_versions[1], folder / own.model.FILE)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return back(own, folder, monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")


def test_a_rollback_refuses_what_is_not_the_version_before(own, two_versions, folder, monkeypatch):
    second = two_versions[1]
    before = (folder / own.model.FILE).read_bytes()
    model, memory = (own.admission.beside(folder, what, second.parent) for what in ("model", "memory"))
    other = memsyn.Memory.empty().consolidate(
        second.network, memsyn.measure(second.network, [{"inputs": own.tasks["one"].test_images, "task": 0}])
    )
    right = memory.read_bytes()
    other.save(memory)
    with pytest.raises(SystemExit, match="is not the memory of version 1: put the right one there"):
        back(own, folder, monkeypatch)
    memory.unlink()
    with pytest.raises(SystemExit, match="the memory of version 1, is missing: put it back"):
        back(own, folder, monkeypatch)
    memory.write_bytes(right)
    own.model.save(second, model)
    with pytest.raises(SystemExit, match="has other weights than version 2 learned on from"):
        back(own, folder, monkeypatch)
    model.unlink()
    with pytest.raises(SystemExit, match="from which version 2 learned on, is missing: put it back"):
        back(own, folder, monkeypatch)
    assert (folder / own.model.FILE).read_bytes() == before


@pytest.mark.parametrize("last", range(3))
def test_a_rollback_that_is_killed_leaves_a_version_and_its_memory(own, two_versions, folder, monkeypatch, last):
    """Killed before each replacement of a file in turn."""
    renames, real = [], os.replace

    def killed(*paths):
        renames.append(paths)
        if len(renames) > last:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "replace", killed)
    if last < 2:
        with pytest.raises(KeyboardInterrupt):
            back(own, folder, monkeypatch)
    else:
        assert back(own, folder, monkeypatch) == 0
    monkeypatch.undo()
    served = own.admission.admitted(folder)
    assert served.version == (2 if last == 0 else 1)
    if served.version == 1:
        assert own.nightly.memory_of(folder, served).matches(served.network)
