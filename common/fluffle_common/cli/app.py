"""The program ``fluffle``: sub-commands from entry points, common options, error handling."""

from __future__ import annotations

import errno
import gc
import itertools
import math
import os
import re
import signal
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, cast

import click

from fluffle_common.cli.exit_now import Interrupted, exit_soon, reset_when_delivered
from fluffle_common.cli.open_files import too_many_files
from fluffle_common.cli.printing import (
    ReaderGone,
    echo,
    echo_sentences,
    one_line,
    prepare_streams,
    settle_streams,
)
from fluffle_common.errors import FluffleError
from fluffle_common.installed import installed

_GROUP = "fluffle.commands"
_INTERRUPTED = 130  # 128 + SIGINT, as in shells
_FAILED = 1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# Imports, and the messages of a round, create thousands of small objects, few of them in reference
# cycles. With Python's defaults, the collector takes 10 to 25 % of the time of a start.
_GC_THRESHOLDS = (10_000, 20, 20)
_MOST_SECONDS = 10**9  # 30 years, about the most that clocks and timers can handle
MOST_COUNT = 2**31 - 1
MOST_SEED = 2**63 - 1
# Limits of clocks, timers and the wire, which appear in errors but not in the help.
_SILENT_LIMITS = (MOST_COUNT, MOST_SEED, _MOST_SECONDS)


class _Range(click.ParamType[Any]):
    """A range of numbers whose upper limit may be silent; NaN and infinity are in none."""

    placeholder: str  # for the value in the help
    number: click.ParamType[Any]  # parses a number, whatever its size
    min: Any
    max: Any
    min_open: bool

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return self.placeholder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = self.number.convert(value, param, ctx)
        if isinstance(number, float) and not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        if self.max in _SILENT_LIMITS and number > self.max:
            self.fail(f"{value} is too large; the maximum is {self.max:,}", param, ctx)
        return super().convert(value, param, ctx)

    def _describe_range(self) -> str:
        if self.max not in (None, *_SILENT_LIMITS):
            return str(super()._describe_range())  # type: ignore[misc]
        return "" if self.min is None else f"x{'>' if self.min_open else '>='}{self.min:g}"


class FiniteFloat(_Range, click.FloatRange):
    """A range of finite numbers."""

    name, placeholder, number = "number", "X", click.FLOAT


class Seconds(FiniteFloat):
    """A duration in seconds."""

    placeholder = "SECONDS"


class WholeNumber(_Range, click.IntRange):
    """A range of whole numbers."""

    name, placeholder, number = "whole number", "N", click.INT


def seconds(least: float = 0.0, most: float = _MOST_SECONDS, *, min_open: bool = False) -> Any:
    """Return the type of an option for a duration in seconds."""
    return Seconds(least, most, min_open=min_open)


def count(least: int = 1, most: int = MOST_COUNT) -> Any:
    """Return the type of an option for a count."""
    return WholeNumber(least, most)


SEED = WholeNumber(0, MOST_SEED)
"""The type of a seed, within the range of the wire, NumPy and JAX."""


# The sections of `fluffle --help`; other commands come last.
_SECTIONS = {
    "Run a federation": ("broker", "coordinator", "worker", "simulate", "strategies"),
    "Inspect a federation": (
        "explain",
        "queues",
        "dashboard",
        "journal",
        "tap",
        "peek",
        "rejected",
    ),
    "Inspect a run": ("history", "plot", "report", "replay"),
    "Letters example": ("letters", "predict", "confusion"),
}


class Group(click.Group):
    """A group of commands that suggests a similar one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or suggest a similar one."""
        import difflib

        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name, self.list_commands(ctx))
            # Swapped letters are the likeliest mistake.
            near.sort(key=lambda command: sorted(command) != sorted(name))
            hint = f"did you mean '{near[0]}'?" if near else f"see '{ctx.command_path} --help'"
            raise click.UsageError(f"unknown command '{name}'; {hint}", ctx)
        return super().resolve_command(ctx, args)


