"""A service that names drawings, and measures on its requests which weights its users rely on.

A worker answers one request after the other on one core, in the event loop. A new version is loaded and checked in a
thread, and takes over between two requests. For more cores, start more workers or replicas: each worker finds a store
of its own.
"""

import argparse
import asyncio
import ctypes
import fcntl
import io
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from hmac import compare_digest
from itertools import count
from pathlib import Path
from typing import IO, Any, cast, final
from urllib.parse import urlsplit

import numpy as np
import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from starlette.requests import ClientDisconnect
from torch import Tensor

import memsyn
from admission import AdmissionError, admitted
from http_limits import HTTP_OPTIONS
from memsyn.integrations.prometheus import export
from memsyn_bench.data.drawings import normalise, resize
from model import FILE, Served, adopt
from replicas import token

LARGEST = 2**20
"""Bytes of a request."""
WIDEST = 1024
"""Pixels of a drawing's side."""
FLUSH = 30.0
"""Seconds that a reload waits at most until the samples of the old version are measured."""


def drawing(png: bytes, side: int) -> Tensor:
    """A PNG as the network takes it, (1, 3, side, side)."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if max(image.size) > WIDEST:  # known before anything is unpacked
            raise ValueError("too wide")
        pixels = np.array(image.convert("RGB"), dtype=np.float32)
    return normalise(resize(torch.from_numpy(pixels).permute(2, 0, 1)[None], side))


async def body(request: Request) -> bytes:
    """The body of a request, whatever length its header states."""
    found = bytearray()
    try:
        async for part in request.stream():
            found += part
            if len(found) > LARGEST:
                raise HTTPException(413, f"send one PNG of at most {LARGEST} bytes.")
    except ClientDisconnect:
        raise HTTPException(400, "the request ended too early.") from None  # nobody reads it
    return bytes(found)


def answer(served: Served, section: str, image: Tensor, num_names: int = 3) -> dict[str, Any]:
    """The likeliest names of a drawing."""
    with torch.inference_mode():
        scores = served.network(image, served.head(section)).softmax(1)[0]
    if not bool(scores.isfinite().all()):
        raise HTTPException(503, "the model has no finite answer to this drawing.")
    best = scores.topk(min(num_names, len(scores)))
    names = [served.sections[section][k] for k in best.indices.tolist()]
    return {"names": names, "scores": [round(score, 4) for score in best.values.tolist()], "version": served.version}


def own_store(folder: Path, replica: str) -> tuple[int, Path, IO[str]]:
    """The first place in a replica that no living worker has; its store, and the open file that holds the place.

    The lock ends with the process, however that ends: a worker that is started again goes on with the store.
    """
    for place in count(1):
        name = f"traffic-{replica}" + (f"_{place}" if place > 1 else "")
        lock = open(folder / f".{name}.lock", "a")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return place, folder / f"{name}.safetensors", lock
        except BlockingIOError:
            lock.close()
    raise AssertionError


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes when a file is replaced; None without a file."""
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return None


@final
class Worker:
    """The version that this process serves, and its observer."""

    def __init__(self, folder: Path, replica: str, options: dict[str, Any]) -> None:
        self._folder, self._stamp = folder, stamp(folder / FILE)
        self.served = admitted(folder)
        self.place, store, self._lock = own_store(folder, replica)
        self.observer = memsyn.Observer(self.served.network, store, **options)
        self.observer.attach()
        self._turn = asyncio.Lock()

    async def renew(self) -> None:
        """Serve the version that is in the folder.

        Samples that wait were answered by the old version. They are measured before its weights go, and no others come
        in that time, so that none is stale.

        Raises:
            AdmissionError: the present version goes on.
        """
        async with self._turn:
            found = stamp(self._folder / FILE)
            if found is not None and found == self._stamp:
                return
            fresh = await asyncio.to_thread(admitted, self._folder)
            if (fresh.body, fresh.side) != (self.served.body, self.served.side):
                raise AdmissionError("it has another body: start the service anew")
            self.observer.detach()
            try:
                await asyncio.to_thread(self.observer.flush, FLUSH)
                adopt(self.served.network, fresh.network)
                self.served = Served(
                    self.served.network, fresh.body, fresh.side, fresh.sections, fresh.version, fresh.parent
                )
                self._stamp = found
            finally:
                self.observer.attach()

    async def watch(self, every: float = 1.0) -> None:
        """Follow the file: of several workers at one port, a request to reload reaches one."""
        tried = self._stamp
        while True:
            await asyncio.sleep(every)
            found = stamp(self._folder / FILE)
            if found not in (tried, self._stamp):
                tried = found
                try:
                    await self.renew()
                except Exception as error:
                    logging.getLogger("serve").error("version %d goes on serving: %s", self.served.version, error)

    def close(self) -> None:
        """Store what was measured, and give the place back."""
        self.observer.close()
        self._lock.close()


@final
class OfWorker:
    """A registry whose metrics have the worker's place as a label: each scrape reaches any one of several workers."""

    def __init__(self, registry: CollectorRegistry, place: int) -> None:
        self._registry, self._place = registry, {"worker": str(place)}

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        for metric in self._registry.collect():
            metric.samples = [own._replace(labels={**own.labels, **self._place}) for own in metric.samples]
            yield metric


