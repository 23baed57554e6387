"""``fluffle broker``: a private RabbitMQ node, user permissions and queue limits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import (
    Group,
    federation_option,
    management_option,
    queue_type_option,
    url_option,
)
from fluffle_common.cli.printing import can_redraw, echo, echo_json, printable

if TYPE_CHECKING:
    from fluffle_broker.node.record import NodeInfo, Ports

_NOT_RUNNING = 3  # the exit code of `status`, as in systemctl, and of BrokerError


_state_option = click.option(
    "--state",
    envvar="FLUFFLE_STATE",
    default=".fluffle",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for the private broker's configuration, data and logs.  [default: $FLUFFLE_STATE, "
    "else .fluffle in the current folder]",
)


def _port_option(
    flag: str, what: str, default: int, zero: str = "a free port"
) -> Callable[[Any], Any]:
    return click.option(
        flag,
        type=click.IntRange(0, 65535),
        default=None,
        metavar="N",
        help=f"Port for {what}; 0 chooses {zero}.  [default: {default}]",
    )


@click.group(cls=Group)
def broker() -> None:
    """Run a private RabbitMQ server on this machine.

    The broker listens on 127.0.0.1 only, keeps all its files in one folder and needs no root
    permissions. If rabbitmq-server is installed, fluffle starts it. Otherwise, fluffle unpacks
    Debian packages into ~/.cache/fluffle without installing them. If apt cannot provide the
    packages, fluffle runs RabbitMQ in Docker. Coordinators and workers that you start in the
    same folder find the broker automatically.

    \b
      fluffle broker up            start the broker, or show where it runs
      fluffle broker status        show whether the broker is up
      fluffle broker down          stop the broker, and keep its data
      fluffle broker permissions   show the permissions that a user needs
      fluffle broker apply-policy  limit the queues on another broker
    """


@broker.command()
@_state_option
@_port_option(
    "--port", "AMQP", 5673, zero="a free port, also for each port option that is not given"
)
@_port_option("--management-port", "the management pages and HTTP API", 15673)
@_port_option("--prometheus-port", "Prometheus metrics", 15693)
def up(
    state: Path,
    port: int | None,
    management_port: int | None,
    prometheus_port: int | None,
) -> None:
    """Start the broker of this folder and wait until it is ready.

    The broker keeps running when this terminal is closed. If it is already up, the command shows
    where it runs. Durable queues survive a stop or a crash of the broker.

    \b
      fluffle broker up
      fluffle broker up --state /tmp/second --port 0   a second broker
    """
    from fluffle_broker.node import node

    running = node.running_node(state)
    if running is not None:
        echo(f"RabbitMQ {running.version} is already up")
        if port not in (None, 0, running.ports.amqp):
            echo(f"  to move the broker to port {port}, run 'fluffle broker down' first")
        _show(running, state)
        return
    ports = chosen_ports(port, management_port, prometheus_port)
    with _progress() as report:
        info = node.up(state, ports=ports, report=report)
    echo(f"RabbitMQ {info.version} is up")
    _show(info, state)


@broker.command()
@_state_option
def down(state: Path) -> None:
    """Stop the broker of this folder.

    The messages in durable queues stay on disk.
    """
    from fluffle_broker.node import node

    with _progress() as report:
        stopped = node.down(state, report=report)
    echo("RabbitMQ is stopped" if stopped else f"no broker is running in {state}")


@broker.command()
@_state_option
@click.option("--json", "as_json", is_flag=True, help="Print the status as one JSON object.")
@click.pass_context
def status(ctx: click.Context, state: Path, as_json: bool) -> None:
    """Show whether the broker of this folder is up.

    The exit code is 0 if the broker is up, and 3 if it is not.
    """
    from fluffle_broker.node import node

    info = node.running_node(state)
    if as_json:
        echo_json(_as_dict(info))
    elif info is None:
        echo(f"no broker is running in {state}; start one with 'fluffle broker up'")
    else:
        echo(f"RabbitMQ {info.version} is up")
        _show(info, state)
    if info is None:
        ctx.exit(_NOT_RUNNING)


@broker.command()
@federation_option
@click.option(
    "--worker",
    "workers",
    multiple=True,
    metavar="NAME",
    help="Worker ID, which is also the name of the worker's RabbitMQ user. For several "
    "workers, repeat the option.",
)
@click.option(
    "--coordinator", is_flag=True, help="Print the permissions of the coordinator's RabbitMQ user."
)
@click.option(
    "--coordinator-user",
    metavar="NAME",
    help="Name of the coordinator's RabbitMQ user.  [default: FEDERATION-coordinator]",
)
@click.option(
    "--vhost", default="/", show_default=True, metavar="NAME", help="Name of the RabbitMQ vhost."
)
@queue_type_option
def permissions(**options: Any) -> None:
    """Print the minimal permissions of a RabbitMQ user.

    The command prints rabbitmqctl commands that work on any broker. The new permissions replace all
    earlier permissions of the user in the vhost. Start the coordinator with --verify-users, so that
    no worker can impersonate another worker. docs/permissions.md explains each permission.

    \b
      fluffle broker permissions --federation letters --coordinator
      fluffle broker permissions --federation letters --worker alice --worker bob
    """
    from fluffle_broker.node import permissions
    from fluffle_common.cli.settings import check_federation, check_worker
    from fluffle_common.errors import UsageError
    from fluffle_common.protocol.topology import Topology

    topology = Topology(check_federation(options["federation"]), options["queue_type"])
    wanted = [
        permissions.worker_permissions(topology, check_worker(one)) for one in options["workers"]
    ]
    name = options["coordinator_user"] or f"{topology.federation}-coordinator"
    if options["coordinator"] or options["coordinator_user"]:
        wanted.insert(0, permissions.coordinator_permissions(topology, name))
    if not wanted:
        raise UsageError("no user is named; give --worker NAME, --coordinator, or both")
    for each in wanted:
        echo(*permissions.shell_lines(each, options["vhost"]))


@broker.command("apply-policy")
@federation_option
@url_option
@management_option
@click.option(
    "--print",
    "prints",
    is_flag=True,
    help="Print rabbitmqctl commands that set the policies, instead of setting them.",
)
def apply_policy(federation: str, url: str | None, management: str | None, prints: bool) -> None:
    """Limit the length of a federation's queues.

    A broker from 'fluffle broker up' already has the policies for every federation. For any other
    broker, run this command once for each federation, before or after its queues exist. The command
    sets the policies through the management API, which requires a user with the tag policymaker.
    With --print, it prints rabbitmqctl commands instead.

    To change a limit later, set the policy again with another number. A changed limit applies at
    once, without a restart. docs/brokers.md lists the limits.

    \b
      fluffle broker apply-policy --federation letters --url amqp://admin:pw@host
      fluffle broker apply-policy --federation letters --print
    """
    from fluffle_broker.cli.options import federation_and_broker
    from fluffle_broker.node import policies
    from fluffle_common.protocol import topology

    _, api = federation_and_broker(federation, url, management)
    wanted = topology.policies(federation)
    if prints:
        echo(*policies.shell_lines(wanted, api.vhost))
        return
    policies.apply(wanted, api)
    echo(
        f"set {len(wanted)} policies that limit the queues of federation {federation} in vhost "
        f"{api.vhost}"
    )


def chosen_ports(amqp: int | None, management: int | None, prometheus: int | None) -> Ports:
    """Fill in the ports that were not given: free ones with ``--port 0``, else the defaults."""
    from fluffle_broker.node.record import Ports

    default = Ports(0, 0, 0) if amqp == 0 else Ports()
    return Ports(
        amqp=default.amqp if amqp is None else amqp,
        management=default.management if management is None else management,
        prometheus=default.prometheus if prometheus is None else prometheus,
    )


def _show(info: NodeInfo, state: Path) -> None:
    import shlex

    from fluffle_common.transport.rabbitmq.urls import without_credentials

    option = "" if state == Path(".fluffle") else f" --state {shlex.quote(str(state))}"
    rows = {
        "AMQP": without_credentials(info.url),  # without a user, clients log in as guest
        "management": f"{info.management_url}  (guest / guest)",
        "metrics": info.prometheus_url,
        "process": f"{info.pid} ({info.started_as})" if info.pid else info.started_as,
        "logs": str(info.logs) if info.pid else "docker logs",
        "stop it": f"fluffle broker down{option}",
    }
    for name, value in rows.items():
        echo(f"  {name:<12}{value}")


def _as_dict(info: NodeInfo | None) -> dict[str, Any]:
    import dataclasses

    from fluffle_common.transport.rabbitmq.urls import without_credentials

    fields: dict[str, Any] = {"running": info is not None}
    if info is not None:
        fields |= {**dataclasses.asdict(info), "folder": str(info.folder), "logs": str(info.logs)}
        fields["url"] = without_credentials(info.url)
    return fields


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows progress on stderr: in place on a terminal, else in lines."""
    if not can_redraw(sys.stderr):
        yield lambda text: echo(f"{text} …", err=True)
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("looking for RabbitMQ") as status_line:
        yield lambda text: status_line.update(Text(printable(text)))
