"""Teach a detector in plain torch to find dark discs, and keep that it finds bright squares.

Its output has boxes and scores, and `forward=` says what of it counts.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss

import memsyn


class Detector(nn.Sequential):
    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        boxes, scores = super().forward(pictures).split((4, 2), 1)
        return {"boxes": boxes.sigmoid(), "scores": scores}  # left, top, right, bottom; small, large


def pictures(kind: str, count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    (x, y), half = torch.randint(9, 23, (2, count, 1, 1)), torch.randint(3, 9, (count, 1, 1))
    dx, dy = (torch.arange(32) - x).abs(), (torch.arange(32).unsqueeze(1) - y).abs()
    inside = torch.maximum(dx, dy) <= half if kind == "squares" else dx**2 + dy**2 <= half**2
    shown = inside.float() * (1 if kind == "squares" else -1) + 0.3 * torch.randn(count, 32, 32)
    boxes = torch.cat([x - half, y - half, x + half, y + half], 1).squeeze(2) / 32
    return shown.unsqueeze(1), boxes, (half > 5).long().view(-1)


def trained(model: nn.Module, kind: str, memory: memsyn.Memory | None = None) -> nn.Module:
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    if memory:
        memsyn.protect(optimizer, model, memory)
    for _ in range(200):
        shown, boxes, large = pictures(kind)
        found = model(shown)
        optimizer.zero_grad()
        (10 * l1_loss(found["boxes"], boxes) + cross_entropy(found["scores"], large)).backward()
        optimizer.step()
    model.state_dict()  # as before a checkpoint: projects the last steps
    return model


def error(model: nn.Module, kind: str) -> str:  # of the edges of the boxes
    shown, boxes, _ = pictures(kind, 256)
    return f"{32 * float(l1_loss(model(shown)['boxes'].detach(), boxes)):.1f} pixels"


if __name__ == "__main__":
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1)]
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 6)]
    start = trained(Detector(*layers), "squares")
    seen = [pictures("squares", 256)[0]]  # no boxes are needed
    factors = memsyn.measure(start, seen, estimator="kronecker", forward=lambda m, x: torch.cat([*m(x).values()], 1))
    memory = memsyn.Memory.empty().consolidate(start, factors)
    for name, kept in {"fine-tuned": None, "with memsyn": memory}.items():
        model = trained(start, "discs", kept)
        print(f"{name}: old {error(start, 'squares')} -> {error(model, 'squares')}, new {error(model, 'discs')}")
