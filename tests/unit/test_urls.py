"""Validation of ``--url``, and the choice among several nodes."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.errors import BrokerError, LinkLost, UsageError
from fluffle_common.transport.base import Link
from fluffle_common.transport.memory import MemoryBroker
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from fluffle_common.transport.rabbitmq.urls import parse_urls, split_urls, without_credentials

ONE, TWO, THREE = (f"amqp://me:pa,ss@node-{n}:5672/v" for n in (1, 2, 3))
ALL = ",".join((ONE, TWO, THREE))


@pytest.mark.parametrize("between", [",", ", ", " ,\n  "])
def test_a_comma_separates_only_before_another_url(between):
    assert split_urls(between.join((ONE, TWO)) + "\n") == [ONE, TWO]
    assert [url.password for url in parse_urls(f"{ONE}{between}{TWO}")] == ["pa,ss", "pa,ss"]


def test_one_url_is_one():
    assert split_urls(ONE) == [ONE]
    assert [str(url) for url in parse_urls("amqps://host")] == ["amqps://host"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", "does not begin with amqp://"),
        ("amqp://", "'' is not a host"),
        (f"http://x,{ONE}", "does not begin with amqp://"),
        (f"AMQP://x,{ONE}", "does not begin with amqp://"),
        (f"{ONE},amqp://node:port/v", "is not the URL"),
        ("amqp://node-1,node-2/", "'node-1,node-2' is not a host.* a URL for each"),
        (f"{ONE},amqp://node-2:5672/other", "the same /vhost"),
    ],
)
def test_the_error_of_an_invalid_url_is_named(wrong, message):
    with pytest.raises(UsageError, match=message):
        AmqpTransport(wrong, "test")


# Characters of passwords, including those with a meaning in URLs.
ODD = st.text(
    st.sampled_from("aZ09#/?@:%[]\\\\ +&=,;!\"'\u00e9\u2100\u4e2d"), min_size=0, max_size=12
)
PASSWORDS = ODD.map(lambda odd: f"s3s{odd}ame")


@given(password=PASSWORDS, user=st.sampled_from(["me", "me@home", ""]), port=st.integers(0, 99999))
def test_no_error_contains_a_password(password, user, port):
    given_url = f"amqp://{user}:{password}@host.example:{port}/v"
    for text in (given_url, f"{ONE},{given_url}", given_url.replace("amqp://", "http://")):
        try:
            transport = AmqpTransport(text, "test")
        except UsageError as wrong:
            shown = "".join(traceback.format_exception(wrong))
        else:
            shown = transport.address
        assert password not in shown
        assert "s3s" not in shown
        assert "ame@" not in shown


@given(password=PASSWORDS)
def test_a_quoted_password_is_decoded(password):
    (url,) = parse_urls(f"amqp://me:{quote(password, safe='')}@host/v")
    assert url.password == password


@pytest.mark.parametrize("char", "#/?[")
def test_characters_to_quote_are_named(char):
    with pytest.raises(UsageError, match="percent|write '#' as %23") as wrong:
        parse_urls(f"amqp://me:open{char}sesame@host/v")
    assert "…@host/v" in str(wrong.value)


def test_tls_options_without_tls_are_an_error():
    with pytest.raises(UsageError, match="cafile.*amqps"):
        parse_urls("amqp://me:open-sesame@host/?cafile=/ca.pem")


@pytest.mark.parametrize("query", ["heartbeat=x", "cafil=/ca.pem", "foo=1", "foo"])
def test_an_unknown_option_of_a_url_is_an_error(query):
    with pytest.raises(UsageError, match=rf"unknown option \?{query.partition('=')[0]}="):
        parse_urls(f"amqps://me:open-sesame@host/?{query}")


def test_a_vhost_too_long_for_amqp_is_an_error():
    parse_urls("amqp://host/" + "v" * 127)
    parse_urls("amqp://host/" + "%2F" * 127)
    with pytest.raises(UsageError, match="its vhost has more than 127 bytes"):
        parse_urls("amqp://host/" + "v" * 128)
    with pytest.raises(UsageError, match="its vhost has more than 127 bytes"):
        parse_urls("amqp://host/" + "字" * 43)


def test_credentials_are_removed_from_any_text():
    text = "at amqps://me:op@en@host/v and amqp://a:b@two/ it failed"
    assert without_credentials(text) == "at amqps://host/v and amqp://two/ it failed"


class Cluster:
    """A fake that records which nodes are tried and fails for those that are down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[str] = []
        self.fails: dict[str, Exception] = {}
        self._memory = MemoryBroker()
        monkeypatch.setattr(AmqpTransport, "_open", lambda _, url: self._open(str(url)))
        self.transport = AmqpTransport(ALL, "test")

    def down(self, urls: Iterable[str]) -> None:
        """Make exactly these nodes unreachable."""
        self.fails = {url: LinkLost("it is down") for url in urls}

    def open(self) -> list[str]:
        """Open a link; return the nodes that were tried."""
        self.tried.clear()
        asyncio.run(self.transport.open())
        return self.tried

    async def _open(self, url: str) -> Link:
        self.tried.append(url)
        if url in self.fails:
            raise self.fails[url]
        return await self._memory.open()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_the_first_reachable_node_is_used_and_then_tried_first(cluster):
    assert cluster.open() == [ONE]
    cluster.down([ONE])
    assert cluster.open() == [ONE, TWO]
    assert cluster.transport.address == "amqp://node-2:5672/v"
    cluster.down([])
    assert cluster.open() == [TWO]
    cluster.down([ONE, TWO])
    assert cluster.open() == [TWO, ONE, THREE]


def test_without_a_reachable_node_the_error_names_each(cluster):
    cluster.open()
    cluster.down([ONE, TWO, THREE])
    with pytest.raises(LinkLost) as caught:
        cluster.open()
    assert cluster.tried == [ONE, TWO, THREE]
    for number in (1, 2, 3):
        assert f"amqp://node-{number}:5672/v" in str(caught.value)
        assert f"amqp://node-{number}:5672/v" in cluster.transport.address
    assert "pa,ss" not in str(caught.value) + cluster.transport.address


def test_a_refusal_is_an_error_and_no_other_node_is_tried(cluster):
    cluster.fails = {ONE: BrokerError("refused")}
    with pytest.raises(BrokerError, match="refused"):
        cluster.open()
    assert cluster.tried == [ONE]


def test_the_error_of_a_single_broker_is_only_the_cause(unused_tcp_port):
    transport = AmqpTransport(f"amqp://127.0.0.1:{unused_tcp_port}/", "test")
    with pytest.raises(LinkLost) as caught:
        asyncio.run(transport.open())
    assert "amqp://" not in str(caught.value)


async def test_a_callable_url_is_called_before_every_attempt(unused_tcp_port):
    nowhere = f"amqp://127.0.0.1:{unused_tcp_port}/"
    urls = [nowhere]
    transport = AmqpTransport(lambda: urls[-1], "test")
    with pytest.raises(LinkLost):
        await transport.open()
    urls.append("amqp://127.0.0.1:1/")
    with pytest.raises(LinkLost):
        await transport.open()
    assert transport.address == "amqp://127.0.0.1:1/"
