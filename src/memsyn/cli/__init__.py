"""The command `memsyn` for memory and importance files.

Owns the list of commands, their options and exit codes: 0 done, 1 an error of memsyn (on stderr) or as the command's
help says, 2 wrong usage (of `gate` 1), 130 interrupted.
"""

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from memsyn.cli import files, gate, merge_models, observe, repair
from memsyn.cli.screen import no_traceback

__all__ = ["app"]


class Commands(TyperGroup):
    """All commands end with a line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with no_traceback():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("inspect")(files.inspect_file)
app.command("verify")(files.verify_files)
app.command("diff")(files.diff_files)
app.command("merge")(files.merge_files)
app.command("convert")(files.convert_file)
app.command("compare")(gate.compare_weights)
app.command("merge-models")(merge_models.merge_model_files)
app.command("gate", cls=gate.GateCommand)(gate.gate_weights)
app.command("repair")(repair.repair_weights)
app.command("observe")(observe.observe_requests)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memsyn {version('memsyn')}")
        raise typer.Exit


@app.callback()
def memsyn(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Learn something new without forgetting what the model knows (Memory Aware Synapses)."""
