"""The value Comparison: how far the answers of a new model differ from those of the old one, and the verdict.

Owns the statistics over samples, the thresholds, and the words. Must not run models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from memsyn.comparing.answers import KINDS_OF_ANSWERS
from memsyn.comparing.intervals import Interval, paired_share_interval, samples_needed, t_interval, wilson_interval
from memsyn.errors import MismatchError, OptionError
from memsyn.values.display import LayerRow, counted, html_table, html_text, percent, printable, short_name

SAFE: Final = "safe"
AT_RISK: Final = "at risk"
BROKEN: Final = "broken"
CANNOT_SAY: Final = "cannot say"

QUANTILES: Final = (0.5, 0.9, 0.99)
"""The quantiles of the change that are shown."""

MIN_AGREEMENT: Final = 0.97
MAX_CHANGE: Final = 0.05


@final
@dataclass(frozen=True)
class Verdict:
    """Whether a model may ship, and why.

    Attributes:
        answer: "safe", "at risk", "broken" or "cannot say".
        sentence: the numbers and thresholds behind it, and the cause if it is known.
    """

    answer: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.answer.capitalize()}. {self.sentence}"


@final
@dataclass(frozen=True, eq=False)
class PairedDifference:
    """The difference of two comparisons of the same samples with the same old model: the first minus the second.

    Attributes:
        num_samples: the number of samples.
        agreement: the difference of the shares of same answers, with its 95% interval in `agreement_interval`.
        change: the difference of the mean relative changes, with its interval in `change_interval`.
    """

    num_samples: int
    agreement: float
    agreement_interval: Interval
    change: float
    change_interval: Interval

    def __str__(self) -> str:
        agreement = f"{100 * self.agreement:+.1f} points {_range(self.agreement_interval, points=True)}"
        change = f"{100 * self.change:+.1f} points {_range(self.change_interval, points=True)}"
        return (
            f"Of the same {counted(self.num_samples, 'sample')}: same answer {agreement}, change of outputs {change}."
        )


@final
@dataclass(frozen=True, eq=False)
class Comparison:
    """How far the outputs of a new model differ from those of the old one. Made by `compare`.

    Attributes:
        kind: what an answer is: "classes", "tokens", "values" or "embeddings".
        reason: by what the kind was told.
        same: (N,), whether both models give the same answer, 1 or 0; of tokens, the share of positions that count.
        change: (N,), ||y' - y|| / ||y|| of the new output y' and the old output y. Infinite if y is 0 and y' is not, or
            if y' is not finite.
        norms: (N,), ||y||.
        divergence: (N,), KL(old || new) = sum_c p_c (log p_c - log p'_c) in nats, of tokens a mean over positions; None
            if the outputs are no logits.
        segments: the segment of each sample; None if none was given.
        taken: parameters and statistics of the old model that the reference does not hold. They are those of the new.
        moved_statistics: names of buffers, such as running means, that differ between the two models.
        depends_on_taken: whether outputs depend on tensors of `taken` that training could move. Then what changed
            there is not seen, and the verdict is not "safe".
        with_old_statistics: the same comparison, with the old statistics put back into the new model; None if they did
            not move.
    """

    kind: str
    reason: str
    same: Tensor = field(repr=False)
    change: Tensor = field(repr=False)
    norms: Tensor = field(repr=False)
    divergence: Tensor | None = field(default=None, repr=False)
    segments: tuple[str, ...] | None = field(default=None, repr=False)
    taken: tuple[str, ...] = ()
    moved_statistics: tuple[str, ...] = ()
    with_old_statistics: Comparison | None = field(default=None, repr=False)
    depends_on_taken: bool = False

    @property
    def num_samples(self) -> int:
        """The number of samples, N."""
        return len(self.same)

    @property
    def agreement(self) -> float:
        """The share of samples with the same answer, 0 to 1; of tokens, the mean over samples of the share."""
        return float(self.same.mean())

    @property
    def agreement_interval(self) -> Interval:
        """The 95% interval of the agreement (Wilson); of tokens it is rather too wide."""
        return wilson_interval(self.agreement, self.num_samples)

    @property
    def mean_change(self) -> float:
        """The mean of the relative change."""
        return float(self.change.mean())

    @property
    def change_interval(self) -> Interval:
        """The 95% interval of the mean change (Student's t); it begins at 0 at least."""
        lower, upper = t_interval(self.change)
        return Interval(max(0.0, lower), upper)

    @property
    def change_quantiles(self) -> dict[float, float]:
        """The quantiles 0.5, 0.9 and 0.99 of the change, between two samples in proportion."""
        ordered = self.change.sort().values
        found = {}
        for share in QUANTILES:
            place = share * (len(ordered) - 1)
            low, high = (float(ordered[index]) for index in (math.floor(place), math.ceil(place)))
            weight = place - math.floor(place)
            found[share] = low + weight * (high - low) if weight and math.isfinite(high) else (high if weight else low)
        return found

    @property
    def mean_divergence(self) -> float | None:
        """The mean of KL(old || new) in nats; None if the outputs are no logits."""
        return None if self.divergence is None else float(self.divergence.mean())

    @property
    def divergence_interval(self) -> Interval | None:
        """The 95% interval of the mean divergence (Student's t)."""
        if self.divergence is None:
            return None
        lower, upper = t_interval(self.divergence)
        return Interval(max(0.0, lower), upper)

    def worst(self, num: int = 5) -> list[int]:
        """The numbers of the samples that differ most: other answers first, then by their change. From 0."""
        keys = zip(self.same.tolist(), (-self.change).tolist(), range(self.num_samples), strict=True)
        return [index for _, _, index in sorted(keys)[:num]]

    def by_segment(self) -> dict[str, Comparison]:
        """The comparison of each segment's samples, in the order in which segments come first.

        Raises:
            OptionError: no segments were given.
        """
        if self.segments is None:
            raise OptionError("no segments were given: compare(..., segments=[...]) with one name for each sample.")
        found = {}
        for segment in dict.fromkeys(self.segments):
            rows = torch.tensor([own == segment for own in self.segments])
            found[segment] = self._only(rows, segment)
        return found

    def _only(self, rows: Tensor, segment: str) -> Comparison:
        restored = self.with_old_statistics
        return replace(
            self,
            same=self.same[rows],
            change=self.change[rows],
            norms=self.norms[rows],
            divergence=None if self.divergence is None else self.divergence[rows],
            segments=(segment,) * int(rows.sum()),
            with_old_statistics=None if restored is None else restored._only(rows, segment),
        )

    def minus(self, other: Comparison) -> PairedDifference:
        """The difference to another comparison of the same samples with the same old model, with 95% intervals.

        Samples are paired: the difference is taken for each sample. So the interval is narrower than of two
        comparisons. That of the agreement is of Bonett and Price (2012), that of the change Student's.

        Raises:
            MismatchError: the samples, their order, the old model or the kind of answers differ.
        """
        mine, theirs = self.norms, other.norms
        if self.kind != other.kind or mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=1e-3):
            raise MismatchError(
                f"expected two comparisons of the same samples, in the same order, with the same old model; got "
                f"{counted(self.num_samples, 'sample')} of {self.kind} and {counted(other.num_samples, 'sample')} of "
                f"{other.kind}, with old outputs that differ. Compare both models with one reference on one data set."
            )
        agreement, interval = paired_share_interval(self.same - other.same)
        changes = self.change - other.change
        # Both infinite: nothing is known of the difference.
        changes = torch.where(changes.isnan(), torch.inf, changes)
        return PairedDifference(self.num_samples, agreement, interval, float(changes.mean()), t_interval(changes))

    def verdict(self, min_agreement: float = MIN_AGREEMENT, max_change: float = MAX_CHANGE) -> Verdict:
        """Whether the model may ship, by where the 95% intervals lie.

        safe: the whole interval of the agreement is at or above `min_agreement`, that of the mean change at or below
        `max_change`. broken: one of the intervals lies wholly on the wrong side. cannot say: the means are on the right
        side, but samples are so few that not even full agreement would be safe; or the outputs depend on tensors that
        the reference does not hold. at risk: all else, so that an interval contains its threshold.

        Args:
            min_agreement: the share of same answers that is asked for, from 0 to below 1.
            max_change: the mean relative change of outputs that is allowed.

        Raises:
            OptionError: a threshold is out of range.
        """
        check_thresholds(min_agreement, max_change)
        agreement, change = self.agreement_interval, self.change_interval
        needed = max(2, samples_needed(min_agreement))
        is_right = self.agreement >= min_agreement and self.mean_change <= max_change
        if agreement.upper < min_agreement or change.lower > max_change:
            answer = BROKEN
        elif agreement.lower >= min_agreement and change.upper <= max_change:
            answer = SAFE
        else:
            answer = CANNOT_SAY if is_right and self.num_samples < needed else AT_RISK
        words = [
            f"{percent(self.agreement)} of {counted(self.num_samples, 'sample')} give the same answer "
            f"{_range(agreement)}; at least {percent(min_agreement)} is asked for. Outputs change by "
            f"{percent(self.mean_change)} on average {_range(change)}; at most {percent(max_change)} is allowed."
        ]
        if answer == CANNOT_SAY:
            words.append(f"There are too few samples: give at least {needed:,}.")
        if answer == SAFE and self.depends_on_taken:
            answer = CANNOT_SAY
            words.append(
                f"But outputs depend on tensors that the reference does not hold ({len(self.taken):,} are not held, "
                f"the first is {printable(self.taken[0])}), and what changed there is not seen. Give the old model or "
                "its state_dict as reference."
            )
        if answer == AT_RISK:
            words.append("An interval contains its threshold: give more samples, or treat it as forgotten.")
        if answer in (BROKEN, AT_RISK) and self.moved_statistics:
            words.append(self._cause(min_agreement, max_change))
        return Verdict(answer, " ".join(words))

    def _cause(self, min_agreement: float, max_change: float) -> str:
        """What the statistics that moved have to do with it."""
        first, restored = f"the first is {printable(self.moved_statistics[0])}", self.with_old_statistics
        said = f"{counted(len(self.moved_statistics), 'running statistic')} moved ({first})"
        if restored is None:
            return f"{said}."
        numbers = f"{percent(restored.agreement)} give the same answer, and outputs change by "
        numbers += percent(restored.mean_change)
        if restored.agreement <= self.agreement and restored.mean_change >= self.mean_change:
            return f"{said}, but they are not the cause: with the old ones put back, {numbers}."
        is_mended = restored.agreement >= min_agreement and restored.mean_change <= max_change
        cause = "The cause" if is_mended else "A part of the cause"
        return (
            f"{cause}: {said}, as those of BatchNorm do in train mode. With the old ones put back, {numbers}. Load "
            "them with model.load_state_dict(memory.statistics, strict=False), and train with freeze_statistics=True."
        )

    def __str__(self) -> str:
        interval = self.divergence_interval
        quantiles = self.change_quantiles
        parts = [f"{share:.0%} of samples up to {percent(value)}" for share, value in quantiles.items()]
        lines = [
            f"Compared: {counted(self.num_samples, 'sample')}. Answers are {self.kind}: {KINDS_OF_ANSWERS[self.kind]}. "
            f"Told by: {self.reason}.",
            f"Same answer: {percent(self.agreement)} {_range(self.agreement_interval)}.",
            f"Change of outputs: {percent(self.mean_change)} on average {_range(self.change_interval)}; "
            f"{', '.join(parts)}.",
        ]
        if interval is not None and self.mean_divergence is not None:
            ends = f"{number(interval.lower)} to {number(interval.upper)}"
            lines.append(f"KL divergence from the old model: {number(self.mean_divergence)} nats on average ({ends}).")
        lines.append(f"Worst samples: {', '.join(map(str, self.worst()))}.")
        if self.segments is not None:
            shares = [f"{short_name(name)} {percent(own.agreement)}" for name, own in self.by_segment().items()]
            lines.append(f"Same answer by segment: {', '.join(shares)}.")
        if self.moved_statistics:
            restored, first = self.with_old_statistics, printable(self.moved_statistics[0])
            share = "" if restored is None else f" With the old ones, the same answer: {percent(restored.agreement)}."
            lines.append(f"Moved statistics: {len(self.moved_statistics):,}, the first is {first}.{share}")
        if self.taken:
            lines.append(
                f"The reference does not hold {len(self.taken):,} of the model's tensors, such as "
                f"{printable(self.taken[0])}. Both sides have the new model's values there."
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        if self.segments is None:
            return html_text(str(self))
        rows = [
            LayerRow(
                name,
                [f"{own.num_samples:,}", percent(own.agreement), percent(own.mean_change)],
                1 - own.agreement,
            )
            for name, own in self.by_segment().items()
        ]
        return html_table(str(self), ["segment", "samples", "same answer", "change"], rows, "with a higher share each")

    def to_json(self) -> dict[str, Any]:
        """The numbers as a dict for JSON; None stands for what is infinite or unknown. The keys are stable."""
        found: dict[str, Any] = {
            "kind": self.kind,
            "reason": self.reason,
            "num_samples": self.num_samples,
            "agreement": self.agreement,
            "agreement_interval": list(self.agreement_interval),
            "mean_change": finite_or_none(self.mean_change),
            "change_interval": [finite_or_none(end) for end in self.change_interval],
            "change_quantiles": {str(share): finite_or_none(value) for share, value in self.change_quantiles.items()},
            "mean_divergence": finite_or_none(self.mean_divergence),
            "divergence_interval": [finite_or_none(end) for end in self.divergence_interval or (None, None)],
            "worst": self.worst(),
            "taken": list(self.taken),
            "depends_on_taken": self.depends_on_taken,
            "moved_statistics": list(self.moved_statistics),
        }
        restored = self.with_old_statistics
        found["with_old_statistics"] = None if restored is None else restored.to_json()
        if self.segments is not None:
            found["segments"] = {
                name: {
                    "num_samples": own.num_samples,
                    "agreement": own.agreement,
                    "agreement_interval": list(own.agreement_interval),
                    "mean_change": finite_or_none(own.mean_change),
                }
                for name, own in self.by_segment().items()
            }
        return found


def check_thresholds(min_agreement: object, max_change: object) -> None:
    """Refuse thresholds that no model can meet or miss.

    Raises:
        OptionError: says which values are allowed.
    """
    if not _is_number(min_agreement) or not 0 <= float(min_agreement) < 1:  # type: ignore[arg-type]
        raise OptionError(
            f"min_agreement must be from 0 to below 1, such as 0.97; got {min_agreement!r}. No number of samples shows "
            "that all answers are the same."
        )
    if not _is_number(max_change) or not float(max_change) >= 0:  # type: ignore[arg-type]
        raise OptionError(f"max_change must be a number, at least 0, such as 0.05; got {max_change!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: float) -> str:
    """A number for people, without an exponent."""
    if not math.isfinite(value):
        return "infinite"
    return f"{value:.4f}" if value < 100 else f"{value:,.0f}"


def _range(interval: Interval, *, points: bool = False) -> str:
    """The words for an interval."""
    ends: Sequence[str] = [percent(end) for end in interval]
    if points:
        ends = [f"{100 * end:+.1f}" if math.isfinite(end) else "unknown" for end in interval]
    return f"(95% interval {ends[0]} to {ends[1]})"


def finite_or_none(value: float | None) -> float | None:
    """The value for JSON: None if it is infinite, NaN or unknown."""
    return value if value is not None and math.isfinite(value) else None
