"""What measuring and protecting cost on a GPU: ratios to ordinary passes and steps, as Markdown tables.

    python benchmarks/accelerator.py            on a machine with a GPU; the Llama needs `transformers` and 80 GB
    python benchmarks/accelerator.py --small    tiny networks on the CPU, in some seconds: to see that it runs

Networks have random weights: ViT-B/16, ResNet-50 and a Llama of 1.2 billion weights, in float32 and in bfloat16. In one
process and in turn: an ordinary forward and backward pass; `memsyn.measure` with the kernel in Triton; the same with
tiles in its place; a loop over single samples; and `vmap(grad)`. Errors are relative to the loop in float64, over all
weights of one batch. Before that, the kernel is held bit for bit against products in float64. Last, training steps of
the Llama with protection over bare ones.
"""

import argparse
import datetime
import gc
import itertools
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import memsyn
from measure import attempt, markdown, measured, spread
from memsyn.kernels import fused_products
from memsyn.kernels.outer_products import absolute, signed, square
from models import Block, Subject
from passes import Pass, Values, exact, one_by_one, ordinary, per_sample_gradients, relative_error, seconds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS = ("gradient", "proximal", "projected")
STRENGTHS = {"gradient": 1e-3, "proximal": 1e-3, "projected": 10.0}


