"""The first version of the service, and the plain training loop by which it and all later ones learn."""

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from admission import SAFE, judge
from memsyn_bench.data.drawings import augment
from memsyn_bench.methods.method import frozen
from memsyn_bench.sequences.networks import MultiHead
from model import BODIES, FILE, begin, drawings, save

Lessons = Mapping[int, tuple[Tensor, Tensor]]
"""Head -> images (N, 3, S, S) and labels (N,)."""


HEAD_LR = 3e-3
"""The learning rate of heads, which begin with random weights; a body that knows much learns more slowly."""


def optimizer_of(network: MultiHead, lr: float) -> Adam:
    """Of all weights, those of the body at `lr`."""
    groups: list[dict[str, Any]] = [
        {"params": network.body.parameters(), "lr": lr},
        {"params": network.heads.parameters(), "lr": HEAD_LR},
    ]
    return Adam(groups)


WARMUP = 2
"""Epochs in which heads learn alone: what a head of random weights asks of the body is noise."""


def learn(network: MultiHead, lessons: Lessons, optimizer: Optimizer, *, epochs: int, seed: int) -> None:
    """Train each head on its own drawings, first alone, then with the body under all of them."""
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for epoch in range(epochs):
        batches = [
            (head, chosen)
            for head, (_, labels) in lessons.items()
            for chosen in torch.randperm(len(labels), generator=generator).split(16)
        ]
        order = torch.randperm(len(batches), generator=generator).tolist()
        with frozen(network.body) if epoch < WARMUP else nullcontext():
            for head, chosen in tqdm([batches[k] for k in order], f"epoch {epoch + 1} of {epochs}", leave=False):
                images, labels = lessons[head]
                optimizer.zero_grad()
                F.cross_entropy(network(augment(images[chosen], generator), head), labels[chosen]).backward()
                optimizer.step()
    network.eval()


def num_right(network: MultiHead, head: int, images: Tensor, labels: Tensor) -> int:
    """How many images a head names rightly."""
    with torch.inference_mode():
        answers = torch.cat([network(part, head).argmax(1) for part in images.split(32)])
    return int((answers == labels).sum())


def main() -> None:
    """Train version 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/serve"))
    parser.add_argument("--sections", nargs="+", default=["animals", "food", "travel"])
    parser.add_argument("--body", choices=BODIES, default="efficientnet-lite0")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-4, help="of the body")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tasks = drawings(given.side)
    served = begin(given.body, given.side, {section: tasks[section].class_names for section in given.sections})
    lessons = {served.head(s): (tasks[s].train_images, tasks[s].train_labels) for s in given.sections}
    learn(served.network, lessons, optimizer_of(served.network, given.lr), epochs=given.epochs, seed=0)
    for section, head in ((section, served.head(section)) for section in given.sections):
        images, labels = tasks[section].test_images, tasks[section].test_labels
        print(f"{section}: {num_right(served.network, head, images, labels) / len(labels):.1%} of unseen drawings")
    given.folder.mkdir(parents=True, exist_ok=True)
    judge(given.folder, served, SAFE, "It is the first version: there is nothing to forget.")
    save(served, given.folder / FILE)
    print(f"version 1 is in {given.folder / FILE}")


if __name__ == "__main__":
    main()
