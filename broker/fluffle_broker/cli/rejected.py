"""``fluffle rejected``: list, show, requeue and purge rejected messages."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from fluffle_broker.cli.options import (
    available_figures,
    federation_and_broker,
    inspection_options,
    with_link,
)
from fluffle_common.cli.app import Group, management_option, optional_federation
from fluffle_common.cli.app import count as counts
from fluffle_common.cli.printing import aligned, echo, echo_json, echo_sentences, text_table
from fluffle_common.errors import UsageError
from fluffle_common.plural import plural

if TYPE_CHECKING:
    from fluffle_broker.inspect.rejected import Rejected, Requeued
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.management import Management

_WIDEST = 40  # characters of what a sender can choose, so that a row fits most terminals
# These options may stand before the sub-command or after it.
_common_options = inspection_options("Print the result as JSON.", optional_federation)


@click.group(cls=Group, invoke_without_command=True)
@_common_options
@management_option
@click.option(
    "-n", "--count", default=20, show_default=True, type=counts(), metavar="N",
    help="Maximum number of messages to list; the command lists the newest messages.",
)  # fmt: skip
@click.pass_context
def rejected(ctx: click.Context, /, **options: Any) -> None:
    """List, show, requeue or purge rejected messages.

    An invalid message (damaged, from another run, with NaN values …) is moved to the federation's
    queue 'rejected', together with the reason. Beyond the queue's limit (docs/brokers.md), the
    oldest messages are dropped. The oldest message that is kept has number 1, so the numbers shift
    when a message is dropped.

    RabbitMQ does not report how many messages the queue dropped. fluffle computes this number from
    RabbitMQ's statistics since the broker started: published minus removed minus present. If the
    statistics are missing or out of date, the number is shown as unknown.

    \b
      fluffle rejected --federation letters
      fluffle rejected show 3 --federation letters
      fluffle rejected requeue 3 --federation letters    after fixing the cause
      fluffle rejected requeue --all --federation letters
      fluffle rejected purge --federation letters
    """
    ctx.obj = options
    if ctx.invoked_subcommand is None:
        topology, api, as_json = _target(options)
        given = ctx.get_parameter_source("count") is not ParameterSource.DEFAULT
        # JSON has all messages unless --count is given.
        most = options["count"] if given or not as_json else None
        _list(topology, api, most, as_json)


def _target(
    options: Mapping[str, Any], group: Mapping[str, Any] | None = None
) -> tuple[Topology, Management, bool]:
    """Return the federation, the management API and ``--json``, given here or to the group."""
    merged = {**options}
    for name, value in (group or {}).items():
        merged[name] = merged.get(name) or value
    if not merged["federation"]:
        raise UsageError("no federation is given; use --federation or set FLUFFLE_FEDERATION")
    found = federation_and_broker(merged["federation"], merged["url"], merged["management"])
    return *found, merged["as_json"]


def _list(topology: Topology, api: Management, most: int | None, as_json: bool) -> None:
    from fluffle_broker.inspect.rejected import dropped, list_rejected

    rejects = with_link(api.url, lambda link: list_rejected(link, topology))
    figures = available_figures(api, topology)
    gone = dropped(figures.get(topology.rejected), len(rejects))
    listed = rejects if most is None else rejects[-most:]
    if as_json:
        now = time.time()
        entries = [message.as_dict(now) for message in listed]
        echo_json({"kept": len(rejects), "dropped": gone, "messages": entries})
        return
    echo_sentences(f"{topology.rejected}: {_how_many(len(rejects), gone)}")
    if rejects:
        causes = Counter(message.cause for message in rejects).most_common()
        echo_sentences("by cause: " + ", ".join(f"{cause} {count:,}" for cause, count in causes))
        _print_rows(listed)


def _how_many(kept: int, gone: int | None) -> str:
    if gone is None:
        return (
            f"{plural(kept, 'message')} kept; the number of messages that the queue's limit has "
            "dropped is unknown, because RabbitMQ's statistics are missing or out of date"
        )
    if not gone:
        return f"{plural(kept, 'message')} kept, none dropped"
    return (
        f"{kept:,} of {plural(kept + gone, 'message')} are kept; the queue's limit has dropped "
        f"{gone:,} since RabbitMQ started"
    )


def _print_rows(rejects: list[Rejected]) -> None:
    """Print two lines for each message; the second one is its reason."""
    from fluffle_broker.inspect.formatting import size

    rows = [
        (
            str(message.number),
            _local(message.rejected_at),
            _shortened(message.decoded.kind),
            _shortened(message.decoded.worker or "?"),
            "?" if message.decoded.round is None else str(message.decoded.round),
            size(message.decoded.size_bytes),
            message.cause,
        )
        for message in rejects
    ]
    names = ("#", "when", "kind", "worker", "round", "size", "cause")
    columns = zip(names, zip(*rows, strict=True), strict=True)
    right = ("#", "size")
    header, *lines = text_table(
        aligned(name, cells, left=name not in right) for name, cells in columns
    )
    echo(header)
    for line, message in zip(lines, rejects, strict=True):
        echo(line)
        echo_sentences(f"  {message.reason}")


def _local(time: str | None) -> str:
    """Return a time in ISO 8601 as local time; a message may have any text instead."""
    try:
        return datetime.fromisoformat(time or "").astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError):
        return "?"


def _shortened(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"


@rejected.command()
@click.argument("number", type=counts())
@_common_options
@click.pass_obj
def show(group: dict[str, Any], /, number: int, **options: Any) -> None:
    """Show message N in full and leave it in the queue.

    The command prints the same details as 'fluffle peek'.
    """
    from fluffle_broker.inspect.formatting import show_message
    from fluffle_broker.inspect.rejected import read_rejected

    topology, api, as_json = _target(options, group)
    message = with_link(api.url, lambda link: read_rejected(link, topology, number))
    now = time.time()
    if as_json:
        echo_json(message.as_dict(now))
        return
    show_message(message.decoded, now, f"{number}  ")
    echo(f"   rejected at {_local(message.rejected_at)} from {message.queue or 'an unknown queue'}")


@rejected.command()
@click.argument("numbers", nargs=-1, type=counts(), metavar="[NUMBER]...")
@click.option("--all", "everything", is_flag=True, help="Requeue all rejected messages.")
@_common_options
@click.pass_obj
def requeue(
    group: dict[str, Any], /, numbers: tuple[int, ...], everything: bool, **options: Any
) -> None:
    """Send messages back to the queue that they were rejected from.

    Use this command after you have fixed the cause of the rejection. The command publishes each
    message again with its original properties. When the broker has confirmed the new copy, the
    command removes the message from 'rejected'. The coordinator validates each new copy, so a
    message that is still invalid is rejected again. The user in --url becomes the sender of the new
    copy. With --verify-users, the coordinator accepts a copy only from the worker's own user.
    """
    from fluffle_broker.inspect import rejected as rejected_queue

    if bool(numbers) == everything:
        raise UsageError(
            f"{'numbers and --all are both given' if numbers else 'no message is chosen'}; choose "
            "messages by number, such as 'requeue 3 4', or choose all with --all"
        )
    topology, api, as_json = _target(options, group)
    chosen = None if everything else set(numbers)
    results = with_link(api.url, lambda link: rejected_queue.requeue(link, topology, chosen))
    if as_json:
        echo_json([_result_dict(each) for each in results])
    elif not results:
        echo(f"nothing to requeue: {topology.rejected} is empty")
    else:
        for each in results:
            _print_result(each)
    if any(each.left for each in results):
        sys.exit(1)


def _result_dict(each: Requeued) -> dict[str, Any]:
    return {
        "number": each.message.number,
        "exchange": None if each.left else each.exchange,
        "key": None if each.left else each.key,
        "left": each.left,
    }


def _print_result(each: Requeued) -> None:
    decoded = each.message.decoded
    sender = f" of {decoded.worker}" if decoded.worker else ""
    sent_to = f"{each.exchange} as {each.key}" if each.exchange else each.key
    outcome = f"not sent again, because {each.left}" if each.left else f"sent again to {sent_to}"
    echo(f"{each.message.number}  {decoded.kind}{sender}: {outcome}")


@rejected.command()
@click.option("--yes", is_flag=True, help="Delete without a confirmation prompt.")
@_common_options
@click.pass_obj
def purge(group: dict[str, Any], /, yes: bool, **options: Any) -> None:
    """Delete all messages that are currently in the queue 'rejected'."""
    from fluffle_broker.inspect import rejected as rejected_queue

    topology, api, as_json = _target(options, group)
    if not yes:
        click.confirm(
            f"delete all messages in {topology.rejected} permanently?", abort=True, err=True
        )
    deleted = with_link(api.url, lambda link: rejected_queue.purge(link, topology))
    if as_json:
        echo_json({"purged": deleted}, indent=None)
    else:
        echo(f"{deleted:,} deleted")
