"""Real processes that measure a model of which each holds a part."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def torchrun(number: int, script: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    # Each large tensor is given back to the system at once, so that what is resident is what is used.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "FOLDER": str(folder)}
    return subprocess.run(
        [*command, str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment,
    )


@pytest.mark.parametrize(
    ("number", "checks"),
    [
        (2, ["equal_to_one_process", "images", "errors", "remembered", "language_models"]),
        (4, ["language_models", "settings"]),
    ],
)
def test_several_processes_measure_what_one_process_measures(number: int, checks: list[str], tmp_path: Path) -> None:
    done = torchrun(number, "sharded_measuring.py", *checks, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert len(re.findall(r"process \d is done", done.stderr)) == number


def test_the_others_end_with_an_error_when_a_process_dies() -> None:
    done = torchrun(2, "sharded_measuring.py", "death")
    found = re.findall(r"process 0 saw it after (\d+\.\d) s", done.stderr)
    assert len(found) == 1, done.stderr[-6000:]
    assert float(found[0]) < 60


def test_a_process_needs_its_part_two_numbers_for_each_weight_and_what_a_plain_pass_needs() -> None:
    done = torchrun(2, "sharded_memory.py", "mas")
    assert done.returncode == 0, done.stderr[-6000:]
    ratios = [float(own) for own in re.findall(r"ratio (\d\.\d+)", done.stdout)]
    assert len(ratios) == 2
    assert max(ratios) < 1.15, done.stdout
