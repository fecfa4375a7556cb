"""The commands on files: what they print, write and exit with, as tables and as JSON."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

import memsyn
from memsyn import Importance, Memory, measure
from memsyn.cli import app
from tests.commands import call


@pytest.fixture
def model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    return model


@pytest.fixture
def folder(model, tmp_path, monkeypatch) -> Path:
    """Two importances, their memories, and a memory of two consolidations, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    # The output is 4: |d y^2| is 8 (1, 2) for the first layer, 8 * 3 and 8 for the second one's weight and bias.
    importance = measure(model, [torch.tensor([[1.0, 2.0]])], progress=False)
    importance.save("i")
    measure(model, [torch.tensor([[1.0, 0.0], [0.0, 1.0]])], progress=False).save("j")
    first = Memory.empty().consolidate(model, importance, label="faces")
    first.save("m")
    with torch.no_grad():
        model[0].weight[0, 0] += 0.5
    first.consolidate(model, importance, rule="ema", label="street signs").save("n")
    Path("text").write_text("not a memory at all")
    return tmp_path


def rows(output: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in output.splitlines() if "│" in line]


def as_json(*arguments, code=0):
    result = call(*arguments, "--json", code=code)
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_inspect_a_memory(folder) -> None:
    output = call("inspect", "n").output
    assert "Memory of 2 samples" in output
    found = rows(output)
    assert ["0", "2", "42.9%", "12", "16", "66.7%"] in found
    assert ["1", "2", "57.1%", "16", "24", "75.0%"] in found
    assert ["all", "4", "100.0%", "", "", ""] in found
    assert "Measured: abs of squared_l2_norm." in output
    first, second = (entry for entry in Memory.load("n").history)
    assert found[-3][0] == first.when[:16].replace("T", " ")
    assert found[-3][1:5] == ["1", "sum", "faces", first.fingerprint[7:15]]
    assert [found[-2][2], found[-2][3], found[-1][3]] == ["ema 0.5", "street", "signs"]
    assert second.fingerprint[7:15] in output
    assert max(map(len, output.splitlines())) <= 80


def test_inspect_an_importance(folder) -> None:
    output = call("inspect", "i").output
    assert "Importance over 1 sample\n" in output.replace(" \n", "\n").replace("  ", "")
    assert "42.9%" in output
    assert "Measured: abs of squared_l2_norm, a mean over samples." in output
    assert "Computed by 'one sample at a time': 3 of 3 parameters\n" in output
    assert "Computed by 'rule': 3 of 3 parameters\n" in call("inspect", "j").output
    routes = {"a.w": "unused", "a.b": "rule", "a.c": "rule"}
    Importance({name: torch.ones(1) for name in routes}, 1, routes).save("routes")
    output = call("inspect", "routes").output
    assert "Computed by 'rule': 2 of 3 parameters\nComputed by 'unused': 1 of 3 parameters: a.w\n" in output


def test_inspect_as_json(folder) -> None:
    memory, importance = Memory.load("n"), Importance.load("j")
    assert as_json("inspect", "n") == {
        "kind": "memory",
        "num_samples": 2,
        "objective": "squared_l2_norm",
        "magnitude": "abs",
        "layers": [asdict(layer) for layer in memory.summary()],
        "history": [asdict(entry) for entry in memory.history],
        "directions": None,
        "statistics": [],
    }
    assert set(as_json("inspect", "n")["history"][0]) == {
        "when", "num_samples", "rule", "decay", "objective", "magnitude", "label", "memsyn", "torch", "fingerprint"
    }  # fmt: skip
    found = as_json("inspect", "j")
    assert found.pop("layers") == [asdict(layer) for layer in importance.summary()]
    assert found == {
        "kind": "importance",
        "num_samples": 2,
        "objective": "squared_l2_norm",
        "magnitude": "abs",
        "routes": {"rule": ["0.weight", "1.weight", "1.bias"]},
    }
    Memory.empty().save("empty")
    assert as_json("inspect", "empty")["objective"] is None
    assert "Consolidations" not in call("inspect", "empty").output


