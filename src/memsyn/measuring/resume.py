"""The checkpoint file, from which an interrupted measuring pass continues.

Owns when the file is written, the checks before a pass continues, and the notes to the user. `measurement` supplies the
contents. The file is an importance file of the samples so far, with an extra entry `checkpoint` in its header.

A file's checksum is no signature, since a forger makes it again. The batches are the key here: their digest is not in
the file, and is found when they are read again. A seal (HMAC) under it covers all that the file says, sums included.
"""

import hashlib
import hmac
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final, final

import torch
from torch import Tensor

from memsyn.batches import tensors
from memsyn.errors import BatchError, MemoryFileError, MemsynError, MismatchError, OptionError
from memsyn.kernels.running_sums import BATCHES
from memsyn.parameters import fingerprint
from memsyn.storage.reading_and_writing import (
    FORMAT,
    IMPORTANCE,
    Groups,
    checked,
    checked_count,
    read,
    well_formed,
    write,
)
from memsyn.values.importance import Importance

NUMBERS: Final = 1024
"""About how many numbers of each tensor go into the digest of a batch."""

Restore = Callable[[Mapping[str, Any], Groups], None]
"""Takes a file's header and tensors, to go on from them."""

State = tuple[Importance, dict[str, Tensor], dict[str, Any]]
"""The importance so far, the remainder to add to its sums, and all other values that are needed to continue."""


