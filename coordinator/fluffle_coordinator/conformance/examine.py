"""Runs every scenario in turn over one link and yields a finding for each."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from fluffle_common.errors import RunError
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import QueueInUse, Transport
from fluffle_common.transport.open_once import open_once
from fluffle_coordinator.conformance import ending, greeting, odd_messages, work
from fluffle_coordinator.conformance.listener import ExamOptions
from fluffle_coordinator.conformance.probe import Probe
from fluffle_coordinator.conformance.received import Unmet
from fluffle_coordinator.conformance.scenario import Finding, Scenario

SCENARIOS = tuple(  # in the order of the modules, and of the functions in each
    scenario
    for module in (greeting, work, odd_messages, ending)
    for scenario in vars(module).values()
    if isinstance(scenario, Scenario)
)
# They judge what has been received, so they are possible after a failure too.
_RETROSPECTIVE = (ending.one_session, ending.well_formed)


async def examine(
    transport: Transport, topology: Topology, options: ExamOptions
) -> AsyncGenerator[Finding]:
    """Wait for a worker and examine it; yield one finding per scenario.

    The topology is that of a federation that nothing else uses.

    Raises:
        BrokerError: if there is no broker, or the link to it was lost.
        RunError: if no worker came, or the federation has a coordinator.
        UsageError: if the federation has messages of a real run.
    """
    worker = f"worker {options.worker}" if options.worker else "any worker"
    async with _probe(transport, topology, options) as probe:
        options.tell(
            f"waiting for {worker} in federation {topology.federation} at {transport.address}"
        )
        async with probe.reading():
            await _first_sign(probe)
            abort_reason: str | None = None
            for scenario in SCENARIOS:
                if abort_reason is None or scenario in _RETROSPECTIVE:
                    finding = await scenario.finding(probe)
                else:
                    finding = scenario.found("skipped", abort_reason)
                yield finding
                if abort_reason is None and finding.outcome == "failed":
                    abort_reason = await _abort_reason(scenario, probe)


@contextlib.asynccontextmanager
async def _probe(
    transport: Transport, topology: Topology, options: ExamOptions
) -> AsyncIterator[Probe]:
    """Yield a probe, after declaring what a coordinator declares."""
    async with open_once(transport) as link:
        try:
            if await link.counts(topology.presence) is not None:
                await link.purge(topology.presence)  # workers that are alive send new heartbeats
            await link.declare(topology.required())
            yield Probe(link, topology, options)
        except QueueInUse:
            raise RunError(
                f"federation {topology.federation} already has a coordinator; set --federation "
                "to a name that nothing else uses"
            ) from None


async def _first_sign(probe: Probe) -> None:
    """Wait until a worker is heard."""
    wait_s = probe.options.wait_s
    try:
        await probe.until(lambda: probe.messages or None, "hello", within_s=wait_s)
    except Unmet:
        fault = f" ({probe.faults[0]})" if probe.faults else ""
        raise RunError(
            f"no worker connected to federation {probe.topology.federation} within {wait_s:g} "
            f"s{fault}; start a worker, or raise the time limit with --wait"
        ) from None


async def _abort_reason(scenario: Scenario, probe: Probe) -> str | None:
    """Return why the scenarios after a failed one cannot run; None if they can."""
    if scenario.needed:
        return f"not tried, because '{scenario.name}' failed"
    if scenario is not ending.stop and await probe.gone():
        return "not tried, because the worker is gone"
    return None
