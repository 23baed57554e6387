"""The page in a real browser, without a broker: what it draws of few and of many rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.events import RunEvent
from fluffle_coordinator.dashboard.coordinator_source import CoordinatorSource
from fluffle_coordinator.dashboard.report import page, snapshot
from fluffle_coordinator.dashboard.server import listen, served
from tests.browser import PATIENCE_MS, Window, chromium, window
from tests.history_lines import committed, evaluated, participant

EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>\u2028"
# What lies outside the drawing that it belongs to, in pixels beyond a rounding.
OUTSIDE = """drawings => drawings.flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("rect, text, circle, line, path")].filter(one => {
    const own = one.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1
      || own.top < box.top - 1 || own.bottom > box.bottom + 1;
  }).map(one => one.outerHTML);
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


def row(number: int, *workers: str, **more: Any) -> dict[str, Any]:
    fields = {"num_examples": 100, "train_loss": 2.0 / number, "seconds": 4.0, "bytes": 1000}
    late = {"late": 1, "late_updates": [{"worker": "b", "round": 1}]} if number == 2 else {}
    line = committed(
        number,
        *(participant(worker, counted_s=5.0, **fields) for worker in workers),
        asked=["a", "b", *workers],
        opened_at="2026-03-01T10:00:00+00:00",
        committed_at="2026-03-01T10:00:30+00:00",
        timings={"waiting_s": 1.0, "open_s": 10.0, "fold_s": 0.5, "checkpoint_s": 2.0},
        **late,
    )
    accuracy = 1.0 - 0.9 / number
    return {**line, **evaluated(number, loss=1.0 / number, accuracy=accuracy), **more}


def drawn(rows: list[dict[str, Any]], folder: Path, federation: str = "letters") -> str:
    """Return the address of the report of these rounds."""
    settings = {"rules": {"rounds": len(rows), "quorum": {"number": 2}}, "from_round": 1}
    identity = {"federation": federation, "run": "abc", "configurations": [settings]}
    file = folder / "report.html"
    file.write_text(page(snapshot(rows, identity, [], None, 1_800_000_000.0)))
    return file.as_uri()


def texts(seen: Window, selector: str) -> list[str]:
    return seen.page.locator(selector).all_inner_texts()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("rounds", [1, 2, 40, 500])
def test_drawings_of_few_and_of_many_rounds_keep_inside(
    browser: Browser, tmp_path: Path, rounds: int, width: int
) -> None:
    rows = [row(number, "a", "w" * 64) for number in range(1, rounds + 1)]
    with window(browser, drawn(rows, tmp_path), width=width) as seen:
        seen.wait("#phase", f"{rounds} of {rounds} rounds are committed")
        assert seen.page.locator("svg").evaluate_all(OUTSIDE) == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width
        assert seen.page.locator("#participation rect").count() == 3 * rounds
        assert len(texts(seen, "#history tr")) == rounds
        for drawing in ("#chart", "#time"):
            named = seen.page.locator(f"{drawing} text.middle").all_text_contents()
            assert 1 <= len(named) <= width // 40
            assert len(set(named)) == len(named)
        assert seen.complaints == []


def test_a_report_of_many_workers_and_rounds_has_every_panel(
    browser: Browser, tmp_path: Path
) -> None:
    workers = [f"w{number}" for number in range(1000)]
    rows = [row(number, *workers) for number in range(1, 161)]
    with window(browser, drawn(rows, tmp_path)) as seen:
        seen.wait("#phase", "160 of 160 rounds are committed")
        assert "902 more workers are not shown" in seen.wait("#participation-note")
        assert "quorum" in seen.wait("#configuration")  # a panel that is drawn later
        assert seen.complaints == []


def test_who_took_part_and_what_came_late(browser: Browser, tmp_path: Path) -> None:
    with window(browser, drawn([row(1, "a"), row(2, "a", "b")], tmp_path)) as seen:
        seen.wait("#phase", "2 of 2 rounds are committed")
        cells = seen.page.locator("#participation rect title").all_text_contents()
        assert cells == [
            "a, round 1: counted, 100 examples", "a, round 2: counted, 100 examples",
            "b, round 1: arrived late", "b, round 2: counted, 100 examples",
        ]  # fmt: skip
        assert texts(seen, "#tiles dt") == [
            "accuracy", "loss", "took part", "updates", "time", "late", "rejected",
        ]  # fmt: skip
        assert texts(seen, "#tiles dd") == ["55.0 %", "0.500", "2", "3", "26 s", "1", "0"]
        assert "took part" in seen.wait("#workers-count")
        assert not seen.page.locator(".staleness").is_visible()


