"""The page over HTTP: what it answers, to whom, and that it cannot hurt what it watches."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from fluffle_common.cli.settings import DEFAULT_URL, broker_url_finder
from fluffle_common.errors import UsageError
from fluffle_common.protocol.events import from_fields
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.rabbitmq.management import Management
from fluffle_coordinator.dashboard import feed, server
from fluffle_coordinator.dashboard.board import Board
from fluffle_coordinator.dashboard.coordinator_source import CoordinatorSource
from fluffle_coordinator.dashboard.feed import Feed, Figures
from fluffle_coordinator.dashboard.server import _events, listen, served, url_of

PATIENCE_S = 60.0


class Site:
    """A page that is being served, and one way to ask it."""

    def __init__(self, live: CoordinatorSource | None, port: int) -> None:
        self.live, self.port = live, port

    async def ask(
        self, path: str, *, method: str = "GET", host: str | None = None
    ) -> tuple[int, dict[str, str], str]:
        """Return the status, the headers and the body of one answer."""
        host = host or f"127.0.0.1:{self.port}"
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            lines = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            writer.write(lines.encode())
            answer = (await reader.read()).decode()
            writer.close()
            await writer.wait_closed()
        head, _, body = answer.partition("\r\n\r\n")
        status, *headers = head.split("\r\n")
        pairs = (line.partition(": ") for line in headers)
        return int(status.split()[1]), {name.lower(): value for name, _, value in pairs}, body

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Callable[[], object]]:
        """Open ``/events``; yields what awaits the next event, None at the end of the stream."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET /events HTTP/1.1\r\nHost: localhost:{self.port}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")

        async def following() -> dict[str, object] | None:
            async with asyncio.timeout(PATIENCE_S):
                while line := await reader.readline():
                    if line.startswith(b"data: {"):
                        sections: dict[str, object] = json.loads(line.removeprefix(b"data: "))
                        return sections
            return None

        try:
            yield following
        finally:
            writer.close()
            await writer.wait_closed()


def source(ask: Callable[[], Figures] | None = None) -> CoordinatorSource:
    return CoordinatorSource("letters", listen("127.0.0.1:0", "--dashboard"), ask)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    live = source()
    async with served(live.feed, live.listening):
        yield Site(live, live.listening.getsockname()[1])


@pytest.fixture
def occupied() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield f"127.0.0.1:{taken.getsockname()[1]}"


async def test_the_page_and_its_parts(site: Site) -> None:
    status, headers, body = await site.ask("/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert (headers["referrer-policy"], headers["x-content-type-options"]) == (
        "no-referrer",
        "nosniff",
    )
    assert "http://" not in body.replace("http://www.w3.org", "")
    for name in ("page.css", "page.js", "panels.js", "workers.js", "theme.js", "icon.svg"):
        status, _, body = await site.ask(f"/{name}")
        assert status == 200, name
        assert "innerHTML" not in body, name
        assert "https://" not in body, name


async def test_it_can_only_be_read(site: Site) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        status, headers, _ = await site.ask("/api/board", method=method)
        assert (status, set(headers["allow"].split(", "))) == (405, {"GET", "HEAD"}), method
    status, _, body = await site.ask("/events", method="HEAD")
    assert (status, body) == (200, "")
    assert (await site.ask("/../../etc/passwd"))[0] == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:99", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("rebound.example", 403),
        ("rebound.example:80", 403),
        ("127.0.0.1.rebound.example", 403),
        ("[::2]", 403),
    ],
)
async def test_it_answers_to_names_of_this_machine_only(site: Site, host: str, status: int) -> None:
    assert (await site.ask("/api/board", host=host))[0] == status


async def test_health_and_readiness(site: Site) -> None:
    assert (await site.ask("/healthz"))[0] == 200
    status, _, body = await site.ask("/readyz")
    assert (status, "not connected" in body) == (503, True)
    site.live.record(from_fields("connected", {"address": "amqp://host"}))
    assert (await site.ask("/readyz"))[0] == 200
    site.live.record(from_fields("disconnected", {"reason": "cable"}))
    status, _, body = await site.ask("/readyz")
    assert (status, "cable" in body) == (503, True)
    site.live.record(from_fields("reconnected", {}))
    site.live.record(from_fields("finished", {"reason": "6 rounds are done"}))
    status, _, body = await site.ask("/readyz")
    assert (status, "6 rounds" in body) == (503, True)
    assert (await site.ask("/healthz"))[0] == 200


