"""The whole service of examples/serve under load: two workers, and what the processes hold meanwhile and afterwards."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest

import memsyn
from tests.serving import Held, children, held_by

pytest.importorskip("uvicorn", reason="needs the extra serve: pip install 'memsyn[serve]'")
pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'memsyn[serve]'")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what processes hold from /proc"),
]

SERVE = Path(__file__).parents[1] / "examples" / "serve"
SIDE, USERS = 32, 4


@pytest.fixture
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SERVE)
        import admission
        import model
        import users

        yield admission, model, users


def start(folder: Path, log: Path, port: int, *options: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, SERVE / "service.py", "--folder", folder, "--port", port, "--workers", 2, *options]
    with log.open("wb") as file:
        process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file)
    end = time.monotonic() + 300  # a busy machine imports torch slowly
    while time.monotonic() < end and process.poll() is None:
        if (
            (folder / ".traffic-1.lock").exists()
            and (folder / ".traffic-1_2.lock").exists()
            and ask(port, "GET", "/healthz")
        ):
            return process
        time.sleep(0.2)
    process.terminate()
    process.wait()
    raise AssertionError(f"the workers did not start: {log.read_text()}")


def ask(port: int, method: str, path: str) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path)
        return connection.getresponse().read().decode()
    except (OSError, HTTPException):
        return ""
    finally:
        connection.close()


def load(port: int, drawings: list[bytes], count: int, seconds: float) -> int:
    """Users who send drawings at an even pace and change their connection now and then; how many answers were wrong."""

    def user(number: int) -> int:
        begun, failed, own = time.monotonic(), 0, count // USERS
        for first in range(0, own, 25):
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            for k in range(first, min(own, first + 25)):
                time.sleep(max(0.0, begun + k * seconds / own - time.monotonic()))
                connection.request("POST", "/predict/animals", drawings[(k + number) % len(drawings)])
                response = connection.getresponse()
                failed += response.read()[:9] != b'{"names":'
            connection.close()
        return failed

    with ThreadPoolExecutor(USERS) as pool:
        return sum(pool.map(user, range(USERS)))


def numbers(port: int, name: str) -> list[float]:
    """A count of the observers of both workers: each scrape reaches one of them."""
    found: dict[str, float] = {}
    begin, workers_named = f"memsyn_observer_{name}{{", ['worker="1"', 'worker="2"']
    for _ in range(200):
        lines = [line.rsplit(" ", 1) for line in ask(port, "GET", "/metrics").splitlines() if line[0] != "#"]
        found |= {key: float(value) for key, value in lines if key.startswith(begin)}
        counts = [[value for key, value in found.items() if worker in key] for worker in workers_named]
        if all(counts):
            return [sum(own) for own in counts]
    raise AssertionError(f"one worker alone answers: {sorted(found)}")


def await_measured(port: int) -> None:
    """Until both observers have measured, so that they hold what they ever hold, and rest now."""
    end = time.monotonic() + 300  # a busy machine imports torch slowly
    while min(numbers(port, "measured_total")) < 1 or max(numbers(port, "waiting")) >= 32:
        assert time.monotonic() < end, "the observers do not measure"
        time.sleep(0.2)


def test_two_workers_under_load_hold_what_they_held(example, tmp_path, soak):
    admission, model, users = example
    # The pace is that of 100,000 requests in an hour, 1% of them measured; in less time, as many are measured.
    seconds = float(os.environ.get("SOAK_SECONDS", 3600)) if soak else 0.0
    tenth, rate, budget = (USERS * round(25_000 * seconds / 36_000), 36 / seconds, 10) if soak else (40, 1.0, 100)
    folder = tmp_path / "serve"
    folder.mkdir()
    served = model.begin("small", SIDE, {"animals": model.drawings(SIDE)["animals"].class_names})
    admission.judge(folder, served, "safe", "It is the first version.")
    model.save(served, folder / model.FILE)
    drawings = [users.png(one) for one in users.drawn(["animals"], 64, SIDE, seed=0)[0]]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = start(folder, tmp_path / "log", port, "--rate", rate, "--budget", budget, "--interval", 5)
    try:
        first_tenth = max(tenth, 200)
        assert load(port, drawings, first_tenth, seconds / 10) == 0
        await_measured(port)
        first = quiet(process.pid)
        taken = []
        for _ in range(9):
            assert load(port, drawings, tenth, seconds / 10) == 0
            await_measured(port)
            taken.append({pid: held_by(pid).resident for pid in first})
        counts = {n: sum(numbers(port, n)) for n in ("seen_total", "sampled_total", "dropped_total", "errors_total")}
        last = quiet(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0

    growth = {pid: max(now[pid] for now in taken) / first[pid].resident - 1 for pid in first}
    stores = [memsyn.Importance.load(path) for path in folder.glob("traffic-*.safetensors")]
    print(f"\n{first_tenth + 9 * tenth} requests, {counts}, stored {[store.num_samples for store in stores]}")
    print(f"growth {growth}, MiB {[[size >> 20 for size in now.values()] for now in taken]}")
    print(f"after the first tenth {first}, at the end {last}")
    assert counts["seen_total"] == first_tenth + 9 * tenth
    expected = rate * counts["seen_total"]
    assert abs(counts["sampled_total"] - expected) <= 5 * expected**0.5
    assert (counts["dropped_total"], counts["errors_total"]) == (0, 0)
    assert all(store.matches(served.network) for store in stores)
    # A store is written when there are 64 new samples, and at the end more than a batch may wait.
    assert len(stores) == 2
    assert sum(store.num_samples for store in stores) >= 128
    assert max(growth.values()) <= 0.05
    assert last.keys() == first.keys()
    for pid, held in last.items():
        assert held.threads <= first[pid].threads
        assert held.descriptors <= first[pid].descriptors
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if "measured, and in no file" not in line] == []


def workers(pid: int) -> list[int]:
    """The processes that answer: children of the first one that are no helper of Python's."""
    return [child for child in children(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def quiet(pid: int) -> dict[int, Held]:
    """What the processes hold once all connections have ended."""
    time.sleep(6)  # uvicorn keeps a connection for five seconds
    return {own: held_by(own) for own in [pid, *workers(pid)]}
