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
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.spawn import get_executable
from typing import IO, Any, Final, cast, final

import torch
from torch import Tensor, nn

from memsyn.batches import Given
from memsyn.errors import MemsynError, ModelError
from memsyn.objectives import Estimator
from memsyn.parameters import named_parameters
from memsyn.products import workspace
from memsyn.run import Forward, Run
from memsyn.sums import RunningSums

LOGGER: Final = logging.getLogger("memsyn")

COMMAND: Final = """
import os, sys
sys.path[:] = {path!r}
if hasattr(os, "SCHED_IDLE"):
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
elif hasattr(os, "nice"):
    os.nice(19)
from memsyn.process import main
main()
"""
"""The lowest priority comes first: most of what a start costs is the import of torch."""

CPU: Final = torch.device("cpu")

PREFIX: Final = 8
"""Bytes that say how long a message is."""

LIMIT: Final = 3600.0
"""Seconds for an answer, the start of the process included: it may get little of a busy machine."""

DEATHS: Final = 3
"""After so many the process is not tried again."""

ALIKE: Final = 1e-3
"""How far sums here and there may be apart, over their norm: other kernels, but no other computation."""

_is_child = False


def is_child() -> bool:
    """Whether this is the other process: modules that it imports must not observe anything."""
    return _is_child


class ProcessEndedError(ModelError):
    """The process has ended."""


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
        self.user: object = None
        """Whose model it has."""
        self.deaths = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._lock, self._closed, self._owner = threading.Lock(), False, os.getpid()

    def refuse(self, problem: object) -> None:
        """Use it no more.

        Raises:
            ModelError: it is required.
        """
        self._end()
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
            ModelError: the process has ended, or did not answer in time.
            Exception: what the process raised on it; or the message cannot be pickled, or no process started.
        """
        payload = _packed(message)
        child = self._running()
        limit = threading.Timer(LIMIT, child.kill)
        limit.daemon = True
        limit.start()
        try:
            _write(cast(IO[bytes], child.stdin), payload)
            answer = _read(cast(IO[bytes], child.stdout))
            if answer["error"] is None:
                for total in totals:
                    _fill(total, cast(io.BufferedReader, child.stdout))
        except (OSError, EOFError) as error:
            self._end()
            self.deaths += 1
            raise ProcessEndedError(
                f"the process that measures ended (exit status {child.poll()}): is memory short? What it said is in "
                "the log of this one."
            ) from error
        except BaseException:  # what is left in the pipe would be taken for the next answer
            self._end()
            raise
        finally:
            limit.cancel()
        if answer["error"] is not None:
            raise answer["error"]
        return answer

    def close(self) -> None:
        """End it for good."""
        with self._lock:
            self._closed = True
        self._end()

    def _running(self) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._closed:
                raise ModelError("the observer is closed.")
            if self._child is None:
                self._child = _started()
            return self._child

    def _end(self) -> None:
        """End it, unless it is that of the process of which this is a fork."""
        with self._lock:
            child, self._child, self.user = self._child, None, None
        if child is not None and os.getpid() == self._owner:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                with suppress(OSError):
                    cast(IO[bytes], stream).close()


class ProcessRun(Run):
    """A pass whose first batch is measured here, and again by another process: the rest too, if that gives the same.

    So what a first look refuses is refused here, and a process that cannot do what this one does is not used.
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
        self._process = process

    def alone(self, inputs: Given, index: int) -> set[str]:
        """Measure a batch, of which alone the sums are then."""
        message = {"inputs": inputs.inputs, "index": index, "num_samples": self.num_samples}
        if self._process.refused or self._process.user is not self:
            slow = super().alone(inputs, index)
            if not self._process.refused:
                self._send(message)
            return slow
        assert self.sums is not None
        answer = self._process.ask(message, _in_order(self.sums))
        self.routes, self.num_samples = answer["routes"], answer["num_samples"]
        found: set[str] = answer["slow"]
        return found

    def _send(self, message: dict[str, Any]) -> None:
        """Send the copy of the weights, and the batch that was measured on it: it must give the same."""
        assert self.sums is not None
        own = _in_order(self.sums)
        total = sum(float(sums.sum()) for sums in own)
        if not 0 < total < math.inf:  # there is nothing to compare
            return
        if self._process.deaths >= DEATHS and not self._process.required:
            self._process.refuse(f"it ended {DEATHS} times")
            return
        found = [torch.empty_like(sums) for sums in own]
        sent = {
            **message,
            "model": self.shadow,
            "names": list(self.routes),
            "forward": None if self.masked else self.forward,
            "estimator": self.estimator,
            "dtype": torch.get_default_dtype(),
        }
        try:
            self._process.ask(sent, found)
        except ProcessEndedError:  # the next batch is another try
            if self._process.required:
                raise
            return
        except Exception as error:  # whatever pickling raises, here or there
            self._process.refuse(f"{type(error).__name__}: {error}")
            return
        if all((a - b).norm() <= ALIKE * a.norm() for a, b in zip(own, found, strict=True)):
            self._process.user = self
        else:
            self._process.refuse("it gives other importances for the first batch")