def test_what_a_stranger_writes_is_shown_not_obeyed(folder) -> None:
    name = "a[red]\x1b[31m\n[/none].w"
    routes = {"b": "rule", "c": "rule", name: "[bold]\x07"}
    Importance({own: torch.ones(2) for own in routes}, 1, routes).save("odd")
    output = call("inspect", "odd").output
    assert "\x1b" not in output
    assert "\x07" not in output
    assert r"by '[bold]\x07': 1 of 3 parameters: a[red]\x1b[31m\n[/none].w" in output
    assert r"a[red]\x1b[31m\n[/none]" in "".join(row[0] for row in rows(output))
    message = call("merge", "odd", "i", "-o", "x", code=1).stderr
    assert "a[red]\\x1b[31m\n[/none].w is missing" in message


def test_inspect_names_what_is_wrong(folder) -> None:
    result = call("inspect", "none", code=1)
    assert (result.stdout, result.stderr) == ("", "error: none does not exist.\n")
    assert "was not written by memsyn" in call("inspect", "text", "--json", code=1).stderr
    memsyn.storage.reading_and_writing.write("other", "checkpoint", {}, {})
    assert (
        "other is of kind 'checkpoint'; expected one of memory, importance, factors."
        in call("inspect", "other", code=1).stderr
    )


def test_verify(folder) -> None:
    assert call("verify", "n", "i").output == "OK      n: memory\nOK      i: importance\n"
    damaged = bytearray(Path("m").read_bytes())
    damaged[-1] ^= 1
    Path("damaged").write_bytes(damaged)
    lines = call("verify", "n", "damaged", "none", "i", code=1).output.splitlines()
    assert [line[:6] for line in lines] == ["OK    ", "FAILED", "FAILED", "OK    "]
    assert lines[1].startswith("FAILED  damaged is damaged: its checksum does not match its content.")
    assert lines[2] == "FAILED  none does not exist."
    assert as_json("verify", "n", "none", code=1) == {
        "ok": False,
        "files": [
            {"path": "n", "ok": True, "kind": "memory", "error": None},
            {"path": "none", "ok": False, "kind": None, "error": "none does not exist."},
        ],
    }
    assert as_json("verify", "n")["ok"] is True


def test_verify_looks_into_the_header_and_at_other_kinds(folder) -> None:
    memsyn.storage.reading_and_writing.write(
        "odd", "memory", {"history": [{"when": 3}], "counts": {}}, {"anchor": {}, "importance": {}}
    )
    assert "odd is not as memsyn writes it" in call("verify", "odd", code=1).output
    memsyn.storage.reading_and_writing.write("other", "checkpoint", {}, {"model": {"w": torch.ones(1)}})
    assert call("verify", "other").output == "OK      other: checkpoint\n"


def test_diff(folder) -> None:
    output = call("diff", "m", "n", code=1).output
    assert "A: memory of 1 sample. B: memory of 2 samples." in output
    # half a unit in one weight of (1, 1), whose norm is sqrt(2)
    assert ["0", "42.9%", "42.9%", "+0.0", "24", "24", "0.5", "0.354"] in rows(output)
    assert ["1", "57.1%", "57.1%", "+0.0", "32", "32", "0", "0"] in rows(output)
    *table, judged, last = output.splitlines()
    assert judged.startswith("No difference that matters: 0.0% of the importance moved to other weights, and the rank")
    assert last == "They differ."
    assert max(map(len, table)) <= 80
    assert call("diff", "m", "m").output.endswith("The same, bit for bit.\n")


def test_diff_of_unlike_files(folder) -> None:
    Importance({"1.weight": torch.ones(2, 1), "2.weight": torch.ones(1)}, 1, magnitude="square").save("other")
    output = call("diff", "i", "other", code=1).output
    assert "Only in A: 0.weight, 1.bias\nOnly in B: 2.weight\nIn different shapes: 1.weight\n" in output
    assert "quantities: abs of squared_l2_norm, and square of squared_l2_norm. Compare shares, not totals." in output
    assert "Moved" not in output


