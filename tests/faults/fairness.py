"""Checks from the coordinators' logs that quorums held and that silence was judged fairly.

A part of `checker`; it does not use fluffle's code either and reads nothing but JSON lines.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tests.faults.harness import whole_lines

Line = dict[str, Any]
Logs = dict[str, list[Line]]

_QUORUM_EVENTS = frozenset({"opened", "reopened", "quorum", "counted", "closed", "committed"})
# After a time in which no worker could be heard, none may count as gone for this long.
_JUDGED_FOR = timedelta(seconds=15)
# All workers are heard again this long after a fault of the connections.
_SETTLED_AFTER = timedelta(seconds=8)
# A worker that was silent for this long before the unheard time may be gone because of that. A
# worker is gone after five heartbeats of 1 s: up to 1 s since its last, this, and 2.5 s that still
# count when nobody is heard.
_HALF_GONE = timedelta(seconds=1.5)
# The faults that can silence a worker for a while; restarted workers are known otherwise.
_ON_THE_LINE = frozenset({"broker", "cut", "stall", "half-close"})


def coordinator_logs(folder: Path) -> Logs:
    """Read each coordinator's events in order, by the name of its log.

    Lines that are no JSON are skipped: a kill can truncate one, and a crash prints a traceback.
    """
    return {
        path.name: [line for line in whole_lines(path, strict=False) if "event" in line]
        for path in sorted(folder.glob("log/*-coordinator.jsonl"))
    }


# --- quorums -------------------------------------------------------------------------------------


def quorums(folder: Path, logs: Logs, commits: list[Line]) -> Iterator[str]:
    """Find rounds that closed below their quorum, and quorums that shrank without an event.

    The log of the coordinator that committed a round decides. If that coordinator was killed before
    it could log the commit, its log may lack events, and only the operator's minimum applies.
    """
    have = {line["round"]: len(line["participants"]) for line in commits}
    for log in logs.values():
        yield from _kept(log, have)
    run = json.loads((folder / "run/run.json").read_text())
    configurations = run.get("configurations", [])
    closed = {line["round"] for log in logs.values() for line in log if line["event"] == "closed"}
    for line in commits:
        number = line["round"]
        floor, words = _floor(configurations, number)
        if number not in closed and have[number] < floor:
            yield (
                f"round {number} was closed with {_updates(have[number])}; {words} never takes "
                f"fewer than {floor}"
            )


def judged(logs: Logs) -> int:
    """Count the rounds whose opening and commit are in the same log."""
    rounds: set[int] = set()
    for log in logs.values():
        opened = {line["round"] for line in log if line["event"] == "opened"}
        rounds |= {line["round"] for line in log if line["event"] == "committed"} & opened
    return len(rounds)


def _kept(log: list[Line], have: Mapping[int, int]) -> Iterator[str]:
    """Find violations in one coordinator's log."""
    needed: dict[int, int] = {}
    reached: set[int] = set()
    for line in log:
        if line["event"] not in _QUORUM_EVENTS:
            continue
        number = line["round"]
        announced = needed.get(number, 0)
        match line["event"]:
            case "opened" | "reopened":
                needed[number] = line["needed"]
            case "quorum":
                if number not in needed:
                    yield f"the event 'quorum' of round {number} comes before its event 'opened'"
                if line["was"] < announced:
                    yield _mutely(number, announced, line["was"])
                needed[number] = line["needed"]
            case "counted" if number not in reached:  # once reached, it does not rise
                if line["needed"] < announced:
                    yield _mutely(number, announced, line["needed"])
                needed[number] = line["needed"]
                if line["updates"] >= line["needed"]:
                    reached.add(number)
            case "closed":
                needed[number] = 0
            case "committed" if have.get(number, 0) < announced:
                yield (
                    f"round {number} was closed with {_updates(have.get(number, 0))}, "
                    f"its quorum was {announced}"
                )


def _mutely(number: int, was: int, now: int) -> str:
    return f"the quorum of round {number} fell from {was} to {now}, and no event 'quorum' says why"


