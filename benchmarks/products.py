"""What the importance of one layer's weight costs, relative to the layer's ordinary forward and backward pass.

Per layer shape, in turn: forward, gradient to the input, weight gradient, and ours. With `--tiles`, ours for other
sizes of tile in place of the one that `outer_products` holds, relative to the weight gradient. Prints a Markdown
table. With one thread the clock is the processor's time, which other processes hardly disturb.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from memsyn.kernels import outer_products as products
from memsyn.kernels.operations import OPERATIONS
from memsyn.kernels.outer_products import absolute
from memsyn.kernels.rules import Axis, Use


@dataclass(frozen=True)
class Shape:
    """A layer without a bias, and the shape of a batch for it."""

    layer: Callable[[], nn.Module]
    batch: tuple[int, ...]


def linear(inputs: int, outputs: int, *batch: int) -> Shape:
    return Shape(lambda: nn.Linear(inputs, outputs, bias=False), (*batch, inputs))


def conv(inputs: int, outputs: int, kernel: int, size: int, *, stride: int = 1, groups: int = 1) -> Shape:
    return Shape(
        lambda: nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        (32, inputs, size, size),
    )


SHAPES = {
    "mlp 784-400": linear(784, 400, 512),
    "mlp 400-400": linear(400, 400, 512),
    "vit 192-576": linear(192, 576, 32, 64),
    "vit 192-192": linear(192, 192, 32, 64),
    "vit 192-768": linear(192, 768, 32, 64),
    "vit 768-192": linear(768, 192, 32, 64),
    "gpt2 768-2304": linear(768, 2304, 8, 128),
    "gpt2 768-3072": linear(768, 3072, 8, 128),
    "gpt2 768-50257": linear(768, 50257, 8, 128),
    "lstm 256-1024": linear(256, 1024, 32, 64),
    "resnet 3-64 at 32": conv(3, 64, 3, 32),
    "resnet 64-64 at 32": conv(64, 64, 3, 32),
    "resnet 64-128 at 32, stride 2": conv(64, 128, 3, 32, stride=2),
    "resnet 128-128 at 16": conv(128, 128, 3, 16),
    "resnet 256-256 at 8": conv(256, 256, 3, 8),
    "resnet 256-512 at 8, stride 2": conv(256, 512, 3, 8, stride=2),
    "resnet 512-512 at 4": conv(512, 512, 3, 4),
    "short cut 256-512 at 8": conv(256, 512, 1, 8, stride=2),
    "pointwise 32-16 at 32": conv(32, 16, 1, 32),
    "pointwise 16-96 at 32": conv(16, 96, 1, 32),
    "pointwise 144-40 at 8": conv(144, 40, 1, 8),
    "pointwise 672-112 at 4": conv(672, 112, 1, 4),
    "pointwise 192-1152 at 2": conv(192, 1152, 1, 2),
    "depthwise 32, 3x3 at 32": conv(32, 32, 3, 32, groups=32),
    "depthwise 96, 3x3 at 32, stride 2": conv(96, 96, 3, 32, stride=2, groups=96),
    "depthwise 240, 5x5 at 8": conv(240, 240, 5, 8, groups=240),
    "depthwise 1152, 5x5 at 2": conv(1152, 1152, 5, 2, groups=1152),
}


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def milliseconds(runs: Sequence[Callable[[], object]], rounds: int, bar: tqdm) -> list[float]:  # type: ignore[type-arg]
    """The median over the rounds, of about 50 ms each, in which the runs take turns."""
    found: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()  # warm up
    for _ in range(rounds):
        for run, times in zip(runs, found, strict=True):
            count, start = 0, clock()
            while count == 0 or clock() - start < 0.05:
                run()
                count += 1
            times.append((clock() - start) / count * 1000)
        bar.update()
    return [statistics.median(times) for times in found]


def passes(shape: Shape) -> list[Callable[[], object]]:
    """Forward, gradient to the input, weight gradient, importance."""
    layer, inputs = shape.layer(), torch.randn(shape.batch)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    grad = torch.randn_like(layer(inputs)).detach()
    options: dict[str, object] = {}
    if isinstance(layer, nn.Conv2d):
        options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    rule = OPERATIONS[torch.conv2d if isinstance(layer, nn.Conv2d) else F.linear].rules["weight"]
    use, total = Use(options, inputs, Axis(0), grad, Axis(0)), torch.zeros_like(weight)

    def importance() -> None:
        rule.join([use], total, len(inputs), absolute)

    def forward() -> None:
        with torch.no_grad():
            layer(inputs)

    if isinstance(layer, nn.Linear):
        kernel = weight.detach()
        flat = grad.flatten(0, -2), inputs.flatten(0, -2)
        return [forward, lambda: grad @ kernel, lambda: flat[0].T @ flat[1], importance]
    assert isinstance(layer, nn.Conv2d)

    def backward(*wanted: bool) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            grad, inputs, weight.detach(), None, layer.stride, layer.padding, layer.dilation, False, [0, 0],
            layer.groups, [*wanted, False],
        )  # fmt: skip

    return [forward, backward(True, False), backward(False, True), importance]


def tiled(importance: Callable[[], object], tile: int, height: int, width: int) -> Callable[[], None]:
    """The same with other sizes of tile."""

    def run() -> None:
        products.TILE, products.HEIGHT, products.WIDTH = tile, height, width
        importance()

    return run


def layer_row(name: str, rounds: int, bar: tqdm) -> str:  # type: ignore[type-arg]
    forward, to_input, to_weight, ours = milliseconds(passes(SHAPES[name]), rounds, bar)
    before = forward + to_input
    ratio = (before + ours) / (before + to_weight)
    cells = [f"{value:.2f}" for value in (forward, to_input, to_weight, ours, ours / to_weight)]
    return f"| {name} | {' | '.join(cells)} | {ratio:.2f}x |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the passes take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiles", action="store_true", help="compare sizes of tile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = list(itertools.product((2**17, 2**18, 2**19, 2**20), (96, 192, 384), (384, 1024)))
    with tqdm(total=len(options.shapes) * options.rounds, unit="round") as bar, products.Workspace():
        if options.tiles:
            print(f"| shape | {' | '.join(f'2^{int(math.log2(t))} {h} {w}' for t, h, w in sizes)} |")
            print(f"|---|{'---|' * len(sizes)}")
            for name in options.shapes:
                *_, to_weight, ours = passes(SHAPES[name])
                base, *found = milliseconds([to_weight, *(tiled(ours, *size) for size in sizes)], options.rounds, bar)
                tqdm.write(f"| {name} | {' | '.join(f'{value / base:.2f}' for value in found)} |")
        else:
            print("| shape | forward, ms | to input | to weight | importance | importance / to weight | layer |")
            print("|---|---|---|---|---|---|---|")
            for name in options.shapes:
                tqdm.write(layer_row(name, options.rounds, bar))
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, float32.")


if __name__ == "__main__":
    main()
