"""The paper's data sets: tiny folders in their published layouts, and what is read from them."""

import sys

import numpy as np
import pytest
import torch
from bench.tests.pictures import colours_match, paint, torchvision
from PIL import Image

import memsyn
from memsyn.errors import MemsynError
from memsyn_bench.data import paper8
from memsyn_bench.data.paper8 import ACTIONS, FOLDER_VARIABLE, LETTERS, SOURCES, load_data_set, load_paper8, shift
from memsyn_bench.sequences.sequences import SEQUENCES, find_sequence
from memsyn_bench.task import Task, for_validation

__all__ = ["torchvision"]


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def save_mat(path, **content):
    savemat = pytest.importorskip("scipy.io", reason="needs scipy: memsyn-bench[paper8]").savemat
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content)


def make_flowers(root):
    labels = [1, 2, 3, 1, 2, 3, 1]
    for number, label in enumerate(labels, start=1):
        paint(root / f"flowers/jpg/image_{number:05d}.jpg", label - 1)
    save_mat(root / "flowers/imagelabels.mat", labels=np.array([labels], dtype=np.uint8))
    sets = {"trnid": [[2, 1]], "valid": [[6]], "tstid": [[3, 4, 5, 7]]}
    save_mat(root / "flowers/setid.mat", **{name: np.array(ids, dtype=np.uint16) for name, ids in sets.items()})


def make_scenes(root):
    for place, label in (("attic", 0), ("bar", 1)):
        for name in ("a b.jpg", "c.jpg"):
            paint(root / "scenes/Images" / place / name, label)
    write(root / "scenes/TrainImages.txt", "bar/a b.jpg", "attic/c.jpg")
    write(root / "scenes/TestImages.txt", "attic/a b.jpg", "bar/c.jpg")


def make_birds(root):
    folder = root / "birds/CUB_200_2011"
    names = ["001.Auk/a.jpg", "001.Auk/b.jpg", "002.Wren/a.jpg", "002.Wren/b.jpg"]
    for name, label in zip(names, (0, 0, 1, 1), strict=True):
        paint(folder / "images" / name, label)
    write(folder / "classes.txt", "1 001.Auk", "2 002.Wren")
    write(folder / "images.txt", *(f"{n} {name}" for n, name in enumerate(names, start=1)))
    write(folder / "image_class_labels.txt", "1 1", "2 1", "3 2", "4 2")
    write(folder / "train_test_split.txt", "1 0", "2 1", "3 1", "4 0")


def make_cars(root):
    names = np.array([["Kit 2012", "Beetle 1960"]], dtype=object)
    save_mat(root / "cars/devkit/cars_meta.mat", class_names=names)
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    for kind, labels, path in (
        ("train", (2, 1, 1), "devkit/cars_train_annos.mat"),
        ("test", (1, 2), "cars_test_annos_withlabels.mat"),
    ):
        entries = np.zeros((1, len(labels)), dtype=[(field, object) for field in fields])
        for place, label in enumerate(labels):
            entries[0, place] = (1, 1, 9, 9, label, f"{place + 1:05d}.jpg")
            paint(root / f"cars/cars_{kind}/{place + 1:05d}.jpg", label - 1)
        save_mat(root / "cars" / path, annotations=entries)


def make_aircraft(root):
    folder = root / "aircraft/fgvc-aircraft-2013b/data"
    write(folder / "variants.txt", "707-320", "A340 200")
    for number, label in (("0000001", 0), ("0000002", 1), ("0000003", 1)):
        with Image.open(paint(folder / f"images/{number}.jpg", label, (40, 60))) as image:
            image.paste((255, 255, 255), (0, 40, 40, 60))  # the banner
            image.save(folder / f"images/{number}.jpg", quality=95)
    write(folder / "images_variant_trainval.txt", "0000002 A340 200", "0000001 707-320")
    write(folder / "images_variant_test.txt", "0000003 A340 200")


def person(doing, box):
    actions = "".join(f"<{name}>{int(name in doing)}</{name}>" for name in (*ACTIONS, "other"))
    corners = "".join(f"<{side}>{x}</{side}>" for side, x in zip(("xmax", "xmin", "ymax", "ymin"), box, strict=True))
    return f"<object><name>person</name><actions>{actions}</actions><bndbox>{corners}</bndbox></object>"


