"""``fluffle.run``: a whole federation in this process, or its coordinator over RabbitMQ."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from fluffle.background import Background
from fluffle.federation import Federation, Tasks, named_tasks
from fluffle.place import locked, place_of
from fluffle.progress import Progress
from fluffle.results import Run
from fluffle_common.cli.config_file import options_from
from fluffle_common.errors import RunError, UsageError
from fluffle_common.protocol.topology import Topology
from fluffle_coordinator.cli.coordinator import coordinator, rules_of
from fluffle_coordinator.machine.state import Quorum, Rules, State
from fluffle_coordinator.service.app import settings_of

if TYPE_CHECKING:
    from fluffle_coordinator.service.hooks import Evaluate, OnRound
    from fluffle_coordinator.strategy.base import Strategy

P = ParamSpec("P")
T = TypeVar("T")

_CALLER = "fluffle.run"
_NOT_HERE = {
    "run": "folder= says where the run is kept",
    "dashboard": "'fluffle dashboard --url …' shows a run over RabbitMQ",
    "management": "the option belongs to the live page",
    "log_format": "progress= says what is shown",
    "verify_users": "the in-memory broker has no users; give url=",
}


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
    """Run a federation to its end, a worker for each task: here, or over RabbitMQ.

    It is the coordinator, the workers and the rounds of ``fluffle coordinator`` and ``fluffle
    worker``, over a broker in this process. What is None is as it is there.

    It may be called in a notebook. Ctrl-C ends it, and the same call with the same ``folder`` goes
    on after the last committed round.

    Args:
        tasks: a list of tasks, or tasks by the names of their workers. Instead of a task, a
            function without arguments may make it. Empty with ``url`` for a coordinator alone.
        rounds: how many rounds.
        quorum: updates that close a round: a number, a fraction, or ``"all"``.
        strategy: how updates become the next model: a name, ``path.py:name`` or an object.
        epochs: local epochs a round.
        batch_size: of the local training.
        learning_rate: of the local training; None is the task's own.
        config: anything else a task wants to know; its ``plan.config``.
        seed: of everything random.
        evaluate: a test of every round's model, ``evaluate(weights) -> metrics``; the next round
            waits for it.
        on_round: shown every ``Commit``; ends the run by returning a reason or raising ``StopRun``.
        folder: where the run is kept, and goes on from if it is there; a temporary folder, which
            goes with the returned object, if not given.
        federation: the name of its queues.
        url: a broker, ``amqp://…``, instead of the one in this process. Other workers may join.
        progress: show how far it is; None does on a terminal and in a notebook.
        parallel: let the tasks train at the same time, each in a thread of its own. By default they
            do so only if a round need not wait for all of them. One after the other, they take as
            long if their library uses all cores, and the sum has the same order every time.
        **options: any other option of ``fluffle coordinator``, with underscores, such as
            ``deadline=60`` or ``keep_updates=True``.

    Returns:
        The run: its history, its models, where it is.

    Raises:
        UsageError: for an argument that is wrong.
        TaskError: where a task fails, with the error of the task's own code as its cause.
        RunError: where the run stopped before its end, with the reason.
        BrokerError: where the broker cannot be reached for too long.
    """
    background = _start(
        tasks,
        rounds=rounds,
        quorum=quorum,
        strategy=strategy,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        config=config,
        seed=seed,
        evaluate=evaluate,
        on_round=on_round,
        folder=folder,
        federation=federation,
        url=url,
        progress=progress,
        parallel=parallel,
        **options,
    )
    return background.wait()


def _with_parameters_of(_: Callable[P, Run]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Give a function the parameters of another, for whoever checks types."""
    return lambda function: function


@_with_parameters_of(run)
async def arun(*arguments: Any, **named: Any) -> Run:
    """Do what ``run`` does, with its arguments, beside a running event loop, which goes on.

    Cancelling it ends the run as Ctrl-C does.
    """
    return await _start(*arguments, **named).result()


def _start(
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
    **given: Any,
) -> Background[Run]:
    """Check the arguments of ``run``, and begin."""
    workers = named_tasks(tasks)
    for name, why in _NOT_HERE.items():
        if given.get(name) and (url is None or name != "verify_users"):
            raise UsageError(f"{_CALLER}() has no {name}=: {why}")
    stated = {**given, "federation": federation, "url": url}
    options = options_from(coordinator, stated, _CALLER)
    if workers and options["min_workers"] is None:  # it begins when all of them are there
        options["min_workers"] = max(len(workers), options["quorum"].number or 1)
    options["strategy"] = options["strategy"] if strategy is None else strategy
    options |= {"evaluate": evaluate, "on_round": on_round}
    settings = settings_of(rules_of(options), options)
    _check_enough(settings.rules, len(workers), url)
    one_by_one = settings.rules.quorum == Quorum() if parallel is None else not parallel

    def body(complete: Callable[[Coroutine[Any, Any, State]], State]) -> Run:
        rounds = settings.rules.rounds
        with place_of(folder) as place, Progress(progress, rounds) as shown, locked(place) as store:
            federation = Federation(
                settings,
                Topology(settings.federation, options["queue_type"]),
                store,
                workers,
                url=url,
                watcher=shown,
                one_by_one=one_by_one,
                fresh=options["fresh"],
            )
            try:
                state = complete(federation.run())
            finally:
                federation.end()
            if state.outcome == "stopped":
                raise RunError(f"the run stopped: {state.reason}{place.how_to_go_on()}")
            return place.handed_over(Run(place.path))

    return Background(body)


def _check_enough(rules: Rules, workers: int, url: str | None) -> None:
    """Check that a run in this process has the workers that its rules ask for.

    Raises:
        UsageError: where it would wait for ever.
    """
    if url is not None:
        return
    if not workers:
        raise UsageError(f"{_CALLER}() has no tasks; give some, or url= to wait for other workers")
    for name, wanted in (("quorum", rules.quorum.number), ("min_workers", rules.min_workers)):
        if wanted is not None and wanted > workers:
            raise UsageError(
                f"{_CALLER}(): {name} = {wanted} is more than the {workers} tasks; give it more "
                f"tasks, or a lower {name}"
            )