def test_diff_as_json(folder) -> None:
    found = as_json("diff", "m", "n", code=1)
    assert found["layers"][0] == {
        "layer": "0",
        "share_a": pytest.approx(24 / 56),
        "share_b": pytest.approx(24 / 56),
        "total_a": 24.0,
        "total_b": 24.0,
        "moved": 0.5,
        "moved_relative": pytest.approx(0.5 / 2**0.5),
        "shifted": 0.0,
    }
    assert [layer["layer"] for layer in found.pop("layers")] == ["0", "1"]
    assert found.pop("sentence").startswith("No difference that matters: 0.0% of the importance moved")
    nothing = {"only_in_a": [], "only_in_b": [], "reshaped": [], "directions": [], "statistics": [], "overlap": None}
    judged = {"extent": "same", "shifted": 0.0, "rank_correlation": 1.0, "rank_interval": None}
    assert found == {"same": False, **judged, **nothing}
    assert as_json("diff", "i", "i")["same"] is True


def test_statistics_are_shown_compared_and_converted(folder) -> None:
    memory = Memory.load("m")
    for name, value in (("one", 1.0), ("two", 2.0)):
        kept = {"1.running_mean": torch.zeros(1), "1.running_var": torch.full((1,), value)}
        replace(memory, statistics=kept).save(name)
    assert "Statistics beside the weights: 2, the first is 1.running_mean\n" in call("inspect", "one").output
    assert as_json("inspect", "one")["statistics"] == ["1.running_mean", "1.running_var"]
    output = call("diff", "one", "two", code=1).output
    assert "Statistics that differ: 1, the first is 1.running_var\nNo difference that matters: " in output
    assert output.endswith("\nThey differ.\n")
    assert as_json("diff", "one", "two", code=1)["statistics"] == ["1.running_var"]
    assert as_json("diff", "one", "m", code=1)["statistics"] == ["1.running_mean", "1.running_var"]
    assert call("verify", "one").output == "OK      one: memory\n"
    message = call("merge", "one", "two", "-o", "both", code=1).stderr
    assert "1 of 2 statistics (the first is 1.running_var) differ" in message
    call("convert", "one", "-o", "plain.pt")
    call("convert", "plain.pt", "-o", "again")
    assert call("diff", "one", "again").output.endswith("The same, bit for bit.\n")


def test_merge_is_one_observer_of_all_samples(folder, model) -> None:
    with torch.no_grad():
        model[0].weight[0, 0] -= 0.5
    assert call("merge", "i", "j", "-o", "all").output == "all: importance of 3 samples, of 2 files.\n"
    whole = measure(model, [torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.0, 1.0]])], progress=False)
    merged = Importance.load("all")
    assert merged.num_samples == 3
    assert all(torch.equal(merged.sums[name], total) for name, total in whole.sums.items())  # whole numbers here
    Memory.empty().consolidate(model, Importance.load("j"), label="objects").save("k")
    assert as_json("merge", "m", "k", "-o", "both") == {
        "out": "both",
        "kind": "memory",
        "num_samples": 3,
        "files": ["m", "k"],
    }
    both = Memory.load("both", like=model)
    assert [entry.label for entry in both.history] == ["faces", "objects"]
    for name, omega in whole.mean().items():
        assert torch.allclose(both.importance[name], omega)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["i"], "there is nothing to merge: give at least two files."),
        (["i", "j", "i"], "i is given more than once: its samples would count twice."),
        (["i", "./i"], "i, ./i is given more than once: its samples would count twice."),
        (["m", "i"], "a memory and an importance cannot be merged: give files of one kind."),
        (["m", "n"], "only memories of one consolidation each can be merged, and one has 2"),
        (["i", "none"], "none does not exist."),
    ],
)
def test_what_cannot_be_merged(folder, files, message) -> None:
    result = call("merge", *files, "-o", "x", code=1)
    assert result.stderr.startswith(f"error: {message}")
    assert not Path("x").exists()