async def test_a_coordinator_is_ready_without_asking_the_management_api() -> None:
    def ask() -> Figures:
        raise AssertionError("the management API may be slow")

    live = source(ask)
    async with served(live.feed, live.listening):
        live.record(from_fields("connected", {"address": "amqp://host"}))
        site = Site(live, live.listening.getsockname()[1])
        assert (await site.ask("/readyz"))[0] == 200


@pytest.mark.parametrize(("consumers", "status"), [(0, 503), (1, 200)])
async def test_a_page_beside_the_run_is_ready_while_there_is_a_coordinator(
    consumers: int, status: int
) -> None:
    board = Board("letters", source="journal")
    page = Feed(board, ask_queues=lambda: [{"name": "letters.presence", "consumers": consumers}])
    listening = listen("127.0.0.1:0", "--listen")
    async with served(page, listening):
        site = Site(None, listening.getsockname()[1])
        board.link(True, "no coordinator has created federation letters")
        assert (await site.ask("/readyz"))[0] == 503
        page.add(1.0, from_fields("opened", {"round": 1, "asked": ["a"], "needed": 1}), "r1")
        answered, _, body = await site.ask("/readyz")
        assert (answered, "no coordinator is connected" in body) == (status, not consumers)
        page.add(2.0, from_fields("finished", {"reason": "6 rounds are done"}), "r1")
        assert (await site.ask("/readyz"))[0] == 200


async def test_the_board_and_the_metrics(site: Site) -> None:
    site.live.record(
        from_fields("rejected", {"reason": "<script>alert(1)</script>", "cause": "tensors"})
    )
    _, headers, body = await site.ask("/api/board")
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["rejected"]["latest"][0]["reason"] == "<script>alert(1)</script>"
    _, headers, body = await site.ask("/metrics")
    assert headers["content-type"].startswith("text/plain; version=")
    assert 'fluffle_rejected_messages_total{cause="tensors"} 1.0' in body


async def test_the_board_has_the_current_time(site: Site) -> None:
    first, second = [json.loads((await site.ask("/api/board"))[2])["now"] for _ in range(2)]
    assert first < second


async def test_events_are_the_board_at_once_and_then_what_changes(site: Site) -> None:
    async with site.listening() as following:
        first = await following()
        assert {"run", "workers", "journal", "queues", "curves"} <= first.keys()
        site.live.record(from_fields("joined", {"worker": "north", "num_examples": 7}))
        second = await following()
        assert second.keys() == {"now", "workers", "people", "journal"}
        assert second["workers"][0]["name"] == "north"


