"""Weights that change while a model serves: each version of the weights has sums of its own.

Owns the check whether the weights have changed, and which sums are added to. Must not know when samples are measured,
nor how the sums are computed.
"""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from memsyn.batches import Batch, joined, tensors
from memsyn.error_log import ErrorLog
from memsyn.errors import ModelError, OptionError
from memsyn.live.request_queue import QueuedSamples
from memsyn.live.segment_sums import SampleCounts, SegmentSums
from memsyn.live.window import steady_time
from memsyn.measuring.model_copy import refuse_foreign_hooks
from memsyn.parameters import fingerprint, trainable_parameters, weights
from memsyn.torch_private import TorchDispatchMode, named_slots, version_of

MAX_FAILURES: Final = 8
"""After this many batches that fail one after the other, further ones are dropped unmeasured, all but a few."""

MAX_HALVED: Final = 3
"""After this many that were halved down to single samples, one sample is measured before the rest of its batch is."""

LONGEST_PAUSE: Final = 64
"""The most batches that are dropped before another one is tried."""


@final
class FailedBatches:
    """The batches of one version of the weights that failed one after the other, and whether to try another.

    A batch fails if none of its samples can be added, whatever the error. With batches of n samples that all fail, the
    passes through the model are

        batch     1 to 3      4 to 8        10    13    18 ...
        passes    2n - 1      1 each        1     1     1         the others, and the rests of these, are dropped

    A batch that fails with an error about the model, not about samples, is not halved: it costs one pass as a whole.
    The pauses are 1, 2, 4 ... 64 batches. So a model that works again is measured again after as long a time as it had
    failed, or sooner. Other weights are tried at once.
    """

    def __init__(self, version: Hashable) -> None:
        self.version = version
        self.num_failed = self._pause = 0
        self._is_halved = False
        """Whether the last one was halved."""

    @property
    def has_given_up(self) -> bool:
        """Whether only few batches are tried."""
        return self.num_failed >= MAX_FAILURES

    @property
    def should_try_one(self) -> bool:
        """Whether to measure one sample first."""
        return self.num_failed >= MAX_HALVED and self._is_halved

    def should_try(self) -> bool:
        """Whether to measure the next batch."""
        self._pause -= 1
        return self._pause < 0

    def add(self, is_halved: bool) -> None:
        """Count a batch that failed, after it was halved or at once."""
        self._is_halved = is_halved
        self.num_failed += 1
        self._pause = min(2 ** (self.num_failed - MAX_FAILURES), LONGEST_PAUSE) if self.has_given_up else 0


@final
class WeightsVersion:
    """A cheap check whether a model still has the same weights, without reading them.

    It sees what torch counts (optimizers, `load_state_dict`, any in-place operation), and modules and tensors that were
    replaced. It does not see running statistics that move, nor writes through `.data`: only the fingerprint shows
    those, and then `renew` starts another version.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._num_renewals = 0
        self.refresh()

    def refresh(self) -> Hashable:
        """List the model's modules and tensors anew; returns the version."""
        self._slots = [slot for module in self._model.modules() for slot in named_slots(module)]
        self._tensors: list[tuple[Tensor, bool]] = [(t, t.is_inference()) for t in weights(self._model).values()]
        return self.current()

    def renew(self) -> None:
        """Return another version from now on."""
        self._num_renewals += 1

    def current(self) -> Hashable:
        """A value that is equal while the weights are; made from the tensors that were there at the last `refresh`."""
        if any(owner.get(name) is not value for owner, name, value in self._slots):
            return self.refresh()  # a module or a tensor was replaced
        # Asking a tensor that was made in inference mode for its version is an error: torch does not count its writes.
        addresses = tuple((t.data_ptr(), 0 if uncounted else version_of(t)) for t, uncounted in self._tensors)
        return self._num_renewals, addresses


