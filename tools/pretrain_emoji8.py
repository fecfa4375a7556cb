"""Pretrain the backbone of the `emoji8` network on the objects that the pack leaves over.

Reads `build/emoji8/pretrain.npz` (training studios only; run `build_emoji8.py` first) and writes
`bench/memsyn_bench/data/packs/emoji8/pretrained.safetensors`. No drawing of a test studio and no object of a task is
seen.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from build_emoji8 import BUILD, PACK
from memsyn_bench.data.drawings import WEIGHTS, augment, normalise, resize
from memsyn_bench.sequences.networks import SmallConvNet

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
LARGE_EVERY = 10  # one batch in so many is at 64x64, the others at 32x32: the body then knows both sizes


def load_drawings() -> tuple[dict[int, Tensor], Tensor, list[str]]:
    """Return the drawings by size (N, 3, size, size), their labels (N,) and the studios that drew them."""
    with np.load(BUILD / "pretrain.npz") as file:
        pixels = torch.from_numpy(file["images"]).permute(0, 3, 1, 2)
        labels, studios = torch.from_numpy(file["labels"]), sorted(set(file["studios"].tolist()))
    large = normalise(pixels)
    return {64: large, 32: resize(large, 32)}, labels, studios


def pretrain(images: dict[int, Tensor], labels: Tensor, *, epochs: int, seed: int) -> SmallConvNet:
    """Return a body trained to name the left-over objects, by AdamW under a one-cycle learning rate."""
    torch.manual_seed(seed)  # the initial weights; everything else is drawn from the generator
    generator = torch.Generator().manual_seed(seed)
    body = SmallConvNet()
    num_classes = int(labels.max()) + 1
    network = nn.Sequential(body, nn.Linear(body.num_features, num_classes))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    num_batches = len(labels) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * num_batches, pct_start=0.15
    )
    start = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        total = correct = 0.0
        for step in range(num_batches):
            chosen = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            size = 64 if (epoch * num_batches + step) % LARGE_EVERY == 0 else 32
            batch = augment(images[size][chosen], generator).contiguous(memory_format=torch.channels_last)
            logits = network(batch)
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            correct += (logits.argmax(dim=1) == labels[chosen]).float().mean().item()
        print(
            f"epoch {epoch + 1:3d}/{epochs}  loss {total / num_batches:.3f}  "
            f"accuracy {100 * correct / num_batches:.1f}%  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return body


def main() -> None:
    """Pretrain and write the weights."""
    parser = argparse.ArgumentParser(description="Pretrain the emoji8 body.")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images, labels, studios = load_drawings()
    print(f"{len(labels)} drawings of {int(labels.max()) + 1} objects by {', '.join(studios)}")
    body = pretrain(images, labels, epochs=arguments.epochs, seed=arguments.seed)
    made = {
        "what": "SmallConvNet pretrained on the left-over objects of emoji8, training studios only",
        "studios": studios,
        "num_objects": int(labels.max()) + 1,
        "num_drawings": len(labels),
        "sizes": "32, and one batch in 10 at 64",
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "optimizer": f"AdamW, one cycle, lr {LEARNING_RATE}, weight decay {WEIGHT_DECAY}, batch {BATCH_SIZE}",
        "label_smoothing": LABEL_SMOOTHING,
    }
    # One metadata key: the format writes several in no fixed order.
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in body.state_dict().items()},
        PACK / WEIGHTS,
        metadata={"made": json.dumps(made)},
    )
    print(f"{PACK / WEIGHTS}: {(PACK / WEIGHTS).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