class Commands(Group):
    """The group of the ``fluffle.commands`` entry points, each imported when it is used."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; an empty argument, such as of an unset variable, is an error."""
        for before, text in itertools.pairwise(["fluffle", *args]):
            if text == "" or re.fullmatch("--[a-z-]+=", text):
                raise click.UsageError(
                    f"the argument after '{text or before}' is empty; check whether a shell "
                    "variable in the command is unset"
                )
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the installed sub-commands, sorted."""
        return sorted(installed(_GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        point = installed(_GROUP).get(cmd_name)
        return None if point is None else cast("click.Command", point.load())

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands in sections."""
        commands = self.list_commands(ctx)
        width = max(map(len, commands))
        sections = {
            head: [name for name in names if name in commands] for head, names in _SECTIONS.items()
        }
        placed = {name for names in sections.values() for name in names}
        sections["More"] = [name for name in commands if name not in placed]
        for head, names in sections.items():
            rows = [
                (f"{name:<{width}}", command.get_short_help_str(formatter.width - 6 - width))
                for name in names
                if (command := self.get_command(ctx, name)) is not None
            ]
            if rows:
                with formatter.section(head):
                    formatter.write_dl(rows)


def _remember_debug(_: click.Context, __: click.Parameter, wanted: bool) -> None:
    if wanted:  # for `main`, which runs outside of click's context
        os.environ["FLUFFLE_DEBUG"] = "1"


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("fluffle"), prog_name="fluffle")
@click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show the traceback of an unexpected error, and log each event with the actions that "
    "follow from it. The environment variable FLUFFLE_DEBUG=1 also turns this option on.",
)
def fluffle() -> None:
    """Federated learning over a message broker.

    A coordinator publishes the global weights over RabbitMQ. Workers train on data that stays with
    them and send updates back. When a quorum of updates has arrived, the coordinator averages them
    and opens the next round. Start the broker, the coordinator and the workers in any order. The
    coordinator and the workers can run on any machine that can reach the broker:

    \b
      fluffle broker up                                a private RabbitMQ server
      fluffle coordinator --federation letters         opens rounds, averages
      fluffle worker --federation letters --data DIR   one for each data owner
      fluffle queues --federation letters              what is in the queues
    """
    if _debugging():
        from fluffle_common.cli.debug_log import show_debug_log

        show_debug_log()


url_option = click.option(
    "--url",
    envvar="FLUFFLE_URL",
    metavar="URL",
    help="URL of the broker: amqp://user:password@host:port/vhost or, with TLS, amqps://…. "
    "For a cluster, give the URLs of several nodes, separated by commas; the command uses any "
    "node that it can reach.  [default: $FLUFFLE_URL, else the broker that 'fluffle broker "
    "up' started in the current folder, else amqp://guest:guest@127.0.0.1:5672/]",
)
"""The option ``--url``; its value is None if neither it nor FLUFFLE_URL is set."""


def _federation_option(*, required: bool) -> Callable[[Any], Any]:
    return click.option(
        "--federation",
        envvar="FLUFFLE_FEDERATION",
        required=required,
        metavar="NAME",
        help="Name of the federation. The names of its queues begin with this name.",
    )


federation_option = _federation_option(required=True)
optional_federation = _federation_option(required=False)

management_option = click.option(
    "--management",
    envvar="FLUFFLE_MANAGEMENT_URL",
    metavar="URL",
    help="URL of RabbitMQ's management API, for queue statistics and policies.  [default: the "
    "API of the broker that 'fluffle broker up' started in the current folder, else port 15672 "
    "(with TLS, 15671) on the host of --url]",
    show_default=False,
)

queue_type_option = click.option(
    "--queue-type",
    envvar="FLUFFLE_QUEUE_TYPE",
    type=click.Choice(["classic", "quorum"]),
    default="classic",
    show_default=True,
    help="Type of the federation's queues. A cluster of brokers replicates queues of type "
    "'quorum'. Use the same type for the coordinator, all workers, 'fluffle tap' and "
    "'fluffle dashboard'.",
)


