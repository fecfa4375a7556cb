"""Trainers that cut the model by `fully_shard`, in two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CHECKS = {
    "accelerate, mas",
    "accelerate, kronecker, tied",
    "accelerate, cpu",
    "transformers, mas",
    "transformers, kronecker",
    "old FSDP",
    "lightning",
    "observer",
}


def test_trainers_that_cut_the_model_measure_and_protect_as_those_that_do_not(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(HERE / "fsdp2.yaml")]
    done = subprocess.run(
        [*launch, str(HERE / "sharded_trainers.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    for rank in (0, 1):
        assert set(re.findall(rf"<{rank} is done: (.*?)>", done.stderr)) == CHECKS
