"""What a worker says of itself: signs of life, a failure, good-bye."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING, Any

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
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.layout import Signature
from fluffle_common.transport.base import Link, QueueFull, Unroutable
from fluffle_common.transport.messaging import Route, send
from fluffle_worker.frozen import FrozenTensors, introduced
from fluffle_worker.machine import Work
from fluffle_worker.signature import UNKNOWN
from fluffle_worker.task import Task, classes_of, num_examples_of
from fluffle_worker.user_code import sendable

if TYPE_CHECKING:
    from fluffle_worker.settings import WorkerSettings

_BYE_PATIENCE_S = 2.0
# How long until a hello that no queue was bound for is said again.
_HELLO_AGAIN_S = 0.5


class Presence:
    """Who a worker is and what it does at the moment, and the telling of it.

    Args:
        settings: whose queues to use, and how often to speak up.
        task: the model and the data.
        topology: where signs of life go.
        form: what the task's model is made of.
        frozen: the task's frozen tensors.

    Raises:
        TaskError: where what the task says of itself is more than may be sent.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        task: Task,
        topology: Topology,
        form: Signature = UNKNOWN,
        frozen: FrozenTensors | None = None,
    ) -> None:
        self.session = uuid.uuid4().hex[:12]  # new at every process start
        self._topology, self._heartbeat_s = topology, settings.heartbeat_s
        self._frozen = frozen
        self._ids: dict[str, Any] = {
            "federation": settings.federation,
            "worker": settings.worker,
            "session": self.session,
        }
        self._about: dict[str, Any] = {
            "num_examples": num_examples_of(task),
            # The end of a path says more than its beginning.
            "task": sendable(settings.task[-MAX_TASK_CHARACTERS:], MAX_TASK_CHARACTERS),
            "classes": classes_of(task),
            **introduced(form, frozen),
            "heartbeat_s": settings.heartbeat_s,
        }
        try:
            Hello(**self._ids, **self._about)
        except ValidationError as wrong:
            first = wrong.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise TaskError(
                f"task '{settings.task}' cannot introduce itself: {where}: {first['msg']}; "
                "let the task give other values"
            ) from None
        self._doing: dict[str, Any] = {
            "state": "idle",
            "run": None,
            "round": 0,
            "base": None,
            "sequence": None,
            "step": 0,
            "steps": 0,
        }
        self._loss: float | None = None
        self._asked = asyncio.Event()
        self._telling: set[asyncio.Task[None]] = set()  # the loop itself holds a task only weakly

    def now(self, state: str, work: Work | Fit | Evaluate, *, steps: int = 0) -> None:
        """Note what it is at from now on, and in how many steps."""
        if state not in ("sending", "idle"):  # those still tell of the training they follow
            self._loss = None
        self._doing = {
            "state": state,
            "run": work.run,
            "round": work.round,
            "base": work.base or None,
            "sequence": getattr(work, "sequence", None) or None,  # an `evaluate` has none
            "step": 0,
            "steps": steps,
        }

    def progress(self, step: int, loss: float | None = None) -> None:
        """Note how far it is; the loss it has at that, where it trains."""
        self._doing["step"], self._loss = step, loss

    def sent(self, done: int, parts: int) -> None:
        """Note how many parts of its answer have arrived, if that is what it is at."""
        if self._doing["state"] == "sending":
            self._doing |= {"step": done, "steps": parts}

    async def signs_of_life(self, link: Link) -> None:
        """Say hello, then be heard every ``heartbeat_s`` seconds, until the link is lost."""
        while True:
            if await self._say(link, Hello(**self._ids, **self._told())):
                break
            await asyncio.sleep(min(self._heartbeat_s, _HELLO_AGAIN_S))
        while True:
            self._asked.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._asked.wait()
            if link.blocked and self._telling:
                continue  # one waits already until the broker takes messages again
            # A confirmation may be long in coming, behind a large message: nobody waits for it.
            self._begin_to_say(link, Heartbeat(**self._ids, **self._told()))

    async def greet(self, link: Link) -> None:
        """Say hello once more, so that the coordinator binds our queues, which were made anew."""
        await self._say(link, Hello(**self._ids, **self._told()))

    def speak_up(self) -> None:
        """Give the next sign of life now: a coordinator that has just begun wants to know."""
        self._asked.set()

    async def bye(self, link: Link | None, reason: str) -> None:
        """Say good-bye, if there is a link and it takes no longer than a moment."""
        if link is not None:
            bye = Bye(**self._ids, reason=sendable(reason, 2000))
            with contextlib.suppress(LinkLost, BrokerError, TimeoutError):
                async with asyncio.timeout(_BYE_PATIENCE_S):
                    await self._say(link, bye)

    def failed(self, link: Link | None, work: Work, reason: str) -> None:
        """Begin to say that a work failed; without a link, the coordinator asks again anyway."""
        if link is None:
            return
        reason = sendable(reason, 2000)
        failure = Failure(**self._ids, run=work.run, round=work.round, reason=reason)
        self._begin_to_say(link, failure)

    def _told(self) -> dict[str, Any]:
        """Return the fields of a sign of life, as of this moment."""
        digests = self._frozen.digests if self._frozen else ()
        return {**self._about, **self._doing, "loss": self._loss, "frozen": digests}

    def _begin_to_say(self, link: Link, message: Heartbeat | Failure) -> None:
        async def say() -> None:
            with contextlib.suppress(LinkLost):  # whoever watches the link knows it, too
                await self._say(link, message)

        telling = asyncio.ensure_future(say())
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def _say(self, link: Link, message: Hello | Heartbeat | Bye | Failure) -> bool:
        """Say it; return whether a queue has taken it."""
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