def test_merge_asks_for_its_output(folder) -> None:
    assert "Missing option '--out'" in call("merge", "i", "j", code=2).stderr


def test_convert_there_and_back(folder) -> None:
    assert call("convert", "n", "-o", "n.pt").output == "n.pt: memory of 2 samples, as memsyn's plain dict.\n"
    assert torch.equal(torch.load("n.pt", weights_only=True)["anchor"]["0.weight"], Memory.load("n").anchor["0.weight"])
    output = call("convert", "n.pt", "-o", "again").output
    assert output == "again: memory of 2 samples, from memsyn's plain dict.\n"
    assert Memory.load("again").history == Memory.load("n").history
    assert call("diff", "n", "again").output.endswith("The same, bit for bit.\n")
    assert as_json("convert", "i", "-o", "i.pt") == {
        "out": "i.pt",
        "kind": "importance",
        "num_samples": 1,
        "structure": "memsyn",
        "renamed": {},
    }


def test_convert_from_other_code(folder) -> None:
    torch.save({"w": {"omega": torch.ones(2), "init_val": torch.zeros(2)}, "lambda": 1}, "plain.pt")
    assert as_json("convert", "plain.pt", "-o", "w", "--samples", "7") == {
        "out": "w",
        "kind": "memory",
        "num_samples": 7,
        "structure": "official",
        "renamed": {},
    }
    assert Memory.load("w").quantity == ("squared_l2_norm", "abs of the batch mean")
    call("convert", "plain.pt", "-o", "w", "--samples", "7", "--exact")
    assert Memory.load("w").quantity == ("squared_l2_norm", "abs")
    assert "give num_samples (--samples)" in call("convert", "plain.pt", "-o", "x", code=1).stderr
    assert "leave --samples and --exact out" in call("convert", "n", "-o", "x", "--exact", code=1).stderr
    assert "none does not exist" in call("convert", "none", "-o", "x", code=1).stderr
    assert not Path("x").exists()


def test_convert_with_other_names(folder, model) -> None:
    output = call("convert", "n", "-o", "wrapped", "--rename", "=net.").output
    assert output == "wrapped: memory of 2 samples, as a file of memsyn, 3 parameters renamed.\n"
    wrapped = Memory.load("wrapped")
    assert list(wrapped.anchor) == ["net.0.weight", "net.1.weight", "net.1.bias"]
    assert as_json("convert", "wrapped", "-o", "again", "--rename", "net.=", "--rename", "*.bias=b.*") == {
        "out": "again",
        "kind": "memory",
        "num_samples": 2,
        "structure": "memsyn",
        "renamed": {"net.0.weight": "0.weight", "net.1.weight": "1.weight", "net.1.bias": "b.1"},
    }
    again, before = Memory.load("again"), Memory.load("n")
    assert torch.equal(again.importance["b.1"], before.importance["1.bias"])
    assert again.counts == {"0.weight": 2, "1.weight": 2, "b.1": 2}
    assert [entry.fingerprint for entry in again.history] == [before.history[0].fingerprint, None]
    call("convert", "i", "-o", "other", "--rename", "0.=first.")
    assert Importance.load("other").sums.keys() == {"first.weight", "1.weight", "1.bias"}
    torch.save({"module.w": {"omega": torch.ones(2), "init_val": torch.zeros(2)}}, "plain.pt")
    call("convert", "plain.pt", "-o", "w", "--samples", "7", "--rename", "module.=")
    assert Memory.load("w").names == {"w"}
    for rule, message in (
        ("module.=", "the rule 'module.=' changes none of 3 names. Near names: "),
        ("0.weight", "expected OLD=NEW"),
        ("0.=*", "at most as many * in NEW as in OLD"),
        ("*.weight=w", "two parameters would be named w"),
    ):
        assert message in call("convert", "i", "-o", "x", "--rename", rule, code=1).stderr
    assert not Path("x").exists()


