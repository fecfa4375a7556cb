"""Files that other code wrote, made to harm: pipes, devices, folders, bombs, and outputs that are inputs."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import forged_commands
from tests.commands import call
from tests.large import peak_of

SECONDS = 60


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forged_commands.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


READERS = {
    "inspect": ["inspect", "X"],
    "weights": ["inspect", "memory", "--html", "out.html", "--weights", "X"],
    "verify": ["verify", "X"],
    "diff": ["diff", "memory", "X"],
    "merge": ["merge", "X", "importance", "-o", "out"],
    "convert": ["convert", "X", "-o", "out", "--samples", "3"],
    "gate": ["gate", "memory", "X"],
    "gate memory": ["gate", "X", "new.safetensors"],
    "data": ["gate", "memory", "new.safetensors", "--model", "tests.forged_commands:build", "--data", "X"],
    "npz": ["gate", "memory", "new.safetensors", "--model", "tests.forged_commands:build", "--data", "X.npz"],
    "jsonl": ["gate", "memory", "new.safetensors", "--model", "tests.forged_commands:build", "--data", "X.jsonl"],
    "reference": ["compare", "memory", "new.safetensors", "--reference", "X"],
    "repair": ["repair", "memory", "X", "-o", "out"],
    "learned": ["repair", "memory", "new.safetensors", "--learned", "X", "-o", "out"],
    "merge-models": ["merge-models", "X", "new.safetensors", *("--memory", "memory") * 2, "-o", "out"],
    "merged memory": ["merge-models", "old.safetensors", "new.safetensors", *("--memory", "X") * 2, "-o", "out"],
    "html": ["inspect", "memory", "--html", "X"],
    "out": ["convert", "memory", "-o", "X"],
}  # fmt: skip
"""Each way in which a command reads or replaces a file."""


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def hollow(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [pipe, device, hollow])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_ends_in_one_line(reader: str, make: Callable[[Path], None], folder: Path) -> None:
    """Before, a pipe was waited for, and a device was read, for ever."""
    given = READERS[reader]
    name = next(argument for argument in given if argument.startswith("X"))
    make(folder / name)
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{reader} waits for {make.__name__}"))
    signal.alarm(SECONDS)
    try:
        result = call(*given, code=1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said = result.stderr or result.stdout
    assert name in said
    assert "unexpected" not in said
    assert not Path("out").exists()


def deflated(path: Path) -> None:
    """A file of torch whose zeros were compressed."""
    whole = io.BytesIO()
    torch.save({"w": torch.zeros(200_000_000, dtype=torch.uint8)}, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in archive.infolist():
            out.writestr(entry.filename, archive.read(entry))


class Called:
    """Pickled as a call."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.call = function, given

    def __reduce__(self) -> Any:
        return self.call


def large_call(path: Path) -> None:
    torch.save({"w": Called(bytearray, 200_000_000)}, path)


def old_call(path: Path) -> None:
    torch.save({"w": Called(bytearray, 200_000_000)}, path, _use_new_zipfile_serialization=False)


def doubled(path: Path) -> None:
    """Each call of 20 bytes makes bytes twice as long: 16 bytes, 23 times."""
    text = b"\x80\x02}X\x01\x00\x00\x00w" + b"c_codecs\nencode\n" * 24 + b"X\x10\x00\x00\x00" + b"a" * 16
    text += b"X\x06\x00\x00\x00latin1\x86R" + b"X\x03\x00\x00\x00hex\x86R" * 23 + b"s."
    whole = io.BytesIO()
    torch.save({"w": torch.ones(1)}, whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w") as out:
        for entry in archive.infolist():
            out.writestr(entry.filename, text if entry.filename.endswith("data.pkl") else archive.read(entry))


def one_number(path: Path) -> None:
    """A view of one number as a weight of 800 MB."""
    torch.save({"0.weight": torch.ones(1).expand(200_000_000)}, path)


def compressed_arrays(path: Path) -> None:
    np.savez_compressed(path, inputs=np.zeros(200_000_000, dtype=np.uint8))


def claimed_arrays(path: Path) -> None:
    """An array whose header says 8 TB."""
    np.savez(path, inputs=np.zeros(2))
    with zipfile.ZipFile(path) as archive:
        content = archive.read("inputs.npy").replace(b"(2,), }              ", b"(1000000000000,), }  ")
    assert b"1000000000000" in content
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", content)


BOMBS: list[tuple[Callable[[Path], None], str, list[str]]] = [
    *[(make, "X", ["convert", "gate", "weights", "repair"]) for make in (deflated, large_call, old_call, doubled)],
    (one_number, "X", ["convert", "gate", "weights", "repair"]),
    (compressed_arrays, "X.npz", ["npz"]),
    (claimed_arrays, "X.npz", ["npz"]),
]


def test_bombs_do_not_go_off(folder: Path) -> None:
    """In a process of their own. Before, 0.8 MB took 770 MB, and then was refused."""
    code = "from tests.test_foreign_files import go_over_bombs; go_over_bombs()"
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    grown = json.loads(
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        ).stdout
    )
    print(f"\nmore memory, in MB: {grown}")
    assert grown.keys() == {make.__name__ for make, _, _ in BOMBS}
    assert max(grown.values()) < 50, grown


def go_over_bombs() -> None:
    """Print by how many megabytes memory grew while commands refused each file, beyond three times its size."""
    for reader in ("gate", "weights", "npz"):  # what they import
        call(*[argument.replace("X", "none") for argument in READERS[reader]], code=1)
    grown = {}
    for make, name, readers in BOMBS:
        if os.fork() == 0:  # making a bomb takes memory too
            make(Path(name))
            os._exit(0)
        os.wait()
        before = resident()
        _, peak, _ = peak_of(partial(refuse, name, readers))
        grown[make.__name__] = (peak - before - 3 * Path(name).stat().st_size) / 1e6
        Path(name).unlink()
    print(json.dumps(grown))


def refuse(name: str, readers: list[str]) -> None:
    for reader in readers:
        error = call(*READERS[reader], code=1).stderr
        assert error.startswith(f"error: {name}"), error


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
