"""Run all benchmarks of docs/performance.md, one after the other, and write the page.

    python benchmarks/run_all.py                # `make bench`; three runs of 7 pairs of what has a target
    python benchmarks/run_all.py --minutes 25   # each part once, and again while there is time
    python benchmarks/run_all.py --quick --lines quick.jsonl --page quick.md     # one pair of small parts, to try it

Owns which parts there are, in which order, and what is told of the machine. Each part is a process of its own, whose
last line is JSON; it becomes a line of docs/performance.jsonl. A part that fails is a line too, with the reason, and
the others go on. `tools/performance_page.py` writes the page of these lines again without running anything.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
MEASURING, STEPS = "costs_of_measuring.py", "costs_of_steps.py"
RUNS, PAIRS, BATCHES = 3, 7, 20
MODELS = ("mlp", "lstm", "efficientnet", "resnet18", "vit-tiny")
"""All but GPT-2, whose passes take most of the time and come last."""
LONGEST = 3600
"""Seconds after which a part is stopped."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A process that measures one row or one table.

    Attributes:
        part, name: of the lines that it makes.
        command: the script and its arguments.
        runs: how often it is run.
        quick: the arguments that make it quick; without any it is left out of quick runs.
        settings: environment variables.
    """

    part: str
    name: str
    command: tuple[str, ...]
    runs: int = 1
    quick: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


def jobs() -> list[Job]:
    """All parts, in the order in which they are run."""
    small = ("--pairs", "1", "--batches", "2")
    found = []
    for name in (*MODELS, "gpt2"):
        few = ("--estimators", "mas") if name == "gpt2" else ()
        quick = small if name == "mlp" else ()
        own = ("pass", name, "--pairs", str(PAIRS), "--batches", str(BATCHES), *few)
        found.append(Job("pass", name, (MEASURING, *own), RUNS, quick))
        pairs = "3" if name == "gpt2" else str(PAIRS)
        found.append(
            Job("first-look", name, (MEASURING, "first-look", name, "--pairs", pairs, "--batches", "3"), 1, quick)
        )
        found.append(Job("where", name, (MEASURING, "where", name, "--batches", "4", *few), 1, quick))
        found.append(Job("memory", name, (MEASURING, "memory", name), RUNS, quick))
    products = (*small, "--shapes", "2")
    widths = ("--batches", "8", "--pairs", "3")
    others = [
        Job("python", "chain", (MEASURING, "python", "--batches", "20"), RUNS, small),
        Job("steps", "vit-tiny", (STEPS, "steps", "vit-tiny"), RUNS),
        *(
            Job("steps", name, (STEPS, "steps", name), 1, ("--pairs", "1") if name == "mlp-small" else ())
            for name in ("mlp-small", "mlp-sgd", "mlp-adam", "resnet18")
        ),
        Job("adapters", "llama", (STEPS, "adapters", "llama"), 1),
        Job("adapters", "smollm2", (STEPS, "adapters", "smollm2", "--fewer", "3"), 1),
        *(Job("products", level, (MEASURING, "products"), 1, products, of(level)) for level in levels()),
        *(Job("scaling", name, (MEASURING, "scaling", name, *widths), 1) for name in ("mlp", "vit-tiny")),
        Job("report", "mlp", (STEPS, "report", "mlp"), 1, ("--pairs", "1")),
        Job("report", "vit-tiny", (STEPS, "report", "vit-tiny"), 1),
        *(Job("files", name, (STEPS, "files", name), 1, ("--pairs", "1")) for name in ("vit-tiny", "mlp-adam")),
        Job("observer", "calls", (STEPS, "observer"), 1, ("--calls", "100")),
    ]  # fmt: skip
    if len(levels()) > 1:
        own = ("--pairs", "3", "--batches", str(BATCHES), "--estimators", "mas")
        others += [Job("pass without", name, (MEASURING, "pass", name, *own), 1, (), of("off")) for name in MODELS]
    # What takes longest is last, so that a limit of time meets it first.
    last = [job for job in found if job.name == "gpt2"]
    return [job for job in found if job.name != "gpt2"] + others + last


def of(level: str) -> dict[str, str]:
    """The environment in which products use these instructions."""
    return {"MEMSYN_NATIVE": level}


def levels() -> list[str]:
    """`off`, and the instructions of the native library that this processor may have."""
    if find_spec("memsyn.native") is None:
        return ["off"]
    other = "avx" if platform.machine() in ("aarch64", "arm64") else "neon"
    return ["off", *(level for level in import_module("memsyn.native").LEVELS if not level.startswith(other))]


def head(threads: int, *, quick: bool) -> Line:
    """Where, when and on which code."""
    native = import_module("memsyn.native").native_level() if find_spec("memsyn.native") else None
    status = git("status", "--porcelain", "--", ":!docs/performance.*", ":!README.md")
    return {
        "part": "head",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": native,
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(status),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "load": round(os.getloadavg()[0], 1),
        "quick": quick,
    }


def processor() -> str:
    """Its name, as the kernel or Python knows it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git(*arguments: str) -> str:
    """What git says of this checkout; `unknown` outside one."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def run(job: Job, arguments: Sequence[str], threads: int, limit: float = LONGEST) -> Line:
    """The line of one job: what it found, or why it found nothing."""
    script, *rest = job.command
    settings = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"} | job.settings
    command = [sys.executable, str(HERE / script), *rest, *arguments]
    try:
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"it took longer than {limit:.0f} s"}
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}
    try:
        found: Line = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": "its last line is no JSON"}
    return found


def lines_of(chosen: Sequence[Job], *, quick: bool, threads: int, minutes: float | None) -> Iterator[Line]:
    """All lines, as they are found. All jobs run once before any runs again."""
    start = time.monotonic()
    turns = [(turn, job) for turn in range(1 if quick else RUNS) for job in chosen if job.runs > turn]
    for number, (turn, job) in enumerate(turns, 1):
        gone = (time.monotonic() - start) / 60
        print(f"[{number}/{len(turns)}, {gone:.1f} min] {job.part} {job.name}, run {turn + 1}", end="", flush=True)
        if quick and not job.quick:
            found: Line = {"failed": "a quick run leaves it out"}
        elif minutes is not None and gone > minutes:
            found = {"failed": f"the {minutes:g} minutes of the run were over"}
        else:
            found = run(job, job.quick if quick else (), threads)
        print(f": NOT MEASURED: {found['failed']}" if isinstance(found.get("failed"), str) else "", flush=True)
        yield {"part": job.part, "name": job.name, "run": turn + 1, **found}
    yield {"part": "end", "minutes": round((time.monotonic() - start) / 60, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one pair of the small parts; its numbers say nothing")
    parser.add_argument("--minutes", type=float, help="start nothing after so many minutes (default no limit)")
    parser.add_argument("--threads", type=int, help="of torch (default 2; 1 with --quick)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone, such as `pass` or `steps`")
    parser.add_argument("--lines", type=Path, default=ROOT / "docs/performance.jsonl", help="where numbers are written")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/performance.md", help="the page to write")
    parser.add_argument("--write-only", action="store_true", help="write the page of the lines that are there")
    given = parser.parse_args()
    chosen = [job for job in jobs() if given.only is None or job.part in given.only]
    if not chosen:
        parser.error(f"--only takes {', '.join(sorted({job.part for job in jobs()}))}")
    threads = given.threads or (1 if given.quick else min(2, os.cpu_count() or 1))
    if not given.write_only:
        with given.lines.open("w", encoding="utf-8") as file:
            file.write(json.dumps(head(threads, quick=given.quick)) + "\n")
            for line in lines_of(chosen, quick=given.quick, threads=threads, minutes=given.minutes):
                file.write(json.dumps(line) + "\n")
                file.flush()
    writer = [sys.executable, str(ROOT / "tools/performance_page.py"), "--lines", given.lines, "--page", given.page]
    sys.exit(subprocess.run(writer, check=False).returncode)


if __name__ == "__main__":
    main()
