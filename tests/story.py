"""A company's story in small: a classifier with BatchNorm learns new classes in a second head, carelessly or protected.

Eight old classes and four new ones, as clouds of points; the new ones lie elsewhere, so that running statistics move.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memsyn

OLD, NEW, WIDTH = 8, 4, 16


class Classifier(nn.Module):
    """Two heads on one backbone. Its output is that of the old head: what the company's users see."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.old, self.new = nn.Linear(WIDTH, OLD), nn.Linear(WIDTH, NEW)

    def forward(self, x: Tensor) -> Tensor:
        return self.old(self.body(x).relu())

    def new_answers(self, x: Tensor) -> Tensor:
        return self.new(self.body(x).relu())


def build() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def points(num_classes: int, count: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Points around the centres of classes, and their classes."""
    centres = 3 * torch.randn(num_classes, 6, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return shift + centres[labels] + 0.3 * torch.randn(count, 6, generator=generator), labels


def requests(count: int = 400) -> Tensor:
    """What users of the old classes send, without labels."""
    return points(OLD, count, seed=2)[0]


def trained() -> Classifier:
    """The model that was shipped."""
    model, (x, y) = build(), points(OLD, 1_000, seed=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for start in range(0, 6_000, 100):
        rows = torch.arange(start, start + 100) % len(x)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


def remembered(model: Classifier) -> memsyn.Memory:
    """What is kept of the old data: an importance with the weights, and directions."""
    data = [points(OLD, 500, seed=4)[0]]
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, data, progress=False))
    factors = memsyn.measure(model, data, estimator="kronecker", progress=False)
    return memory.consolidate(model, factors)


def learn(model: Classifier, memory: memsyn.Memory | None = None, lr: float = 0.01) -> None:
    """Learn the new classes: in train mode and without protection, or protected and with statistics frozen."""
    x, y = points(NEW, 1_000, seed=5, shift=6.0)
    optimizer = torch.optim.SGD(
        [{"params": model.new.parameters(), "lr": 0.1}, {"params": model.body.parameters(), "lr": lr}]
    )
    handle = None
    if memory is not None:
        strength = memsyn.Relative(1.0)
        handle = memsyn.protect(optimizer, model, memory, form="proximal", strength=strength, freeze_statistics=True)
    for start in range(0, 4_000, 50):
        rows = torch.arange(start, start + 50) % len(x)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model.new_answers(x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if handle is not None:
        handle.remove()
    model.eval()
