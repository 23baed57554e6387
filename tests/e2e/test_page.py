"""The page in a real browser, given boards by the test instead of a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route

from fluffle_common.cli.console import json_line
from fluffle_common.protocol.events import from_fields
from fluffle_coordinator.dashboard.board import Board
from tests.browser import PATIENCE_MS, chromium

STATIC = files("fluffle_coordinator.dashboard") / "static"
TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
STREAM = """
window.EventSource = class {
  static OPEN = 1;
  readyState = 1;
  constructor() { window.stream = this; }
  addEventListener() {}
  close() {}
};
"""
Show = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def show(browser: Browser) -> Iterator[Callable[..., Show]]:
    """Return a function that opens a page of some width; that returns one that shows a board."""
    pages: list[Page] = []

    def answer(route: Route) -> None:
        name = route.request.url.rpartition("/")[2] or "page.html"
        kind = TYPES[name.rpartition(".")[2]]
        route.fulfill(body=(STATIC / name).read_text(), content_type=kind)

    def opened(width: int = 1280, **options: Any) -> Show:
        page = browser.new_page(viewport={"width": width, "height": 800}, **options)
        page.set_default_timeout(PATIENCE_MS)
        pages.append(page)
        page.route("**/*", answer)
        page.add_init_script(STREAM)
        page.goto("http://page.test/")

        def shown(board: Board, now: float = 2000.0) -> Page:
            sections = {name: json.loads(json_line(s)) for name, s in board.snapshot().items()}
            page.evaluate("data => stream.onmessage({data})", json.dumps(sections | {"now": now}))
            return page

        return shown

    yield opened
    for page in pages:
        page.close()


def board_of(*names: str, rounds: int = 2, took_s: float = 900.0, **metrics: float) -> Board:
    """Return a board after some rounds, each of which took as long, and with one round open."""
    board = Board("letters")
    board.link(True, "connected")

    def add(what: str, **fields: Any) -> None:
        board.add(at, from_fields(what, fields))

    at = 1000.0
    for number in range(1, rounds + 2):
        add("opened", round=number, asked=names, needed=len(names), deadline_s=60.0)
        if number > rounds:
            break
        at += took_s
        for name in names:
            add("counted", worker=name, round=number, num_examples=12345, train_s=took_s / 2)
        timings = {"waiting_s": 1.0, "open_s": took_s}
        add("committed", round=number, participants=names, num_examples=9, timings=timings)
        add("evaluated", round=number, loss=0.5, num_examples=9, metrics=metrics)
    return board


def test_the_name_of_a_worker_that_failed_stays_on_one_line(show: Callable[..., Show]) -> None:
    board = board_of("east", "north")
    failed = {"worker": "east", "round": 3, "reason": "no such file: " + "/a-long-path" * 20}
    board.add(1001.0, from_fields("failure", failed))
    page = show(390)(board)
    name = page.locator("#answers li", has_text="east").locator("b")
    assert name.evaluate("node => node.offsetHeight") < 30


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_every_figure_of_a_worker_is_on_the_screen(
    show: Callable[..., Show], width: int
) -> None:
    page = show(width)(board_of("east", "a-name-of-a-hospital-that-is-long" * 2))
    cells = page.locator("#workers th, #workers td")
    right = cells.evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
    assert max(right) <= width
    assert page.locator("#workers").evaluate("body => body.closest('.scroll').scrollWidth") < width


@pytest.mark.parametrize("took_s", [0.9, 80.0, 900.0, 7000.0, 90_000.0])
def test_no_label_of_an_axis_is_cut(show: Callable[..., Show], took_s: float) -> None:
    large = {"perplexity": 654321.0, "share": 3e-5, "negative": -54321.0}
    page = show()(board_of("east", took_s=took_s, **large))
    labels = page.locator("#chart .tick.end, #time .tick.end")
    cut = "all => all.filter(one => one.getBBox().x < 0).map(one => one.textContent)"
    assert labels.count() > 10
    assert labels.evaluate_all(cut) == []


@pytest.mark.parametrize("value", [-1e17, -1.7e308, 1.7e308])
def test_a_chart_of_huge_values_is_drawn(show: Callable[..., Show], value: float) -> None:
    board = board_of("east", score=value)
    near = value + 32  # at -1e17, adding 1 to the number of a tick changes nothing
    board.add(9.0, from_fields("evaluated", {"round": 1, "loss": 0.5, "metrics": {"score": near}}))
    drawing = show()(board).locator("#chart svg")
    drawing.locator('.curve[data-metric="score"]').wait_for(state="attached")
    assert "NaN" not in drawing.inner_html()


def test_a_curve_whose_first_rounds_are_forgotten_has_the_width(show: Callable[..., Show]) -> None:
    board = board_of("east", rounds=20)
    for number in range(1, 19):
        del board.view.rounds[number]
    page = show()(board)
    share = "one => one.getBBox().width / one.ownerSVGElement.clientWidth"
    assert page.locator("#chart .curve").first.evaluate(share) > 0.5
    labels = page.locator("#chart .tick.middle").all_text_contents()
    assert 19 <= int(labels[0]) <= int(labels[-1])


def test_an_event_of_another_day_has_its_date(show: Callable[..., Show]) -> None:
    shown, board = show(timezone_id="Europe/Berlin"), board_of("east")
    times = shown(board, now=2000.0).locator("#journal time")
    assert times.first.inner_text() == "01:46:40"
    shown(board, now=2000.0 + 2 * 86400)
    assert times.first.inner_text() == "Jan 1, 01:46:40"


def test_a_hidden_tab_is_drawn_once_somebody_looks(show: Callable[..., Show]) -> None:
    shown = show()
    page = shown(board_of("east"))
    rows = page.locator("#history tr")
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    shown(board_of("east", rounds=3))
    assert "round 4 is open" in page.title()
    assert rows.count() == 2
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    assert rows.count() == 3


def test_a_panel_that_fails_leaves_the_others(show: Callable[..., Show]) -> None:
    shown = show()
    page = shown(board_of("east"))
    faults: list[str] = []
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.evaluate("document.getElementById('answers').remove()")
    shown(board_of("east", rounds=3))
    assert page.locator("#history tr").count() == 3
    assert len(faults) == 1


def test_workers_that_are_not_listed_are_counted(show: Callable[..., Show]) -> None:
    board = Board("letters")
    for number in range(2100):
        board.add(1.0, from_fields("joined", {"worker": f"w{number}", "num_examples": 5}))
    page = show()(board)
    assert page.locator("#workers-count").inner_text() == "2,100 connected, 2,000 of 2,100 listed"
    assert "2,100" in page.locator("#tiles").inner_text()


def test_a_long_name_of_a_metric_ends_inside_the_chart(show: Callable[..., Show]) -> None:
    page = show(390)(board_of("east", **{"validation_" * 5: 1.0}))
    right = "one => [one.getBBox().x + one.getBBox().width, one.ownerSVGElement.clientWidth]"
    end, width = page.locator("#chart .title", has_text="validation").evaluate(right)
    assert end <= width


def test_the_values_of_a_round_stay_while_rounds_arrive_and_the_keyboard_reaches_them(
    show: Callable[..., Show],
) -> None:
    shown = show()
    page = shown(board_of("east", accuracy=0.5))
    page.locator("#chart").hover(position={"x": 80, "y": 50})
    shown(board_of("east", rounds=3, accuracy=0.75))
    assert page.locator("#chart .tip").inner_text().splitlines()[0] == "round 1"
    page.mouse.move(1, 1)
    assert not page.locator("#chart .tip").is_visible()
    page.locator("#chart").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#chart .tip").inner_text().splitlines()[0] == "round 3"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#chart .tip").inner_text().splitlines() == [
        "round 2",
        "accuracy 75.0 %",
        "loss 0.500",
    ]


def test_a_screen_reader_is_told_the_end_and_not_every_update(show: Callable[..., Show]) -> None:
    shown = show()
    board = board_of("east")
    page = shown(board)
    assert page.locator("#phase").get_attribute("aria-live") == "off"
    board.add(1002.0, from_fields("finished", {"reason": "2 rounds are done"}))
    shown(board)
    assert page.locator("#phase").get_attribute("aria-live") == "polite"
    page.evaluate("stream.onerror()")
    assert page.locator("[role=status]", has_text="connection lost").count() == 0  # it has ended


def test_a_chart_says_its_figures_in_words(show: Callable[..., Show]) -> None:
    page = show()(board_of("east", "north"))
    labels = page.locator("main svg").evaluate_all("all => all.map(one => one.ariaLabel)")
    assert "Who was counted in which round: east 2 of 2, north 2 of 2" in labels
    [time] = [label for label in labels if label.startswith("Seconds of each phase")]
    assert "training 15 min" in time


def test_why_a_worker_is_away_is_there_without_a_mouse(show: Callable[..., Show]) -> None:
    board = board_of("east", "north")
    board.add(5000.0, from_fields("left", {"worker": "east", "reason": "the disk is full"}))
    page = show(390)(board)
    assert "the disk is full" in page.locator("#workers tr", has_text="east").inner_text()


def test_colours_with_a_meaning_stay_under_high_contrast(show: Callable[..., Show]) -> None:
    board = board_of("east", "north")
    counted = {"worker": "east", "round": 3, "num_examples": 5, "updates": 1, "needed": 2}
    board.add(1004.0, from_fields("counted", counted))
    page = show(forced_colors="active")(board)
    for nodes in ("#slots i", "#time-legend i"):
        colour = "all => all.map(one => getComputedStyle(one).backgroundColor)"
        assert len(set(page.locator(nodes).evaluate_all(colour))) > 1, nodes


def test_without_scripts_no_panel_claims_to_be_empty(browser: Browser) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.set_content(
        f"<style>{(STATIC / 'page.css').read_text()}</style>{(STATIC / 'page.html').read_text()}"
    )
    words = page.locator("body").inner_text()
    page.close()
    assert "needs JavaScript" in words
    assert "connecting" not in words
    assert "yet" not in words


def test_paper_has_all_rows_and_columns(show: Callable[..., Show]) -> None:
    page = show(718)(board_of("a-name-of-a-hospital-that-is-long" * 2, rounds=30))
    page.emulate_media(media="print")
    cut = page.locator(".scroll").evaluate_all(
        "all => all.filter(one => one.scrollWidth > one.clientWidth"
        " || one.scrollHeight > one.clientHeight).map(one => one.id || one.innerText)"
    )
    assert cut == []


def test_a_chart_is_drawn_once_for_each_change(show: Callable[..., Show]) -> None:
    shown = show()
    page = shown(Board("letters"))
    page.evaluate("""() => {
      window.drawn = 0;
      new MutationObserver(() => { window.drawn += 1; }).observe(
        document.getElementById("time"), {childList: true});
    }""")
    shown(board_of("east"))
    page.locator("#time svg").wait_for()
    frames = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    page.evaluate(frames)
    assert page.evaluate("drawn") == 1
    page.set_viewport_size({"width": 900, "height": 800})
    page.wait_for_function("drawn === 2")


def test_many_workers_are_found_whatever_the_case_and_all_are_printed(
    show: Callable[..., Show],
) -> None:
    page = show()(board_of(*(f"North-{n:02d}" for n in range(40)), rounds=1))
    rows, name = page.locator("#workers tr"), page.locator("#workers-name")
    assert rows.count() == 25
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert rows.count() == 40
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    name.fill("north-3")
    assert rows.count() == 10
    name.fill("south")
    assert page.locator("#workers-empty").inner_text() == "No name matches."


@pytest.mark.parametrize(("planned", "quarter"), [(6, True), (100, False), (20_000, False)])
def test_a_long_plan_leaves_the_curve_room(
    show: Callable[..., Show], planned: int, quarter: bool
) -> None:
    board = board_of("east", rounds=8 if planned > 8 else 2)
    board.add(9000.0, from_fields("resumed", {"run": "a", "rounds": planned, "round": 8}))
    page = show()(board)
    share = "one => one.getBBox().width / one.ownerSVGElement.clientWidth"
    assert page.locator("#chart .curve").first.evaluate(share) > (0.15 if quarter else 0.25)


def test_a_run_without_accuracy_has_no_column_for_it(show: Callable[..., Show]) -> None:
    shown = show()
    page = shown(board_of("east"))
    assert "accuracy" not in page.locator("#history").evaluate(
        "one => one.closest('table').innerText"
    )
    shown(board_of("east", accuracy=0.5))
    assert page.locator("#history tr").first.inner_text().split()[:2] == ["2", "50.0"]
