"""docs/benchmark.md: its files run as they stand there, and what it says of results.jsonl is what runs write."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from bench.tests import tiny

import memsyn_bench
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.running.record import StrengthRecord, TaskRecord
from memsyn_bench.running.runner import run
from memsyn_bench.sequences.sequences import SEQUENCES
from memsyn_bench.settings import Settings

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "benchmark.md").read_text(encoding="utf-8")
FADING, STRIPES, PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
PROJECT = re.search(r"```toml\n(.*?)```", TEXT, re.DOTALL)[1]
SMALL = ["--epochs", "1", "--seeds", "1"]


def has_type(value, kind):
    """Whether a value out of a line is of a type that the page names."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return any(
        {
            "string": isinstance(value, str),
            "integer": number and isinstance(value, int),
            "number": number,
            "null": value is None,
            "object": isinstance(value, dict),
            "numbers": isinstance(value, list) and all(isinstance(one, int | float) for one in value),
        }[one]
        for one in kind.split(" or ")
    )


def table(kind):
    """Field -> type, of the table under a heading."""
    section = TEXT.split("## results.jsonl")[1].split(f"\n### {kind}\n")[1].split("\n### ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    assert all(len(row) == 4 for row in rows)
    return {row[0].strip().strip("`"): row[1].strip() for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both files of the page, and the metadata that `pip install` makes of its pyproject.toml."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "fading.py").write_text(FADING)
    (folder / "stripes.py").write_text(STRIPES)
    (folder / "python.py").write_text(PYTHON)
    return folder


@pytest.fixture(scope="module")
def installed(folder):
    """The package of the page, as installed: importable, with its entry points."""
    info = folder / "my_memsyn_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-memsyn-methods\nVersion: 1.0\n")
    points = re.findall(r'\[project\.entry-points\."(.*?)"\]\n(\w+) = "(.*?)"', PROJECT)
    assert [(group, name) for group, name, _ in points] == [
        ("memsyn_bench.methods", "fading"), ("memsyn_bench.sequences", "stripes")
    ]  # fmt: skip
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{name} = {value}\n" for group, name, value in points))
    return folder


def execute(folder, *command, where):
    """In a process of its own, in the folder `where`; what it prints."""
    code = f"import sys; sys.path[:0] = {[str(folder), *sys.path]!r}; import runpy; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, command)],
        cwd=where, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_method_of_the_page_is_listed_by_its_script(folder, tmp_path):
    out = execute(folder, folder / "fading.py", "list", where=tmp_path)
    assert "  fading            MAS, importance of older tasks fades\n" in out
    assert out.index("  mas ") < out.index("  fading ")


def test_the_sequence_of_the_page_runs_by_its_script_and_from_python(folder, tmp_path):
    command = ["run", "stripes", "--methods", "finetune,mas", *SMALL]
    out = execute(folder, folder / "stripes.py", *command, where=tmp_path)
    assert "mas, seed 0, after 3/3 width 3" in out
    assert (tmp_path / "runs/stripes/accuracy.png").exists()
    accuracies = ast.literal_eval(execute(folder, folder / "python.py", where=tmp_path / "runs").splitlines()[-1])
    assert len(accuracies) == 3
    assert min(accuracies) > 50  # of three classes: chance is 33%


def test_an_installed_package_adds_both_to_the_command(installed, tmp_path):
    script = tmp_path / "command.py"
    script.write_text("from memsyn_bench.cli import app\napp()\n")
    listed = execute(installed, script, "list", where=tmp_path)
    assert "  stripes           stripes in three widths\n" in listed
    assert "  fading            MAS, importance of older tasks fades\n" in listed
    command = ["run", "stripes", "--methods", "mas,fading", *SMALL, "--out", tmp_path / "out"]
    assert "fading, seed 0, after 3/3 width 3" in execute(installed, script, *command, where=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(line["method"], line["task"]) for line in lines[1:]] == [
        (method, task) for method in ("mas", "fading") for task in range(3)
    ]
    page = execute(installed, script, "results", tmp_path / "out/results.jsonl", where=tmp_path)
    assert "| fading |" in page
    assert "stripes in three widths" in page


def test_the_page_names_every_field_that_a_run_writes_with_its_type(tmp_path, monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)
    settings = Settings(sequence="tiny", size=8, epochs=1, batch_size=6, strength="chosen")
    run(settings, methods=["finetune", "mas"], num_seeds=1, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"run", "strength", "task"}
    committed = (DOCS / "results").glob("*.jsonl")
    lines += [json.loads(line) for path in committed for line in path.read_text().splitlines()]
    for line in lines:
        parts = {line["kind"]: line, **({"settings": line["settings"]} if line["kind"] == "run" else {})}
        for kind, part in parts.items():
            types = table(kind)
            left_out = {"optimizer", "plasticity", "processor", "num_tasks"} - part.keys()
            assert [name for name in types if name not in left_out] == list(part), kind
            wrong = [name for name, value in part.items() if not has_type(value, types[name])]
            assert not wrong, (kind, wrong, part)


def test_the_page_names_the_fields_of_the_records():
    assert list(table("settings")) == [field.name for field in fields(Settings)]
    assert list(table("task")) == ["kind", *(field.name for field in fields(TaskRecord))]
    assert list(table("strength")) == ["kind", *(field.name for field in fields(StrengthRecord))]


def test_the_page_names_the_groups_and_hooks_that_there_are():
    assert {METHODS.group, SEQUENCES.group} == set(re.findall(r'entry-points\."(.*?)"', PROJECT))
    hooks = re.findall(r"^\| `(\w+)\(training", TEXT, re.MULTILINE)
    assert hooks == ["begin", "loss_outputs", "before_step", "after_step", "end"]
    assert all(hasattr(memsyn_bench.Method, hook) for hook in hooks)
