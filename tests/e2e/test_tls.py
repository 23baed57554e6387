"""TLS to the broker: trust, refusals and error messages."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fluffle_common.errors import BrokerError, LinkLost, UsageError
from fluffle_common.transport.rabbitmq.management import Management
from fluffle_common.transport.rabbitmq.transport import AmqpTransport

pytestmark = pytest.mark.rabbit
PATIENCE_S = 60.0
# OpenSSL 3.4 and newer refuse a negative number of days, and older ones know no dates.
_HELP = subprocess.run(["openssl", "x509", "-help"], capture_output=True, text=True, check=False)
_EXPIRED = (
    ("-not_before", "20200101000000Z", "-not_after", "20200102000000Z")
    if "-not_after" in _HELP.stdout + _HELP.stderr
    else ("-days", "-1")
)


class Certificates:
    """A CA made with openssl, and the certificates that it signs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Python 3.13 and newer refuse a CA without a key usage.
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        about = ("-days", "2", "-subj", "/CN=test CA", *usage)
        self._openssl("req", "-x509", *self._new("ca"), *about)
        self.ca = folder / "ca.pem"

    def signed(self, name: str, alternative: str, *validity: str) -> tuple[Path, Path]:
        """Create a certificate and return it with its key."""
        request = self._folder / f"{name}.csr"
        subject = ("-subj", f"/CN={name}", "-addext", f"subjectAltName={alternative}")
        self._openssl("req", *self._new(name, request), *subject)
        made = self._folder / f"{name}.pem"
        signer = ("-CA", self.ca, "-CAkey", self._folder / "ca.key", "-CAcreateserial")
        self._openssl("x509", "-req", "-in", request, *signer, "-copy_extensions", "copy",
                      "-out", made, *(validity or ("-days", "2")))  # fmt: skip
        return made, self._folder / f"{name}.key"

    def _new(self, name: str, out: Path | None = None) -> list[object]:
        key = self._folder / f"{name}.key"
        return ["-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out",
                out or self._folder / f"{name}.pem"]  # fmt: skip

    def _openssl(self, *words: object) -> None:
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@contextlib.contextmanager
def tls_before(
    port: int, certificate: tuple[Path, Path], *, asks_for: Path | None = None
) -> Iterator[int]:
    """Yield a port that accepts TLS and forwards plain bytes to another port.

    In threads, over plain sockets: an event loop's server does not tell a client why it refuses it.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    if asks_for is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(asks_for)
    listening = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def begin(work: Callable[..., None], *arguments: socket.socket) -> None:
        threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        threads[-1].start()

    def accept() -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                begin(serve, listening.accept()[0])

    def serve(plain: socket.socket) -> None:
        plain.settimeout(PATIENCE_S)
        with (
            plain,
            contextlib.suppress(OSError),
            context.wrap_socket(plain, server_side=True) as secure,
            socket.create_connection(("127.0.0.1", port), PATIENCE_S) as back,
        ):
            pass_on(secure, back)

    begin(accept)
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for thread in threads:
            thread.join(PATIENCE_S)


def pass_on(secure: ssl.SSLSocket, back: socket.socket) -> None:
    """Forward bytes between two sockets until one of them closes."""
    while True:
        ready = [secure] if secure.pending() else select.select([secure, back], [], [])[0]
        for source, sink in ((secure, back), (back, secure)):
            if source in ready:
                data = source.recv(2**16)
                if not data:
                    return
                sink.sendall(data)


async def opened(url: str) -> None:
    transport = AmqpTransport(url, "test")
    link = await asyncio.wait_for(transport.open(), PATIENCE_S)
    await link.close()


async def refused(url: str) -> str:
    with pytest.raises(BrokerError) as error:
        await opened(url)
    assert "open-sesame" not in str(error.value)
    return str(error.value)


async def test_a_ca_in_the_url_is_trusted(broker_node, certificates):
    good = certificates.signed("good", "IP:127.0.0.1")
    with tls_before(broker_node.ports.amqp, good) as port:
        url = f"amqps://guest:guest@127.0.0.1:{port}/"
        await opened(f"{url}?cafile={certificates.ca}")
        await opened(f"{url}?no_verify_ssl=1")
        said = await refused(f"amqps://w:open-sesame@127.0.0.1:{port}/")
    assert "issuer certificate" in said
    assert "?cafile=" in said


async def test_the_management_api_uses_the_same_tls_options(broker_node, certificates):
    good = certificates.signed("management", "IP:127.0.0.1")
    with tls_before(broker_node.ports.management, good) as port:
        base, url = f"https://127.0.0.1:{port}", "amqps://guest:guest@127.0.0.1/"
        trusting = Management(f"{url}?cafile={certificates.ca}", base)
        found = await asyncio.to_thread(trusting.ask, "/api/overview")
        assert found["rabbitmq_version"] == broker_node.version
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await asyncio.to_thread(Management(url, base).ask, "/api/overview")


async def test_a_certificate_for_another_host_is_refused(broker_node, certificates):
    other = certificates.signed("other", "DNS:other.example")
    with tls_before(broker_node.ports.amqp, other) as port:
        url = f"amqps://w:open-sesame@127.0.0.1:{port}/?cafile={certificates.ca}"
        assert "is not valid for '127.0.0.1'" in await refused(url)


async def test_an_expired_certificate_is_refused(broker_node, certificates):
    old = certificates.signed("old", "IP:127.0.0.1", *_EXPIRED)
    with tls_before(broker_node.ports.amqp, old) as port:
        url = f"amqps://w:open-sesame@127.0.0.1:{port}/?cafile={certificates.ca}"
        said = await refused(url)
    assert "has expired" in said
    assert "renew" in said


async def test_a_client_certificate_is_sent_on_request(broker_node, certificates):
    good, ours = (certificates.signed(name, "IP:127.0.0.1") for name in ("asks", "ours"))
    with tls_before(broker_node.ports.amqp, good, asks_for=certificates.ca) as port:
        url = f"amqps://guest:guest@127.0.0.1:{port}/?cafile={certificates.ca}"
        await opened(f"{url}&certfile={ours[0]}&keyfile={ours[1]}")
        url = f"amqps://w:open-sesame@127.0.0.1:{port}/?cafile={certificates.ca}"
        assert "?certfile=" in await refused(url)


async def test_tls_to_a_plain_port_is_refused(broker_node):
    said = await refused(f"amqps://w:open-sesame@127.0.0.1:{broker_node.ports.amqp}/")
    assert "does not use TLS" in said
    assert "amqp://" in said


async def test_plain_amqp_to_a_tls_port_is_refused(broker_node, certificates):
    good = certificates.signed("must", "IP:127.0.0.1")
    with tls_before(broker_node.ports.amqp, good) as port:
        said = await refused(f"amqp://w:open-sesame@127.0.0.1:{port}/")
    assert "accepts only TLS connections" in said
    assert "amqps://" in said


async def test_a_bad_certificate_of_one_node_does_not_exclude_the_others(
    broker_node, certificates, unused_tcp_port
):
    old = certificates.signed("old-node", "IP:127.0.0.1", *_EXPIRED)
    with tls_before(broker_node.ports.amqp, old) as port:
        bad = f"amqps://guest:guest@127.0.0.1:{port}/?cafile={certificates.ca}"
        await opened(f"{bad},{broker_node.url}")
        with pytest.raises(LinkLost, match="has expired"):  # the other node may come back
            await opened(f"{bad},amqp://127.0.0.1:{unused_tcp_port}/")


async def test_an_unreadable_certificate_file_is_named():
    with pytest.raises(UsageError, match="'/nowhere/ca.pem'.*No such file"):
        await opened("amqps://w:open-sesame@127.0.0.1:1/?cafile=/nowhere/ca.pem")


async def test_a_login_mechanism_that_the_broker_does_not_offer_is_refused(broker_node):
    said = await refused(f"amqp://w:open-sesame@127.0.0.1:{broker_node.ports.amqp}/?auth=external")
    assert "does not offer the login mechanism EXTERNAL (it offers " in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("no_verify_ssl=false", "needs 0 or 1"),  # would otherwise accept any certificate
        ("auth=token", "needs external or plain"),
        ("cafile=", "?cafile= needs a value"),
        ("keyfile=/k.pem", "?keyfile= needs ?certfile="),
        ("capath=/nowhere", "'/nowhere'.*Not a directory"),
        ("cadata=%25%25", "?cadata="),
    ],
)
async def test_options_that_would_have_no_effect_are_refused(options, expected):
    with pytest.raises(UsageError, match=expected.replace("?c", "[?]c").replace("?k", "[?]k")):
        await opened(f"amqps://w:open-sesame@127.0.0.1:1/?{options}")


async def test_a_server_that_closes_silently_is_retried():
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(LinkLost):
        await opened(f"amqp://127.0.0.1:{port}/")
    server.close()


async def test_a_broker_that_falls_silent_over_tls_does_not_delay_a_cancellation(certificates):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.signed("silent", "IP:127.0.0.1"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"amqps://127.0.0.1:{listening.getsockname()[1]}/?cafile={certificates.ca}"
        opening = asyncio.ensure_future(AmqpTransport(url, "test").open())
        accepting = asyncio.to_thread(lambda: context.wrap_socket(listening.accept()[0], True))
        with await asyncio.wait_for(accepting, PATIENCE_S) as secure:
            await asyncio.to_thread(secure.recv, 1)  # it has sent its AMQP header
            opening.cancel()
            _, late = await asyncio.wait([opening], timeout=PATIENCE_S / 3)  # asyncio waits 30 s
            assert not late
            assert opening.cancelled()
