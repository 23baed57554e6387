"""Runs jobs in the training thread and reports their outcome to the event loop.

An error in the task's code, of whatever type, fails its job and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fluffle_common.protocol.events import Traceback, Unfit
from fluffle_worker import machine
from fluffle_worker.error_feedback import Residual
from fluffle_worker.inbox import Record
from fluffle_worker.job import Executor, Job, NotWanted
from fluffle_worker.machine import Work
from fluffle_worker.results import Results

Enqueue = Callable[[Callable[[], object]], object]
"""Queues a callable to run outside the event loop, after those before it, and returns at once."""


class TrainingThread:
    """A thread that runs queued callables, so that heartbeats continue during a long step.

    It is a daemon thread: a step that never returns must not keep the process alive. The callables
    must handle their own errors.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, work: Callable[[], object]) -> None:
        """Queue a callable and return at once; the first call starts the thread."""
        self._queue.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="training", daemon=True)
            self._thread.start()

    def end(self, patience_s: float) -> None:
        """Stop the thread once its queue is empty; wait for that at most ``patience_s`` seconds."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(patience_s)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()


class Trainer:
    """Runs one job at a time.

    ``enqueue`` queues a job for the training thread. ``progress`` is called in the event loop with
    the work, step, steps and loss, ``done`` with each job and its outcome, and ``record`` with each
    of the task's faults, once. ``residual`` is called in the training thread; see ``Executor``.
    """

    def __init__(
        self,
        executor: Executor,
        enqueue: Enqueue,
        *,
        residual: Callable[[], Residual],
        progress: Callable[[Work, int, int, float | None], object],
        done: Callable[[Job, machine.Event], object],
        record: Record,
    ) -> None:
        self._residual, self._progress, self._done = residual, progress, done
        self._enqueue = enqueue
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        self._results = Results(
            report=lambda reason: self._to_loop(record, Unfit(reason=reason)),
            trace=lambda text: self._to_loop(record, Traceback(text=text)),
        )
        self._executor = replace(executor, results=self._results)
        self._under_way = 0
        self._cut_short = False

    @property
    def at_work(self) -> bool:
        """Whether the task's code may still be running.

        That includes an abandoned job: JAX may still be executing steps that it had dispatched.
        """
        return self._under_way > 0 or self._cut_short

    def begin(self, job: Job, evaluated: Callable[[], object]) -> None:
        """Queue a job; ``evaluated`` is called once its evaluation is available."""
        self._under_way += 1
        self._enqueue(functools.partial(self._work, job, evaluated))

    def _work(self, job: Job, evaluated: Callable[[], object]) -> None:
        event = self._do(job, evaluated)
        if os.getpid() != self._pid:  # a fork of the task, which must not go on as a worker
            os._exit(0 if isinstance(event, machine.Finished) else 1)
        self._to_loop(self._over, job, event)

    def _do(self, job: Job, evaluated: Callable[[], object]) -> machine.Event:
        try:
            self._executor.execute(
                job,
                evaluated=functools.partial(self._to_loop, evaluated),
                progress=functools.partial(self._to_loop, self._progress, job.work),
                residual=self._residual,
            )
        except NotWanted:
            return machine.Abandoned(job.work)
        except BaseException as why:  # reported to the coordinator, even SystemExit
            if not job.wanted:  # the task may have wrapped NotWanted
                return machine.Abandoned(job.work)
            return machine.Failed(job.work, self._results.failed(why))
        return machine.Finished(job.work)

    def _over(self, job: Job, event: machine.Event) -> None:
        self._under_way -= 1
        self._cut_short = isinstance(event, machine.Abandoned)
        self._done(job, event)

    def _to_loop(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function in the event loop.

        Does nothing if the loop is closed, or in a process that the task has forked.
        """
        if os.getpid() == self._pid:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function, *args)
