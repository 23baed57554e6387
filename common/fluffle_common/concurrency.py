"""Workarounds for cancellations that asyncio before Python 3.13 loses."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


def cancelled() -> bool:
    """Whether the current task was asked to cancel, even if another exception replaced that."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def run_all(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run coroutines concurrently; when one fails, cancel the others and raise its exception.

    Unlike ``TaskGroup`` before Python 3.13, this never cancels the calling task, and when the
    caller is cancelled at the moment a coroutine fails, the cancellation wins.
    """
    if not coroutines:
        return
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
