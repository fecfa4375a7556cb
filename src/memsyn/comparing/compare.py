"""compare(model, reference, batches) -> Comparison: both models run side by side on unlabelled data.

Owns the loop over the data, and the checks that its numbers have a meaning. Must not change the user's models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from memsyn.batches import (
    Batch,
    BatchSplit,
    Samples,
    are_items,
    check_iterable,
    first_samples,
    in_samples,
    model_input,
)
from memsyn.comparing.answers import AUTO_KIND, Answers, Output, check_kind, check_shape, kind_of_answers
from memsyn.comparing.old_model import Reference, moved_buffers, old_model, with_statistics_of, without_adapters
from memsyn.comparing.verdict import Comparison
from memsyn.errors import BatchError, MemsynError, OptionError, OutputError, SamplesInteractError
from memsyn.measuring.measure import length_of, untouched_generators
from memsyn.measuring.model_copy import check_measurable, model_copy
from memsyn.measuring.objectives import (
    ESTIMATORS,
    Forward,
    OutputScorer,
    check_rows_and_dtype,
    output_tensor,
    refuse_users_own,
)
from memsyn.measuring.route_check import unchanged_buffers
from memsyn.parameters import named_parameters, statistics, trainable_parameters
from memsyn.progress import progress_bar

_INTERACT: Final = 0.01
"""By how much the output for a sample alone may differ from its output in the batch, relative to the largest output.

