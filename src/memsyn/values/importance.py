"""The value Importance: per weight, a sum over samples and their count.

Owns addition and summaries of importances. Means are computed on read, so that sums and counts add up exactly.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from memsyn.errors import MismatchError, OptionError
from memsyn.parameters import fingerprint, layer_of, only_those, under_new_names
from memsyn.sharding.exchange import gathered
from memsyn.sharding.parts import any_sharded, local_part, on_parts
from memsyn.sharding.sums import summed_over_parts
from memsyn.storage.checkpoints import checkpoint_entries
from memsyn.storage.reading_and_writing import (
    IMPORTANCE,
    Groups,
    checked,
    checked_count,
    checked_texts,
    well_formed,
    write,
)
from memsyn.values.display import LayerRow, counted, html_table, html_text, size_in_memory
from memsyn.values.parts import from_checkpoint, in_parts, read_for

OBJECTIVE = "squared_l2_norm"
"""The objective of MAS, the default."""

MAGNITUDE = "abs"
"""The magnitude of MAS, the default: the absolute value of each sample's gradient."""


SUMMED = 2**28
"""Up to so many weights a notebook shows the importance of layers: summing up more would take minutes."""


@dataclass(frozen=True)
class LayerSummary:
    """The importance of one layer in numbers."""

    layer: str
    num_weights: int
    share: float
    """Of the total importance of the model, 0 to 1."""
    mean: float
    max: float
    concentration: float
    """The share of the layer's importance in its most important tenth of weights: 0.1 if all are equal."""


