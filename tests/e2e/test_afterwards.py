"""What a run folder tells after a run of real processes: replay and report."""

import json
import re

import pytest

from tests.e2e.programs import FLUFFLE, Federation

pytestmark = pytest.mark.rabbit


def test_every_round_replays_bit_by_bit_and_the_report_stands_alone(federation: Federation) -> None:
    coordinator = federation.coordinator("--quorum", 3, "--rounds", 3, "--keep-updates")
    workers = [federation.worker(f"shard:{n}/3") for n in range(3)]
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0, 0]

    for number in (1, 2, 3):
        replayed = federation.start(FLUFFLE, "replay", federation.run, "--round", number, "--json")
        assert replayed.end() == 0
        told = json.loads("\n".join(replayed.lines))
        assert told["equal"]
        assert len(told["participants"]) == 3
        assert all(tensor["second_opinion"]["ulps"] <= 2 for tensor in told["tensors"])

    reported = federation.start(FLUFFLE, "report", federation.run, "--out", "report.html")
    assert reported.end() == 0
    page = (federation.folder / "report.html").read_text()
    assert federation.name in page
    assert not re.search(r"https?:|\bsrc=|\bhref=|<script|url\(", page)
    as_json = federation.start(FLUFFLE, "report", federation.run, "--json")
    assert as_json.end() == 0
    numbers = json.loads("\n".join(as_json.lines))
    assert [len(row["cells"]) for row in numbers["workers"]] == [3, 3, 3]
    assert {cell["answer"] for row in numbers["workers"] for cell in row["cells"]} == {"counted"}
    assert all(one["phases"]["training"] > 0 for one in numbers["rounds"])
    assert [one["file"] for one in numbers["checkpoints"]] == [
        f"round-{number:04d}.safetensors" for number in range(4)
    ]
    (configuration,) = numbers["configurations"]
    assert configuration["rules"]["quorum"]["number"] == 3
    assert configuration["keep_updates"]


def test_a_run_without_kept_updates_says_so(federation: Federation) -> None:
    coordinator = federation.coordinator("--quorum", 1, "--rounds", 1)
    worker = federation.worker("shard:0/1")
    assert [program.end() for program in (coordinator, worker)] == [0, 0]
    replayed = federation.start(FLUFFLE, "replay", federation.run, "--round", 1)
    assert replayed.end() == 2
    assert "ran without --keep-updates" in replayed.lines[-1]
