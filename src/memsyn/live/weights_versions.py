"""Weights that change while a model serves: each version of the weights has sums of its own.

Owns the check whether the weights have changed, and which sums are added to. Must not know when samples are measured,
nor how the sums are computed.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from memsyn.batches import Batch, joined, tensors
from memsyn.errors import ModelError
from memsyn.live.request_queue import QueuedSamples
from memsyn.live.segment_sums import SampleCounts, SegmentSums
from memsyn.measuring.model_copy import refuse_foreign_hooks
from memsyn.parameters import fingerprint, weights
from memsyn.torch_private import TorchDispatchMode, named_slots, version_of

MAX_FAILURES: Final = 8
"""After this many batches of one version that fail one after the other, its samples are dropped unmeasured."""


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
        note: called with each error after which the measurement goes on.
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
        note: Callable[[Exception], None],
        *,
        onlookers: bool,
    ) -> None:
        self.current: SegmentSums | None = None
        self.num_versions = 0
        self.stored_at: float | None = None
        self._model, self._version, self._begin, self._note, self._onlookers = model, version, begin, note, onlookers
        self._measured_version: Hashable = None
        """The version to which `current` belongs."""
        self._past = SampleCounts()
        """Counts of all samples that are not in `current`."""
        self._num_failures = 0
        """Batches that failed since the last success, at the current version."""
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
            # Outside of `try`: it does not count as a failure of these weights, since the hook may be removed again.
            refuse_foreign_hooks(self._model)
        try:
            if stream is not None:
                for samples in queued:
                    _wait_for_copy(samples, stream)
            self._add(queued)
        except ModelError:
            self._num_failures += 1
            raise

    def _add(self, queued: Sequence[QueuedSamples]) -> None:
        first, size = queued[0], sum(samples.num_samples for samples in queued)
        present = self._version.refresh()
        if self.current is None or first.version != self._measured_version:
            if first.version != present:
                self._past += SampleCounts(stale=size)
                return
            self._change_to(present)
        sums = self.current
        assert sums is not None
        if self._num_failures >= MAX_FAILURES:  # the error was reported already
            return
        is_first, before, problem = not sums.has_copy, sums.counts, None
        try:
            served_at = min(first.served_at, time.time())  # the clock may have been set back
            batch = Batch.of(joined([samples.inputs for samples in queued]))
            # The dispatch mode slows down every operation. So it is on for the first batch, and after that only while
            # batches draw random numbers.
            with PrivateDraws() if is_first or self._draws else nullcontext() as draws:
                problem = sums.add(batch, first.segment, served_at)
            self._draws = draws is not None and draws.num_draws > 0
        finally:
            # The first batch copies the weights. If they changed in the meantime, the copy may hold a mixture.
            if is_first and not (self._version.refresh() == present and sums.is_of_fingerprint):
                self._past, self.current = self._past + before, None
        if self.current is None:
            self._past += SampleCounts(stale=size)
            return
        self._num_failures = 0
        if problem is not None:
            self._note(problem)

    def _change_to(self, version: Hashable) -> None:
        """Go on with the weights that the model has now, if their values are others."""
        mark, sums = fingerprint(weights(self._model)), self.current
        if sums is None or sums.fingerprint != mark:
            try:
                self.store()
            except Exception as error:  # what was not stored yet is lost
                self._note(error)
            begun = self._begin(mark)
            lost = SampleCounts(lost=0 if sums is None else sums.num_withheld)
            self._past, self.current = self.counts + lost, begun
            self.num_versions += 1
        self._measured_version, self._num_failures = version, 0

    def store(self) -> None:
        """Write sums that are not stored yet.

        Here the fingerprint is computed, so here a change of the weights is found that torch does not count.

        Raises:
            MemoryFileError: a file cannot be written.
        """
        sums = self.current
        if sums is None or not sums.has_unsaved:
            return
        is_same_version = self._version.refresh() == self._measured_version
        if is_same_version and fingerprint(weights(self._model)) != sums.fingerprint:
            self._version.renew()
        if sums.save(time.time()):
            self.stored_at = time.time()


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
