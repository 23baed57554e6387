"""The checks of the coordinators' logs, tested with artificial logs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.faults import fairness

Line = dict[str, Any]

_BEGAN = datetime.fromisoformat("2026-03-01T12:00:00.000000+00:00")
ALL = {"number": None, "fraction": 1.0}


def at(second: float) -> str:
    return (_BEGAN + timedelta(seconds=second)).isoformat(timespec="microseconds")


def logged(event: str, second: float = 0.0, **fields: Any) -> Line:
    return {"time": at(second), "event": event, **fields}


def opened(number: int, needed: int, second: float = 0.0, *, asked: Sequence[str] = ()) -> Line:
    return logged("opened", second, round=number, needed=needed, asked=list(asked))


def counted(number: int, updates: int, needed: int) -> Line:
    return logged("counted", round=number, worker=f"w{updates}", updates=updates, needed=needed)


def shrank(number: int, needed: int, was: int) -> Line:
    return logged("quorum", round=number, needed=needed, was=was, reason="w3 is gone")


COMMITTED = logged("committed", round=1)


def write(path: Path, lines: Sequence[Line]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- quorums -------------------------------------------------------------------------------------


def judged_quorums(
    folder: Path,
    updates: int,
    *logs: Sequence[Line],
    quorum: Line = ALL,
    min_workers: int = 1,
    fraction: float = 1.0,
) -> list[str]:
    """Judge a run of one round that was committed with this many updates."""
    rules = {"quorum": quorum, "min_workers": min_workers, "fraction": fraction}
    (folder / "run").mkdir()
    (folder / "run/run.json").write_text(
        json.dumps({"run": "r", "configurations": [{"from_round": 1, "rules": rules}]})
    )
    for number, log in enumerate(logs, start=1):
        write(folder / f"log/{number:03d}-coordinator.jsonl", log)
    there = [{"worker": f"w{number}"} for number in range(updates)]
    commits = [{"event": "committed", "round": 1, "participants": there}]
    return list(fairness.quorums(folder, fairness.coordinator_logs(folder), commits))


SHORT = "round 1 was closed with 1 update, its quorum was 3"
MUTE = "the quorum of round 1 fell from 3 to 1, and no event 'quorum' says why"


@pytest.mark.parametrize(
    ("updates", "log", "violations"),
    [
        (3, [opened(1, 3), counted(1, 3, 3), COMMITTED], []),
        (1, [opened(1, 3), COMMITTED], [SHORT]),
        (1, [opened(1, 3), counted(1, 1, 1), COMMITTED], [MUTE]),
        (1, [opened(1, 2), logged("reopened", round=1, needed=3), COMMITTED], [SHORT]),
        (2, [opened(1, 2), counted(1, 1, 3), COMMITTED],
         ["round 1 was closed with 2 updates, its quorum was 3"]),
        (2, [opened(1, 3), shrank(1, 2, 3), counted(1, 2, 2), COMMITTED], []),
        (1, [opened(1, 3), shrank(1, 2, 3), COMMITTED],
         ["round 1 was closed with 1 update, its quorum was 2"]),
        (1, [opened(1, 3), shrank(1, 0, 1), COMMITTED], [MUTE]),
        (2, [shrank(1, 2, 3), opened(1, 2), COMMITTED],
         ["the event 'quorum' of round 1 comes before its event 'opened'"]),
        (2, [opened(1, 2), shrank(1, 2, 3), COMMITTED], []),  # a third worker joined and left
        (3, [opened(1, 2), counted(1, 2, 2), counted(1, 3, 4), COMMITTED], []),  # in the grace
        (1, [opened(1, 3), logged("closed", round=1), COMMITTED], []),
        (1, [opened(1, 3)], []),  # killed before it could log everything
        (1, [opened(1, 1), COMMITTED, opened(2, 3)], []),
    ],
)  # fmt: skip
def test_a_round_closed_below_its_quorum_is_found(
    tmp_path: Path, updates: int, log: list[Line], violations: list[str]
) -> None:
    assert judged_quorums(tmp_path, updates, log) == violations


def test_the_coordinator_that_committed_a_round_is_the_one_whose_quorum_counts(
    tmp_path: Path,
) -> None:
    assert judged_quorums(tmp_path, 2, [opened(1, 4)], [opened(1, 2), COMMITTED]) == []
    logs = fairness.coordinator_logs(tmp_path)
    assert fairness.judged(logs) == 1


@pytest.mark.parametrize(
    ("quorum", "min_workers", "fraction", "floor"),
    [
        (ALL, 3, 1.0, 3),
        ({"number": 2, "fraction": 1.0}, 5, 1.0, 2),
        ({"number": None, "fraction": 0.5}, 5, 1.0, 3),
        ({"number": None, "fraction": 0.1}, 30, 1.0, 3),
        (ALL, 4, 0.5, 2),
        (ALL, 1, 1.0, 1),
    ],
)
def test_no_round_is_below_the_operators_minimum(
    tmp_path: Path, quorum: Line, min_workers: int, fraction: float, floor: int
) -> None:
    def violations_with(folder: str, updates: int) -> list[str]:
        (tmp_path / folder).mkdir()
        rules = {"quorum": quorum, "min_workers": min_workers, "fraction": fraction}
        return judged_quorums(tmp_path / folder, updates, [opened(1, 0), COMMITTED], **rules)

    assert violations_with("enough", floor) == []
    assert [
        line.endswith(f"takes fewer than {floor}") for line in violations_with("less", floor - 1)
    ] == [True]


def test_a_changed_configuration_holds_from_its_round_on(
    tmp_path: Path,
) -> None:
    some = {"quorum": ALL, "fraction": 1.0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(
        json.dumps(
            {
                "configurations": [
                    {"from_round": 1, "rules": {**some, "min_workers": 1}},
                    {"from_round": 2, "rules": {**some, "min_workers": 2}},
                ]
            }
        )
    )
    commits = [{"round": number, "participants": [{"worker": "w0"}]} for number in (1, 2)]
    assert list(fairness.quorums(tmp_path, {}, commits)) == [
        "round 2 was closed with 1 update; --quorum all of --min-workers 2 never takes fewer than 2"
    ]


# --- silence -------------------------------------------------------------------------------------

STOPPED = {"why": "stop", "began": at(10), "time": at(25), "log": "001-coordinator.jsonl"}
ALARM = {"why": "alarm", "began": at(10), "time": at(25)}
GONE = logged("gone", 25.001, worker="w1", silent_s=15.2)
EVERYBODY = ("w0", "w1")
BEFORE = opened(1, 2, 9, asked=EVERYBODY)
WORDS = "a coordinator (001-coordinator.jsonl) was stopped for 15.0 s, and "


def judged(
    folder: Path,
    unheard: Line,
    *logs: Sequence[Line],
    faults: Sequence[Line] = (),
    living: Sequence[str] = EVERYBODY,
) -> list[str]:
    write(folder / "evidence/unheard.jsonl", [{**unheard, "living": list(living)}])
    write(folder / "evidence/faults.jsonl", faults)
    for number, log in enumerate(logs, start=1):
        write(folder / f"log/{number:03d}-coordinator.jsonl", log)
    return list(fairness.silences(folder, fairness.coordinator_logs(folder)))


def fault(kind: str, began: float, done: float, lasts_s: float = 0.0) -> Line:
    return {"kind": kind, "began": at(began), "time": at(done), "lasts_s": lasts_s}


def test_a_living_worker_that_is_gone_after_a_stop_is_found(tmp_path: Path) -> None:
    violations = judged(tmp_path, STOPPED, [BEFORE, GONE])
    assert violations == [f"{WORDS}w1, which lived, counted as gone"]


def test_a_living_worker_that_is_gone_after_an_alarm_is_found(tmp_path: Path) -> None:
    violations = judged(tmp_path, ALARM, [BEFORE, GONE])
    assert violations == ["a memory alarm took 15.0 s, and w1, which lived, counted as gone"]


def test_a_living_worker_that_is_not_asked_in_the_next_round_is_found(tmp_path: Path) -> None:
    violations = judged(tmp_path, STOPPED, [BEFORE, opened(2, 1, 26, asked=["w0"])])
    assert violations == [f"{WORDS}round 2 did not ask w1"]


def test_a_standby_that_replaces_a_stopped_coordinator_is_found(
    tmp_path: Path,
) -> None:
    violations = judged(tmp_path, STOPPED, [BEFORE], [logged("resumed", 20, round=1)])
    assert violations == [f"{WORDS}another one (002-coordinator.jsonl) took its run"]


@pytest.mark.parametrize(
    ("log", "more"),
    [
        ([BEFORE, opened(2, 2, 26, asked=EVERYBODY)], {}),
        ([BEFORE, GONE], {"living": ["w0"]}),  # it was killed or has just started
        ([BEFORE, logged("gone", 41, worker="w1")], {}),  # much later, for another reason
        ([BEFORE, GONE], {"faults": [fault("cut", 25.0005, 25.0005)]}),  # the next fault
        ([BEFORE, GONE], {"faults": [fault("stall", 9, 9, 9.0)]}),  # an earlier one lasted
        ([BEFORE, GONE], {"faults": [fault("stall", 7, 7, 4.0)]}),  # it had been silent for 3 s
        ([BEFORE, logged("left", 9.5, worker="w1"), opened(2, 1, 26, asked=["w0"])], {}),
    ],
)
def test_an_absence_with_another_reason_is_no_violation(
    tmp_path: Path, log: list[Line], more: Line
) -> None:
    assert judged(tmp_path, STOPPED, log, **more) == []


def test_a_silence_during_another_fault_is_not_judged(tmp_path: Path) -> None:
    judged(tmp_path, STOPPED, [BEFORE, GONE], faults=[fault("stall", 7, 7, 4.0)])
    assert fairness.silences_judged(tmp_path) == 0


def test_a_fault_that_ended_long_before_is_no_excuse(tmp_path: Path) -> None:
    violations = judged(tmp_path, STOPPED, [BEFORE, GONE], faults=[fault("stall", 9, 9, 6.0)])
    assert len(violations) == 1
    assert fairness.silences_judged(tmp_path) == 1
