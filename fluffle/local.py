"""``fluffle.run`` and ``fluffle.arun``: a federation in this process, or over RabbitMQ."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from fluffle.background import Background, short_traceback
from fluffle.federation import Federation, LocalTask, Tasks, by_name, make_task
from fluffle.keywords import as_keywords, settings_from
from fluffle.progress import Progress
from fluffle.results import Run
from fluffle.run_folder import RunFolder
from fluffle_common.errors import FluffleError, UsageError
from fluffle_common.protocol.topology import Topology
from fluffle_coordinator.machine.state import Quorum, State

if TYPE_CHECKING:
    from fluffle_coordinator.strategy.base import Strategy
    from fluffle_coordinator.user_code.hooks import Evaluate, OnRound

P = ParamSpec("P")
T = TypeVar("T")
RunCoroutine: TypeAlias = Callable[[Coroutine[Any, Any, State]], State]

_CALLER = "fluffle.run"


@short_traceback
def run(
    tasks: Tasks = (),
    *,
    rounds: int | None = None,
    quorum: int | float | str | None = None,
    strategy: str | Strategy[Any] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    config: Mapping[str, bool | int | float | str] | None = None,
    seed: int | None = None,
    evaluate: Evaluate | str | None = None,
    on_round: OnRound | str | None = None,
    folder: str | os.PathLike[str] | None = None,
    federation: str = "fluffle",
    url: str | None = None,
    progress: bool | None = None,
    parallel: bool | None = None,
    **options: Any,
) -> Run:
    """Run a federation to its end, with one worker per task.

    This runs the same coordinator, workers and rounds as ``fluffle coordinator`` and ``fluffle
    worker``, by default over a broker in this process. An argument that is None has the default of
    those commands. It also works in a notebook. After Ctrl-C, the same call with the same
    ``folder`` continues after the last committed round.

    Args:
        tasks: a list of tasks, or a mapping from worker names to tasks. A function without
            arguments that makes a task can take a task's place. Leave it empty and give ``url`` to
            run only a coordinator.
        rounds: the number of rounds.
        quorum: the updates that close a round: a number, a fraction, or ``"all"``.
        strategy: how updates become the next model: a name, ``path.py:name`` or an object.
        epochs: local epochs per round.
        batch_size: the local batch size.
        learning_rate: the local learning rate; None means the task's own.
        config: further settings for the tasks, passed as ``plan.config``.
        seed: the seed of every random choice.
        evaluate: a test of every round's model, ``evaluate(weights) -> metrics``; the next round
            waits for it.
        on_round: called with each ``Commit``; ends the run if it returns a reason or raises
            ``StopRun``.
        folder: the run folder; an earlier run in it is continued. None means a temporary folder,
            deleted once nothing refers to the returned object or its rounds.
        federation: the name of the federation.
        url: the URL of a broker, ``amqp://…``, to use instead of the one in this process. Workers
            elsewhere can then join.
        progress: whether to show progress; None shows it on a terminal and in a notebook.
        parallel: whether the tasks train at the same time, each in its own thread. By default they
            do so only if a round does not have to wait for all of them. One after the other takes
            no longer if the tasks' library uses all cores. Without ``url``, it also always sums in
            the same order, so that equal runs give equal models, bit for bit.
        **options: any other option of ``fluffle coordinator``, with underscores, such as
            ``deadline=60`` or ``keep_updates=True``.

    Returns:
        The run, with its history and its models.

    Raises:
        UsageError: if an argument is invalid.
        TaskError: if a task fails, with the exception of its own code as the cause, or if its
            update is rejected, such as one with NaN.
        RunError: if the run stopped before its end.
        BrokerError: if the broker stays unreachable for 10 minutes.
    """
    arguments = locals()  # all of the above, by name
    return Background(_prepared(**arguments.pop("options"), **arguments)).wait()


def _with_parameters_of(other: Callable[P, Run]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Return a decorator that gives a function the parameters of another, in ``help()`` too."""

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        vars(function)["__signature__"] = inspect.signature(other)
        return function

    return decorate


@_with_parameters_of(run)
async def arun(*arguments: Any, **keywords: Any) -> Run:
    """Do what ``run`` does, with the same arguments, without blocking the event loop.

    Cancelling this coroutine ends the run as Ctrl-C does.
    """
    try:
        # In a thread, because making the tasks may take long; if that is cancelled, no run starts.
        body = await asyncio.to_thread(_prepared, *arguments, **keywords)
        return await Background(body).result()
    except FluffleError as why:
        why.__traceback__ = None  # as in short_traceback
        raise why


@as_keywords()
def _prepared(
    tasks: Tasks = (),
    *,
    strategy: Any = None,
    evaluate: Any = None,
    on_round: Any = None,
    folder: str | os.PathLike[str] | None = None,
    federation: str = "fluffle",
    url: str | None = None,
    progress: bool | None = None,
    parallel: bool | None = None,
    **keywords: Any,
) -> Callable[[RunCoroutine], Run]:
    """Check the arguments of ``run``, and return what runs it in the background."""
    # First, what is named by a path: the code of a task may change the current folder.
    run_folder, named = RunFolder(folder), by_name(tasks, "worker")
    if not named and url is None:
        raise UsageError(
            f"{_CALLER}() needs at least one task; pass tasks, or pass url= to wait for workers "
            "that are started elsewhere"
        )
    settings, options = settings_from(
        _CALLER,
        {**keywords, "federation": federation, "url": url},
        workers=len(named),
        strategy=strategy,
        evaluate=evaluate,
        on_round=on_round,
    )
    rules = settings.rules
    workers = [LocalTask(name, make_task(name, task)) for name, task in named.items()]
    one_by_one = rules.quorum == Quorum() if parallel is None else not parallel

    @as_keywords()
    def body(run_coroutine: RunCoroutine) -> Run:
        with run_folder, Progress(progress, rules.rounds) as shown:
            federation = Federation(
                settings,
                Topology(settings.federation, options["queue_type"]),
                run_folder.store,
                workers,
                url=url,
                watcher=shown,
                one_by_one=one_by_one,
                fresh=options["fresh"],
            )
            try:
                state = run_coroutine(federation.run())
            finally:
                federation.end()
            return run_folder.result(state)

    return body
