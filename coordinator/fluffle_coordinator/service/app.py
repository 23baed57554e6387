"""The coordinator process: from options through the run folder and the broker to an exit code."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fluffle_common.cli.console import Console
from fluffle_common.cli.exit_now import Interrupted
from fluffle_common.cli.runtime import run_until_signalled
from fluffle_common.cli.settings import (
    broker_url_finder,
    check_federation,
    parse_classes,
    parse_config,
)
from fluffle_common.errors import LinkLost, RunError, UsageError
from fluffle_common.installed import needs
from fluffle_common.plural import plural
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.messages import Compression, Plan
from fluffle_common.protocol.metric_names import TEST_PREFIX
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.base import Transport
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from fluffle_common.transport.reconnect import Backoff, reconnecting
from fluffle_coordinator.machine.selection import UNIFORM, sample_size
from fluffle_coordinator.machine.state import Quorum, Rules, State
from fluffle_coordinator.observe.journal_writer import Journal
from fluffle_coordinator.observe.watchers import View, Watcher, Watchers
from fluffle_coordinator.service import endings
from fluffle_coordinator.service.coordinator import Coordinator
from fluffle_coordinator.service.early_stopping import Stopping
from fluffle_coordinator.service.learning_rate import schedule_of
from fluffle_coordinator.service.run_opening import open_run
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.history import merged
from fluffle_coordinator.storage.run_store import RunStore, Saved, this_process
from fluffle_coordinator.user_code.calls import leave
from fluffle_coordinator.user_code.hooks import Hooks
from fluffle_coordinator.user_code.schedule_loading import load_schedule
from fluffle_coordinator.user_code.strategy_loading import (
    load_strategy,
    rules_for,
    uncounted_sampling,
)

if TYPE_CHECKING:
    from fluffle_coordinator.dashboard.coordinator_source import CoordinatorSource


_LIMITS = {  # what a plan cannot contain, by pydantic's types of errors
    "string_too_long": "{value} is longer than {max_length} characters; shorten this value",
    "string_unicode": "{value} is not valid UTF-8; write other characters",
    "too_long": "at most {max_length} values can be given; remove some",
}


def run_coordinator(options: dict[str, Any]) -> None:
    """Run a coordinator, with the options of ``fluffle coordinator``, to its end.

    Raises:
        RunError: if the run stopped before its last round.
        TaskError: if the user's strategy, schedule or selection fails.
        SystemExit: after a signal, with 128 + its number.
    """
    settings = settings_of(options)
    federation = settings.federation
    find = broker_url_finder(options["url"])
    transport = AmqpTransport(find, f"fluffle coordinator of {federation}, {this_process()}")
    store = RunStore(options["folder"] or Path("runs") / federation)
    topology = Topology(federation, options["queue_type"])
    page = _page(options, topology, find)
    try:
        with Console(options["log_format"], {"federation": federation}) as console:
            if page:
                console.line("page", f"the page is at {page.url}", {"url": page.url})
            view, fresh = View(console), options["fresh"]
            run = coordinate(settings, transport, topology, store, view, page=page, fresh=fresh)
            state = run_until_signalled(page.beside(run) if page else run)
    except Interrupted as signalled:
        leave(signalled.exit_code)
    if state.outcome == "stopped":
        remedy = endings.after_a_stop(state, store.shown)
        raise RunError(f"the run stopped: {state.reason}; {remedy}")


def settings_of(options: dict[str, Any]) -> CoordinatorSettings:
    """Turn command-line options into settings.

    Raises:
        UsageError: if an option is invalid, or options contradict each other.
        TaskError: if the file of a strategy, schedule or hook fails to load.
    """
    # First: the code of a strategy, a hook or a task may change the current folder.
    init = options["init"] and options["init"].absolute()
    rules, strategy = _rules_of(options), load_strategy(options["strategy"])
    if options["keep_updates"] and not strategy.strategy.needs.repeatable:
        raise UsageError(
            f"--keep-updates conflicts with the strategy {strategy.name}, which protects updates "
            "with random noise that replay cannot reproduce; remove --keep-updates"
        )
    schedule = load_schedule(
        options["schedule"],
        **_pick(options, "buffer", "concurrency", "max_staleness", "staleness", "late"),
    )
    select = options["select"]
    if options["schedule"] == "buffered" and options["concurrency"] is None and select != UNIFORM:
        raise UsageError(
            f"--select {select.name} has no effect with --schedule buffered, which gives work to "
            "every idle worker; add --concurrency, or remove --select"
        )
    return CoordinatorSettings(
        federation=check_federation(options["federation"]),
        rules=rules_for(strategy, rules, schedule),
        plan=_plan_of(options),
        learning_rate_schedule=schedule_of(
            options["learning_rate_schedule"], options["learning_rate"]
        ),
        strategy=strategy,
        schedule=schedule,
        classes=parse_classes(options["classes"]),
        init=init,
        **_pick(options, "verify_users", "keep_checkpoints", "keep_updates"),
        hooks=Hooks.load(options["evaluate"], options["on_round"]),
        stopping=Stopping(
            **_pick(options, "monitor", "target", "patience"), time_budget_s=options["time_budget"]
        ),
        backoff=Backoff(give_up_s=options["wait_broker"]),
    )


def _pick(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the options that have the names of settings."""
    return {name: options[name] for name in names}


