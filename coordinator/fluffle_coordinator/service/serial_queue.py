"""A FIFO queue of jobs with one consumer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

Job = Callable[[], Awaitable[None]]


class SerialQueue:
    """A queue of jobs and the one who does them."""

    def __init__(self) -> None:
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._open = 0

    @property
    def idle(self) -> bool:
        """Whether everything that was asked for is done."""
        return not self._open

    def put(self, job: Job) -> None:
        """Ask for a job."""
        self._open += 1
        self._jobs.put_nowait(job)

    async def run(self) -> None:
        """Do one job after the other, for ever."""
        while True:
            job = await self._jobs.get()
            await job()
            self._open -= 1
            self._jobs.task_done()

    async def drained(self) -> None:
        """Return when everything that was asked for is done."""
        await self._jobs.join()