def main() -> None:
    """What the other process does, until nobody asks any more."""
    global _is_child
    _is_child = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when who asks has ended
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a model prints is no answer
    torch.set_num_threads(1)
    run: Run | None = None
    with workspace():
        while True:
            totals: list[Tensor] = []
            answer: dict[str, Any] = {"error": None}
            try:
                message = _read(sys.stdin.buffer)
                run = _begun(message) if "model" in message else run
                assert run is not None
                run.num_samples = message["num_samples"]
                answer["slow"] = run.alone(Given(message["inputs"]), message["index"])
                assert run.sums is not None
                answer |= {"routes": run.routes, "num_samples": run.num_samples}
                totals = _in_order(run.sums)
            except EOFError:
                return
            except Exception as error:
                answer["error"] = error if isinstance(error, MemsynError) else RuntimeError(f"there, {error!r}")
            _write(answers, _packed(answer), *totals)


def _begun(message: dict[str, Any]) -> Run:
    """A pass over what was sent."""
    torch.set_default_dtype(message["dtype"])
    own = {name: named_parameters(message["model"])[name] for name in message["names"]}
    return Run(message["model"], own, CPU, message["forward"], message["estimator"], batched=False)


def _started() -> subprocess.Popen[bytes]:
    executable = get_executable()
    if getattr(sys, "frozen", False) or not executable:
        raise ModelError("this program has no Python interpreter to start")
    command = [executable, "-c", COMMAND.format(path=sys.path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _fill(total: Tensor, stream: io.BufferedReader) -> None:
    """Read the numbers of a tensor."""
    held = total if total.is_contiguous() else torch.empty_like(total, memory_format=torch.contiguous_format)
    view = _bytes_of(held)
    while len(view):
        size = stream.readinto(view)
        if not size:
            raise EOFError("there is no more")
        view = view[size:]
    if held is not total:
        total.copy_(held)


def _packed(message: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getbuffer()


def _write(stream: IO[bytes], message: memoryview, *totals: Tensor) -> None:
    stream.write(len(message).to_bytes(PREFIX, "little"))
    stream.write(message)
    for total in totals:
        stream.write(_bytes_of(total.contiguous()))
    stream.flush()


def _in_order(sums: RunningSums) -> list[Tensor]:
    return [sums.recent[name] for name in sorted(sums.recent)]


def _bytes_of(total: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return total.reshape(-1).view(torch.uint8).numpy().data


def _read(stream: IO[bytes]) -> dict[str, Any]:
    prefix = stream.read(PREFIX)
    message = stream.read(int.from_bytes(prefix, "little"))
    if len(prefix) < PREFIX or not message:
        raise EOFError("there is no more")
    found: dict[str, Any] = torch.load(io.BytesIO(message), weights_only=False)
    return found
