"""A coordinator and one worker per task, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from fluffle.turns import Turns
from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo
from fluffle_common.cli.settings import check_worker
from fluffle_common.cli.user_code import call_task
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol.events import Failure, NotCounted, RunEvent, Traceback, Unfit
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.layout import Signature
from fluffle_common.transport.base import Transport
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.user_errors import is_ctrl_c, one_line, users_trace
from fluffle_coordinator.machine.state import State
from fluffle_coordinator.observe.watchers import Watcher, Watchers
from fluffle_coordinator.service.app import coordinate
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.run_store import RunStore, this_process
from fluffle_worker.job import NotWanted
from fluffle_worker.service import WorkerService
from fluffle_worker.settings import WorkerSettings
from fluffle_worker.signature import UNKNOWN, signature_of_task
from fluffle_worker.task import Task
from fluffle_worker.task_loading import check_task
from fluffle_worker.trainer import TrainingThread

T = TypeVar("T")
MakesTask: TypeAlias = Callable[[], Task]
Tasks: TypeAlias = Iterable[Task | MakesTask] | Mapping[str, Task | MakesTask]

# The time that workers get to leave after the coordinator has ended.
_LEAVE_S = 5.0
# The time that tasks get to reach their next step, where abandoned work ends.
_STEP_S = 5.0
# The causes of a rejection that the task's result is to blame for. A norm above --max-norm-ratio is
# not among them: whoever gives that option expects such updates.
_FAULTS_OF_TASKS = ("not_finite", "tensors")


class LocalTask:
    """A task with the name of its worker; remembers the exceptions that the task's code raises.

    Raises:
        TaskError: if the task cannot make the first weights, or they cannot be sent.
    """

    def __init__(self, name: str, task: Task) -> None:
        self.name, self.task = name, task
        self.error: BaseException | None = None
        self.signature: Signature = UNKNOWN
        try:
            self.signature = signature_of_task(self)
        except TaskError as why:
            if self.error is not None:  # from init() below
                raise
            raise cannot_take_part(name, why) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def init(self, *arguments: Any) -> Any:
        """Make first weights; see ``Task``."""
        try:
            return self._remembering(self.task.init, *arguments)
        except BaseException as why:
            if self.signature == UNKNOWN and not is_ctrl_c(why):  # called by the constructor
                raise self.failure(
                    f"cannot make the first weights: {one_line(why)}"
                ) from self.error
            raise

    def train(self, *arguments: Any) -> Any:
        """Train; see ``Task``."""
        return self._remembering(self.task.train, *arguments)

    def failure(self, what: str) -> TaskError:
        """Return a ``TaskError`` whose cause is the task's own exception, if it raised one."""
        error = TaskError(f"the task '{self.name}' {what}")
        if self.error is not None:
            error.__cause__ = self.error.with_traceback(users_trace(self.error))
        return error

    def _remembering(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except NotWanted:
            raise
        except BaseException as why:
            self.error = why
            raise


def cannot_take_part(name: str, why: TaskError) -> TaskError:
    """Return the error about a task whose model cannot travel."""
    return TaskError(f"the task '{name}' cannot take part: {why}")


def by_name(given: Iterable[T] | Mapping[Any, T], what: str) -> dict[str, T]:
    """Return tasks by the names of their workers; number those of an iterable.

    Raises:
        UsageError: if a name is invalid or not unique, or ``given`` is a single object.
    """
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise UsageError(
            f"expected a list of tasks or a mapping of names to tasks, not {given!r:.80}"
        )
    if not isinstance(given, Mapping):
        tasks = list(given)
        given = dict(zip(numbered(what, len(tasks)), tasks, strict=True))
    named = {check_worker(str(name)): task for name, task in given.items()}
    if len(named) < len(given):
        raise UsageError(
            f"the names of the tasks are not unique: {', '.join(map(repr, given))}; give each "
            "task its own name"
        )
    return named


def numbered(what: str, count: int) -> list[str]:
    """Return ``count`` names whose alphabetical order is that of their numbers.

    Example:
        >>> numbered("client", 11)[:2]
        ['client-00', 'client-01']
    """
    width = len(str(count - 1))
    return [f"{what}-{number:0{width}}" for number in range(count)]


def make_task(name: str, task: Task | MakesTask) -> Task:
    """Return a task, or the task that a function makes.

    Raises:
        UsageError: if it is not a task.
        TaskError: if it cannot be made.
    """
    if isinstance(task, type) or (callable(task) and not hasattr(task, "train")):
        task = call_task(f"the task '{name}' cannot be made", task)
    return check_task(f"'{name}'", task)


class Federation(Watcher):
    """One run: its coordinator, which it also watches, and the workers in this process.

    The run folder is locked. Without ``url``, the broker is in this process too. With
    ``one_by_one``, all tasks train in one thread; without ``url``, their updates always arrive in
    the same order.
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
        self._linked = asyncio.Event()  # set once the coordinator has declared what all share
        self._watcher = Watchers(watcher, self)
        shared = TrainingThread()
        self._threads = {task.name: shared if one_by_one else TrainingThread() for task in tasks}
        self._broker = MemoryBroker() if url is None else None
        self._in_turn, self._turns = one_by_one and url is None, Turns()
        self._trainings = set[asyncio.Task[None]]()

    async def run(self) -> State:
        """Run the federation to its end; return the machine's final state.

        Raises:
            TaskError: if a task fails.
            RefusedError: if the coordinator refuses a worker, or another worker has its name.
        """
        name = self._settings.federation
        coordinator = asyncio.ensure_future(
            coordinate(
                self._settings,
                self._transport(f"coordinator of {name}, {this_process()}"),
                self._topology,
                self._store,
                self._watcher,
                journaled=self._url is not None,
                fresh=self._fresh,
            )
        )
        failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        workers = [asyncio.ensure_future(self._work(task, failure)) for task in self._tasks]
        futures: list[asyncio.Future[Any]] = [coordinator, failure, *workers]
        try:
            pending = set(futures)
            while not coordinator.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    future.result()
            if workers:
                await asyncio.wait(workers, timeout=_LEAVE_S)
            return coordinator.result()
        finally:
            futures += self._trainings
            for future in futures:
                future.cancel()
            await asyncio.gather(*futures, return_exceptions=True)

    def show(self, state: State, now: float) -> None:
        """Let the workers begin once the coordinator has a link; see ``Watcher``."""
        if state.link:
            self._linked.set()

    def end(self) -> None:
        """End the training threads; call this after the event loop is closed."""
        deadline = time.monotonic() + _STEP_S
        for thread in set(self._threads.values()):
            thread.end(max(0.0, deadline - time.monotonic()))

    async def _work(self, task: LocalTask, failure: asyncio.Future[None]) -> None:
        await self._linked.wait()  # spares the worker from polling for the coordinator
        settings, thread = self._settings, self._threads[task.name]

        def in_turn(work: Callable[[], object]) -> None:
            training = asyncio.create_task(self._train(work, task.name, service))
            self._trainings.add(training)
            training.add_done_callback(self._trainings.discard)

        service = WorkerService(
            WorkerSettings(
                settings.federation,
                task.name,
                type(task.task).__name__,
                state_dir=self._store.folder / "workers" / task.name,
            ),
            task,
            transport=self._transport(f"worker {task.name} of {settings.federation}"),
            topology=self._topology,
            record=lambda event: _on_worker_event(task, failure, event),
            bar=lambda *_: None,
            enqueue=in_turn if self._in_turn else thread.put,
            signature=task.signature,
        )
        await service.run()

    async def _train(self, work: Callable[[], object], name: str, service: WorkerService) -> None:
        """Run a worker's training when it is its turn, until the broker has the answer.

        Otherwise, the answer of a short training could overtake the previous one.
        """
        loop, over = asyncio.get_running_loop(), asyncio.Event()

        def run() -> None:
            work()
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(over.set)

        async with self._turns.turn(name):
            self._threads[name].put(run)
            await over.wait()
            await service.settle()

    def _transport(self, who: str) -> Transport:
        if self._broker is not None:
            return self._broker
        from fluffle_common.transport.rabbitmq.transport import AmqpTransport

        url = str(self._url)
        return AmqpTransport(lambda: url, f"fluffle {who}")


def _on_worker_event(task: LocalTask, failure: asyncio.Future[None], event: RunEvent) -> None:
    """Handle a worker's event: a failure or a rejected update ends the run.

    A result of which a part was left out is a warning.
    """
    match event:
        case Failure(round=number, reason=reason) if not failure.done():
            where = f"in round {number}" if number else "while making the first weights"
            failure.set_exception(task.failure(f"failed {where}: {reason}"))
        case NotCounted(cause=cause) if cause in _FAULTS_OF_TASKS and not failure.done():
            what = f"failed in round {event.round}: its update was rejected ({event.reason})"
            failure.set_exception(task.failure(what))
        case Unfit(reason=reason):
            warn(f"the task '{task.name}': {reason}")
        case Traceback() if task.error is None:
            echo(*event.sentence().splitlines(), err=True)
