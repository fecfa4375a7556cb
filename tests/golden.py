"""The values in the files of tests/golden. Each was written once, by the version in its name, and must load for ever.

`python -m tests.golden VERSION` writes the files of a version or format that is about to be released; then `LATEST` is
its name. `0.1.0-first-*` and `0.1.0-*` are of format 1, where an importance file calls its sums `importance/`.
"""

import sys
from pathlib import Path

import torch

from memsyn import Consolidation, Importance, Memory

FOLDER = Path(__file__).parent / "golden"
LATEST = "0.2.0"
"""The files that this version writes byte for byte."""

WEIGHT = torch.arange(6.0).reshape(2, 3)
BIAS = torch.tensor([0.5, 0.25], dtype=torch.bfloat16)


def importance() -> Importance:
    routes = {"layer.weight": "rule", "layer.bias": "rule"}
    return Importance({"layer.weight": WEIGHT, "layer.bias": BIAS}, 4, routes, "squared_l2_norm", "abs")


def memory() -> Memory:
    history = (
        Consolidation("2026-11-22T12:00:00+00:00", 4, "sum", None, "squared_l2_norm", "abs"),
        Consolidation(
            "2026-11-23T12:00:00+00:00", 2, "ema", 0.5, "squared_l2_norm", "abs", "faces", "0.1.0", "2.6.0", "sha256:00"
        ),
    )
    anchor, omega = {"layer.weight": -WEIGHT, "layer.bias": -BIAS}, {"layer.weight": WEIGHT, "layer.bias": BIAS}
    return Memory(anchor, omega, history, {"layer.weight": 6, "layer.bias": 6})


if __name__ == "__main__":
    for kind, value in (("importance", importance()), ("memory", memory())):
        value.save(FOLDER / f"{sys.argv[1]}-{kind}.safetensors")
