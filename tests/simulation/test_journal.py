"""The journal of a simulation: kept in the run's folder, and read as that of a real run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import fluffle
from fluffle_common.errors import UsageError
from fluffle_coordinator.cli.journal import explain, journal
from fluffle_coordinator.observe import journal_file
from fluffle_coordinator.observe.journal_file import read_journal_file
from tests.simulation.test_simulation import Adder

FLUFFLE = "from fluffle_common.cli.app import main; main()"


def simulated(folder: Path, rounds: int = 2, **options: Any) -> None:
    tasks = {name: Adder(1.0) for name in ("ada", "bob", "cyd")}
    fluffle.simulate(tasks, folder=folder, rounds=rounds, fit_s="classes:60,120,240", **options)


def printed(command: Any, *flags: Any) -> str:
    return CliRunner().invoke(command, [*map(str, flags)], catch_exceptions=False).output


def test_every_event_is_kept_with_its_simulated_time(tmp_path):
    simulated(tmp_path)
    events = list(read_journal_file(tmp_path))
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    told = [event.event for event in events]
    assert told[0] == "started"
    assert told.count("joined") == 3
    assert told.count("opened") == told.count("committed") == 2
    assert told.count("counted") == 6
    assert told[told.index("committed") + 1 :].count("counted") == 3
    opened = {e.fields["round"]: e.moment for e in events if e.event == "opened"}
    assert (opened[2] - opened[1]).total_seconds() == pytest.approx(240, abs=1)
    assert len({event.run for event in events}) == 1


def test_the_commands_read_it_as_that_of_a_real_run(tmp_path):
    simulated(tmp_path)
    lines = printed(journal, "--run", tmp_path, "--round", 2, "--kind", "counted").splitlines()
    assert lines[0].startswith("--- ")
    assert [line.split("  ", 1)[1] for line in lines[1:]] == [
        f"round 2: update of {name} counted, 10 examples ({number}/3)"
        for number, name in enumerate(("ada", "bob", "cyd"), start=1)
    ]
    one, *_ = printed(journal, "--run", tmp_path, "--worker", "bob", "--json").splitlines()
    assert json.loads(one)["fields"] == {"worker": "bob", "num_examples": 10}
    said = printed(explain, "--run", tmp_path, 1)
    assert "The longest wait was for cyd: it trained for 4 min" in said
    assert "The run has finished: 2 rounds are done." in said


def test_the_first_event_is_printed_before_the_last_is_read(tmp_path, monkeypatch):
    simulated(tmp_path)
    first = next(read_journal_file(tmp_path))

    def read_one(_folder):
        yield first
        raise UsageError("no more")

    monkeypatch.setattr(journal_file, "read_journal_file", read_one)
    done = CliRunner().invoke(journal, ["--run", str(tmp_path), "--json"])
    assert json.loads(done.output)["event"] == first.event
    assert isinstance(done.exception, UsageError)


def test_an_age_counts_from_the_end_of_the_simulation(tmp_path):
    simulated(tmp_path)  # 8 minutes, which end in the future
    opened = printed(journal, "--run", tmp_path, "--since", "6m", "--kind", "opened")
    assert [line.partition("opened")[0][-9:] for line in opened.splitlines()[1:]] == ["round 2: "]
    invalid = CliRunner().invoke(journal, ["--run", str(tmp_path), "--since", "soon"])
    assert invalid.exit_code == 2
    assert "Invalid value for '--since': invalid time 'soon'; write 90s" in invalid.output


def test_a_run_that_goes_on_adds_to_it_and_a_fresh_one_has_its_own(tmp_path):
    folder = tmp_path / "run"
    simulated(folder)
    simulated(folder, rounds=3)
    told = [event.event for event in read_journal_file(folder)]
    assert (told.count("started"), told.count("resumed"), told.count("committed")) == (1, 1, 3)
    simulated(folder, rounds=1, fresh=True)
    assert [e.event for e in read_journal_file(folder)].count("committed") == 1
    aside = list(read_journal_file(tmp_path / "run.1"))
    assert [event.event for event in aside] == told


def test_a_line_that_a_crash_has_torn_is_passed_over(tmp_path):
    simulated(tmp_path)
    whole = list(read_journal_file(tmp_path))
    file = tmp_path / "journal.jsonl"
    file.write_text(file.read_text()[:-20])
    assert list(read_journal_file(tmp_path)) == whole[:-1]


def test_a_damaged_journal_shows_the_lines_that_can_be_read(tmp_path):
    simulated(tmp_path)
    whole = list(read_journal_file(tmp_path))
    file = tmp_path / "journal.jsonl"
    file.write_bytes(bytes(range(256)) * 40 + b"\n[1]\n" + file.read_bytes())
    assert list(read_journal_file(tmp_path)) == whole
    file.write_bytes(bytes(range(256)))
    for command in (journal, explain):
        with pytest.raises(UsageError, match=r"journal\.jsonl cannot be read \(none of its lines"):
            printed(command, "--run", tmp_path)


@pytest.mark.parametrize("selected", [("--round", 1), ("--worker", "bob"), ("--run-id", "r")])
def test_that_nothing_has_happened_since_a_time_is_no_error(tmp_path, selected):
    simulated(tmp_path)
    flags = ["--run", tmp_path, *selected, "--since", "2999-01-01"]
    result = CliRunner().invoke(journal, [*map(str, flags)])
    assert result.exit_code == 0
    assert "is not in the journal after --since, which has no" in result.stderr


def test_what_is_not_in_it_is_told(tmp_path):
    simulated(tmp_path)
    with pytest.raises(UsageError, match="round 99 is not in the journal, which has rounds 1-2"):
        printed(journal, "--run", tmp_path, "--round", 99)
    with pytest.raises(UsageError, match=r"run another is not in the journal; choose from \w+"):
        printed(journal, "--run", tmp_path, "--run-id", "another")
    with pytest.raises(UsageError, match="worker dob is not in the journal; did you mean 'bob'"):
        printed(journal, "--run", tmp_path, "--worker", "dob")
    (tmp_path / "journal.jsonl").write_text("")
    with pytest.raises(UsageError, match="worker bob is not in the journal, which has no worker"):
        printed(journal, "--run", tmp_path, "--worker", "bob")
    with pytest.raises(UsageError, match="round 99 is not in the journal, which has no round"):
        printed(journal, "--run", tmp_path, "--round", 99)


def test_where_there_is_no_journal_it_is_said(tmp_path):
    with pytest.raises(UsageError, match="has no journal, because only a simulation keeps"):
        printed(journal, "--run", tmp_path)
    with pytest.raises(UsageError, match="--follow conflicts with --run"):
        printed(journal, "--run", tmp_path, "--follow")
    with pytest.raises(UsageError, match="no federation is given; use --federation .* use --run"):
        printed(explain)


def test_a_finished_simulation_that_is_repeated_reports_no_simulated_time(tmp_path):
    example = Path(__file__).parents[2] / "examples/numpy_regression.py"
    flags = ["--task", f"{example}:task", "--data", "shard:{client}/{clients}", "--clients", "2"]
    flags += ["--rounds", "1", "--federation", "f", "--run", str(tmp_path / "run")]
    first, again = (
        subprocess.run(
            [sys.executable, "-c", FLUFFLE, "simulate", *flags],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout
        for _ in range(2)
    )  # fmt: skip
    assert re.search(r"simulated .* in ", first)
    assert "simulated" not in again
    for printed in (first, again):
        assert "run the same command with --rounds 2 (without --fresh)" in printed
        assert "finished: 1 round is done" in printed
