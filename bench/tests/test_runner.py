"""Running methods through a sequence: the numbers, their repetition, and going on after an interruption."""

import json
import math
from dataclasses import replace

import pytest
import torch
from bench.tests import tiny

from memsyn import Memory, MemsynError, OptionError, penalty
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.running import runner
from memsyn_bench.running.training import task_training, train
from memsyn_bench.sequences.networks import SharedHead
from memsyn_bench.sequences.sequences import SEQUENCES
from memsyn_bench.settings import Settings

SETTINGS = Settings(sequence="tiny", size=8, epochs=2, batch_size=4, lr=0.01, strength=1.0)
GOLDEN = [1.126963, 1.128008, 1.109733, 1.136943, 1.055588]
"""Of the first five steps: a change that should not alter numbers does not alter these."""


@pytest.fixture(autouse=True)
def _tiny_sequence(monkeypatch):
    monkeypatch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)


def run(out, *, settings=SETTINGS, methods=("finetune", "mas"), num_seeds=1):
    return runner.run(settings, methods=methods, num_seeds=num_seeds, out=out)


def numbers(results):
    """What must be the same in two runs: all but the seconds."""
    return {
        (method, seed): [replace(record, seconds=0.0) for record in records]
        for method, seeds in results.items()
        for seed, records in seeds.items()
    }


def train_tiny(method, memory=None, *, index=0, strength=1.0, **changes):
    tasks = tiny.load(8)
    model = tiny.build(tasks, torch.Generator().manual_seed(0))
    learner = METHODS[method].make(strength)
    learner.load(Memory.empty() if memory is None else memory, {})
    training = task_training(
        model, tasks[index], index, settings=replace(SETTINGS, **changes), augment=tiny.augment, seed=0
    )
    return model, train(replace(training, generator=torch.Generator().manual_seed(1)), learner, lambda: None)


def remembered(method, model, task):
    """What a method holds after a task that the model has learned already."""
    learner = METHODS[method].make(1.0)
    learner.end(task_training(model, task, 0, settings=SETTINGS, augment=tiny.augment, seed=0))
    return learner.memory


def test_five_golden_losses():
    _, training = train_tiny("finetune")
    assert training.losses[:5] == pytest.approx(GOLDEN, rel=1e-3)
    assert len(training.losses) == 2 * math.ceil(12 / 4)


def test_only_the_body_and_the_tasks_own_head_are_trained():
    before = tiny.build(tiny.load(8), torch.Generator().manual_seed(0)).state_dict()
    model, _ = train_tiny("finetune", index=1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("heads.0", "heads.2")), name


def test_mas_holds_the_weights_back_and_finetune_does_not():
    tasks = tiny.load(8)
    start = tiny.build(tasks, torch.Generator().manual_seed(0))
    memory = remembered("mas", start, tasks[0])
    assert memory.num_samples == 12
    assert remembered("finetune", start, tasks[0]).importance == {}
    free, held = (train_tiny(method, memory, index=1, strength=1e3) for method in ("finetune", "mas"))
    assert free[1].penalty == 0.0
    omega = memory.importance["body.layers.0.weight"]
    moved = [(model.body.layers[0].weight - start.body.layers[0].weight).detach() for model, _ in (free, held)]
    drift = [float((omega * by.square()).sum()) for by in moved]
    assert 0 < drift[1] < 0.5 * drift[0]
    assert held[1].penalty == pytest.approx(1e3 * penalty(held[0], memory).item(), rel=1e-4)


def test_a_run_fills_the_lower_triangle_and_its_folder(tmp_path, capsys):
    results = run(tmp_path / "out", num_seeds=2)
    for method in ("finetune", "mas"):
        assert list(results[method]) == [0, 1]
        for records in results[method].values():
            assert [len(record.accuracies) for record in records] == [1, 2, 3]
            assert all(0 <= value <= 100 for record in records for value in record.accuracies)
    assert all(record.penalty == 0.0 for record in results["finetune"][0])
    assert results["mas"][0][0].penalty == 0.0 < results["mas"][0][1].penalty
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.jsonl", "mas-seed0.memsyn.safetensors", "mas-seed1.memsyn.safetensors"}
    memory = Memory.load(tmp_path / "out" / "mas-seed0.memsyn.safetensors")
    assert [(entry.num_samples, entry.rule) for entry in memory.history] == [(12, "sum")] * 3
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mas, seed 1")]
    assert [row.split()[3:5] for row in rows] == [["after", f"{task}/3"] for task in (1, 2, 3)]
    assert [len(row.split()) for row in rows] == [8, 9, 10]


def test_the_methods_meet_the_same_heads_and_batches(tmp_path):
    results = numbers(run(tmp_path))
    first, other = results["mas", 0][0], results["finetune", 0][0]
    assert (first.accuracies, first.loss, first.working_bytes) == (other.accuracies, other.loss, 0)
    assert results["mas", 0][1].loss != results["finetune", 0][1].loss


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    first, second = run(tmp_path / "a", num_seeds=2), run(tmp_path / "b", num_seeds=2)
    assert numbers(first) == numbers(second)
    assert first["mas"][0][0].loss != first["mas"][1][0].loss