async def own_pages_only(request: Request) -> None:
    """Refuse what a web page of another site sends: a browser says so in `Origin`, other programs send none."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "this service does not answer other sites' pages.")


async def check_token(request: Request) -> None:
    """Refuse whoever does not know the token; without a token, everybody."""
    expected = request.app.state.token
    if not expected:
        raise HTTPException(403, "there is no token: set SERVE_TOKEN or SERVE_TOKEN_FILE.")
    given = request.headers.get("authorization", "").encode("latin-1")
    if not compare_digest(given, f"Bearer {expected}".encode()):
        raise HTTPException(401, "send 'Authorization: Bearer TOKEN'.", {"WWW-Authenticate": "Bearer"})


def create_app(folder: Path, replica: str, *, of_several: bool = False, **options: Any) -> FastAPI:
    """The service.

    Args:
        folder: holds the model and the observers' stores.
        replica: begins the name of this process's store.
        of_several: whether other workers answer at the same port: then metrics name the worker.
        options: for the observer.

    Raises:
        AdmissionError: the model in the folder may not be served.
    """
    worker = Worker(folder, replica, options)
    registry = CollectorRegistry()
    memories = sorted(folder.glob("memory-*.safetensors"), key=lambda path: path.stat().st_mtime)
    export(worker.observer, registry, memory=memories[-1] if memories else None)
    requests = Counter("serve_requests", "Drawings that were named", ["section"], registry=registry)
    reloads = Counter("serve_reloads", "Requests to reload, by what became of them", ["result"], registry=registry)
    Gauge("serve_version", "Of the model that is served", registry=registry).set_function(lambda: worker.served.version)
    shown = cast(CollectorRegistry, OfWorker(registry, worker.place)) if of_several else registry

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(worker.watch())
        yield
        watching.cancel()
        worker.close()

    # Without pages of its own: those would fetch scripts from elsewhere.
    app = FastAPI(title="Names of drawings", lifespan=lifespan, openapi_url=None)
    app.state.worker, app.state.observer, app.state.token = worker, worker.observer, token()

    @app.post("/predict/{section}", dependencies=[Depends(own_pages_only)])
    async def predict(section: str, request: Request) -> dict[str, Any]:
        png, served = await body(request), worker.served
        if section not in served.sections:
            raise HTTPException(404, f"there is no such section: take one of {', '.join(served.sections)}.")
        try:
            image = drawing(png, served.side)
        except Exception:  # whatever a picture can do; its text may hold addresses
            raise HTTPException(422, f"send one PNG, with sides of {WIDEST} pixels at most.") from None
        found = answer(served, section, image)
        requests.labels(section).inc()
        return found

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(shown), media_type="text/plain; version=0.0.4")

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        served = worker.served
        return {"status": "ok", "version": served.version, "sections": list(served.sections)}

    @app.post("/reload", dependencies=[Depends(own_pages_only), Depends(check_token)])
    async def reload() -> dict[str, Any]:
        try:
            await worker.renew()
        except AdmissionError as error:
            reloads.labels("refused").inc()
            raise HTTPException(409, f"version {worker.served.version} goes on serving: {error}.") from None
        reloads.labels("accepted").inc()
        return await healthz()

    return app


def replica_name(text: str) -> str:
    """Checked, since it begins the names of files."""
    if not re.fullmatch("[A-Za-z0-9-]+", text):
        raise argparse.ArgumentTypeError(f"take letters, digits and dashes, not {text!r}")
    return text


def arguments() -> argparse.Namespace:
    """What the command was given; a worker reads it again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/serve"))
    parser.add_argument("--replica", type=replica_name, default="1")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--workers", type=int, default=1, help="processes at this port, each with a store of its own")
    parser.add_argument("--rate", type=float, default=0.01, help="the share of drawings that is measured")
    parser.add_argument("--budget", type=float, default=10.0, help="percent of a core that it may cost")
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between writes of the store")
    return parser.parse_args()


def keep_memory_flat() -> None:
    """Have glibc give back what is freed in pieces of 128 KiB or more: else they stay in fragments of its heap.

    Batches of all sizes are measured. By default, the process grows by 7% until it has met them; so by 3%.
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD, and no adjustment of it


def worker_app() -> FastAPI:
    """The service of one worker."""
    given = arguments()
    torch.set_num_threads(1)
    keep_memory_flat()
    options = {"rate": given.rate, "budget": given.budget, "interval": given.interval}
    try:
        return create_app(given.folder, given.replica, of_several=given.workers > 1, **options)
    except AdmissionError as error:
        raise SystemExit(f"{given.folder / FILE} is not served: {error}.") from error


def main() -> None:
    """Serve until interrupted."""
    given = arguments()
    uvicorn.run(
        "service:worker_app", factory=True, host=given.host, port=given.port, workers=given.workers, **HTTP_OPTIONS
    )


if __name__ == "__main__":
    main()
