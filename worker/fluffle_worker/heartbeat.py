"""A worker's messages about itself: hello, heartbeat, failure and bye."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Any

from pydantic import ValidationError

from fluffle_common.errors import BrokerError, LinkLost, TaskError
from fluffle_common.protocol.messages import (
    MAX_TASK_CHARACTERS,
    Bye,
    Evaluate,
    Failure,
    Fit,
    Heartbeat,
    Hello,
)
from fluffle_common.protocol.model_form import form_from
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.groups import FROZEN
from fluffle_common.tensors.layout import Signature
from fluffle_common.transport.base import Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import Route, send
from fluffle_common.user_errors import sendable
from fluffle_worker.frozen import FrozenTensors
from fluffle_worker.machine import Work
from fluffle_worker.settings import WorkerSettings
from fluffle_worker.signature import UNKNOWN
from fluffle_worker.task import Task, classes_of, num_examples_of, statistics_of

_BYE_PATIENCE_S = 2.0
# Pause before a hello that no queue received is sent again.
_HELLO_AGAIN_S = 0.5


class Presence:
    """A worker's identity and current activity, and the messages that report them.

    Raises:
        TaskError: if the task's description does not fit into a hello.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        task: Task,
        topology: Topology,
        signature: Signature,
        frozen: FrozenTensors,
    ) -> None:
        self.session = uuid.uuid4().hex[:12]  # new at every process start
        self._topology, self._heartbeat_s = topology, settings.heartbeat_s
        self._frozen = frozen
        self._ids: dict[str, Any] = {
            "federation": settings.federation,
            "worker": settings.worker,
            "session": self.session,
        }
        shared = frozen.signature if frozen.shared else ()
        self._about: dict[str, Any] = {
            "num_examples": num_examples_of(task),
            # The end of a path is the more telling part.
            "task": sendable(settings.task[-MAX_TASK_CHARACTERS:], MAX_TASK_CHARACTERS),
            "classes": classes_of(task),
            "model": None
            if signature == UNKNOWN
            else form_from(signature, shared, statistics_of(task)),
            "features": (FROZEN,) if frozen.shared else (),
            "heartbeat_s": settings.heartbeat_s,
        }
        try:
            Hello(**self._ids, **self._about)
        except ValidationError as wrong:
            first = wrong.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise TaskError(
                f"the description of task '{settings.task}' cannot be sent, because the field "
                f"'{where}' is invalid ({first['msg']}); change this value in the task"
            ) from None
        self.rest()
        self._beat_now = asyncio.Event()
        # The event loop holds only weak references to tasks.
        self._being_sent: set[asyncio.Task[None]] = set()

    def rest(self) -> None:
        """Set the current activity to none, of no run."""
        self._work: Work | Fit | Evaluate | None = None
        self._doing: dict[str, Any] = {"state": "idle", "loss": None}

    def now(self, state: str, work: Work | Fit | Evaluate, *, steps: int = 0) -> None:
        """Set the current activity and its number of steps."""
        loss = self._doing["loss"] if state in ("sending", "idle") else None  # of the training
        self._work = work
        self._doing = {"state": state, "step": 0, "steps": steps, "loss": loss}

    def progress(self, step: int, loss: float | None = None) -> None:
        """Set the current step and, in training, its loss."""
        self._doing |= {"step": step, "loss": loss}

    def sent(self, done: int, parts: int) -> None:
        """Set how many parts of the answer have been sent, if the worker is sending."""
        if self._doing["state"] == "sending":
            self._doing |= {"step": done, "steps": parts}

    async def signs_of_life(self, link: Link) -> None:
        """Send a hello, then a heartbeat every ``heartbeat_s`` seconds, until the link is lost."""
        while True:
            if await self.greet(link):
                break
            await asyncio.sleep(min(self._heartbeat_s, _HELLO_AGAIN_S))
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._beat_now.wait()
            self._beat_now.clear()
            if link.blocking.reason and self._being_sent:
                continue  # one heartbeat is enough once the broker takes messages again
            # Behind a large message, its confirmation may take long.
            self._start_sending(link, Heartbeat(**self._status(link.incomplete_bytes)))

    async def greet(self, link: Link) -> bool:
        """Send a hello, on which the coordinator binds our queues; return whether it was queued."""
        return await self._send(link, Hello(**self._status()))

    async def beat(self, link: Link) -> None:
        """Send one heartbeat."""
        await self._send(link, Heartbeat(**self._status()))

    def speak_up(self) -> None:
        """Send the next heartbeat now, because a coordinator that has just started needs it."""
        self._beat_now.set()

    async def bye(self, link: Link | None, reason: str) -> None:
        """Send a bye if there is a link, waiting at most two seconds for its confirmation."""
        if link is not None:
            bye = Bye(**self._ids, reason=sendable(reason, 2000))
            with contextlib.suppress(LinkLost, BrokerError, TimeoutError):
                async with asyncio.timeout(_BYE_PATIENCE_S):
                    await self._send(link, bye)

    def failed(self, link: Link | None, work: Work, reason: str) -> None:
        """Report a failure in the background; without a link, the coordinator will ask again."""
        if link is None:
            return
        reason = sendable(reason, 2000)
        failure = Failure(**self._ids, run=work.run, round=work.round, reason=reason)
        self._start_sending(link, failure)

    def _status(self, incomplete_bytes: int = 0) -> dict[str, Any]:
        status = {**self._ids, **self._about, "frozen": self._frozen.digests}
        status["incomplete_bytes"] = incomplete_bytes or None
        if (work := self._work) is not None:
            status |= {
                "run": work.run,
                "round": work.round,
                "base": work.base or None,
                "sequence": getattr(work, "sequence", None) or None,  # an `evaluate` has none
            }
        return status | self._doing

    def _start_sending(self, link: Link, message: Heartbeat | Failure) -> None:
        async def send_unless_lost() -> None:
            with contextlib.suppress(LinkLost, BrokerError):  # the connection notices by itself
                await self._send(link, message)

        task = asyncio.ensure_future(send_unless_lost())
        self._being_sent.add(task)
        task.add_done_callback(self._being_sent.discard)

    async def _send(self, link: Link, message: Hello | Heartbeat | Bye | Failure) -> bool:
        """Send a message; return whether a queue has received it."""
        route = Route(
            self._topology.results,
            [f"{message.kind}.{message.worker}"],
            durable=isinstance(message, Failure),
            urgent=True,
        )
        try:
            await send(link, message, route)
        except (QueueFull, Unroutable):
            return False
        return True
