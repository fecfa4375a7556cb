"""docs/performance.md is what its program makes of the lines that were measured, and other pages say the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import run_all
from tools.performance_page import LINES, PAGE, SENTENCES, Found, cost_of_a_pass, page, read, with_cost

ROOT = Path(__file__).parents[1]
HEAD = {
    "part": "head", "processor": "P", "cores": 2, "threads": 2, "memory_gib": 8, "system": "S", "python": "3",
    "torch": "2", "native": None, "commit": "abc", "changed": False, "date": "2030-01-02", "load": 0.1, "quick": False,
}  # fmt: skip


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


def test_the_committed_page_is_what_the_program_makes_of_the_committed_lines() -> None:
    """If this fails, run `make bench WRITE=only`."""
    assert page(read(LINES)) == PAGE.read_text(encoding="utf-8")


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
        "100.0", "1.100x (1.000-4.500)", "1.050x (1.000-1.050)", "1.150x (1.150-1.150)", "3 + 3 + 3",
        "1.1x, missed in 1 of 3 runs",
    ]  # fmt: skip
    assert "- **Net mlp**: 1.100x, 1.050x and 1.150x in place of 1.1x. No profile was made in this run." in text
    assert cells(page(found(*lines[:2])), "Net mlp")[-1] == "1.1x, met"
    assert "All targets that were measured are met." in page(found(*lines[:2]))


WHERE = {
    "part": "where", "name": "mlp", "run": 1, "title": "Net mlp", "ordinary": [4.0, 4.0, 4.0], "batches": 4,
    "without weight gradients": [3.0, 3.0, 3.0],
    "places": {"mas": {"products": 2.0, "torch": 3.0, "other code": 1.0}},
    "places of the first": {"mas": {"products": 0.6, "torch": 2.5, "other code": 1.5}},
}  # fmt: skip


def look_line(first: float, steady: float) -> dict[str, object]:
    """A first look over ordinary batches of a second each."""
    seconds = {"ordinary": [1.0], "first": [first], "steady": [steady]}
    return {"part": "first-look", "name": "mlp", "run": 1, "title": "Net mlp", "seconds": seconds}


def test_a_miss_is_explained_by_the_profile() -> None:
    text = page(found(pass_line(1, 4.0), WHERE, look_line(5.0, 2.0)))
    assert (
        "products 0.50 (the weight gradients of an ordinary batch: 0.25), the model's own operations 0.75, other "
        "code of memsyn 0.25. The first look of exact importance adds 0.15 to each of 20."
    ) in text


def test_the_first_look_has_two_targets_and_is_explained_by_the_profile_of_the_first_batch() -> None:
    # Beyond a steady batch of 2 s the first one takes 3: three ordinary batches, and 3 of the 43 s of 20 batches.
    text = page(found(look_line(5.0, 2.0), WHERE))
    assert cells(text.partition("## The first batch")[2], "Net mlp") == [
        "3.00x", "0.070x", "1", "1x, missed; 0.05x, missed",
    ]  # fmt: skip
    assert "**Net mlp, first look, ordinary batches**: 3.000x in place of 1x." in text
    assert "**Net mlp, first look, of a pass**: 0.070x in place of 0.05x." in text
    more = "operations take 1.75 more (three forward and two backward passes of two samples, in float64), products 0.10"
    assert f"{more}, other code of memsyn 1.25." in text
    met = page(found(look_line(2.5, 2.0)))
    assert cells(met.partition("## The first batch")[2], "Net mlp")[-1] == "1x, met; 0.05x, met"


def test_python_of_a_layer_has_a_target_and_a_miss_names_functions() -> None:
    line = {
        "part": "python", "name": "chain", "run": 1, "title": "", "beyond": [70.0, 80.0, 75.0], "ordinary": [25.0] * 3,
        "calls": 118.0, "functions": {"calls.with_tensors": 2e-5},
    }  # fmt: skip
    text = page(found(line))
    assert "Python adds 75 us for each small linear layer and batch (rounds of each run: 3), where" in text
    assert "**Python for each layer and batch**: 75 us in place of 60. A layer makes 118 calls" in text
    assert "the most time is in `calls.with_tensors` 20 us." in text
    assert "The target is 60: met." in page(found({**line, "beyond": [60.4]}))


def test_steps_are_compared_pair_by_pair_with_their_target() -> None:
    pairs = {"gradient": [[1.0, 1.5]], "projected, every 10": [[1.0, 1.2], [2.0, 2.4], [1.0, 9.0]]}
    functions = {"projected, every 10": {"projection.damp": 0.1}}
    line = {"part": "steps", "name": "vit-tiny", "run": 1, "title": "ViT", "pairs": pairs, "functions": functions}
    text = page(found(line))
    told = ["1000.0", "1.500x", "1.200x (1.200-9.000); 1.1x, missed", "1; projected, every 10: 3"]
    assert cells(text, "ViT") == told
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


def test_each_part_of_each_model_runs_once_before_any_runs_again_and_all_fit_45_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs, now = run_all.jobs(), [0.0]

    def run(job: run_all.Job, *_: object) -> dict[str, object]:
        now[0] += job.seconds
        return {}

    monkeypatch.setattr(run_all, "run", run)
    monkeypatch.setattr(run_all.time, "monotonic", lambda: now[0])
    *lines, end = run_all.lines_of(jobs, quick=False, threads=2, minutes=45)
    assert not any("failed" in line for line in lines)
    assert [line["run"] for line in lines] == sorted(line["run"] for line in lines)
    first = [(line["part"], line["name"]) for line in lines if line["run"] == 1]
    assert first == [(job.part, job.name) for job in jobs]
    assert {"pass", "first-look", "where", "memory"} == {part for part, name in first if name == "gpt2"}
    assert 2 in [line["run"] for line in lines]
    assert 40 < end["minutes"] <= 45
