"""``fluffle conformance``: somebody's worker, examined by a coordinator that is played."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import queue_type_option, seconds, url_option
from fluffle_common.cli.printing import echo, echo_json

if TYPE_CHECKING:
    from fluffle_coordinator.conformance.findings import Finding

_WORDS = {"ok": "ok", "failed": "FAILED", "skipped": "skipped"}


@click.command(context_settings={"show_default": True})
@url_option
@click.option(
    "--federation",
    default="conformance",
    metavar="NAME",
    help="Name of a federation that only this check uses.",
)
@click.option(
    "--worker",
    metavar="ID",
    help="Id of the worker to examine.  [default: the first that says hello]",
    show_default=False,
)
@click.option(
    "--large",
    is_flag=True,
    help="Add a tensor of 5 MiB to the model, so that it travels in parts; for workers that train "
    "any model.",
)
@click.option(
    "--twice",
    is_flag=True,
    help="At the end, wait until the worker is started again, and refuse it.",
)
@click.option(
    "--wait",
    "wait_s",
    type=seconds(min_open=True),
    default=600.0,
    help="Seconds to wait for the worker.",
)
@click.option(
    "--patience",
    "patience_s",
    type=seconds(min_open=True),
    default=60.0,
    help="Seconds to wait for an answer; allow more than a training takes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead.")
@queue_type_option
@click.pass_context
def conformance(ctx: click.Context, /, **options: Any) -> None:
    """Examine a worker: does it do what docs/protocol.md demands?

    It plays a coordinator, waits for a worker, and lets it go through what a real run may bring:
    work that comes twice, newer or older work, other weights, a lost part, a rejected update, odd
    messages, the end. It prints a line for each demand, and ends with 1 if one is not met. The
    worker trains some thirty times, so let it be quick at it.

    \b
      fluffle conformance --url amqp://localhost &
      node worker.js --url amqp://localhost --federation conformance --id mine

    To see every message, run 'fluffle tap --federation conformance' beside it.
    """
    from fluffle_common.cli.console import warn
    from fluffle_common.cli.runtime import Interrupted, run_until_signalled

    as_json = options.pop("as_json")
    findings: list[Finding] = []

    def found(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            echo(*_lines(finding))

    try:
        run_until_signalled(_examined(found, warn, **options))
    except Interrupted as signalled:
        sys.exit(signalled.exit_code)
    counts = Counter(one.outcome for one in findings)
    if as_json:
        echo_json({"ok": not counts["failed"], "findings": [one.as_dict() for one in findings]})
    else:
        echo(f"{counts['ok']} ok, {counts['failed']} failed, {counts['skipped']} skipped")
    ctx.exit(1 if counts["failed"] else 0)


async def _examined(
    found: Any, tell: Any, *, url: str | None, federation: str, queue_type: Any, **how: Any
) -> None:
    from fluffle_common.cli.settings import broker_url, check_federation, check_worker
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport
    from fluffle_coordinator.conformance.examine import examine

    topology = Topology(check_federation(federation), queue_type)
    if how["worker"] is not None:
        check_worker(how["worker"])
    transport = AmqpTransport(broker_url(url), f"fluffle conformance of {federation}")
    async for finding in examine(transport, topology, tell=tell, **how):
        found(finding)


def _lines(finding: Finding) -> list[str]:
    """Return what to print of a finding: a line, and what the document says if it is not met."""
    lines = [f"{_WORDS[finding.outcome]:<8} {finding.scenario:<30} {finding.seen}"]
    if finding.outcome == "failed":
        lines.append(f"{'':<8} docs/protocol.md, '{finding.section}': {finding.demand}")
    return lines
