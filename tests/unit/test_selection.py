"""The selection of workers: each rule, its frequencies, and that the seed determines the choice."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.errors import TaskError, UsageError
from fluffle_coordinator.machine import events as ev
from fluffle_coordinator.machine import records as rs
from fluffle_coordinator.machine.rules import Rules
from fluffle_coordinator.machine.selection import (
    POISSON,
    UNIFORM,
    Candidate,
    Draw,
    parse_selection,
    sample_size,
    select,
)
from fluffle_coordinator.user_code.schedule_loading import load_selection
from tests.unit.test_rounds import RUN, asked, opened

RULES = ["uniform", "poisson", "weighted", "round-robin", "fastest:0.25"]
candidates = st.lists(
    st.builds(
        Candidate,
        st.text("abcdefgh", min_size=1, max_size=4),
        st.integers(1, 10**12),
        st.integers(0, 9),
        st.none() | st.floats(0, 1e6),
    ),
    min_size=1,
    max_size=20,
    unique_by=lambda candidate: candidate.name,
)
draws = st.builds(Draw, st.integers(0, 2**63 - 1), st.integers(1, 10**6), st.integers(0, 3))


@pytest.mark.parametrize("rule", RULES)
@given(
    present=candidates, count=st.integers(1, 25), draw=draws, rng=st.randoms(use_true_random=False)
)
def test_the_same_seed_chooses_the_same_workers_in_any_order(rule, present, count, draw, rng):
    chosen = select(parse_selection(rule), present, count, draw)
    mixed = rng.sample(present, len(present))
    assert chosen == select(parse_selection(rule), mixed, count, draw)
    assert set(chosen) <= {candidate.name for candidate in present}
    assert len(chosen) == len(set(chosen)) >= 1
    if parse_selection(rule).fixed:
        assert len(chosen) == min(count, len(present))


@given(present=candidates, count=st.integers(1, 25), draw=draws)
def test_who_did_not_answer_comes_last(present, count, draw):
    last = {candidate.name for candidate in present[::2]}
    chosen = set(select(UNIFORM, present, count, draw, last=last))
    others = {candidate.name for candidate in present} - last
    assert chosen >= others or chosen <= others


@given(
    names=st.sets(st.text(min_size=1, max_size=4), min_size=1, max_size=30),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_a_worker_that_leaves_does_not_reshuffle_the_others(names, fraction, seed):
    def uniform(names, count):
        return set(select(UNIFORM, map(Candidate, names), count, Draw(seed, 1)))

    count = sample_size(fraction, len(names))
    chosen = uniform(names, count)
    assert len(chosen) == count == max(1, math.ceil(fraction * len(names) - 1e-9))
    for left in names - chosen:
        assert uniform(names - {left}, sample_size(fraction, len(names) - 1)) <= chosen


def test_the_selection_changes_from_round_to_round():
    present = [Candidate(f"w{number}") for number in range(10)]
    assert len({select(UNIFORM, present, 3, Draw(0, number)) for number in range(10)}) > 5


def frequencies(rule, present, count, draws=3000):
    seen = Counter()
    for number in range(1, draws + 1):
        seen.update(select(parse_selection(rule), present, count, Draw(7, number)))
    return {candidate.name: seen[candidate.name] / draws for candidate in present}


def within(share, expected, draws=3000):
    """Whether a share is within four standard deviations of the expected one."""
    return abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / draws)


def test_poisson_asks_each_worker_independently():
    present = [Candidate(f"w{number}") for number in range(20)]
    shares = frequencies("poisson", present, 5)
    assert all(within(share, 0.25) for share in shares.values())
    sizes = Counter(
        len(select(parse_selection("poisson"), present, 5, Draw(7, number)))
        for number in range(1, 400)
    )
    assert len(sizes) > 5  # the size is random, too
    assert min(sizes) >= 1


def test_poisson_asks_at_least_as_many_as_a_round_needs():
    present = [Candidate(f"w{number}") for number in range(20)]
    for number in range(1, 100):
        draw = Draw(7, number)
        sample = set(select(POISSON, present, 5, draw))
        enough = set(select(POISSON, present, 5, draw, least=4))
        assert enough == sample if len(sample) >= 4 else enough > sample
        assert len(enough) == max(4, len(sample))
    assert select(POISSON, present, 0, Draw(7, 1), least=4) == ()  # there is room for nobody


def test_weighted_asks_in_proportion_to_the_examples():
    present = [Candidate("a", 100), Candidate("b", 200), Candidate("c", 700)]
    shares = frequencies("weighted", present, 1)
    assert within(shares["a"], 0.1)
    assert within(shares["b"], 0.2)
    assert within(shares["c"], 0.7)
    # Two without replacement: a is first, or second after b or c.
    expected = 0.1 + 0.2 * 100 / 800 + 0.7 * 100 / 300
    assert within(frequencies("weighted", present, 2)["a"], expected)


def test_uniform_asks_all_alike_however_many_examples_they_have():
    present = [Candidate("a", 1), Candidate("b", 10**6), Candidate("c", 5), Candidate("d", 70)]
    assert all(within(share, 0.5) for share in frequencies("uniform", present, 2).values())


def turns(rule, names, count, rounds, seconds=None):
    """Return the workers that each of a number of rounds asks."""
    asked_in: dict[str, int] = {}
    rows = []
    for number in range(1, rounds + 1):
        present = [Candidate(n, 1, asked_in.get(n, 0), (seconds or {}).get(n)) for n in names]
        chosen = select(parse_selection(rule), present, count, Draw(3, number))
        asked_in |= dict.fromkeys(chosen, number)
        rows.append(chosen)
    return rows


@given(num_present=st.integers(1, 12), count=st.integers(1, 12))
def test_round_robin_asks_everyone_before_anyone_again(num_present, count):
    names = [f"w{number}" for number in range(num_present)]
    cycle = math.ceil(num_present / count)
    rows = turns("round-robin", names, count, 3 * cycle)
    for start in range(2 * cycle):
        assert {name for row in rows[start : start + cycle] for name in row} == set(names)


@given(num_present=st.integers(5, 12), count=st.integers(1, 5))
def test_the_fastest_are_asked_and_the_slow_have_their_floor(num_present, count):
    seconds = {f"w{number:02}": 1.0 + number for number in range(num_present)}
    floor = math.ceil(0.25 * count)
    rounds = 3 * math.ceil(num_present / floor)
    rows = turns("fastest:0.25", list(seconds), count, rounds, seconds)
    assert {name for row in rows for name in row} == set(seconds)  # nobody starves
    fast = sorted(seconds)[: count - floor]
    for row in rows:
        assert len(set(fast) - set(row)) == 0


def test_a_worker_that_has_not_trained_counts_as_the_fastest():
    present = [Candidate("new"), Candidate("fast", train_s=1.0), Candidate("slow", train_s=9.0)]
    assert select(parse_selection("fastest:0"), present, 1, Draw(0, 1)) == ("new",)


@pytest.mark.parametrize("text", ["best", "fastest:2", "fastest:x", ""])
def test_an_unknown_rule_is_refused(text):
    with pytest.raises(
        ValueError, match="unknown selection .* fastest.:FLOOR., with a FLOOR from 0 to 1"
    ):
        load_selection(text)


def test_a_rule_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def alphabetical(candidates, count, draw):\n"
        "    return [one.name for one in candidates][:count]\n"
        "nothing = 3\n"
    )
    rule = load_selection(f"{tmp_path}/mine.py:alphabetical")
    assert rule.name == "mine.py:alphabetical"
    rules = Rules(rounds=1, min_workers=4, sample=2, selection=rule)
    assert set(opened(*"dcba", rules=rules).state.asked) == {"a", "b"}
    with pytest.raises(UsageError, match="nothing is not a function"):
        load_selection(f"{tmp_path}/mine.py:nothing")


@pytest.mark.parametrize("takes", ["candidates, draw", "candidates, count, draw, more", "*, draw"])
def test_a_function_with_other_arguments_is_refused_before_anybody_is_waited_for(tmp_path, takes):
    (tmp_path / "mine.py").write_text(f"def rule({takes}):\n    return []\n")
    with pytest.raises(UsageError, match=r"accepts \(candidates, count, draw\)"):
        load_selection(f"{tmp_path}/mine.py:rule")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            "None",
            "selection mine.py:rule failed in rule(): it returned None, not the names of workers",
        ),
        ("'ab'", "it returned 'ab', not the names of workers"),
        ("[1]", "it selected 1, but no such worker is among the candidates"),
        ("['nobody']", "it selected 'nobody', but no such worker is among the candidates"),
        ("[['a']]", "it selected ['a'], but no such worker is among the candidates"),
        ("[]", "it selected none of the 4 candidates"),
        ("(1 / 0 for _ in 'a')", "ZeroDivisionError: division by zero (mine.py:1)"),
    ],
)
def test_an_invalid_result_of_a_rule_from_a_file_is_refused(tmp_path, result, message):
    (tmp_path / "mine.py").write_text(f"def rule(candidates, count, draw): return {result}\n")
    rule = load_selection(f"{tmp_path}/mine.py:rule")
    with pytest.raises(TaskError, match=re.escape(message)):
        select(rule, map(Candidate, "abcd"), 2, Draw(0, 1))


# --- in the machine ----------------------------------------------------------------------------


def test_a_rule_from_a_file_is_only_called_to_choose_somebody(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def largest(candidates, count, draw):\n    return [max(candidates).name]\n"
    )
    rule = load_selection(f"{tmp_path}/mine.py:largest")
    present, draw = [Candidate("a"), Candidate("b")], Draw(0, 1)
    assert select(rule, [], 0, draw) == ()
    assert select(rule, present, 0, draw) == ()
    assert select(rule, present, 2, draw, last="ab") == ("b",)
    run = opened("a", "b", rules=Rules(rounds=1, min_workers=2, selection=rule, deadline_s=5))
    for name in "ab":
        run.seen(name, heartbeat_s=1e6)
    assert asked(run.tick(6)) == ["a", "b"]
    assert asked(run.tick(6)) == ["b"]  # both were asked before


def test_a_number_of_workers_is_asked_in_place_of_a_fraction():
    run = opened(*"abcdef", rules=Rules(rounds=1, min_workers=6, sample=2))
    assert len(run.state.asked) == run.state.needed == 2
    assert not asked(run.seen("g", hello=True))


def test_over_provisioning_asks_more_and_takes_the_first():
    names = [f"w{number:02}" for number in range(20)]
    rules = Rules(rounds=1, min_workers=20, sample=10, over_provision=1.3)
    run = opened(*names, rules=rules)
    assert len(run.state.asked) == 13
    assert run.state.needed == 10
    chosen = sorted(run.state.asked)
    for name in chosen[:9]:
        run.update(name)
    assert run.state.folded == 9
    run.update(chosen[9])
    assert run.state.phase == "committing"


def test_over_provisioning_outlasts_the_loss_of_as_many():
    names = [f"w{number:02}" for number in range(20)]
    rules = Rules(rounds=1, min_workers=20, sample=10, over_provision=1.3)
    run = opened(*names, rules=rules)
    for name in sorted(run.state.asked)[:3]:
        run.left(name)
    assert run.state.needed == 10
    run.left(sorted(run.state.asked)[3])
    assert run.state.needed == 9


@pytest.mark.parametrize("number", [9, 10, 11, 12, 13, 20])
@pytest.mark.parametrize("sample", [{"sample": 10}, {"fraction": 0.8}])
def test_over_provisioning_asks_all_if_there_are_too_few_and_waits_for_as_many(number, sample):
    names = [f"w{number:02}" for number in range(number)]
    rules = Rules(rounds=1, min_workers=number, over_provision=1.3, **sample)
    run = opened(*names, rules=rules)
    wanted = min(10, number) if "sample" in sample else math.ceil(0.8 * number - 1e-9)
    assert len(run.state.asked) == min(math.ceil(1.3 * wanted), number)
    assert run.state.needed == wanted


@given(st.integers(1, 200), st.floats(1, 5))
def test_as_many_are_waited_for_as_were_wanted(clients, over):
    rules = Rules(rounds=1, sample=clients, over_provision=over)
    assert rules.waited_for(rules.ask(1000)) == clients


def test_a_rule_sees_what_each_worker_last_evaluated(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def hardest(candidates, count, draw):\n"
        "    def loss(one):\n"
        "        return one.evaluation['loss'] if one.evaluation else float('inf')\n"
        "    return [one.name for one in sorted(candidates, key=loss, reverse=True)][:count]\n"
    )
    rule = load_selection(f"{tmp_path}/mine.py:hardest")
    run = opened(*"abc", rules=Rules(rounds=9, min_workers=3, selection=rule, sample=2))
    chosen = set(run.state.asked)
    assert chosen == {"a", "b"}  # nobody has evaluated yet
    for name, loss in (("a", 0.1), ("b", 0.2)):
        evaluated = rs.Evaluated(10, loss, {"accuracy": 0.5})
        run.on(ev.EvaluationArrived(run.now, RUN, 0, name, evaluated, run.state.base))
        run.update(name)
    run.committed("a", "b")
    assert run.state.evaluation["a"] == {"loss": 0.1, "accuracy": 0.5}
    assert set(run.state.asked) == {"b", "c"}