def test_staleness_and_privacy_are_there_when_a_run_has_them(
    browser: Browser, tmp_path: Path
) -> None:
    stale = [
        participant("a", num_examples=100, staleness=0, weight=100.0),
        participant("b", num_examples=100, staleness=2, weight=50.0),
    ]
    rows = [
        row(1, participants=stale, epsilon=0.5, asked=["a", "b", "c"]),
        row(2, participants=stale, epsilon=0.75),
    ]
    with window(browser, drawn(rows, tmp_path)) as seen:
        seen.wait("#staleness-words", "25.0 % of the weight lost")
        cells = seen.page.locator("#participation rect title").all_text_contents()
        assert cells[4:] == ["c, round 1: was at work", "c, round 2: was not asked"]
        assert "no answer" not in seen.wait("#participation-legend", "at work")
        bars = seen.page.locator("#staleness rect title").all_text_contents()
        assert bars == ["versions 0: updates 2", "versions 2: updates 2"]
        ages = seen.page.locator("#staleness text.tick.middle").all_text_contents()
        assert ages == ["0", "1", "2"]  # a gap is seen as one
        assert "0.750" in texts(seen, "#tiles dd")
        assert seen.page.locator('#chart path.curve[data-metric="epsilon"]').count() == 1


def test_the_configuration_has_the_names_of_the_options(browser: Browser, tmp_path: Path) -> None:
    rules = {"least": 1, "patience": 5, "stall_timeout_s": None, "wait_s": 90.0}
    stopping = {"patience": 3, "time_budget_s": 60.0}
    identity = {
        "federation": "letters",
        "run": "abc",
        "configurations": [{"rules": rules, "stopping": stopping, "versions": {"python": "3.12"}}],
    }
    file = tmp_path / "report.html"
    file.write_text(page(snapshot([row(1, "a")], identity, [], None, 1_800_000_000.0)))
    with window(browser, file.as_uri()) as seen:
        seen.wait("#configuration", "version of python")
        names, values = texts(seen, "#configuration dt"), texts(seen, "#configuration dd")
        assert dict(zip(names, values, strict=True)) == {
            "fewest updates": "1",
            "heartbeats missed until gone": "5",
            "stall timeout": "\N{EN DASH}",
            "wait workers": "90 s",
            "patience": "3",
            "time budget": "60 s",
            "version of python": "3.12",
        }
        assert seen.complaints == []


def test_a_report_on_a_phone_breaks_no_date_and_no_hash(browser: Browser, tmp_path: Path) -> None:
    checkpoint = {"file": "round-0001.safetensors", "size_bytes": 7, "sha256": "0a" * 32}
    identity = {"federation": "letters", "run": "abc"}
    file = tmp_path / "report.html"
    rows = [row(1, "a")]
    file.write_text(page(snapshot(rows, identity, [checkpoint], None, 1_800_000_000.0)))
    with window(browser, file.as_uri(), width=390) as seen:
        seen.wait("#checkpoints .code", "0a" * 32)
        for line in ("#history tr", "#checkpoints tr"):
            box = seen.page.locator(line).first.bounding_box()
            assert box is not None
            assert box["height"] < 40
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 390


def test_an_interrupted_run_has_not_ended(browser: Browser) -> None:
    source = CoordinatorSource("letters", listen("127.0.0.1:0", "--dashboard"))
    with serving(source) as (url, happen), window(browser, url) as seen:
        happen(run_events.Started(run="first"), run_events.Interrupted(folder="runs/letters"))
        seen.wait("#open-empty", "The run was interrupted.")
        happen(run_events.Resumed(run="first"), run_events.Finished(reason="done"))
        seen.wait("#open-empty", "The run has ended.")


def test_whatever_came_from_outside_is_text(browser: Browser, tmp_path: Path) -> None:
    rejection = dict.fromkeys(("reason", "cause", "kind", "worker"), EVIL)
    rows = [row(1, EVIL, asked=[EVIL], rejected=1, rejections=[rejection], **{EVIL: 0.5})]
    with window(browser, drawn(rows, tmp_path, EVIL)) as seen:
        seen.page.on("dialog", lambda _: seen.complaints.append("a script was run"))
        assert seen.wait("h1").startswith("<img src=x")
        assert texts(seen, "#workers th")[0].startswith("<img src=x")
        assert seen.page.locator("body script:not(#snapshot), main img").count() == 0
        assert seen.complaints == []


def one_round() -> list[RunEvent]:
    return [
        run_events.Opened(round=1, asked=("a",), needed=1, deadline_s=60.0),
        run_events.Counted(worker="a", round=1, num_examples=5, train_s=1.0),
        run_events.Committed(round=1, participants=("a",), timings={"open_s": 2.0}),
        run_events.Evaluated(round=1, loss=0.5, metrics={"accuracy": 0.75}),
    ]


