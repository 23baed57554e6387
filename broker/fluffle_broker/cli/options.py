"""Options that the commands ``queues``, ``peek``, ``tap`` and ``rejected`` share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fluffle_common.cli.app import federation_option, url_option

if TYPE_CHECKING:
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.base import Link
    from fluffle_common.transport.rabbitmq.management import Management, QueueFigures

T = TypeVar("T")


def inspection_options(json_help: str, federation: Any = federation_option) -> Callable[[Any], Any]:
    """Return a decorator that adds ``--federation``, ``--url`` and ``--json``."""
    as_json = click.option("--json", "as_json", is_flag=True, help=json_help)
    return lambda command: federation(url_option(as_json(command)))


def federation_and_broker(
    federation: str, url: str | None, management: str | None
) -> tuple[Topology, Management]:
    """Return the federation's names and the broker's management API, or raise ``UsageError``."""
    from fluffle_common.cli.settings import broker_url_finder, check_federation, management_finder
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.urls import parse_urls

    address = broker_url_finder(url)()
    parse_urls(address)
    return Topology(check_federation(federation)), management_finder(management)(address)


def with_link(address: str, work: Callable[[Link], Awaitable[T]]) -> T:
    """Run a coroutine function on a link of its own, which has the name of the command."""
    from fluffle_common.transport.open_once import open_once
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport

    command = click.get_current_context().command_path

    async def run() -> T:
        async with open_once(AmqpTransport(address, command)) as link:
            return await work(link)

    return asyncio.run(run())


def available_figures(api: Management, topology: Topology) -> dict[str, QueueFigures]:
    """Return the queues' figures by name; an empty dict if the management API has none."""
    from fluffle_common.transport.rabbitmq.management import REQUEST_ERRORS

    with contextlib.suppress(*REQUEST_ERRORS):
        return {queue.name: queue for queue in api.queue_figures(topology)}
    return {}
