"""A pass in a process of its own, so that it shares no interpreter and no priority with who serves.

Owns the process, what is sent to it and what comes back. Knows nothing of requests, stores or segments.
"""

import io
import logging
import os
import signal
import subprocess
import sys
from typing import IO, Any, Final, cast, final

import torch
from torch import Tensor, nn

from memsyn.batches import Given, copied, tensors
from memsyn.errors import MemsynError, ModelError
from memsyn.objectives import Estimator
from memsyn.parameters import fingerprint, named_parameters, weights
from memsyn.products import workspace
from memsyn.run import Forward, Run, zeros_of
from memsyn.shadow import shadow
from memsyn.sums import RunningSums

LOGGER: Final = logging.getLogger("memsyn")

COMMAND: Final = "import os; getattr(os, 'nice', int)(19); from memsyn.process import main; main()"
"""The lowest priority comes first: most of what a start costs is the import of torch."""

CPU: Final = torch.device("cpu")

PREFIX: Final = 8
"""Bytes that say how long a message is."""

ALIKE: Final = 1e-4
"""How far outputs here and there may be apart, over the largest: other kernels, but no other computation."""


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
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def refuse(self, problem: object) -> None:
        """Use it no more.

        Raises:
            ModelError: it is required.
        """
        self.close()
        if self.required:
            raise ModelError(
                f"the model cannot be measured in another process: {problem}. Define its class in a module that can "
                "be imported, or say process=False."
            )
        self.refused = True
        LOGGER.warning("an observer measures in a thread, since another process cannot do it: %s", problem)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message, and wait for the answer.

        Raises:
            ModelError: the process has ended.
            Exception: what the process raised on it.
        """
        payload = _packed(message)
        try:
            if self._child is None:
                self._child = _started()
            _write(cast(IO[bytes], self._child.stdin), payload)
            answer = _read(cast(IO[bytes], self._child.stdout))
        except (OSError, EOFError) as error:
            raise self._lost() from error
        if answer["error"] is not None:
            raise answer["error"]
        return answer

    def fill(self, totals: list[Tensor]) -> None:
        """Read numbers that follow an answer.

        Raises:
            ModelError: the process has ended.
        """
        assert self._child is not None
        stream = cast(io.BufferedReader, self._child.stdout)
        for total in totals:
            held = total if total.is_contiguous() else torch.empty_like(total, memory_format=torch.contiguous_format)
            view = _bytes_of(held)
            while len(view):
                size = stream.readinto(view)
                if not size:
                    raise self._lost()
                view = view[size:]
            if held is not total:
                total.copy_(held)

    def close(self) -> None:
        """End it; it is not that of a fork of this process."""
        child, self._child, self.user = self._child, None, None
        if child is not None and os.getpid() == self._owner:
            child.kill()
            child.communicate()

    def _lost(self) -> ModelError:
        child = self._child
        self.close()
        return ModelError(
            f"the process that measures ended (exit status {None if child is None else child.returncode}): is memory "
            "short? What it said is in the log of this one."
        )


class ProcessRun(Run):
    """A pass whose forward and backward passes another process does, on its own copy of the weights."""

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
        if not self._process.refused and self._process.user is not self:
            self._begin(inputs.inputs, index)
        if self._process.refused:
            return super().alone(inputs, index)
        answer = self._process.ask({"inputs": inputs.inputs, "index": index})
        assert self.sums is not None
        self._process.fill(_in_order(self.sums))
        self.routes = answer["routes"]
        slow: set[str] = answer["slow"]
        return slow

    def _begin(self, inputs: Any, index: int) -> None:
        """Copy the weights, send them, and see that the other process computes the same."""
        copy = shadow(self.original, private=named_parameters(self.original), served=True)
        mark = fingerprint(weights(copy))
        if self.fingerprint not in (None, mark):
            raise ModelError("the weights have changed since the process that measured them ended.")
        with torch.no_grad():
            expected = tensors(self._output(copy, index, copied(inputs)))
        message = {
            "model": copy,
            "names": list(self.routes),
            "forward": self.forward if not self.masked else None,
            "estimator": self.estimator,
            "dtype": torch.get_default_dtype(),
            "inputs": inputs,
        }
        try:
            found = self._process.ask(message)["outputs"]
        except Exception as error:  # whatever pickling raises, here or there
            self._process.refuse(f"{type(error).__name__}: {error}")
            return
        if not _alike(expected, found):
            self._process.refuse("the model's outputs are others there")
            return
        self._process.user, self.fingerprint = self, mark
        own = named_parameters(copy)
        self.sums = RunningSums(zeros_of({name: own[name] for name in self.routes}))


def main() -> None:
    """What the other process does, until nobody asks any more."""
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
                if "model" in message:
                    run, answer["outputs"] = _begun(message)
                else:
                    assert run is not None
                    answer["slow"] = run.alone(Given(message["inputs"]), message["index"])
                    assert run.sums is not None
                    answer["routes"], totals = run.routes, _in_order(run.sums)
            except EOFError:
                return
            except Exception as error:
                answer["error"] = error if isinstance(error, MemsynError) else RuntimeError(f"there, {error!r}")
            _write(answers, _packed(answer), *totals)


def _begun(message: dict[str, Any]) -> tuple[Run, list[Tensor]]:
    """A pass over what was sent, and what the model gives there."""
    torch.set_default_dtype(message["dtype"])
    model = message["model"]
    own = {name: named_parameters(model)[name] for name in message["names"]}
    for parameter in own.values():
        parameter.requires_grad_()
    run = Run(model, own, CPU, message["forward"], message["estimator"], batched=False)
    with torch.no_grad():
        return run, tensors(run.forward(model, copied(message["inputs"])))


def _started() -> subprocess.Popen[bytes]:
    if getattr(sys, "frozen", False) or not sys.executable:
        raise OSError("this program has no Python interpreter to start")
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


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


def _alike(one: list[Tensor], two: list[Tensor]) -> bool:
    """Whether two computations are the same but for rounding."""
    return len(one) == len(two) and all(
        torch.equal(a, b) or (a.shape == b.shape and a.dtype == b.dtype and a.is_floating_point() and _near(a, b))
        for a, b in zip(one, two, strict=True)
    )


def _near(one: Tensor, two: Tensor) -> bool:
    largest = float(one.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(one, two, rtol=0.0, atol=ALIKE * largest, equal_nan=True)