@final
class Checkpoint:
    """The progress of a pass, and the file that stores it."""

    def __init__(self, path: str | os.PathLike[str], every: float) -> None:
        if not isinstance(every, (int, float)) or not every >= 0:
            raise OptionError(f"every must be a number of seconds, at least 0; got {every!r}.")
        if "://" in str(path):
            raise OptionError(f"a checkpoint is a local file, not a URL; got {path}.")
        self.path, self.every = Path(path).absolute(), every
        self.num_batches = 0
        self._digest = ""
        self._found: tuple[dict[str, Any], Groups] | None = None
        """The content of the file, until its seal is checked."""
        self._saved: tuple[int, int] | None = None
        """The number of batches and of samples in the file; None without a file."""
        self._at_batch_boundary = True
        """Whether the sums hold only complete batches."""

    def begin(self, settings: Mapping[str, Any], state: Callable[[], State | None], restore: Restore) -> None:
        """Read the file, if it exists, and set torch's generator to its state at the start of the pass.

        Args:
            settings: description -> value, for all values that must be the same in every run of the pass. Errors show
                the description.
            state: returns the state to save; None if there is nothing to save yet.
            restore: called with the content of the file, after the batches in it were read again.

        Raises:
            MemoryFileError: the file is damaged or of another kind, or its folder is missing.
            MismatchError: the file belongs to another pass.
        """
        self._settings, self._state, self._restore = dict(settings), state, restore
        self._time = time.monotonic()
        # Before the loader is iterated: a shuffling DataLoader draws its order from this generator.
        self._generator = torch.get_rng_state()
        if not self.path.exists():
            if not self.path.parent.is_dir():
                raise MemoryFileError(
                    f"the checkpoint {self.path} cannot be written: its folder does not exist. Create the folder."
                )
            return
        header, groups = read(self.path, IMPORTANCE)
        if "checkpoint" not in header:
            raise MismatchError(
                f"{self.path} is a finished importance, not a checkpoint: give checkpoint= a path of its own."
            )
        with well_formed(self.path):
            entry = checked(dict, header["checkpoint"], "checkpoint")
            known = checked(dict, entry["settings"], "settings")
            differing = [what for what, value in self._settings.items() if known[what] != value]
            num_batches = checked_count(entry["num_batches"], "num_batches", 1)
            _check_counts(header, entry, folded=bool(groups["remainder"]))
            generator = bytearray.fromhex(checked(str, entry["generator"], "generator"))
        if differing:
            raise MismatchError(
                f"the checkpoint {self.path} belongs to another pass: it differs in {', '.join(differing)}. Call "
                "measure as in that pass; or delete the file, or give another path, to start again."
            )
        try:
            self._generator = torch.frombuffer(generator, dtype=torch.uint8)
            torch.set_rng_state(self._generator)
        except (RuntimeError, ValueError) as error:
            raise MemoryFileError(
                f"{self.path} was changed since it was written: its generator is no state of torch's. Delete it to "
                "start again."
            ) from error
        self.num_batches, self._found = num_batches, (header, groups)
        self._saved = num_batches, entry["num_samples"]

    def remaining(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Skip the batches that are measured already, go on from what the file says of them, and yield the others.

        Raises:
            BatchError: the skipped batches are not those of the checkpoint.
            MemoryFileError: the file was changed since it was written.
        """
        digest = ""
        for index in range(self.num_batches):
            try:
                digest = _chain_digest(digest, next(batches))
            except StopIteration:
                raise self._other_batches(f": there are only {index}") from None
        if self._found is not None:
            (header, groups), self._found = self._found, None
            self._digest = digest
            self._check_seal(header, groups)
            with well_formed(self.path):
                self._restore(header, groups)
        yield from batches

    def _check_seal(self, header: Mapping[str, Any], groups: Groups) -> None:
        """Check that the batches, and all that the file says of them, are as they were when it was written."""
        entry = header["checkpoint"]
        if "digest" in entry:  # no seal: written by an older memsyn, with the digest itself
            if entry["digest"] != self._digest:
                raise self._other_batches()
            return
        with well_formed(self.path):
            batches, seal = (checked(str, entry[own], own) for own in ("batches", "seal"))
        if batches != _public_digest(self._digest):
            raise self._other_batches()
        if seal != _seal(self._digest, header, groups):
            self._saved, self._at_batch_boundary = None, False
            raise MemoryFileError(
                f"{self.path} was changed since it was written: its seal is not that of its sums, counts and settings. "
                "Delete it to start again."
            )

    def _other_batches(self, more: str = "") -> BatchError:
        # The file belongs to another call: do not write to it, nor offer to continue from it.
        self._saved, self._at_batch_boundary = None, False
        return BatchError(
            f"the first {self.num_batches} batches are not those that the checkpoint {self.path} was measured on"
            f"{more}. Give the same batches in the same order and sizes (if a generator draws them, seed it again); or "
            "delete the checkpoint to start again."
        )

    @contextmanager
    def batch(self, batch: Any) -> Iterator[None]:
        """Delay Ctrl-C to the end of the batch. Then write the file, if `every` seconds have passed."""
        with _delay_interrupts():
            # Before the model sees the batch, since a forward pass may write to it.
            digest = _chain_digest(self._digest, batch)
            self._at_batch_boundary = False
            yield
            self.num_batches, self._digest, self._at_batch_boundary = self.num_batches + 1, digest, True
            if time.monotonic() - self._time >= self.every:
                self._save()

    @contextmanager
    def write_on_failure(self) -> Iterator[None]:
        """If the block fails, write the file, and add to the error how to continue."""
        try:
            yield
        except BaseException as error:
            try:
                # Within a batch, the sums may hold a part of its samples: such a state is not written.
                if self._at_batch_boundary and self.num_batches > (self._saved or (0, 0))[0]:
                    self._save()
            except MemsynError as failed:
                _add_note(error, str(failed))
            if self._saved is not None:
                batches, samples = self._saved
                _add_note(
                    error,
                    f"Measuring was interrupted. {self.path} holds the first {batches} batches ({samples} samples). "
                    "Call measure again with the same arguments to continue from there.",
                )
            raise

    def _save(self) -> None:
        state = self._state()
        if state is None:
            return
        importance, remainder, known = state
        entry = {
            **known,
            "settings": self._settings,
            "num_batches": self.num_batches,
            "batches": _public_digest(self._digest),
            "generator": self._generator.numpy().tobytes().hex(),
        }
        groups = {"importance": importance.sums, "remainder": remainder}
        header = {**importance.header(), "checkpoint": entry}
        entry["seal"] = _seal(self._digest, {**header, "format": FORMAT}, groups)
        write(self.path, IMPORTANCE, header, groups)
        self._saved, self._time = (self.num_batches, known["num_samples"]), time.monotonic()

    def finish(self) -> None:
        """Remove the file: the pass is done."""
        self.path.unlink(missing_ok=True)


def _check_counts(header: Mapping[str, Any], entry: Mapping[str, Any], *, folded: bool) -> None:
    """Check the counts of a checkpoint against each other.

    The sums of the file are of all samples until the first fold, then of those that are folded. Every eighth batch is
    folded, and a batch has a sample at least.

    Raises:
        ValueError: they cannot be of one pass.
    """
    count, of_sums = (checked_count(own["num_samples"], "num_samples", 1) for own in (entry, header))
    num_added = checked_count(entry["num_added"], "num_added", 1)
    since = num_added % BATCHES if folded else 0
    if folded != (num_added >= BATCHES) or count - of_sums < since or (not since and count != of_sums):
        raise ValueError(f"num_samples is {of_sums} and {count}, after {num_added} batches: they are not of one pass")


def _public_digest(digest: str) -> str:
    """By which a file knows the batches again; the digest itself cannot be found from it."""
    return hashlib.sha256(f"batches {digest}".encode()).hexdigest()


_UNSEALED: Final = ("kind", "memsyn", "groups", "checksum")
"""Entries of a header that `write` adds; the format changes the meaning of others, and is sealed."""


def _seal(digest: str, header: Mapping[str, Any], groups: Groups) -> str:
    """The HMAC of a checkpoint's header and tensors, with the digest of its batches as the key."""
    entry = {name: value for name, value in header["checkpoint"].items() if name != "seal"}
    kept = {name: value for name, value in header.items() if name not in _UNSEALED} | {"checkpoint": entry}
    own = {f"{group}/{name}": tensor for group, members in groups.items() for name, tensor in members.items()}
    sealed = json.dumps([kept, fingerprint(own)], sort_keys=True)
    return hmac.new(digest.encode(), sealed.encode(), "sha256").hexdigest()


def _chain_digest(digest: str, batch: Any) -> str:
    """The digest of a batch and, through the previous digest, of all batches before it.

    It covers the shapes, the dtypes and about `NUMBERS` numbers of each tensor (a small tensor is covered whole).

    Raises:
        OptionError: the batch holds no tensor.
    """
    found, own_tensors = hashlib.sha256(digest.encode()), tensors(batch)
    if not own_tensors:
        raise OptionError(
            "checkpoint= recognises skipped batches by their tensors, but a batch holds no tensor: give batches with "
            "tensors, or leave checkpoint= out."
        )
    for tensor in own_tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.layout == torch.strided and tensor.numel():
            # Odd, so that the steps reach every column. For 64 x 64 numbers, 4096 // 1024 = 4 would read only every
            # fourth column; 5 reads all of them.
            step = tensor.numel() // NUMBERS | 1
            own = tensor.detach().reshape(-1)[::step].cpu().contiguous()
            found.update(own.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _add_note(error: BaseException, text: str) -> None:
    """Add a note to the error. Print it to stderr before Python 3.11, and for Ctrl-C, since programs often catch it."""
    if sys.version_info >= (3, 11) and isinstance(error, Exception):
        error.add_note(text)
    else:
        print(text, file=sys.stderr)


@contextmanager
def _delay_interrupts() -> Iterator[None]:
    """Delay a Ctrl-C to the end of the block. A second one acts at once."""
    before = signal.getsignal(signal.SIGINT)
    # Python sets handlers in the main thread only, and cannot restore one that was not set in Python.
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def delay(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # The next Ctrl-C meets the old handler, so it acts at once.
        signal.signal(number, before)

    signal.signal(signal.SIGINT, delay)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)
