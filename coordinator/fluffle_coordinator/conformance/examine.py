"""Runs every scenario in turn over one link and yields a finding for each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from fluffle_common.errors import RunError
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import QueueInUse, Transport
from fluffle_common.transport.open_once import open_once
from fluffle_coordinator.conformance.ending import ENDING, RETROSPECTIVE
from fluffle_coordinator.conformance.findings import Finding, Outcome, Skipped, Unmet
from fluffle_coordinator.conformance.frozen import FROZEN_SCENARIOS
from fluffle_coordinator.conformance.greeting import GREETING
from fluffle_coordinator.conformance.listener import ExamOptions
from fluffle_coordinator.conformance.odd_messages import ODD_MESSAGES
from fluffle_coordinator.conformance.probe import Probe
from fluffle_coordinator.conformance.scenario import Scenario
from fluffle_coordinator.conformance.work import WORK

_T = TypeVar("_T")
SCENARIOS: tuple[Scenario, ...] = (
    *GREETING,
    *WORK,
    *FROZEN_SCENARIOS,
    *ODD_MESSAGES,
    *ENDING,
)


async def examine(
    transport: Transport, topology: Topology, options: ExamOptions
) -> AsyncGenerator[Finding]:
    """Wait for a worker and examine it; yield one finding per scenario.

    Args:
        transport: the connection to the broker.
        topology: the names on the broker, of a federation that nothing else uses.
        options: the options of the examination.

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
        reading = asyncio.ensure_future(probe.read())
        try:
            await _while_reading(reading, _first_presence(probe))
            abort_reason: str | None = None
            for scenario in SCENARIOS:
                if abort_reason is None or scenario in RETROSPECTIVE:
                    finding = await _while_reading(reading, _play(scenario, probe))
                else:
                    finding = _finding(scenario, "skipped", abort_reason)
                yield finding
                if abort_reason is None and finding.outcome == "failed":
                    abort_reason = await _abort_reason(scenario, probe)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@contextlib.asynccontextmanager
async def _probe(
    transport: Transport, topology: Topology, options: ExamOptions
) -> AsyncIterator[Probe]:
    """Yield a probe, after declaring what a coordinator declares."""
    async with open_once(transport) as link:
        try:
            if await link.counts(topology.presence) is not None:
                await link.purge(topology.presence)  # workers that are alive send new heartbeats
            journal = topology.journal_stream()
            await link.declare([each for each in topology.shared() if each != journal])
            yield Probe(link, topology, options)
        except QueueInUse:
            raise RunError(
                f"federation {topology.federation} has a coordinator; give a federation that "
                "nothing else uses with --federation"
            ) from None


async def _while_reading(reading: asyncio.Future[None], work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of ``work``; raise the error of ``reading`` if that fails first."""
    working = asyncio.ensure_future(work)
    try:
        both: set[asyncio.Future[Any]] = {reading, working}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            reading.result()
        return await working
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def _first_presence(probe: Probe) -> None:
    """Wait until a worker is heard."""
    wait_s = probe.options.wait_s
    try:
        await probe.until(lambda: probe.presence or None, "hello", within_s=wait_s)
    except Unmet:
        fault = f"; malformed message {probe.faults[0]}" if probe.faults else ""
        raise RunError(
            f"no worker was heard in federation {probe.topology.federation} within {wait_s:g} s"
            f"{fault}; start one, or give it more time with --wait"
        ) from None


async def _play(scenario: Scenario, probe: Probe) -> Finding:
    try:
        return _finding(scenario, "ok", await scenario.play(probe))
    except Unmet as why:
        return _finding(scenario, "failed", str(why))
    except Skipped as why:
        return _finding(scenario, "skipped", str(why))


def _finding(scenario: Scenario, outcome: Outcome, seen: str) -> Finding:
    return Finding(scenario.name, outcome, seen, scenario.demand, scenario.section)


async def _abort_reason(scenario: Scenario, probe: Probe) -> str | None:
    """Return why the scenarios after a failed one cannot run; None if they can."""
    if scenario.needed:
        return f"not tried: {scenario.name} failed"
    if scenario not in ENDING and await probe.gone():
        return "not tried: the worker is gone"
    return None
