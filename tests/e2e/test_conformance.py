"""``fluffle conformance`` as a user runs it, against our own worker and a minimal one."""

from __future__ import annotations

import json
import sys

import pytest

from tests.e2e.programs import FLUFFLE, ROOT, Federation, Program

pytestmark = pytest.mark.rabbit

LARGE = f"{ROOT / 'tests/e2e/large_task.py'}:task"


def conformance(federation: Federation, *flags: object) -> Program:
    where = ("--federation", federation.name, "--url", federation.url)
    return federation.start(FLUFFLE, "conformance", *where, "--patience", 30, *flags)


@pytest.mark.parametrize("queues", ["classic", "quorum"])
def test_our_worker_meets_every_requirement(federation: Federation, queues: str) -> None:
    kind = ("--queue-type", queues)
    check = conformance(federation, "--twice", *kind)
    first = federation.worker("shard:0/3", "--heartbeat", 1, *kind, task=LARGE)
    check.wait_for("start worker shard-0-3 once more")
    assert first.end() == 0, "\n".join(first.lines)
    second = federation.worker("shard:0/3", *kind, task=LARGE)
    assert check.end() == 0, "\n".join(check.lines)
    assert check.lines[-1] == "31 ok, 0 failed, 1 skipped"
    assert second.end() == 6, "\n".join(second.lines)  # refused


def test_a_minimal_worker_fails_what_it_lacks(federation: Federation) -> None:
    script = ROOT / "tests/e2e/pika_worker.py"
    check = conformance(federation, "--json", "--worker", "pika")
    check.wait_for("waiting for worker pika")
    federation.start(sys.executable, script, federation.url, federation.name, "pika")
    assert check.end() == 1
    result = json.loads("\n".join(check.lines[1:]))
    assert result["ok"] is False
    failed = {
        finding["scenario"] for finding in result["findings"] if finding["outcome"] == "failed"
    }
    assert failed == UNMET, result


UNMET = {
    "extra tensors",
    "last work",
    "messages to ignore",
    "part of the model",
    "same fit again",
    "same fit while at work",
    "ticket",
    "unknown critical key",
    "unsound weights",
    "well formed",
}
