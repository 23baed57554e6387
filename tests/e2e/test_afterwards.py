"""What a run folder tells after a run of real processes: replay and report."""

import json
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests import here
from tests.browser import chromium, window
from tests.e2e.programs import FLUFFLE, Federation

pytestmark = pytest.mark.rabbit


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


def test_every_round_replays_bit_by_bit_and_the_report_stands_alone(federation: Federation) -> None:
    coordinator = federation.coordinator("--quorum", 3, "--rounds", 3, "--keep-updates")
    workers = [federation.worker(f"shard:{n}/3") for n in range(3)]
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0, 0]

    for number in (1, 2, 3):
        code, replayed, _ = here.fluffle("replay", federation.run, "--round", number, "--json")
        assert code == 0
        told = json.loads(replayed)
        assert told["equal"]
        assert len(told["participants"]) == 3

    reported = federation.start(FLUFFLE, "report", federation.run, "--out", "report.html")
    assert reported.end() == 0
    page = (federation.folder / "report.html").read_text()
    assert federation.name in page
    assert not re.search(r"https?:|url\(", page.replace("http://www.w3.org/2000/svg", ""))
    code, as_json, _ = here.fluffle("report", federation.run, "--json")
    assert code == 0
    numbers = json.loads(as_json)
    assert numbers["run"]["words"] == "finished: 3 rounds are done"
    assert [row["counted"] for row in numbers["workers"]] == [3, 3, 3]
    assert [len(one["participants"]) for one in numbers["rounds"]] == [3, 3, 3]
    assert all(one["phases"]["training"] > 0 for one in numbers["rounds"])
    assert [one["file"] for one in numbers["checkpoints"]] == [
        f"round-{number:04d}.safetensors" for number in range(4)
    ]
    (configuration,) = numbers["configurations"]
    assert configuration["rules"]["quorum"]["number"] == 3
    assert configuration["keep_updates"]


def test_a_report_draws_itself_without_a_network_and_without_a_complaint(
    federation: Federation, browser: Browser
) -> None:
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 2)
    workers = [federation.worker(f"shard:{n}/2") for n in range(2)]
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0]
    assert federation.start(FLUFFLE, "report", federation.run).end() == 0
    with window(browser, (federation.run / "report.html").resolve().as_uri(), width=390) as seen:
        seen.wait("#phase", "finished: 2 rounds are done")
        assert seen.page.locator("#history tr th").all_inner_texts() == ["2", "1"]
        assert seen.page.locator("#participation rect").count() == 2 * 2
        assert "After round 2" in (
            seen.page.locator("#chart svg").get_attribute("aria-label") or ""
        )
        assert seen.wait("#workers-count") == "2 took part"
        assert len(seen.page.locator("#checkpoints tr").all()) == 3
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
        too_wide = "tiles => tiles.filter(one => one.scrollWidth > one.clientWidth).length"
        assert seen.page.locator("#tiles div, #tiles dd").evaluate_all(too_wide) == 0
        assert seen.complaints == []  # of the policy, too


def test_a_run_without_kept_updates_says_so(federation: Federation) -> None:
    coordinator = federation.coordinator("--quorum", 1, "--rounds", 1)
    worker = federation.worker("shard:0/1")
    assert [program.end() for program in (coordinator, worker)] == [0, 0]
    replayed = federation.start(FLUFFLE, "replay", federation.run, "--round", 1)
    assert replayed.end() == 2
    assert "ran without --keep-updates" in replayed.lines[-1]
