"""Run all benchmarks of docs/performance.md, one after the other, and write the page.

    python benchmarks/run_all.py                # `make bench`; three runs of what has a target
    python benchmarks/run_all.py --minutes 45   # each part once, and again while there is time
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
RUNS, BATCHES = 3, 20
MODELS = {"mlp": 5, "lstm": 70, "efficientnet": 250, "vit-tiny": 370, "resnet18": 450, "gpt2": 1900}
"""Model -> about how many milliseconds an ordinary pass of a batch takes, on two cores that do nothing else."""
PAIRS = {"mlp": 7, "lstm": 7, "efficientnet": 3, "vit-tiny": 3, "resnet18": 3, "gpt2": 3}
"""Model -> pairs of a run of whole passes: fewer of what takes long, so that each part gets its run."""
START = 6.0
"""Seconds until a part has begun: imports and models."""
LONGEST = 3600
"""Seconds after which a part is stopped."""
OVER_ORDINARY = {"mas": 1.3, "mas-local": 0.9, "inputs": 0.7, "kronecker": 1.3}
"""Estimator -> about what it costs over an ordinary pass: for the seconds of a part alone."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
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
        seconds: about how long a run takes, on two cores that do nothing else.
    """

    part: str
    name: str
    command: tuple[str, ...]
    runs: int = 1
    quick: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    seconds: float = START


def jobs() -> list[Job]:
    """All parts, in the order in which they are run. What has a target comes before what has none."""
    found = [job for name in MODELS for job in jobs_of_model(name)]
    products = ("--pairs", "1", "--batches", "2", "--shapes", "2")
    return [
        Job("python", "chain", (MEASURING, "python"), RUNS, ("--pairs", "1"), ONE_THREAD, 15),
        *found,
        Job("steps", "vit-tiny", (STEPS, "steps", "vit-tiny", "--pairs", "5", "--fewer", "5"), RUNS, seconds=110),
        Job("adapters", "smollm2", (STEPS, "adapters", "smollm2", "--pairs", "3", "--fewer", "2"), RUNS, seconds=220),
        Job("steps", "mlp-sgd", (STEPS, "steps", "mlp-sgd"), RUNS, seconds=25),
        Job("steps", "mlp-adam", (STEPS, "steps", "mlp-adam"), RUNS, seconds=35),
        Job("steps", "resnet18", (STEPS, "steps", "resnet18", "--pairs", "5", "--fewer", "2"), RUNS, seconds=130),
        Job("steps", "mlp-small", (STEPS, "steps", "mlp-small"), 1, ("--pairs", "1"), seconds=15),
        Job("adapters", "llama", (STEPS, "adapters", "llama", "--fewer", "3"), 1, seconds=60),
        *(Job("products", level, (MEASURING, "products", "--pairs", "5"), 1, products, of(level), 30)
          for level in levels()),
        Job("scaling", "mlp", (MEASURING, "scaling", "mlp", "--batches", "8", "--pairs", "3"), 1, seconds=15),
        Job("scaling", "vit-tiny", (MEASURING, "scaling", "vit-tiny", "--batches", "8", "--pairs", "3"), 1, seconds=85),
        Job("report", "mlp", (STEPS, "report", "mlp"), 1, ("--pairs", "1"), seconds=10),
        Job("report", "vit-tiny", (STEPS, "report", "vit-tiny"), 1, seconds=20),
        *(Job("files", name, (STEPS, "files", name), 1, ("--pairs", "1")) for name in ("vit-tiny", "mlp-adam")),
        Job("observer", "calls", (STEPS, "observer"), 1, ("--calls", "100"), seconds=40),
        *jobs_without_library(),
    ]  # fmt: skip


def jobs_of_model(name: str) -> list[Job]:
    """What is measured of a model: seconds are counted in ordinary batches, whose number is known."""
    quick = ("--pairs", "1", "--batches", "2") if name == "mlp" else ()
    batch, pairs = MODELS[name] / 1000, PAIRS[name]
    passes = ("pass", name, "--batches", str(BATCHES))
    # A pair of GPT-2 takes minutes, so that exact importance, which has a target of its own, is measured more often.
    groups = [(pairs, ("mas",)), (1, tuple(OVER_ORDINARY)[1:])] if name == "gpt2" else [(pairs, tuple(OVER_ORDINARY))]
    found = []
    for count, estimators in groups:
        own = (MEASURING, *passes, "--pairs", str(count), "--estimators", *estimators)
        batches = count * BATCHES * (1 + sum(OVER_ORDINARY[e] for e in estimators)) + 4 * len(estimators)
        found.append(Job("pass", name, own, RUNS, quick, seconds=START + batches * batch))
    # On one thread an ordinary batch takes nearly twice as long. A pair is two of them, the look and three steady ones.
    look = (MEASURING, "first-look", name, "--pairs", str(pairs))
    found.append(Job("first-look", name, look, RUNS, quick, ONE_THREAD, START + (pairs + 1) * 15 * batch))
    found.append(Job("where", name, (MEASURING, "where", name, "--batches", "3"), 1, quick, seconds=START + 45 * batch))
    found.append(Job("memory", name, (MEASURING, "memory", name), RUNS, quick, seconds=2 * START + 10 * batch))
    return found


def jobs_without_library() -> list[Job]:
    """Whole passes without the native library, if there is one."""
    if len(levels()) == 1:
        return []
    own = ("--pairs", "2", "--batches", str(BATCHES), "--estimators", "mas")
    return [
        Job("pass without", name, (MEASURING, "pass", name, *own), 1, (), of("off"), START + 105 * batch / 1000)
        for name, batch in MODELS.items()
        if name != "gpt2"
    ]


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
    """All lines, as they are found. All jobs run once before any runs again.

    With a limit, a further run begins only if it should end in time; those that do not are left out without a line.
    """
    start = time.monotonic()
    turns = [(turn, job) for turn in range(1 if quick else RUNS) for job in chosen if job.runs > turn]
    for number, (turn, job) in enumerate(turns, 1):
        gone = (time.monotonic() - start) / 60
        if minutes is not None and turn and gone + job.seconds / 60 > minutes:
            continue
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
    parser.add_argument("--minutes", type=float, help="a limit: each part once, and again while there is time")
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