def test_a_run_leaves_the_global_generator_out_of_its_numbers(tmp_path):
    torch.manual_seed(1)
    first = run(tmp_path / "a", methods=("finetune",))
    torch.manual_seed(2)
    assert numbers(run(tmp_path / "b", methods=("finetune",))) == numbers(first)


def interrupt_after(monkeypatch, num_tasks):
    """Let so many tasks be trained, and press Ctrl-C in the middle of the next."""
    calls = []

    def interrupted(*args, after_epoch, **kwargs):
        calls.append(args)

        def press():
            after_epoch()
            if len(calls) > num_tasks:
                raise KeyboardInterrupt

        return train(*args, after_epoch=press, **kwargs)

    monkeypatch.setattr(runner, "train", interrupted)


@pytest.mark.parametrize("num_tasks", range(6))
def test_a_run_cut_off_anywhere_ends_with_the_numbers_of_a_whole_one(tmp_path, monkeypatch, capsys, num_tasks):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, num_tasks)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    capsys.readouterr()
    assert numbers(run(tmp_path / "cut")) == numbers(whole)
    output = capsys.readouterr().out
    assert (f"continues after task {num_tasks % 3} of 3" in output) == (num_tasks % 3 > 0)
    assert output.count(" after ") - output.count("continues") == 6 - num_tasks
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    memories = [Memory.load(tmp_path / folder / "mas-seed0.memsyn.safetensors") for folder in ("whole", "cut")]
    for part in ("anchor", "importance"):
        first, second = (getattr(memory, part) for memory in memories)
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_process_killed_between_the_line_and_the_checkpoint_writes_no_line_twice(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", methods=("mas",))

    def killed(*args, num_tasks, **kwargs):
        if num_tasks == 2:
            raise KeyboardInterrupt
        runner_save(*args, num_tasks=num_tasks, **kwargs)

    runner_save = runner.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(runner, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", methods=("mas",))
    assert numbers(run(tmp_path / "cut", methods=("mas",))) == numbers(whole)
    lines = [json.loads(line) for line in (tmp_path / "cut" / "results.jsonl").read_text().splitlines()]
    assert [line.get("task") for line in lines] == [None, 0, 1, None, 2]


def test_what_is_there_is_not_run_again_and_more_seeds_and_methods_are_added(tmp_path, monkeypatch):
    first = run(tmp_path, methods=("finetune",))
    content = (tmp_path / "results.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_after(patch, -1)
        assert run(tmp_path, methods=("finetune",)) == first
    assert (tmp_path / "results.jsonl").read_bytes() == content
    more = run(tmp_path, num_seeds=2)
    assert more["finetune"][0] == first["finetune"][0]
    assert len(more["finetune"][1]) == len(more["mas"][1]) == 3
    assert (tmp_path / "results.jsonl").read_bytes().startswith(content)


def test_results_of_other_settings_are_left_alone(tmp_path):
    run(tmp_path, methods=("finetune",))
    content = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(MemsynError, match=r"holds results of other settings: strength is 1\.0 there and 2\.0 here"):
        run(tmp_path, settings=replace(SETTINGS, strength=2.0))
    assert (tmp_path / "results.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"settings": replace(SETTINGS, sequence="mnist")},
            r"the sequence must be one of emoji8, .*, tiny, or such as .*; got 'mnist'",
        ),
        ({"settings": replace(SETTINGS, size=9)}, r"size must be one of 8; got 9"),
        ({"methods": ("mas", "x")}, r"methods must be of finetune, .*mas-rehearsal, separated by commas; got 'x'"),
        ({"methods": ("mas", "mas")}, r"methods holds one twice: mas, mas"),
        ({"num_seeds": 0}, r"seeds must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_made(tmp_path, change, message):
    with pytest.raises(OptionError, match=message):
        run(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(MemsynError, match=r"the folder .*out cannot be made: .*exists.* Use another --out"):
        run(tmp_path / "out")


def test_a_diverging_training_says_so(tmp_path):
    with pytest.raises(MemsynError, match=r"the loss of mas, seed 0, is (nan|inf) in task 1, noise 1: .*diverged"):
        run(tmp_path, settings=replace(SETTINGS, lr=1e30), methods=("mas",))


def shared_head(tasks, generator):
    model = tiny.build(tasks[:1], generator)
    return SharedHead(model.body, model.body.num_features, num_classes=3)


def test_every_method_can_learn_tasks_that_share_one_head(tmp_path, monkeypatch):
    sequence = replace(tiny.SEQUENCE, build=shared_head, scorings=("domain-incremental",))
    monkeypatch.setitem(SEQUENCES.entries, "tiny", sequence)
    results = run(tmp_path, settings=replace(SETTINGS, epochs=1), methods=tuple(METHODS))
    assert all([len(record.accuracies) for record in results[method][0]] == [1, 2, 3] for method in METHODS)


def test_a_pair_runs_by_its_name_in_its_order(tmp_path):
    settings = Settings(sequence="pair-food-animals", size=32, epochs=1)
    records = run(tmp_path, settings=settings, methods=("frozen",))["frozen"][0]
    assert [record.name for record in records] == ["Food & Drink", "Animals & Nature"]
