"""The whole story: a first version, two replicas, a day of users, a night that is accepted, and one that is refused."""

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from model import BODIES, FILE, load
from users import day

HERE = Path(__file__).parent
START = 120.0
"""Seconds that a replica may take to start, or an observer to measure what waits."""


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def get(port: int, path: str) -> str:
    """What a replica answers."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def metrics(port: int) -> dict[str, float]:
    """The numbers of a replica."""
    lines = [line.rsplit(" ", 1) for line in get(port, "/metrics").splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def run(*arguments: object) -> int:
    """Show a command and do it; returns its exit code."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ python examples/serve/{' '.join(words)}", flush=True)
    return subprocess.run([sys.executable, HERE / words[0], *words[1:]], check=False).returncode


@contextmanager
def replicas(folder: Path, ports: Sequence[int]) -> Iterator[None]:
    """A process for each port, until the block ends. They measure more than a real service would: a day is a minute."""
    options = ["--folder", str(folder), "--rate", "0.5", "--budget", "50", "--interval", "2"]
    services = [
        subprocess.Popen([sys.executable, HERE / "service.py", "--port", str(port), "--replica", str(k + 1), *options])
        for k, port in enumerate(ports)
    ]
    try:
        for port, service in zip(ports, services, strict=True):
            await_replica(port, service)
        yield
    finally:
        for service in services:
            service.terminate()
        for service in services:
            service.wait()


def await_replica(port: int, service: "subprocess.Popen[bytes]") -> None:
    """Wait until it answers."""
    end = time.monotonic() + START
    while time.monotonic() < end and service.poll() is None:
        try:
            get(port, "/healthz")
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"the replica at port {port} did not start.")


def show(ports: Sequence[int]) -> None:
    """Wait until what was taken is measured and stored; then print some metrics."""
    end = time.monotonic() + START
    while any(metrics(port)["memsyn_observer_waiting"] for port in ports) and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(3)  # an interval of the store
    for port in ports:
        found = metrics(port)
        counts = [f"{name} {found[f'memsyn_observer_{name}_total']:g}" for name in ("seen", "measured")]
        dropped = sum(value for name, value in found.items() if name.startswith("memsyn_observer_dropped_total"))
        counts.append(f"dropped {dropped:g}")
        print(f"replica at {port}: version {found['serve_version']:g}; samples {', '.join(counts)}", flush=True)


def main() -> None:
    """Tell it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/serve"))
    parser.add_argument("--body", choices=BODIES, default="efficientnet-lite0")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-4, help="of the body")
    parser.add_argument("--requests", type=int, default=400, help="in a day")
    given = parser.parse_args()
    if any(given.folder.glob("*.safetensors")):
        raise SystemExit(f"{given.folder} holds another story: remove it, or name another --folder.")
    training = ["--folder", given.folder, "--epochs", given.epochs]
    if run("train.py", *training, "--lr", given.lr, "--body", given.body, "--side", given.side):
        raise SystemExit("the first version could not be trained.")
    os.environ["SERVE_TOKEN"] = secrets.token_urlsafe()  # the replicas and the nights have it from here
    ports = [free_port(), free_port()]
    with replicas(given.folder, ports):
        # One answer in ten may change; the second night is careless.
        allowed = ["--min-agreement", 0.9, "--max-change", 0.1]
        nights = (("objects", given.lr, 10.0), ("people", 3 * given.lr, 0.0))
        for number, (learned, lr, strength) in enumerate(nights, start=1):
            sections = list(json.loads(get(ports[0], "/healthz"))["sections"])
            right = day(given.folder, ports, sections, given.requests, given.side, seed=number)
            print(f"\nDay {number}: {given.requests} drawings, {right:.1%} named rightly")
            show(ports)
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            night = [*training, "--lr", f"{lr:g}", "--learn", learned, "--strength", strength]
            code = run("nightly.py", *night, *allowed, "--reload", *urls)
            print(f"exit code {code}; version {load(given.folder / FILE).version} is served", flush=True)


if __name__ == "__main__":
    main()