Kernels for other batch sizes round otherwise, and quantised layers may choose another scale.
"""


def compare(
    model: nn.Module,
    reference: Reference,
    batches: Iterable[Any],
    *,
    kind: str = AUTO_KIND,
    tolerance: float = 0.05,
    segments: Sequence[str] | None = None,
    forward: Forward | None = None,
    max_samples: int | None = None,
    progress: bool = True,
    split: BatchSplit | None = None,
) -> Comparison:
    """Compare a model with the old one on unlabelled data: does it still give the same answers?

    For each sample, with y the old output and y' the new one: whether both give the same answer, the relative change
    ||y' - y|| / ||y||, and for logits KL(old || new) = sum_c p_c (log p_c - log p'_c). Both models run in evaluation
    mode, on clones. The models themselves stay bit for bit the same. The result does not depend on the batch size.
    Samples are few, so that all means have 95% intervals. `Comparison.verdict` says whether the model may ship.

    Padding is left out by the batch's `attention_mask`, as in `measure`. If you pass `forward`, mask padding yourself.

    Args:
        model: the new model.
        reference: the old model: a module, a state_dict, or a `Memory`, of which anchor and statistics are the old
            model. What a memory or state_dict does not hold is taken from the new model, and `Comparison.taken` lists
            it. A memory of directions alone has no anchor.
        batches: a DataLoader or any iterable of batches, as for `measure`. Labels are not read.
        kind: what an answer is. "classes": the largest of the logits (samples, classes). "tokens": the same at each
            position of (samples, positions, classes). "values": the output, if its relative change is at most
            `tolerance`. "embeddings": the nearest other sample of all samples, by the cosine. "auto" tells it from the
            name and shape of the output, and `Comparison.reason` says how.
        tolerance: for "values".
        segments: the segment of each sample, such as a customer, in the order of the data.
        forward: (model, batch) -> output. Use the model that it gets: it is called with the clones of both.
        max_samples: stop after this many samples.
        progress: show a progress bar.
        split: batch -> a list of batches of one sample each, as for `measure`.

    Raises:
        OptionError: an argument has a value that is not allowed, the memory has no anchor, or the outputs may be of
            several kinds.
        MismatchError: the reference is of another model.
        BatchError: there are no samples, or the batches cannot be read.
        OutputError: the two models have outputs of other shapes, or the outputs do not fit the kind.
        SamplesInteractError: a model gives other outputs for the same batch, or a sample's depends on other samples.
        ModelError: a model cannot be cloned, or the forward pass uses the user's model.

    Warns:
        RenamedParametersWarning, LostParametersWarning: the reference has other names, or parameters that the model
            lacks.

    Example:
        >>> import torch, memsyn
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.eye(2))
        >>> data = [torch.tensor([[2.0, 0.0], [3.0, 4.0]])]
        >>> old = {"weight": torch.eye(2)}
        >>> _ = model.weight.data[0, 0].mul_(2.0)  # the first output doubles: 4 and 0, 6 and 4
        >>> found = memsyn.compare(model, old, data, progress=False)
        >>> found.kind, found.same.tolist(), found.change.tolist()
        ('classes', [1.0, 0.0], [1.0, 0.6])
    """
    check_iterable(batches)
    check_kind(kind, tolerance)
    if max_samples is not None and (not isinstance(max_samples, int) or max_samples < 1):
        raise OptionError(f"max_samples must be a whole number, at least 1; got {max_samples!r}.")
    check_measurable(model)
    names = None if segments is None else _checked_segments(segments)
    users = [own for own in (model, reference) if isinstance(own, nn.Module)]
    model = without_adapters(model, reference)
    device = _device_of(model)
    with ExitStack() as stack:
        stack.enter_context(untouched_generators())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        for own in users:
            stack.enter_context(unchanged_buffers(own, served=False))
        running = _Running(model, reference, users, forward, (kind, tolerance))
        read = (in_samples(batch, split, has_forward=forward is not None) for batch in batches)
        bar = progress_bar(
            first_samples(read, max_samples),
            "comparing",
            total=length_of(batches, max_samples),
            unit="batch",
            shown=progress,
        )
        for index, batch in enumerate(bar):
            running.add(batch, index, can_guess=max_samples is None and forward is None)
        return running.result(names)


def _checked_segments(segments: Sequence[str]) -> tuple[str, ...]:
    """The segments as text.

    Raises:
        OptionError: they are one text, or no sequence of text.
    """
    if isinstance(segments, str) or not isinstance(segments, Sequence) or not all(isinstance(s, str) for s in segments):
        raise OptionError(
            f"segments must be a list with the name of each sample's segment, in the order of the data; got "
            f"{segments!r:.80}."
        )
    return tuple(segments)


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


@final
class _Side:
    """A clone that is run: the new model, the old one, or the new one with old statistics."""

    def __init__(self, model: nn.Module, whose: str, forward: Forward | None) -> None:
        self.model, self.whose = model, whose
        self._device = _device_of(model)
        self._scorer = OutputScorer(forward, ESTIMATORS["mas"])

    def output(self, batch: Batch, index: int) -> Output:
        """Run the model on a copy of the batch.

        Raises:
            BatchError: the model failed.
            OutputError: the output is not one row of numbers per sample.
        """
        own = batch.to(self._device).copied()
        # A model may write into its inputs, so the mask is read from another copy.
        again = batch.to(self._device)
        given = self._scorer.output(self.model, own.inputs, index)
        values = output_tensor(given)
        _check_rows(values, batch, index)
        mask = self._scorer.mask_of(values, self.model, again, index)
        entries = given if isinstance(given, Mapping) else {}
        source = next((str(key) for key, value in entries.items() if value is values), None)
        return Output(values, mask, source)


def _check_rows(values: Tensor, batch: Batch, index: int) -> None:
    """Refuse an output that has not one row for each sample of the batch.

    The samples may be the items of a list, or the whole batch may be one sample, as a bag of images.
    """
    rows = values.shape[0] if values.ndim else 0
    is_one = rows == 1 and values.ndim > 1
    is_list = rows > 0 and batch.num_samples != rows and batch.items(rows) is not None
    check_rows_and_dtype(values, rows if is_one or is_list else batch.num_samples, index)


@final
class _Running:
    """Both models, and the answers so far."""

    def __init__(
        self,
        model: nn.Module,
        reference: Reference,
        users: Sequence[nn.Module],
        forward: Forward | None,
        kind: tuple[str, float],
    ) -> None:
        old = old_model(model, reference)
        new = with_statistics_of(old.model, model, ())
        self._users, self._kind, self._reason = users, kind, "kind="
        self._sides = [_Side(old.model, "the old model", forward), _Side(new, "the new model", forward)]
        self._taken, self._moved = old.taken, moved_buffers(old.model, new)
        could_move = trainable_parameters(model).keys() | statistics(model).keys()
        unheld = [name for name in old.taken if name in could_move]
        self._perturbed = _Side(_perturbed(old.model, unheld), "the old model", forward) if unheld else None
        self._depends_on_taken = False
        if self._moved:
            restored = with_statistics_of(old.model, model, self._moved)
            self._sides.append(_Side(restored, "the new model with old statistics", forward))
        self._answers: list[Answers] = []
        self._has_forward = forward is not None

    def add(self, batch: Any, index: int, *, can_guess: bool) -> None:
        """Add a batch, as `in_samples` gave it."""
        if isinstance(batch, Samples):
            for sample in batch:
                self._add(Batch.of(self._inputs(sample), whole=True), index)
            return
        try:
            self._add(Batch.of(self._inputs(batch)), index)
        except MemsynError:
            # Images of unlike sizes have as many channels each, so their list looks like an input and its target.
            if not (can_guess and are_items(batch)):
                raise
            self._add(Batch.of(list(batch)), index)

    def _inputs(self, batch: Any) -> Any:
        # With a `forward` of the user's, the batch is passed on as the loader gave it.
        return batch if self._has_forward else model_input(batch)

    def _add(self, batch: Batch, index: int) -> None:
        if batch.num_samples == 0:
            return
        old, *others = (side.output(batch, index) for side in self._sides)
        for side, output in zip(self._sides[1:], others, strict=True):
            if output.values.shape != old.values.shape:
                raise OutputError(
                    f"batch {index}: the output of the old model has the shape {tuple(old.values.shape)}, that of "
                    f"{side.whose.removeprefix('the ')} {tuple(output.values.shape)}. Choose the outputs that both "
                    "have, such as those of the old head or of the first classes: forward=lambda model, batch: ..."
                )
        if not self._answers:
            self._check(batch, index, [old, *others])
            self._begin(old, batch)
        if self._perturbed is not None and not self._depends_on_taken:
            other = self._perturbed.output(batch, index).values
            self._depends_on_taken = not _are_close(other, old.values, _rounding(old.values))
        for answers, output in zip(self._answers, others, strict=True):
            answers.add(old.values, output.values, old.mask, index)

    def _begin(self, output: Output, batch: Batch) -> None:
        """Find the kind of answers in the first output."""
        kind, tolerance = self._kind
        if kind == AUTO_KIND:
            kind, self._reason = kind_of_answers(output, batch.inputs)
        check_shape(kind, output.values)
        self._kind = kind, tolerance
        self._answers = [Answers(kind, tolerance) for _ in self._sides[1:]]

    def _check(self, batch: Batch, index: int, outputs: Sequence[Output]) -> None:
        """Run the first batch again, and its first samples alone.

        Raises:
            ModelError: the forward pass uses the user's model.
            SamplesInteractError: the outputs differ.
        """
        own = [parameter for model in self._users for parameter in trainable_parameters(model).values()]
        for side, first in zip(self._sides, outputs, strict=True):
            with torch.enable_grad():  # the clones are frozen: only the user's model gives a graph
                again = side.output(batch, index).values
                if again.requires_grad:
                    refuse_users_own(again, own)
            if not _are_close(again, first.values, _rounding(first.values)):
                raise SamplesInteractError(
                    f"batch {index}: {side.whose} gives other outputs for the same batch when it is run again, so a "
                    "comparison says nothing. Look for random numbers in the forward pass (dropout by "
                    "torch.nn.functional without training=self.training, sampling, noise), or a state that changes."
                )
            count = len(first.values)
            # The items of a list are not cut by the first dimension.
            if batch.whole or count < 2 or count != batch.num_samples or batch.items(count) is not None:
                continue
            few = min(2, count - 1)
            alone = side.output(batch.take(0, few), index).values
            if not _are_close(alone, first.values[:few], _INTERACT):
                raise SamplesInteractError(
                    f"batch {index}: {side.whose} gives another output for {few} samples alone than in their batch, so "
                    "the comparison would depend on the batches. Look for a normalisation that uses batch statistics "
                    "in evaluation mode (track_running_stats=False), or an output that compares samples. Or give "
                    "batches of one sample."
                )

    def result(self, segments: tuple[str, ...] | None) -> Comparison:
        """The comparison over all samples.

        Raises:
            BatchError: there were no samples, or not as many as segments.
        """
        if not self._answers:
            raise BatchError(
                "there are no samples: the loader is empty, or all of its batches are empty. Nothing was compared. "
                "Give at least one sample."
            )
        found = [answers.result() for answers in self._answers]
        count = len(found[0].same)
        if segments is not None and len(segments) != count:
            raise OptionError(
                f"segments names {len(segments)} samples, and the batches hold {count}: give one for each."
            )
        restored: Comparison | None = None
        for own in reversed(found):
            restored = Comparison(
                self._kind[0],
                self._reason,
                own.same,
                own.change,
                own.norms,
                own.divergence,
                segments,
                self._taken,
                self._moved if own is found[0] else (),
                restored,
                self._depends_on_taken,
            )
        assert restored is not None
        return restored


def _perturbed(old: nn.Module, names: Sequence[str]) -> nn.Module:
    """The old model with other values of the tensors that the reference does not hold.

    A new head changes no old output. A backbone that was frozen when the memory was made changes them all.
    """
    clone, generator = model_copy(old, private=names), torch.Generator().manual_seed(0)
    places = {**named_parameters(clone), **statistics(clone)}
    for name in names:
        places[name].add_(torch.rand(places[name].shape, generator=generator).add(0.5).to(places[name]))
    return clone


def _rounding(values: Tensor) -> float:
    return math.sqrt(torch.finfo(values.dtype).eps)


def _are_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two outputs are the same up to a share of the largest finite number; NaN is equal to NaN."""
    one, other = one.detach(), other.detach()
    if one.shape != other.shape:
        return False
    largest = float(other.nan_to_num(0.0, 0.0, 0.0).abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=tolerance * largest, equal_nan=True)
