"""``fluffle broker``: the private RabbitMQ node of a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import (
    federation_option,
    management_option,
    queue_type_option,
    url_option,
)
from fluffle_common.cli.printing import echo, echo_json, is_terminal, printable

if TYPE_CHECKING:
    from fluffle_broker.node.record import NodeInfo, Ports

_NOT_RUNNING = 3  # the exit code of `status`, as of systemctl, and of BrokerError


def _state_option(command: Any) -> Any:
    return click.option(
        "--state",
        envvar="FLUFFLE_STATE",
        default=".fluffle",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="Folder of this node's files: configuration, data, logs.  "
        "[default: $FLUFFLE_STATE, else .fluffle here]",
    )(command)


def _port_option(
    flag: str, what: str, default: int, zero: str = "a free one"
) -> Callable[[Any], Any]:
    return click.option(
        flag,
        type=click.IntRange(0, 65535),
        default=None,
        metavar="N",
        help=f"Port for {what}; 0 chooses {zero}.  [default: {default}]",
    )


@click.group()
def broker() -> None:
    """Run a private RabbitMQ on this machine.

    It listens on 127.0.0.1 only, keeps every file in one folder and needs no root. An installed
    rabbitmq-server is used where there is one; where there is apt, Debian's packages are unpacked
    into ~/.cache/fluffle without installing them; elsewhere it runs in Docker. The coordinator and
    the workers started in the same folder find it by themselves.

    \b
      fluffle broker up            start it, or say where it runs already
      fluffle broker status        is it up, since when, how much memory
      fluffle broker down          stop it; its data stays for the next 'up'
      fluffle broker permissions   the least that a worker's user needs
      fluffle broker apply-policy  how much the queues may hold, on another broker
    """


@broker.command()
@_state_option
@_port_option("--port", "AMQP", 5673, zero="free ones for all that are not given")
@_port_option("--management-port", "the management pages and HTTP API", 15673)
@_port_option("--prometheus-port", "Prometheus metrics", 15693)
@click.option(
    "--node-name",
    default="fluffle",
    show_default=True,
    metavar="NAME",
    help="Erlang's name for the node; the node's data is stored under this name.",
)
def up(
    state: Path,
    port: int | None,
    management_port: int | None,
    prometheus_port: int | None,
    node_name: str,
) -> None:
    """Start the broker of this folder and wait until it serves.

    It goes on when this terminal is closed. Run again, it says where the broker is. What was in
    its durable queues is there again after a stop or a crash.

    \b
      fluffle broker up
      fluffle broker up --state /tmp/second --port 0      one more, on free ports
    """
    from fluffle_broker.node import node

    running = node.running_node(state)
    if running is not None:
        echo(f"RabbitMQ {running.version} is up already")
        if port not in (None, 0, running.ports.amqp):
            echo(f"  to move it to port {port}, run 'fluffle broker down' first")
        _show(running, state)
        return
    ports = chosen_ports(port, management_port, prometheus_port)
    with _progress() as say:
        info = node.up(state, ports=ports, node_name=node_name, say=say)
    echo(f"RabbitMQ {info.version} is up")
    _show(info, state)


@broker.command()
@_state_option
def down(state: Path) -> None:
    """Stop the broker of this folder.

    What is in durable queues stays on disk.
    """
    from fluffle_broker.node import node

    with _progress() as say:
        stopped = node.down(state, say=say)
    echo("RabbitMQ is stopped" if stopped else f"no broker is running in {state}")


@broker.command()
@_state_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_context
def status(ctx: click.Context, state: Path, as_json: bool) -> None:
    """Tell whether the broker of this folder is up.

    The exit code is 0 if it is, 3 if not.
    """
    from fluffle_broker.node import health, node

    info = node.running_node(state)
    figures = health.figures(info) if info else None
    if as_json:
        echo_json(_as_dict(info, figures))
    elif info is None:
        echo(f"no broker is running in {state}; 'fluffle broker up' starts one")
    else:
        echo(f"RabbitMQ {info.version} is up")
        if figures is not None:
            echo(f"  uptime      {_duration(figures.uptime_s)}")
            echo(f"  memory      {figures.memory_bytes / 1e6:.0f} MB")
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
    help="A worker's id, which is also the name of its user; may be given several times.",
)
@click.option("--coordinator", is_flag=True, help="Print the rights of the coordinator's user.")
@click.option(
    "--coordinator-user",
    metavar="NAME",
    help="Name of the coordinator's user.  [default: FEDERATION-coordinator]",
)
@click.option("--vhost", default="/", show_default=True, metavar="NAME", help="Where.")
@queue_type_option
@click.option(
    "--apply",
    "applies",
    is_flag=True,
    help=(
        "Grant the rights on the private broker of this folder. A missing user is created "
        "with a random password, which is printed once on standard output."
    ),
)
@click.option("--ask-password", is_flag=True, help="With --apply: ask for each user's password.")
@_state_option
def permissions(**options: Any) -> None:
    """Print the least rights that a user of RabbitMQ needs.

    As rabbitmqctl lines, for any broker; with --apply they are granted on the private one. They
    replace what the user may do in the vhost. Let the coordinator run with --verify-users, so that
    a worker is who it logs in as. docs/rights.md says what each right is for.

    \b
      fluffle broker permissions --federation letters --coordinator
      fluffle broker permissions --federation letters --worker alice --worker bob
      fluffle broker permissions --federation letters --worker alice --apply
    """
    from fluffle_broker.node import permissions
    from fluffle_common.cli.settings import check_federation, check_worker
    from fluffle_common.errors import UsageError
    from fluffle_common.protocol.topology import Topology

    topology = Topology(check_federation(options["federation"]), options["queue_type"])
    wanted = [permissions.worker_rights(topology, check_worker(one)) for one in options["workers"]]
    name = options["coordinator_user"] or f"{topology.federation}-coordinator"
    if options["coordinator"] or options["coordinator_user"]:
        wanted.insert(0, permissions.coordinator_rights(topology, name))
    if not wanted:
        raise UsageError("no user is named; give --worker NAME, --coordinator, or both")
    run = permissions.runner([_rabbitmqctl(options["state"])]) if options["applies"] else None
    for each in wanted:
        if run is None:
            echo(*permissions.shell_lines(each, options["vhost"]))
            continue
        password = None
        if options["ask_password"]:
            password = click.prompt(f"password of {each.user}", hide_input=True, err=True)
        made_up = permissions.apply(each, options["vhost"], run, password)
        shown = f"; created with the password {made_up}" if made_up else ""
        echo(f"user {each.user} has its rights in vhost {options['vhost']}{shown}")


@broker.command("apply-policy")
@federation_option
@url_option
@management_option
@click.option("--print", "prints", is_flag=True, help="Print rabbitmqctl lines instead.")
def apply_policy(federation: str, url: str | None, management: str | None, prints: bool) -> None:
    """Set how much a federation's queues may hold.

    For a broker of your own. It sets policies by the management API, which takes a user with the
    tag policymaker; with --print, as rabbitmqctl lines. Once for each federation, before or after
    its queues are made. The node of 'fluffle broker up' has them for every federation already.

    To change a limit later, set the policy again with another number: it holds at once, and nobody
    has to start anew. docs/brokers.md has the limits.

    \b
      fluffle broker apply-policy --federation letters --url amqp://admin:pw@host
      fluffle broker apply-policy --federation letters --print
    """
    from urllib.parse import unquote

    from fluffle_broker.node import policies
    from fluffle_common.cli.settings import broker_url, check_federation, management_of
    from fluffle_common.protocol import topology
    from fluffle_common.transport.rabbitmq.management import vhost

    wanted = topology.policies(check_federation(federation))
    address = broker_url(url)
    where = unquote(vhost(address))
    if prints:
        echo(*policies.shell_lines(wanted, where))
        return
    policies.apply(wanted, address, management_of(address, management))
    echo(f"the queues of federation {federation} are limited by {len(wanted)} policies in {where}")


def _rabbitmqctl(state: Path) -> str:
    """Return what talks to the node of a folder."""
    from fluffle_broker.node import node
    from fluffle_common.errors import BrokerError

    info = node.running_node(state)
    if info is None:
        raise BrokerError(f"no broker is running in {state}; 'fluffle broker up' starts one")
    if info.started_as == "docker":
        raise BrokerError(
            "the broker runs in a container; leave --apply out to print the lines, and run "
            "them there with 'docker exec'"
        )
    return str(info.folder / "rabbitmqctl")


def chosen_ports(amqp: int | None, management: int | None, prometheus: int | None) -> Ports:
    """Complete the ports of the command line: ``--port 0`` alone means free ones for all."""
    from fluffle_broker.node.record import Ports

    usual = Ports(0, 0, 0) if amqp == 0 else Ports()
    return Ports(
        amqp=usual.amqp if amqp is None else amqp,
        management=usual.management if management is None else management,
        prometheus=usual.prometheus if prometheus is None else prometheus,
    )


def _show(info: NodeInfo, state: Path) -> None:
    import shlex

    from fluffle_common.transport.rabbitmq.urls import without_credentials

    option = "" if state == Path(".fluffle") else f" --state {shlex.quote(str(state))}"
    rows = {
        "AMQP": without_credentials(info.url),  # guest is the user where none is named
        "management": f"{info.management_url}  (guest / guest)",
        "metrics": info.prometheus_url,
        "process": f"{info.pid} ({info.started_as})" if info.pid else info.started_as,
        "logs": str(info.logs) if info.pid else "docker logs",
        "stop it": f"fluffle broker down{option}",
    }
    for name, value in rows.items():
        echo(f"  {name:<12}{value}")


def _as_dict(info: NodeInfo | None, figures: Any) -> dict[str, Any]:
    import dataclasses

    from fluffle_common.transport.rabbitmq.urls import without_credentials

    shown: dict[str, Any] = {"running": info is not None}
    if info is not None:
        shown |= {**dataclasses.asdict(info), "folder": str(info.folder), "logs": str(info.logs)}
        shown["url"] = without_credentials(info.url)
        shown |= {"uptime_s": None, "memory_bytes": None}
    if figures is not None:
        shown |= dataclasses.asdict(figures)
    return shown


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    shown = [f"{number} {unit}" for number, unit in parts if number]
    return " ".join(shown[:2]) or "0 s"


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show what is being done on stderr: in place on a terminal, else a line each."""
    if not is_terminal(sys.stderr):
        yield lambda text: echo(f"{text} …", err=True)
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("looking for RabbitMQ") as shown:
        yield lambda text: shown.update(escape(printable(text)))
