"""The order in which workers in one process take turns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

# The passes of the event loop in which a round's work reaches all workers over an in-memory broker.
# A worker that is just reading another message needs other passes than one that waits.
_PASSES = 10


class Turns:
    """A lock for workers, which get it in the order of their names if they ask at the same time.

    So the tasks of a round always train in the same order, also after a restart.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()  # fair
        self._asking: dict[str, asyncio.Future[None]] = {}
        self._sorting: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Hold the lock for a worker."""
        if not self._asking:
            self._sorting = asyncio.create_task(self._sort())
        self._asking[name] = next_in_line = asyncio.get_running_loop().create_future()
        await next_in_line
        async with self._lock:
            yield

    async def _sort(self) -> None:
        """Let those that ask at the same time line up for the lock."""
        for _ in range(_PASSES):
            await asyncio.sleep(0)
        asking, self._asking = self._asking, {}
        for _, next_in_line in sorted(asking.items()):
            if not next_in_line.done():
                next_in_line.set_result(None)