def _floor(configurations: list[Line], number: int) -> tuple[int, str]:
    """Return the operator's minimum of updates for a round, and the options that set it."""
    holding = [one for one in configurations if one["from_round"] <= number]
    if not holding:
        return 1, "a round"
    schedule, rules = holding[-1].get("schedule", "quorum"), holding[-1]["rules"]
    if buffer := re.match(r"buffered:buffer=(\d+)", schedule):
        return int(buffer[1]), f"--buffer {buffer[1]}"
    quorum, workers = rules["quorum"], rules["min_workers"]
    if quorum["number"] is not None:
        return quorum["number"], f"--quorum {quorum['number']}"
    asked = _share(rules["fraction"], workers)
    words = "all" if quorum["fraction"] == 1 else f"{quorum['fraction']:.0%}"
    return _share(quorum["fraction"], asked), f"--quorum {words} of --min-workers {workers}"


def _share(fraction: float, number: int) -> int:
    return max(1, math.ceil(fraction * number - 1e-9))


def _updates(number: int) -> str:
    return "1 update" if number == 1 else f"{number} updates"


# --- silence -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unheard:
    """A time in which no coordinator could hear any worker.

    Args:
        words: the cause, for messages.
        began: its start.
        ended: its end.
        living: the workers that lived throughout.
        log: the log of the stopped coordinator; None for another cause.
    """

    words: str
    began: datetime
    ended: datetime
    living: frozenset[str]
    log: str | None


def silences(folder: Path, logs: Logs) -> Iterator[str]:
    """Find living workers that counted as gone because of an unheard time."""
    faults = whole_lines(folder / "evidence/faults.jsonl")
    for one in _unheard(folder):
        if _disturbed(faults, one):
            continue
        until = _until(faults, one)
        for name, log in logs.items():
            then = [line for line in log if one.began <= _time(line) <= until]
            for line in then:
                if line["event"] == "gone" and line["worker"] in one.living:
                    yield f"{one.words}, and {line['worker']}, which lived, counted as gone"
                if line["event"] == "resumed" and one.log not in (None, name):
                    yield f"{one.words}, and another one ({name}) took its run"
            if name == one.log:
                yield from _left_out(one, log, then)


def silences_judged(folder: Path) -> int:
    """Count the unheard times that no other fault disturbed."""
    faults = whole_lines(folder / "evidence/faults.jsonl")
    return sum(not _disturbed(faults, one) for one in _unheard(folder))


def _left_out(one: Unheard, log: list[Line], then: list[Line]) -> Iterator[str]:
    """Find living workers that a coordinator asked before it was stopped but not afterwards."""
    here: set[str] = set()
    for line in log:
        if _time(line) >= one.began:
            break
        if line["event"] == "opened":
            here = set(line["asked"]) & one.living
        elif line["event"] in ("gone", "left"):
            here.discard(line["worker"])
    opened = [line for line in then if line["event"] == "opened" and _time(line) > one.ended]
    for line in opened[:1]:
        if lacks := sorted(here - set(line["asked"])):
            yield f"{one.words}, and round {line['round']} did not ask {', '.join(lacks)}"


def _unheard(folder: Path) -> Iterator[Unheard]:
    for line in whole_lines(folder / "evidence/unheard.jsonl"):
        began, ended, log = datetime.fromisoformat(line["began"]), _time(line), line.get("log")
        what = f"a coordinator ({log}) was stopped for" if log else "a memory alarm took"
        words = f"{what} {(ended - began).total_seconds():.1f} s"
        yield Unheard(words, began, ended, frozenset(line["living"]), log)


def _until(faults: list[Line], one: Unheard) -> datetime:
    """Return the end of the time to judge; the next fault may be a reason of its own."""
    begins = [datetime.fromisoformat(line["began"]) for line in faults]
    return min([one.ended + _JUDGED_FOR, *(began for began in begins if began > one.ended)])


def _disturbed(faults: list[Line], one: Unheard) -> bool:
    """Whether an earlier fault of the connections overlaps it.

    Then a worker may be silent while others are heard, or remain unheard afterwards.
    """
    for line in faults:
        if line["kind"] in _ON_THE_LINE and _time(line) < one.began:
            over = _time(line) + timedelta(seconds=line["lasts_s"])
            silent_before = over > one.began and _time(line) < one.began - _HALF_GONE
            if silent_before or over + _SETTLED_AFTER > one.ended:
                return True
    return False


def _time(line: Line) -> datetime:
    return datetime.fromisoformat(line["time"])
