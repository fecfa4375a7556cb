"""Which images a memory is measured on: what each source gives, and when it is measured."""

import copy
from dataclasses import replace

import pytest
import torch
from bench.tests import test_methods, tiny
from bench.tests.test_methods import SETTINGS, TASKS, assert_same, build, course, training

from memsyn import Memory, OptionError, measure
from memsyn_bench.data.drawings import load_emoji8
from memsyn_bench.data.mixed import LETTER_SIDE, as_drawings, as_letters
from memsyn_bench.data.scripts import load_scripts8
from memsyn_bench.methods import sources
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.methods.sources import noise, public_images
from memsyn_bench.running import runner
from memsyn_bench.running.training import train
from memsyn_bench.sequences.sequences import SEQUENCES
from memsyn_bench.task import Task


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task_of(images):
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Task("a task", ("a",), images, labels, images, labels)


def rows_of(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_public_images_in_colour_are_letters_as_large_as_the_tasks():
    own = torch.zeros(40, 3, 32, 32)
    found = public_images(task_of(own), seeded())
    assert (found.shape, found.dtype) == (own.shape, own.dtype)
    letters = torch.cat([task.train_images for task in load_scripts8(LETTER_SIDE)])
    assert rows_of(found) <= rows_of(as_drawings(letters, 32))
    assert len(rows_of(found)) > 35
    assert torch.equal(found, public_images(task_of(own), seeded()))
    assert not torch.equal(found, public_images(task_of(own), seeded(1)))


def test_public_images_in_grey_are_drawings_and_at_most_as_many_as_there_are():
    drawings = torch.cat([task.train_images for task in load_emoji8(LETTER_SIDE)])
    found = public_images(task_of(torch.zeros(len(drawings) + 5, 1, 28, 28)), seeded())
    assert found.shape == (len(drawings), 1, 28, 28)
    assert rows_of(found) == rows_of(as_letters(drawings, 28))
    assert 0 <= float(found.min()) < 0.1 < 1.5 < float(found.max()) <= 2


def test_a_sequence_of_drawings_and_letters_has_no_public_images():
    """Else a task's public images could be those that a later task is learned from."""
    mixed = training(build(), 0, sequence="mixed8-pretrained")
    for name in ("mas-public", "projected-public"):
        with pytest.raises(OptionError, match=r"mixed8-pretrained has drawings and letters.*such as mas or mas-new"):
            METHODS[name].make(1.0).begin(mixed)


def test_grey_is_the_mean_of_the_colours():
    images = torch.rand(2, 3, 4, 4, generator=seeded())
    assert torch.allclose(as_letters(images, 4)[1, 0], (images[1, 0] + images[1, 1] + images[1, 2]) / 3)


def test_noise_has_the_mean_and_deviation_of_each_pixel_and_is_no_image():
    levels = torch.arange(12.0).view(3, 2, 2)
    own = levels + (1 + levels) * torch.randn(20_000, 3, 2, 2, generator=seeded())
    found = noise(task_of(own), seeded(1))
    assert found.shape == own.shape
    assert torch.allclose(found.mean(0), levels, atol=0.3)
    assert torch.allclose(found.std(0), 1 + levels, rtol=0.03)
    lone = noise(task_of(own[:1]), seeded(1))
    assert torch.equal(lone, own[:1]), "one image has no deviation"


@pytest.mark.parametrize("name", ["mas-public", "projected-public", "mas-noise", "projected-noise"])
def test_what_a_source_cannot_give_is_said_before_anything_is_learned(name):
    words = replace(TASKS[0], train_images=torch.zeros(12, 16, dtype=torch.int64))
    lesson = replace(training(build(), 0), task=words)
    with pytest.raises(OptionError, match=r"inputs of task task 0 are .*torch.int64.* Use a method that .* mas-new"):
        METHODS[name].make(1.0).begin(lesson)
    if name.endswith("public"):
        with pytest.raises(OptionError, match=r"are \(12, 784\), torch.float32"):
            METHODS[name].make(1.0).begin(replace(lesson, task=replace(words, train_images=torch.zeros(12, 784))))


def test_methods_that_see_test_images_are_those_that_are_named_so():
    seeing = {name for name, entry in METHODS.items() if entry.sees_test}
    assert seeing == {name for name in METHODS if name.endswith(("-test", "-both"))}


def measured(model, images, head, estimator):
    return measure(model, [images], forward=lambda own, x: own(x, head), estimator=estimator, progress=False)


def values_of(memory):
    """The importance, or the tensors of the directions."""
    if memory.directions is None:
        return memory.importance
    return {f"{group}/{key}": value for group, own in memory.directions.groups().items() for key, value in own.items()}


ESTIMATORS = {"mas": "mas", "projected": "kronecker"}
CONSOLIDATION = {"mas": {"rule": "sum"}, "projected": {"rank": 64}}


@pytest.mark.parametrize("family", ESTIMATORS)
@pytest.mark.parametrize("kind", ["test", "public", "noise"])
def test_a_memory_is_of_the_images_of_its_source(family, kind, monkeypatch):
    task = replace(TASKS[0], test_images=2 * TASKS[0].test_images[:5])
    monkeypatch.setattr(test_methods, "TASKS", [task])
    letters, drawn_for_task = torch.rand(7, 1, 2, 2, generator=seeded()).double(), seeded(501)  # of seed 0 and task 0
    monkeypatch.setattr(sources, "_letters", lambda: letters)
    images = {
        "test": task.test_images,
        "public": as_drawings(letters[torch.randperm(7, generator=seeded(501))], 2),
        "noise": noise(task, drawn_for_task),
    }[kind]
    found = course(f"{family}-{kind}", 1)
    own = measured(found.models[0], images, 0, ESTIMATORS[family])
    expected = Memory.empty().consolidate(found.models[0], own, **CONSOLIDATION[family])
    assert_same(values_of(found.method.memory), values_of(expected))


@pytest.mark.parametrize("family", ESTIMATORS)
def test_the_next_tasks_images_are_measured_when_it_begins_through_the_head_before(family):
    """After task 1 nothing is known; before the first step of task 2, its images through head 1."""
    name = f"{family}-new"
    assert course(name, 1).method.memory.names == set()
    found = course(name, 3, strength=0.3)
    expected = Memory.empty()
    for index in (0, 1):
        model = found.models[index]
        own = measured(model, TASKS[index + 1].train_images, index, ESTIMATORS[family])
        expected = expected.consolidate(model, own, **CONSOLIDATION[family])
    assert_same(values_of(found.method.memory), values_of(expected))
    assert (found.trainings[1].penalty > 0) == (family == "mas")
    plain = course("finetune", 2)
    assert_same(dict(found.models[0].named_parameters()), dict(plain.models[0].named_parameters()), rtol=0.0)
    held, free = (dict(one.models[1].named_parameters())["body.1.weight"] for one in (found, plain))
    assert not torch.equal(held, free)


@pytest.mark.parametrize("name", ["mas-new", "projected-new"])
def test_a_memory_of_the_next_task_is_measured_again_after_an_interruption(tmp_path, monkeypatch, name):
    """The checkpoint after task 1 has no memory: what is continued measures it, with the same digits."""
    monkeypatch.setitem(SEQUENCES.entries, "tiny", tiny.SEQUENCE)

    def run(folder):
        return runner.run(SETTINGS, methods=[name], num_seeds=1, out=tmp_path / folder)[name][0]

    whole, calls = run("whole"), []

    def interrupted(*args, **kwargs):
        calls.append(copy.deepcopy(args[1].memory))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert [memory.names for memory in calls] == [set(), set()]
    assert [replace(record, seconds=0.0) for record in run("cut")] == [replace(one, seconds=0.0) for one in whole]
    kept = [Memory.load(tmp_path / folder / f"{name}-seed0.memsyn.safetensors") for folder in ("whole", "cut")]
    assert [len(memory.history) for memory in kept] == [2, 2]
    assert all(torch.equal(value, values_of(kept[1])[key]) for key, value in values_of(kept[0]).items())
