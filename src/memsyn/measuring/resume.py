"""The file that lets a measuring pass go on after it was cut off.

Owns when it is written, what must be the same to go on, and how the user is told. What is held in it comes from
`measurement`. It is an importance file: of the samples so far, with an entry `checkpoint` beside.
"""

import hashlib
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
from memsyn.storage.reading_and_writing import IMPORTANCE, Groups, read, well_formed, write
from memsyn.values.importance import Importance

NUMBERS: Final = 1024
"""Of each tensor of a batch, by which it is known again."""

Saved = tuple[dict[str, Any], Groups]
"""A file's header and tensors."""

State = tuple[Importance, dict[str, Tensor], dict[str, Any]]
"""The importance so far, what is to be added to its sums, and whatever else is needed to go on."""


@final
class Checkpoint:
    """How far a pass has come, and the file that says so."""

    def __init__(self, path: str | os.PathLike[str], every: float) -> None:
        if not isinstance(every, (int, float)) or not every >= 0:
            raise OptionError(f"every must be a number of seconds, at least 0; got {every!r}.")
        if "://" in str(path):
            raise OptionError(f"a checkpoint is a local file, not a URL; got {path}.")
        self.path, self.every = Path(path).absolute(), every
        self.num_batches = 0
        self._digest = ""
        self._saved: tuple[int, int] | None = None
        """Batches and samples in the file."""
        self._at_batch_boundary = True
        """Whether the sums are those of whole batches."""

    def begin(self, settings: Mapping[str, Any], state: Callable[[], State | None]) -> Saved | None:
        """Read the file, if there is one, and set torch's generator as it was when the pass began.

        Args:
            settings: what must be the same in every run of the pass: what it is, for the error -> value.
            state: gives what is to be saved, if there is anything yet.

        Raises:
            MemoryFileError: the file is damaged or of another kind, or its folder is missing.
            MismatchError: it is of another pass.
        """
        self._settings, self._state, self._time = dict(settings), state, time.monotonic()
        self._generator = torch.get_rng_state()
        if not self.path.exists():
            if not self.path.parent.is_dir():
                raise MemoryFileError(f"the checkpoint {self.path} cannot be written: its folder does not exist.")
            return None
        header, groups = read(self.path, IMPORTANCE)
        if "checkpoint" not in header:
            raise MismatchError(
                f"{self.path} is a finished importance, no checkpoint: give checkpoint= a path of its own."
            )
        with well_formed(self.path):
            entry = header["checkpoint"]
            differing = [what for what, value in self._settings.items() if entry["settings"][what] != value]
            self.num_batches, self._digest = int(entry["num_batches"]), str(entry["digest"])
            saved = self.num_batches, int(entry["num_samples"])
            self._generator = torch.frombuffer(bytearray.fromhex(entry["generator"]), dtype=torch.uint8)
        if differing:
            raise MismatchError(
                f"the checkpoint {self.path} is of another pass: it differs in {', '.join(differing)}. Give what it "
                "was begun with; or delete it, or give another path, to begin anew."
            )
        torch.set_rng_state(self._generator)
        self._saved = saved
        return header, groups

    def remaining(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches that are not measured yet; those before must be what was measured.

        Raises:
            BatchError: they are not.
        """
        digest = ""
        for index in range(self.num_batches):
            try:
                digest = _chain_digest(digest, next(batches))
            except StopIteration:
                raise self._other_batches(f": there are only {index}") from None
        if digest != self._digest:
            raise self._other_batches()
        yield from batches

    def _other_batches(self, more: str = "") -> BatchError:
        self._saved, self._at_batch_boundary = None, False  # the same call will not go on, and the file is not ours
        return BatchError(
            f"the first {self.num_batches} batches are not those that the checkpoint {self.path} was measured on"
            f"{more}. Give the same, in the same order and sizes (and seed again what draws them); or delete the "
            "checkpoint to begin anew."
        )

    @contextmanager
    def batch(self, batch: Any) -> Iterator[None]:
        """While a batch is measured: Ctrl-C waits for its end. Then write the file, if it is time."""
        with _delay_interrupts():
            digest = _chain_digest(self._digest, batch)
            self._at_batch_boundary = False
            yield
            self.num_batches, self._digest, self._at_batch_boundary = self.num_batches + 1, digest, True
            if time.monotonic() - self._time >= self.every:
                self._save()

    @contextmanager
    def write_on_failure(self) -> Iterator[None]:
        """If this fails, write the file, and say with the error how to go on."""
        try:
            yield
        except BaseException as error:
            try:
                if self._at_batch_boundary and self.num_batches > (self._saved or (0, 0))[0]:
                    self._save()
            except MemsynError as failed:
                _add_note(error, str(failed))
            if self._saved is not None:
                batches, samples = self._saved
                _add_note(
                    error,
                    f"Measuring was cut off. {self.path} holds the first {batches} batches ({samples} samples): call "
                    "measure again with the same arguments, and it goes on from there.",
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
            "digest": self._digest,
            "generator": self._generator.numpy().tobytes().hex(),
        }
        groups = {"importance": importance.sums, "remainder": remainder}
        write(self.path, IMPORTANCE, {**importance.header(), "checkpoint": entry}, groups)
        self._saved, self._time = (self.num_batches, known["num_samples"]), time.monotonic()

    def finish(self) -> None:
        """Remove the file: the pass is done."""
        self.path.unlink(missing_ok=True)


def _chain_digest(digest: str, batch: Any) -> str:
    """A digest of this batch and, by the digest before, of all that came before it: of some numbers of each tensor."""
    found, own_tensors = hashlib.sha256(digest.encode()), tensors(batch)
    if not own_tensors:
        raise OptionError(
            "checkpoint= compares the batches that are skipped later by their tensors, and one holds none: give "
            "tensors, or leave checkpoint= out."
        )
    for tensor in own_tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.layout == torch.strided and tensor.numel():
            step = tensor.numel() // NUMBERS | 1  # odd: it meets every column of an image
            own = tensor.detach().reshape(-1)[::step].cpu().contiguous()
            found.update(own.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _add_note(error: BaseException, text: str) -> None:
    """Say it with the error; on stderr where errors take no notes, and for Ctrl-C, which is often caught."""
    if sys.version_info >= (3, 11) and isinstance(error, Exception):
        error.add_note(text)
    else:
        print(text, file=sys.stderr)


@contextmanager
def _delay_interrupts() -> Iterator[None]:
    """Heed a Ctrl-C after the block; a second one at once."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():  # else no handler can be set
        yield
        return
    received: list[int] = []

    def delay(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before)

    signal.signal(signal.SIGINT, delay)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)
