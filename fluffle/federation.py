"""A coordinator, and a worker for each task, in one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo
from fluffle_common.cli.settings import check_worker
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol.events import Failure, RunEvent, Traceback, Unfit
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.layout import Signature
from fluffle_common.transport.base import Transport
from fluffle_common.transport.memory import MemoryBroker
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.observe.journal_writer import Journal
from fluffle_coordinator.observe.watchers import Watcher, Watchers
from fluffle_coordinator.service.app import coordinate
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore
from fluffle_worker.job import NotWanted
from fluffle_worker.service import WorkerService
from fluffle_worker.settings import WorkerSettings
from fluffle_worker.signature import UNKNOWN, signature_of_task
from fluffle_worker.task import Task, check_task
from fluffle_worker.training_thread import TrainingThread
from fluffle_worker.user_code import CALLERS, one_line

MakesTask: TypeAlias = Callable[[], Task]
Tasks: TypeAlias = Sequence[Task | MakesTask] | Mapping[str, Task | MakesTask]

# How long the workers may take to say good-bye when the coordinator has ended.
_LEAVE_S = 5.0
# How long tasks may take to their next step when nobody wants their work any more.
_STEP_S = 5.0


class LocalTask:
    """A task of this process, with its worker's name; remembers what its own code raises.

    Args:
        name: of its worker.
        task: the task itself.
    """

    def __init__(self, name: str, task: Task) -> None:
        self.name, self.task = name, task
        self.error: BaseException | None = None
        self.form: Signature = UNKNOWN
        self.form = signature_of_task(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def init(self, *given: Any) -> Any:
        """See ``Task``."""
        try:
            return self._noting(self.task.init, *given)
        except BaseException as why:
            if self.form == UNKNOWN:  # nothing runs yet
                raise self.failure(f"cannot make first weights: {one_line(why)}") from self.error
            raise

    def train(self, *given: Any) -> Any:
        """See ``Task``."""
        return self._noting(self.task.train, *given)

    def failure(self, what: str) -> TaskError:
        """Return the error to raise for it, caused by its own and with its own traceback."""
        wrong = TaskError(f"the task '{self.name}' {what}")
        if self.error is not None:
            wrong.__cause__ = self.error.with_traceback(_own(self.error.__traceback__))
        return wrong

    def _noting(self, call: Callable[..., Any], *given: Any) -> Any:
        try:
            return call(*given)
        except NotWanted:
            raise
        except BaseException as why:
            self.error = why
            raise


def _own(trace: TracebackType | None) -> TracebackType | None:
    """Leave out of a traceback how we have come to call a task's code."""
    ours = {*CALLERS, __file__}
    while trace is not None and trace.tb_next and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace


def named_tasks(tasks: Tasks) -> list[LocalTask]:
    """Return tasks with the names of their workers, made where they are yet to be made.

    Raises:
        UsageError: where a name or a task is none.
        TaskError: where a task cannot be made, or cannot make first weights.
    """
    if isinstance(tasks, Mapping):
        pairs = list(tasks.items())
    else:
        pairs = list(zip(numbered("worker", len(tasks)), tasks, strict=True))
    return [LocalTask(check_worker(name), _made(name, given)) for name, given in pairs]


def numbered(what: str, count: int) -> list[str]:
    """Return so many names, which are in the order of their numbers.

    Example:
        >>> numbered("client", 11)[:2]
        ['client-00', 'client-01']
    """
    width = len(str(count - 1))
    return [f"{what}-{number:0{width}}" for number in range(count)]


def _made(name: str, given: Task | MakesTask) -> Task:
    if isinstance(given, type) or (callable(given) and not hasattr(given, "train")):
        try:
            given = given()
        except (TaskError, UsageError):
            raise
        except Exception as why:
            raise TaskError(f"the task '{name}' cannot be made: {one_line(why)}") from why
    return check_task(f"'{name}'", given)


