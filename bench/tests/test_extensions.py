"""Methods and sequences of others: what is added, what is refused, and that a broken package stops nobody else."""

from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch
from bench.tests import tiny
from bench.tests.commands import call
from torch import nn

from memsyn import MemsynError, OptionError
from memsyn_bench import Method, MethodEntry, Settings, register_method, register_sequence, run
from memsyn_bench.extensions import NamedEntries
from memsyn_bench.methods.registry import BUILT_IN_METHODS, METHODS
from memsyn_bench.sequences.sequences import SEQUENCES, find_sequence

QUICK = ["--size", "8", "--epochs", "1", "--batch-size", "6", "--seeds", "1"]
PLAIN = MethodEntry("nothing beside the loop", Method)


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch):
    for entries in (METHODS, SEQUENCES):
        monkeypatch.setattr(entries, "entries", dict(entries.entries))
        monkeypatch.setattr(entries, "_points", {})


def offer(monkeypatch, entries, **values):
    """Entry points of some package: name -> module:object."""
    points = {name: [EntryPoint(name, value, entries.group)] for name, value in values.items()}
    monkeypatch.setattr(entries, "_points", points)


def test_what_is_registered_is_listed_run_and_named_in_errors(tmp_path):
    register_sequence("tiny", tiny.SEQUENCE)
    register_method("plain", PLAIN)
    listed = call("list").output.splitlines()
    assert listed[-1] == "  plain             nothing beside the loop"
    assert "  tiny              three kinds of noise" in listed
    call("run", "tiny", *QUICK, "--methods", "plain,finetune", "--out", tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[4].removeprefix("| plain") == lines[5].removeprefix("| finetune")
    refused = call("run", "tiny", *QUICK, "--methods", "x", "--out", tmp_path, code=1).stderr
    assert "mas-rehearsal, plain, separated by commas; got 'x'" in refused
    assert "adaptation-facts, tiny, or such as" in call("run", "x", code=1).stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mas", r"there is a method called 'mas' already\. Choose another name\."),
        ("a,b", r"must consist of letters, digits, dots, hyphens and underscores, .* got 'a,b'"),
        ("../up", r"got '\.\./up'"),
        ("", r"got ''"),
        (7, r"got 7"),
    ],
)
def test_a_name_that_is_taken_or_cannot_be_used_is_refused(name, message):
    with pytest.raises(OptionError, match=message):
        register_method(name, PLAIN)


def test_a_name_is_registered_once():
    register_method("plain", PLAIN)
    with pytest.raises(OptionError, match="there is a method called 'plain' already"):
        register_method("plain", PLAIN)


@pytest.mark.parametrize("name", ["pair-food-mine", "paper8-mine", "6ds-mine"])
def test_names_that_memsyn_bench_makes_itself_are_refused(name):
    with pytest.raises(OptionError, match=rf"must not start with pair- or paper8- or 6ds-, .* got '{name}'"):
        register_sequence(name, tiny.SEQUENCE)


def test_an_entry_of_a_wrong_type_is_refused():
    with pytest.raises(OptionError, match=r"the method 'x' must be a memsyn_bench\.MethodEntry, got type"):
        register_method("x", Method)
    with pytest.raises(OptionError, match=r"the sequence 'x' must be a memsyn_bench\.TaskSequence, got function"):
        register_sequence("x", tiny.load)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"summary": None}, "summary must be one line of text, got NoneType"),
        ({"make": Method()}, "make must be a function of the strength, got Method"),
        ({"strength": -1.0}, r"strength must be None, or finite and not negative; got -1\.0"),
        ({"strength": float("nan")}, "not negative; got nan"),
    ],
)
def test_a_method_with_wrong_values_is_refused(values, message):
    with pytest.raises(OptionError, match=message):
        replace(PLAIN, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"summary": 1}, "summary must be one line of text, got int"),
        ({"shows": None}, "shows must be one line of text, got NoneType"),
        ({"leaves_open": 1}, "leaves_open must be one line of text, got int"),
        ({"load": []}, "load must be a function, got list"),
        ({"sizes": ()}, r"sizes must be a tuple with at least one entry, got \(\)"),
        ({"scorings": "retrieval"}, "scorings must be a tuple with at least one entry, got 'retrieval'"),
        ({"training": {"speed": 1}}, "training must name fields of Settings: batch_size, .* got 'speed'"),
        ({"training": {"size": 1}}, "got 'size'"),
    ],
)
def test_a_sequence_with_wrong_values_is_refused(values, message):
    with pytest.raises(OptionError, match=message):
        replace(tiny.SEQUENCE, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train_labels": torch.zeros(5, dtype=torch.int64)},
            r"train_labels must be int64 \(12,\), .* got .* \(5,",
        ),
        ({"test_labels": torch.zeros(12)}, r"test_labels must be int64 \(12,\), .* got torch\.float32 \(12,\)"),
        ({"test_labels": torch.full((12,), 3)}, r"test_labels must be from 0 to 2, .* got 3 to 3"),
    ],
)
def test_a_task_with_wrong_labels_is_refused(values, message):
    task = replace(tiny.make_task(0, 8), **values)
    with pytest.raises(OptionError, match=f"noise 1: {message}"):
        replace(tiny.SEQUENCE, load=lambda size: [task]).tasks(8)