async def test_a_viewer_that_leaves_at_once_leaves_nothing_behind() -> None:
    before = asyncio.all_tasks()
    events = _events(Feed(Board("letters"), ask_queues=list))
    await anext(events)
    await events.aclose()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_connections_do_not_use_up_the_files_of_the_process(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_MAX_CONNECTIONS", 3)
    async with asyncio.timeout(PATIENCE_S):
        links = [await asyncio.open_connection("127.0.0.1", site.port) for _ in range(4)]
        with contextlib.suppress(ConnectionResetError):
            assert await links[3][0].read() == b""
        for _, writer in links:
            writer.close()
            with contextlib.suppress(ConnectionResetError):
                await writer.wait_closed()
        status = 0
        while status != 200:  # the page has yet to notice that the others are gone
            with contextlib.suppress(ConnectionResetError, IndexError):
                status, _, _ = await site.ask("/healthz")


async def test_a_stream_ends_with_the_last_news_when_the_page_does() -> None:
    live = source()
    site = Site(live, live.listening.getsockname()[1])
    async with contextlib.AsyncExitStack() as stack:
        async with served(live.feed, live.listening):
            following = await stack.enter_async_context(site.listening())
            await following()
            live.record(from_fields("finished", {"reason": "done"}))
        last = await following()
        assert last["run"]["phase"] == "ended"
        assert await following() is None


async def test_it_looks_at_the_queues_only_when_somebody_looks(site: Site) -> None:
    asked: list[int] = []

    def ask() -> list[dict[str, object]]:
        asked.append(1)
        return [{"name": "letters.updates", "ready": 3}]

    feed = Feed(site.live.feed.board, ask_queues=ask)
    listening = listen("127.0.0.1:0", "--dashboard")
    async with served(feed, listening):
        other = Site(site.live, listening.getsockname()[1])
        await other.ask("/healthz")
        assert not asked
        _, _, body = await other.ask("/api/board")
        assert json.loads(body)["queues"]["figures"][0]["ready"] == 3
        await other.ask("/metrics")
        assert len(asked) == 1  # they are young enough


async def test_viewers_share_what_is_rendered_and_none_misses_the_end(monkeypatch) -> None:
    board, rendered = Board("letters"), 0
    monkeypatch.setattr(feed, "monotonic", lambda: float(rendered))  # a rendering takes 1 s
    shared = Feed(board)

    def snapshot() -> dict[str, object]:
        nonlocal rendered
        rendered += 1
        return {"rendered": rendered}

    monkeypatch.setattr(board, "snapshot", snapshot)
    first, _ = await shared.news(-1)
    shared.touch()
    assert (await shared.news(-1))[0] == first  # a new viewer gets what the first one has
    waiting = [asyncio.ensure_future(shared.news(first)) for _ in range(50)]
    await asyncio.sleep(0)
    assert rendered == 1  # all wait, for 20 s
    shared.close()
    ends = await asyncio.gather(*waiting)
    assert {sections["rendered"] for _, sections in ends} == {"2"}


async def test_a_slow_management_api_is_asked_less_often(monkeypatch) -> None:
    now, asked = 0.0, 0

    def ask() -> list[dict[str, object]]:
        nonlocal now, asked
        now, asked = now + 3.0, asked + 1  # as for 3,000 queues
        return []

    monkeypatch.setattr(feed, "monotonic", lambda: now)
    shared = Feed(Board("letters"), ask_queues=ask)
    for now, times in ((0.0, 1), (32.0, 1), (33.0, 2)):  # noqa: B007 - the clock
        await shared.ask_queues(3.0)
        assert asked == times


def unreachable() -> list[dict[str, object]]:
    raise ConnectionRefusedError("nobody there")


NO_CA = "amqps://guest:guest@localhost/?cafile=/no/ca.pem"  # as while a certificate is renewed


@pytest.mark.parametrize(
    ("ask", "note"),
    [
        (unreachable, "does not answer (nobody there)"),
        (feed.queue_asker(Topology("f"), lambda: NO_CA, "https://localhost"), "'/no/ca.pem' of"),
    ],
    ids=["unreachable", "no CA file"],
)
async def test_queues_that_cannot_be_asked_are_a_note(ask, note) -> None:
    live = source(ask)
    live.listening.close()
    await live.feed.ask_queues(0.0)
    assert note in live.feed.board.snapshot()["queues"]["note"]


def test_the_queues_of_a_private_broker_that_starts_late_are_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FLUFFLE_STATE", str(tmp_path))
    monkeypatch.setattr(
        Management, "queues", lambda api, *_: asked.append((api.url, api.base)) or []
    )
    asked: list[tuple[str, str]] = []
    ask = feed.queue_asker(Topology("f"), broker_url_finder(None), None)
    ask()
    urls = {"url": "amqp://127.0.0.1:5999/", "management_url": "http://127.0.0.1:15999/"}
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "node.json").write_text(json.dumps(urls))
    ask()
    assert asked == [
        (DEFAULT_URL, "http://127.0.0.1:15672"),
        ("amqp://127.0.0.1:5999/", "http://127.0.0.1:15999"),
    ]


def test_a_snapshot_that_fails_is_not_taken_for_an_empty_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    feed = Feed(Board("letters"))
    with monkeypatch.context() as patch:
        patch.setattr(feed.board, "snapshot", lambda: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                feed.sections()
    assert "run" in feed.sections()


async def test_a_page_that_fails_does_not_end_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no page today")

    monkeypatch.setattr("fluffle_coordinator.dashboard.server._Server.serve", fail)
    live = source()
    async with served(live.feed, live.listening):
        await asyncio.sleep(0)
    assert "no page today" in capsys.readouterr().err


def test_a_port_in_use_is_said_in_one_line(occupied: str) -> None:
    with pytest.raises(
        UsageError, match=r"\(Address already in use\);.*--dashboard HOST:PORT"
    ) as raised:
        listen(occupied, "--dashboard")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    ["8o8o", "127.0.0.1", "127.0.0.1:", "127.0.0.1:70000", "", "a\udcff:0", "a..b:0"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        listen(address, "--dashboard")


@pytest.mark.parametrize(("address", "host"), [("0", "127.0.0.1"), ("0.0.0.0:0", "0.0.0.0")])
def test_it_is_for_this_machine_alone_unless_told_otherwise(address: str, host: str) -> None:
    with listen(address, "--dashboard") as listening:
        assert url_of(listening).startswith(f"http://{host}:")


@pytest.mark.parametrize(("address", "warnings"), [("127.0.0.1:0", 0), ("0.0.0.0:0", 1)])
async def test_a_page_that_others_can_reach_is_warned_of(
    address: str, warnings: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async with served(Feed(Board("letters")), listen(address, "--dashboard")):
        pass
    assert capsys.readouterr().err.count("anyone who can reach this machine") == warnings
