"""Machines with one rule broken: every one of them must be found out by the tests of the rules.

A mutant is a machine whose source has one line replaced. ``rule`` names the test of
``test_rounds`` or ``test_rounds_commit`` that must fail on it; ``random`` says that
``test_rounds_machine`` must.
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
    ending,
    evaluation,
    first_weights,
    membership,
    opening,
    transitions,
    updates,
    work,
)
from fluffle_coordinator.machine import machine as rounds
from fluffle_coordinator.machine.schedules import quorum
from fluffle_worker import machine as session
from tests.unit import (
    test_rounds,
    test_rounds_buffered,
    test_rounds_by_lot,
    test_rounds_commit,
    test_rounds_in_use,
    test_rounds_machine,
)
from tests.unit.test_rounds_machine import Federation


@dataclass(frozen=True)
class Mutant:
    """What is broken, and who must notice."""

    name: str
    module: ModuleType
    old: str
    new: str
    rule: str = ""
    random: bool = True


MUTANTS = [
    Mutant(
        "acknowledges when folded, not when the commit is on disk",
        updates,
        "    update = held._replace(folded=True, spares=spares, norm=event.norm)\n",
        "    update = held._replace(folded=True, spares=spares, norm=event.norm)\n"
        "    out.append(Ack(held.handle))\n",
        "test_nothing_is_acknowledged_before_the_commit_is_on_disk",
    ),
    Mutant(
        "lets go of late updates before the commit is on disk",
        updates,
        "    if event.round < state.round and not (",
        "    if state.phase is Phase.COMMITTING or event.round < state.round and not (",
        "test_what_comes_during_the_commit_is_late_once_that_is_on_disk",
    ),
    Mutant(
        "folds duplicates",
        updates,
        "    if held is not None:\n        return _hold_copy",
        "    if False:\n        return _hold_copy",
        "test_a_duplicate_of_what_we_hold_is_acknowledged",
    ),
    Mutant(
        "folds late updates into the next round",
        updates,
        "    if staleness > schedule.max_staleness:\n",
        "    if False:\n",
        "test_a_late_update_is_acknowledged_and_told",
    ),
    Mutant(
        "folds what comes during the commit",
        updates,
        "    if state.phase is not Phase.COMMITTING:  # else ``committed``",
        "    if True:  # else ``committed``",
        "test_what_comes_during_the_commit_is_late_once_that_is_on_disk",
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
        "takes another run's updates",
        updates,
        "    if event.run != state.run:\n        reason = ",
        "    if False:\n        reason = ",
        "test_what_is_not_of_this_round_is_rejected_with_the_reason",
    ),
    Mutant(
        "takes updates of rounds to come",
        updates,
        "    if event.round > state.round or not",
        "    if not",
        "test_what_is_not_of_this_round_is_rejected_with_the_reason",
        random=False,
    ),
    Mutant(
        "forgets the copies",
        updates,
        "    if held.spares:\n",
        "    if False:\n",
        "test_the_copy_is_used_if_the_first_is_refused",
    ),
    Mutant(
        "trusts the first of several copies after an outage",
        updates,
        "    if held.folded and held.handle.link == event.handle.link:\n",
        "    if held.folded:\n",
        "test_a_redelivery_is_held_in_place_of_the_void_one",
        random=False,  # a rare meeting of three: the search does not see it every time
    ),
    Mutant(
        "does not know its own update again after the commit",
        updates,
        "    if state.has_counted(ticket, event.round):\n",
        "    if False:\n",
        "test_a_redelivery_after_the_commit_is_a_duplicate",
        random=False,
    ),
    Mutant(
        "averages what was trained from weights that were taken back",
        updates,
        "    if event.base != base:\n",
        "    if False:\n",
        "test_what_was_trained_from_other_weights_is_refused",
    ),
    Mutant(
        "counts as a participant whose update is not in the sum",
        updates,
        "        if update.folded:\n            counted.add(ticket)\n",
        "        if True:\n            counted.add(ticket)\n",
        "test_what_comes_of_a_round_that_is_being_written_is_held_until_it_is_on_disk",
        random=False,
    ),
    Mutant(
        "puts into the next sum what comes while a round is being written",
        updates,
        "    staleness = state.round + 1 - update.round\n",
        "    staleness = state.round - update.round\n",
        "test_what_comes_of_a_round_that_is_being_written_is_held_until_it_is_on_disk",
    ),
    Mutant(
        "forgets who was asked before the sample was drawn again",
        closing,
        "{*state.asked, *state.asked_before, *in_it}",
        "{*state.asked, *in_it}",
        "test_a_commit_says_who_was_asked_also_before_the_sample_was_drawn_again",
        random=False,
    ),
    Mutant(
        "gives nobody the time to come back after an outage",
        rounds,
        "last_seen=event.now",
        "last_seen=w.last_seen",
        "test_after_our_own_outage_everybody_has_all_the_time_to_be_heard",
        random=False,
    ),
    Mutant(
        "lets time pass in an outage of the broker",
        rounds,
        "        state = postpone(state, event.now - state.unlinked_since)\n",
        "        pass\n",
        "test_our_own_outage_does_not_count_as_standing_still",
        random=False,
    ),
    Mutant(
        "waits for first weights from a worker that began again",
        membership,
        "        if state.init_asked == worker.name:",
        "        if False:",
        "test_the_first_weights_are_asked_again_of_a_worker_that_began_again",
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
    ),
    Mutant(
        "forgets what is at work when a version is committed",
        updates,
        "    if state.schedule.continuous:  # workers continue with their work\n",
        "    if False:\n",
        "test_who_is_at_work_goes_on_with_it",
        random=False,
    ),
    Mutant(
        "lets go of what came during the commit, though it still counts",
        updates,
        "        elif not last and _counts_later(state, update):\n",
        "        elif False:\n",
        "test_what_comes_during_the_commit_is_in_the_next_version",
    ),
    Mutant(
        "gives two pieces of work one ticket",
        work,
        "state.sequence + 1 if continuous else state.round",
        "state.round",
        "test_each_piece_of_work_has_a_ticket_of_its_own",
        random=False,  # each worker then counts once a version, which ends too
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
        "    towards_quorum = state.schedule.continuous or not staleness\n",
        "    towards_quorum = True\n",
        "test_a_late_update_counts_in_the_open_round_and_does_not_close_it",
    ),
    Mutant(
        "spins while the grace outlasts the deadline",
        transitions,
        "    if state.quorum_at is not None:\n        if state.phase",
        "    if False:\n        if state.phase",
        "test_the_grace_may_last_longer_than_the_deadline",
        random=False,
    ),
    Mutant(
        "spins after a resume while nobody comes",
        transitions,
        "state = state.replace(gate=1, gate_until=math.inf)",
        "state = state.replace(gate=1)",
        "test_a_resumed_run_stays_quiet_while_nobody_comes",
    ),
    Mutant(
        "takes a stop of its own for everybody's silence",
        membership,
        "    now = clock_time(state, event.now)\n",
        "    now = event.now\n",
        "test_nobody_is_gone_for_the_time_in_which_the_coordinator_was_stopped",
    ),
    Mutant(
        "counts the time in which it heard nobody",
        clock,
        "    if lost_s > 0:\n",
        "    if False:\n",
        "test_nobody_is_gone_for_the_time_in_which_the_coordinator_was_stopped",
    ),
    Mutant(
        "believes signs of life from before its link",
        membership,
        "    if not state.caught_up:\n",
        "    if False:\n",
        "test_signs_of_life_from_before_do_not_count",
        random=False,
    ),
    Mutant(
        "commits with less than was written",
        closing,
        "state.folded >= state.needed",
        "state.folded >= state.rules.quorum.of(state.tally.expected)",
        "test_no_round_commits_with_less_than_was_written",
        random=False,
    ),
    Mutant(
        "believes any weight",
        updates,
        "    return min(claimed, limit)\n",
        "    return claimed\n",
        "test_an_update_weighs_no_more_than_its_worker_announced",
        random=False,
    ),
    Mutant(
        "ends a long round though its workers advance",
        closing,
        "    if any(state.advancing(name) for name in state.missing):\n",
        "    if False:\n",
        "test_a_long_round_is_no_dead_one",
        random=False,
    ),
    Mutant(
        "asks somebody rather than nobody",
        quorum,
        "        if rules.secret is not None and not state.asked:\n",
        "        if False:\n",
        "test_a_round_of_nobody_is_committed_at_once",
        random=False,
    ),
    Mutant(
        "draws another lot when a round is reopened",
        quorum,
        "return tuple(n for n in _drawn(state, rules.secret, present) if n not in answered)\n",
        "return _drawn(state, rules.secret + state.draws, present)\n",
        "test_a_reopened_round_asks_the_same",
        random=False,
    ),
    Mutant(
        "leaves out whoever comes late and is in the sample",
        quorum,
        "            return _drawn(state, rules.secret, (worker,))\n",
        "            return ()\n",
        "test_who_comes_late_is_asked_if_its_lot_is_drawn",
        random=False,
    ),
    Mutant(
        "draws lots that every worker can tell",
        quorum,
        "state.rules.fraction, Draw(secret, state.round)))\n",
        "state.rules.fraction, Draw(state.rules.seed, state.round)))\n",
        "test_the_secret_decides_who_is_asked_and_the_seed_does_not",
        random=False,
    ),
    Mutant(
        "asks the hung ones again",
        quorum,
        "room, draw, last=state.asked)\n",
        "room, Draw(rules.seed, state.round))\n",
        "test_a_reopened_round_asks_others",
        random=False,
    ),
    Mutant(
        "asks for the same update again after a rejection",
        updates,
        "state.attempts.get(worker, 0) + 1),\n",
        "state.attempts.get(worker, 0)),\n",
        "test_a_round_asked_again_after_a_rejection_is_another_attempt",
        random=False,
    ),
    Mutant(
        "lets whoever came first decide",
        agreement,
        "        classes, _ = votes.most_common(1)[0]\n",
        "        classes = next(iter(votes))\n",
        "test_the_majority_decides_on_the_classes",
        random=False,
    ),
    Mutant(
        "does a work again that it has answered",
        session,
        "    if work == state.answered:",
        "    if False:",
    ),
    Mutant(
        "lets older work replace newer",
        session,
        "    if any(_newer(",
        "    if False and any(_newer(",
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
    ),
    Mutant(
        "goes on after a commit that is enough",
        transitions,
        "state.round > state.rules.rounds or state.enough",
        "state.round > state.rules.rounds",
        "test_no_round_opens_after_a_commit_that_is_enough",
        random=False,
    ),
]
# The parts of the coordinator's machine, each after those that it imports.
PARTS = [
    quorum,
    clock,
    agreement,
    work,
    ending,
    evaluation,
    first_weights,
    opening,
    closing,
    transitions,
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
    """Return a function that makes a mutant's two machines, the coordinator's and the worker's."""

    def load(mutant: Mutant) -> tuple[ModuleType, ModuleType]:
        source = inspect.getsource(mutant.module)
        if mutant is not UNCHANGED:
            assert source.count(mutant.old) == 1, "it is to be broken in one place"
            assert mutant.old != mutant.new
            source = source.replace(mutant.old, mutant.new)
        changed = _executed(mutant.module, source)
        if mutant.module is session:
            return rounds, changed
        # Whatever imports it is to import the changed one.
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
    except (AssertionError, KeyError):  # a mutant that does not even run is no mutant
        return True
    return False


def _rule(name: str) -> Callable[[], object]:
    """Return one test of the rules with all its parameters, as a function without any."""
    modules = (
        test_rounds,
        test_rounds_by_lot,
        test_rounds_commit,
        test_rounds_in_use,
        test_rounds_buffered,
    )
    test = next(found for module in modules if (found := getattr(module, name, None)))
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    if not marks:
        return test
    names, values = marks[0].args
    several = isinstance(names, tuple)
    return lambda: [test(*(value if several else (value,))) for value in values]


def _random(machine: ModuleType, worker_machine: ModuleType) -> Callable[[], object]:
    """Return a search for a failing interleaving, the same search at every run."""
    mutated = type(
        "MutantFederation",
        (Federation,),
        {"machine": machine, "worker_machine": worker_machine},
    )
    profile = settings(
        test_rounds_machine.PROFILE,
        max_examples=20_000,  # the search ends at the first failure
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
    machine, _ = load(mutant)
    monkeypatch.setattr(test_rounds, "rounds", machine)
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
