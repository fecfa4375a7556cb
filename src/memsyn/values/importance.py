"""The value Importance: per weight, a sum over samples and their count.

Owns what can be done with a measured importance. Means are computed on read, so that importances add up exactly.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from memsyn.errors import MismatchError, OptionError
from memsyn.parameters import layer_of
from memsyn.storage.reading_and_writing import IMPORTANCE, Groups, checked_count, read, well_formed, write

OBJECTIVE = "squared_l2_norm"
"""The objective of MAS: what an importance is of unless it says otherwise."""

MAGNITUDE = "abs"


@dataclass(frozen=True)
class LayerSummary:
    """What one layer holds of an importance."""

    layer: str
    num_weights: int
    share: float
    """Of the total importance of the model, 0 to 1."""
    mean: float
    max: float
    concentration: float
    """The share of the layer's importance that its most important tenth of weights holds: 0.1 if spread evenly."""


@final
@dataclass(frozen=True, eq=False)
class Importance:
    """How much each weight matters: Omega = sums / num_samples, Omega the mean over samples of |g_k|.

    Attributes:
        sums: parameter name -> sum over samples of |d s_k / d theta|, of the parameter's shape.
        num_samples: how many samples were summed.
        routes: parameter name -> how it was computed.
        fingerprint: of the weights it was measured at, if that is known: an `Observer` says so.
    """

    sums: dict[str, Tensor]
    num_samples: int
    routes: dict[str, str] = field(default_factory=dict)
    objective: str = OBJECTIVE
    magnitude: str = MAGNITUDE
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "num_samples", checked_count(operator.index(self.num_samples)))
        except (TypeError, ValueError):
            raise OptionError(f"num_samples must be a whole number below 2^63, got {self.num_samples!r:.40}.") from None
        if self.num_samples < 1:
            raise OptionError(f"an importance is over at least one sample, got num_samples={self.num_samples}.")

    @property
    def quantity(self) -> tuple[str, str]:
        """What was measured: objective and magnitude. Importances of one quantity can be added."""
        return self.objective, self.magnitude

    def mean(self) -> dict[str, Tensor]:
        """Omega per parameter, in units of the objective per unit of weight: sums / num_samples."""
        return {name: total / self.num_samples for name, total in self.sums.items()}

    def __add__(self, other: Importance) -> Importance:
        """The importance over the samples of both: exactly what measuring them together gives.

        Raises:
            MismatchError: the two are of different parameters or of different quantities, or are known to be of
                different weights.
        """
        if self.quantity != other.quantity:
            raise MismatchError(
                f"cannot add importances of different quantities: {self.magnitude} of {self.objective} and "
                f"{other.magnitude} of {other.objective}."
            )
        if None not in (self.fingerprint, other.fingerprint) and self.fingerprint != other.fingerprint:
            raise MismatchError(
                "cannot add importances that were measured at different weights, as before and after a reload: add up "
                "those of one version."
            )
        check_same_shapes(self.sums, other.sums, "the first importance", "the second importance")
        sums = {name: total + other.sums[name].to(total.device) for name, total in self.sums.items()}
        routes = {**other.routes, **self.routes}
        count = self.num_samples + other.num_samples
        of = self.fingerprint if self.fingerprint == other.fingerprint else None
        return Importance(sums, count, routes, self.objective, self.magnitude, of)

    def summary(self) -> list[LayerSummary]:
        """Per layer its share of the total, mean, maximum and concentration, in the model's order."""
        return summarize(self.mean())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, whole or not at all, tensor by tensor.

        Args:
            path: the file, or any URL that fsspec knows (`s3://`, `gs://`, ...; the extra `remote`): that is written to
                a local temporary file, then uploaded. Object stores show the old one until the new one is complete; a
                server that shows files as they arrive (`sftp://`, `ftp://`) may keep half of it, which will not load.

        Raises:
            MemoryFileError: the file cannot be written; what was there stays.
        """
        write(path, IMPORTANCE, self.header(), {"importance": self.sums})

    def header(self) -> dict[str, Any]:
        """What a file says of it beside the sums."""
        known = {} if self.fingerprint is None else {"fingerprint": self.fingerprint}
        return {
            "objective": self.objective,
            "magnitude": self.magnitude,
            "num_samples": self.num_samples,
            "routes": self.routes,
            **known,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Importance:
        """Read what `save` wrote, from a path or a URL (`simplecache::s3://...` keeps a copy); tensors are on the CPU.

        Raises:
            MemoryFileError: the file is missing, damaged, not an importance, or of a newer format.
        """
        return cls.from_file(path, *read(path, IMPORTANCE))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], header: Mapping[str, Any], groups: Groups) -> Importance:
        """What `storage.read` found, as an importance.

        Raises:
            MemoryFileError: it is not what `save` writes.
        """
        with well_formed(path):
            routes = {str(name): str(route) for name, route in header["routes"].items()}
            quantity = str(header["objective"]), str(header["magnitude"])
            of = header.get("fingerprint")
            if not isinstance(of, str | None):
                raise TypeError(f"fingerprint is {of!r:.40}")
            return cls(groups["importance"], checked_count(header["num_samples"]), routes, *quantity, of)


def summarize(omega: Mapping[str, Tensor]) -> list[LayerSummary]:
    """The summary of any importance given per weight, by layer."""
    layers: dict[str, list[Tensor]] = {}
    for name, values in omega.items():
        layers.setdefault(layer_of(name), []).append(values.detach().flatten())
    total = sum(float(values.sum(dtype=torch.float64)) for values in omega.values())
    return [_summarize_layer(layer, torch.cat(parts), total) for layer, parts in layers.items()]


def _summarize_layer(layer: str, values: Tensor, total: float) -> LayerSummary:
    own = float(values.sum(dtype=torch.float64))
    top = values.topk(max(1, round(len(values) / 10))).values if len(values) else values
    return LayerSummary(
        layer=layer,
        num_weights=len(values),
        share=own / total if total else 0.0,
        mean=own / len(values) if len(values) else 0.0,
        max=float(values.max()) if len(values) else 0.0,
        concentration=float(top.sum(dtype=torch.float64)) / own if own else 0.0,
    )


def check_same_shapes(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], of_found: str, of_expected: str
) -> None:
    """Refuse two sets of parameters that are not the same by name and shape, and name every difference.

    Raises:
        MismatchError: a parameter is missing on either side, or has another shape.
    """
    differences = [f"{name} is missing in {of_expected}" for name in found if name not in expected]
    differences += [f"{name} is missing in {of_found}" for name in expected if name not in found]
    differences += [
        f"{name} is {tuple(values.shape)} in {of_found}, {tuple(expected[name].shape)} in {of_expected}"
        for name, values in found.items()
        if name in expected and values.shape != expected[name].shape
    ]
    if differences:
        raise MismatchError("the parameters differ: " + "; ".join(differences) + ".")