@final
@dataclass(frozen=True, eq=False)
class Importance:
    """How much each weight matters: Omega = sums / num_samples, the mean over samples of |gradient|.

    Of a sharded model (`fully_shard`) the sums are DTensors, cut as the parameters: each process holds its part. Then
    `matches`, `summary` and `save` must be called by all processes together; addition and means need no communication.

    Attributes:
        sums: parameter name -> sum over samples of |d s_k / d theta|, of the parameter's shape.
        num_samples: the number of samples.
        routes: parameter name -> how it was computed.
        objective: s, the function of the output whose gradient was taken.
        magnitude: what was summed: `abs` of each sample's gradient, or its square.
        fingerprint: of the weights at which it was measured; known if an `Observer` measured, else None.
    """

    sums: dict[str, Tensor]
    num_samples: int
    routes: dict[str, str] = field(default_factory=dict)
    objective: str = OBJECTIVE
    magnitude: str = MAGNITUDE
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_samples", checked_num_samples(self.num_samples, "an importance needs"))

    def __repr__(self) -> str:
        held = [*counted_weights(self.sums), counted(self.num_samples, "sample")]
        of = f"{self.magnitude} of {self.objective}"
        return f"Importance({', '.join([*held, of, size_in_memory(self.sums.values())])})"

    def _repr_html_(self) -> str:
        return html_by_layer(repr(self), self.sums, self.num_samples)

    @property
    def quantity(self) -> tuple[str, str]:
        """Objective and magnitude. Only importances of the same quantity can be added."""
        return self.objective, self.magnitude

    @property
    def names(self) -> set[str]:
        """The parameters that were measured."""
        return set(self.sums)

    def only(self, names: Container[str]) -> Importance:
        """The importance of some parameters."""
        return replace(self, sums=only_those(self.sums, names), routes=only_those(self.routes, names))

    def renamed(self, names: Mapping[str, str]) -> Importance:
        """The same with other names: old -> new. The fingerprint becomes unknown, since it covers the names."""
        if not names:
            return self
        sums, routes = under_new_names(self.sums, names), under_new_names(self.routes, names)
        return replace(self, sums=sums, routes=routes, fingerprint=None)

    def matches(self, model: nn.Module) -> bool:
        """Whether it was measured at the weights that a model has now, bit for bit.

        True if `fingerprint` is that of the model: all its parameters and floating point buffers count. False if the
        fingerprint is unknown.

        Example:
            >>> import torch, memsyn
            >>> model = torch.nn.Linear(2, 1)
            >>> found = memsyn.Importance({"weight": torch.ones(1, 2)}, 1, fingerprint=memsyn.fingerprint(model))
            >>> found.matches(model), found.matches(torch.nn.Linear(2, 1))
            (True, False)
        """
        return self.fingerprint is not None and self.fingerprint == fingerprint(model)

    def mean(self) -> dict[str, Tensor]:
        """Omega per parameter, in units of the objective per unit of weight: sums / num_samples."""
        return {name: total / self.num_samples for name, total in self.sums.items()}

    def __add__(self, other: Importance) -> Importance:
        """The importance over the samples of both, the same as measuring all samples together.

        Whole sums, as `load` gives them, are cut as those of the other, if these are sharded.

        Raises:
            MismatchError: parameters or quantities differ, or both fingerprints are known and differ.
            ModelError: both are sharded, in different ways.
        """
        if self.quantity != other.quantity:
            raise MismatchError(
                f"cannot add importances of different quantities: {self.magnitude} of {self.objective} and "
                f"{other.magnitude} of {other.objective}."
            )
        if None not in (self.fingerprint, other.fingerprint) and self.fingerprint != other.fingerprint:
            raise MismatchError(
                "cannot add importances that were measured at different weights, for example before and after a "
                "reload. Add importances of one version only."
            )
        check_same_shapes(self.sums, other.sums, "the first importance", "the second importance")
        sums = {name: on_parts(added, total, other.sums[name]) for name, total in self.sums.items()}
        routes = {**other.routes, **self.routes}
        count = self.num_samples + other.num_samples
        of = self.fingerprint if self.fingerprint == other.fingerprint else None
        return Importance(sums, count, routes, self.objective, self.magnitude, of)

    def summary(self) -> list[LayerSummary]:
        """Per layer its share of the total, mean, maximum and concentration, in the model's order.

        Of sharded sums, one layer is gathered at a time: all processes must call it together.
        """
        return summarize(self.sums, self.num_samples)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file atomically, tensor by tensor. It holds the sums, as `sum/<parameter>`.

        If they are sharded, all processes must call it together, as for `Memory.save`.

        Args:
            path: the file, or a URL, as for `Memory.save`.

        Raises:
            MemoryFileError: the file cannot be written; an old file stays.
        """
        write(path, IMPORTANCE, self.header(), {"importance": self.sums})

    def header(self) -> dict[str, Any]:
        """The entries of a file's metadata."""
        known = {} if self.fingerprint is None else {"fingerprint": self.fingerprint}
        return {
            "objective": self.objective,
            "magnitude": self.magnitude,
            "num_samples": self.num_samples,
            "routes": self.routes,
            **known,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, like: nn.Module | None = None) -> Importance:
        """Read a file that `save` wrote, from a path or a URL (`simplecache::s3://...` keeps a local copy).

        Args:
            path: the file, or its URL.
            like: a sharded model: the sums are cut as its parameters, and each process keeps its part of them. None, or
                another model: they are whole, on the CPU.

        Raises:
            MemoryFileError: the file is missing, damaged, not an importance, or of a newer format.
        """
        header, groups = read_for(path, IMPORTANCE, like)
        return cls.from_file(path, header, in_parts(groups, like))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums and a header as tensors by name, for torch.distributed.checkpoint: see `Memory.state_dict`."""
        return checkpoint_entries(IMPORTANCE, self.header(), {"importance": self.sums})

    @classmethod
    def from_checkpoint(
        cls, folder: str | os.PathLike[str], *, key: str | None = None, like: nn.Module | None = None
    ) -> Importance:
        """Read what `state_dict` gave to torch.distributed.checkpoint: see `Memory.from_checkpoint`.

        Raises:
            MemoryFileError: the checkpoint is missing or damaged, or does not hold one importance at `key`.
        """
        return cls.from_file(folder, *from_checkpoint(folder, IMPORTANCE, key, like))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], header: Mapping[str, Any], groups: Groups) -> Importance:
        """The importance in the header and groups that `storage.reading_and_writing.read` returned.

        Raises:
            MemoryFileError: they are not as `save` writes them.
        """
        with well_formed(path):
            count, routes, of = checked_origin(header)
            quantity = checked(str, header["objective"], "objective"), checked(str, header["magnitude"], "magnitude")
            return cls(groups["importance"], count, routes, *quantity, of)


def checked_origin(header: Mapping[str, Any]) -> tuple[int, dict[str, str], str | None]:
    """The count, routes and fingerprint in the header of an importance or of factors.

    Raises:
        LookupError, TypeError, ValueError: names the entry that is no such value.
    """
    of = header.get("fingerprint")
    known = None if of is None else checked(str, of, "fingerprint")
    return checked_count(header["num_samples"], "num_samples", 1), checked_texts(header["routes"], "routes"), known


def checked_num_samples(given: object, needs: str) -> int:
    """A number of samples, at least 1; `needs` begins the sentence of the error, such as "an importance needs".

    Raises:
        OptionError: it is no whole number, below 1, or above 2^63 - 1.
    """
    try:
        count = checked_count(operator.index(given), "num_samples")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise OptionError(f"num_samples must be a whole number below 2^63, got {given!r:.40}.") from None
    if count < 1:
        raise OptionError(f"{needs} at least one sample, got num_samples={count}.")
    return count


def added(one: Tensor, other: Tensor) -> Tensor:
    """The sum of two tensors, on the device of the first."""
    return one + other.to(one.device)


def summarize(sums: Mapping[str, Tensor], count: int = 1) -> list[LayerSummary]:
    """The summary by layer of an importance per weight: of sums / count. One layer is gathered at a time."""
    layers: dict[str, list[Tensor]] = {}
    for name, values in sums.items():
        layers.setdefault(layer_of(name), []).append(values)
    own = [local_part(values).sum(dtype=torch.float64) for values in sums.values()]
    total = sum(float(of_all) for of_all in summed_over_parts(own, list(sums.values())))
    return [
        _summarize_layer(layer, torch.cat([gathered(part).flatten() for part in parts]), total, count)
        for layer, parts in layers.items()
    ]


def _summarize_layer(layer: str, values: Tensor, total: float, count: int) -> LayerSummary:
    own = float(values.sum(dtype=torch.float64))
    top = values.topk(max(1, round(len(values) / 10))).values if len(values) else values
    return LayerSummary(
        layer=layer,
        num_weights=len(values),
        share=own / total if total else 0.0,
        mean=own / len(values) / count if len(values) else 0.0,
        max=float(values.max()) / count if len(values) else 0.0,
        concentration=float(top.sum(dtype=torch.float64)) / own if own else 0.0,
    )


def counted_weights(tensors: Mapping[str, Tensor]) -> list[str]:
    """The number of parameters and of weights, in words."""
    weights = sum(tensor.numel() for tensor in tensors.values())
    return [counted(len(tensors), "parameter"), counted(weights, "weight")]


def html_by_layer(title: str, sums: Mapping[str, Tensor], count: int = 1) -> str:
    """A notebook's table of the importance sums / count by layer."""
    if not sums:
        return html_text(title)
    if any_sharded(sums):
        return html_text(f"{title}\nsummary() has the layers: all processes must call it together.")
    if sum(values.numel() for values in sums.values()) > SUMMED:
        return html_text(f"{title}\nsummary() has the layers; with so many weights it takes its time.")
    rows = [
        LayerRow(
            own.layer,
            [
                f"{own.num_weights:,}",
                f"{own.share:.1%}",
                f"{own.mean:.3g}",
                f"{own.max:.3g}",
                f"{own.concentration:.1%}",
            ],
            own.share,
        )
        for own in summarize(sums, count)
    ]
    return html_table(
        title, ["layer", "weights", "share", "mean", "max", "top tenth"], rows, "with a smaller share each"
    )


def check_same_shapes(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], of_found: str, of_expected: str
) -> None:
    """Check that two sets of parameters have the same names and shapes; the error names every difference.

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
