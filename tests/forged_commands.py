"""A model with all of its files, and every command of `memsyn` that reads a file, for forged files in their place."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import memsyn
from memsyn.cli import app

EVERY = ["inspect", "inspect --json", "inspect --html", "verify", "diff", "diff --json", "convert", "rename"]

DATA = ["--model", "tests.forged_commands:build", "--data", "inputs.safetensors"]

KINDS = {
    "importance": [*EVERY, "merge"],
    "factors": [*EVERY, "merge", "learned"],
    "replica": ["inspect", "diff", "merge", "gate", "gate --data", "merge-models", "convert"],
    "memory": [
        *(*EVERY, "weights", "gate", "gate --data", "compare", "compare --html", "repair", "merge-models"),
    ],
}  # fmt: skip
"""Kind of file -> the commands that read one."""


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)).eval()


def write_files(folder: Path) -> None:
    """An importance, factors, a memory with both and statistics, weights old and new, and inputs."""
    model, data = build(), torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    importance = memsyn.measure(model, [data], progress=False)
    factors = memsyn.measure(model, [data], estimator="kronecker", progress=False)
    importance.save(folder / "importance")
    factors.save(folder / "factors")
    empty = memsyn.Memory.empty()
    empty.consolidate(model, importance).save(folder / "replica")
    empty.consolidate(model, importance).consolidate(model, factors).save(folder / "memory")
    for kind in ("importance", "factors", "replica"):
        shutil.copy(folder / kind, folder / f"other {kind}")
    save_file(model.state_dict(), folder / "old.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    empty.consolidate(model, memsyn.measure(model, [data], progress=False)).save(folder / "memory of new")
    save_file(model.state_dict(), folder / "new.safetensors")
    save_file({"inputs": data}, folder / "inputs.safetensors")


def arguments(command: str, kind: str, file: str) -> list[str]:
    """The arguments by which a command reads a file of this kind. It writes to `out`."""
    return {
        "inspect": ["inspect", file],
        "inspect --json": ["inspect", file, "--json"],
        "inspect --html": ["inspect", file, "--html", "out.html"],
        "weights": ["inspect", file, "--html", "out.html", "--weights", "new.safetensors"],
        "verify": ["verify", file],
        "diff": ["diff", kind, file],
        "diff --json": ["diff", file, kind, "--json"],
        "merge": ["merge", f"other {kind}", file, "-o", "out"],
        "convert": ["convert", file, "-o", "out"],
        "rename": ["convert", file, "-o", "out", "--rename", "=net."],
        "learned": ["repair", "memory", "new.safetensors", "--learned", file, "-o", "out"],
        "gate": ["gate", file, "new.safetensors"],
        "gate --data": ["gate", file, "new.safetensors", *DATA, "--json"],
        "compare": ["compare", file, "new.safetensors", "--json"],
        "compare --html": ["compare", file, "new.safetensors", "--html", "out.html"],
        "repair": ["repair", file, "new.safetensors", "-o", "out"],
        "merge-models": [
            *("merge-models", "old.safetensors", "new.safetensors", "--memory", file, "--memory", "memory of new"),
            *("-o", "out"),
        ],
    }[command]


def run(command: str, kind: str, file: str) -> Any:
    """The result of a command."""
    return CliRunner().invoke(app, arguments(command, kind, file))
