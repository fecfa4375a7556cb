"""The scripts8 pack and its loader."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memsyn.errors import MemsynError
from memsyn_bench.data.scripts import SCRIPTS8_PACK, load_scripts8
from memsyn_bench.sequences.sequences import default_settings, find_sequence

NUM_CLASSES = {
    "Latin": 26,
    "Greek": 24,
    "Cyrillic": 32,
    "Hebrew": 27,
    "Arabic": 30,
    "Devanagari": 34,
    "Bengali": 32,
    "Thai": 46,
}


@pytest.fixture(scope="module")
def manifest():
    return json.loads((SCRIPTS8_PACK / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tasks():
    return load_scripts8(28)


def test_sheets_match_the_manifest_and_the_pack_is_small(manifest):
    for task in manifest["tasks"]:
        assert hashlib.sha256((SCRIPTS8_PACK / task["sheet"]).read_bytes()).hexdigest() == task["sha256"]
    assert sum(path.stat().st_size for path in SCRIPTS8_PACK.iterdir()) < 1.5e6
    expected = {task["sheet"] for task in manifest["tasks"]} | {"manifest.json", "LICENSES.md"}
    assert {path.name for path in SCRIPTS8_PACK.iterdir()} == expected


def test_eight_alphabets(tasks):
    assert {task.name: len(task.class_names) for task in tasks} == NUM_CLASSES
    for task in tasks:
        num = len(task.class_names)
        assert len(set(task.class_names)) == num
        for images, labels in ((task.train_images, task.train_labels), (task.test_images, task.test_labels)):
            assert images.shape == (len(labels), 1, 28, 28)
            assert len(set(labels.bincount(minlength=num).tolist())) == 1  # every font drew every letter
            assert images.dtype == torch.float32
            assert images.min() == 0.0
            assert 1.9 < images.max() <= 2.0
            assert images.flatten(1).amax(dim=1).min() > 0.5  # no letter is blank
        assert 10 <= len(task.train_labels) // num <= 23
        assert 5 <= len(task.test_labels) // num <= 9
        assert task.train_families.shape == task.train_labels.shape
        assert len(task.train_families.unique()) >= 2


def test_a_letter_looks_like_itself_in_other_fonts(tasks):
    """The nearest training picture is most often of the same letter: labels are where they belong."""
    for task in tasks:
        distance = torch.cdist(task.test_images.flatten(1), task.train_images.flatten(1))
        found = task.train_labels[distance.argmin(dim=1)]
        assert 0.6 < (found == task.test_labels).float().mean() < 0.99


def test_no_family_of_fonts_is_on_both_sides(manifest):
    families = {"train": set(), "test": set()}
    for task in manifest["tasks"]:
        for font in task["fonts"]:
            families[font["split"]].add(font["family"])
    assert not families["train"] & families["test"]
    assert "Noto Sans" in families["train"]
    assert "Noto Serif" in families["test"]


def test_no_test_picture_is_among_the_training_pictures(tasks):
    for task in tasks:
        assert torch.cdist(task.test_images.flatten(1), task.train_images.flatten(1)).min() > 1


def test_the_licence_of_every_package_is_told(manifest):
    text = (SCRIPTS8_PACK / "LICENSES.md").read_text(encoding="utf-8")
    packages = {font["package"] for task in manifest["tasks"] for font in task["fonts"]}
    assert len(packages) == 18
    for package in packages:
        line = next(line for line in text.splitlines() if f"Debian `{package}`" in line)
        assert any(f"| {licence} |" in line for licence in ("OFL-1.1", "Apache-2.0", "Bitstream-Vera"))


def test_a_damaged_or_missing_sheet_is_refused(tmp_path):
    pack = Path(shutil.copytree(SCRIPTS8_PACK, tmp_path / "scripts8"))
    (pack / "thai.webp").write_bytes((pack / "greek.webp").read_bytes())
    with pytest.raises(MemsynError, match=r"scripts8: .*thai\.webp has sha256 [0-9a-f]{64}, the manifest says"):
        load_scripts8(28, pack)
    (pack / "thai.webp").unlink()
    with pytest.raises(MemsynError, match=r"scripts8: .*thai\.webp is missing; reinstall memsyn-bench"):
        load_scripts8(28, pack)


def test_scripts5_is_the_beginning_of_scripts8(tasks):
    found = find_sequence("scripts5").tasks(28)
    assert [task.name for task in found] == [task.name for task in tasks[:5]]
    assert torch.equal(found[4].train_images, tasks[4].train_images)
    assert default_settings("scripts5") == replace(default_settings("scripts8"), sequence="scripts5")
