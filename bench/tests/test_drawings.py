"""The emoji8 pack, its loader, the augmentation and the benchmark's network."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from memsyn.errors import MemsynError
from memsyn_bench.data.drawings import EMOJI8_PACK, WEIGHTS, augment, load_emoji8, load_pretrained, normalise, resize
from memsyn_bench.sequences.networks import MultiHead, SmallConvNet


@pytest.fixture(scope="module")
def manifest():
    return json.loads((EMOJI8_PACK / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tasks():
    return load_emoji8(32)


def ink(size=32, num=4):
    """Images with some ink in the middle of white paper."""
    images = torch.zeros(num, 3, size, size)
    images[:, :, size // 4 : size // 2, size // 4 : size // 2] = torch.tensor([0.4, 1.0, 1.6])[:, None, None]
    return images


def test_sheets_match_the_manifest_and_the_pack_is_small(manifest):
    for task in manifest["tasks"]:
        assert hashlib.sha256((EMOJI8_PACK / task["sheet"]).read_bytes()).hexdigest() == task["sha256"]
    assert sum(path.stat().st_size for path in EMOJI8_PACK.iterdir()) < 8e6


def test_every_file_of_the_pack_is_expected(manifest):
    expected = {task["sheet"] for task in manifest["tasks"]} | {"manifest.json", "LICENSES.md", WEIGHTS}
    assert {path.name for path in EMOJI8_PACK.iterdir()} == expected


def test_eight_tasks_of_forty_objects(tasks):
    assert len(tasks) == 8
    assert len({name for task in tasks for name in task.class_names}) == 8 * 40
    for task in tasks:
        assert len(task.class_names) == 40
        assert task.test_images.shape == (80, 3, 32, 32)
        assert task.test_labels.tolist() == list(range(40)) * 2
        assert task.train_images.shape[1:] == (3, 32, 32)
        assert 160 <= len(task.train_images) == len(task.train_labels) <= 200
        assert task.train_labels.bincount(minlength=40).min() >= 4
        assert task.train_images.dtype == torch.float32
        assert task.train_labels.dtype == torch.int64


def test_ink_is_between_white_and_black(tasks):
    for task in tasks:
        for images in (task.train_images, task.test_images):
            assert images.min() == 0.0
            assert 1.5 < images.max() <= 2.0
            assert images.flatten(1).amax(dim=1).min() > 0.1  # no drawing is blank


def test_no_family_of_studios_is_on_both_sides(manifest):
    families = {"train": set(), "test": set()}
    for studio in manifest["studios"]:
        families[studio["split"]].add(studio["family"])
    assert families == {"train": {"twemoji", "noto", "emojione", "fxemoji"}, "test": {"fluent"}}


def test_no_test_drawing_is_among_the_training_drawings(tasks):
    for task in tasks:
        distance = torch.cdist(task.test_images.flatten(1), task.train_images.flatten(1))
        assert distance.min() > 0.1


def test_the_pretrained_weights_saw_training_studios_only(manifest):
    from safetensors import safe_open

    with safe_open(EMOJI8_PACK / WEIGHTS, "pt") as file:
        made = json.loads(file.metadata()["made"])
    training = {studio["name"] for studio in manifest["studios"] if studio["split"] == "train"}
    assert set(made["studios"]) == training


def test_the_licence_of_every_studio_is_told(manifest):
    text = (EMOJI8_PACK / "LICENSES.md").read_text(encoding="utf-8")
    for studio in manifest["studios"]:
        assert f"npm `{studio['package']}` | {studio['licence']} |" in text


def test_load_at_the_packs_own_size(tasks):
    at_64 = load_emoji8(64)[0]
    assert at_64.test_images.shape == (80, 3, 64, 64)
    torch.testing.assert_close(resize(at_64.test_images, 32), tasks[0].test_images)


def copy_pack(tmp_path):
    return Path(shutil.copytree(EMOJI8_PACK, tmp_path / "emoji8"))


def test_a_damaged_sheet_is_refused(tmp_path):
    pack = copy_pack(tmp_path)
    data = bytearray((pack / "activities.webp").read_bytes())
    data[len(data) // 2] ^= 1
    (pack / "activities.webp").write_bytes(bytes(data))
    with pytest.raises(MemsynError, match=r"activities\.webp has sha256 [0-9a-f]{64}, the manifest says"):
        load_emoji8(32, pack)


@pytest.mark.parametrize("name", ["manifest.json", "activities.webp"])
def test_a_missing_file_is_named(tmp_path, name):
    pack = copy_pack(tmp_path)
    (pack / name).unlink()
    with pytest.raises(MemsynError, match=f"{name} is missing"):
        load_emoji8(32, pack)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(MemsynError, match=r"pretrained\.safetensors is missing"):
        load_pretrained(tmp_path)


def test_normalise_puts_white_at_zero():
    pixels = torch.tensor([255, 0], dtype=torch.uint8).expand(1, 3, 1, 2)
    assert normalise(pixels)[0, 0].tolist() == [[0.0, 2.0]]


def test_augment_repeats_with_the_generators_seed():
    images = ink()
    first = augment(images, torch.Generator().manual_seed(7))
    again = augment(images, torch.Generator().manual_seed(7))
    other = augment(images, torch.Generator().manual_seed(8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, ink())  # the input is left alone


def test_augment_draws_nothing_from_the_global_state():
    state = torch.get_rng_state()
    augment(ink(), torch.Generator().manual_seed(7))
    assert torch.equal(state, torch.get_rng_state())


def test_augment_keeps_paper_white_and_ink_in_range():
    assert not augment(torch.zeros(4, 3, 32, 32), torch.Generator().manual_seed(0)).any()
    moved = augment(ink(num=64), torch.Generator().manual_seed(0))
    assert moved.shape == (64, 3, 32, 32)
    assert moved.min() >= 0.0
    assert moved.max() <= 2.0
    assert moved.flatten(1).sum(dim=1).min() > 0.0
    assert len({image.sum().item() for image in moved}) == 64  # each image by itself


def test_augment_of_no_images():
    assert augment(torch.zeros(0, 3, 32, 32), torch.Generator()).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_the_body_works_at_any_size(size):
    backbone = SmallConvNet()
    assert backbone.num_features == 256
    assert backbone(torch.zeros(2, 3, size, size)).shape == (2, 256)
    assert 0.5e6 < sum(parameter.numel() for parameter in backbone.parameters()) < 1e6


def test_the_pretrained_weights_fit_the_body():
    backbone = SmallConvNet()
    assert str(backbone.load_state_dict(load_pretrained())) == "<All keys matched successfully>"


def test_each_task_has_its_own_head():
    backbone = SmallConvNet(widths=(8, 8, 8, 16))
    model = MultiHead(backbone, backbone.num_features, head_sizes=[3, 5])
    images = ink(size=16, num=2)
    assert model(images, 0).shape == (2, 3)
    assert model(images, 1).shape == (2, 5)
    torch.testing.assert_close(model(images), torch.cat([model(images, 0), model(images, 1)], dim=1))
    model(images, 1).sum().backward()
    assert model.heads[0].weight.grad is None
    assert model.heads[1].weight.grad is not None
