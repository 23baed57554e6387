"""Clients that come and go: how much they are there, and what that does to a run."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fluffle
from fluffle.simulation.availability import ALWAYS, Availability, parse_availability
from fluffle_common.errors import UsageError
from fluffle_coordinator.storage.history import read_history_lines
from tests.simulation.test_simulation import Adder


def test_a_client_is_present_for_its_share_of_the_time():
    availability = Availability(0.25, 100.0)
    spells = availability.spells(np.random.default_rng(1), present=True)
    times = np.array(list(itertools.islice(spells, 20_000)))
    here, away = times[::2], times[1::2]
    assert np.isclose(here.mean(), 100.0, rtol=0.05)
    assert np.isclose(here.sum() / (here.sum() + away.sum()), 0.25, rtol=0.05)
    begins = [availability.begin(np.random.default_rng(seed)) for seed in range(2000)]
    assert np.isclose(np.mean(begins), 0.25, atol=0.04)


def test_always_is_for_ever():
    assert list(ALWAYS.spells(np.random.default_rng(0), present=True)) == []
    assert parse_availability("always") == ALWAYS
    assert parse_availability("0.8:3600") == Availability(0.8, 3600.0)


@pytest.mark.parametrize("text", ["", "0.5", "0:10", "1:10", "0.5:0", "0.5:inf", "nan:1", "a:b"])
def test_what_is_no_availability_is_refused(text):
    with pytest.raises(UsageError, match="invalid availability"):
        parse_availability(text)


def of_thirty(folder, **options):
    tasks = [Adder(1.0) for _ in range(30)]
    options = {"rounds": 12, "seed": 3, "fit_s": "classes:10,20,40", **options}
    return fluffle.simulate(tasks, folder=folder, availability="0.5:60", step_s=0, **options)


def committed_in(folder):
    return [line for line in read_history_lines(folder) if line["event"] == "committed"]


def test_whoever_leaves_drops_its_work_and_takes_part_again(tmp_path):
    run = of_thirty(tmp_path, sample=10, quorum=6)
    assert float(run.weights["w"][0]) == 12.0
    lines = committed_in(tmp_path)
    counted = [{one["worker"] for one in line["participants"]} for line in lines]
    assert all(len(workers) >= 6 for workers in counted)
    assert len(lines[0]["asked"]) == 10, "the first sample is drawn from all who are there"
    asked = [set(line["asked"]) for line in lines]
    assert all(workers <= some for workers, some in zip(counted, asked, strict=True))
    assert any(workers != some for workers, some in zip(counted, asked, strict=True))
    # With half of them away, nobody could be counted in all rounds; over twelve, all are asked.
    assert len(set.union(*asked)) > 20
    again = of_thirty(tmp_path / "again", sample=10, quorum=6)
    assert [list(one.participants) for one in again.history] == [
        list(one.participants) for one in run.history
    ]


def test_a_fraction_is_of_those_who_are_there(tmp_path):
    of_thirty(tmp_path, fraction=0.4)
    first, *_ = committed_in(tmp_path)
    assert first["timings"]["waiting_s"] < 1, "the first round waits for nobody to come"
    assert len(first["asked"]) < 0.4 * 30


def test_an_asynchronous_run_goes_on_with_those_who_are_there(tmp_path):
    of_thirty(tmp_path, schedule="buffered", buffer=5)
    counted = [len(line["participants"]) for line in committed_in(tmp_path)]
    assert counted == [5] * 12


def test_a_quorum_of_all_is_everyone_who_comes_while_the_round_is_open(tmp_path):
    run = of_thirty(tmp_path, rounds=4)
    assert float(run.weights["w"][0]) == 4.0
    lines = committed_in(tmp_path)
    assert all(len(line["participants"]) == len(line["asked"]) for line in lines)
    # The slowest device needs 40 s; whoever left and came back began anew.
    took = [max(one["counted_s"] for one in line["participants"]) for line in lines]
    assert min(took) > 40.0
