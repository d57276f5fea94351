"""The command line: ``moestream COMMAND``. One file per command; each imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from moestream.cli import bench, chat, doctor, inspect, plan, run, serve, trace
from moestream.cli.output import show_warning
from moestream.errors import ConfigError, MoestreamError

app = typer.Typer(
    name="moestream",
    help="Run Mixture-of-Experts language models far larger than memory, streaming the experts from SSD.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("serve", context_settings={"auto_envvar_prefix": serve.PREFIX})(serve.serve)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
app.add_typer(trace.app, name="trace")


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version  # noqa: PLC0415

        typer.echo(f"moestream {version('moestream')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


def main() -> None:
    """Entry point: exit status 0, 1 (an error, one line on stderr), 2 (wrong usage) or 130 (interrupted)."""
    warnings.showwarning = show_warning
    try:
        app()
    except MoestreamError as error:
        if os.environ.get("MOESTREAM_DEBUG"):
            raise
        print(f"moestream: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except BrokenPipeError:  # `moestream run ... | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
