"""The command: what it prints, writes and exits with."""

import json
import sys
from dataclasses import replace

import pytest
import typer
from bench.tests import tiny
from bench.tests.commands import call

from memsyn_bench.cli import app
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.running import runner
from memsyn_bench.sequences.sequences import SEQUENCES
from tests.commands import call as call_memsyn

NAMES = ", ".join(METHODS)
KNOWN = f"{', '.join(SEQUENCES)}, tiny, or such as pair-food-animals or paper8-resnet18"
QUICK = ["--size", "8", "--epochs", "1", "--batch-size", "6", "--seeds", "1"]


@pytest.fixture(autouse=True)
def _tiny_sequence(monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)


def test_version():
    assert call("--version").output == "memsyn-bench 0.2.0\n"


def test_list_names_sequences_and_methods():
    assert [line.split()[0] for line in call("list").output.splitlines()] == [
        "Sequences", *SEQUENCES, "Methods", *METHODS
    ]  # fmt: skip


def test_no_option_comes_or_goes_unnoticed():
    commands = typer.main.get_command(app).commands
    surface = {
        name: [option for parameter in command.params for option in parameter.opts]
        for name, command in commands.items()
    }
    assert surface == {
        "list": [],
        "run": [
            "sequence", "--methods", "--seeds", "--size", "--epochs", "--batch-size", "--lr", "--warmup",
            "--strength", "--optimizer", "--out",
        ],
        "report": ["runs", "--out", "-o", "--png", "--tensorboard", "--mlflow"],
        "results": ["files", "--out", "-o"],
        "language": ["--methods", "--domains", "--seeds", "--steps", "--memory", "--precision", "--out"],
        "language-page": ["file", "--out", "-o"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "example"),
    [
        (["run"], "memsyn-bench run emoji8 --methods finetune,mas --seeds 3"),
        (["report"], "memsyn-bench report runs/demo -o report.html"),
        (["results"], "memsyn-bench results docs/results/*.jsonl -o docs/results.md"),
        (["language"], "memsyn-bench language --methods finetune,lora,projected-inputs@strength=30"),
        (["language-page"], "memsyn-bench language-page docs/language/results.jsonl -o docs/language.md"),
    ],
)
def test_help_gives_an_example(command, example):
    assert example in " ".join(call(*command, "--help").output.replace("│", " ").split())


def test_a_run_prints_rows_and_a_table_and_fills_its_folder(tmp_path):
    out = tmp_path / "out"
    output = call("run", "tiny", *QUICK, "--out", out).output
    for method in ("finetune", "mas"):
        for task in (1, 2, 3):
            assert f"{method}, seed 0, after {task}/3 noise {task}" in output
    assert "Average accuracy (%)" in output
    assert {path.name for path in out.iterdir()} == {
        "results.jsonl", "table.md", "accuracy.png", "mas-seed0.memsyn.safetensors"
    }  # fmt: skip
    cells = [line.strip("| \n").split(" | ") for line in (out / "table.md").read_text().splitlines()[4:6]]
    assert [row[0] for row in cells] == ["finetune", "mas"]
    assert all(cell in output for row in cells for cell in row)
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_is_named_after_the_sequence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "are in runs/tiny." in call("run", "tiny", *QUICK, "--methods", "finetune").output
    assert (tmp_path / "runs" / "tiny" / "table.md").exists()


def test_the_size_is_the_sequences_first_unless_told(tmp_path):
    call("run", "tiny", *QUICK[2:], "--methods", "finetune", "--out", tmp_path)
    assert "tiny, 8x8, 1 seed" in (tmp_path / "table.md").read_text()


def test_the_rest_is_the_sequences_own_and_no_more_epochs_warm_up_than_there_are(tmp_path, monkeypatch):
    own = replace(tiny.SEQUENCE, training={"epochs": 3, "warmup": 2, "batch_size": 6})
    monkeypatch.setitem(SEQUENCES.entries, "tiny", own)
    command = ["run", "tiny", "--seeds", "1", "--methods", "finetune"]
    for given, words in (
        ((), "3 epochs a task, in the first 2 heads alone, Adam, lr 0.003, batch size 6"),
        (("--epochs", "1"), "1 epoch a task, in the first 1 heads alone"),
        (("--epochs", "1", "--warmup", "0"), "1 epoch a task, Adam"),
    ):
        assert call(*command, *given, "--out", tmp_path / "-".join(given)).output.startswith(words)
    refused = call(*command, "--epochs", "1", "--warmup", "2", "--out", tmp_path / "x", code=1)
    assert "warmup must be from 0 to the 1 epochs, got 2" in refused.stderr
    refused = call(*command, "--epochs", "0", "--out", tmp_path / "x", code=1)
    assert "epochs must be at least 1, got 0" in refused.stderr


