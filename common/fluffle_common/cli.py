"""The one command, ``fluffle``: sub-commands from entry points, errors in one line."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points, version
from typing import Any

import click

from fluffle_common.errors import FluffleError

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Commands(click.Group):
    """A group of the ``fluffle.commands`` entry points, each loaded when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name every installed sub-command, in alphabetical order."""
        return sorted({point.name for point in entry_points(group="fluffle.commands")})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load the one command that was asked for."""
        for point in entry_points(group="fluffle.commands", name=cmd_name):
            command: click.Command = point.load()
            return command
        return None

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


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("fluffle"), prog_name="fluffle")
def fluffle() -> None:
    """Federated learning over a message broker.

    A coordinator publishes global weights over RabbitMQ; workers train on data that stays with
    them and send updates back; as soon as a quorum has answered, the coordinator averages them
    and opens the next round. Start them in any order, on any machines that reach the broker:

    \b
      fluffle broker up                                   a private RabbitMQ on this machine
      fluffle coordinator --federation letters            opens rounds, averages, saves
      fluffle worker --federation letters --data DIR      one for each data owner
      fluffle queues --federation letters                 what is in the queues, in plain words
    """


def url_option(command: Any) -> Any:
    """Add ``--url`` to a command; None where neither the flag nor FLUFFLE_URL is set."""
    return click.option(
        "--url",
        envvar="FLUFFLE_URL",
        metavar="URL",
        help="The broker, amqp://user:password@host:port/vhost or amqps://…; of a cluster the URLs "
        "of several nodes, with commas between: whichever can be reached is used.  "
        "[default: $FLUFFLE_URL, else the broker started by 'fluffle broker up' here, "
        "else amqp://guest:guest@127.0.0.1:5672/]",
    )(command)


def federation_option(command: Any, *, required: bool = True) -> Any:
    """Add ``--federation`` to a command."""
    return click.option(
        "--federation",
        envvar="FLUFFLE_FEDERATION",
        required=required,
        metavar="NAME",
        help="Name of the federation; its queues on the broker start with it.",
    )(command)


def management_option(command: Any) -> Any:
    """Add ``--management`` to a command that asks RabbitMQ's management API."""
    return click.option(
        "--management",
        envvar="FLUFFLE_MANAGEMENT_URL",
        metavar="URL",
        help="RabbitMQ's management API, for the figures of the queues.  "
        "[default: that of the broker of --url, on its usual port]",
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
        help="quorum: replicated queues, for a cluster of brokers; the same for everyone.",
    )(command)


def main() -> None:
    """Run the command; every expected error is one line on stderr and a telling exit code."""
    try:
        code = fluffle.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.Abort:
        code = _INTERRUPTED
    except click.ClickException as wrong:
        click.echo(f"fluffle: {wrong.format_message()}", err=True)
        code = wrong.exit_code
    except FluffleError as wrong:
        click.echo(f"fluffle: {wrong}", err=True)
        code = wrong.exit_code
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; keep the interpreter from flushing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code or 0)
