"""Runs the command `memsyn` in this process."""

from typing import Any

import typer
from typer.testing import CliRunner

from memsyn.cli import app


def call(*arguments: Any, code: int = 0, command: typer.Typer = app) -> Any:
    """Its result, if it exits with `code`."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result
