"""The sidecar: requests from a log, a pipe and a port are measured as `measure` does it, none twice."""

import atexit
import gzip
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import memsyn
from memsyn.cli import app, observe
from memsyn.sidecar import lines, request_streams, run
from memsyn.sidecar.lines import Line, LineSplitter
from memsyn.sidecar.log_position import LogPosition
from memsyn.sidecar.request_json import plain_inputs, requests_in
from memsyn.sidecar.request_log import RequestLog
from memsyn.sidecar.request_streams import RequestServer
from tests.commands import call
from tests.serving import Words, a_model, assert_same, assert_same_factors, factors_of, measured, requests

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

ROOT = Path(__file__).parents[1]
STORE = "traffic.safetensors"
OPTIONS = ("--store", STORE, "--budget", "100", "--min-samples", "1")
MODEL = ("--model", "tests.serving:a_model")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(batches: list[Tensor], **more: Any) -> str:
    return "".join(json.dumps({"inputs": batch.tolist(), **more}) + "\n" for batch in batches)


def append(text: str | bytes, log: str = "log.jsonl") -> None:
    with open(log, "ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def observed(*more: str, code: int = 0, source: str = "log.jsonl", model: str = "tests.serving:a_model") -> Any:
    """What `observe --once` says, as JSON, of a log."""
    result = call("observe", "--model", model, "--from", source, *OPTIONS, "--once", "--json", *more, code=code)
    return json.loads(result.stdout) if code == 0 else result


def said(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stderr.splitlines()]


def assert_stored(batches: list[Any], store: str = STORE) -> None:
    assert_same(memsyn.Importance.load(store), measured(a_model(), batches))


def while_running(source: str, action: Callable[[str], None], *more: str, code: int = 0) -> tuple[dict[str, Any], Any]:
    """Runs `observe` here, and `action` in a thread, given the address; then SIGTERM. What it says, and the result."""
    first, said_first = [], threading.Event()
    note = run.note

    def noted(entry: dict[str, Any]) -> None:
        note(entry)
        if entry["event"] == "start":
            first.append(entry["from"])
            said_first.set()

    failures: list[BaseException] = []

    def act() -> None:
        try:
            assert said_first.wait(30)
            action(first[0])
        except BaseException as error:
            failures.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=act)
    thread.start()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # if it ends too early
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(observe, "note", noted)
            result = call("observe", "--from", source, *OPTIONS, *MODEL, "--json", *more, code=code)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    if failures:
        raise failures[0]
    return json.loads(result.stdout), result


# The sums


def test_a_log_is_measured_as_measure_does_it() -> None:
    batches = requests(70)
    append(written(batches))
    facts = observed()
    assert facts["requests"] == facts["lines"] == 70
    assert facts["measured"] == facts["seen"] == sum(map(len, batches))
    assert facts["bytes_left"] == facts["dropped"] == facts["malformed"] == 0
    assert_stored(batches)


def ending(request: Any) -> Any:
    """Inputs; a request named "end" ends the program that reads it."""
    if "end" in request:
        raise SystemExit(3)
    return torch.tensor(request["inputs"], dtype=torch.float64)


def test_inputs_that_end_the_program_are_malformed() -> None:
    batches = requests(4)
    append(written(batches[:2]) + '{"end": 1}\n' + written(batches[2:]))
    facts = observed("--inputs", "tests.test_sidecar:ending")
    assert (facts["lines"], facts["malformed"], facts["requests"]) == (5, 1, 4)
    assert_stored(batches)


def test_a_log_without_a_good_line_is_read_again() -> None:
    batches = requests(4)
    append(written(batches))
    result = observed("--field", "prompt", code=1)
    assert json.loads(result.stdout)["malformed"] == 4
    assert observed()["requests"] == 4
    assert_stored(batches)


def test_what_is_withheld_from_the_store_is_read_again() -> None:
    batches = requests(70)
    append(written(batches[:20]))
    facts = observed("--min-samples", "64")
    assert facts["withheld"] == facts["measured"] == sum(map(len, batches[:20])) < 64
    assert not Path(STORE).exists()
    append(written(batches[20:]))
    facts = observed("--min-samples", "64")
    assert facts["withheld"] == 0
    assert facts["measured"] == memsyn.Importance.load(STORE).num_samples == sum(map(len, batches))


def test_keyword_arguments_and_flat_lists() -> None:
    ids = [torch.randint(0, 10, (1, 2 + k % 3)) for k in range(80)]
    append("".join(json.dumps({"ids": one[0].tolist(), "user": "me"}) + "\n" for one in ids[:40]))
    append("".join(json.dumps({"ids": one.tolist(), "max_tokens": 7}) + "\n" for one in ids[40:]))
    assert observed(model="tests.test_sidecar:words")["measured"] == 80
    assert_same(memsyn.Importance.load(STORE), measured(words(), [{"ids": one} for one in ids]))


