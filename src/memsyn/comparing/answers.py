"""Answers: what the outputs of two models say for each sample, and how far they differ.

Owns the kinds of answers, how a kind is told from an output, and the numbers of each sample. Must not run models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from memsyn.errors import BatchError, OptionError, OutputError
from memsyn.measuring.objectives import EMBEDDINGS
from memsyn.parameters import wide_dtype

KINDS_OF_ANSWERS: Final = {
    "classes": "the largest of the logits (samples, classes)",
    "tokens": "the largest of the logits at each position (samples, positions, ..., classes)",
    "values": "the output within a relative tolerance, of any shape",
    "embeddings": "the nearest other sample, by the cosine of the outputs (samples, features)",
}
"""Kind -> what the answer is."""

AUTO_KIND: Final = "auto"

_UNIT_LENGTH: Final = 1e-3
"""How far the length of an output may be from 1, to look normalised."""

_TIED: Final = 1e-6
"""Cosines that differ by less are the same: of samples that are in the data twice."""

_ROWS: Final = 1024
"""How many samples are compared with all others at a time."""


def check_kind(kind: object, tolerance: object) -> None:
    """Refuse an unknown kind, and a tolerance that is no positive number.

    Raises:
        OptionError: says what is allowed.
    """
    if kind not in (AUTO_KIND, *KINDS_OF_ANSWERS):
        raise OptionError(f"kind must be {AUTO_KIND}, {', '.join(KINDS_OF_ANSWERS)}; got {kind!r}.")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance > 0:
        raise OptionError(f"tolerance must be a number above 0, such as 0.05; got {tolerance!r}.")


@dataclass(frozen=True)
class Output:
    """What a model gave for a batch.

    Attributes:
        values: (samples, ...), the raw output.
        mask: (samples, positions), not 0 where a position counts; None if all count.
        source: the key of the output's mapping; None for other outputs.
    """

    values: Tensor
    mask: Tensor | None
    source: str | None


def kind_of_answers(output: Output, inputs: Any) -> tuple[str, str]:
    """The kind of answers that an output gives, and by what it was told.

    Raises:
        OptionError: the output may be of several kinds.
    """
    values, source = output.values, output.source
    shape, own = tuple(values.shape), tuple(values.shape[1:])
    named = f"{source!r} of shape {own} for each sample" if source else f"an output of shape {own} for each sample"
    if own in ((), (1,)):
        return "values", "one output for each sample"
    if source in EMBEDDINGS and values.ndim == 2:
        return "embeddings", named
    if source == "logits" and values.ndim in (2, 3):
        return ("classes" if values.ndim == 2 else "tokens"), named
    if values.ndim == 3 and source is None and (output.mask is not None or _has_tokens(inputs, shape[:2])):
        return "tokens", "a row of outputs for each token"
    is_unit = values.ndim == 2 and bool(((values.detach().double().norm(dim=1) - 1).abs() < _UNIT_LENGTH).all())
    if values.ndim == 2 and source is None and not is_unit:
        return "classes", named
    kinds = "; ".join(f"{kind!r}, {what}" for kind, what in KINDS_OF_ANSWERS.items())
    raise OptionError(
        f"{named}{', of length 1,' if is_unit else ''} may be several kinds of answers. Say which, with kind=: {kinds}."
    )


def _has_tokens(inputs: Any, shape: tuple[int, ...]) -> bool:
    """Whether the inputs hold whole numbers, one for each position: the numbers of tokens."""
    found = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    return any(
        isinstance(own, Tensor)
        and not own.is_floating_point()
        and own.dtype != torch.bool
        and tuple(own.shape[:2]) == shape
        and own.ndim == 2
        for own in found
    )


def check_shape(kind: str, values: Tensor) -> None:
    """Refuse an output that has no answers of a kind.

    Raises:
        OutputError: says what shape is needed.
    """
    shape = tuple(values.shape)
    fits = {
        "classes": values.ndim == 2 and shape[-1] > 1,
        "tokens": values.ndim > 2 and shape[-1] > 1,
        "values": values.ndim > 0,
        "embeddings": values.ndim == 2,
    }[kind]
    if not fits:
        raise OutputError(
            f"kind={kind!r} is {KINDS_OF_ANSWERS[kind]}; the output has the shape {shape}. Give another kind, or "
            "choose the output with forward=lambda model, batch: ..."
        )


@dataclass(frozen=True)
class PerSample:
    """Numbers of each sample, (N,) in float64.

    Attributes:
        same: whether both models give the same answer: 1 or 0; of tokens, the share of positions.
        change: ||y' - y|| / ||y||, of the new and old output.
        norms: ||y||.
        divergence: KL(old || new) in nats, a mean over positions; None if the outputs are no logits.
    """

    same: Tensor
    change: Tensor
    norms: Tensor
    divergence: Tensor | None


@final
class Answers:
    """Collects the numbers of samples, batch by batch.

    Args:
        kind: a key of `KINDS_OF_ANSWERS`.
        tolerance: by how much a value may change, relative to its size, and count as the same.
    """

    def __init__(self, kind: str, tolerance: float) -> None:
        self._kind, self._tolerance = kind, tolerance
        self._parts: dict[str, list[Tensor]] = {"same": [], "change": [], "norms": [], "divergence": []}
        self._embeddings: tuple[list[Tensor], list[Tensor]] = ([], [])

    @property
    def num_samples(self) -> int:
        """How many samples were added."""
        return sum(map(len, self._parts["norms"]))

    def add(self, old: Tensor, new: Tensor, mask: Tensor | None, batch_index: int) -> None:
        """Add the outputs of both models for a batch.

        Raises:
            OutputError: an output of the old model is not finite, or no position of a sample counts.
        """
        dtype = torch.promote_types(wide_dtype(old), wide_dtype(new))
        old, new = old.to(new.device, dtype), new.to(dtype)
        if mask is not None:
            counts = mask.view(*mask.shape, *[1] * (old.ndim - 2)) != 0
            old, new = (torch.where(counts, own, torch.zeros((), dtype=dtype, device=own.device)) for own in (old, new))
        if not bool(old.isfinite().all()):
            bad = int((~old.reshape(len(old), -1).isfinite().all(1)).nonzero()[0, 0])
            raise OutputError(
                f"batch {batch_index}, sample {self.num_samples + bad}: an output of the old model is NaN or infinite. "
                "Leave this sample out, or choose outputs that are finite with forward=lambda model, batch: ..."
            )
        norms, change = _relative_change(old, new)
        self._keep("norms", norms)
        self._keep("change", change)
        if self._kind == "values":
            self._keep("same", change <= self._tolerance)
        elif self._kind == "embeddings":
            for kept, own in zip(self._embeddings, (old, new), strict=True):
                kept.append(torch.nn.functional.normalize(own.nan_to_num(), dim=1, eps=1e-30).cpu())
        else:
            self._add_logits(old, new, mask, batch_index)

    def _add_logits(self, old: Tensor, new: Tensor, mask: Tensor | None, batch_index: int) -> None:
        same = (old.argmax(-1) == new.argmax(-1)) & new.isfinite().all(-1)
        logs = old.log_softmax(-1), new.log_softmax(-1)
        divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).clamp_min(0)
        divergence = torch.where(divergence.isfinite(), divergence, torch.inf)
        if old.ndim > 2:
            counts = torch.ones_like(same) if mask is None else (mask != 0).view(*mask.shape, *[1] * (same.ndim - 2))
            counts = counts.expand_as(same).flatten(1)
            total = counts.sum(1)
            if bool((total == 0).any()):
                empty = self.num_samples - len(total) + int((total == 0).nonzero()[0, 0])
                raise OutputError(
                    f"batch {batch_index}, sample {empty}: no position of it counts, by its attention mask. Leave it "
                    "out."
                )
            same = (same.flatten(1) & counts).sum(1).double() / total
            zero = torch.zeros((), dtype=divergence.dtype, device=divergence.device)
            divergence = torch.where(counts, divergence.flatten(1), zero).sum(1) / total
        self._keep("same", same)
        if not _are_probabilities(old if mask is None else old[mask != 0]):
            self._keep("divergence", divergence)

    def _keep(self, name: str, values: Tensor) -> None:
        self._parts[name].append(values.detach().cpu().double())

    def result(self) -> PerSample:
        """The numbers of all samples.

        Raises:
            BatchError: there are no samples, or too few.
        """
        if self.num_samples == 0:
            raise BatchError("there are no samples: the loader is empty, or all of its batches are empty. Give some.")
        parts = {name: torch.cat(kept) for name, kept in self._parts.items() if kept}
        if self._kind == "embeddings":
            old, new = (torch.cat(kept) for kept in self._embeddings)
            if len(old) < 2:
                raise BatchError(
                    "kind='embeddings' compares nearest neighbours, and there is one sample alone. Give more."
                )
            parts["same"] = _same_neighbours(old, new)
        divergence = parts.get("divergence")
        if divergence is not None and len(divergence) < len(parts["norms"]):
            divergence = None
        return PerSample(parts["same"], parts["change"], parts["norms"], divergence)


def _relative_change(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """||y|| and ||y' - y|| / ||y|| for each sample: 0 if nothing changed, infinite if y is 0 or y' not finite."""
    flat, moved = (own.reshape(len(own), -1).double() for own in (old, new - old))
    norms, lengths = flat.norm(dim=1), moved.norm(dim=1)
    change = torch.where(lengths == 0, torch.zeros_like(lengths), lengths / norms)
    return norms, torch.where(change.isfinite(), change, torch.inf)


def _are_probabilities(values: Tensor) -> bool:
    """Whether rows are not negative and add up to 1, so that they are no logits."""
    return bool((values >= 0).all()) and bool(((values.sum(-1) - 1).abs() < _UNIT_LENGTH).all())


def _same_neighbours(old: Tensor, new: Tensor) -> Tensor:
    """Whether the nearest other sample of each sample is the same, for rows of length 1; ties count as the same."""
    found = []
    for start in range(0, len(old), _ROWS):
        rows = torch.arange(start, min(start + _ROWS, len(old)))
        cosines = [own[rows] @ own.T for own in (old, new)]
        for own in cosines:
            own[rows - start, rows] = -2.0
        nearest = [own.argmax(1, keepdim=True) for own in cosines]
        # Of samples that are in the data twice, rounding decides which one is the nearest. Both models must be tied
        # there: if all new outputs are one vector, each sample is tied with all others.
        ties = [
            own.gather(1, other).squeeze(1) >= own.amax(1) - _TIED
            for own, other in zip(cosines, nearest[::-1], strict=True)
        ]
        found.append(ties[0] & ties[1])
    return torch.cat(found).double()