def make_actions(root):
    folder = root / "actions/VOCdevkit/VOC2012"
    for name, people in (
        ("2010_000001", [person(["jumping"], (10, 1, 10, 1)), person(["phoning", "walking"], (20.0, 1, 20, 1))]),
        ("2010_000002", [person(["reading"], (40, 21, 30.4, 11)), person(["other"], (20, 1, 20, 1))]),
    ):
        write(folder / f"Annotations/{name}.xml", f"<annotation>{''.join(people)}</annotation>")
    # The first is red but for the jumper's box, the second too but for the reader's.
    for name, colour, box in (
        ("2010_000001", (0, 0, 250), (0, 0, 10, 10)),
        ("2010_000002", (250, 250, 0), (20, 10, 40, 30)),
    ):
        with Image.open(paint(folder / f"JPEGImages/{name}.jpg", 0)) as image:
            image.paste(colour, box)
            image.save(folder / f"JPEGImages/{name}.jpg", quality=95, subsampling=0)
    write(folder / "ImageSets/Action/train.txt", "2010_000001")
    write(folder / "ImageSets/Action/val.txt", "2010_000002")


def make_letters(root):
    for sample in range(1, 63):
        num = 6 if sample == 11 else 5
        for number in range(1, num + 1):
            folder = root / f"letters/English/Img/GoodImg/Bmp/Sample{sample:03d}"
            paint(folder / f"img{sample:03d}-{number:05d}.png", sample - 11, (9, 14))


def make_svhn(root):
    for kind, digits in (("train", [10, 1, 2]), ("test", [9, 10])):
        pixels = np.zeros((32, 32, 3, len(digits)), dtype=np.uint8)
        pixels[0, 31, 2] = digits  # top right, blue
        save_mat(root / f"svhn/{kind}_32x32.mat", X=pixels, y=np.array(digits, dtype=np.uint8)[:, None])


MAKERS = {
    "flowers": make_flowers,
    "scenes": make_scenes,
    "birds": make_birds,
    "cars": make_cars,
    "aircraft": make_aircraft,
    "actions": make_actions,
    "letters": make_letters,
    "svhn": make_svhn,
}


def load(name, root, size=16):
    MAKERS[name](root)
    return load_data_set(name, size, root)


@pytest.mark.parametrize(
    ("name", "class_names", "train", "test"),
    [
        ("flowers", ("1", "2", "3"), [1, 0, 2], [2, 0, 1, 0]),
        ("scenes", ("attic", "bar"), [1, 0], [0, 1]),
        ("birds", ("001.Auk", "002.Wren"), [0, 1], [0, 1]),
        ("cars", ("Kit 2012", "Beetle 1960"), [1, 0, 0], [0, 1]),
        ("aircraft", ("707-320", "A340 200"), [1, 0], [1]),
        ("letters", tuple(LETTERS), [0] + [label for label in range(52) for _ in range(4)], list(range(52))),
    ],
)
def test_pictures_have_the_class_that_their_set_says(tmp_path, name, class_names, train, test):
    task = load(name, tmp_path)
    assert (task.name, task.class_names) == (SOURCES[name].title, class_names)
    assert task.train_labels.tolist() == train
    assert task.test_labels.tolist() == test
    for images, labels in ((task.train_images, task.train_labels), (task.test_images, task.test_labels)):
        assert images.shape == (len(labels), 3, 16, 16)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert colours_match(images, labels)


def test_the_banner_of_an_aircraft_is_cut_off(tmp_path):
    task = load("aircraft", tmp_path)
    assert task.train_images.amin(dim=(1, 2, 3)).max() < 60  # white would be 255 in every colour
    assert task.train_images[:, :, -1].float().mean(dim=(0, 2)).max() < 200


def test_an_action_is_the_box_of_a_person_who_does_one_thing(tmp_path):
    task = load("actions", tmp_path)
    assert task.class_names == ACTIONS
    assert task.train_labels.tolist() == [ACTIONS.index("jumping")]
    assert task.test_labels.tolist() == [ACTIONS.index("reading")]
    for images, colour in ((task.train_images, (0, 0, 250)), (task.test_images, (250, 250, 0))):
        difference = images.int() - torch.tensor(colour)[:, None, None]
        assert difference.abs().flatten(2).double().mean() < 12  # all of it


def test_digits_keep_their_size_and_ten_is_zero(tmp_path):
    task = load("svhn", tmp_path, size=224)
    assert task.class_names == tuple("0123456789")
    assert task.train_labels.tolist() == [0, 1, 2]
    assert task.test_labels.tolist() == [9, 0]
    assert task.train_images.shape == (3, 3, 32, 32)
    assert task.train_images[:, 2, 0, 31].tolist() == [10, 1, 2]
    assert int(task.train_images.sum()) == 13


