"""A company's story: a classifier of 80 emoji learns 40 more, carelessly and protected, and a gate decides.

    pip install . ./bench
    python examples/company.py

A month ago the company trained and shipped the classifier. It kept the weights and one memory file, measured without
labels. Today it trains the same new classes twice, and `memsyn gate` says which of the two may be shipped. The other
one is repaired. Labels train, and they show the accuracy at the end, for readers: no decision takes them.
docs/did-it-work.md tells the story.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import memsyn
from memsyn_bench.data.drawings import augment, load_emoji8

OLD, NEW = ("Animals & Nature", "Food & Drink"), ("Travel & Places",)
MEMORY, LEARNED = "company.memsyn.safetensors", "new-classes.factors.safetensors"
EPOCHS = 40
"""Of each training."""
TIMES = 5
"""How often each unseen drawing is sent, moved and recoloured."""
Labelled = tuple[Tensor, Tensor]


class Classifier(nn.Module):
    """A convolutional network with BatchNorm and two heads. Its output is the shipped head's: what customers get."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 256)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.shipped, self.added = nn.Linear(256, 40 * len(OLD)), nn.Linear(256, 40 * len(NEW))

    def forward(self, images: Tensor, head: str = "shipped") -> Tensor:
        """Return the logits of a head."""
        logits: Tensor = self.get_submodule(head)(self.body(images))
        return logits


def drawings(names: Sequence[str]) -> tuple[Labelled, Labelled]:
    """Drawings to learn from, and drawings by another studio, of all classes of some sections."""
    tasks = {task.name: task for task in load_emoji8(32)}
    parts = [(tasks[name], 40 * k) for k, name in enumerate(names)]
    train = [(task.train_images, task.train_labels + first) for task, first in parts]
    test = [(task.test_images, task.test_labels + first) for task, first in parts]
    (x, y), (u, v) = (map(torch.cat, zip(*own, strict=True)) for own in (train, test))
    return (x, y), (u, v)