def test_a_sequence_without_tasks_is_refused():
    with pytest.raises(OptionError, match="load must return at least one task, got none"):
        replace(tiny.SEQUENCE, load=lambda size: []).tasks(8)


@pytest.mark.parametrize(
    ("changes", "method", "message"),
    [
        (
            {"build": lambda tasks, generator: nn.Linear(1, 1)},
            "finetune",
            "must return a MultiHead, a SharedHead or a OneHead, got Linear",
        ),
        (
            {"scorings": ("best",)},
            "finetune",
            r"the scorings of tiny must be of multi-head, .* got 'best'\.",
        ),
        ({}, "wrong", r"make of the method 'wrong' must return a memsyn_bench\.Method, got float"),
    ],
)
def test_what_turns_out_wrong_when_it_runs_is_said(tmp_path, changes, method, message):
    register_sequence("tiny", replace(tiny.SEQUENCE, **changes))
    register_method("wrong", MethodEntry("returns its strength", lambda strength: strength))
    with pytest.raises(OptionError, match=message):
        run(Settings(sequence="tiny", size=8, epochs=1), methods=[method], num_seeds=1, out=tmp_path)


def test_a_broken_entry_point_is_listed_as_an_error_and_stops_nothing_else(monkeypatch, tmp_path):
    register_sequence("tiny", tiny.SEQUENCE)
    offer(monkeypatch, METHODS, good="bench.tests.test_extensions:PLAIN", broken="no_such_module:ENTRY")
    listed = call("list", code=1)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == ["Sequences", *SEQUENCES, "Methods", *BUILT_IN_METHODS, "good"]
    said = (
        "the entry point broken = no_such_module:ENTRY (memsyn_bench.methods) cannot be imported: ModuleNotFoundError: "
        "No module named 'no_such_module'. Repair the package, or uninstall it."
    )
    assert said in listed.stderr
    call("run", "tiny", *QUICK, "--methods", "mas,good", "--out", tmp_path)
    assert said in call("run", "tiny", *QUICK, "--methods", "broken", "--out", tmp_path, code=1).stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", "bench.tests.test_extensions:QUICK", r"x = bench.* must be a memsyn_bench\.MethodEntry, got list"),
        ("x", "bench.tests.test_extensions:NONE", r"cannot be imported: AttributeError: .*NONE"),
        ("a/b", "bench.tests.test_extensions:PLAIN", r"a/b = bench.*: the name of a method must consist of"),
        ("mas", "bench.tests.test_extensions:PLAIN", r"'mas' is defined 2 times: by memsyn-bench or this process, and"),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_named(monkeypatch, name, value, message):
    offer(monkeypatch, METHODS, **{name: value})
    assert name in METHODS
    with pytest.raises(MemsynError, match=message):
        METHODS[name]
    assert len(METHODS.usable()[1]) == 1
    assert "si" in METHODS.usable()[0]


def test_what_an_entry_point_offers_cannot_be_registered_again(monkeypatch):
    offer(monkeypatch, SEQUENCES, mine="bench.tests.tiny:SEQUENCE")
    assert find_sequence("mine") is tiny.SEQUENCE
    with pytest.raises(OptionError, match="there is a sequence called 'mine' already"):
        register_sequence("mine", tiny.SEQUENCE)


def test_two_packages_with_one_name_are_both_named(monkeypatch, tmp_path):
    for package in ("one", "two"):
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[memsyn_bench.test]\nmine = bench.tests.test_extensions:PLAIN\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = NamedEntries("method", MethodEntry, "memsyn_bench.test", {})
    assert (list(entries), len(entries)) == (["mine"], 1)
    message = r"is defined 2 times: by the entry point .* of (one|two) .*, and by the .* of (one|two) .*Rename one"
    with pytest.raises(OptionError, match=message):
        entries["mine"]
    with pytest.raises(KeyError):
        entries["other"]
