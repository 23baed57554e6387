"""Averages of what workers report: finite, whatever finite numbers they report."""

from __future__ import annotations

import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_coordinator.machine.state import Evaluated
from fluffle_coordinator.observe.round_view import RoundView, remembered
from fluffle_coordinator.storage.history import merged
from fluffle_coordinator.storage.round_stats import average_evaluations, weighted_mean
from tests.history_lines import committed, ended, participant

MOST = sys.float_info.max
pairs = st.lists(st.tuples(st.integers(1, 10**12), st.floats(-MOST, MOST)), min_size=1, max_size=6)


@given(pairs)
def test_a_mean_of_finite_numbers_is_finite_and_correct(values):
    mean = weighted_mean(values)
    exact = sum(n * Fraction(value) for n, value in values) / sum(n for n, _ in values)
    most = max(abs(Fraction(value)) for _, value in values)
    assert abs(Fraction(mean) - exact) <= most * Fraction(len(values) + 2, 2**52) + Fraction(
        1, 10**300
    )


def test_no_examples_have_no_mean():
    assert weighted_mean([]) is None
    assert weighted_mean([(0, 1.0)]) is None


def test_the_largest_losses_have_a_finite_evaluation():
    averages = average_evaluations(
        {
            "a": Evaluated(10**12, 1.5e308, {"auc": -MOST}),
            "b": Evaluated(10**12, 1.7e308, {"auc": MOST}),
        }
    )
    assert (averages["loss"], averages["auc"]) == (pytest.approx(1.6e308), 0.0)


def test_the_training_loss_is_averaged_likewise():
    rows = [participant(name, num_examples=10, train_loss=1.7e308) for name in "ab"]
    assert weighted_mean(remembered(committed(1, *rows, participant("c"))).train_losses) == 1.7e308
    assert weighted_mean(RoundView(1).train_losses) is None


def test_what_was_rejected_before_a_run_stopped_is_of_the_round_that_was_open():
    stopped = ended(1, outcome="stopped", rejected=2, late=1)
    rows = merged([committed(1), stopped, stopped, committed(2, rejected=3, late=0)])
    assert [(row["rejected"], row["late"]) for row in rows] == [(0, 0), (7, 2)]
    rows = merged([committed(1), stopped])  # there is no later round yet
    assert [(row["rejected"], row["late"]) for row in rows] == [(2, 1)]
