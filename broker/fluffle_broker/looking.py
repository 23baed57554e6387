"""What every looking command is told: which federation, on which broker, and for whose eyes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli import federation_option, url_option

if TYPE_CHECKING:
    from rich.console import Console

    from fluffle_common.topology import Topology


def looking(json_words: str, *, required: bool = True) -> Callable[[Any], Any]:
    """Add ``--federation``, ``--url`` and ``--json``, which prints what ``json_words`` say."""

    def add(command: Any) -> Any:
        as_json = click.option("--json", "as_json", is_flag=True, help=json_words)
        return federation_option(url_option(as_json(command)), required=required)

    return add


def management_option(command: Any) -> Any:
    """Add ``--management``."""
    return click.option(
        "--management",
        envvar="FLUFFLE_MANAGEMENT_URL",
        metavar="URL",
        help="RabbitMQ's management API.  "
        "[default: that of the broker of --url, on its usual port]",
    )(command)


def where(federation: str, url: str | None) -> tuple[Topology, str]:
    """Return the names of the federation and the broker's URL, both checked.

    Raises:
        UsageError: where one cannot be.
    """
    from fluffle_common.settings import broker_url, check_federation
    from fluffle_common.topology import Topology
    from fluffle_common.urls import parse_urls

    address = broker_url(url)
    parse_urls(address)
    return Topology(check_federation(federation)), address


def management_of(url: str, given: str | None) -> str:
    """Return where the management API of the broker should be."""
    from fluffle_common.management import management_base
    from fluffle_common.settings import node_record, state_folder

    return management_base(url, given, node_record(state_folder()))


def screen() -> Console:
    """Return where tables are drawn: as wide as the terminal, and wide enough in a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
