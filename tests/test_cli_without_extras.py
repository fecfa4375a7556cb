"""The command works after `pip install .` alone: the packages of all extras are blocked here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memsyn import Importance, Memory
from tests import golden

EXTRAS = ["plotly", "jinja2", "matplotlib", "PIL", "fsspec", "prometheus_client", "transformers", "lightning"]

PROGRAM = f"""
import json, sys
sys.modules.update(dict.fromkeys({EXTRAS}))  # None: an import raises ModuleNotFoundError
from typer.testing import CliRunner
from memsyn.cli import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, arguments)
    print(json.dumps([result.exit_code, " ".join(result.output.split())]))
print(json.dumps(sorted(sys.modules)))
"""


def run(*commands: str) -> tuple[list[tuple[int, str]], set[str]]:
    """Exit code and output of each command, and the modules that they loaded, in a process of its own."""
    arguments = json.dumps([command.split() for command in commands])
    done = subprocess.run([sys.executable, "-c", PROGRAM, arguments], capture_output=True, text=True, check=True)
    *results, modules = map(json.loads, done.stdout.splitlines())
    return results, set(modules)


@pytest.fixture
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An importance `i`, a memory `m`, and a memory `one` of one consolidation, in the working folder."""
    monkeypatch.chdir(tmp_path)
    golden.importance().save("i")
    golden.memory().save("m")
    ones = {"w": torch.ones(2)}
    Memory(ones, ones, golden.memory().history[:1], {"w": 4}).save("one")


@pytest.mark.usefixtures("_files")
def test_every_command_works_without_any_extra() -> None:
    results, modules = run(
        "inspect m",
        "inspect i --json",
        "verify i m",
        "diff m m",
        "diff m one --json",
        "merge i i2 -o all",
        "convert m -o m.pt",
        "convert m.pt -o again",
        "--version",
    )
    codes, texts = zip(*results, strict=True)
    assert codes == (0, 0, 0, 0, 1, 1, 0, 0, 0), texts
    assert "Memory of 6 samples" in texts[0]
    assert json.loads(texts[1])["num_samples"] == 4
    assert texts[2] == "OK i: importance OK m: memory"
    assert texts[3].endswith("The same, bit for bit.")
    assert json.loads(texts[4])["same"] is False
    assert texts[5] == "error: i2 does not exist."
    assert texts[6] == "m.pt: memory of 6 samples, as memsyn's plain dict."
    assert texts[7] == "again: memory of 6 samples, from memsyn's plain dict."
    assert Memory.load("again").history == golden.memory().history
    assert not any(name.startswith("memsyn_bench") for name in modules)
    assert not {"memsyn.report.page", "memsyn.report.charts", "memsyn.report.pictures"} & modules


@pytest.mark.usefixtures("_files")
def test_merge_without_any_extra() -> None:
    golden.importance().save("i2")
    results, _ = run("merge i i2 -o all", "merge one i -o x")
    assert results[0] == [0, "all: importance of 8 samples, of 2 files."]
    assert Importance.load("all").num_samples == 8
    assert results[1] == [1, "error: a memory and an importance cannot be merged: give files of one kind."]


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize("command", ["inspect m", "inspect i", "diff m one"])
def test_pages_and_pictures_without_the_extra_are_one_error(command: str) -> None:
    results, _ = run(f"{command} --html x.html", f"{command} --png x", f"{command} --html x.html --png x")
    for (code, text), package in zip(results, ["jinja2", "matplotlib", "jinja2"], strict=True):
        assert code == 1
        assert text == f"error: this needs {package}: pip install 'memsyn[report]'."
    assert not Path("x.html").exists()


def test_checking_files_does_not_load_pages_or_the_benchmark() -> None:
    _, modules = run("verify none")
    own = {name for name in modules if name.partition(".")[0] in ("memsyn", "memsyn_bench")}
    assert {name for name in own if name.startswith("memsyn.report.")} == {"memsyn.report.names"}
    assert not any(name.startswith(("memsyn_bench", "memsyn.integrations")) for name in own)
