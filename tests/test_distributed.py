"""Two real processes."""

import subprocess
import sys
from pathlib import Path


def test_two_processes_measure_and_protect_together() -> None:
    script = Path(__file__).with_name("processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[:6000]
    assert "process 0 is done" in done.stderr
    assert "process 1 is done" in done.stderr
