"""Runs the command `memsyn-bench` in this process."""

from functools import partial

from memsyn_bench.cli import app
from tests import commands

call = partial(commands.call, command=app)
