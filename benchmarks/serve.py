"""What an observer costs a service that speaks HTTP: requests a second, and the 99th percentile of their times.

The service of examples/serve runs in a process of its own, on loopback. Users, each in a thread with a connection that
stays open, send one drawing after the other. Blocks without and with the observer follow each other in the same
process, in alternating order, and each pair is compared. Prints a Markdown table: requests per second and p99 without
the observer; the median of the ratios with its 95% interval, for throughput, p99 and the service's processor time per
request; the share of the time in which the observer worked; the numbers of samples that it measured and dropped; the
service's resident memory after the first pair and at the end.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from tqdm import tqdm

from observe import RATES, SHARE, interval

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "serve"))
from admission import SAFE, judge
from http_limits import HTTP_OPTIONS
from model import BODIES, FILE, begin, drawings, save
from service import create_app
from users import drawn, png

SECTION = "animals"


def serve(folder: Path, rate: float, port: Any) -> None:
    """The example's service, with a path that attaches the observer or detaches it."""
    torch.set_num_threads(1)
    paused = threading.Event()
    options: dict[str, Any] = {"rate": rate, "budget": 100 * SHARE, "busy": paused.is_set}
    app = create_app(folder, "1", **options)
    observer = app.state.observer

    @app.post("/observer/{state}")
    async def turn(state: str) -> dict[str, Any]:
        if state == "on":
            paused.clear()
            observer.attach()
        else:
            paused.set()
            observer.detach()
        return {"cpu": time.process_time(), "memory": resident(), "stats": vars(observer.stats())}

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **HTTP_OPTIONS))
    threading.Thread(target=lambda: port.send(_port(server)), daemon=True).start()
    server.run()


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _port(server: uvicorn.Server) -> int:
    while not server.started:
        time.sleep(0.01)
    return int(server.servers[0].sockets[0].getsockname()[1])


@contextmanager
def service(folder: Path, rate: float) -> Iterator[int]:
    """Its port, while it runs."""
    mine, other = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(folder, rate, other), daemon=True)
    process.start()
    try:
        if not mine.poll(300):
            raise SystemExit("the service did not start within 300 s: is the machine too busy?")
        yield mine.recv()
    finally:
        process.terminate()
        process.join()


def post(connection: HTTPConnection, path: str, body: bytes = b"") -> bytes:
    connection.request("POST", path, body)
    response = connection.getresponse()
    found = response.read()
    if response.status != 200:
        raise SystemExit(f"{path} failed: {found.decode()}")
    return found


def turned(port: int, state: str) -> dict[str, Any]:
    """Attach or detach the observer; returns what the service reports about itself at that moment."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        return json.loads(post(connection, f"/observer/{state}"))  # type: ignore[no-any-return]
    finally:
        connection.close()


def load(port: int, pictures: list[bytes], *, num_users: int, seconds: float, most: int) -> tuple[float, float, int]:
    """Requests a second, the 99th percentile of their times in seconds, and their number, at most so many."""
    taken: list[list[float]] = [[] for _ in range(num_users)]
    begun = time.perf_counter()

    def user(own: list[float]) -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        while (start := time.perf_counter()) < begun + seconds and len(own) < most // num_users:
            post(connection, f"/predict/{SECTION}", pictures[len(own) % len(pictures)])
            own.append(time.perf_counter() - start)
        connection.close()

    with ThreadPoolExecutor(num_users) as pool:
        list(pool.map(user, taken))
    times = [value for own in taken for value in own]
    return len(times) / (time.perf_counter() - begun), float(np.quantile(times, 0.99)), len(times)


def block(port: int, state: str, pictures: list[bytes], limits: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """Throughput, p99 and processor time per request, and what the service says afterwards."""
    turned(port, state)
    if state == "off":
        time.sleep(3.0)  # until the observer has finished the batch that it was measuring
    before = turned(port, state)
    throughput, p99, count = load(port, pictures, **limits)
    after = turned(port, state)
    after["worked"] = after["stats"]["seconds"] - before["stats"]["seconds"]
    return [throughput, p99, (after["cpu"] - before["cpu"]) / count], after


def compare(name: str, rate: float, rounds: int, limits: dict[str, Any]) -> None:
    folder = Path(tempfile.mkdtemp())
    side = 64 if name == "efficientnet-lite0" else 32
    served = begin(name, side, {SECTION: drawings(side)[SECTION].class_names})
    judge(folder, served, SAFE, "It is the first version.")
    save(served, folder / FILE)
    pictures = [png(pixels) for pixels in drawn([SECTION], 64, side, seed=0)[0]]
    ratios, without, worked = [], [], 0.0
    with service(folder, rate) as port:
        warm_up(port, pictures, rate)
        first: dict[str, Any] | None = None
        for number in tqdm(range(rounds), f"{name}, {rate:.0%}"):
            found = {}
            for state in ("off", "on") if number % 2 else ("on", "off"):
                found[state], last = block(port, state, pictures, limits)
                if state == "on":
                    worked += last["worked"]
            first = first or last
            without.append(found["off"])
            ratios.append([one / other for one, other in zip(found["on"], found["off"], strict=True)])
        last = turned(port, "off")
    own = [float(np.median(column)) for column in zip(*without, strict=True)]
    cells = [interval(column) for column in zip(*ratios, strict=True)]
    assert first is not None
    print(
        f"| {name} | {rate:.0%} | {own[0]:.0f} | {1000 * own[1]:.1f} | {' | '.join(cells)} "
        f"| {worked / (rounds * limits['seconds']):.1%} | {last['stats']['measured']} | {last['stats']['dropped']} "
        f"| {first['memory']:.0f} | {last['memory']:.0f} |",
        flush=True,
    )


def warm_up(port: int, pictures: list[bytes], rate: float) -> None:
    """Serve until the observer has checked the routes of the model: that cost is not what is measured here."""
    turned(port, "on")
    end = time.monotonic() + 300
    while turned(port, "on")["stats"]["measured"] == 0:
        load(port, pictures, num_users=1, seconds=1.0, most=10**6)
        if time.monotonic() > end:
            raise SystemExit(f"nothing was measured in 300 s at rate {rate:g}: is the machine too busy?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", nargs="+", choices=BODIES, default=list(BODIES))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--rounds", type=int, default=10, help="pairs of blocks")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a block: more than the observer rests")
    parser.add_argument("--requests", type=int, default=20_000, help="in a block, at most")
    parser.add_argument("--users", type=int, default=4)
    given = parser.parse_args()
    limits = {"num_users": given.users, "seconds": given.seconds, "most": given.requests}
    print(
        "| body | rate | requests/s without | p99 without, ms | throughput | p99 "
        "| processor time per request | at work | measured | dropped | MiB after a pair | MiB at the end |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name in given.bodies:
        for rate in given.rates:
            compare(name, rate, given.rounds, limits)


if __name__ == "__main__":
    main()