def varied(images: Tensor, times: int, seed: int) -> list[Tensor]:
    """Batches of each drawing a few times, moved and recoloured at random."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.cat([augment(images, generator) for _ in range(times)]).split(64))


def learn(
    model: Classifier, head: str, data: Labelled, optimizer: torch.optim.Optimizer, *, epochs: int, heads_first: int = 0
) -> None:
    """An ordinary training loop: train mode, a learning rate that falls, the new head alone in the first epochs."""
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
    for epoch in range(epochs):
        model.train()
        model.body.requires_grad_(epoch >= heads_first)
        for rows in torch.randperm(len(data[1]), generator=generator).split(32):
            optimizer.zero_grad()
            logits = model(augment(data[0][rows], generator), head)
            F.cross_entropy(logits, data[1][rows]).backward()
            optimizer.step()
        schedule.step()
    model.eval()


def ship(folder: Path, seed: int, epochs: int) -> None:
    """A month ago: train, measure without labels, keep the weights and one memory file."""
    torch.manual_seed(seed)
    model, (data, (unseen, _)) = Classifier(), drawings(OLD)
    learn(model, "shipped", data, torch.optim.Adam(model.parameters(), lr=3e-3), epochs=epochs)
    save_file(model.state_dict(), folder / "shipped.safetensors")
    images = varied(data[0], 3, seed=0)
    importance = memsyn.measure(model, images, progress=False)
    factors = memsyn.measure(model, images, estimator="kronecker", progress=False)
    memory = memsyn.Memory.empty().consolidate(model, importance).consolidate(model, factors)
    memory.save(folder / MEMORY)
    # What customers send; here drawings by a studio that the model has not seen.
    save_file({"images": torch.cat(varied(unseen, TIMES, seed=1))}, folder / "requests.safetensors")


def extend(folder: Path, name: str, *, epochs: int, protected: bool) -> None:
    """Today: learn the new classes in the second head, with the whole network, and save the weights."""
    model = Classifier()
    model.load_state_dict(load_file(folder / "shipped.safetensors"))
    optimizer = torch.optim.Adam(
        [{"params": model.body.parameters(), "lr": 1e-4}, {"params": model.added.parameters(), "lr": 3e-3}]
    )
    handle = None
    if protected:
        memory = memsyn.Memory.load(folder / MEMORY, like=model)
        handle = memsyn.protect(optimizer, model, memory, freeze_statistics=True)
    learn(model, "added", drawings(NEW)[0], optimizer, epochs=epochs, heads_first=epochs // 4)
    if handle is not None:
        handle.remove()
    save_file(model.state_dict(), folder / name)


def mend(folder: Path, name: str, *, epochs: int) -> int:
    """Take the least way back from a careless training, and train the new head again: the rest of the model stays."""
    model, data = Classifier(), drawings(NEW)[0]
    model.load_state_dict(load_file(folder / name))
    images = varied(data[0], 3, seed=0)  # the factors of the new classes: what they need is kept
    factors = memsyn.measure(
        model, images, estimator="kronecker", forward=lambda own, batch: own(batch, "added"), progress=False
    )
    factors.save(folder / LEARNED)
    options = ["-o", "repaired.safetensors", "--learned", LEARNED, "--max-change", "0.01"]
    code = run(folder, ["repair", MEMORY, name, *options])
    if code == 0:
        model.load_state_dict(load_file(folder / "repaired.safetensors"))
        frozen = memsyn.freeze_statistics(model)
        optimizer = torch.optim.Adam(model.added.parameters(), lr=3e-3)
        learn(model, "added", data, optimizer, epochs=epochs, heads_first=epochs)
        frozen.remove()
        save_file(model.state_dict(), folder / "repaired.safetensors")
    return code


def gate(folder: Path, name: str) -> int:
    """Run the gate as CI does; returns its exit code."""
    return run(folder, ["gate", MEMORY, name])


def run(folder: Path, words: list[str]) -> int:
    """Run a command of memsyn on the requests; returns its exit code."""
    words = [*words, "--model", "company:Classifier", "--data", "requests.safetensors"]
    print(f"\n$ memsyn {' '.join(words)}", flush=True)
    command = shutil.which("memsyn", path=str(Path(sys.executable).parent)) or "memsyn"
    paths = os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run([command, *words], cwd=folder, env={**os.environ, "PYTHONPATH": paths}, check=False)
    print(f"exit code {done.returncode}", flush=True)
    return done.returncode


def show_accuracy(folder: Path, names: Sequence[str]) -> None:
    """For readers alone: the share of unseen drawings, each a few times, that each head names rightly."""
    print("\nBy the labels, which the gate does not have:")
    for name in names:
        model, shares = Classifier(), []
        model.load_state_dict(load_file(folder / name))
        for head, sections in (("shipped", OLD), ("added", NEW)):
            images, labels = drawings(sections)[1]
            with torch.no_grad():
                logits = torch.cat([model.eval()(batch, head) for batch in varied(images, TIMES, seed=1)])
            shares.append(float((logits.argmax(1) == labels.repeat(TIMES)).double().mean()))
        print(f"  {name}: {shares[0]:.1%} of the 80 old classes, {shares[1]:.1%} of the 40 new ones")


def main() -> None:
    """Tell it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/company"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    ship(given.folder, given.seed, EPOCHS)
    for name, protected in (("careless.safetensors", False), ("protected.safetensors", True)):
        extend(given.folder, name, epochs=EPOCHS, protected=protected)
        gate(given.folder, name)
    mend(given.folder, "careless.safetensors", epochs=EPOCHS // 4)
    gate(given.folder, "repaired.safetensors")
    names = ("shipped", "careless", "protected", "repaired")
    show_accuracy(given.folder, [f"{name}.safetensors" for name in names])


if __name__ == "__main__":
    main()