def words() -> Words:
    torch.manual_seed(0)
    return Words()


def test_factors_and_weights_from_a_file(tmp_path: Path) -> None:
    batches = requests(70)
    save_file(a_model(3).state_dict(), "served.safetensors")
    append(written(batches))
    result = observed("--estimator", "inputs", "--weights", "served.safetensors")
    assert result["measured"] == sum(map(len, batches))
    assert_same_factors(memsyn.KroneckerFactors.load(STORE), factors_of(a_model(3), batches, "inputs"))


def test_the_fingerprint_says_which_weights_are_measured() -> None:
    append(written(requests(64)))
    save_file(a_model(3).state_dict(), "served.safetensors")
    result = call(
        "observe", "--model", "tests.serving:a_model", "--weights", "served.safetensors", "--from", "log.jsonl",
        "--store", STORE, "--once",
    )  # fmt: skip
    assert said(result)[0]["fingerprint"] == memsyn.fingerprint(a_model(3)) == memsyn.Importance.load(STORE).fingerprint
    counts = "127 measured, 64 requests, 64 lines, 0 malformed, 0 dropped, 0 invalid, 0 withheld"
    assert result.stdout == f"{STORE}: {counts}\n"


def test_a_request_larger_than_the_room_is_measured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.randn(3 * run.MAX_QUEUED + 5, 4, dtype=torch.float64)
    append(written([batch]))
    assert observed()["measured"] == len(batch)
    assert_stored([batch])


def test_standard_input() -> None:
    batches = requests(70)
    read, write = os.pipe()
    before = os.dup(0)
    os.dup2(read, 0)
    writer = threading.Thread(target=lambda: (os.write(write, written(batches).rstrip().encode()), os.close(write)))
    try:
        writer.start()
        facts = observed(source="-")  # it ends with the pipe
    finally:
        os.dup2(before, 0)
        for number in (before, read):
            os.close(number)
        writer.join()
    assert facts["requests"] == facts["lines"] == 70
    assert_stored(batches)


def test_a_process_that_follows_a_log_ends_on_a_signal() -> None:
    """In a process of its own, as a container runs it; the log comes later, and grows by parts of lines."""
    batches = requests(80)
    command = [sys.executable, "-c", "from memsyn.cli import app; app()", "observe", "--from", "log.jsonl", "--json"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, *OPTIONS, *MODEL], stdout=-1, stderr=-1, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    with process:
        assert process.stderr is not None
        assert json.loads(process.stderr.readline())["event"] == "start"
        text = written(batches)
        for start in range(0, len(text), 1000):
            append(text[start : start + 1000])
        append('{"inputs": [[0, 0, ')  # still being written
        time.sleep(1.0)
        process.terminate()
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    facts = json.loads(stdout)
    assert (facts["requests"], facts["malformed"], facts["bytes_left"]) == (80, 0, 19)
    assert_stored(batches)


def post(address: str, body: str | bytes, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request("POST", "/v1/logs", body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def spans(batches: list[Tensor], tenant: str = "a") -> dict[str, Any]:
    """As an exporter of OpenTelemetry writes it in JSON; the first span is of something else."""

    def attributes(**named: str) -> list[dict[str, Any]]:
        return [{"key": key.replace("_", "."), "value": {"stringValue": value}} for key, value in named.items()]

    own = [
        {
            "traceId": "5b8e",
            "name": "chat",
            "attributes": attributes(gen_ai_prompt=json.dumps({"inputs": one.tolist()})),
        }
        for one in batches
    ]
    other = {"name": "GET /health", "attributes": [{"key": "http.status", "value": {"intValue": "200"}}]}
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": attributes(tenant=tenant)},
                "scopeSpans": [{"scope": {}, "spans": [other, *own]}],
            }
        ]
    }


def test_a_port_takes_lines_and_opentelemetry() -> None:
    batches = requests(90)

    def send(address: str) -> None:
        assert post(address, written(batches[:30])) == (200, "{}")
        one = json.dumps({"inputs": batches[30].tolist()}, indent=2)
        assert post(address, one, Content_Type="application/json; charset=utf-8") == (200, "{}")
        packed = gzip.compress(written(batches[31:60]).encode())
        assert post(address, packed, Content_Encoding="gzip", Content_Type="application/x-ndjson") == (200, "{}")
        assert post(address, json.dumps(spans(batches[60:])), Content_Type="application/json") == (200, "{}")

    # What waits at the signal is measured too.
    facts, _ = while_running("http://127.0.0.1:0", send, "--field", "gen.ai.prompt")
    assert (facts["requests"], facts["malformed"]) == (30, 60)
    facts, _ = while_running("http://127.0.0.1:0", send, "--store", "all.safetensors")
    assert (facts["requests"], facts["refused"], facts["dropped"], facts["malformed"]) == (60, 0, 0, 0)
    assert_stored(batches[60:])
    assert_stored(batches[:60], "all.safetensors")


