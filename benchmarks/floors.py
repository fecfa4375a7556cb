"""What the nearest neighbour knows before anything is learned: the floor under the sequences of pictures.

    python benchmarks/floors.py pixels      # scripts8 and emoji8 at 32, on pixels
    python benchmarks/floors.py features    # emoji8 on features of EfficientNet-Lite0, by size; which tasks are alike

Prints Markdown. A test picture is given the label of the nearest training picture: Euclidean on pixels, by the cosine
on features.
"""

import argparse
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsyn_bench.sequences.pretrained import efficientnet_lite0
from memsyn_bench.sequences.sequences import SEQUENCES
from memsyn_bench.task import Task


def nearest(task: Task, train: Tensor, test: Tensor) -> float:
    """The share of test pictures whose nearest training picture has their label, in percent."""
    found = task.train_labels[torch.cdist(test.flatten(1), train.flatten(1)).argmin(dim=1)]
    return 100 * float((found == task.test_labels).double().mean())


@torch.inference_mode()
def features(backbone: nn.Module, images: Tensor) -> Tensor:
    return F.normalize(torch.cat([backbone(batch) for batch in images.split(64)]), dim=1)


def row(title: str, values: list[float]) -> str:
    return f"| {title} | {' | '.join(f'{value:.0f}' for value in values)} | {fmean(values):.1f} |"


def heading(title: str, tasks: list[Task]) -> str:
    return f"| {title} | {' | '.join(task.name for task in tasks)} | mean |\n|{'---|' * (len(tasks) + 2)}"


def pixels() -> None:
    for name in ("scripts8", "emoji8"):
        tasks = SEQUENCES[name].load(SEQUENCES[name].sizes[0])
        print(heading(name, tasks))
        print(row("nearest", [nearest(task, task.train_images, task.test_images) for task in tasks]), "\n")


def of_efficientnet() -> None:
    sequence, backbone = SEQUENCES["emoji8-pretrained"], efficientnet_lite0()
    print(heading("side", sequence.load(sequence.sizes[0])))
    means: list[Tensor] = []
    for size in sequence.sizes:
        tasks, values = sequence.load(size), []
        means = []
        for task in tasks:
            train, test = features(backbone, task.train_images), features(backbone, task.test_images)
            values.append(nearest(task, train, test))
            means.append(F.normalize(train.mean(dim=0), dim=0))
        print(row(str(size), values), flush=True)
    # How alike two tasks are: the cosine of their mean features, the mean over the tasks taken off.
    centred = F.normalize(torch.stack(means) - torch.stack(means).mean(dim=0), dim=1)
    pairs = [(float(centred[i] @ centred[j]), i, j) for i in range(len(means)) for j in range(i)]
    for cosine, i, j in sorted(pairs):
        print(f"- {tasks[j].name} and {tasks[i].name}: {cosine:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("on", choices=("pixels", "features"))
    {"pixels": pixels, "features": of_efficientnet}[parser.parse_args().on]()


if __name__ == "__main__":
    main()
