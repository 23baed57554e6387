"""The task's side of a worker: its code runs in the training thread and can end nothing else."""

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
from fluffle_worker.inbox import Tell
from fluffle_worker.job import Job, NotWanted, execute
from fluffle_worker.machine import Work
from fluffle_worker.results import Results
from fluffle_worker.task import Task
from fluffle_worker.training_thread import Training, TrainingThread
from fluffle_worker.user_code import one_line


class Trainer:
    """Does one job after the other, and tells the event loop what becomes of each.

    Args:
        task: the model and the data.
        sender: the fields ``federation`` and ``worker`` of every answer.
        residual: what the last update that was sent left unsent.
        progress: told of each step: ``(work, step, steps, loss)``.
        done: told what has become of a job.
        tell: told, once each, what of the task's is not fit for use, and of its tracebacks.
        form: what the task's model is made of.
        frozen: its frozen tensors.
        training: where the task's code runs; a thread of its own unless told.
        codecs: those that updates may be encoded by.
    """

    def __init__(
        self,
        task: Task,
        sender: dict[str, str],
        *,
        residual: Callable[[], Residual],
        progress: Callable[[Work, int, int, float | None], object],
        done: Callable[[machine.Event], object],
        tell: Tell,
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
            say=lambda reason: self._to_loop(tell, Unfit(reason=reason)),
            trace=lambda text: self._to_loop(tell, Traceback(text=text)),
        )
        self._under_way = 0
        self._cut_short = False

    @property
    def at_work(self) -> bool:
        """Whether the task's code may be at something; only the end of the process ends that.

        A job that was cut short may have begun what goes on by itself, as steps of JAX do.
        """
        return self._under_way > 0 or self._cut_short

    def begin(self, job: Job, evaluated: Callable[[], object]) -> None:
        """Do a job when those before it are done; ``evaluated``: its evaluation is there."""
        self._under_way += 1
        self._training.put(lambda: self._work(job, functools.partial(self._to_loop, evaluated)))

    def _work(self, job: Job, evaluated: Callable[[], object]) -> None:
        event = self._do(job, evaluated)
        if os.getpid() != self._pid:  # the task forked, and its child has come back to here
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
        except BaseException as why:  # whatever a user's task raises is reported, not swallowed
            if not job.wanted:  # it may be what the task makes of being told so
                return machine.Abandoned(job.work)
            self._results.failed(why)
            return machine.Failed(job.work, one_line(why))
        return machine.Finished(job.work)

    def _over(self, event: machine.Event) -> None:
        self._under_way -= 1
        self._cut_short = isinstance(event, machine.Abandoned)
        self._done(event)

    def _to_loop(self, what: Callable[..., object], *on: Any) -> None:
        """Let the loop do something; nothing where it is gone, and so is whoever asked.

        Nothing in a process either that the task has forked: what happens there is its own.
        """
        if os.getpid() == self._pid:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(what, *on)
