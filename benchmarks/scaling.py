"""Memory of a process and bytes between processes, for models that `fully_shard` has cut: derived, and counted.

    torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py            # counts on a small Llama
    torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py --write    # and keeps the counts: docs/scaling.jsonl
    .venv/bin/python benchmarks/scaling.py --write                            # writes the tables of docs/scaling.md
    .venv/bin/python benchmarks/scaling.py --check                            # exit code 1 if they would change

Bytes are those of the whole tensor of a collective. By a ring of N processes, each process receives (N - 1) / N of them
in an all-gather or a reduce-scatter, and twice that in an all-reduce.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memsyn

DOCS = Path(__file__).parent.parent / "docs"
PAGE, COUNTS = DOCS / "scaling.md", DOCS / "scaling.jsonl"
START, END = "<!-- {}: written by benchmarks/scaling.py -->", "<!-- end -->"
GIGA = 1e9

WIDE = 4
"""Bytes of a number in sums, factors, anchors and directions: float32."""
GATHERED = 2
"""Bytes of a gathered weight on paper: bfloat16, by `MixedPrecisionPolicy(param_dtype=torch.bfloat16)`."""
TOKENS = 2048


@dataclass(frozen=True)
class Second:
    """How wide second moments are.

    Attributes:
        whole: up to this width they are whole, (n, n).
        columns: of a sketch, (n, columns), for wider ones.
        rank: eigenvectors that a memory keeps of each side; of matrices up to twice as wide, all.
    """

    whole: int = 2048
    columns: int = 256
    rank: int = 64

    def moment(self, width: int) -> tuple[int, int]:
        """The shape of the sums of one side."""
        return (width, width if width <= self.whole else self.columns)

    def kept(self, width: int) -> int:
        """The eigenvectors that are kept of one side."""
        return width if width <= 2 * self.rank else self.rank


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama whose layers are units of `fully_shard`, and whose tables and last norm are the root's."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = False
    head: int = 0
    """The width of a head; 0: hidden / heads."""

    def matrices(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the matrices of a layer: q, k, v, o, gate, up, down."""
        head = self.head or self.hidden // self.heads
        wide, narrow = self.heads * head, self.kv_heads * head
        h, i = self.hidden, self.intermediate
        return [(wide, h), (narrow, h), (narrow, h), (h, wide), (i, h), (i, h), (h, i)]

    def built(self) -> Any:
        """The same of transformers, with random weights."""
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head or None,
            use_cache=False,
            tie_word_embeddings=self.tied,
        )
        return transformers.LlamaForCausalLM(config)  # type: ignore[no-untyped-call]

    def layer(self) -> list[Shape]:
        """The shapes of the parameters of a layer."""
        return [*self.matrices(), (self.hidden,), (self.hidden,)]

    def root(self) -> list[Shape]:
        """The shapes of the parameters of the root: tables, which may be one, and the last norm."""
        tables = 1 if self.tied else 2
        return [*[(self.vocab, self.hidden)] * tables, (self.hidden,)]

    def everything(self) -> list[Shape]:
        """The shapes of all parameters."""
        return self.layer() * self.layers + self.root()

    def num_weights(self) -> int:
        """How many numbers the parameters have."""
        return sum(math.prod(shape) for shape in self.everything())

    def factors(self, second: Second, *, outputs: bool) -> tuple[list[Shape], list[Shape]]:
        """The shapes of the sums of a layer and of the root. Norms keep sums of their own."""
        layer = [second.moment(n) for _, n in self.matrices()]
        head, table = second.moment(self.hidden), (self.vocab,)
        root: list[Shape] = [head, table]
        if outputs:
            layer += [second.moment(m) for m, _ in self.matrices()]
            root += [second.moment(self.vocab), second.moment(self.hidden)]
        norm = (self.hidden,)
        return [*layer, norm, norm], [*root, norm]


SMALL_LLAMA = Llama("a small Llama", hidden=32, layers=3, heads=4, kv_heads=2, intermediate=66, vocab=97)
SMALL = Second(whole=64, columns=32, rank=16)
"""What `rank=16` asks for: the hidden width is whole, the others are sketches."""

