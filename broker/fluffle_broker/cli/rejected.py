"""``fluffle rejected``: what was refused, why, and what to do with it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from fluffle_broker.cli.options import figures_if_told, looking, where
from fluffle_common.cli.app import count as counts
from fluffle_common.cli.app import management_option
from fluffle_common.cli.printing import echo, echo_json, screen, table
from fluffle_common.errors import UsageError

if TYPE_CHECKING:
    from fluffle_broker.inspect.rejected import Rejected, Requeued
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.base import Link

T = TypeVar("T")
# A federation may be named before the sub-command or behind it, as one is used to.
_anywhere = looking("Print JSON instead.", required=False)


@click.group(invoke_without_command=True)
@_anywhere
@management_option
@click.option(
    "-n", "--count", default=20, show_default=True, type=counts(), metavar="N",
    help="Show only the newest N messages.",
)  # fmt: skip
@click.pass_context
def rejected(ctx: click.Context, /, **options: Any) -> None:
    """List what was refused, and why; show, requeue or purge it.

    A message that cannot be counted (damaged, of another run, with NaN in it …) is not dropped: it
    goes with its reason into the federation's queue 'rejected', which keeps the latest 1,000
    messages or 256 MB; older ones are dropped. Numbers count from the oldest that is kept, so they
    shift when something is dropped.

    How many were dropped RabbitMQ does not say. They are counted from its statistics: what was
    published less what was taken out less what is there, since the broker started. Right after a
    change these are up to 5 seconds behind, and then it is said that nothing can be told.

    \b
      fluffle rejected --federation letters
      fluffle rejected show 3 --federation letters
      fluffle rejected requeue 3 --federation letters    once its cause is mended
      fluffle rejected requeue --all --federation letters
      fluffle rejected purge --federation letters
    """
    ctx.obj = options
    if ctx.invoked_subcommand is None:
        _list(_where(options), options["count"], options["management"])


class _Where(NamedTuple):
    """What the options say: the federation, the broker, and whether JSON is wanted."""

    topology: Topology
    address: str
    as_json: bool


def _where(options: Mapping[str, Any], group: Mapping[str, Any] | None = None) -> _Where:
    """Read the options of a sub-command; what it was not told, the group may have been."""
    told = {**options}
    for name, value in (group or {}).items():
        told[name] = told.get(name) or value
    if not told["federation"]:
        raise UsageError("no federation is named; give --federation, or set FLUFFLE_FEDERATION")
    return _Where(*where(told["federation"], told["url"]), told["as_json"])


def _visit(address: str, work: Callable[[Link], Awaitable[T]]) -> T:
    from fluffle_common.transport.once import open_once
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport

    async def visit() -> T:
        async with open_once(AmqpTransport(address, "fluffle rejected")) as link:
            return await work(link)

    return asyncio.run(visit())


def _list(at: _Where, most: int, management: str | None) -> None:
    from fluffle_broker.inspect.rejected import kept
    from fluffle_common.cli.settings import management_of

    topology, address, as_json = at
    found = _visit(address, lambda link: kept(link, topology))
    gone = _dropped(topology, address, management_of(address, management), len(found))
    now = time.time()
    if as_json:
        told = {"kept": len(found), "dropped": gone, "messages": [m.as_dict(now) for m in found]}
        echo_json(told)
        return
    echo(f"{topology.rejected}: {_how_many(len(found), gone)}")
    if found:
        causes = Counter(message.cause for message in found).most_common()
        echo("by cause: " + ", ".join(f"{cause} {count:,}" for cause, count in causes))
        _table(found[-most:], now)


def _dropped(topology: Topology, address: str, base: str, kept_now: int) -> int | None:
    from fluffle_broker.inspect.rejected import dropped

    figures = figures_if_told(address, base, topology)
    return dropped(figures.get(topology.rejected), kept_now)


def _how_many(kept: int, gone: int | None) -> str:
    from fluffle_common.transport.rabbitmq.queue_health import messages

    if gone is None:
        return (
            f"{messages(kept)} kept; whether the limit (1,000 messages, 256 MB) has dropped "
            "older ones is unknown (the management API is unreachable or has no figures yet, "
            "or the broker was restarted)"
        )
    if not gone:
        return f"{messages(kept)} kept, none dropped"
    return (
        f"{kept:,} of {messages(kept + gone)} are kept, {gone:,} were dropped by the limit "
        "(1,000 messages, 256 MB) since RabbitMQ started"
    )


def _table(found: list[Rejected], now: float) -> None:
    from fluffle_broker.inspect.formatting import size

    rows = table()
    for name in ("#", "when", "kind", "worker", "round", "size", "cause"):
        rows.add_column(name, no_wrap=True, justify="right" if name in ("#", "size") else "left")
    rows.add_column("reason")
    for message in found:
        reading = message.reading
        rows.add_row(
            str(message.number),
            (message.rejected_at or "?")[:19].replace("T", " "),
            reading.kind,
            reading.worker or "?",
            "?" if reading.round is None else str(reading.round),
            size(reading.size_bytes),
            message.cause,
            message.reason,
        )
    screen().print(rows)


@rejected.command()
@click.argument("number", type=counts())
@_anywhere
@click.pass_obj
def show(group: dict[str, Any], /, number: int, **options: Any) -> None:
    """Show message NUMBER in full, as 'fluffle peek' does; it stays where it is."""
    from fluffle_broker.cli.peek import show_reading
    from fluffle_broker.inspect.rejected import one

    topology, address, as_json = _where(options, group)
    found = _visit(address, lambda link: one(link, topology, number))
    now = time.time()
    if as_json:
        echo_json(found.as_dict(now))
        return
    show_reading(found.reading, now, f"{number}  ")
    echo(f"   refused at {found.rejected_at or '?'} from {found.queue or 'an unknown queue'}")


@rejected.command()
@click.argument("numbers", nargs=-1, type=counts(), metavar="[NUMBER]...")
@click.option("--all", "everything", is_flag=True, help="All messages that are kept now.")
@_anywhere
@click.pass_obj
def requeue(
    group: dict[str, Any], /, numbers: tuple[int, ...], everything: bool, **options: Any
) -> None:
    """Send messages again, to where they were refused, once what was wrong is put right.

    Each is published again with what its sender said of it, and taken out of 'rejected' only when
    the broker has confirmed that. It is checked again like any other, so what is still wrong comes
    back with its reason. It is sent by the user of --url: a coordinator with --verify-users
    refuses it, unless that user is the worker's.
    """
    from fluffle_broker.inspect import rejected as refused

    if bool(numbers) == everything:
        raise UsageError("no messages are chosen; give their numbers ('requeue 3 4') or --all")
    topology, address, as_json = _where(options, group)
    chosen = None if everything else set(numbers)
    found = _visit(address, lambda link: refused.requeue(link, topology, chosen))
    if as_json:
        echo_json([_became(each) for each in found])
    elif not found:
        echo(f"nothing to send again: {topology.rejected} is empty")
    else:
        for each in found:
            _say_became(each)
    if any(each.left for each in found):
        sys.exit(1)


def _became(each: Requeued) -> dict[str, Any]:
    return {
        "number": each.message.number,
        "exchange": None if each.left else each.exchange,
        "key": None if each.left else each.key,
        "left": each.left,
    }


def _say_became(each: Requeued) -> None:
    reading = each.message.reading
    whom = f" of {reading.worker}" if reading.worker else ""
    sent_to = f"{each.exchange} as {each.key}" if each.exchange else each.key
    became = f"stays: {each.left}" if each.left else f"sent again to {sent_to}"
    echo(f"{each.message.number}  {reading.kind}{whom}: {became}")


@rejected.command()
@click.option("--yes", is_flag=True, help="Delete without asking.")
@_anywhere
@click.pass_obj
def purge(group: dict[str, Any], /, yes: bool, **options: Any) -> None:
    """Throw away all that is kept now."""
    from fluffle_broker.inspect import rejected as refused

    topology, address, as_json = _where(options, group)
    if not yes:
        click.confirm(
            f"delete all messages in {topology.rejected} permanently?", abort=True, err=True
        )
    gone = _visit(address, lambda link: refused.purge(link, topology))
    if as_json:
        echo_json({"purged": gone}, indent=None)
    else:
        echo(f"{gone:,} deleted")
