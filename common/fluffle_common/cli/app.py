"""The one command, ``fluffle``: sub-commands from entry points, errors in one line."""

from __future__ import annotations

import errno
import math
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import click

from fluffle_common.cli.printing import (
    ReaderGone,
    echo_sentences,
    one_line,
    prepare_streams,
    settle_streams,
)
from fluffle_common.errors import FluffleError
from fluffle_common.installed import installed

_GROUP = "fluffle.commands"
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_FAILED = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_MOST_SECONDS = 1e9  # 30 years; clocks and timers cannot take much more
MOST_COUNT = 2**31 - 1
MOST_SEED = 2**63 - 1


# No limits of ours, but of clocks, timers and the wire: only who exceeds one hears of it.
_SILENT_LIMITS = (MOST_COUNT, MOST_SEED, _MOST_SECONDS)


def _shown(range_: click.IntRange | click.FloatRange, otherwise: str) -> str:
    """Return what the help says of a range: ``otherwise``, or only its lower limit."""
    if range_.max not in (None, *_SILENT_LIMITS):
        return otherwise
    return "" if range_.min is None else f"x{'>' if range_.min_open else '>='}{range_.min:g}"


class FiniteFloat(click.FloatRange):
    """A range of numbers without NaN and infinity, which pass every comparison of `FloatRange`."""

    name = "number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what stands for the value in the help."""
        return "X"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse it."""
        number = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        if self.max in _SILENT_LIMITS and number > self.max:
            self.fail(f"{value} is too large; at most {self.max:,.0f} is possible", param, ctx)
        return float(super().convert(value, param, ctx))

    def _describe_range(self) -> str:
        return _shown(self, super()._describe_range())


class Seconds(FiniteFloat):
    """A duration in seconds."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what stands for the value in the help."""
        return "SECONDS"


class WholeNumber(click.IntRange):
    """A range of whole numbers."""

    name = "whole number"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return what stands for the value in the help."""
        return "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse it."""
        number = click.INT.convert(value, param, ctx)
        if self.max in _SILENT_LIMITS and number > self.max:
            self.fail(f"{value} is too large; at most {self.max:,} is possible", param, ctx)
        return int(super().convert(value, param, ctx))

    def _describe_range(self) -> str:
        return _shown(self, super()._describe_range())


def seconds(least: float = 0.0, most: float = _MOST_SECONDS, *, min_open: bool = False) -> Any:
    """Return the type of an option that is a duration in seconds."""
    return Seconds(least, most, min_open=min_open)


def count(least: int = 1, most: int = MOST_COUNT) -> Any:
    """Return the type of an option that counts something."""
    return WholeNumber(least, most)


SEED = WholeNumber(0, MOST_SEED)
"""The type of a seed: what the wire, NumPy and JAX can take."""


# How `fluffle --help` orders the commands; one that is not named here comes last.
_SECTIONS = {
    "Run a federation": ("broker", "coordinator", "worker", "simulate", "strategies"),
    "Look into it": ("explain", "queues", "dashboard", "journal", "tap", "peek", "rejected"),
    "Look at a run": ("history", "plot", "report", "replay"),
    "The letters": ("letters", "predict", "confusion"),
}


