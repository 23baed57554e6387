"""``fluffle dashboard``: the live page, served independently of the coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fluffle_common.cli.app import (
    federation_option,
    management_option,
    queue_type_option,
    url_option,
)

if TYPE_CHECKING:
    from fluffle_common.protocol.topology import QueueType


@click.command(context_settings={"show_default": True})
@federation_option
@url_option
@click.option(
    "--listen",
    "address",
    default="127.0.0.1:8080",
    metavar="HOST:PORT",
    help="Address of the page; port 0 chooses a free port.",
)
@management_option
@queue_type_option
def dashboard(
    federation: str, url: str | None, address: str, management: str | None, queue_type: QueueType
) -> None:
    """Show a federation on a live page.

    The page shows rounds, workers, queues and rejected messages. The command runs on any machine
    that can reach the broker, and changes nothing. It reads the journal, copies of the workers'
    heartbeats, and RabbitMQ's management API. You can start and stop it at any time, and it keeps
    running during outages of the broker or the coordinator. The page's server also provides
    /metrics for Prometheus, /healthz, /readyz and /api/board.

    'fluffle coordinator --dashboard' serves the same page from the coordinator itself.

    \b
      fluffle dashboard --federation letters
      fluffle dashboard --federation letters --listen 0.0.0.0:9090
    """
    from fluffle_common.cli.console import warn
    from fluffle_common.cli.printing import echo
    from fluffle_common.cli.runtime import run_until_signalled
    from fluffle_common.cli.settings import broker_url_finder, check_federation
    from fluffle_common.installed import needs
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport

    with needs("the page needs starlette, uvicorn and prometheus-client", "dashboard"):
        from fluffle_coordinator.dashboard.broker_source import BrokerSource
        from fluffle_coordinator.dashboard.server import listen, url_of
    from fluffle_coordinator.dashboard.feed import queue_asker

    topology = Topology(check_federation(federation), queue_type)
    find = broker_url_finder(url)
    transport = AmqpTransport(find, f"fluffle dashboard of {federation}")
    page = BrokerSource(topology, transport, queue_asker(topology, find, management), report=warn)
    with listen(address, "--listen") as listening:
        echo(f"the page is at {url_of(listening)}")
        run_until_signalled(page.serve(listening))