def test_another_optimizer_has_a_default_learning_rate_of_its_own(tmp_path):
    command = ["run", "tiny", *QUICK, "--methods", "finetune"]
    for optimizer, given, words in (
        ("adam", (), "Adam, lr 0.003"),
        ("adamw", (), "AdamW with weight decay 0.01, lr 0.003"),
        ("sgd", (), "SGD with momentum 0.9, lr 0.015"),
        ("sgd", ("--lr", "0.5"), "SGD with momentum 0.9, lr 0.5"),
    ):
        out = tmp_path / f"{optimizer}{len(given)}"
        assert f"1 epoch a task, {words}," in call(*command, "--optimizer", optimizer, *given, "--out", out).output
        assert f"1 epoch a task, {words}," in (out / "table.md").read_text()
    for name, written in (("adam0", None), ("sgd0", "sgd")):
        line = (tmp_path / name / "results.jsonl").read_text().splitlines()[0]
        assert json.loads(line)["settings"].get("optimizer") == written
    refused = call(*command, "--out", tmp_path / "sgd0", code=1).stderr
    assert "lr is 0.015 there and 0.003 here, optimizer is sgd there and adam here. Use another --out" in refused
    assert "or continue them with --lr 0.015 --optimizer sgd." in refused
    refused = call(*command, "--optimizer", "sgd", "--lr", "0.003", "--out", tmp_path / "adam0", code=1).stderr
    assert "optimizer is adam there and sgd here" in refused
    assert "or continue them with --optimizer adam." in refused


def test_a_strength_is_a_number_or_chosen_on_validation_data(tmp_path):
    command = ["run", "tiny", *QUICK, "--methods", "mas", "--strength"]
    call(*command, "0.5", "--out", tmp_path / "number")
    assert "strength 0.5." in (tmp_path / "number" / "table.md").read_text()
    output = call(*command, "chosen", "--out", tmp_path / "chosen").output
    assert "mas: strength " in output
    assert "of 0.001, 0.01, 0.1, 1, 10, 100, 1000" in output
    assert "mas: strength" not in call(*command, "chosen", "--out", tmp_path / "chosen").output


def test_ctrl_c_says_how_to_continue_and_the_same_command_does(tmp_path, monkeypatch):
    command = ["run", "tiny", *QUICK, "--out", str(tmp_path / "a run")]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/memsyn", *command])
    train, calls = runner.train, []

    def pressed(*args, **kwargs):
        calls.append(args)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "train", pressed)
        stopped = call(*command, code=130)
    assert stopped.stderr.splitlines()[-1] == (
        "stopped; the same command continues: memsyn-bench run tiny --size 8 --epochs 1 --batch-size 6 --seeds 1 "
        f"--out '{tmp_path / 'a run'}'"
    )
    assert not (tmp_path / "a run" / "table.md").exists()
    assert "mas, seed 0: continues after task 1 of 3" in call(*command).output
    again = call(*command).output
    assert "after" not in again.split("Average")[0]
    assert "mas" in again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist"], f"error: the sequence must be one of {KNOWN}; got 'mnist'."),
        (["tiny", *QUICK, "--methods", "x"], f"error: methods must be of {NAMES}, separated by commas; got 'x'."),
        (["tiny", "--size", "8", "--lr", "0"], "error: lr must be finite and above 0, got 0.0."),
        (["tiny", "--size", "8", "--strength", "x"], "error: strength must be a number, own or chosen; got 'x'."),
        (
            ["tiny", *QUICK, "--optimizer", "x"],
            "error: optimizer must be one of adam, adamw, sgd, rmsprop, lion; got 'x'.",
        ),
        (["tiny", "--size", "32"], "error: size must be one of 8; got 32."),
    ],
)  # fmt: skip
def test_an_error_of_ours_is_one_line(tmp_path, arguments, message):
    result = call("run", *arguments, "--out", tmp_path / "out", code=1)
    assert result.stderr == message + "\n"
    assert result.stdout == ""


def test_other_settings_in_the_folder_are_an_error(tmp_path):
    call("run", "tiny", *QUICK, "--methods", "finetune", "--out", tmp_path)
    result = call("run", "tiny", *QUICK, "--lr", "0.5", "--out", tmp_path, code=1)
    assert "holds results of other settings: lr is 0.003 there and 0.5 here. Use another --out" in result.stderr


def test_emoji8_itself_in_little(tmp_path, monkeypatch):
    emoji8 = SEQUENCES["emoji8"]
    monkeypatch.setitem(SEQUENCES.entries, "emoji8", replace(emoji8, load=lambda size: emoji8.load(size)[:2]))
    output = call("run", "emoji8", "--methods", "mas", "--seeds", "1", "--epochs", "1", "--out", tmp_path).output
    last = next(line for line in output.splitlines() if "after 2/2 Animals & Nature" in line)
    assert all(float(value) > 10 for value in last.split()[-2:])  # of 40 objects: chance is 2.5%
    assert "heads.1" in call_memsyn("inspect", tmp_path / "mas-seed0.memsyn.safetensors").output