class Commands(click.Group):
    """A group of the ``fluffle.commands`` entry points, each loaded when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name every installed sub-command, in alphabetical order."""
        return sorted(installed(_GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load the one command that was asked for."""
        point = installed(_GROUP).get(cmd_name)
        return None if point is None else cast("click.Command", point.load())

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the commands do, those of one purpose together."""
        left = self.list_commands(ctx)
        width = max(map(len, left))
        sections = {
            head: [name for name in names if name in left] for head, names in _SECTIONS.items()
        }
        placed = {name for names in sections.values() for name in names}
        sections["More"] = [name for name in left if name not in placed]
        for head, names in sections.items():
            rows = [
                (f"{name:<{width}}", command.get_short_help_str(formatter.width - 6 - width))
                for name in names
                if (command := self.get_command(ctx, name)) is not None
            ]
            if rows:
                with formatter.section(head):
                    formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest one."""
        import difflib

        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"did you mean '{near[0]}'?" if near else "'fluffle --help' lists the commands"
            raise click.UsageError(f"there is no command '{name}'; {hint}", ctx)
        return super().resolve_command(ctx, args)


def _remember_debug(_: click.Context, __: click.Parameter, wanted: bool) -> None:
    if wanted:  # `main` asks when click has forgotten its context
        os.environ["FLUFFLE_DEBUG"] = "1"


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("fluffle"), prog_name="fluffle")
@click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show the traceback of an unexpected error, and each event with what follows from it; "
    "FLUFFLE_DEBUG=1 does the same.",
)
def fluffle() -> None:
    """Federated learning over a message broker.

    A coordinator publishes global weights over RabbitMQ; workers train on data that stays with
    them and send updates back; as soon as a quorum has answered, the coordinator averages them
    and opens the next round. Start them in any order, on any machines that reach the broker:

    \b
      fluffle broker up                                a private RabbitMQ
      fluffle coordinator --federation letters         opens rounds, averages
      fluffle worker --federation letters --data DIR   one for each data owner
      fluffle queues --federation letters              what is in the queues
    """
    if _debugging():
        from fluffle_common.cli.debug_log import show_debug_log

        show_debug_log()


def url_option(command: Any) -> Any:
    """Add ``--url`` to a command; None where neither the flag nor FLUFFLE_URL is set."""
    return click.option(
        "--url",
        envvar="FLUFFLE_URL",
        metavar="URL",
        help=(
            "The broker, amqp://user:password@host:port/vhost or amqps://…. For a cluster, "
            "list the URLs of several nodes with commas between them; any node that can be "
            "reached is used.  [default: $FLUFFLE_URL, else the broker started by 'fluffle "
            "broker up' here, else amqp://guest:guest@127.0.0.1:5672/]"
        ),
    )(command)


def federation_option(command: Any, *, required: bool = True) -> Any:
    """Add ``--federation`` to a command."""
    return click.option(
        "--federation",
        envvar="FLUFFLE_FEDERATION",
        required=required,
        metavar="NAME",
        help="Name of the federation; the names of its queues begin with it.",
    )(command)


def management_option(command: Any) -> Any:
    """Add ``--management`` to a command that asks RabbitMQ's management API."""
    return click.option(
        "--management",
        envvar="FLUFFLE_MANAGEMENT_URL",
        metavar="URL",
        help=(
            "URL of RabbitMQ's management API, which has the figures of the queues.  "
            "[default: that of the broker of --url, on its usual port]"
        ),
        show_default=False,
    )(command)


def queue_type_option(command: Any) -> Any:
    """Add ``--queue-type`` to a command that declares queues."""
    return click.option(
        "--queue-type",
        envvar="FLUFFLE_QUEUE_TYPE",
        type=click.Choice(["classic", "quorum"]),
        default="classic",
        show_default=True,
        help=(
            "Use replicated quorum queues for a cluster of brokers. Everyone in a federation "
            "must choose the same type."
        ),
    )(command)


def main() -> None:
    """Run the command; every error is one line on stderr and a telling exit code."""
    prepare_streams()
    code = _exit_code()
    settle_streams()
    sys.exit(code)


def _exit_code() -> int:
    try:
        return fluffle.main(standalone_mode=False) or 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except SystemExit as ends:
        return ends.code if isinstance(ends.code, int) else int(ends.code is not None)
    except click.MissingParameter as wrong:
        return _said(_what_is_missing(wrong), wrong.exit_code)
    except click.ClickException as wrong:
        return _said(wrong.format_message(), wrong.exit_code)
    except ReaderGone as enough:
        return enough.exit_code
    except FluffleError as wrong:
        return _said(str(wrong), wrong.exit_code)
    except Exception as wrong:
        if _debugging():
            traceback.print_exc()
        return _said(unexpected(wrong), _FAILED)


def _said(text: str, code: int) -> int:
    echo_sentences(f"fluffle: {one_line(text)}", err=True)
    return code


def _what_is_missing(wrong: click.MissingParameter) -> str:
    """Name a parameter that was not given, and where to read about it."""
    if wrong.param is None or wrong.ctx is None:
        return wrong.format_message()
    command = wrong.ctx.command_path
    name = wrong.param.make_metavar(wrong.ctx)
    if isinstance(wrong.param, click.Option):
        name = f"{wrong.param.opts[0]} {name}"
    return f"{command} needs {name}; '{command} --help' says more"


def _debugging() -> bool:
    return os.environ.get("FLUFFLE_DEBUG", "").lower() not in ("", "0", "false", "no", "off")


def unexpected(wrong: BaseException) -> str:
    """Say an error that nobody foresaw in one line.

    The system's refusals are about a file or the machine; all else is a bug of ours.
    """
    while isinstance(wrong, BaseExceptionGroup):
        wrong = wrong.exceptions[0]
    what = f"{type(wrong).__name__}: {wrong}".removesuffix(": ")
    if isinstance(wrong, FluffleError):
        return str(wrong)
    if isinstance(wrong, MemoryError):
        return "out of memory"
    if isinstance(wrong, OSError) and wrong.filename is not None:
        return f"cannot use {os.fsdecode(wrong.filename)} ({wrong.strerror})"
    if isinstance(wrong, OSError) and wrong.errno in _NO_ROOM:
        return f"cannot write ({wrong.strerror})"
    if isinstance(wrong, ModuleNotFoundError) and not (wrong.name or "").startswith("fluffle"):
        return (
            f"the package '{wrong.name}' is missing; install it with 'make install' in a "
            "clone, else with pip install 'fluffle[all]'"
        )
    frames = traceback.extract_tb(wrong.__traceback__)
    ours = [frame for frame in frames if "fluffle_" in frame.filename] or list(frames)
    where = f", at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return (
        f"unexpected error, a bug in fluffle ({what}{where}); please report it with the "
        "traceback that FLUFFLE_DEBUG=1 shows"
    )
