"""Which version may be served: one that the night found safe, with finite weights and answers.

Owns the files beside the model, which are named by its fingerprint: its verdict, its memory, and the model itself once
it was replaced. Verdicts guard against mistakes, not against those who may write into the folder.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import memsyn
from model import FILE, Served, load

SAFE = "safe"


class AdmissionError(Exception):
    """A version that is not served. The text is for anyone: it names no path."""


def beside(folder: Path, what: str, fingerprint: str) -> Path:
    """The file of a model's "verdict", its "memory", or the "model" that was replaced."""
    end = "json" if what == "verdict" else "safetensors"
    return folder / f"{what}-{fingerprint.removeprefix('sha256:')[:16]}.{end}"


def judge(folder: Path, served: Served, answer: str, sentence: str) -> None:
    """Write the verdict on a version, whole or not at all."""
    mark = memsyn.fingerprint(served.network)
    path = beside(folder, "verdict", mark)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"fingerprint": mark, "verdict": answer, "sentence": sentence}, indent=1))
    os.replace(partial, path)


def admitted(folder: Path) -> Served:
    """The version in the folder.

    Raises:
        AdmissionError: it cannot be loaded, has no verdict "safe", or has weights or answers that are not finite.
    """
    try:
        served = load(folder / FILE)
        _check_verdict(folder, memsyn.fingerprint(served.network))
        _check_finite(served)
    except AdmissionError:
        raise
    except Exception as error:  # whatever a file can do, the present version goes on
        logging.getLogger("serve").error("%s", error)
        raise AdmissionError("the file is no model of this service: make one by train.py") from error
    return served


def _check_verdict(folder: Path, mark: str) -> None:
    path = beside(folder, "verdict", mark)
    found = json.loads(path.read_text()) if path.exists() else {"verdict": "missing", "fingerprint": mark}
    if (found["verdict"], found["fingerprint"]) != (SAFE, mark):
        raise AdmissionError(
            f"its verdict is {str(found['verdict'])[:40]!r}, not 'safe': let nightly.py compare it first"
        )


def _check_finite(served: Served) -> None:
    broken = [name for name, values in served.network.state_dict().items() if not bool(values.isfinite().all())]
    if broken:
        raise AdmissionError(f"{len(broken)} of its tensors hold NaN or infinite values")
    probe = torch.rand(2, 3, served.side, served.side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        for head, section in enumerate(served.sections):
            if not bool(served.network(probe, head).isfinite().all()):
                raise AdmissionError(f"its answers in {section} are NaN or infinite")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one process at a time may change the versions in a folder."""
    with open(folder / ".night.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another night or a rollback is at work in {folder}: wait until it ends.") from None
        yield