def test_a_refused_model_comes_with_the_lines_that_export_it(folder, model) -> None:
    torch.save(model, "model.pt")
    lines = call("convert", "model.pt", "-o", "x", "--samples", "3", code=1).stderr.splitlines()
    assert lines[0] == "error: model.pt holds objects (torch.nn.modules.container Sequential)."
    assert "    torch.save(plain, 'plain.pt')" in lines
    assert not Path("x").exists()


def test_files_at_urls(folder) -> None:
    Importance.load("i").save("memory://commands/i")
    assert call("verify", "memory://commands/i").output == "OK      memory://commands/i: importance\n"
    call("merge", "memory://commands/i", "j", "-o", "memory://commands/all")
    assert as_json("inspect", "memory://commands/all")["num_samples"] == 3
    assert call("convert", "memory://commands/i", "-o", "i.pt").output.startswith("i.pt: importance of 1 sample,")


def test_the_installed_command(folder) -> None:
    command = shutil.which("memsyn", path=str(Path(sys.executable).parent))
    done = subprocess.run([command, "verify", "n", "text", "--json"], capture_output=True, text=True)
    assert done.returncode == 1
    assert [file["ok"] for file in json.loads(done.stdout)["files"]] == [True, False]
    assert done.stderr == ""


def test_version():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search('^version = "(.+)"$', text, re.MULTILINE)[1]
    assert call("--version").output == f"memsyn {declared}\n", "run make install: the installed version is another one"


def test_no_option_comes_or_goes_unnoticed():
    commands = typer.main.get_command(app).commands
    surface = {
        name: [option for parameter in command.params for option in parameter.opts]
        for name, command in commands.items()
    }
    assert surface == {
        "inspect": ["path", "--html", "--png", "--weights", "--json"],
        "verify": ["paths", "--json"],
        "diff": ["a", "b", "--html", "--png", "--json"],
        "merge": ["paths", "--out", "-o", "--json"],
        "convert": ["path", "--out", "-o", "--samples", "--exact", "--rename", "--json"],
        "compare": [
            "memory_path", "state_path", "--model", "--data", "--reference", "--min-agreement", "--max-change",
            "--kind", "--html", "--png", "--json",
        ],
        "merge-models": ["paths", "--memory", "--out", "-o", "--json"],
        "gate": [
            "memory_path", "state_path", "--model", "--data", "--reference", "--min-agreement", "--max-change",
            "--kind", "--html", "--json",
        ],
        "repair": [
            "memory_path", "state_path", "--out", "-o", "--max-change", "--learned", "--model", "--data", "--reference",
            "--json",
        ],
        "observe": [
            "--from", "--store", "--model", "--weights", "--inputs", "--field", "--segment-field", "--rate",
            "--estimator", "--budget", "--interval", "--min-samples", "--half-life", "--last", "--once", "--json",
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "example"),
    [
        (["inspect"], "memsyn inspect runs/demo/mas-seed0.memsyn.safetensors"),
        (["verify"], "memsyn verify backup/*.memsyn.safetensors"),
        (["diff"], "memsyn diff january.memsyn.safetensors february.memsyn.safetensors"),
        (["merge"], "memsyn merge replica1.safetensors replica2.safetensors -o all.safetensors"),
        (["convert"], "memsyn convert reg_params.pt -o old.memsyn.safetensors --samples 5000"),
        (["compare"], "memsyn compare old.memsyn.safetensors new.safetensors --html page.html"),
        (["merge-models"], "memsyn merge-models a.safetensors b.safetensors --memory a.memsyn.safetensors"),
        (
            ["gate"],
            "memsyn gate old.memsyn.safetensors new.safetensors --model package.module:build --data inputs.safetensors",
        ),
        (
            ["repair"],
            "memsyn repair old.memsyn.safetensors new.safetensors -o repaired.safetensors --learned factors",
        ),
        (
            ["observe"],
            "memsyn observe --model package.module:build --from requests.jsonl --store traffic.safetensors",
        ),
    ],
)
def test_help_gives_an_example(command, example):
    assert example in " ".join(call(*command, "--help").output.replace("│", " ").split())
