"""Forged files with right checksums, in every reader and every command: refused by name, or the same as before.

A checksum is no signature. What could be a true file is taken: other numbers, counts and text, listed here.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from memsyn import MemoryFileError
from memsyn.values.memory import Held, Memory, load
from tests import forged_commands
from tests.forged_commands import KINDS, run
from tests.forgeries import Forgery, forgeries, taken_apart

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore::UserWarning")]

CANNOT_BE_TOLD = (
    "num_samples", "objective", "magnitude", "fingerprint", "routes", "counts", "history",
    "directions.rank", "directions.free", "directions.mass", "directions.squared_outputs",
)  # fmt: skip
"""Fields of which another value may be true, in the bounds that are checked; and all tensors, as far as they fit."""

PARTS = ("scales", "counts", "mass", "bias", "layout", "diagonal")
"""The same, of each matrix and parameter."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    forged_commands.write_files(folder)
    return folder


@pytest.fixture
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    yield
    for path in [*folder.glob("out*"), *folder.glob("forged*")]:
        path.unlink()


def some(whole: bytes, soak: bool, number: int = 0) -> list[Forgery]:
    """All forgeries in a soak; else a number of them, or a twentieth."""
    every = list(forgeries(whole))
    return every if soak else random.Random(0).sample(every, number or len(every) // 20)


def told(held: Held) -> tuple[str, dict[str, Any]]:
    """All that a value says, to compare."""
    groups = held.groups() if isinstance(held, Memory) else {"sums": held.sums}
    tensors = {
        f"{group}/{name}": (str(t.dtype), t.tolist()) for group, own in groups.items() for name, t in own.items()
    }
    header = (
        {**held.header(), "history": [asdict(e) for e in held.history]} if isinstance(held, Memory) else held.header()
    )
    return json.dumps(header, sort_keys=True), tensors


@pytest.mark.usefixtures("_there")
@pytest.mark.parametrize("kind", KINDS)
def test_forged_files_are_refused_by_name(kind: str, soak: bool) -> None:
    whole, outcomes = Path(kind).read_bytes(), Counter[str]()
    expected = told(load(kind))
    tensors = set(taken_apart(whole)[1])
    for forgery in some(whole, soak):
        Path("forged").write_bytes(forgery.content)
        try:
            found = told(load("forged"))
        except MemoryFileError as error:
            outcomes["refused" if names_the_place(forgery, str(error)) else f"{forgery}: {error}"] += 1
            continue
        outcomes["same" if found == expected else "other"] += 1
        parts = forgery.field.split(".")
        allowed = forgery.field in tensors or forgery.field.startswith(CANNOT_BE_TOLD) or set(parts) & set(PARTS)
        assert found == expected or allowed, forgery
    print(f"\nforged {kind}: {dict(outcomes)}")
    assert outcomes.keys() <= {"refused", "same", "other"}
    assert outcomes["refused"] > sum(outcomes.values()) / 2


def names_the_place(forgery: Forgery, message: str) -> bool:
    """Whether an error names the field, a part of it, or says which tensors or metadata do not fit."""
    parts = [part for part in forgery.field.replace("/", ".").split(".") if not part.isdigit()]
    general = (
        "its tensors are not those",
        "metadata",
        "format",
        "of kind",
        "holds a group",
        "too many",
        "KeyError",
        "is missing",
    )
    general += ("counts", "excerpt/", "mass", "the tensors of")  # what disagrees with the field
    named = any(part in message for part in [*parts, *general]) or forgery.how == "has another name"
    return named and message.startswith("forged")


@pytest.mark.usefixtures("_there")
@pytest.mark.parametrize("kind", KINDS)
def test_no_forged_file_ends_a_command_in_a_traceback(kind: str, soak: bool) -> None:
    """Each forgery that loads in every command that reads such a file; each other one in three of them."""
    whole, calls = Path(kind).read_bytes(), 0
    for number, forgery in enumerate(some(whole, soak, 24)):
        Path("forged").write_bytes(forgery.content)
        try:
            load("forged")
            commands = [name for name in KINDS[kind] if soak or ("--html" not in name and name != "weights")]
        except MemoryFileError:
            commands = [name for name in ("verify", "inspect", "gate") if name in KINDS[kind]]
        for command in commands:
            if "html" in command and number % 10:
                continue  # a page has 5 MB
            check(command, kind, str(forgery))
            calls += 1
    print(f"\n{kind}: {calls} calls")
    assert calls > 20


def check(command: str, kind: str, what: str) -> None:
    """Run a command on the forged file: it ends with an exit code of its own, and prints JSON where it says so."""
    for path in ("out", "out.html"):
        Path(path).unlink(missing_ok=True)
    result = run(command, kind, "forged")
    assert result.exception is None or isinstance(result.exception, SystemExit), (command, what, result.exception)
    assert result.exit_code in (0, 1, 2), (command, what)
    assert "unexpected" not in result.stderr, (command, what, result.stderr)
    assert "Traceback" not in result.output
    if result.stdout and "--json" in forged_commands.arguments(command, kind, "forged"):
        json.loads(result.stdout, parse_constant=lambda constant: pytest.fail(f"{command} printed {constant}: {what}"))


@pytest.mark.usefixtures("_there")
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_the_true_file(kind: str) -> None:
    """Else the tests above would say nothing."""
    Path("forged").write_bytes(Path(kind).read_bytes())
    for command in KINDS[kind]:
        result = run(command, kind, "forged")
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.exit_code in (0, 2) or (kind, command) == ("replica", "gate"), (command, result.output)


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.usefixtures("_there")
@pytest.mark.parametrize("dtype", FLOAT8)
def test_float8_is_neither_written_nor_read(dtype: torch.dtype) -> None:
    held = load("importance")
    sums = {name: total.to(dtype) for name, total in held.sums.items()}
    with pytest.raises(MemoryFileError, match=r"float8_.*; expected a floating point type to compute with"):
        type(held)(sums, 3).save("out")
    for forgery in forgeries(Path("importance").read_bytes()):
        if forgery.how.startswith("converted to F8"):
            Path("forged").write_bytes(forgery.content)
            result = run("verify", "importance", "forged")
            assert result.exit_code == 1
            assert "expected a floating point type to compute with" in result.output
