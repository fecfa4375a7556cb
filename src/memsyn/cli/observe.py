"""The command observe: a sidecar that measures what a server answers which is not PyTorch in this process.

Owns the options, and what they are turned into: a model, a source, and a function from requests to inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from memsyn import MemoryFileError, MemsynError, Observer, OptionError, fingerprint
from memsyn.cli.files import Json
from memsyn.cli.inputs import build_model, imported, load_weights
from memsyn.cli.model_folders import model_of_folder
from memsyn.cli.screen import plain_errors, say, say_json
from memsyn.sidecar.log_position import LogPosition
from memsyn.sidecar.request_json import plain_inputs, requests_in
from memsyn.sidecar.request_log import RequestLog
from memsyn.sidecar.request_streams import RequestPipe, RequestServer
from memsyn.sidecar.run import MAX_QUEUED, SidecarRun, Source, note
from memsyn.values.conversion import read_weights


def observe_requests(
    source: Annotated[
        str, typer.Option("--from", metavar="LOG|-|http", help="A log that may grow, standard input, or a port.")
    ],
    store: Annotated[str, typer.Option(metavar="FILE", help="The file for the sums, as an Observer's.")],
    model: Annotated[
        str | None, typer.Option(metavar="package.module:build", help="The function that builds the model.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The weights that are served; or a folder of Hugging Face.")
    ] = None,
    inputs: Annotated[
        str | None, typer.Option(metavar="package.module:to_inputs", help="Turns a request into inputs of the model.")
    ] = None,
    field: Annotated[str | None, typer.Option(help="The key or attribute that holds the request.")] = None,
    segment_field: Annotated[str | None, typer.Option(help="The key or attribute that names the segment.")] = None,
    rate: Annotated[float, typer.Option(help="The share of samples that are measured.")] = 1.0,
    estimator: Annotated[str, typer.Option(help="What is measured, as an Observer takes it.")] = "mas",
    budget: Annotated[float, typer.Option(help="Percent of one core.")] = 10.0,
    interval: Annotated[float, typer.Option(help="Seconds between writes of the store.")] = 60.0,
    min_samples: Annotated[int, typer.Option(help="Of a segment that are written together, as an Observer's.")] = 64,
    half_life: Annotated[float | None, typer.Option(metavar="DAYS", help="Older samples count less.")] = None,
    last: Annotated[float | None, typer.Option(metavar="DAYS", help="Older samples do not count.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End at the end of the log.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the requests that another server answers, on a copy of its model in this process.

    Reads requests in JSON from a log, from standard input (-), or from a port of this machine (http, or its URL), and
    from OpenTelemetry in JSON. A log is read no faster than it is measured; after a restart it goes on where it was,
    and counts no request twice. Ends on SIGTERM and on Ctrl-C, with what was measured in the store. Each minute a line
    of counts goes to stderr.

    Example: memsyn observe --model package.module:build --from requests.jsonl --store traffic.safetensors
    """
    with plain_errors(), _os_errors():
        built = _model(model, weights)
        to_inputs = (
            partial(plain_inputs, model=built)
            if inputs is None
            else imported("--inputs", inputs, "to_inputs, a function of a request")
        )
        if not interval > 0:
            raise OptionError(f"--interval must be a number of seconds above 0; got {interval}.")
        observer = Observer(
            built,
            store,
            rate=rate,
            estimator=estimator,
            budget=budget,
            min_samples=min_samples,
            half_life=_days("--half-life", half_life),
            last=_days("--last", last),
            room=MAX_QUEUED,
            interval=1e9,  # it is told when to write
        )
        try:  # after the observer: who may write the store may write the position
            found, position = _source(source, store, once)
        except BaseException:
            observer.close()
            raise
        note({"event": "start", "from": getattr(found, "address", source), "fingerprint": fingerprint(built)})
        run = SidecarRun(observer, found, position, lambda text: requests_in(text, field, segment_field), to_inputs)
        stored, facts = run.until_end(interval)
    if as_json:
        say_json({"store": store, **facts})
    else:
        told = ("measured", "requests", "lines", "malformed", "dropped", "invalid", "withheld")
        say(f"{store}: " + ", ".join(f"{facts[name]:,} {name}" for name in told))
    raise typer.Exit(0 if stored and (facts["requests"] or not facts["malformed"]) else 1)


def _model(named: str | None, weights: Path | None) -> nn.Module:
    if weights is not None and weights.is_dir():
        if named is not None:
            raise OptionError(f"--weights {weights} is a folder: leave --model out, or give a state_dict in a file.")
        return model_of_folder(weights)
    if named is None:
        raise OptionError("give --model package.module:build, or a folder of Hugging Face as --weights.")
    built = build_model(named)
    if weights is not None:
        load_weights(built, read_weights(weights), weights)
    return built


def _days(option: str, days: float | None) -> timedelta | None:
    try:
        return None if days is None else timedelta(days=days)
    except (OverflowError, ValueError) as error:
        raise OptionError(f"{option} must be a number of days; got {days}.") from error


def _source(source: str, store: str, once: bool) -> tuple[Source, LogPosition | None]:
    if source == "http" or source.startswith("http://"):
        if once:
            raise OptionError("--once needs an end, which --from http has not: leave it out, and send SIGTERM.")
        server = RequestServer(source)
        if not server.is_local:
            note({"event": "warning", "reason": f"everybody who reaches {server.address} can add requests"})
        return server, None
    if source == "-":
        return RequestPipe(), None
    if "://" in store:
        raise OptionError(f"the place in a log is kept beside the store: give a local --store for --from {source}.")
    position = LogPosition(Path(source), Path(store))
    return RequestLog(Path(source), position, once=once), position


@contextmanager
def _os_errors() -> Iterator[None]:
    """In this block, an error of the disk becomes one of ours. What was measured before is in the store."""
    try:
        yield
    except MemsynError:
        raise
    except OSError as error:
        raise MemoryFileError(f"{error}. Mend this, and start again: it goes on where it was.") from error