class VisionTransformer(nn.Module):
    """Patches of square images, places as an embedding, pre-norm blocks, the mean over tokens, 1,000 classes."""

    def __init__(self, width: int, heads: int, depth: int, image: int, patch: int) -> None:
        super().__init__()
        self.num_tokens = (image // patch) ** 2
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.places = nn.Embedding(self.num_tokens, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        places = self.places(torch.arange(self.num_tokens, device=x.device).expand(len(x), -1))
        out: Tensor = self.head(self.norm(self.blocks(tokens + places)).mean(1))
        return out


class Bottleneck(nn.Module):
    """He et al. 2016: convolutions of 1x1, 3x3 and 1x1, and a short cut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (self.layers(x) + self.short(x)).relu()
        return out


def resnet(first_width: int, depths: Sequence[int], image: int) -> nn.Module:
    """ResNet of bottlenecks, for ImageNet; its BatchNorms have the statistics of random images."""
    layers: list[nn.Module] = [nn.Conv2d(3, first_width, 7, 2, 3, bias=False), nn.BatchNorm2d(first_width), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = first_width
    for stage, depth in enumerate(depths):
        width = first_width * 2**stage
        for index in range(depth):
            layers.append(Bottleneck(inputs, width, 2 if stage and index == 0 else 1))
            inputs = 4 * width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(8, 3, image, image))
    for norm in norms:
        norm.momentum = 0.1
    return model


class Llama(nn.Module):
    """Hugging Face's Llama, its head tied to its embedding: ids -> logits. Needs `transformers`."""

    def __init__(self, width: int, hidden: int, depth: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        transformers = import_module("transformers")
        config = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4,
            tie_word_embeddings=True,
            use_cache=False,
        )
        self.language_model = transformers.LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.language_model(ids).logits
        return logits


LARGE = {
    "vit-b": Subject(
        "ViT-B/16, 196 tokens, batch 64",
        lambda: VisionTransformer(768, 12, 12, 224, 16),
        lambda: torch.randn(64, 3, 224, 224),
    ),
    "resnet50": Subject(
        "ResNet-50, 224x224, batch 64", lambda: resnet(64, (3, 4, 6, 3), 224), lambda: torch.randn(64, 3, 224, 224)
    ),
    "llama": Subject(
        "Llama, 1.2 billion weights, 512 tokens, batch 4",
        lambda: Llama(2048, 8192, 16, 32, 128256),
        lambda: torch.randint(128256, (4, 512)),
    ),
}
SMALL = {
    "vit-b": Subject(
        "ViT, width 32, 16 tokens, batch 4",
        lambda: VisionTransformer(32, 2, 2, 16, 4),
        lambda: torch.randn(4, 3, 16, 16),
    ),
    "resnet50": Subject(
        "ResNet of 4 bottlenecks, 32x32, batch 4",
        lambda: resnet(8, (1, 1, 1, 1), 32),
        lambda: torch.randn(4, 3, 32, 32),
    ),
    "llama": Subject(
        "Llama, 2 layers of width 32, 8 tokens, batch 3",
        lambda: Llama(32, 64, 2, 4, 100),
        lambda: torch.randint(100, (3, 8)),
    ),
}


@dataclass(frozen=True)
class Run:
    """What is measured, where, and how often."""

    subjects: dict[str, Subject]
    device: torch.device
    num_batches: int
    rounds: int

    def subject(self, name: str, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
        """A network in eval mode with random weights, and its batches."""
        torch.manual_seed(0)
        model = self.subjects[name].model().eval().to(self.device, dtype)
        batches = [self.subjects[name].batch().to(self.device) for _ in range(self.num_batches)]
        return model, [batch.to(dtype) if batch.is_floating_point() else batch for batch in batches]


def by_tiles(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    """`memsyn.measure` as on a machine without triton."""
    with patch.object(fused_products, "DEVICES", set()):
        return measured(model, batches)


ALL_BATCHES: dict[str, Pass] = {"memsyn": measured, "memsyn, tiles": by_tiles}
ONE_BATCH: dict[str, Pass] = {"batch of one": one_by_one, "vmap(grad)": per_sample_gradients}
"""Passes that are slow, and have no cost of their own for each run."""


def bit_test(device: torch.device) -> str:
    """Hold the kernel against products in float64, of integers that float32 sums exactly; returns what was found."""
    if find_spec("triton") is None:
        return "Bit test of the kernel: not run, since triton is not installed."
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Bit test of the kernel: not run, since there is no GPU."
    kernel = import_module("memsyn.kernels.triton_products")
    shapes = [(2, 1, 3, 5, 7), (3, 2, 33, 40, 17), (5, 1, 16, 64, 33)]
    if device.type == "cuda":
        shapes += [(64, 1, 197, 768, 768), (32, 4, 49, 128, 300), (2, 1, 512, 2048, 8192)]
    generator, equal, count = torch.Generator(device).manual_seed(0), 0, 0
    for shape, dtype, magnitude in itertools.product(
        shapes, (torch.float32, torch.bfloat16, torch.float16), (absolute, square, signed)
    ):
        samples, groups, tokens, rows, columns = shape
        # Channels first, as convolutions have them, on the left; tokens first on the right.
        left = torch.randint(-1, 2, (samples, groups, rows, tokens), device=device, generator=generator).to(dtype)
        right = torch.randint(-1, 2, (samples, groups, tokens, columns), device=device, generator=generator).to(dtype)
        total = torch.zeros(groups, columns, rows, device=device).transpose(1, 2)
        kernel.add_products([(left.transpose(2, 3), right)], total, magnitude)
        expected = torch.zeros_like(total, dtype=torch.float64)
        for own, other in zip(left.double(), right.double(), strict=True):
            expected += magnitude(own @ other)
        equal, count = equal + torch.equal(total.double(), expected), count + 1
    return f"Bit test of the kernel: {equal} of {count} sums are equal to those in float64."


def cost_row(name: str, dtype: str, run: Run, notes: list[str], bar: "tqdm[NoReturn]") -> list[str]:
    """The ratios of all passes to the ordinary one, and their errors."""
    title = run.subjects[name].title
    model, batches = run.subject(name, DTYPES[dtype])
    passes = {
        who: own for who, own in (ALL_BATCHES | ONE_BATCH).items() if run.device.type == "cuda" or own is not by_tiles
    }
    ordinary(model, batches[:1])  # warm up
    truth = attempt(exact, model, batches[:1], f"errors, {title}, {dtype}", notes)
    running, errors = {}, {}
    start = time.perf_counter()
    for who, own in passes.items():
        found = attempt(own, model, batches[:1], f"{who}, {title}, {dtype}", notes)
        if who == "memsyn":
            first = time.perf_counter() - start
        if found is not None:
            running[who] = own
            errors[who] = f"; error {relative_error(found, truth):.1e}" if truth else ""
        del found
    truth = None
    plain: list[float] = []
    ratios: dict[str, list[float]] = {who: [] for who in running}
    for _ in range(run.rounds):
        plain.append(seconds(ordinary, model, batches) / len(batches))
        for who, own in running.items():
            chosen = batches[:1] if who in ONE_BATCH else batches
            ratios[who].append(seconds(own, model, chosen) / len(chosen) / plain[-1])
        bar.update()
    cells = [f"{spread(ratios[who], '{:.2f}x')}{errors[who]}" if who in running else "-" for who in CONTENDERS]
    return [title, dtype, spread([1000 * value for value in plain], "{:.1f}"), *cells, f"{first:.1f}"]


CONTENDERS = (*ALL_BATCHES, *ONE_BATCH)


def memory_of(model: nn.Module, tokens: Tensor, form: str) -> memsyn.Memory:
    """An importance of random numbers, or directions that were measured."""
    if form == "projected":
        factors = memsyn.measure(model, [tokens], estimator="inputs", progress=False)
        return memsyn.Memory.empty().consolidate(model, factors)
    parameters = dict(model.named_parameters())
    importance = {name: torch.rand_like(p, dtype=torch.float32) for name, p in parameters.items()}
    return memsyn.Memory({name: p.detach().clone() for name, p in parameters.items()}, importance)


def training_step(model: nn.Module, memory: memsyn.Memory | None, form: str) -> Callable[[Tensor], None]:
    """One step of AdamW on the next token, protected or not."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    if memory is not None:
        memsyn.protect(optimizer, model, memory, strength=STRENGTHS[form], form=form)

    def step(ids: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        optimizer.step()

    return step


def step_seconds(step: Callable[[Tensor], None], ids: Tensor) -> float:
    def as_pass(_: nn.Module, batches: Sequence[Tensor]) -> Values:
        step(batches[0])
        return {}

    return seconds(as_pass, nn.Identity(), [ids])


def protection_row(dtype: str, run: Run, notes: list[str], bar: "tqdm[NoReturn]") -> list[str]:
    """The ratios of protected steps of the Llama to bare ones, form by form, each beside a bare model of its own."""
    cells: list[str] = []
    times: list[float] = []
    for form in FORMS:
        ratios: list[float] = []

        def compare(model: nn.Module, batches: Sequence[Tensor], form: str, ratios: list[float]) -> Values:
            memory = memory_of(model, batches[0], form)
            bare = training_step(deepcopy(model).train(), None, form)
            protected = training_step(deepcopy(model).train(), memory, form)
            for turn in range(run.rounds + 2):
                plain, own = step_seconds(bare, batches[0]), step_seconds(protected, batches[0])
                if turn >= 2:  # the first ones make the optimizer's state
                    times.append(plain)
                    ratios.append(own / plain)
                    bar.update()
            return {}

        model, batches = run.subject("llama", DTYPES[dtype])
        attempt(partial(compare, form=form, ratios=ratios), model, batches[:1], f"{form}, {dtype}", notes)
        cells.append(spread(ratios, "{:.3f}x"))
        del model
        gc.collect()
    return [run.subjects["llama"].title, dtype, f"{1000 * statistics.median(times):.1f}" if times else "-", *cells]


def conditions(run: Run) -> str:
    """A line on where and when the numbers are from."""
    on_gpu = run.device.type == "cuda"
    where = torch.cuda.get_device_name(run.device) if on_gpu else f"{platform.machine()} CPU, no GPU"
    versions = f"torch {torch.__version__}"
    if find_spec("triton") is not None:
        versions += f", triton {import_module('triton').__version__}"
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{where}, {versions}, {today}; {run.num_batches} batches a run, {run.rounds} rounds, no TF32."


def kernel_note(run: Run) -> str:
    """Whether measurements were really by the kernel."""
    if run.device.type not in fused_products.DEVICES:
        return "The kernel was not used: there is no GPU."
    if fused_products.failures:
        return f"The kernel FAILED, and tiles were used in its place: {fused_products.failures}"
    return "No launch of the kernel failed."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(LARGE)}; all by default")
    parser.add_argument("--batches", type=int, help="batches a run (default 20; 2 with --small)")
    parser.add_argument("--rounds", type=int, help="interleaved runs of each contender (default 5; 2 with --small)")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default both")
    parser.add_argument("--small", action="store_true", help="tiny networks on the CPU")
    options = parser.parse_args()
    names = options.networks or list(LARGE)
    if unknown := set(names) - set(LARGE):
        parser.error(f"NETWORK must be one of {', '.join(LARGE)}; got {', '.join(sorted(unknown))}")
    if not options.small and not torch.cuda.is_available():
        parser.error("no GPU was found. --small runs tiny networks on the CPU")
    torch.backends.cudnn.allow_tf32 = False
    warnings.simplefilter("ignore")  # `attempt` notes them
    least = 2 if options.small else None
    run = Run(
        SMALL if options.small else LARGE,
        torch.device("cpu" if options.small else "cuda"),
        options.batches or least or 20,
        options.rounds or least or 5,
    )
    notes = [bit_test(run.device)]
    lines: list[list[str]] = []
    num_protected = len(FORMS) if "llama" in names else 0
    with tqdm(total=(len(names) + num_protected) * len(options.dtypes) * run.rounds, unit="round") as bar:
        for name, dtype in itertools.product(names, options.dtypes):
            lines.append(cost_row(name, dtype, run, notes, bar))
            tqdm.write(" | ".join(lines[-1]), file=sys.stderr)
            gc.collect()
        steps = [protection_row(dtype, run, notes, bar) for dtype in options.dtypes if num_protected]
    header = ["network", "dtype", "ordinary pass of a batch, ms", *CONTENDERS, "first pass of memsyn, s"]
    print(markdown(header, lines))
    if steps:
        print("\n" + markdown(["training step", "dtype", "bare step, ms", *FORMS], steps))
    print("\n" + "\n".join(f"- {note}" for note in dict.fromkeys([*notes, kernel_note(run)])))
    print(f"\n{conditions(run)}")


if __name__ == "__main__":
    main()