def test_spans_of_opentelemetry_by_segment() -> None:
    batches = requests(140)
    append(json.dumps(spans(batches[:70])) + "\n" + json.dumps(spans(batches[70:], "b.c")) + "\n")
    facts = observed("--field", "gen.ai.prompt", "--segment-field", "tenant")
    assert (facts["lines"], facts["requests"], facts["malformed"]) == (2, 140, 0)
    assert_stored(batches[:70], "traffic+a.safetensors")
    assert_stored(batches[70:], "traffic+b%2Ec.safetensors")
    assert observed("--field", "gen.ai.prompt", "--segment-field", "tenant")["requests"] == 0


def test_log_records_of_opentelemetry_and_their_values() -> None:
    body = {
        "kvlistValue": {
            "values": [{"key": "ids", "value": {"arrayValue": {"values": [{"intValue": "7"}, {"intValue": 8}]}}}]
        }
    }
    record = {"body": body, "attributes": [{"key": "tenant", "value": {"intValue": "3"}}]}
    held = {"resourceLogs": [{"scopeLogs": [{"logRecords": [record, {"attributes": []}]}]}]}
    assert list(requests_in(json.dumps(held).encode(), None, "tenant")) == [({"ids": [7, 8]}, "3")]
    event = {"events": [{"attributes": [{"key": "gen_ai.prompt", "value": {"stringValue": "[INST] hello"}}]}]}
    held = {"resourceSpans": [{"scopeSpans": [{"spans": [event]}]}]}
    assert list(requests_in(json.dumps(held).encode(), "gen_ai.prompt", None)) == [("[INST] hello", None)]
    assert list(requests_in(b'{"resourceSpans": []}', None, None)) == []


def test_fields_segments_and_a_function_of_the_users() -> None:
    batches = requests(140)
    for k, batch in enumerate(batches):
        held: Any = {"numbers": batch.tolist()}
        append(
            json.dumps({"request": json.dumps(held) if k % 3 else held, "tenant": "ab"[k % 2], "time": "now"}) + "\n"
        )
    append('{"request": {"skip": 1}, "tenant": "a"}\n')
    facts = observed(
        "--field", "request", "--segment-field", "tenant", "--inputs", "tests.test_sidecar:numbers_of"
    )  # fmt: skip
    assert (facts["lines"], facts["requests"], facts["malformed"]) == (141, 140, 0)
    for k, tenant in enumerate("ab"):
        assert_stored(batches[k::2], f"traffic+{tenant}.safetensors")


def numbers_of(request: dict[str, Any]) -> Tensor | None:
    return torch.tensor(request["numbers"], dtype=torch.float64) if "numbers" in request else None


def test_inputs_of_numbers() -> None:
    model = a_model().float()
    found = plain_inputs({"inputs": [[1, 2], [3, 4.5]]}, model)
    assert found.tolist() == [[1, 2], [3, 4.5]]
    assert found.dtype == plain_inputs({"inputs": [1, 2]}, model).dtype == torch.float32
    assert plain_inputs({"inputs": [1, 2]}, model).shape == (1, 2)
    assert plain_inputs({"inputs": [1, 2]}, Words()).dtype == torch.int64
    one = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}
    assert plain_inputs({"id": "7", "inputs": [one]}, model).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    two = {"name": "mask", "datatype": "INT64", "shape": [1, 2], "data": [1, 0]}
    found = plain_inputs({"inputs": [one, two]}, model)
    assert (found["x"].dtype, found["mask"].tolist(), found["mask"].dtype) == (torch.float32, [[1, 0]], torch.int64)


# Restarts


def test_a_restart_goes_on() -> None:
    batches = requests(210)
    for start in (0, 70, 140):
        append(written(batches[start : start + 70]))
        assert observed()["requests"] == 70
        assert_stored(batches[: start + 70])
        assert observed()["requests"] == 0
    assert sorted(name for name in os.listdir() if name[0] != ".") == ["log.jsonl", STORE, f"{STORE}.position"]


def serve_until_killed(said: int, interval: float, *more: str) -> None:
    """A sidecar in this process, which says `.` when it begins to write the position and the store."""
    store = run.SidecarRun._store

    def begun(self: Any) -> bool | None:
        os.write(said, b".")
        return store(self)

    run.SidecarRun._store = begun  # type: ignore[method-assign]
    sys.stderr = sys.stdout = io.StringIO()
    given = ("--from", "log.jsonl", "--segment-field", "tenant", "--interval", str(interval))
    app(["observe", *OPTIONS, *MODEL, *given, *more])


def in_a_fork(action: Any) -> int:
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        try:
            action()
        finally:
            os._exit(1)
    return child