@final
class VersionedSums:
    """The sums of the weights that the model has now; sums of earlier weights stay in their files.

    Args:
        model: the user's model; it is only read.
        version: its version.
        begin: fingerprint -> empty sums for weights of that fingerprint.
        log: of errors after which the measurement goes on.
        onlookers: whether foreign forward hooks are left out; else they are an error.

    Attributes:
        current: the sums that were added to last; None before the first batch.
        num_versions: sets of weights that were measured.
        stored_at: when sums were last written, in seconds since 1970.
    """

    def __init__(
        self,
        model: nn.Module,
        version: WeightsVersion,
        begin: Callable[[str], SegmentSums],
        log: ErrorLog,
        *,
        onlookers: bool,
    ) -> None:
        self.current: SegmentSums | None = None
        self.num_versions = 0
        self.stored_at: float | None = None
        self._model, self._version, self._begin, self._log, self._onlookers = model, version, begin, log, onlookers
        self._measured_version: Hashable = None
        """The version to which `current` belongs."""
        self._past = SampleCounts()
        """Counts of all samples that are not in `current`."""
        self._failed = FailedBatches(None)
        self._draws = False
        """Whether the last forward pass drew random numbers."""

    @property
    def counts(self) -> SampleCounts:
        """Counts of the samples of all versions."""
        sums = self.current  # read once: the thread may set it to None
        return self._past if sums is None else self._past + sums.counts

    @property
    def num_withheld(self) -> int:
        """The measured samples of all versions that are in no file, since there were too few."""
        sums = self.current
        return self._past.lost + (0 if sums is None else sums.num_withheld)

    def add(self, queued: Sequence[QueuedSamples], stream: torch.cuda.Stream | None) -> None:
        """Measure queued samples in one batch, and add them to the sums of their version.

        All have the same segment and version. If the model no longer has those weights, and neither has the copy on
        which samples are measured, the samples are counted as stale.

        Raises:
            MemsynError: the batch cannot be measured, or its file cannot be read.
        """
        if not self._onlookers:
            # It does not count as a failure of these weights: it costs little, and the hook may be removed again.
            refuse_foreign_hooks(self._model)
        first, size = queued[0], sum(samples.num_samples for samples in queued)
        present = self._version.refresh()
        is_other = self.current is None or first.version != self._measured_version
        if is_other and first.version != present:
            self._past += SampleCounts(stale=size)
            return
        if is_other and not trainable_parameters(self._model):  # costs little as well
            raise ModelError("the model has no parameter that requires a gradient any more: nothing can be measured.")
        if first.version != self._failed.version:
            self._failed = FailedBatches(first.version)
        if not self._failed.should_try():  # the error was reported already
            return
        before = self.counts
        try:
            if stream is not None:
                for samples in queued:
                    _wait_for_copy(samples, stream)
            if is_other:
                self._change_to(present)
            problem = self._add(queued, present)
        except OptionError:  # a segment too many: nothing was measured
            raise
        except BaseException:
            self._fail(is_halved=False)
            raise
        self._note_result(problem, before)

    def _add(self, queued: Sequence[QueuedSamples], present: Hashable) -> Exception | None:
        """Add samples to the current sums; returns the error of the last one that was left out."""
        sums, first = self.current, queued[0]
        assert sums is not None
        is_first, before, problem = not sums.has_copy, sums.counts, None
        try:
            # The dispatch mode slows down every operation. So it is on for the first batch, and after that only while
            # batches draw random numbers.
            with PrivateDraws() if is_first or self._draws else nullcontext() as draws:
                for batch in self._parts(Batch.of(joined([samples.inputs for samples in queued]))):
                    problem = sums.add(batch, first.segment, first.served_at)
                    if sums.counts.measured == before.measured:
                        break
            self._draws = draws is not None and draws.num_draws > 0
        finally:
            # The first batch copies the weights. If they changed in the meantime, the copy may hold a mixture.
            if is_first and not (self._version.refresh() == present and sums.is_of_fingerprint):
                self._past, self.current = self._past + before, None
        if self.current is None:
            self._past += SampleCounts(stale=sum(samples.num_samples for samples in queued))
            return None
        return problem

    def _parts(self, batch: Batch) -> list[Batch]:
        """A batch whole; or, after several batches that failed, one sample of it and the rest."""
        size = batch.num_samples or 0
        return [batch.take(0, 1), batch.take(1, size)] if self._failed.should_try_one and size > 1 else [batch]

    def _note_result(self, problem: Exception | None, before: SampleCounts) -> None:
        """Count a batch that was tried as failed if none of its samples was added, though its weights are there."""
        if problem is not None:
            self._log.note(problem)
        if self.counts.measured > before.measured:
            if self._failed.has_given_up:
                self._log.event("recovered", "the model can be measured again.", logging.INFO)
            self._failed = FailedBatches(self._failed.version)
        elif problem is not None:
            self._fail(is_halved=True)

    def _fail(self, *, is_halved: bool) -> None:
        self._failed.add(is_halved)
        if self._failed.num_failed == MAX_FAILURES:
            self._log.event(
                "given_up",
                f"{MAX_FAILURES} batches in a row could not be measured, so that samples are dropped until the weights "
                f"change, or one of the few batches that are still tried can be measured. {self._log.last}",
            )

    def _change_to(self, version: Hashable) -> None:
        """Go on with the weights that the model has now, if their values are others."""
        mark, sums = fingerprint(weights(self._model)), self.current
        if sums is None or sums.fingerprint != mark:
            self._store_last()
            begun = self._begin(mark)
            num_lost = 0 if sums is None else sums.num_withheld
            if num_lost:
                text = f"the weights changed: {num_lost:,} measured samples were too few for a file, and are lost."
                self._log.event("withheld", text, count=num_lost)
            self._past, self.current = self.counts + SampleCounts(lost=num_lost), begun
            self.num_versions += 1
            self._log.event("weights", f"sums of the weights {mark[:12]} begin.", logging.INFO, fingerprint=mark)
        self._measured_version = version

    def _store_last(self) -> None:
        """Write the sums of weights that are gone; what cannot be written now is lost."""
        try:
            is_stored = self.store()
        except BaseException as error:
            self._log.note(error)
            is_stored = False
        if not is_stored:
            self._log.num_lost += 1
            self._log.event("lost", "the weights changed, and new sums of the weights before were not stored: lost.")

    def store(self) -> bool:
        """Write sums that are not stored yet; returns whether all sums are stored now.

        Here the fingerprint is computed, so here a change of the weights is found that torch does not count.

        Raises:
            MemoryFileError: a file cannot be written.
        """
        sums = self.current
        if sums is None or not sums.has_unsaved:
            return True
        is_same_version = self._version.refresh() == self._measured_version
        if is_same_version and fingerprint(weights(self._model)) != sums.fingerprint:
            self._version.renew()
        if sums.save(steady_time()):
            self.stored_at = time.time()
        return not sums.has_unsaved


@final
class PrivateDraws(TorchDispatchMode):
    """While open, this thread draws from copies of torch's generators, so that other threads draw the same as without.

    A forward pass may draw random numbers. Each drawing operation runs with the states of this thread's own sequence,
    and the generators get their states back after it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_draws = 0
        cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        self._generators: list[torch.Generator] = [torch.default_generator, *cuda]
        self._states = [generator.get_state() for generator in self._generators]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A generator of its own is nobody else's: random signs come from one.
        if torch.Tag.nondeterministic_seeded not in func.tags or (kwargs or {}).get("generator") is not None:
            return func(*args, **(kwargs or {}))
        self.num_draws += 1
        before = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._states = [generator.get_state() for generator in self._generators]
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)


def _wait_for_copy(samples: QueuedSamples, stream: torch.cuda.Stream) -> None:
    """Let a stream wait until inputs are copied, which happens on another stream, and keep their memory until then."""
    if samples.copied is not None:
        stream.wait_event(samples.copied)
        for tensor in tensors(samples.inputs):
            if tensor.is_cuda:
                tensor.record_stream(stream)
