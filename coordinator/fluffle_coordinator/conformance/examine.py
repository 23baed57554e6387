"""One examination: every scenario in turn, over one link, and a finding for each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fluffle_common.errors import RunError
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import QueueInUse, Transport
from fluffle_common.transport.once import open_once
from fluffle_coordinator.conformance.ending import ENDING, LOOKING_BACK
from fluffle_coordinator.conformance.findings import Finding, Outcome, Skipped, Unmet
from fluffle_coordinator.conformance.greeting import GREETING
from fluffle_coordinator.conformance.listener import Conduct
from fluffle_coordinator.conformance.mail import MAIL
from fluffle_coordinator.conformance.probe import Probe
from fluffle_coordinator.conformance.scenario import Scenario
from fluffle_coordinator.conformance.work import WORK

_T = TypeVar("_T")
SCENARIOS: tuple[Scenario, ...] = (*GREETING, *WORK, *MAIL, *ENDING)


async def examine(
    transport: Transport,
    topology: Topology,
    *,
    worker: str | None = None,
    large: bool = False,
    twice: bool = False,
    wait_s: float = 600.0,
    patience_s: float = 60.0,
    tell: Callable[[str], object] = lambda _: None,
) -> AsyncGenerator[Finding]:
    """Wait for a worker, examine it, and yield what was found, one scenario after the other.

    Args:
        transport: the way to the broker.
        topology: the names on it; of a federation that is for this alone.
        worker: whom to examine; None takes the first that says hello.
        large: add a tensor to the model, so that it travels in parts.
        twice: wait for a second start of the worker, and refuse it.
        wait_s: how long to wait for the worker.
        patience_s: how long to wait for an answer.
        tell: told what happens, in a line.

    Raises:
        BrokerError: if there is no broker, or it is lost.
        RunError: if no worker comes, or the federation has a coordinator.
        UsageError: if the federation has work of a real run.
    """
    how = Conduct(worker, large, twice, patience_s, tell)
    async with _probe(transport, topology, how) as probe:
        tell(
            f"waiting for worker {worker or 'of any id'} in federation {topology.federation} "
            f"at {transport.address}"
        )
        reading = asyncio.ensure_future(probe.read())
        try:
            await _first_come(reading, _hello(probe, wait_s))
            over: str | None = None
            for scenario in SCENARIOS:
                if over is None or scenario in LOOKING_BACK:
                    finding = await _first_come(reading, _play(scenario, probe))
                else:
                    finding = _found(scenario, "skipped", over)
                yield finding
                if over is None and finding.outcome == "failed":
                    over = await _over(scenario, probe)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@contextlib.asynccontextmanager
async def _probe(transport: Transport, topology: Topology, how: Conduct) -> AsyncIterator[Probe]:
    """Declare what a coordinator declares, and play one."""
    async with open_once(transport) as link:
        try:
            if await link.counts(topology.presence) is not None:
                await link.purge(topology.presence)  # whoever is alive speaks up again
            journal = topology.journal_stream()
            await link.declare([one for one in topology.shared() if one != journal])
            yield Probe(link, topology, how)
        except QueueInUse:
            raise RunError(
                f"federation {topology.federation} has a coordinator; name a federation that is "
                "for this alone with --federation"
            ) from None


async def _first_come(reading: asyncio.Future[None], work: Coroutine[Any, Any, _T]) -> _T:
    """Return what ``work`` returns; reading, which goes on for ever, ends it by failing."""
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


async def _hello(probe: Probe, wait_s: float) -> None:
    """Wait until a worker is heard."""
    try:
        await probe.until(lambda: probe.signs or None, "hello", within_s=wait_s)
    except Unmet:
        seen = f"; malformed: {probe.faults[0]}" if probe.faults else ""
        raise RunError(
            f"no worker was heard in federation {probe.topology.federation} within {wait_s:g} s"
            f"{seen}; start it, or give it more time with --wait"
        ) from None


async def _play(scenario: Scenario, probe: Probe) -> Finding:
    try:
        return _found(scenario, "ok", await scenario.play(probe))
    except Unmet as seen:
        return _found(scenario, "failed", str(seen))
    except Skipped as why:
        return _found(scenario, "skipped", str(why))


def _found(scenario: Scenario, outcome: Outcome, seen: str) -> Finding:
    return Finding(scenario.name, outcome, seen, scenario.demand, scenario.section)


async def _over(scenario: Scenario, probe: Probe) -> str | None:
    """Return why nothing further can be tried after a failure; None if it can."""
    if scenario.needed:
        return f"not tried: {scenario.name} failed"
    if scenario not in ENDING and await probe.gone():
        return "not tried: the worker is gone"
    return None