LLAMAS = (
    # The sizes of the public config.json of meta-llama/Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B.
    Llama("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, tied=True, head=64),
    Llama("Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256),
    Llama("Llama-3.1-70B", 8192, 80, 64, 8, 28672, 128256),
)


# What is derived


def padded(shapes: Sequence[Shape], world: int) -> int:
    """The numbers of tensors that are cut along their first dimension: all parts are as large as the largest one."""
    return sum(math.ceil(shape[0] / world) * world * math.prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True)
class Traffic:
    """Bytes of whole tensors, by kind of collective."""

    gathered: float = 0
    scattered: float = 0
    reduced: float = 0

    def received(self, world: int) -> float:
        """What a process receives, by rings."""
        return (self.gathered + self.scattered + 2 * self.reduced) * (world - 1) / world


def weights_once(llama: Llama, world: int, item: int, *, layers: int, root: int) -> float:
    """Bytes of all-gathers, if each layer is gathered `layers` times and the root `root` times."""
    own = llama.layers * padded(llama.layer(), world) * layers + padded(llama.root(), world) * root
    return item * own


def sums_of(llama: Llama, estimator: str, second: Second) -> list[Shape]:
    """The shapes of all sums of an estimator."""
    if estimator == "mas":
        return llama.everything()
    layer, root = llama.factors(second, outputs=estimator == "kronecker")
    return layer * llama.layers + root


def batch_of(llama: Llama, world: int, item: int, estimator: str, second: Second) -> Traffic:
    """A batch after the first one: layers are gathered in the forward and in the backward pass, the root once.

    A forward pass alone leaves the root whole, so that the next one need not gather it.
    """
    times = (1, 0) if estimator == "inputs" else (2, 1)
    gathered = weights_once(llama, world, item, layers=times[0], root=times[1])
    return Traffic(gathered, WIDE * padded(sums_of(llama, estimator, second), world))


FIRST = {"mas": (7, 3), "kronecker": (11, 4), "inputs": (5, 2)}
"""How often the first batch gathers each layer and the root beside what a batch needs, if one check proves all routes.

All: once, to see the objects that the model computes with. "mas": a check has a forward pass of two samples, one of
each alone, a forward and a backward pass that are recorded, and autograd's backward pass. "kronecker": three forward
passes and a backward pass more, to find the matrices. "inputs": three forward passes to find them, and one before.
"""


def first_of(llama: Llama, world: int, item: int, estimator: str) -> Traffic:
    """What the first batch needs beside what a batch needs."""
    layers, root = FIRST[estimator]
    return Traffic(weights_once(llama, world, item, layers=layers, root=root))


SMALL_SUM, SMALL_SHARE = 4 * 2**20, 8
"""A sum of U^T D is cheap up to so many bytes, or if it has so many times fewer numbers than the weight."""


def projection_of(llama: Llama, second: Second) -> Traffic:
    """One projection: U^T D of each matrix whose rows are outputs, q x n numbers. A table needs no sum."""
    matrices = [*llama.matrices() * llama.layers, (llama.vocab, llama.hidden)]
    sizes = [(WIDE * second.kept(m) * n, second.kept(m), m) for m, n in matrices]
    return Traffic(reduced=sum(size for size, q, m in sizes if size <= SMALL_SUM or SMALL_SHARE * q <= m))


def to_first(llama: Llama, world: int, item: int) -> int:
    """Bytes that the first process receives when parameters' tensors are saved: what it does not hold."""
    own = sum(math.ceil(shape[0] / world) * math.prod(shape[1:]) for shape in llama.everything())
    return item * (llama.num_weights() - own)


# What is counted

NAMES = {
    "_allgather_base_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
}
NAMES |= {"allreduce_": "all-reduce", "recv_": "receive", "broadcast_": "broadcast"}
WEIGHTS = (torch.float32, torch.bfloat16)
OTHERS = ("wait_tensor", "_wrap_tensor_autograd", "send", "barrier", "monitored_barrier_")


class Counted(TorchDispatchMode):
    """Counts the bytes of collectives by kind: `all-reduce of float32`. Small messages of text are `agreements`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # its own operations come here after it has taken them apart
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0]
            sizes = [(t.nbytes, t.dtype) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if name not in OTHERS:
                size, dtype = max(sizes, key=lambda pair: pair[0])
                is_data = name in NAMES and (dtype in WEIGHTS or name == "recv_")
                self.bytes[NAMES[name] if is_data else "agreements"] += size
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], object]) -> Counter[str]:
    """The bytes that this process moved while a function ran."""
    mode = Counted()
    with mode:
        run()
    return mode.bytes


def small_model(*, whole: bool = False, **options: Any) -> nn.Module:
    """A Llama of random weights, cut for all processes by `fully_shard` with some options, or whole in each."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model: Any = SMALL_LLAMA.built()
    if not whole:
        for layer in model.model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)
    made: nn.Module = model
    return made


def batches(count: int) -> list[dict[str, Tensor]]:
    """Batches of four samples, other ones in each process."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [{"input_ids": torch.randint(SMALL_LLAMA.vocab, (4, 6), generator=generator)} for _ in range(count)]


def measured(model: nn.Module, estimator: str, count: int) -> Any:
    options: dict[str, Any] = {} if estimator == "mas" else {"rank": SMALL.rank}
    return memsyn.measure(model, batches(count), estimator=estimator, progress=False, **options)


STEPS = 10


@dataclass(frozen=True)
class Row:
    """A line of the table of counted bytes. `derived` is None where only the count is known."""

    processes: int
    what: str
    kind: str
    derived: int | None
    counted: int


def of_measuring(model: nn.Module, world: int, estimator: str, item: int) -> Iterator[Row]:
    """The first batch, and each batch after it, from the counts of one and of three batches."""
    one, three = (counted(lambda n=n: measured(model, estimator, n)) for n in (1, 3))  # type: ignore[misc]
    batch = {kind: (three[kind] - one[kind]) // 2 for kind in sorted(one | three)}
    derived = batch_of(SMALL_LLAMA, world, item, estimator, SMALL)
    first = first_of(SMALL_LLAMA, world, item, estimator)
    words = f"`measure`, {estimator}" + ("" if item == WIDE else ", bfloat16")
    gathered = one["all-gather"] - batch["all-gather"]
    yield Row(world, f"{words}: the first batch, besides", "all-gather", int(first.gathered), gathered)
    yield Row(world, f"{words}: a batch", "all-gather", int(derived.gathered), batch["all-gather"])
    yield Row(world, f"{words}: a batch", "reduce-scatter", int(derived.scattered), batch["reduce-scatter"])
    yield Row(world, f"{words}: a batch", "agreements", None, batch["agreements"])


def of_saving(model: nn.Module, world: int, folder: Path) -> Iterator[Row]:
    """Importance and anchor, tensor after tensor, to the first process."""
    memory = memsyn.Memory.empty().consolidate(model, measured(model, "mas", 1))
    numbers = counted(lambda: memory.save(folder / "small.memsyn.safetensors"))
    yield Row(world, "`Memory.save`, mas", "receive", 2 * to_first(SMALL_LLAMA, world, WIDE), numbers["receive"])


def of_protecting(world: int, estimator: str) -> Iterator[Row]:
    """Steps under protection, less the same steps without: what `fully_shard` itself moves is in both."""
    whole = small_model(whole=True)
    found = measured(whole, estimator, 1)
    memory = memsyn.Memory.empty().consolidate(whole, found, rank=SMALL.rank)  # for importance, the rank says nothing

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for batch in batches(STEPS):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    free, model = small_model(), small_model()
    own, protected = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (free, model))
    bare = counted(lambda: train(free, own))
    form = "gradient" if estimator == "mas" else "projected"
    memsyn.protect(protected, model, memory, strength=1.0, form=form)
    numbers = counted(lambda: train(model, protected))
    numbers.subtract(bare)
    words = f"`protect`, {form}: {STEPS} steps, besides"
    if estimator == "mas":
        yield Row(world, words, "all kinds", 0, sum(map(abs, numbers.values())))
        return
    # Gradients are projected before each step, and the change of weights after every tenth.
    reduced = int((STEPS + STEPS // 10) * projection_of(SMALL_LLAMA, SMALL).reduced)
    yield Row(world, words, "all-gather, reduce-scatter", 0, numbers["all-gather"] + numbers["reduce-scatter"])
    yield Row(world, words, "all-reduce", reduced, numbers["all-reduce"])
    yield Row(world, words, "agreements", None, numbers["agreements"])


def count() -> list[Row]:
    """All rows of this number of processes. All processes must call it together."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, world = small_model(), dist.get_world_size()
    rows = [row for estimator in FIRST for row in of_measuring(model, world, estimator, WIDE)]
    half = small_model(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    rows += of_measuring(half, world, "mas", GATHERED)
    with tempfile.TemporaryDirectory() as folder:
        rows += of_saving(model, world, Path(folder))
    for estimator in ("mas", "kronecker"):
        rows += of_protecting(world, estimator)
    return rows


# The page


def giga(size: float) -> str:
    """Gigabytes, with two digits that count."""
    number = size / GIGA
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}" if number >= 1 else f"{number:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text, and the others numbers."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))


def counted_table(rows: Sequence[Row]) -> str:
    """What was derived and counted, for each number of processes."""
    lines = []
    for row in rows:
        ratio = "not derived" if row.derived is None else f"{row.counted / row.derived:.2f}" if row.derived else "equal"
        ratio = "differs" if row.derived == 0 and row.counted else ratio
        derived = "" if row.derived is None else f"{row.derived:,}"
        lines.append([f"{row.what}: {row.kind}", str(row.processes), derived, f"{row.counted:,}", ratio])
    return table(["what", "processes", "bytes, derived", "bytes, counted", "ratio"], lines)


@dataclass(frozen=True)
class Needs:
    """What a process needs while it measures, in bytes."""

    part: float
    gathered: float
    inputs: float
    sums: Mapping[str, float]
    whole: Mapping[str, float]

    def total(self, estimator: str) -> float:
        """All of it. Factors of inputs and outputs are summed at once, so that no inputs of layers are kept."""
        inputs = self.inputs if estimator == "mas" else 0
        return self.part + self.gathered + inputs + self.sums[estimator] + self.whole[estimator]


def needs_of(llama: Llama, world: int) -> Needs:
    """Of a process of `world`: parts in float32, gathered weights in bfloat16."""
    second = Second()
    layer, root = padded(llama.layer(), world), padded(llama.root(), world)
    of_layer, of_root = llama.factors(second, outputs=True)
    kept = llama.layers * (3 * llama.hidden + llama.intermediate) + llama.hidden
    sums = {name: 2 * WIDE * padded(sums_of(llama, name, second), world) / world for name in ("mas", "kronecker")}
    whole = {"mas": WIDE * (layer + root), "kronecker": WIDE * (padded(of_layer, world) + padded(of_root, world))}
    part = WIDE * padded(llama.everything(), world) / world
    return Needs(part, GATHERED * (root + 2 * layer), GATHERED * TOKENS * kept, sums, whole)


def directions_of(llama: Llama, second: Second) -> float:
    """Bytes of the eigenvectors of a memory, which every process holds whole."""
    pairs = [*llama.matrices() * llama.layers, (llama.vocab, llama.hidden)]
    numbers = sum(second.kept(n) * n + second.kept(m) * m for m, n in pairs)
    return WIDE * (numbers + llama.vocab + second.kept(llama.hidden) * llama.hidden)


WORLDS = (8, 64)


def paper_tables() -> dict[str, str]:
    """Name of a table -> the table, for the models in public and 8 and 64 GPUs."""
    cases = [(llama, world) for llama in LLAMAS for world in WORLDS]
    names = {(llama, world): f"{llama.name} on {world}" for llama, world in cases}
    memory, keeping, moved = [], [], []
    for llama, world in cases:
        own, second = needs_of(llama, world), Second()
        numbers = [own.part, own.gathered, own.inputs, *own.sums.values(), *own.whole.values()]
        memory.append([names[llama, world], *map(giga, [*numbers, own.total("mas"), own.total("kronecker")])])
        keeping.append([names[llama, world], giga(2 * own.part), giga(own.part), giga(directions_of(llama, second))])
        traffic = {name: batch_of(llama, world, GATHERED, name, second) for name in FIRST}
        first = first_of(llama, world, GATHERED, "mas")
        projection = projection_of(llama, second).received(world)
        share = 1.1 * projection / traffic["mas"].received(world)
        moved.append(
            [
                names[llama, world],
                *(giga(own.received(world)) for own in (*traffic.values(), first)),
                giga(1.1 * projection),
                f"{100 * share:.1f}%",
                giga(2 * to_first(llama, world, WIDE)),
            ]
        )
    columns = ["model, GPUs", "part of the weights", "gathered", "inputs of layers", "sums, mas", "sums, kronecker"]
    columns += ["whole sums, mas", "whole sums, kronecker", "in all, mas", "in all, kronecker"]
    bytes_ = ["model, GPUs", "mas", "kronecker", "inputs", "first batch, mas", "projection", "of a step", "`save`"]
    return {
        "memory": table(columns, memory),
        "keeping": table(["model, GPUs", "anchor and importance", "last weights", "directions"], keeping),
        "moved": table(bytes_, moved),
    }


def read_rows() -> list[Row]:
    """The counts that are kept."""
    return [Row(**json.loads(line)) for line in COUNTS.read_text(encoding="utf-8").splitlines()]


def write_rows(rows: Sequence[Row]) -> None:
    """Keep these counts, in place of those of the same number of processes."""
    number = rows[0].processes
    old = [row for row in read_rows() if row.processes != number] if COUNTS.exists() else []
    lines = [json.dumps(asdict(row)) for row in sorted([*old, *rows], key=lambda row: row.processes)]
    COUNTS.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def written(page: str) -> str:
    """A page with its tables written anew."""
    for name, content in {**paper_tables(), "counted": counted_table(read_rows())}.items():
        start = START.format(name)
        before, found, rest = page.partition(start)
        assert found, f"{PAGE} lacks the line {start}"
        page = f"{before}{start}\n\n{content}\n\n{END}{rest.partition(END)[2]}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the counts, and write the tables of docs/scaling.md")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the tables would change")
    options = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rows = count()
        if dist.get_rank() == 0:
            print(counted_table(rows), flush=True)
            if options.write:
                write_rows(rows)
        dist.barrier()
        dist.destroy_process_group()
        return 0
    page = PAGE.read_text(encoding="utf-8")
    if options.write:
        PAGE.write_text(written(page), encoding="utf-8")
    if options.check:
        return int(written(page) != page)
    for own in paper_tables().values():
        print(own, end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