@pytest.mark.soak
def test_killed_at_any_moment_it_counts_no_request_twice_and_loses_none(soak: bool) -> None:
    generator, num_kills, midway = random.Random(0), 100 if soak else 5, 0
    num_begun = 0
    batch = torch.ones(1, 4, dtype=torch.float64)
    shown = 0
    for _ in tqdm(range(num_kills), "kills of sidecars"):
        before = sum(stored_counts().values())
        append(written([batch] * 16, tenant="a") + written([batch] * 8))
        shown += 24
        read, write = os.pipe()
        child = in_a_fork(lambda at=write: serve_until_killed(at, 0.005))
        os.close(write)
        for _ in range(generator.randrange(1, 8)):
            os.read(read, 1)
        time.sleep(generator.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(read)
        found = stored_counts()
        assert sum(found.values()) <= shown
        num_begun += sum(found.values()) > before
        midway += before < sum(found.values()) < shown
    append(written([batch] * 64, tenant="a") + written([batch] * 64))
    observed("--segment-field", "tenant")
    assert stored_counts() == {STORE: 8 * num_kills + 64, "traffic+a.safetensors": 16 * num_kills + 64}
    for name, count in stored_counts().items():
        assert_times(name, batch, count)
    tqdm.write(
        f"{num_kills} sidecars killed, {num_begun} after a write, {midway} before the last: 0 of {shown} lost or twice"
    )


def stored_counts() -> dict[str, int]:
    names = [name for name in (STORE, "traffic+a.safetensors") if os.path.exists(name)]
    return {name: memsyn.Importance.load(name).num_samples for name in names}


def assert_times(name: str, batch: Tensor, count: int) -> None:
    one = measured(a_model(), [batch])
    for key, total in memsyn.Importance.load(name).sums.items():
        assert torch.allclose(total, one.sums[key] * count, rtol=1e-9), key


@pytest.mark.parametrize("step", range(6))
def test_killed_at_each_step_of_a_write(step: int) -> None:
    """Before and after the rename of the position, and of the store of each of two segments."""
    batches = requests(280)
    append(written(batches[:70]) + written(batches[70:140], tenant="a"))
    observed("--segment-field", "tenant")
    append(written(batches[140:210]) + written(batches[210:], tenant="a"))

    def killed() -> None:
        replace, num_calls = os.replace, 0

        def dying(*given: Any) -> None:
            nonlocal num_calls
            if num_calls == step // 2 and step % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*given)
            if num_calls == step // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            num_calls += 1

        os.replace = dying
        serve_until_killed(os.open(os.devnull, os.O_WRONLY), 1e9, "--once")

    assert os.waitstatus_to_exitcode(os.waitpid(in_a_fork(killed), 0)[1]) == -signal.SIGKILL
    observed("--segment-field", "tenant")
    assert_stored([*batches[:70], *batches[140:210]])
    assert_stored([*batches[70:140], *batches[210:]], "traffic+a.safetensors")


@pytest.mark.parametrize("what", ["traffic.safetensors.position", STORE])
def test_a_disk_that_is_full_at_the_end_costs_nothing(what: str) -> None:
    """If the position cannot be written, the store must not be, not even at exit."""
    batches = requests(140)
    append(written(batches[:70]))
    observed()
    append(written(batches[70:]))

    def full() -> None:
        replace = os.replace

        def failing(source: Any, target: Any) -> None:
            if os.path.basename(target) == what:
                raise OSError(28, "No space left on device")
            replace(source, target)

        os.replace = failing
        try:
            serve_until_killed(os.open(os.devnull, os.O_WRONLY), 0.01, "--once")
        finally:
            atexit._run_exitfuncs()

    os.waitpid(in_a_fork(full), 0)
    assert_stored(batches[:70])
    assert observed()["requests"] == 70
    assert_stored(batches)


def position_after(*stores: str) -> tuple[LogPosition, dict[str, str]]:
    """A position at 30: 10 bytes of a request without a segment, 10 of "a", and 10 of neither. Some stores exist."""
    for name in stores:
        memsyn.Importance({"w": torch.rand(2)}, 1, {"w": "rule"}).save(name)
    position = LogPosition(Path("log.jsonl"), Path(STORE))
    assert position.admits(None, Line(b"", 1, 0, 10))
    assert position.admits("a", Line(b"", 2, 10, 20))
    position.place = 30
    return position, position.write()


def test_sums_that_wait_for_others_are_read_again() -> None:
    """The observer may write one segment and not another, whose samples are too few."""
    position, before = position_after(STORE)
    memsyn.Importance({"w": torch.rand(2)}, 2, {"w": "rule"}).save(STORE)  # it writes the samples without a segment
    for found in (position, LogPosition(Path("log.jsonl"), Path(STORE))):
        if found is position:
            position.settle(before)
        assert found.first_needed == 10
        assert [found.admits(None, Line(b"", 1, k, k + 10)) for k in (0, 20, 30)] == [False, False, True]
        assert [found.admits("a", Line(b"", 1, k, k + 10)) for k in (0, 10, 20)] == [False, True, True]
        assert [found.admits("b", Line(b"", 1, k, k + 10)) for k in (0, 20, 30)] == [False, False, True]
    position.place = 40
    position.write()
    memsyn.Importance({"w": torch.rand(2)}, 2, {"w": "rule"}).save("traffic+a.1a2b3c4d.safetensors")
    assert LogPosition(Path("log.jsonl"), Path(STORE)).first_needed == 30


def test_a_position_that_cannot_be_right_is_refused() -> None:
    position_after()
    append("")
    with pytest.raises(memsyn.OptionError, match=r"was measured from the log .*log\.jsonl, not from .*other\.jsonl"):
        LogPosition(Path("other.jsonl"), Path(STORE))
    path = Path(f"{STORE}.position")
    whole = path.read_bytes()
    for content in (b"", b"[]", b"{}", whole[:-5], whole.replace(b"30", b'"x"'), b"[" * 10**5, b"\xff", whole * 2):
        path.write_bytes(content)
        result = observed(code=1)
        assert "traffic.safetensors.position cannot be read: " in result.stderr
        assert "Traceback" not in result.stderr


# The log


class Reading:
    """Reads a log by steps: what each step gives is taken as measured."""

    def __init__(self, *, once: bool = False) -> None:
        self.position = LogPosition(Path("log.jsonl"), Path(STORE))
        self.log = RequestLog(Path("log.jsonl"), self.position, once=once)
        self._steps = iter(self.log)

    def new(self) -> list[str]:
        """The lines until there is nothing new."""
        found = []
        for line in self._steps:
            if line is None:
                break
            assert line.text is not None
            self.position.place = line.end
            found.append(line.text.decode())
        return found

    def end(self) -> None:
        """As a run ends."""
        self.position.settle(self.position.write())
        self.log.close()


def read_once() -> list[str]:
    reading = Reading(once=True)
    found = reading.new()
    reading.log.close()
    return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memsyn.sidecar.request_log.IDLE", 0.001)


def test_a_log_is_followed_through_rotations() -> None:
    reading = Reading()
    assert reading.new() == []  # it does not exist yet
    append("1\n2\n3")
    assert reading.new() == ["1", "2"]
    append("a\n")
    assert reading.new() == ["3a"]
    os.rename("log.jsonl", "log.jsonl.1")
    append("4\n", "log.jsonl.1")  # its writer has not seen that
    assert reading.new() == ["4"]
    append("")
    append("5\n", "log.jsonl.1")
    assert reading.new() == ["5"]
    append("6", "log.jsonl.1")  # the last line of this file, without a line break
    append("7\n")
    assert reading.new() == ["6", "7"]
    os.rename("log.jsonl.1", "log.jsonl.2")
    os.rename("log.jsonl", "log.jsonl.1")
    append("8\n")
    os.remove("log.jsonl.1")
    assert reading.new() == ["8"]
    reading.end()


def test_a_log_that_is_cut_is_read_from_its_beginning() -> None:
    reading = Reading()
    append("first 1\nfirst 2\npart")
    assert reading.new() == ["first 1", "first 2"]
    os.truncate("log.jsonl", 0)
    append("second 1\n")
    assert reading.new() == ["second 1"]
    os.truncate("log.jsonl", 0)
    append("third 1\nthird 2\nthird 3\n")  # longer than before
    assert reading.new() == ["third 1", "third 2", "third 3"]
    reading.end()


@pytest.mark.parametrize("names", [("log.jsonl.1", "log.jsonl.2"), ("log.jsonl-20261202", "log.jsonl-20261201")])
def test_a_restart_finds_the_rotated_files(names: tuple[str, str]) -> None:
    newer, older = names
    reading = Reading()
    append("1\n2\n")
    assert reading.new() == ["1", "2"]
    reading.end()
    append("3\n")
    os.rename("log.jsonl", older)
    append("4\n5\n")
    time.sleep(0.02)
    os.rename("log.jsonl", newer)
    append("6\n")
    Path("log.jsonl.gz").write_bytes(b"not a part of it")
    reading = Reading()
    assert reading.new() == ["3", "4", "5", "6"]
    reading.end()
    assert read_once() == []
    os.remove("log.jsonl")
    append("7\n")
    assert read_once() == ["7"]


def test_a_restart_after_a_cut_or_of_a_copy() -> None:
    for k, text in enumerate(["1\n2\n", "3\n", "4\n5\n6\n"]):
        Path("log.jsonl").write_text(text)
        reading = Reading()
        assert reading.new() == text.split(), k
        reading.end()
    content = Path("log.jsonl").read_text()
    os.remove("log.jsonl")
    Path("log.jsonl").write_text(content + "7\n")  # as from a backup
    reading = Reading()
    assert reading.new() == ["7"]
    reading.end()


def test_a_segment_is_read_again_from_a_rotated_file() -> None:
    """Samples of "a" in the first file wait for others; the second file was read to its middle."""
    append("1\n2\n")
    reading = Reading()
    assert reading.new() == ["1", "2"]
    assert reading.position.admits("a", Line(b"", 1, 2, 4))
    os.rename("log.jsonl", "log.jsonl.1")
    append("3\n")
    assert reading.new() == ["3"]
    reading.end()
    append("4\n")
    append("more\n", "log.jsonl.1")  # too late: another file was begun
    reading = Reading()
    found = []
    for line in reading.log:
        if line is None:
            break
        found.append((line.text, reading.position.admits("a", line), reading.position.admits(None, line)))
        reading.position.place = line.end
    assert [entry for entry in found if entry[0] != b"more"] == [
        (b"2", True, False), (b"3", True, False), (b"4", True, True)
    ]  # fmt: skip
    reading.log.close()


def test_the_end_of_a_log_without_a_line_break() -> None:
    append('{"a": 1}\n{"b": ')
    assert read_once() == ['{"a": 1}']
    append('{"c": 2}}')
    assert read_once() == ['{"a": 1}', '{"b": {"c": 2}}']


def test_long_lines_take_no_memory() -> None:
    splitter, found = LineSplitter(), []
    for chunk in [b"1\n", *[b"x" * 2**20] * 20, b"\n2\n", b"y" * lines.LONGEST, b"\n3\n"]:
        found += splitter.feed(chunk)
        assert len(splitter._rest) <= lines.LONGEST
    texts = [line.text if line.text is None or len(line.text) == 1 else b"..." for line in found]
    assert texts == [b"1", None, b"2", b"...", b"3"]
    assert [line.end for line in found][:3] == [2, 2 + 20 * 2**20 + 1, 2 + 20 * 2**20 + 3]
    assert found[-1].number == 5


# What must not stop it


MALFORMED = {
    "": "",  # an empty line is none
    "not json": "it is no JSON: Expecting value",
    "[1, 2]": "expected a JSON object",
    '"text"': "expected a JSON object",
    '{"prompt": "secret"}': "the object has no list of numbers; for text, give --inputs package.module:to_inputs",
    '{"inputs": ["secret"]}': "a list holds something else than numbers",
    '{"inputs": [[1, 2], [3]]}': "rows of unlike lengths, or numbers that are too large",
    '{"inputs": [[NaN, 1, 2, 3]]}': "NaN is not JSON",
    '{"inputs": [[Infinity, 1, 2, 3]]}': "Infinity is not JSON",
    '{"inputs": [[1e999, 1, 2, 3]]}': "a number is too large",
    f'{{"inputs": [[{10**400}, 1, 2, 3]]}}': "a list holds something else than numbers",
    f'{{"inputs": [[{"9" * 5000}, 1, 2, 3]]}}': "ValueError at decoder.py",
    '{"inputs": []}': "a list holds something else than numbers",
    '{"inputs": [null]}': "a list holds something else than numbers",
    '{"inputs": [{"name": "x"}]}': "KeyError at request_json.py",
    '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [7, 7], "data": [1]}]}': "RuntimeError at request_json.py",
    '{"resourceSpans": [{"scopeSpans": 7}]}': "TypeError at request_json.py",
    '{"resourceSpans": {"secret": 1}}': "AttributeError at request_json.py",
    '{"inputs": ' + "[" * 10**5 + "]" * 10**5 + "}": "RecursionError at decoder.py",
    '{"tenant": ["secret"], "inputs": [[1, 2, 3, 4]]}': "must hold a text of at most 64 characters, or a number",
    '{"tenant": "' + "s" * 65 + '", "inputs": [[1, 2, 3, 4]]}': "must hold a text of at most 64 characters",
    "\xff": "UnicodeDecodeError at request_json.py",
    "x" * (lines.LONGEST + 1): "it is longer than 4194304 bytes",
}


def test_malformed_lines_are_counted_and_one_is_named() -> None:
    batches = requests(70)
    given = [text.encode("latin-1") for text in MALFORMED]
    append(written(batches[:2]).encode() + b"\n".join(given) + b"\n" + written(batches[2:]).encode())
    result = call("observe", "--from", "log.jsonl", *OPTIONS, *MODEL, "--once", "--json", "--segment-field", "tenant")
    facts = json.loads(result.stdout)
    assert (facts["requests"], facts["malformed"]) == (70, len(MALFORMED) - 1)
    entries = said(result)
    assert [entry["event"] for entry in entries] == ["start", "malformed"]
    assert entries[1]["where"].startswith("line 4 of this run, byte ")
    assert entries[1]["reason"] == "it is no JSON: Expecting value"
    assert_stored(batches)


@pytest.mark.parametrize("text", [text for text in MALFORMED if text], ids=lambda text: text[:20].strip("[]{}"))
def test_what_is_wrong_is_said_without_a_word_of_the_request(text: str) -> None:
    model, splitter = a_model(), LineSplitter()
    sidecar = run.SidecarRun(
        None,  # type: ignore[arg-type]  # nothing reaches it
        iter(()),  # type: ignore[arg-type]
        None,
        lambda text: requests_in(text, None, "tenant"),
        lambda request: plain_inputs(request, model),
    )
    (line,) = splitter.feed(text.encode("latin-1") + b"\n")
    try:
        sidecar._inputs_of(line)
    except Exception as error:
        reason = run._reason(error)
    assert MALFORMED[text] in reason
    assert "secret" not in reason


def test_a_function_of_the_users_that_fails() -> None:
    append('{"text": "secret"}\n')
    facts, result = None, call(
        "observe", "--from", "log.jsonl", *OPTIONS, *MODEL, "--once", "--json",
        "--inputs", "tests.test_sidecar:numbers", code=1,
    )  # fmt: skip
    facts = json.loads(result.stdout)
    assert (facts["requests"], facts["malformed"]) == (0, 1)
    assert said(result)[1]["reason"].startswith("ValueError at test_sidecar.py:")
    assert "secret" not in result.output


def numbers(request: Any) -> Tensor:
    return torch.tensor([float(word) for word in request["text"].split()])


def test_there_may_be_64_segments() -> None:
    append("".join(written([torch.ones(1, 4)], tenant=k) for k in range(70)) + written([torch.ones(64, 4)], tenant=3))
    facts = observed("--segment-field", "tenant")
    assert (facts["requests"], facts["malformed"], facts["errors"]) == (65, 6, 0)
    assert memsyn.Importance.load("traffic+3.safetensors").num_samples == 65


def test_nothing_of_a_request_is_kept() -> None:
    marked = [torch.full((1, 4), 0.123456789012345 + k, dtype=torch.float64) for k in range(70)]
    append("".join(json.dumps({"inputs": own.tolist(), "name": "secret"}) + "\n" for own in marked))
    result = call("observe", "--from", "log.jsonl", *OPTIONS, *MODEL, "--once")
    for path in Path().iterdir():
        assert path.name == "log.jsonl" or not any(word in path.read_bytes() for word in (b"secret", b"0.1234567"))
    assert "secret" not in result.output
    assert "0.1234567" not in result.output


def test_a_line_of_counts_each_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STATUS", 0.0)
    append(written(requests(64)))
    result = call("observe", "--from", "log.jsonl", *OPTIONS, *MODEL, "--once")
    counts = [entry for entry in said(result) if entry["event"] == "counts"]
    assert len(counts) == 64
    assert counts[-1]["requests"] == counts[-1]["lines"] == 64
    assert counts[-1]["bytes_left"] == 0
    assert counts[0]["bytes_left"] > 0
    assert set(vars(memsyn.Observer(a_model(), "other").stats())) < counts[0].keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"--model": "tests.serving"}, "--model must be package.module:build, the function that builds the model; got"),
        (
            {"--model": "nowhere:build"},
            "No module named 'nowhere'. Run it from the folder that holds the module",
        ),
        ({"--model": "tests.serving:requests"}, "--model tests.serving:requests failed: TypeError"),
        ({"--model": "os:getpid"}, "--model os:getpid must return a torch.nn.Module; it returned a int."),
        ({"--inputs": "tests"}, "--inputs must be package.module:to_inputs, a function of a request; got 'tests'."),
        ({"--inputs": "tests.serving:nothing"}, "--inputs tests.serving:nothing failed: AttributeError"),
        ({"--model": None}, "give --model package.module:build, or a folder of Hugging Face as --weights."),
        ({"--weights": "."}, "--weights . is a folder: leave --model out"),
        ({"--weights": "none"}, "none does not exist."),
        ({"--from": "none"}, "the log none does not exist."),
        ({"--from": "."}, "--from . is no file. A pipe is read by --from - < ."),
        ({"--from": "http"}, "--once needs an end, which --from http has not"),
        ({"--store": "memory://x/y"}, "give a local --store for --from log.jsonl."),
        ({"--store": "none/x"}, "its folder does not exist"),
        ({"--rate": "2"}, "rate must be a number above 0, up to 1"),
        ({"--interval": "0"}, "--interval must be a number of seconds above 0; got 0.0."),
        ({"--interval": "nan"}, "--interval must be a number of seconds above 0; got nan."),
        ({"--half-life": "1e300"}, "--half-life must be a number of days; got 1e+300."),
        ({"--last": "nan"}, "--last must be a number of days; got nan."),
        ({"--last": "1", "--half-life": "1"}, "give last= or half_life=, not both"),
        ({"--estimator": "none"}, "estimator"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(given: dict[str, Any], message: str) -> None:
    append(written(requests(3)))
    told = {"--from": "log.jsonl", "--store": STORE, "--model": "tests.serving:a_model", **given}
    flags = [word for option, value in told.items() if value is not None for word in (option, value)]
    result = call("observe", *flags, "--once", code=1)
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_windows_reach_the_observer() -> None:
    append(written(requests(64)))
    observed("--half-life", "3", "--rate", "0.999999999")
    header, _ = memsyn.storage.reading_and_writing.read(STORE)
    assert header["observed"]["window"] == "half-life of 259200 s"


def test_a_log_that_may_not_be_read() -> None:
    append(written(requests(3)))

    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memsyn.sidecar.request_log._opened", forbidden)
        result = observed(code=1)
    assert "Permission denied. Mend this, and start again: it goes on where it was." in result.stderr


# The port


def raw(address: str, *lines_of_head: str, body: bytes = b"") -> int:
    """The status of the answer to a request as it is; 0 if the connection is closed without an answer."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall("\r\n".join([*lines_of_head, "", ""]).encode() + body)
        answer = connection.recv(100)
    return int(answer.split()[1]) if answer else 0


def test_a_port_refuses_what_is_too_large_foreign_or_unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_streams, "DEADLINE", 1.0)
    batches, head = requests(64), ("POST / HTTP/1.1", "Host: localhost")

    def attack(address: str) -> None:
        bomb = gzip.compress(b"0" * (lines.LONGEST + 1))
        assert raw(address, *head, "Content-Length: 99999999999999999999") == 413
        assert raw(address, *head, f"Content-Length: {lines.LONGEST + 1}") == 413
        assert raw(address, *head, f"Content-Length: {'9' * 5000}") == 413
        assert raw(address, *head, "Content-Length: -1") == raw(address, *head) == 411
        assert raw(address, *head, "Content-Encoding: gzip", f"Content-Length: {len(bomb)}", body=bomb) == 413
        assert raw(address, *head, "Content-Encoding: gzip", "Content-Length: 3", body=b"abc") == 400
        assert raw(address, *head, "Content-Encoding: br", "Content-Length: 3", body=b"abc") == 415
        assert raw(address, *head, "Content-Type: application/x-protobuf", "Content-Length: 3", body=b"abc") == 415
        assert raw(address, *head, "Origin: https://evil.example", "Content-Length: 3", body=b"abc") == 403
        assert raw(address, head[0], "Host: evil.example", "Content-Length: 3", body=b"abc") == 403
        assert raw(address, head[0], "Host: [", "Content-Length: 3", body=b"abc") == 0
        assert raw(address, "GET / HTTP/1.1", "Host: localhost") == 501
        assert raw(address, *head, "Content-Length: 9", body=b"half") in (0, 400)  # nothing more is sent
        host, _, port = address.removeprefix("http://").rpartition(":")
        opened = [socket.create_connection((host, int(port)), timeout=10) for _ in range(60)]  # and send nothing
        for connection in opened:  # each is closed after a second
            assert connection.recv(1) == b""
            connection.close()
        assert post(address, written(batches)) == (200, "{}")

    facts, result = while_running("http://127.0.0.1:0", attack)
    assert (facts["requests"], facts["malformed"]) == (64, 0)
    assert facts["refused"] >= 60 - request_streams.MAX_CONNECTIONS
    assert [entry["event"] for entry in said(result)] == ["start"]
    assert_stored(batches)


def test_a_sender_never_waits_for_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies above the most that may wait get 503, samples above the room are dropped; both are counted."""
    monkeypatch.setattr(run, "MAX_QUEUED", 8)
    monkeypatch.setattr(observe, "MAX_QUEUED", 8)
    batch = torch.ones(100, 4, dtype=torch.float64)
    answers: list[int] = []
    goes_on, took, num_lines = threading.Event(), run.SidecarRun._take, 0

    def take(self: Any, line: Line) -> bool:
        nonlocal num_lines
        num_lines += 1
        return (num_lines == 1 or goes_on.wait(30)) and took(self, line)

    def send(address: str) -> None:
        assert post(address, written([batch]))[0] == 200
        answers.extend(post(address, "{}\n" * 10)[0] for _ in range(25))
        goes_on.set()

    monkeypatch.setattr(run.SidecarRun, "_take", take)
    facts, _ = while_running("http://127.0.0.1:0", send)
    assert (facts["seen"], facts["measured"], facts["dropped"]) == (100, 8, 92)
    assert answers.count(503) == facts["refused"] in (8, 9)
    assert facts["malformed"] == 10 * answers.count(200) in (160, 170)


def test_only_this_machine_is_listened_to_unless_told() -> None:
    for url, is_local in (("http://localhost:0", True), ("http://0.0.0.0:0", False)):
        server = RequestServer(url)
        assert server.is_local == is_local
        server.close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for url in (f"http://127.0.0.1:{taken.getsockname()[1]}", "http://127.0.0.1:99999", "http://[::1", "http://:x"):
            with pytest.raises(memsyn.OptionError, match="nothing can listen there"):
                RequestServer(url)
    facts, result = while_running("http://0.0.0.0:0", lambda _: None)
    assert facts["requests"] == 0
    assert said(result)[0]["reason"].startswith("everybody who reaches http://0.0.0.0:")
