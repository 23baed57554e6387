"""``fluffle conformance``: checks a third-party worker against the protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fluffle_common.cli.app import queue_type_option, seconds, url_option
from fluffle_common.cli.printing import echo, echo_json

if TYPE_CHECKING:
    from fluffle_common.protocol.topology import QueueType
    from fluffle_coordinator.conformance.scenario import Finding


@click.command(context_settings={"show_default": True})
@url_option
@click.option(
    "--federation",
    default="conformance",
    metavar="NAME",
    help="Name of a federation that is used only by this check.",
)
@click.option(
    "--worker",
    metavar="ID",
    help="ID of the worker to check.  [default: the first worker that connects]",
)
@click.option(
    "--large",
    is_flag=True,
    help="Add a 5 MiB tensor to the model, so that the model is sent in parts. Use this "
    "option only for workers that accept tensors of any shape.",
)
@click.option(
    "--twice",
    is_flag=True,
    help="Also test how the worker reacts when it is refused. At the end, the command waits until "
    "you restart the worker, and then refuses it.",
)
@click.option(
    "--wait",
    "wait_s",
    type=seconds(min_open=True),
    default=600.0,
    help="Time limit in seconds for the worker to connect.",
)
@click.option(
    "--patience",
    "patience_s",
    type=seconds(min_open=True),
    default=60.0,
    help="Time limit in seconds for each reply from the worker. Allow more time than the worker "
    "needs to train once.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object at the end, instead of one line for each requirement of the "
    "protocol.",
)
@queue_type_option
@click.pass_context
def conformance(ctx: click.Context, /, **options: Any) -> None:
    """Check whether a worker does what docs/protocol.md requires.

    The command acts as the coordinator and waits for a worker. The worker then faces situations
    that can occur in a real run: repeated, newer and older work, different weights, a lost part, a
    rejected update, unusual messages, and the end of the run. The command prints one line for each
    requirement of the protocol, and exits with code 1 if a requirement is not met. The worker
    trains about thirty times, so give it a quick task.

    \b
      fluffle conformance --url amqp://localhost &
      node worker.js --url amqp://localhost --federation conformance --id mine

    To see every message, run 'fluffle tap --federation conformance' at the same time.
    """
    from fluffle_common.cli.runtime import run_until_signalled

    as_json = options.pop("as_json")
    findings: list[Finding] = []

    def report(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            echo(*_lines(finding))

    run_until_signalled(_examine(report, **options))
    counts = Counter(finding.outcome for finding in findings)
    if as_json:
        dicts = [finding._asdict() for finding in findings]
        echo_json({"ok": not counts["failed"], "findings": dicts})
    else:
        echo(f"{counts['ok']} ok, {counts['failed']} failed, {counts['skipped']} skipped")
    ctx.exit(1 if counts["failed"] else 0)


async def _examine(
    report: Callable[[Finding], None],
    *,
    url: str | None,
    federation: str,
    queue_type: QueueType,
    **options: Any,
) -> None:
    from fluffle_common.cli.console import warn
    from fluffle_common.cli.settings import broker_url_finder, check_federation, check_worker
    from fluffle_common.protocol.topology import Topology
    from fluffle_common.transport.rabbitmq.transport import AmqpTransport
    from fluffle_coordinator.conformance.examine import examine
    from fluffle_coordinator.conformance.listener import ExamOptions

    topology = Topology(check_federation(federation), queue_type)
    if options["worker"] is not None:
        check_worker(options["worker"])
    transport = AmqpTransport(broker_url_finder(url)(), f"fluffle conformance of {federation}")
    async for finding in examine(transport, topology, ExamOptions(**options, tell=warn)):
        report(finding)


def _lines(finding: Finding) -> list[str]:
    """Return the finding as one line, followed by the requirement if it is not met."""
    outcome = "FAILED" if finding.outcome == "failed" else finding.outcome
    lines = [f"{outcome:<8} {finding.scenario:<30} {finding.seen}"]
    if finding.outcome == "failed":
        lines.append(f"{'':<8} docs/protocol.md, '{finding.section}': {finding.requirement}")
    return lines
