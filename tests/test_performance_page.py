"""docs/performance.md is what its program makes of the lines that were measured, and other pages say the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tools.performance_page import LINES, PAGE, SENTENCES, Found, cost_of_a_pass, page, read, with_cost

ROOT = Path(__file__).parents[1]
HEAD = {
    "part": "head", "processor": "P", "cores": 2, "threads": 2, "memory_gib": 8, "system": "S", "python": "3",
    "torch": "2", "native": None, "commit": "abc", "changed": False, "date": "2030-01-02", "load": 0.1, "quick": False,
}  # fmt: skip


measured = pytest.mark.skipif(not LINES.exists(), reason="nothing was measured yet: run make bench")


def found(*lines: dict[str, object]) -> Found:
    return Found(HEAD, list(lines))


def pass_line(run: int, *own: float, name: str = "mlp", estimator: str = "mas") -> dict[str, object]:
    """A run whose ordinary passes take two seconds each."""
    seconds = {"ordinary": [2.0] * len(own), estimator: list(own)}
    title = f"Net {name}"
    return {"part": "pass", "name": name, "run": run, "title": title, "batches": 20, "seconds": seconds, "failed": {}}


def cells(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


@measured
def test_the_committed_page_is_what_the_program_makes_of_the_committed_lines() -> None:
    """If this fails, run `make bench WRITE=only`."""
    assert page(read(LINES)) == PAGE.read_text(encoding="utf-8")


@measured
@pytest.mark.parametrize("path", SENTENCES, ids=lambda path: path.name)
def test_what_other_pages_say_of_a_pass_is_what_was_measured(path: Path) -> None:
    text, own = path.read_text(encoding="utf-8"), read(LINES)
    assert with_cost(text, path, own) == text
    assert cost_of_a_pass(own) in text
    changed = with_cost(text, path, found(pass_line(1, 24.0)))
    assert "12.0 to 12.0 times an ordinary one" in changed


def test_a_target_is_met_if_each_run_meets_it() -> None:
    lines = [pass_line(1, 2.0, 2.2, 9.0), pass_line(2, 2.0, 2.1, 2.1), pass_line(3, 2.3, 2.3, 2.3)]
    text = page(found(*lines))
    assert cells(text, "Net mlp") == [
        "100.0", "1.100x (1.000-4.500)", "1.050x (1.000-1.050)", "1.150x (1.150-1.150)", "1.1x, missed in 1 of 3 runs",
    ]  # fmt: skip
    assert "- **Net mlp**: 1.100x, 1.050x and 1.150x in place of 1.1x. No profile was made in this run." in text
    assert cells(page(found(*lines[:2])), "Net mlp")[-1] == "1.1x, met"
    assert "All targets that were measured are met." in page(found(*lines[:2]))


def test_a_miss_is_explained_by_the_profile() -> None:
    where = {
        "part": "where", "name": "mlp", "run": 1, "title": "Net mlp", "ordinary": [4.0, 4.0, 4.0], "batches": 4,
        "without weight gradients": [3.0, 3.0, 3.0],
        "places": {"mas": {"products": 2.0, "torch": 3.0, "other code": 1.0}},
    }  # fmt: skip
    # One batch takes 5 s and each further one 2 s, where an ordinary one takes 1 s: 3 more.
    seconds = {"ordinary": [4.0], "one batch": [5.0], "all batches": [11.0]}
    look = {"part": "first-look", "name": "mlp", "run": 1, "title": "Net mlp", "batches": 4, "seconds": seconds}
    text = page(found(pass_line(1, 4.0), where, look))
    assert (
        "products 0.50 (the weight gradients of an ordinary batch: 0.25), the model's own operations 0.75, other "
        "code of memsyn 0.25. The first look of exact importance adds 0.15 to each of 20."
    ) in text
    assert ["3.00", "0.150"] in [cells(part, "Net mlp") for part in text.split("## ") if part.startswith("The first")]


def test_python_is_the_slope_over_layers_of_steady_batches() -> None:
    seconds = {}
    for layers in (10, 50):
        for batches in (5, 10):
            # A call, a batch, and 100 us for each layer and batch; an ordinary pass takes 40 us.
            seconds[f"mas {layers} {batches}"] = [0.5 + batches * (0.002 + layers * 100e-6)]
            seconds[f"ordinary {layers} {batches}"] = [batches * layers * 40e-6]
    line = {
        "part": "python",
        "name": "chain",
        "run": 1,
        "title": "",
        "batches": 5,
        "layers": [10, 50],
        "seconds": seconds,
    }
    assert "Python adds 60 us for each such layer and batch" in page(found(line))


def test_steps_are_compared_pair_by_pair_with_their_target() -> None:
    pairs = {"gradient": [[1.0, 1.5]], "projected, every 10": [[1.0, 1.2], [2.0, 2.4], [1.0, 9.0]]}
    functions = {"projected, every 10": {"projection.damp": 0.1}}
    line = {"part": "steps", "name": "vit-tiny", "run": 1, "title": "ViT", "pairs": pairs, "functions": functions}
    text = page(found(line))
    assert cells(text, "ViT") == ["1000.0", "1.500x", "1.200x (1.200-9.000); 1.1x, missed"]
    assert "**ViT, projected, every 10**: 1.200x in place of 1.1x." in text
    assert "`projection.damp` 0.100" in text


def test_what_failed_is_named_with_its_reason_and_the_rest_is_there() -> None:
    failed = {"part": "adapters", "name": "smollm2", "run": 1, "failed": "No module named 'x'"}
    half = {**pass_line(1, 2.0), "failed": {"kronecker": "cannot"}}
    text = page(found(failed, half))
    assert "- Not measured: adapters of smollm2 (run 1). Why: `No module named 'x'`" in text
    assert "- Not measured: kronecker of mlp (run 1). Why: `cannot`" in text
    assert cells(text, "Net mlp")[-1] == "1.1x, met"
    assert text.count("Not measured in this run.") > 5


def test_a_quick_run_says_that_its_numbers_say_nothing() -> None:
    own = Found({**HEAD, "quick": True}, [pass_line(1, 9.0)])
    assert "This page is from a quick run" in page(own)
    assert cost_of_a_pass(own) == "more than an ordinary one"


def test_the_benchmarks_run_and_one_that_is_left_out_does_not_stop_the_rest(tmp_path: Path) -> None:
    lines, made = tmp_path / "lines.jsonl", tmp_path / "page.md"
    command = [
        sys.executable,
        "benchmarks/run_all.py",
        "--quick",
        "--only",
        "report",
        "adapters",
        "--lines",
        str(lines),
    ]
    done = subprocess.run([*command, "--page", str(made)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "adapters llama, run 1: NOT MEASURED: a quick run leaves it out" in done.stdout
    head, *own, end = map(json.loads, lines.read_text(encoding="utf-8").splitlines())
    assert (head["part"], end["part"]) == ("head", "end")
    (report,) = [line for line in own if line["part"] == "report" and line["name"] == "mlp"]
    assert all(value > 0 for value in report["seconds"]["report"])
    assert made.read_text(encoding="utf-8") == page(read(lines))
    before = made.read_bytes()
    subprocess.run([*command, "--page", str(made), "--write-only"], cwd=ROOT, check=True, timeout=600)
    assert made.read_bytes() == before
