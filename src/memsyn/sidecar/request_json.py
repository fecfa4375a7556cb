"""Requests in JSON: found in a line, by segment, and turned into inputs of the model.

Owns the formats: an object of a log, OpenTelemetry's spans and log records, and the inputs that need no function of the
user's. No error here may repeat what a request holds: it may end in a log.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from memsyn import BatchError

MAX_SEGMENT: Final = 64
"""The most characters of a segment's name: it is part of a file's name."""


class Found(NamedTuple):
    """A request, and the segment to which it belongs."""

    request: Any
    segment: str | None


def requests_in(text: bytes, field: str | None, segment_field: str | None) -> Iterator[Found]:
    """The requests in a line of JSON: one in an object, any number in the spans and log records of OpenTelemetry.

    Args:
        text: the line.
        field: the key or attribute that holds the request. None: the whole object, or the body of a log record.
        segment_field: the key or attribute that names the segment.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: the line holds something else.
    """
    held = json.loads(text.decode(), parse_constant=_refused)
    if not isinstance(held, dict):
        raise BatchError("expected a JSON object")
    if not ("resourceSpans" in held or "resourceLogs" in held):
        if field is not None and field not in held:
            raise BatchError("the object has no such --field")
        yield Found(_parsed(held) if field is None else _parsed(held[field]), _segment(held, segment_field))
        return
    for record in _records(held):
        if (field or _BODY) in record:
            yield Found(_parsed(record[field or _BODY]), _segment(record, segment_field))


_BODY: Final = ""
"""Stands for the body of a log record among its attributes."""


_LISTS: Final = (("resourceSpans", "scopeSpans", "spans"), ("resourceLogs", "scopeLogs", "logRecords"))
"""The lists within OpenTelemetry's spans, and within its log records."""


def _records(held: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The attributes of each span and log record, with those of its resource, its events and its body."""
    for kind, scopes, records in (
        ("resourceSpans", "scopeSpans", "spans"),
        ("resourceLogs", "scopeLogs", "logRecords"),
    ):
        for resource in held.get(kind, []):
            common = _attributes(resource.get("resource", {}))
            for scope in resource.get(scopes, []):
                for record in scope.get(records, []):
                    found = {**common, **_attributes(record)}
                    for event in record.get("events", []):
                        found |= _attributes(event)
                    yield {**found, _BODY: _plain(record["body"])} if "body" in record else found


def _attributes(of: Mapping[str, Any]) -> dict[str, Any]:
    return {entry["key"]: _plain(entry["value"]) for entry in of.get("attributes", [])}


def _plain(value: Mapping[str, Any]) -> Any:
    """A value of OpenTelemetry: {"arrayValue": {"values": [{"intValue": "7"}]}} is [7]."""
    for kind, held in value.items():
        if kind == "arrayValue":
            return [_plain(each) for each in held.get("values", [])]
        if kind == "kvlistValue":
            return {entry["key"]: _plain(entry["value"]) for entry in held.get("values", [])}
        return int(held) if kind == "intValue" else held
    return None


def _parsed(request: Any) -> Any:
    """A request that was written as text of JSON, as attributes and access logs hold it; other text stays text."""
    if isinstance(request, str) and request.lstrip()[:1] in ("{", "["):
        with suppress(ValueError):  # a prompt may begin so: "[INST] ..."
            return json.loads(request, parse_constant=_refused)
    return request


def _segment(held: Mapping[str, Any], field: str | None) -> str | None:
    name = None if field is None else held.get(field)
    if not isinstance(name, str | int | None) or len(str(name)) > MAX_SEGMENT:
        raise BatchError(f"the --segment-field must hold a text of at most {MAX_SEGMENT} characters, or a number")
    return None if name is None else str(name)


def _refused(constant: str) -> None:
    raise BatchError(f"{constant} is not JSON")


def plain_inputs(request: Any, model: nn.Module) -> Any:
    """The inputs of a model in a request of numbers.

    - {"inputs": [[1.5, 2], ...]}: a tensor, samples first. Whole numbers stay whole if the model has an nn.Embedding.
    - {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2]}]}: as Triton takes it over HTTP.
      One tensor is the only argument, several are keyword arguments.
    - {"input_ids": [7, 8, ...], ...}: all lists, as keyword arguments.

    A flat list is one sample. Decimal numbers get the dtype of the model's parameters.

    Raises:
        BatchError: the request holds no such numbers, or some that are not finite.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    if not isinstance(request, Mapping):
        raise BatchError("expected a JSON object of lists of numbers; for text, give --inputs package.module:to_inputs")
    given = request.get("inputs")
    if isinstance(given, list) and given and all(isinstance(each, Mapping) for each in given):
        named = {
            str(each["name"]): _tensor(each["data"], dtype, not str(each["datatype"]).startswith(("FP", "BF"))).reshape(
                [int(length) for length in each["shape"]]
            )
            for each in given
        }
        return next(iter(named.values())) if len(named) == 1 else named
    if given is not None:
        return _samples(_tensor(given, dtype, any(isinstance(module, nn.Embedding) for module in model.modules())))
    found = {str(key): _samples(_tensor(own, dtype, True)) for key, own in request.items() if isinstance(own, list)}
    if not found:
        raise BatchError("the object has no list of numbers; for text, give --inputs package.module:to_inputs")
    return found


def _tensor(values: Any, dtype: torch.dtype, keeps_whole: bool) -> Tensor:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise BatchError("a list of numbers has rows of unlike lengths, or numbers that are too large") from error
    if array.dtype.kind not in "fib" or not array.size or not array.ndim:
        raise BatchError("a list holds something else than numbers; for text, give --inputs package.module:to_inputs")
    tensor = torch.from_numpy(array)
    tensor = tensor if keeps_whole and array.dtype.kind in "ib" else tensor.to(dtype)
    if not tensor.isfinite().all():
        raise BatchError("a number is too large")
    return tensor


def _samples(tensor: Tensor) -> Tensor:
    return tensor[None] if tensor.ndim == 1 else tensor
