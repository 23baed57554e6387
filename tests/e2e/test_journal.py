"""The journal of real runs, read back from the broker while they go on and after they are over."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import here
from tests.e2e.programs import FLUFFLE, ROOT, Federation, Program

pytestmark = pytest.mark.rabbit
WAITING = f"{ROOT / 'tests/e2e/waiting_task.py'}:task"


def where(federation: Federation) -> tuple[str, ...]:
    return ("--federation", federation.name, "--url", federation.url)


def follow(federation: Federation) -> Program:
    """Start a command that prints the journal as it grows."""
    return federation.start(FLUFFLE, "journal", *where(federation), "--follow")


def lines(federation: Federation, command: str, *words: object) -> list[str]:
    """Return what a command that looks into a federation prints."""
    code, told, errors = here.fluffle(command, *where(federation), *words)
    assert code == 0, errors
    return told.splitlines()


def events(federation: Federation, *words: object) -> list[dict[str, Any]]:
    """Return the journal as objects."""
    return [json.loads(line) for line in lines(federation, "journal", "--json", *words)]


def of_kind(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [one["fields"] for one in found if one["event"] == kind]


def test_a_run_is_read_back_as_often_as_one_likes(federation: Federation) -> None:
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 3)
    workers = [federation.worker(f"shard:{n}/2") for n in range(2)]
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0]

    found = events(federation)
    assert [one["number"] for one in found] == list(range(1, len(found) + 1))
    assert len({one["session"] for one in found}) == len({one["run"] for one in found}) == 1
    assert (found[0]["event"], found[-1]["event"]) == ("started", "finished")
    assert [one["round"] for one in of_kind(found, "opened")] == [1, 2, 3]
    assert [one["round"] for one in of_kind(found, "committed")] == [1, 2, 3]
    assert [one["round"] for one in of_kind(found, "evaluated")] == [1, 2, 3]
    names = ["shard-0-2", "shard-1-2"]
    for number in (1, 2, 3):
        counted = [one for one in of_kind(found, "counted") if one["round"] == number]
        assert sorted(one["worker"] for one in counted) == names
        assert all(one["bytes"] > 0 and one["train_s"] >= 0 for one in counted)
    committed = of_kind(found, "committed")[0]
    assert (committed["participants"], committed["num_examples"]) == (names, 270)
    assert committed["timings"]["checkpoint_s"] > 0
    assert not any("address" in one["fields"] for one in found)

    said = lines(federation, "journal")
    assert said == lines(federation, "journal")
    assert said[0].endswith(f"run {found[0]['run']}")
    assert any(line.endswith("round 2: committed with shard-0-2, shard-1-2") for line in said)
    assert events(federation, "--since", "1h") == found
    assert events(federation, "--since", "2999-01-01") == []
    one = events(federation, "--round", 2, "--worker", "shard-0-2", "--kind", "counted")
    assert [(e["fields"]["round"], e["fields"]["worker"]) for e in one] == [(2, "shard-0-2")]

    told = "\n".join(lines(federation, "explain", 2))
    assert "Round 2 of run" in told
    assert "is committed" in told
    assert re.search(r"shard-0-2 answered at .* after the opening: \d+ examples", told)
    assert "loss" in told
    code, _, wrong = here.fluffle("explain", *where(federation), 9)
    assert code == 2
    assert "has rounds 1-3" in wrong


def test_whoever_follows_sees_it_as_it_happens_even_from_before_the_beginning(
    federation: Federation, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    follower = follow(federation)
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 1)
    env = {"WAIT_FOR": str(gate)}
    workers = [federation.worker(f"shard:{n}/2", task=WAITING, env=env) for n in range(2)]
    follower.wait_for("round 1: opened for shard-0-2, shard-1-2")
    gate.touch()
    follower.wait_for("round 1: committed with shard-0-2, shard-1-2")
    follower.wait_for("finished: 1 round is done")
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0]
    follower.send(signal.SIGTERM)
    assert follower.end() == 128 + signal.SIGTERM


def test_a_killed_worker_is_named_by_explain_while_the_round_is_stuck(
    federation: Federation, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    coordinator = federation.coordinator("--quorum", 3, "--rounds", 1, "--deadline", 300)
    env = {"WAIT_FOR": str(gate)}
    workers = [federation.worker(f"shard:{n}/3") for n in range(2)]
    victim = federation.worker("shard:2/3", task=WAITING, env=env)
    follower = follow(federation)  # the coordinator says it a moment earlier
    victim.wait_for("round 1: training")
    follower.wait_for(r"counted, 90 examples \(2/3\)")

    told = "\n".join(lines(federation, "explain"))
    assert "till waiting for shard-2-3: connected" in told

    victim.send(signal.SIGKILL)
    assert victim.end() == -signal.SIGKILL
    follower.wait_for("shard-2-3 is gone")
    data = json.loads("\n".join(lines(federation, "explain", "--json")))
    assert (data["round"], data["open"], data["needed"]) == (1, True, 3)
    (missing,) = data["missing"]
    assert missing["worker"] == "shard-2-3"
    assert "has been gone since" in missing["why"]
    assert 0 < data["left_s"] <= 300
    assert data["longest_wait"]["until"] == ""
    told = "\n".join(lines(federation, "explain", 1))
    assert "shard-2-3: it has been gone since" in told
    assert re.search(r"left until the deadline, at \d\d:\d\d:\d\d", told)

    again = federation.worker("shard:2/3")
    assert [program.end() for program in (coordinator, *workers, again)] == [0, 0, 0, 0]
    told = "\n".join(lines(federation, "explain"))
    assert "is committed" in told
    assert re.search(
        r"The longest wait was for shard-2-3: it .*answered .* after shard-[01]-3\.", told
    )


def test_a_coordinator_that_was_killed_or_stopped_appears_as_resumed(
    federation: Federation, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    env = {"WAIT_FOR": str(gate), "WAIT_FROM": "2"}
    flags = ("--quorum", 2, "--rounds", 2)
    first = federation.coordinator(*flags)
    workers = [federation.worker(f"shard:{n}/2", task=WAITING, env=env) for n in range(2)]
    first.wait_for("round 2: opened")
    follower = follow(federation)
    follower.wait_for("round 2: opened")
    first.send(signal.SIGKILL)
    assert first.end() == -signal.SIGKILL
    second = federation.coordinator(*flags)
    follower.wait_for("continuing run .* after round 1")
    follower.wait_for("round 2: opened")
    second.send(signal.SIGINT)
    assert second.end() == 128 + signal.SIGINT
    follower.wait_for("stopped; run the same command .* to continue")
    told = "\n".join(lines(federation, "explain"))
    assert "The coordinator was told to stop" in told
    assert "the round was opened again" in told
    third = federation.coordinator(*flags)
    third.wait_for("round 2: opened")
    gate.touch()
    assert [program.end() for program in (third, *workers)] == [0, 0, 0]
    found = events(federation)
    assert len({one["run"] for one in found}) == 1
    sessions = list(dict.fromkeys(one["session"] for one in found))
    assert len(sessions) == 3
    for session in sessions:
        numbers = [one["number"] for one in found if one["session"] == session]
        assert numbers == list(range(1, len(numbers) + 1))
    assert [one["event"] for one in found if one["number"] == 1] == [
        "started",
        "resumed",
        "resumed",
    ]
    assert len(of_kind(found, "interrupted")) == 1
    assert [one["round"] for one in of_kind(found, "committed")] == [1, 2]
