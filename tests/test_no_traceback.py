"""Where commands end: errors of disks, pipes and memory in one line, JSON without NaN, and no input overwritten."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import memsyn
from memsyn.cli import app, files
from tests import forged_commands
from tests.commands import call

COMMAND = [sys.executable, "-c", "from memsyn.cli import app; app()"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forged_commands.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(memsyn.__file__).parents[1]), *sys.path]))
    return tmp_path


WRITERS = {
    "merge": (["merge", "importance", "other importance"], ["importance", "other importance"]),
    "convert": (["convert", "importance"], ["importance"]),
    "rename": (["convert", "memory", "--rename", "=net."], ["memory"]),
    "repair": (
        ["repair", "memory", "new.safetensors", "--learned", "factors", "--reference", "old.safetensors"],
        ["memory", "new.safetensors", "factors", "old.safetensors"],
    ),
    "merge-models": (
        ["merge-models", "old.safetensors", "new.safetensors", "--memory", "memory", "--memory", "memory of new"],
        ["old.safetensors", "new.safetensors", "memory", "memory of new"],
    ),
}


def itself(path: str) -> str:
    return path


def spelled(path: str) -> str:
    return f"../{Path.cwd().name}/./{path}"


def symbolic(path: str) -> str:
    os.symlink(path, "link")
    return "link"


def hard(path: str) -> str:
    os.link(path, "hard")
    return "hard"


def as_url(path: str) -> str:
    return f"file://{Path.cwd()}/{path}"


@pytest.mark.parametrize("name", [itself, spelled, symbolic, hard, as_url])
@pytest.mark.parametrize("writer", WRITERS)
def test_no_command_writes_over_what_it_reads(writer: str, name: Callable[[str], str], folder: Path) -> None:
    given, inputs = WRITERS[writer]
    before = {path: Path(path).read_bytes() for path in inputs}
    for path in inputs:
        out = name(path)
        message = f"-o {out} is {path}, which is only read: give another file"
        assert message in call(*given, "-o", out, code=1).stderr
        for link in ("link", "hard"):
            Path(link).unlink(missing_ok=True)
    assert all(Path(path).read_bytes() == content for path, content in before.items())


def test_a_folder_of_links_to_the_models_is_not_written_through(folder: Path) -> None:
    """The output of folders is a folder, whose files may be links to those that are read."""
    for name in ("old", "new"):
        Path(name).mkdir()
        os.rename(f"{name}.safetensors", f"{name}/model.safetensors")
        Path(f"{name}/config.json").write_text("{}")
    Path("out").mkdir()
    os.link("old/config.json", "out/config.json")
    before = Path("old/config.json").read_bytes()
    given = ["merge-models", "old", "new", "--memory", "memory", "--memory", "memory of new", "-o", "out"]
    assert "-o out/config.json is old/config.json, which is only read" in call(*given, code=1).stderr
    Path("out/config.json").unlink()
    os.symlink("../new/model.safetensors", "out/model.safetensors")
    assert "-o out/model.safetensors is new/model.safetensors" in call(*given, code=1).stderr
    assert Path("old/config.json").read_bytes() == before


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "memory"), "memory could not be read or written: Permission denied."),
        (FileNotFoundError(2, "No such file or directory", "gone"), "gone could not be read or written: No such file"),
        (IsADirectoryError(21, "Is a directory", "here"), "here could not be read or written: Is a directory."),
        (OSError(28, "No space left on device"), "a file, or what is printed, could not be read or written: No"),
        (MemoryError(), "there is not enough memory for these files"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "unexpected UnicodeDecodeError: 'utf-8'"),
        (RuntimeError("of torch"), "unexpected RuntimeError: of torch. This is a fault of memsyn: please report it"),
        (RecursionError("too deep"), "unexpected RecursionError: too deep"),
    ],
)  # fmt: skip
def test_each_error_is_one_line(
    error: BaseException, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "load", raising(error))
    for given in (["inspect", "memory"], ["diff", "memory", "memory", "--json"], ["merge", "a", "b", "-o", "out"]):
        result = call(*given, code=1)
        assert result.stdout == ""
        assert result.stderr.startswith(f"error: {message}")
        assert result.stderr.count("\n") == 1


def run(*given: str, **options: Any) -> subprocess.CompletedProcess[str]:
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 120, **options}
    return subprocess.run([*COMMAND, *given], **settings)


def test_the_development_mode_shows_where(folder: Path) -> None:
    code = "from memsyn.cli import app, files; files.load = lambda path: 1 / 0; app(['inspect', 'memory'])"
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" in done.stderr


def test_a_full_disk_under_what_is_printed(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        for given in (["inspect", "memory"], ["inspect", "memory", "--json"]):
            done = run(*given, stdout=full)
            assert done.returncode == 1
            assert "could not be read or written: No space left on device.\n" in done.stderr
            assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves(folder: Path) -> None:
    """As `memsyn inspect FILE | head -1` does; nobody is there to read an error."""
    for given in (["inspect", "memory"], ["inspect", "memory", "--json"]):
        reading, writing = os.pipe()
        os.close(reading)
        done = run(*given, stdout=writing)
        os.close(writing)
        assert (done.returncode, done.stderr) == (1, "")


def test_a_terminal_without_unicode(folder: Path) -> None:
    memsyn.Importance({"schön.weight": torch.ones(2), "\u2603": torch.ones(2)}, 1).save("names")
    done = run("inspect", "names", env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, "")
    assert r"sch\xf6n" in done.stdout


def test_ctrl_c_exits_with_130(folder: Path) -> None:
    Path("slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    given = ["gate", "memory", "new.safetensors", "--model", "slow:build", "--data", "inputs.safetensors"]
    running = subprocess.Popen([*COMMAND, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_has_no_nan(number: float, folder: Path) -> None:
    """New weights that are not finite: no command calls them safe, and each prints JSON."""
    state = load_file("new.safetensors")
    state["0.weight"][0, 0] = number
    save_file(state, "new.safetensors")
    data = ["--model", "tests.forged_commands:build", "--data", "inputs.safetensors"]
    for given in (["gate"], ["gate", *data], ["compare"], ["compare", *data], ["repair", "-o", "out"]):
        result = CliRunner().invoke(app, [given[0], "memory", "new.safetensors", *given[1:], "--json"])
        assert "unexpected" not in result.stderr
        assert result.exit_code in (0, 1, 2)
        assert result.exit_code or given[0] != "gate"
        if result.stdout:
            found = json.loads(result.stdout, parse_constant=lambda constant: pytest.fail(constant))
            assert found.get("verdict") != "safe"
        else:
            assert result.stderr.startswith("error: ")


def test_what_is_not_finite_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    from memsyn.cli.screen import say_json

    say_json({"a": float("nan"), "b": [1.5, (float("inf"), {"c": -float("inf")})], "d": None, "e": True})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, [None, {"c": None}]], "d": None, "e": True}
