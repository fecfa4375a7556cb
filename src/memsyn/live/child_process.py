"""A pass in a process of its own, so that it shares no interpreter and no priority with who serves.

Owns the process, what is sent to it and what comes back. Knows nothing of requests, stores or segments.
"""

import io
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.spawn import get_executable
from typing import IO, Any, Final, cast, final

import torch
from torch import Tensor, nn

from memsyn.batches import Given
from memsyn.engine.recorder import Plans
from memsyn.engine.routes import BY_SAMPLE
from memsyn.errors import MemsynError, ModelError
from memsyn.kernels.outer_products import workspace
from memsyn.kernels.running_sums import RunningSums
from memsyn.measuring.measurement import Forward, Run
from memsyn.measuring.objectives import Estimator
from memsyn.parameters import named_parameters

LOGGER: Final = logging.getLogger("memsyn")

COMMAND: Final = """
import os, sys
sys.path[:] = {path!r}
try:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
except (AttributeError, OSError):
    getattr(os, "nice", int)(19)
from memsyn.live.child_process import main
main()
"""
"""The lowest priority comes first: most of what a start costs is the import of torch."""

CPU: Final = torch.device("cpu")

PREFIX: Final = 8
"""Bytes that say how long a message is."""

DEATHS: Final = 3
"""After so many the process is not tried again."""

STEADY: Final = 100
"""After so many answers of one process the deaths before it do not count any more."""

ALIKE: Final = 1e-3
"""How far sums here and there may be apart, over their norm: other kernels, but no other computation."""

KNOWN: Final = ("routes", "splits", "unproven", "used", "once", "changes_inputs", "num_guarded")
"""What a pass has found out of its model, by the names of its attributes."""

_is_child = False


def is_child() -> bool:
    """Whether this is the other process: modules that it imports must not observe anything."""
    return _is_child


class ProcessEndedError(ModelError):
    """The process has ended."""


class ProcessClosedError(ModelError):
    """The observer has ended it."""