def test_pictures_are_decoded_once_until_one_changes(tmp_path, monkeypatch):
    first = load("scenes", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(paper8, "_decode", None)
        again = load_data_set("scenes", 16, tmp_path)
    assert torch.equal(first.train_images, again.train_images)
    again.train_images[:] = 0  # is not written to the file
    assert torch.equal(load_data_set("scenes", 16, tmp_path).train_images, first.train_images)
    assert len(list((tmp_path / "prepared").iterdir())) == 2
    changed = tmp_path / "scenes/Images" / (tmp_path / "scenes/TrainImages.txt").read_text().splitlines()[0]
    paint(changed, 2, size=(50, 30))
    assert not torch.equal(load_data_set("scenes", 16, tmp_path).train_images, first.train_images)
    changed.write_bytes(b"no picture")
    with pytest.raises(MemsynError, match=r"\.jpg is no picture that can be read\. Get it again, or leave it out"):
        load_data_set("scenes", 16, tmp_path)
    assert not list((tmp_path / "prepared").glob("*.tmp"))


def test_all_eight_in_order(tmp_path, monkeypatch):
    for make in MAKERS.values():
        make(tmp_path)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    tasks = load_paper8(16)
    titles = ["Flowers", "Scenes", "Birds", "Cars", "Aircraft", "Actions", "Letters", "SVHN"]
    assert [task.name for task in tasks] == titles
    held = for_validation(tasks[6])
    assert held.train_images.dtype == torch.uint8
    assert len(held.train_labels) + len(held.test_labels) == len(tasks[6].train_labels)


def test_what_is_missing_is_named_with_its_authors(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    make_scenes(tmp_path)
    with pytest.raises(
        MemsynError, match=r"has no flowers/ \(.*Nilsback.*no birds/ \(Caltech.*MEMSYN_PAPER8"
    ) as caught:
        load_paper8(16)
    assert "scenes/" not in str(caught.value)
    (tmp_path / "scenes/TestImages.txt").unlink()
    with pytest.raises(MemsynError, match=r"TestImages\.txt is missing\. Unpack the data set again"):
        load_data_set("scenes", 16, tmp_path)


def test_without_scipy_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MemsynError, match=r"imagelabels\.mat needs scipy .*pip install 'memsyn-bench\[paper8\]'"):
        load_data_set("flowers", 16, tmp_path)


def test_a_shift_moves_pictures_and_repeats_with_its_seed():
    images = torch.arange(16 * 16).view(1, 1, 16, 16).repeat(20, 3, 1, 1).to(torch.uint8)
    moved = shift(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert moved.dtype == torch.float32
    assert torch.equal(moved, shift(images, torch.Generator().manual_seed(0)))
    middles = moved[:, 0, 8, 8] - images[0, 0, 8, 8].float()
    down, right = ((middles + 8) // 16, (middles + 8) % 16 - 8)
    assert down.abs().max() <= 2
    assert right.abs().max() <= 2
    assert len(set(middles.tolist())) > 5
    assert torch.equal(shift(torch.full((1, 3, 16, 16), 7), torch.Generator()), torch.full((1, 3, 16, 16), 7.0))


def small_tasks(side):
    images = torch.randint(256, (4, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return [Task("t", ("a", "b"), images, torch.tensor([0, 1, 0, 1]), images, torch.tensor([0, 1, 0, 1]))]


@pytest.mark.usefixtures("torchvision")
def test_a_network_of_torchvision_is_fed_as_it_was_trained_and_has_no_head_of_its_own():
    model = SEQUENCES["paper8"].build(small_tasks(32), torch.Generator().manual_seed(0))
    assert model.heads[0].in_features == 3
    images = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    images[1] = 255
    features = model.body(images)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(features, torch.stack([-mean / deviation, (1 - mean) / deviation]))
    assert not model.train().body.network.training


@pytest.mark.usefixtures("torchvision")
def test_small_pictures_are_enlarged_for_the_network(monkeypatch):
    model = SEQUENCES["paper8"].build(small_tasks(32), torch.Generator().manual_seed(0))
    seen = []
    model.body.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    model(small_tasks(32)[0].train_images, 0)
    assert seen == [(4, 3, 224, 224)]


@pytest.mark.usefixtures("torchvision")
def test_pixels_in_bytes_can_be_measured():
    tasks = small_tasks(32)
    model = SEQUENCES["paper8"].build(tasks, torch.Generator().manual_seed(0))
    importance = memsyn.measure(
        model, tasks[0].train_images.split(2), forward=lambda model, batch: model(batch, 0), progress=False
    )
    assert set(importance.sums) == {"heads.0.weight", "heads.0.bias"}
    assert importance.num_samples == 4


@pytest.mark.usefixtures("torchvision")
def test_a_network_that_cannot_be_had_is_named():
    with pytest.raises(MemsynError, match="network 'lenet' cannot be had: Unknown model lenet"):
        find_sequence("paper8-lenet").build(small_tasks(32), torch.Generator())
    with pytest.raises(MemsynError, match="'squeezenet' does not end in a Linear"):
        find_sequence("paper8-squeezenet").build(small_tasks(32), torch.Generator())


def test_without_torchvision_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MemsynError, match=r"needs torchvision \(.*\): pip install 'torchvision'"):
        SEQUENCES["paper8"].build(small_tasks(32), torch.Generator())