def main() -> NoReturn:
    """Run the program; an error becomes one line on stderr and an exit code."""
    gc.set_threshold(*_GC_THRESHOLDS)
    reset_when_delivered(signal.SIGINT)  # a task that is being loaded may be in C code
    prepare_streams()
    code = _exit_code()
    settle_streams()
    exit_soon(code)


def _exit_code() -> int:
    try:
        return fluffle.main(prog_name="fluffle", standalone_mode=False) or 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except Interrupted as signalled:
        return signalled.exit_code
    except SystemExit as exits:
        return exits.code if isinstance(exits.code, int) else int(exits.code is not None)
    except click.exceptions.NoArgsIsHelpError as asked:
        echo(*asked.format_message().splitlines(), err=True)
        return asked.exit_code
    except click.MissingParameter as wrong:
        return _print_error(_missing_parameter(wrong), wrong.exit_code)
    except click.ClickException as wrong:
        return _print_error(wrong.format_message(), wrong.exit_code)
    except ReaderGone as gone:
        return gone.exit_code
    except FluffleError as wrong:
        return _print_error(str(wrong), wrong.exit_code)
    except Exception as wrong:
        if str(wrong).endswith("KeyboardInterrupt: "):  # Ctrl-C while pydantic built a schema
            return _INTERRUPTED
        if _debugging():
            traceback.print_exc()
        return _print_error(unexpected(wrong), _FAILED)


def _print_error(text: str, code: int) -> int:
    echo_sentences(f"fluffle: {one_line(text)}", err=True)
    return code


def _missing_parameter(wrong: click.MissingParameter) -> str:
    """Return an error that names the missing parameter and the command's help."""
    if wrong.param is None or wrong.ctx is None:
        return wrong.format_message()
    command = wrong.ctx.command_path
    name = wrong.param.make_metavar(wrong.ctx)
    if isinstance(wrong.param, click.Option):
        name = f"{wrong.param.opts[0]} {name}"
    return f"{command} needs {name}; see '{command} --help'"


def _debugging() -> bool:
    return os.environ.get("FLUFFLE_DEBUG", "").lower() not in ("", "0", "false", "no", "off")


def unexpected(wrong: BaseException) -> str:
    """Describe an unexpected error in one line: one of the system, or else a bug in fluffle."""
    while isinstance(wrong, BaseExceptionGroup):
        wrong = wrong.exceptions[0]
    what = f"{type(wrong).__name__}: {wrong}".removesuffix(": ")
    if isinstance(wrong, FluffleError):
        return str(wrong)
    if isinstance(wrong, MemoryError):
        return "out of memory; end other programs, or use a machine with more memory"
    if isinstance(wrong, OSError) and (text := too_many_files(wrong)):
        return text
    if isinstance(wrong, OSError) and wrong.filename is not None:
        return f"cannot use {os.fsdecode(wrong.filename)} ({wrong.strerror})"
    if isinstance(wrong, FileNotFoundError) and wrong.errno:  # from getcwd(), which names no file
        return "the current folder was removed; change to an existing folder"
    if isinstance(wrong, OSError) and wrong.errno in _NO_ROOM:
        return f"cannot write a file ({wrong.strerror}); check the disk and its free space"
    if isinstance(wrong, ModuleNotFoundError) and not (wrong.name or "").startswith("fluffle"):
        return (
            f"the package '{wrong.name}' is missing; run pip install 'fluffle[all]' or, in a clone "
            "of the repository, 'make install'"
        )
    frames = traceback.extract_tb(wrong.__traceback__)
    ours = [frame for frame in frames if "fluffle_" in frame.filename] or list(frames)
    where = f", at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return (
        f"unexpected error, caused by a bug in fluffle ({what}{where}); set FLUFFLE_DEBUG=1, run "
        "the command again and report the bug with the traceback"
    )
