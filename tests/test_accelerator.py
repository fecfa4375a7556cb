"""The script that measures on a GPU, in its small form on the CPU: it runs, and its tables have every number."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "accelerator.py"


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    own = {"OMP_NUM_THREADS": "1", **settings}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=os.environ | own, capture_output=True, text=True, timeout=300
    )


def rows_of(text: str) -> list[list[str]]:
    """The cells of all rows of tables but those of dashes."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines if "---" not in cells[1]]


def test_small_networks_on_the_cpu_fill_both_tables() -> None:
    done = run("--small", "--rounds", "1", "--batches", "1", TRITON_INTERPRET="1", MEMSYN_NATIVE="off")
    assert done.returncode == 0, done.stderr
    header, *costs, steps, first, second = rows_of(done.stdout)
    assert header[3:7] == ["memsyn", "memsyn, tiles", "batch of one", "vmap(grad)"]
    assert [row[1] for row in costs] == ["float32", "bfloat16"] * 3
    for row in costs:
        assert row[4] == "-"  # without a GPU there is nothing but tiles
        errors = []
        for cell in (row[3], row[5], row[6]):
            ratio, error = re.fullmatch(r"([\d.]+)x \(.*\); error (\S+)", cell).groups()
            assert float(ratio) >= 0
            errors.append(float(error))
        assert max(errors) < 1e-5 if row[1] == "float32" else max(errors) < 0.5
        assert float(row[7]) >= 0
    assert steps == ["training step", "dtype", "bare step, ms", "gradient", "proximal", "projected"]
    assert [first[1], second[1]] == ["float32", "bfloat16"]
    assert all(re.match(r"[\d.]+x \(", cell) for cell in first[3:] + second[3:])
    assert "The kernel was not used: there is no GPU." in done.stdout
    assert "cannot run" not in done.stdout
    equal = "27 of 27 sums are equal to those in float64." if find_spec("triton") else "triton is not installed."
    assert equal in done.stdout
    last = done.stdout.splitlines()[-1]
    assert re.search(rf"CPU, no GPU, torch {re.escape(torch.__version__)}.*, \d{{4}}-\d\d-\d\d; 1 batches a run", last)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_run() -> None:
    done = run()
    assert done.returncode == 2
    assert "no GPU was found. --small runs tiny networks on the CPU" in done.stderr