@contextmanager
def serving(source: CoordinatorSource) -> Iterator[tuple[str, Callable[..., None]]]:
    """Serve a page from a thread; yields its address, and what tells it of events."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        ended = asyncio.Event()
        async with served(source.feed, source.listening):
            started.set_result((asyncio.get_running_loop(), ended))
            await ended.wait()

    def happen(*events: RunEvent) -> None:
        for event in events:
            loop.call_soon_threadsafe(source.record, event)

    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(asyncio.run, serve())
        loop, ended = started.result(PATIENCE_MS / 1000)
        try:
            yield source.url, happen
        finally:
            loop.call_soon_threadsafe(ended.set)
            done.result(PATIENCE_MS / 1000)


def test_a_live_page_lists_each_answer_of_the_open_round_once(browser: Browser) -> None:
    source = CoordinatorSource("letters", listen("127.0.0.1:0", "--dashboard"))
    opened = run_events.Opened(round=1, asked=("a", "b"), needed=6, deadline_s=600.0)
    with serving(source) as (url, happen), window(browser, url) as seen:
        happen(run_events.Started(run="first"), opened)
        for updates in range(1, 5):  # an asynchronous round can count a worker more than once
            happen(run_events.Counted(worker="a", round=1, num_examples=5, updates=updates))
            seen.wait("#quorum-words", f"{updates} of 6 updates")
        assert texts(seen, "#answers b") == ["b", "a", "a", "a", "a"]


def test_a_live_page_draws_another_run_afresh(browser: Browser) -> None:
    drawings = [f"#{name} svg" for name in ("chart", "time", "participation")]
    source = CoordinatorSource("letters", listen("127.0.0.1:0", "--dashboard"))
    with serving(source) as (url, happen), window(browser, url) as seen:
        happen(run_events.Started(run="first"), *one_round())
        for drawing in drawings:
            seen.page.locator(drawing).wait_for()
        happen(run_events.Started(run="second"))
        for drawing in drawings:
            seen.page.locator(drawing).wait_for(state="hidden")
        happen(*one_round(), run_events.Finished(reason="1 round is done"))
        for drawing in drawings:
            seen.page.locator(drawing).wait_for()
        seen.wait("#workers-count", "1 took part")
        assert seen.wait("#workers .chip") == "done"
        assert seen.complaints == []


def test_a_live_page_tells_how_many_rounds_it_details(browser: Browser) -> None:
    source = CoordinatorSource("letters", listen("127.0.0.1:0", "--dashboard"))
    workers = ("a", "w" * 64)  # a long name leaves no room for 50 rounds on a phone
    timings = {"waiting_s": 8.0, "open_s": 4.0, "average_s": 1.0}
    with serving(source) as (url, happen), window(browser, url, width=390) as seen:
        happen(run_events.Started(run="first"))
        for number in range(1, 58):
            happen(
                run_events.Opened(round=number, asked=workers, needed=1),
                run_events.Committed(round=number, participants=workers, timings=timings),
            )
        seen.wait("#history th", "57")
        for panel in ("history", "participation", "time"):
            seen.wait(f"#{panel}-title", "last 50 rounds")
        assert texts(seen, "#history tr:first-child > *")[3] == "13 s"  # as its bar in Time
        ends = seen.page.locator("#participation text.tick:not(.middle)").all_text_contents()
        assert ends == ["50 of 50"] * 2
        hidden_at_left, hidden_at_right = seen.page.locator("#participation").evaluate(
            """({parentElement: view}) =>
            [view.scrollLeft, view.scrollWidth - view.clientWidth - view.scrollLeft]"""
        )
        assert hidden_at_left > 1 > hidden_at_right


def test_a_long_state_of_the_connection_leaves_the_title_its_line(browser: Browser) -> None:
    source = CoordinatorSource("letters", listen("127.0.0.1:0", "--dashboard"))
    lost = "no broker at amqp://127.0.0.1:5673/ (111 Connection refused); trying again"
    with serving(source) as (url, happen), window(browser, url, width=390) as seen:
        happen(run_events.Started(run="first"))
        seen.wait("h1", "letters")
        before, after, width = seen.page.evaluate(
            """words => {
              const height = () => document.querySelector("h1").clientHeight;
              const before = height();
              document.querySelector("#link-words").textContent = words;
              return [before, height(), document.documentElement.scrollWidth];
            }""",
            lost,
        )
        assert (after, width) == (before, 390)
