"""A service that names drawings, and measures on its requests which weights its users rely on.

One process is one replica: it answers one request after the other on one core, in the event loop. So a reload happens
between two requests, and needs no lock. For more cores, start more replicas, each with a store of its own.
"""

import argparse
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image, UnidentifiedImageError
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from torch import Tensor

import memsyn
from memsyn.integrations.prometheus import export
from memsyn_bench.data.drawings import normalise, resize
from model import FILE, Served, adopt, load

LARGEST = 2**20
"""Bytes of a request."""
WIDEST = 1024
"""Pixels of a drawing's side."""


def drawing(png: bytes, side: int) -> Tensor:
    """A PNG as the network takes it, (1, 3, side, side)."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        if max(image.size) > WIDEST:
            raise ValueError(f"a side has {max(image.size)} pixels, {WIDEST} at most")
        pixels = np.array(image.convert("RGB"), dtype=np.float32)
    return normalise(resize(torch.from_numpy(pixels).permute(2, 0, 1)[None], side))


async def body(request: Request) -> bytes:
    """The body of a request, whatever length its header states."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > LARGEST:
            raise HTTPException(413, f"send one PNG of at most {LARGEST} bytes.")
    return bytes(found)


def answer(served: Served, section: str, image: Tensor, num_names: int = 3) -> dict[str, Any]:
    """The likeliest names of a drawing."""
    with torch.inference_mode():
        scores = served.network(image, served.head(section)).softmax(1)[0]
    best = scores.topk(min(num_names, len(scores)))
    names = [served.sections[section][k] for k in best.indices.tolist()]
    return {"names": names, "scores": [round(score, 4) for score in best.values.tolist()], "version": served.version}


def create_app(folder: Path, replica: str, **options: Any) -> FastAPI:
    """The service.

    Args:
        folder: holds the model and the observers' stores.
        replica: names the store of this process.
        options: for the observer.
    """
    served = load(folder / FILE)
    observer = memsyn.Observer(served.network, folder / f"traffic-{replica}.safetensors", **options)
    observer.attach()

    registry = CollectorRegistry()
    export(observer, registry)
    requests = Counter("serve_requests", "Drawings that were named", ["section"], registry=registry)
    version = Gauge("serve_version", "Of the model that is served", registry=registry)
    version.set(served.version)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        observer.close()

    app = FastAPI(title="Names of drawings", lifespan=lifespan)
    app.state.observer = observer

    @app.post("/predict/{section}")
    async def predict(section: str, request: Request) -> dict[str, Any]:
        png = await body(request)
        if section not in served.sections:
            raise HTTPException(404, f"there is no section {section!r}: take one of {', '.join(served.sections)}.")
        try:
            image = drawing(png, served.side)
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
            raise HTTPException(422, f"that is no PNG this service takes: {error}.") from error
        found = answer(served, section, image)
        requests.labels(section).inc()
        return found

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "version": served.version, "sections": list(served.sections)}

    @app.post("/reload")
    async def reload() -> dict[str, Any]:
        nonlocal served
        try:
            fresh = load(folder / FILE)
            if (fresh.body, fresh.side) != (served.body, served.side):
                raise ValueError("it has another body: start the service anew")
        except (OSError, ValueError) as error:
            raise HTTPException(409, f"version {served.version} goes on serving: {error}.") from error
        adopt(served.network, fresh.network)
        served = Served(served.network, fresh.body, fresh.side, fresh.sections, fresh.version)
        version.set(served.version)
        return await healthz()

    return app


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/serve"))
    parser.add_argument("--replica", default="1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--rate", type=float, default=0.01, help="the share of drawings that is measured")
    parser.add_argument("--budget", type=float, default=10.0, help="percent of a core that it may cost")
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between writes of the store")
    given = parser.parse_args()
    torch.set_num_threads(1)
    app = create_app(given.folder, given.replica, rate=given.rate, budget=given.budget, interval=given.interval)
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
