"""What a run writes down: settings, result lines and checkpoints, also when a process died while it wrote."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from bench.tests import tiny

from memsyn import Memory, MemoryFileError, MemsynError, OptionError, measure
from memsyn_bench.methods.method import FineTuning
from memsyn_bench.running.checkpoint import load_checkpoint, save_checkpoint
from memsyn_bench.running.record import (
    StrengthRecord,
    TaskRecord,
    append_run,
    append_strength,
    append_task,
    read_all,
    read_run,
)
from memsyn_bench.settings import Settings

SETTINGS = Settings(sequence="tiny", size=8)
FIRST = TaskRecord("mas", 0, 0, "noise 1", (75.0,), 0.5, 0.0, 1.5, SETTINGS.fingerprint, 1.0, 80, 8)
SECOND = TaskRecord("mas", 0, 1, "noise 2", (70.0, 80.0), 0.4, 0.1, 1.5, SETTINGS.fingerprint, 1.0, 80, 8)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "results.jsonl"
    append_run(path, SETTINGS, 3)
    append_task(path, FIRST)
    return path


def test_records_come_back_as_they_were(path):
    append_task(path, SECOND)
    assert read_all(path, SETTINGS)[0] == [FIRST, SECOND]
    assert [record.key for record in read_all(path, SETTINGS)[0]] == [("mas", 0, 0), ("mas", 0, 1)]


def test_choices_of_strengths_come_back_as_they_were(path):
    choice = StrengthRecord("mas", 10.0, (1.0, 10.0), (60.0, 70.0), SETTINGS.fingerprint)
    append_strength(path, choice)
    append_task(path, SECOND)
    assert read_all(path, SETTINGS) == ([FIRST, SECOND], [choice])


def test_the_first_line_says_how_the_results_were_made(path):
    entry = json.loads(path.read_text().splitlines()[0])
    assert entry["kind"] == "run"
    assert entry["settings"]["lr"] == SETTINGS.lr
    assert set(entry["versions"]) == {"memsyn", "torch", "python"}
    assert entry["threads"] == torch.get_num_threads()
    assert entry["processor"].endswith(torch.backends.cpu.get_cpu_capability())


def test_there_is_nothing_in_a_file_that_is_not_there(tmp_path):
    assert read_all(tmp_path / "results.jsonl", SETTINGS) == ([], [])


def test_a_torn_last_line_is_dropped_wherever_it_was_cut(path):
    whole = path.read_bytes()
    append_task(path, SECOND)
    line = path.read_bytes()[len(whole) :]
    for length in range(len(line)):
        path.write_bytes(whole + line[:length])
        assert read_all(path, SETTINGS)[0] == [FIRST]
        append_task(path, SECOND)
        assert path.read_bytes() == whole + line


@pytest.mark.parametrize("line", ["not JSON", "[1]", "{}", '{"kind": "task", "method": "mas"}', '{"kind": "run"}'])
def test_a_strange_line_is_named(path, line):
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(MemsynError, match=r"results\.jsonl, line 3 is no record of memsyn-bench. Use another --out"):
        read_all(path, SETTINGS)


def test_a_record_of_other_settings_is_refused_whatever_the_file_says(path):
    append_task(path, replace(SECOND, fingerprint=replace(SETTINGS, epochs=3).fingerprint))
    with pytest.raises(MemsynError, match=r"results of other settings, and does not say of which\. Use another --out"):
        read_all(path, SETTINGS)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(MemsynError, match=r"cannot be read: Is a directory\. Use another --out"):
        read_all(tmp_path, SETTINGS)


def test_results_of_other_settings_are_refused(path):
    message = (
        r"epochs is 20 there and 3 here, lr is .* here\. Use another --out; or continue .* --epochs 20 --lr 0\.003\."
    )
    with pytest.raises(MemsynError, match=message):
        read_all(path, replace(SETTINGS, epochs=3, lr=1.0))


def test_equal_settings_have_one_fingerprint():
    assert replace(SETTINGS, lr=1).fingerprint == replace(SETTINGS, lr=1.0).fingerprint
    assert replace(SETTINGS, lr=1).fingerprint != SETTINGS.fingerprint


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("size", 0, "size must be at least 1, got 0"),
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("batch_size", -1, "batch_size must be at least 1, got -1"),
        ("lr", 0.0, "lr must be finite and above 0, got 0.0"),
        ("lr", float("nan"), "lr must be finite and above 0, got nan"),
        ("strength", -1.0, "strength must be finite and not negative, got -1.0"),
        ("strength", "mine", "strength must be a number, own or chosen; got 'mine'"),
        ("warmup", -1, "warmup must be from 0 to the 20 epochs, got -1"),
        ("warmup", 21, "warmup must be from 0 to the 20 epochs, got 21"),
        ("optimizer", "x", "optimizer must be one of adam, adamw, sgd, rmsprop, lion; got 'x'"),
        ("strength", float("inf"), "strength must be finite and not negative, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(name, value, message):
    with pytest.raises(OptionError, match=message):
        replace(SETTINGS, **{name: value})


def test_the_fingerprint_is_of_every_setting():
    others = [
        replace(SETTINGS, **{name: value})
        for name, value in {
            "sequence": "x", "size": 9, "epochs": 9, "batch_size": 9, "lr": 9.0, "warmup": 9, "strength": 9.0,
            "optimizer": "sgd",
        }.items()
    ]  # fmt: skip
    assert len({settings.fingerprint for settings in [SETTINGS, *others]}) == 9
    assert Settings(sequence="tiny", size=8).fingerprint == SETTINGS.fingerprint


def test_settings_with_adam_are_written_as_before_there_was_a_choice(path):
    known = {"sequence": "tiny", "size": 8, "epochs": 20, "batch_size": 16, "lr": 0.003, "warmup": 0, "strength": "own"}
    assert json.loads(path.read_text().splitlines()[0])["settings"] == known
    digits = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    assert replace(SETTINGS, optimizer="adam").fingerprint == digits == "f63fabaa9910"
    assert read_run(path).settings == SETTINGS


def test_another_optimizer_is_written_and_read(tmp_path):
    path, settings = tmp_path / "results.jsonl", replace(SETTINGS, optimizer="lion")
    append_run(path, settings, 3)
    assert json.loads(path.read_text())["settings"]["optimizer"] == "lion"
    assert read_run(path).settings == settings
    assert read_all(path, settings) == ([], [])
    with pytest.raises(MemsynError, match=r"optimizer is lion there and adam here\. .* with --optimizer lion\."):
        read_all(path, SETTINGS)


@pytest.fixture
def model():
    return tiny.build(tiny.load(8), torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoint(model, tmp_path):
    task = tiny.make_task(0, 8)
    importance = measure(model, [task.train_images], forward=lambda model, x: model(x, 0), progress=False)
    memory = Memory.empty().consolidate(model, importance)
    path = tmp_path / "checkpoint.safetensors"
    method = FineTuning()
    method.load(memory, {"task0": {"labels": torch.tensor([2, 0, 1])}, "a.b": {"c/d": torch.ones(2, 3)}})
    save_checkpoint(path, model, method, num_tasks=2, fingerprint="abc")
    return path, method


def test_a_checkpoint_brings_back_weights_memory_and_what_a_method_keeps(model, checkpoint):
    path, method = checkpoint
    other, empty = tiny.build(tiny.load(8), torch.Generator().manual_seed(1)), FineTuning()
    assert load_checkpoint(path, other, empty, fingerprint="abc") == 2
    loaded, memory = empty.memory, method.memory
    assert torch.equal(empty.kept["task0"]["labels"], torch.tensor([2, 0, 1]))
    assert torch.equal(empty.kept["a.b"]["c/d"], torch.ones(2, 3))
    assert empty.kept.keys() == method.kept.keys()
    assert loaded.history == memory.history
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, other.state_dict()[name])
        assert torch.equal(memory.importance[name], loaded.importance[name])
        assert torch.equal(memory.anchor[name], loaded.anchor[name])
    assert (loaded.history, loaded.counts) == (memory.history, memory.counts)


def test_without_a_checkpoint_nothing_is_learned_yet(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = FineTuning()
    assert load_checkpoint(tmp_path / "none", model, method, fingerprint="abc") == 0
    assert (method.memory.importance, method.memory.history, method.kept) == ({}, (), {})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_other_settings_is_refused(model, checkpoint):
    with pytest.raises(MemsynError, match=r"checkpoint\.safetensors is of other settings. Use another --out"):
        load_checkpoint(checkpoint[0], model, FineTuning(), fingerprint="abd")


def test_a_damaged_checkpoint_is_refused(model, checkpoint):
    content = bytearray(checkpoint[0].read_bytes())
    content[-5] ^= 1
    checkpoint[0].write_bytes(content)
    with pytest.raises(MemoryFileError, match="is damaged"):
        load_checkpoint(checkpoint[0], model, FineTuning(), fingerprint="abc")