def _plan_of(options: dict[str, Any]) -> Plan:
    """Return the plan that the options describe, within the limits of the protocol."""
    if options["steps"] is not None and options["epochs"] > 1:
        raise UsageError("--epochs conflicts with --steps; use only one of them")
    codec = options["compress"] or options["upload_dtype"]
    compress = None if codec == "float32" else Compression.parse(codec)
    config = parse_config(options["config"])
    try:
        return Plan(
            **_pick(options, "epochs", "steps", "batch_size", "learning_rate"),
            compress=compress,
            config=config,
            train=options["train"] or None,
        )
    except ValidationError as why:
        raise UsageError(_beyond_limit(why)) from None


def _beyond_limit(why: ValidationError) -> str:
    """Return which option of a plan exceeds which limit.

    The options have their types already. Of a union's errors, only those of its text matter.
    """
    for wrong in why.errors(include_url=False):
        if limit := _LIMITS.get(wrong["type"]):
            text = limit.format(value=reprlib.repr(wrong["input"]), **wrong.get("ctx", {}))
            return f"--{str(wrong['loc'][0]).replace('_', '-')}: {text}"
    return f"the settings of a round are invalid: {why}"


def _rules_of(options: dict[str, Any]) -> Rules:
    """Return the rules of a run that the options describe, before its strategy changes them."""
    quorum: Quorum = options["quorum"]
    fraction: float = options["fraction"]
    min_workers: int | None = options["min_workers"]
    sample: int | None = options["sample"]
    if sample is not None and fraction < 1:
        raise UsageError("--fraction conflicts with --sample; use only one of them")
    if sample is None and fraction == 1:
        _check_asks_all(options)
    for option, needed in ("quorum", quorum.number or 1), ("min-updates", options["min_updates"]):
        if sample is not None and needed > sample:
            raise UsageError(
                f"--{option} {needed} needs more updates than --sample {sample} asks for; lower "
                f"--{option} or raise --sample"
            )
    least = quorum.number or 1
    if min_workers and options["select"].fixed:  # else, any number of workers may be asked
        cohort = min(sample, min_workers) if sample else sample_size(fraction, min_workers)
        least = quorum.of(cohort)
    if quorum.number is not None and options["min_updates"] > quorum.number:
        raise UsageError(
            f"--min-updates {options['min_updates']} is more than --quorum {quorum.number}, but a "
            f"round already closes with {quorum.number} updates; lower --min-updates to "
            f"{quorum.number} or less"
        )
    if options["min_updates"] > 1 and options["on_deadline"] != "close":
        raise UsageError(
            f"--min-updates {options['min_updates']} has no effect with --on-deadline "
            f"{options['on_deadline']}; add --on-deadline close, or remove --min-updates"
        )
    if options["max_round"] < options["deadline"]:
        raise UsageError(
            f"--max-round {options['max_round']:g} is less than --deadline "
            f"{options['deadline']:g}, so no round could reach its deadline; raise --max-round or "
            "lower --deadline"
        )
    return Rules(
        **_pick(options, "rounds", "quorum", "on_deadline", "min_updates", "fraction", "sample"),
        **_pick(options, "over_provision", "max_examples", "max_norm_ratio", "seed"),
        min_workers=min_workers or quorum.number or Rules.min_workers,
        least=least,
        selection=options["select"],
        grace_s=options["grace"],
        deadline_s=options["deadline"],
        max_round_s=options["max_round"],
        stall_timeout_s=options["stall_timeout"],
        wait_s=options["wait_workers"],
    )


def _check_asks_all(options: dict[str, Any]) -> None:
    """Check that no option has an effect only on rounds that do not ask all workers."""
    select, synchronous = options["select"], options["schedule"] == "quorum"
    for option, value, given in (
        ("--over-provision", f"{options['over_provision']:g}", options["over_provision"] > 1),
        ("--select", select.name, synchronous and select.fixed and select != UNIFORM),
    ):
        if given:
            raise UsageError(
                f"{option} {value} has no effect, because each round asks all workers; add "
                f"--sample or --fraction, or remove {option}"
            )


