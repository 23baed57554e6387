"""Cancellation done right, where asyncio before Python 3.13 forgets one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def cancelled() -> bool:
    """Whether the task that asks has been told to end, whatever was raised since."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def run_all(*works: Coroutine[Any, Any, None]) -> None:
    """Run works side by side until the first fails, which ends them all; raise what it raised.

    Unlike a ``TaskGroup`` before Python 3.13, it never cancels its caller, and when the caller is
    cancelled just as a work fails, it is the cancellation that counts.
    """
    if not works:
        return
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