@final
class Process:
    """Another interpreter, which measures; started when there is something to do.

    Args:
        required: without it nothing is measured. Else what cannot be sent there is measured here, after a warning.
    """

    def __init__(self, required: bool) -> None:
        self.required = required
        self.refused = False
        """Whether it cannot be used, so that passes run here."""
        self.model: object = None
        """Which it has: a mark of who sent it."""
        self.deaths = self._num_answers = 0
        self.last_death = ""
        self._child: subprocess.Popen[bytes] | None = None
        self._lock, self._asking, self._closed, self._owner = threading.Lock(), threading.Lock(), False, os.getpid()

    def refuse(self, problem: object) -> None:
        """Use it no more.

        Raises:
            ModelError: it is required.
        """
        self._drop()
        if self.required:
            raise ModelError(
                f"the model cannot be measured in another process: {problem}. Define its class in a module that can "
                "be imported, or say process=False."
            )
        self.refused = True
        LOGGER.warning("an observer measures in a thread, since another process cannot do it: %s", problem)

    def ask(self, message: dict[str, Any], totals: Sequence[Tensor]) -> dict[str, Any]:
        """Send a message, and wait for the answer, and for numbers to fill `totals` with.

        Raises:
            ProcessEndedError: the process has ended.
            ProcessClosedError: it was closed.
            Exception: what the process raised on it; or the message cannot be pickled, or no process started.
        """
        with self._asking:
            payload = _packed(message)
            child = self._running()
            reader, writer = cast(io.RawIOBase, child.stdout), cast(io.RawIOBase, child.stdin)
            try:
                _write(writer, len(payload).to_bytes(PREFIX, "little"))
                _write(writer, payload)
                del payload
                answer = _read(reader)
                if answer["error"] is None:
                    for total in totals:
                        _fill(total, reader)
            except (OSError, EOFError, ValueError) as error:
                self._end()
                _shut(child)
                if self._closed:
                    raise ProcessClosedError("the observer is closed.") from error
                self.deaths += 1
                self.last_death = f"exit status {child.poll()}"
                raise ProcessEndedError(
                    f"the process that measures ended ({self.last_death}): is memory short? What it said is in the log "
                    "of this one."
                ) from error
            except BaseException:  # what is left in the pipe would be taken for the next answer
                self._end()
                _shut(child)
                raise
            if answer["error"] is not None:
                raise answer["error"]
            self._num_answers += 1
            self.deaths = 0 if self._num_answers >= STEADY else self.deaths
            return answer

    def close(self) -> None:
        """End it for good, unless it is that of the process of which this is a fork."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._closed = True
        self._drop()

    def _drop(self) -> None:
        child = self._end()
        if child is not None and self._asking.acquire(timeout=1.0):  # else who asks does it
            _shut(child)
            self._asking.release()

    def _running(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._closed:
                raise ProcessClosedError("the observer is closed.")
            if self._child is None:
                self._child, self._num_answers = _started(), 0
            return self._child

    def _end(self) -> "subprocess.Popen[bytes] | None":
        with self._lock:
            child, self._child, self.model = self._child, None, None
        if child is not None:
            child.kill()
            child.wait()
        return child


class ProcessRun(Run):
    """A pass whose first batch is measured here, and again by another process: the rest too, if that gives the same.

    So what a first look refuses is refused here, and a process that cannot do what this one does is not used. A
    parameter whose sums were 0 so far is compared in the first batch in which they are not there; and in the first,
    second, fourth, eighth, ... batch, in which they may not be here.
    """

    def __init__(
        self,
        process: Process,
        model: nn.Module,
        trainable: dict[str, nn.Parameter],
        forward: Forward | None,
        estimator: Estimator,
    ) -> None:
        super().__init__(model, trainable, CPU, forward, estimator, batched=False, private=True)
        self._process, self._mark = process, object()
        self._proven: set[str] = set()
        """The parameters whose importance was seen to be the same there."""

    def alone(self, inputs: Given, index: int) -> set[str]:
        """Measure a batch, of which alone the sums are then."""
        message = {"inputs": inputs.inputs, "index": index, "num_samples": self.num_samples}
        if self._process.refused or self._process.model is not self._mark:
            slow = super().alone(inputs, index)
            if not self._process.refused:
                self._send(message)
            return slow
        assert self.sums is not None
        answer = self._process.ask(message, _in_order(self.sums))
        unproven = {name: own for name, own in self.sums.recent.items() if name not in self._proven}
        if any(map(_shows, unproven.values())) or (unproven and index & (index - 1) == 0):
            there = {name: own.clone() for name, own in unproven.items()}
            slow = super().alone(inputs, index)
            self._compare(there)
            return slow
        self.num_samples = answer["num_samples"]
        slow = {name for name, route in answer["routes"].items() if route == BY_SAMPLE} - self.slow
        self.routes.update(dict.fromkeys(slow, BY_SAMPLE))
        return slow

    def _send(self, message: dict[str, Any]) -> None:
        """Send what is known here, and the batch that was measured: it must give the same."""
        assert self.sums is not None
        if not 0 < sum(float(own.sum(dtype=torch.float64)) for own in _in_order(self.sums)) < math.inf:
            return  # there is nothing to compare
        if self._process.deaths >= DEATHS and not self._process.required:
            self._process.refuse(f"it ended {DEATHS} times, the last time with {self._process.last_death}")
            return
        found = {name: torch.empty_like(own) for name, own in sorted(self.sums.recent.items())}
        sent = {
            **message,
            "model": self.shadow,
            "names": list(self.routes),
            "forward": None if self.masked else self.forward,
            "estimator": self.estimator,
            "dtype": torch.get_default_dtype(),
            "written": self.written,
            "known": {name: getattr(self, name) for name in KNOWN},
        }
        try:
            self._process.ask(sent, list(found.values()))
        except ProcessClosedError:
            return
        except ProcessEndedError:  # the next batch is another try
            if self._process.required:
                raise
            return
        except Exception as error:  # whatever pickling raises, here or there
            self._process.refuse(f"{type(error).__name__}: {error}")
            return
        self._process.model, self._proven = self._mark, set()
        self._compare(found)

    def _compare(self, found: Mapping[str, Tensor]) -> None:
        """Note of which parameters a batch gave the same there, or use the process no more."""
        assert self.sums is not None
        own = {name: total for name, total in self.sums.recent.items() if name in found}
        shown = [name for name in found if _shows(own[name]) or _shows(found[name])]
        other = [name for name in shown if not _is_near(found[name].double(), own[name].double())]
        if other:
            self._process.refuse(f"it gives another importance of {other[0]}")
        self._proven.update(shown)


class _There(Run):
    """The same pass in the other process: it knows what was known where it began."""

    def know(self, message: dict[str, Any]) -> None:
        for name, value in message["known"].items():
            setattr(self, name, value)
        self.plans = Plans(self.splits)
        self._clone(message["written"])


def main() -> None:
    """What the other process does, until nobody asks any more."""
    global _is_child
    _is_child = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when who asks has ended
    answers = os.fdopen(os.dup(1), "wb")
    try:
        os.dup2(2, 1)  # what a model prints is no answer
    except OSError:  # there is nobody to read it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    cast(io.TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)
    run: Run | None = None
    with workspace():
        while True:
            totals: list[Tensor] = []
            answer: dict[str, Any] = {"error": None}
            try:
                message = _read(cast(io.RawIOBase, sys.stdin.buffer))
                run = _begun(message) if "model" in message else run
                assert run is not None
                run.num_samples = message["num_samples"]
                run.alone(Given(message["inputs"]), message["index"])
                assert run.sums is not None
                answer |= {"routes": run.routes, "num_samples": run.num_samples}
                totals = _in_order(run.sums)
            except EOFError:
                return
            except Exception as error:
                answer["error"] = error if isinstance(error, MemsynError) else RuntimeError(f"there, {error!r}")
            payload = _packed(answer)
            answers.write(len(payload).to_bytes(PREFIX, "little"))
            for part in (payload, *map(_bytes_of, totals)):
                answers.write(part)
            answers.flush()


def _begun(message: dict[str, Any]) -> Run:
    """A pass over what was sent."""
    torch.set_num_threads(1)  # what was imported may have said otherwise
    torch.set_default_dtype(message["dtype"])
    own = {name: named_parameters(message["model"])[name] for name in message["names"]}
    run = _There(message["model"], own, CPU, message["forward"], message["estimator"], batched=False)
    run.know(message)
    return run


def _started() -> subprocess.Popen[bytes]:
    executable = get_executable()
    if getattr(sys, "frozen", False) or not executable:
        raise ModelError("this program has no Python interpreter to start")
    command = [executable, "-c", COMMAND.format(path=[path for path in sys.path if isinstance(path, str)])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def _shut(child: subprocess.Popen[bytes]) -> None:
    for stream in (child.stdin, child.stdout):
        with suppress(OSError):
            cast(IO[bytes], stream).close()


def _packed(message: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getbuffer()


def _write(stream: io.RawIOBase, content: bytes | memoryview) -> None:
    """Write all of it, past any buffer: a fork would have a copy of that, and write it again."""
    left = memoryview(content)
    while len(left):
        left = left[stream.write(left) or 0 :]


def _read(stream: io.RawIOBase) -> dict[str, Any]:
    prefix = bytearray(PREFIX)
    _read_into(memoryview(prefix), stream)
    message = bytearray(int.from_bytes(prefix, "little"))
    _read_into(memoryview(message), stream)
    found: dict[str, Any] = torch.load(io.BytesIO(message), weights_only=False)
    return found


def _read_into(view: memoryview, stream: io.RawIOBase) -> None:
    while len(view):
        size = stream.readinto(view)
        if not size:
            raise EOFError("there is no more")
        view = view[size:]


def _fill(total: Tensor, stream: io.RawIOBase) -> None:
    """Read the numbers of a tensor."""
    held = total if total.is_contiguous() else torch.empty_like(total, memory_format=torch.contiguous_format)
    _read_into(_bytes_of(held), stream)
    if held is not total:
        total.copy_(held)


def _in_order(sums: RunningSums) -> list[Tensor]:
    return [sums.recent[name] for name in sorted(sums.recent)]


def _bytes_of(total: Tensor) -> memoryview:
    """The memory of a tensor, or of a contiguous copy."""
    return total.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _shows(total: Tensor) -> bool:
    """Whether there is something to compare."""
    return 0 < float(total.sum(dtype=torch.float64)) < math.inf


def _is_near(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).norm() <= ALIKE * two.norm())