async def coordinate(
    settings: CoordinatorSettings,
    transport: Transport,
    topology: Topology,
    store: RunStore,
    watcher: Watcher,
    *,
    journaled: bool = True,
    page: CoordinatorSource | None = None,
    fresh: bool = False,
) -> State:
    """Begin or resume the run in a folder, and run it to its end; return the machine's last state.

    It waits while another coordinator holds the folder's lock. ``journaled`` runs publish their
    events on the broker. The live page also shows the rounds of the history. ``fresh`` moves an
    earlier run aside and begins a new one.

    Raises:
        BrokerError: if the broker stays unreachable, or refuses what the run needs.
        RunError: if the folder cannot be used.
        TaskError: if the user's strategy, schedule or selection fails.
        UsageError: if the run in the folder cannot continue with these settings.
    """
    monitor = settings.stopping.metric
    if monitor.startswith(TEST_PREFIX) and settings.hooks.evaluate is None:
        raise UsageError(
            f"--monitor {monitor} is a metric of the --evaluate function, but --evaluate is not "
            "given; add --evaluate, or monitor a federated metric such as "
            f"{monitor.removeprefix(TEST_PREFIX)}"
        )
    journal = Journal(topology) if journaled else None
    watchers: list[Watcher | None] = [watcher, journal, page]
    watcher = Watchers(*filter(None, watchers))
    # A broker that refuses the new run must not cost the folder its earlier run. One in memory, on
    # which no run is journaled, refuses nothing.
    if fresh and journaled:
        await _declare(settings, transport, topology, watcher)
    saved = await open_run(settings, topology, store, watcher, fresh=fresh)
    if page and saved.committed:
        page.remember(merged(saved.lines))
    for event in _beginning(settings, saved, store.shown):
        watcher.record(event)
    coordinator = Coordinator(
        settings,
        transport=transport,
        topology=topology,
        store=store,
        saved=saved,
        watcher=watcher,
        journal=journal,
    )
    committed = saved.committed
    del saved  # it holds a model and the history
    state = await coordinator.run()
    rules = settings.rules
    if state.outcome == "finished" and committed < rules.rounds:
        stopped = coordinator.enough() != "" and state.committed < rules.rounds
        advice = endings.after_the_end(store.shown, state.committed, rules, by_rule=stopped)
        watcher.record(run_events.Note(what=advice))
    return state


async def _declare(
    settings: CoordinatorSettings, transport: Transport, topology: Topology, watcher: Watcher
) -> None:
    """Wait for the broker, and declare what the run needs."""

    def no_broker(reason: str) -> None:
        watcher.record(run_events.NoBroker(address=transport.address, reason=reason))

    opened = reconnecting(transport, settings.backoff, no_broker)
    async with contextlib.aclosing(opened):
        async for link in opened:
            with contextlib.suppress(LinkLost):
                await link.declare(topology.required())
                return


def _beginning(
    settings: CoordinatorSettings, saved: Saved, folder: Path
) -> Iterator[run_events.RunEvent]:
    """Yield the events that say how the run begins, and what its operator should know."""
    strategy, rounds = settings.strategy, settings.rules.rounds
    if saved.committed:
        yield run_events.Resumed(run=saved.run, rounds=rounds, round=saved.committed)
    else:
        yield run_events.Started(run=saved.run, rounds=rounds, folder=str(folder))
    if rounds == strategy.strategy.needs.max_rounds:
        what = f"the strategy {strategy.name} allows at most {plural(rounds, 'round')}"
        yield run_events.Note(what=what)
    if what := uncounted_sampling(strategy, settings.rules):
        yield run_events.Note(what=what)
    if saved.committed >= rounds:
        yield run_events.Note(what=endings.done_already(folder, saved.committed, settings.rules))


def _page(
    options: dict[str, Any], topology: Topology, find_url: Callable[[], str]
) -> CoordinatorSource | None:
    """Return the live page, or None without ``--dashboard``."""
    if options["dashboard"] is None:
        return None
    with needs("the page needs starlette, uvicorn and prometheus-client", "dashboard"):
        from fluffle_coordinator.dashboard.coordinator_source import CoordinatorSource
        from fluffle_coordinator.dashboard.feed import queue_asker
        from fluffle_coordinator.dashboard.server import listen
    ask_queues = queue_asker(topology, find_url, options["management"])
    # Bound at once, so that a port in use stops the command before the run begins.
    listening = listen(options["dashboard"], "--dashboard")
    return CoordinatorSource(topology.federation, listening, ask_queues)
