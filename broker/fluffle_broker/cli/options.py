"""What every looking command is told: which federation, on which broker, and for whose eyes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import federation_option, url_option

if TYPE_CHECKING:
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.management import QueueFigures


def looking(json_words: str, *, required: bool = True) -> Callable[[Any], Any]:
    """Add ``--federation``, ``--url`` and ``--json``, which prints what ``json_words`` say."""

    def add(command: Any) -> Any:
        as_json = click.option("--json", "as_json", is_flag=True, help=json_words)
        return federation_option(url_option(as_json(command)), required=required)

    return add


def where(federation: str, url: str | None) -> tuple[Topology, str]:
    """Return the names of the federation and the broker's URL, both checked.

    Raises:
        UsageError: where one cannot be.
    """
    from fluffle_common.cli.settings import broker_url, check_federation
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.urls import parse_urls

    address = broker_url(url)
    parse_urls(address)
    return Topology(check_federation(federation)), address


def figures_if_told(address: str, base: str, topology: Topology) -> dict[str, QueueFigures]:
    """Return RabbitMQ's figures of the queues by name; empty where they cannot be had."""
    from fluffle_common.transport.rabbitmq.management import UNTOLD, queue_figures

    with contextlib.suppress(*UNTOLD):
        return {queue.name: queue for queue in queue_figures(address, base, topology)}
    return {}
