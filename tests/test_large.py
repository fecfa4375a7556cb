"""Large memories are written and read tensor by tensor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_saving_and_loading_hold_one_copy(tmp_path: Path, soak: bool) -> None:
    megabytes = 1024 if soak else 128
    command = [sys.executable, "-m", "tests.large", str(megabytes), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tqdm.write(f"{megabytes} MB: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    assert found["size"] >= 0.99 * megabytes * 2**20
    assert 0.9 <= found["saving"] <= 1.2  # of the memory's own size, which is in it
    assert 0.9 <= found["loading"] <= 1.2
