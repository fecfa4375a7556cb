"""The paper's facts from a folder: a tiny one in the layout that `memsyn_bench.data.sixds` tells."""

import base64
import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench.tests.pictures import colours_match, paint, torchvision
from PIL import Image
from safetensors.torch import save_file

from memsyn.errors import MemsynError, OptionError
from memsyn_bench.data.paper8 import FOLDER_VARIABLE
from memsyn_bench.data.sixds import CSV_COLUMNS, load_6ds
from memsyn_bench.losses import similarity_loss
from memsyn_bench.running.examples import add_examples, read_examples
from memsyn_bench.running.scoring import score
from memsyn_bench.sequences.sequences import SEQUENCES, find_sequence
from memsyn_bench.task import for_validation

__all__ = ["torchvision"]

FACTS = [("man", "riding", "horse"), ("man", "riding", "bike"), ("dog", "running", ""), ("cat", "", "")]
TEXTS = ["man riding horse", "man riding bike", "dog running", "cat"]


def write(root, *, changes=(), columns=CSV_COLUMNS, tasks=None, lacking=()):
    """Each fact twice to train on and once to test on; `changes` are (line, column, value), lines counted from 0."""
    rows = []
    for label, fact in enumerate(FACTS):
        for number, split in enumerate(("train", "train", "test")):
            name = f"pictures/{label} {number}.jpg"
            paint(root / "6ds" / name, label)
            rows.append(
                dict(zip(CSV_COLUMNS, (name, *fact, split), strict=True)) | ({"task": tasks[label]} if tasks else {})
            )
    for line, column, value in changes:
        rows[line][column] = value
    with open(root / "6ds/facts.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *(["task"] if tasks else [])], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    vectors = {text: torch.full((5,), float(label + 1)) for label, text in enumerate(TEXTS)}
    save_file(
        {text: vector for text, vector in vectors.items() if text not in lacking}, root / "6ds/vectors.safetensors"
    )
    return root


def colours(task):
    """Each image's fact by its place in `TEXTS`, which says its colour."""
    return [torch.tensor([TEXTS.index(task.class_names[label]) for label in labels.tolist()])
            for labels in (task.train_labels, task.test_labels)]  # fmt: skip


def test_facts_are_dealt_out_to_four_tasks_each_with_its_pictures_and_vectors(tmp_path):
    tasks = load_6ds(16, write(tmp_path))
    assert [task.name for task in tasks] == ["Facts 1", "Facts 2", "Facts 3", "Facts 4"]
    assert sorted(text for task in tasks for text in task.class_names) == sorted(TEXTS)
    assert [task.class_names for task in tasks] != [(text,) for text in sorted(TEXTS)]  # at random
    for task in tasks:
        assert task.train_images.shape == (2, 3, 16, 16)
        assert task.test_images.shape == (1, 3, 16, 16)
        train, test = colours(task)
        assert colours_match(task.train_images, train)
        assert colours_match(task.test_images, test)
        assert torch.equal(task.class_vectors, torch.full((1, 5), TEXTS.index(task.class_names[0]) + 1.0))


def test_tasks_are_those_that_the_file_names_in_its_order(tmp_path):
    first, second = load_6ds(16, write(tmp_path, tasks=["things", "sports", "sports", "things"]))
    assert (first.name, first.class_names) == ("things", ("cat", "man riding horse"))
    assert (second.name, second.class_names) == ("sports", ("dog running", "man riding bike"))
    for task in (first, second):
        assert colours_match(task.train_images, colours(task)[0])


def test_an_image_of_two_facts_is_a_sample_of_each(tmp_path):
    tasks = load_6ds(16, write(tmp_path, tasks=["a", "a", "a", "a"], changes=[(3, "image", "pictures/0 0.jpg")]))
    labels = tasks[0].train_labels[(tasks[0].train_images == tasks[0].train_images[0]).flatten(1).all(1)]
    assert {tasks[0].class_names[label] for label in labels.tolist()} >= {"man riding horse", "man riding bike"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": CSV_COLUMNS[:-1]}, r"facts\.csv has no column split\. Write it as memsyn_bench\.data\.sixds"),
        ({"changes": [(1, "split", "val")]}, r"line 3: split must be train or test, got 'val'\. See memsyn"),
        ({"changes": [(0, "subject", "")]}, r"line 2: it has no subject"),
        ({"changes": [(2, "image", "pictures/gone.jpg")]}, r"line 4: there is no image .*gone\.jpg\."),
        ({"changes": [(2, "image", "../x.jpg")]}, r"line 4: an image must be a path below .*6ds, got \.\./x\.jpg"),
        ({"changes": [(2, "image", "/x.jpg")]}, r"line 4: an image must be a path below .*6ds, got /x\.jpg"),
        ({"tasks": ["a", "", "a", "a"]}, r"line 5: it names no task"),
        ({"changes": [(0, "split", "test"), (1, "split", "test")]}, r"has no line to train of the facts of Facts \d"),
        ({"lacking": TEXTS[1:3]}, r"vectors\.safetensors has no vector of 'dog running', nor of 1 more\. Add them"),
        ({"tasks": ["a", "b", "b", "a"], "changes": [(1, "task", "b")]}, r"has 'man riding horse' in a and in b"),
        ({"changes": [(2, "split", "train")]}, r"has no line to test of the facts of Facts \d\. Add some"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_folder_is_said(tmp_path, options, message):
    with pytest.raises(MemsynError, match=message):
        load_6ds(16, write(tmp_path, **options))


def test_missing_files_say_what_to_write(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(MemsynError, match=r"facts\.csv is missing\. Get the data .* or name another place in .*PAPER8"):
        SEQUENCES["6ds"].load(224)
    write(tmp_path)
    (tmp_path / "6ds/facts.csv").write_text(",".join(CSV_COLUMNS) + "\n")
    with pytest.raises(MemsynError, match="holds no facts"):
        SEQUENCES["6ds"].load(224)
    write(tmp_path)
    (tmp_path / "6ds/vectors.safetensors").unlink()
    with pytest.raises(
        MemsynError, match=r"vectors\.safetensors cannot be read: .* Write it as memsyn_bench\.data\.sixds"
    ):
        SEQUENCES["6ds"].load(224)


def test_a_file_as_a_spreadsheet_writes_it_is_read(tmp_path):
    path = write(tmp_path) / "6ds/facts.csv"
    plain = load_6ds(16, tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n")
    assert [task.class_names for task in load_6ds(16, tmp_path)] == [task.class_names for task in plain]


def test_what_is_no_table_or_no_picture_is_said(tmp_path):
    path = write(tmp_path) / "6ds/facts.csv"
    whole = path.read_bytes()
    path.write_bytes(whole + "pictures/0 0.jpg,Bär,,,train\n".encode("latin-1"))
    with pytest.raises(MemsynError, match=r"facts\.csv is not UTF-8 .* Save it so"):
        load_6ds(16, tmp_path)
    path.write_bytes(whole + b"pictures/0 0.jpg,man,riding,horse,train,too much\n")
    with pytest.raises(MemsynError, match="line 14: it has more values than columns"):
        load_6ds(16, tmp_path)
    path.write_bytes(whole)
    (tmp_path / "6ds/pictures/0 0.jpg").write_text("no picture")
    with pytest.raises(MemsynError, match=r"0 0\.jpg is no picture that can be read\. Get it again"):
        load_6ds(16, tmp_path)


def test_three_facts_are_three_tasks(tmp_path):
    path = write(tmp_path) / "6ds/facts.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if ",cat," not in line))
    assert [len(task.class_names) for task in load_6ds(16, tmp_path)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("of_cat", "shapes"), [(torch.ones(6), r"\(5,\), \(6,\)"), (torch.ones(5, 1), r"\(5,\), \(5, 1\)")]
)
def test_vectors_of_several_shapes_are_refused(tmp_path, of_cat, shapes):
    path = write(tmp_path) / "6ds/vectors.safetensors"
    save_file({text: of_cat if text == "cat" else torch.ones(5) for text in TEXTS}, path)
    with pytest.raises(MemsynError, match=rf"must be \(D,\), all of one D; they are \[{shapes}\]"):
        load_6ds(16, tmp_path)
    path.write_bytes(b"no tensors")
    with pytest.raises(MemsynError, match=r"vectors\.safetensors cannot be read: "):
        load_6ds(16, tmp_path)


@pytest.mark.usefixtures("torchvision")
def test_a_network_of_torchvision_embeds_pictures_among_texts(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(write(tmp_path)))
    sequence = find_sequence("6ds-alexnet")
    assert sequence.loss is similarity_loss
    tasks = sequence.load(224)
    model = sequence.build(tasks, torch.Generator().manual_seed(0))
    images = sequence.augment(tasks[0].train_images, torch.Generator().manual_seed(0))
    assert model(images).shape == (2, 5)
    assert score(model, tasks[:1], "retrieval") == (100.0,)  # one fact, one image
    with pytest.raises(OptionError, match="there is no image to find"):  # of two images none is left to choose by
        score(model, [replace(for_validation(tasks[0]), test_labels=torch.tensor([]))], "retrieval")


@pytest.mark.usefixtures("torchvision")
def test_the_examples_of_a_run_are_the_pictures(tmp_path):
    tasks = load_6ds(32, write(tmp_path))
    model = SEQUENCES["6ds"].build(tasks, torch.Generator().manual_seed(0))
    add_examples(tmp_path / "examples.json", model, tasks[0], "mas", last=False)
    (example,) = read_examples(tmp_path / "examples.json")
    with Image.open(io.BytesIO(base64.b64decode(example.image))) as shown:
        pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)
    assert torch.equal(pixels, tasks[0].test_images[0])