class Federation:
    """One run, and the workers of this process that take part in it.

    Args:
        settings: what the operator decided.
        topology: the names on the broker.
        store: the run's folder, locked.
        tasks: one for each worker.
        url: the broker; None is one in this process.
        watcher: told what happens.
        one_by_one: whether all tasks train in one thread, in the order in which they are asked.
        fresh: move an earlier run aside.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        topology: Topology,
        store: RunStore,
        tasks: Sequence[LocalTask],
        *,
        url: str | None,
        watcher: Watcher,
        one_by_one: bool,
        fresh: bool,
    ) -> None:
        self._settings, self._topology, self._store = settings, topology, store
        self._tasks, self._url, self._fresh = tasks, url, fresh
        self._linked = asyncio.Event()
        self._watcher = Watchers(watcher, _Linked(self._linked))
        shared = TrainingThread()
        self._threads = {one.name: shared if one_by_one else TrainingThread() for one in tasks}
        self._broker = MemoryBroker() if url is None else None

    async def run(self) -> State:
        """Run to the end of the run; return how it ended.

        Raises:
            TaskError: where a task fails.
            RefusedError: where the coordinator refuses a worker, or another has its name.
        """
        coordinator = asyncio.ensure_future(self._coordinate())
        failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        workers = [asyncio.ensure_future(self._work(one, failure)) for one in self._tasks]
        try:
            pending: set[asyncio.Future[Any]] = {coordinator, failure, *workers}
            while not coordinator.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    one.result()
            if workers:
                await asyncio.wait(workers, timeout=_LEAVE_S)
            return coordinator.result()
        finally:
            tasks: list[asyncio.Future[Any]] = [coordinator, failure, *workers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def end(self) -> None:
        """End the threads in which the tasks train; call it when the loop is closed."""
        over_at = time.monotonic() + _STEP_S
        for thread in set(self._threads.values()):
            thread.end(max(0.0, over_at - time.monotonic()))

    async def _coordinate(self) -> State:
        journal = None if self._url is None else Journal(self._topology)
        return await coordinate(
            self._settings,
            self._transport("coordinator"),
            self._topology,
            self._store,
            Watchers(self._watcher, *([journal] if journal else [])),
            journal=journal,
            fresh=self._fresh,
        )

    async def _work(self, task: LocalTask, failure: asyncio.Future[None]) -> None:
        await self._linked.wait()  # else it would look for a coordinator every now and then
        settings = self._settings
        service = WorkerService(
            WorkerSettings(
                settings.federation,
                task.name,
                type(task.task).__name__,
                state_dir=self._store.folder / "workers" / task.name,
            ),
            task,
            transport=self._transport(f"worker {task.name}"),
            topology=self._topology,
            tell=lambda event: _heed(task, failure, event),
            bar=lambda *_: None,
            training=self._threads[task.name],
            form=task.form,
        )
        await service.run()

    def _transport(self, who: str) -> Transport:
        if self._broker is not None:
            return self._broker
        from fluffle_common.transport.rabbitmq.transport import AmqpTransport

        url = str(self._url)
        return AmqpTransport(lambda: url, f"fluffle {who} of {self._settings.federation}")


def _heed(task: LocalTask, failure: asyncio.Future[None], event: RunEvent) -> None:
    """Take what a worker tells: a failure ends the run, what is not fit for use is shown."""
    match event:
        case Failure(round=number, reason=reason) if not failure.done():
            where = f"in round {number}" if number else "at the first weights"
            failure.set_exception(task.failure(f"failed {where}: {reason}"))
        case Unfit(reason=reason):
            warn(f"the task '{task.name}': {reason}")
        case Traceback() if task.error is None:
            echo(*event.sentence().splitlines(), err=True)


class _Linked(Watcher):
    """Says when the coordinator is connected, and what it shares with the workers is there."""

    def __init__(self, linked: asyncio.Event) -> None:
        self._linked = linked

    def record(self, event: object) -> None:
        """See ``Watcher``."""

    def show(self, state: State, now: float) -> None:
        """See ``Watcher``."""
        if state.link:
            self._linked.set()
