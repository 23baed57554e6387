"""Runs jobs in the training thread and reports their outcome to the event loop.

An error in the task's code, of whatever type, fails its job and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

from fluffle_common.protocol.events import Traceback, Unfit
from fluffle_common.tensors.codecs.registry import CODECS, Registry
from fluffle_common.tensors.layout import Signature
from fluffle_worker import machine
from fluffle_worker.error_feedback import Residual
from fluffle_worker.frozen import FrozenTensors
from fluffle_worker.inbox import Record
from fluffle_worker.job import Job, NotWanted, execute
from fluffle_worker.machine import Work
from fluffle_worker.results import Results
from fluffle_worker.task import Task
from fluffle_worker.training_thread import Training, TrainingThread
from fluffle_worker.user_code import one_line


class Trainer:
    """Runs one job at a time. Its callbacks run in the event loop.

    Args:
        task: the model and the data.
        sender: the fields ``federation`` and ``worker`` of every answer.
        residual: returns the residual of the last update sent; called in the training thread.
        progress: called with each step: ``(work, step, steps, loss)``.
        done: called with the outcome of each job, an event for the machine.
        record: called with events about the task's faults: unusable results and tracebacks, each
            reported once.
        form: the signature of the task's model.
        frozen: its frozen tensors.
        training: what runs the task's code; by default, a new thread.
        codecs: the codecs that updates may be encoded with.
    """

    def __init__(
        self,
        task: Task,
        sender: dict[str, str],
        *,
        residual: Callable[[], Residual],
        progress: Callable[[Work, int, int, float | None], object],
        done: Callable[[machine.Event], object],
        record: Record,
        form: Signature,
        frozen: FrozenTensors | None = None,
        training: Training | None = None,
        codecs: Registry = CODECS,
    ) -> None:
        self._task, self._sender, self._form, self._codecs = task, sender, form, codecs
        self._frozen = frozen
        self._residual, self._progress, self._done = residual, progress, done
        self._training: Training = training or TrainingThread()
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        self._results = Results(
            report=lambda reason: self._to_loop(record, Unfit(reason=reason)),
            trace=lambda text: self._to_loop(record, Traceback(text=text)),
        )
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
        self._training.put(lambda: self._work(job, functools.partial(self._to_loop, evaluated)))

    def _work(self, job: Job, evaluated: Callable[[], object]) -> None:
        event = self._do(job, evaluated)
        if (
            os.getpid() != self._pid
        ):  # in a forked child of the task, which must not go on as a worker
            os._exit(0 if isinstance(event, machine.Finished) else 1)
        self._to_loop(self._over, event)

    def _do(self, job: Job, evaluated: Callable[[], object]) -> machine.Event:
        try:
            execute(
                job,
                self._task,
                self._sender,
                evaluated=evaluated,
                progress=functools.partial(self._to_loop, self._progress, job.work),
                residual=self._residual,
                results=self._results,
                form=self._form,
                frozen=self._frozen,
                codecs=self._codecs,
            )
        except NotWanted:
            return machine.Abandoned(job.work)
        except BaseException as why:  # reported to the coordinator, even SystemExit
            if not job.wanted:  # the task may have wrapped NotWanted
                return machine.Abandoned(job.work)
            self._results.failed(why)
            return machine.Failed(job.work, one_line(why))
        return machine.Finished(job.work)

    def _over(self, event: machine.Event) -> None:
        self._under_way -= 1
        self._cut_short = isinstance(event, machine.Abandoned)
        self._done(event)

    def _to_loop(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function in the event loop.

        Does nothing if the loop is closed, or in a process that the task has forked.
        """
        if os.getpid() == self._pid:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function, *args)
