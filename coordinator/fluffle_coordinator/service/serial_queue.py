"""A FIFO queue of jobs with one consumer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

Job = Callable[[], Awaitable[None]]


class SerialQueue:
    """An unbounded queue of jobs that ``run`` awaits one at a time."""

    def __init__(self) -> None:
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._open = 0

    @property
    def idle(self) -> bool:
        """Whether no job is waiting or running."""
        return not self._open

    def put(self, job: Job) -> None:
        """Append a job."""
        self._open += 1
        self._jobs.put_nowait(job)

    async def run(self) -> None:
        """Run jobs until cancelled; an exception of a job propagates."""
        while True:
            job = await self._jobs.get()
            await job()
            self._open -= 1

    async def drained(self) -> None:
        """Wait until all jobs are done that are here now; others may come all the time."""
        if self.idle:
            return
        done = asyncio.Event()

        async def last() -> None:
            done.set()

        self.put(last)
        await done.wait()
