"""The page over HTTP: read-only, and on the loopback interface unless told otherwise.

======================  ===========================================================================
``/``                   the page; its parts are ``page.css``, ``page.js``, …
``/events``             server-sent events: the whole board first, then the sections that change
``/api/board``          the board as one JSON object
``/healthz``            200 while the process answers
``/readyz``             200 while the broker and a coordinator are connected, else 503, with reason;
                        'fluffle dashboard' also answers 200 once the run has ended
``/metrics``            for Prometheus
======================  ===========================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fluffle_common.cli.console import warn
from fluffle_common.clock import wall_time
from fluffle_common.errors import UsageError
from fluffle_coordinator.dashboard.feed import Feed
from fluffle_coordinator.dashboard.metrics import registry

_MAX_VIEWERS = 50
# Each connection takes one of the process's open files, of which a coordinator needs some itself.
_MAX_CONNECTIONS = 100
_MIN_PAUSE_S = 0.2
_ALIVE_EVERY_S = 10.0
_QUEUES_EVERY_S = 3.0
_QUEUES_FOR_METRICS_S = 5.0
_SHUTDOWN_S = 2.0

_STATIC = Path(__file__).with_name("static")
_HEADERS = [
    (
        "content-security-policy",
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'",
    ),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cache-control", "no-store"),
]


# --- the socket --------------------------------------------------------------------------------


def listen(address: str, flag: str) -> socket.socket:
    """Bind the page's address: ``HOST:PORT``, or a port of 127.0.0.1; port 0 means any free one.

    Raises:
        UsageError: if ``address`` is malformed or cannot be bound.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    try:
        host.encode("idna")  # as the socket does, which would not be closed after the error
        valid = port.isdecimal() and int(port) <= 65535
    except UnicodeError:
        valid = False
    if not valid:
        raise UsageError(f"{flag} expects HOST:PORT such as 127.0.0.1:8080, not '{address}'")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family)
    except OSError as why:
        reason = (why.strerror or str(why)).partition(" (while")[0]  # Python adds the address
        raise UsageError(
            f"cannot listen on {host}:{port} ({reason}); choose another address "
            f"with {flag} HOST:PORT, or port 0 for any free port"
        ) from None


def url_of(listening: socket.socket) -> str:
    """Return the URL of the page."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


# --- the server --------------------------------------------------------------------------------


class _Connection(H11Protocol):
    """An HTTP connection, which is closed at once if there are too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take in a new connection."""
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.abort()


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers: signals belong to the command."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield


@contextlib.asynccontextmanager
async def served(feed: Feed, listening: socket.socket) -> AsyncIterator[None]:
    """Serve the page while the body runs; a failure of the server is only a warning."""
    address = listening.getsockname()[0]
    hosts: set[str] | None = {"localhost", "127.0.0.1", "::1", address}
    if not ipaddress.ip_address(address).is_loopback:
        hosts = None
        warn(f"anyone who can reach this machine can read the page at {url_of(listening)}")
    config = uvicorn.Config(
        application(feed, hosts),
        loop="none",
        http=_Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=_HEADERS,
        timeout_graceful_shutdown=int(_SHUTDOWN_S),
    )
    server = _Server(config)
    task = asyncio.create_task(_guarded(server, listening), name="page")
    try:
        yield
    finally:
        feed.close()
        server.should_exit = True
        await asyncio.wait({task}, timeout=2 * _SHUTDOWN_S)
        task.cancel()
        listening.close()


async def _guarded(server: _Server, listening: socket.socket) -> None:
    try:
        await server.serve(sockets=[listening])
    except Exception as why:  # a fault of the page must not stop the run
        warn(f"the page failed ({why!r}); the run continues without the page")


# --- the responses -----------------------------------------------------------------------------


def application(feed: Feed, hosts: set[str] | None) -> ASGIApp:
    """Return the ASGI application that serves a feed to requests with these host names, or any."""
    metrics = registry(feed)
    viewers = 0

    async def board(_: Request) -> Response:
        await feed.ask_queues(_QUEUES_EVERY_S)
        return Response(_joined(feed.sections()), media_type="application/json")

    async def events(request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if viewers >= _MAX_VIEWERS:
            reason = f"this page already has {_MAX_VIEWERS} viewers, which is the maximum\n"
            return PlainTextResponse(reason, 503)

        async def stream() -> AsyncIterator[str]:
            nonlocal viewers
            viewers += 1
            try:
                async with contextlib.aclosing(_events(feed)) as messages:
                    async for message in messages:
                        yield message
            finally:
                viewers -= 1

        return StreamingResponse(stream(), media_type="text/event-stream")

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def readyz(_: Request) -> Response:
        beside = feed.board.source != "coordinator"
        if beside:
            await feed.ask_queues(_QUEUES_FOR_METRICS_S)  # which tell if there is a coordinator
        run = feed.board.run()
        if not run["linked"]:
            return PlainTextResponse(f"not ready: {run['link']}\n", 503)
        alone = run["abandoned"] or run["run"] is None
        if alone if beside else run["phase"] == "ended":
            return PlainTextResponse(f"not ready: {run['words']}\n", 503)
        return PlainTextResponse(f"ready: {run['words']}\n")

    async def prometheus(request: Request) -> Response:
        await feed.ask_queues(_QUEUES_FOR_METRICS_S)
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics), headers={"content-type": media_type})

    routes = [
        Route("/events", events),
        Route("/api/board", board),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", prometheus),
        Route("/", _page),
        Mount("/", StaticFiles(directory=_STATIC)),
    ]
    app = Starlette(routes=routes)
    return app if hosts is None else _only_for(hosts, app)


async def _page(_: Request) -> Response:
    return FileResponse(_STATIC / "page.html")


async def _events(feed: Feed) -> AsyncGenerator[str, None]:
    """Yield the whole board, then the sections that change, until the feed is closed."""
    known: dict[str, str] = {}
    version = -1
    polling = asyncio.create_task(_poll_queues(feed), name="queues of the page")
    try:
        yield "retry: 1000\n\n"
        while True:
            try:
                async with asyncio.timeout(_ALIVE_EVERY_S):
                    version, sections = await feed.news(version)
            except TimeoutError:
                # An event instead of a comment: scripts cannot see comments.
                yield f"event: alive\ndata: {wall_time()}\n\n"
                continue
            is_last = feed.closed
            new = {name: text for name, text in sections.items() if known.get(name) != text}
            known = sections
            if new.keys() - {"now"}:
                yield f"data: {_joined(new)}\n\n"
            if is_last:
                return
            await feed.pause(_MIN_PAUSE_S)
    finally:
        polling.cancel()


async def _poll_queues(feed: Feed) -> None:
    while True:
        await feed.ask_queues(_QUEUES_EVERY_S)
        await asyncio.sleep(_QUEUES_EVERY_S)


def _joined(sections: dict[str, str]) -> str:
    return "{" + ",".join(f'"{name}":{text}' for name, text in sections.items()) + "}"


def _only_for(hosts: set[str], app: ASGIApp) -> ASGIApp:
    """Return middleware that admits only requests to known host names.

    This prevents DNS rebinding: a web page can point its own name at 127.0.0.1 and make a browser
    read this server, but that name is then in the ``Host`` header.
    """
    refusal = PlainTextResponse("this page answers to localhost and 127.0.0.1 only\n", 403)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await (app if _host(scope) in hosts else refusal)(scope, receive, send)

    return answer


def _host(scope: Scope) -> str:
    """Return the name in a request's ``Host`` header, without the port."""
    header = next((value for name, value in scope["headers"] if name == b"host"), b"")
    host = header.decode("latin-1")
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
