"""Mutants of the machines: each has one line replaced, and the tests of the rules must notice.

``rule`` names the test that must fail, in one of the ``test_rounds_…`` files or in
``test_worker_machine``; ``random`` says that ``test_rounds_machine`` must fail.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fluffle_coordinator.machine import (
    agreement,
    clock,
    closing,
    evaluation,
    finishing,
    first_weights,
    membership,
    norms,
    opening,
    updates,
    work,
)
from fluffle_coordinator.machine import machine as rounds
from fluffle_coordinator.machine.schedules import quorum
from fluffle_worker import machine as session
from tests.unit import (
    test_rounds,
    test_rounds_buffered,
    test_rounds_commit,
    test_rounds_frozen,
    test_rounds_machine,
    test_rounds_norms,
    test_rounds_poisson,
    test_rounds_workers,
    test_worker_machine,
)
from tests.unit.test_rounds_machine import Federation


@dataclass(frozen=True)
class Mutant:
    """A broken line, and the tests that must notice."""

    name: str
    module: ModuleType
    old: str
    new: str
    rule: str = ""
    random: bool = True


MUTANTS = [
    Mutant(
        "acknowledges an update when it is folded, before the commit",
        updates,
        "    staleness = state.round - update.round\n    asked, ",
        "    out.append(Ack(update.handle))\n"
        "    staleness = state.round - update.round\n    asked, ",
        "test_nothing_is_acknowledged_before_the_commit_is_on_disk",
    ),
    Mutant(
        "acknowledges late updates before the commit is on disk",
        updates,
        "    if number < state.round and not (",
        "    if state.phase is Phase.COMMITTING or number < state.round and not (",
        "test_an_update_during_the_commit_is_late_once_that_is_on_disk",
    ),
    Mutant(
        "folds duplicates",
        updates,
        "    if ticket in state.received:\n        return _hold_copy",
        "    if False:\n        return _hold_copy",
        "test_a_copy_of_a_held_update_is_acknowledged",
    ),
    Mutant(
        "counts a worker once for each ticket that it invents",
        updates,
        "    return replace(update, ticket=Ticket(worker, update.round))\n",
        "    return update\n",
        "test_a_worker_that_invents_tickets_counts_once_in_a_round",
        random=False,
    ),
    Mutant(
        "folds late updates into the next round",
        updates,
        "    if staleness > schedule.max_staleness:\n",
        "    if False:\n",
        "test_a_late_update_is_acknowledged_and_reported",
        random=False,
    ),
    Mutant(
        "folds updates during the commit",
        updates,
        "    if state.phase is not Phase.COMMITTING:  # else ``committed``",
        "    if True:  # else ``committed``",
        "test_an_update_during_the_commit_is_late_once_that_is_on_disk",
    ),
    Mutant(
        "folds a copy while the round is being committed",
        updates,
        "        if state.phase is not Phase.COMMITTING:  # else it",
        "        if True:  # else it",
        "test_a_copy_is_not_folded_while_the_round_is_being_committed",
        random=False,
    ),
    Mutant(
        "accepts another run's updates",
        updates,
        "    if event.run != state.run:\n        reason = ",
        "    if False:\n        reason = ",
        "test_an_update_of_another_round_is_rejected_with_the_reason",
    ),
    Mutant(
        "accepts updates of future rounds",
        updates,
        "    if number > state.round or not",
        "    if not",
        "test_an_update_of_another_round_is_rejected_with_the_reason",
        random=False,
    ),
    Mutant(
        "forgets the copies",
        updates,
        "    if copies := state.spares.get(ticket):\n",
        "    if False:\n",
        "test_the_copy_is_folded_if_the_first_is_rejected",
        random=False,
    ),
    Mutant(
        "trusts the first of several copies after an outage",
        updates,
        "    if ticket in state.norms and held.handle.link == copy.handle.link:\n",
        "    if ticket in state.norms:\n",
        "test_a_redelivery_replaces_the_void_delivery",
        random=False,  # it takes a rare coincidence, which the search does not always find
    ),
    Mutant(
        "does not recognise a counted update after the commit",
        updates,
        "    if state.has_counted(ticket, number):\n",
        "    if False:\n",
        "test_a_redelivery_after_the_commit_is_a_duplicate",
        random=False,
    ),
    Mutant(
        "averages updates from lost weights",
        updates,
        "    if event.base != base:\n",
        "    if False:\n",
        "test_an_update_from_other_weights_is_rejected",
    ),
    Mutant(
        "counts a participant whose update is not in the sum",
        updates,
        "    counted = frozenset(state.norms)\n",
        "    counted = frozenset(state.received)\n",
        "test_an_update_of_a_round_being_committed_is_held_until_it_is_on_disk",
        random=False,
    ),
    Mutant(
        "folds updates of the round being committed into the next one",
        updates,
        "_discount(state, state.round + 1 - update.round)\n",
        "_discount(state, state.round - update.round)\n",
        "test_an_update_of_a_round_being_committed_is_held_until_it_is_on_disk",
    ),
    Mutant(
        "forgets the workers of earlier cohorts",
        closing,
        "{*state.asked, *state.asked_before, *in_it}",
        "{*state.asked, *in_it}",
        "test_a_commit_names_the_workers_asked_before_the_cohort_was_redrawn",
        random=False,
    ),
    Mutant(
        "gives workers no time to come back after an outage",
        rounds,
        "last_seen=event.now",
        "last_seen=w.last_seen",
        "test_after_our_own_outage_every_worker_has_the_full_time_to_be_heard",
        random=False,
    ),
    Mutant(
        "counts the time of an outage",
        rounds,
        "        state = postpone(state, event.now - state.unlinked_since)\n",
        "        pass\n",
        "test_our_own_outage_does_not_count_as_a_stall",
        random=False,
    ),
    Mutant(
        "waits for first weights from a worker that restarted",
        membership,
        "        if state.init_asked == worker.name:",
        "        if False:",
        "test_the_first_weights_are_asked_again_of_a_worker_that_restarted",
        random=False,
    ),
    Mutant(
        "waits for first weights whose parts are lost",
        first_weights,
        "state.replace(init_asked=None, init_lost_at",
        "state.replace(init_lost_at",
        "test_the_first_weights_are_asked_of_another_worker",
        random=False,
    ),
    Mutant(
        "asks for first weights again if those of an earlier worker are lost",
        first_weights,
        "if event.worker != state.init_asked:",
        "if False:",
        "test_first_weights_lost_on_their_way_from_an_earlier_worker_are_not_asked_for_again",
        random=False,
    ),
    Mutant(
        "asks for first weights all the time if their parts never arrive",
        first_weights,
        "after = again_at if in_vain else math.inf",
        "after = math.inf",
        "test_first_weights_that_are_lost_again_are_not_asked_for_all_the_time",
        random=False,
    ),
    Mutant(
        "commits below the quorum",
        closing,
        "state.folded >= state.needed",
        "state.folded >= state.needed - 1",
        "test_the_quorum_commits",
    ),
    Mutant(
        "reopens for ever",
        closing,
        "    if fruitless > rules.max_reopenings:",
        "    if False:",
        "test_reopenings_without_a_new_update_are_bounded",
        random=False,
    ),
    Mutant(
        "reopens a round that may not stay open longer",
        closing,
        "    if _expired(state, now):\n",
        "    if False:\n",
        "test_a_round_is_not_reopened_at_a_deadline_that_is_also_its_limit",
        random=False,
    ),
    Mutant(
        "forgets the work in progress when a version is committed",
        updates,
        "    if state.schedule.continuous:  # workers continue with their work\n",
        "    if False:\n",
        "test_workers_continue_with_their_work_after_a_commit",
        random=False,
    ),
    Mutant(
        "discards updates during the commit that still count",
        updates,
        "            later = not last and _discount(",
        "            later = False and _discount(",
        "test_an_update_during_the_commit_is_in_the_next_version",
    ),
    Mutant(
        "gives two pieces of work the same ticket",
        work,
        "state.sequence + 1 if continuous else state.round",
        "state.round",
        "test_each_piece_of_work_has_a_ticket_of_its_own",
        random=False,  # each worker then counts once a version, which ends too
    ),
    Mutant(
        "sends frozen tensors to a worker that holds them",
        work,
        "worker is None or state.frozen in worker.frozen:\n",
        "worker is None:\n",
        "test_a_worker_that_holds_them_is_not_sent_them_after_any_outage",
        random=False,
    ),
    Mutant(
        "sends frozen tensors with every work until it is heard that they have come",
        work,
        "    if sent_at is None:\n",
        "    if True:\n",
        "test_they_are_not_sent_with_the_next_work_although_nothing_was_heard_of_them",
        random=False,
    ),
    Mutant(
        "takes frozen tensors for sent that were lost with a link",
        membership,
        "state.frozen_sent.discard(worker.session)",
        "state.frozen_sent",
        "test_they_are_sent_again_after_a_hello_and_after_our_own_outage",
        random=False,
    ),
    Mutant(
        "discounts nothing",
        updates,
        "    return schedule.discount(staleness) if staleness or schedule.continuous else 1.0\n",
        "    return 1.0\n",
        "test_a_stale_update_weighs_less",
        random=False,
    ),
    Mutant(
        "closes a round with late updates",
        updates,
        "    towards_quorum = state.schedule.continuous or fresh\n",
        "    towards_quorum = True\n",
        "test_a_late_update_counts_in_the_open_round_and_does_not_close_it",
    ),
    Mutant(
        "spins while the grace outlasts the deadline",
        closing,
        "    if state.quorum_at is not None:\n        planned",
        "    if False:\n        planned",
        "test_the_grace_may_last_longer_than_the_deadline",
        random=False,
    ),
    Mutant(
        "spins after a resume while nobody comes",
        rounds,
        "state = state.replace(gate=1, gate_until=math.inf)",
        "state = state.replace(gate=1)",
        "test_a_resumed_run_does_not_spin_while_nobody_joins",
    ),
    Mutant(
        "takes its own stop for the workers' silence",
        membership,
        "    now = clock_time(state, event.now)\n",
        "    now = event.now\n",
        "test_a_stopped_coordinator_makes_no_worker_gone",
    ),
    Mutant(
        "counts the time in which nobody was heard",
        clock,
        "    if lost_s > 0:\n",
        "    if False:\n",
        "test_a_stopped_coordinator_makes_no_worker_gone",
    ),
    Mutant(
        "believes heartbeats from before its link",
        membership,
        "    if not state.caught_up:\n",
        "    if False:\n",
        "test_heartbeats_from_before_the_link_do_not_count",
        random=False,
    ),
    Mutant(
        "commits with fewer updates than the rules allow",
        closing,
        "state.folded >= state.needed",
        "state.folded >= state.rules.quorum.of(state.tally.expected)",
        "test_no_round_commits_with_fewer_updates_than_least",
        random=False,
    ),
    Mutant(
        "believes any weight",
        updates,
        "    return replace(update, num_examples=limit)\n",
        "    return update\n",
        "test_an_update_weighs_no_more_than_its_worker_announced",
        random=False,
    ),
    Mutant(
        "ends a long round although its workers advance",
        closing,
        "    if any(state.advancing(name) for name in state.missing):\n",
        "    if False:\n",
        "test_a_long_round_is_not_a_dead_one",
        random=False,
    ),
    Mutant(
        "takes a worker for missing whose update is being folded",
        closing,
        "    return latest if _is_folding(state) else deadline_at(state)",
        "    return deadline_at(state)",
        "test_the_deadline_decides_once_a_late_fold_has_failed",
        random=False,
    ),
    Mutant(
        "never closes a round that asks nobody",
        quorum,
        "        if rules.secret is not None and not state.asked:\n",
        "        if False:\n",
        "test_a_round_that_asks_nobody_is_committed_at_once",
        random=False,
    ),
    Mutant(
        "draws another lot when a round is reopened",
        quorum,
        "return _drawn(state, rules.secret, present)\n",
        "return _drawn(state, rules.secret + state.draws, present)\n",
        "test_a_reopened_round_asks_the_same_sample",
        random=False,
    ),
    Mutant(
        "leaves out late joiners that are in the sample",
        quorum,
        "            return _drawn(state, rules.secret, (worker,))\n",
        "            return ()\n",
        "test_a_late_joiner_is_asked_if_its_lot_is_drawn",
        random=False,
    ),
    Mutant(
        "draws lots that every worker can predict",
        quorum,
        "state.rules.fraction, Draw(secret, state.round)))\n",
        "state.rules.fraction, Draw(state.rules.seed, state.round)))\n",
        "test_the_secret_decides_who_is_asked_and_the_seed_does_not",
        random=False,
    ),
    Mutant(
        "asks silent workers again",
        quorum,
        "room, draw, last=last, least=least)\n",
        "room, Draw(rules.seed, state.round), least=least)\n",
        "test_a_reopened_round_prefers_other_workers",
        random=False,
    ),
    Mutant(
        "asks for the same update again after a rejection",
        updates,
        "attempts=state.attempts.insert(worker, earlier + 1))\n",
        "attempts=state.attempts.insert(worker, earlier))\n",
        "test_a_round_asked_again_after_a_rejection_is_another_attempt",
        random=False,
    ),
    Mutant(
        "lets the first worker decide",
        agreement,
        "        classes, _ = votes.most_common(1)[0]\n",
        "        classes = next(iter(votes))\n",
        "test_the_majority_decides_on_the_classes",
        random=False,
    ),
    Mutant(
        "does work again that it has answered",
        session,
        "    if work == state.answered:",
        "    if False:",
    ),
    Mutant(
        "lets older work replace newer",
        session,
        "    if any(_newer(",
        "    if False and any(_newer(",
        "test_of_several_that_wait_only_the_newest_begins",
        random=False,
    ),
    Mutant(
        "begins before the thread is free",
        session,
        "    if state.doing is not None:\n        return state, [*effects, Abandon(state.doing)]",
        "    if False:\n        return state, [*effects, Abandon(state.doing)]",
    ),
    Mutant(
        "keeps work that was never begun",
        session,
        "(state.next, state.sending, state.answered) if",
        "(state.sending, state.answered) if",
        "test_of_several_that_wait_only_the_newest_begins",
        random=False,
    ),
    Mutant(
        "continues after a commit that is enough",
        rounds,
        "state.round > state.rules.rounds or state.enough",
        "state.round > state.rules.rounds",
        "test_no_round_opens_after_a_commit_that_is_enough",
        random=False,
    ),
    Mutant(
        "ends a run that is done before its workers are heard",
        finishing,
        "    elif listening and state.unheard:\n",
        "    elif False:\n",
        "test_a_run_that_is_done_ends_once_it_has_told_all_its_workers",
        random=False,
    ),
    Mutant(
        "compares norms with those of the first rounds for ever",
        norms,
        "median_low(positive))[-_ROUNDS_REMEMBERED:]",
        "median_low(positive))[:_ROUNDS_REMEMBERED]",
        "test_the_usual_norm_follows_the_rounds",
        random=False,
    ),
    Mutant(
        "lets an outlier of two become the usual norm",
        norms,
        "(*medians, median_low(positive))",
        "(*medians, max(positive))",
        "test_an_outlier_of_two_is_reported_from_the_first_round_on_and_never_becomes_usual",
        random=False,
    ),
]
# The modules of the coordinator's machine, each after those that it imports.
PARTS = [
    quorum,
    clock,
    agreement,
    work,
    evaluation,
    finishing,
    first_weights,
    norms,
    opening,
    closing,
    membership,
    updates,
    rounds,
]
UNCHANGED = Mutant("nothing is broken", rounds, "", "")


def _executed(module: ModuleType, source: str) -> ModuleType:
    changed = ModuleType(module.__name__)
    exec(compile(source, f"<mutant of {module.__name__}>", "exec"), vars(changed))
    return changed


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mutant], tuple[ModuleType, ModuleType]]:
    """Return a function that loads a mutant: the coordinator's and the worker's machine."""

    def load(mutant: Mutant) -> tuple[ModuleType, ModuleType]:
        source = inspect.getsource(mutant.module)
        if mutant is not UNCHANGED:
            assert source.count(mutant.old) == 1, "the line must occur once"
            assert mutant.old != mutant.new
            source = source.replace(mutant.old, mutant.new)
        changed = _executed(mutant.module, source)
        if mutant.module is session:
            return rounds, changed
        # Modules that import it must import the changed one.
        for module in PARTS[PARTS.index(mutant.module) + 1 :]:
            name = changed.__name__
            monkeypatch.setitem(sys.modules, name, changed)
            package = sys.modules[name.rpartition(".")[0]]
            monkeypatch.setattr(package, name.rpartition(".")[2], changed)
            changed = _executed(module, inspect.getsource(module))
        return changed, session

    return load


def _fails(check: Callable[[], object]) -> bool:
    try:
        check()
    except (AssertionError, KeyError):  # other exceptions would mean that the mutant does not run
        return True
    return False


def _rule(name: str) -> Callable[[], object]:
    """Return a test of the rules as a function that runs it with all its parameters."""
    modules = (
        test_rounds,
        test_rounds_poisson,
        test_rounds_commit,
        test_rounds_workers,
        test_rounds_norms,
        test_rounds_buffered,
        test_rounds_frozen,
        test_worker_machine,
    )
    test = next(found for module in modules if (found := getattr(module, name, None)))
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    if not marks:
        return test
    names, values = marks[0].args
    several = isinstance(names, tuple)
    return lambda: [test(*(value if several else (value,))) for value in values]


def _random(machine: ModuleType, worker_machine: ModuleType) -> Callable[[], object]:
    """Return a deterministic search for a failing interleaving."""
    mutated = type(
        "MutantFederation",
        (Federation,),
        {"machine": machine, "worker_machine": worker_machine},
    )
    profile = settings(
        test_rounds_machine.PROFILE,
        max_examples=4000,  # the search ends at the first failure
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        print_blob=False,
    )
    return lambda: run_state_machine_as_test(mutated, settings=profile)


def _named(mutants: list[Mutant]) -> list[pytest.param]:
    return [pytest.param(mutant, id=mutant.name) for mutant in mutants]


@pytest.mark.parametrize("mutant", _named([mutant for mutant in MUTANTS if mutant.rule]))
def test_a_rule_finds_out(mutant, load, monkeypatch):
    machine, worker_machine = load(mutant)
    monkeypatch.setattr(test_rounds, "rounds", machine)
    monkeypatch.setattr(test_worker_machine, "s", worker_machine)
    assert _fails(_rule(mutant.rule)), f"{mutant.name}: it survives"


@pytest.mark.parametrize("mutant", _named([mutant for mutant in MUTANTS if mutant.random]))
def test_random_interleavings_find_out(mutant, load):
    assert _fails(_random(*load(mutant))), f"{mutant.name}: it survives"


def test_what_is_not_broken_passes(load, monkeypatch):
    machine, _ = load(UNCHANGED)
    monkeypatch.setattr(test_rounds, "rounds", machine)
    for mutant in MUTANTS:
        if mutant.rule:
            _rule(mutant.rule)()
