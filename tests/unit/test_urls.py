"""What ``--url`` may say, and which of several brokers is used."""

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
def test_urls_are_separated_by_commas_that_another_url_follows(between):
    assert split_urls(between.join((ONE, TWO)) + "\n") == [ONE, TWO]
    assert [url.password for url in parse_urls(f"{ONE}{between}{TWO}")] == ["pa,ss", "pa,ss"]


def test_one_url_is_one():
    assert split_urls(ONE) == [ONE]
    assert [str(url) for url in parse_urls("amqps://host")] == ["amqps://host"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("", "no scheme"),
        ("amqp://", "no host"),
        (f"http://x,{ONE}", "it starts with 'http://'"),
        (f"{ONE},amqp://node:port/v", "is not the URL"),
        ("amqp://node-1,node-2/", "a comma in the host"),
        (f"{ONE},amqp://node-2:5672/other", "the same /vhost"),
    ],
)
def test_what_is_wrong_with_one_of_them_is_told(wrong, told):
    with pytest.raises(UsageError, match=told):
        AmqpTransport(wrong, "test")


# What people's passwords are made of, and what a URL gives a meaning to.
ODD = st.text(
    st.sampled_from("aZ09#/?@:%[]\\\\ +&=,;!\"'\u00e9\u2100\u4e2d"), min_size=0, max_size=12
)
PASSWORDS = ODD.map(lambda odd: f"s3s{odd}ame")


@given(password=PASSWORDS, user=st.sampled_from(["me", "me@home", ""]), port=st.integers(0, 99999))
def test_no_password_is_in_what_is_said_of_a_url(password, user, port):
    given_url = f"amqp://{user}:{password}@host.example:{port}/v"
    for text in (given_url, f"{ONE},{given_url}", given_url.replace("amqp://", "http://")):
        try:
            transport = AmqpTransport(text, "test")
        except UsageError as wrong:
            said = "".join(traceback.format_exception(wrong))
        else:
            said = transport.address
        assert password not in said
        assert "s3s" not in said
        assert "ame@" not in said


@given(password=PASSWORDS)
def test_a_password_that_is_quoted_is_read_as_it_was(password):
    (url,) = parse_urls(f"amqp://me:{quote(password, safe='')}@host/v")
    assert url.password == password


@pytest.mark.parametrize("char", "#/?[")
def test_what_must_be_quoted_is_named(char):
    with pytest.raises(UsageError, match="percent|write '#' as %23") as wrong:
        parse_urls(f"amqp://me:open{char}sesame@host/v")
    assert "…@host/v" in str(wrong.value)


def test_options_of_tls_without_tls_are_no_secret_loss_of_it():
    with pytest.raises(UsageError, match="cafile.*amqps"):
        parse_urls("amqp://me:open-sesame@host/?cafile=/ca.pem")


def test_a_url_is_taken_out_of_any_text():
    text = "at amqps://me:op@en@host/v and amqp://a:b@two/ it failed"
    assert without_credentials(text) == "at amqps://host/v and amqp://two/ it failed"


class Cluster:
    """Stands in for what opens a link: notes who is tried, and fails where it should."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[str] = []
        self.fails: dict[str, Exception] = {}
        self._memory = MemoryBroker()
        monkeypatch.setattr(AmqpTransport, "_open", lambda _, url: self._open(str(url)))
        self.transport = AmqpTransport(ALL, "test")

    def down(self, urls: Iterable[str]) -> None:
        """Let these, and only these, be unreachable."""
        self.fails = {url: LinkLost("it is down") for url in urls}

    def open(self) -> list[str]:
        """Open a link; return whom that took."""
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


def test_the_first_that_can_be_reached_is_used_and_tried_first_from_then_on(cluster):
    assert cluster.open() == [ONE]
    cluster.down([ONE])
    assert cluster.open() == [ONE, TWO]
    assert cluster.transport.address == "amqp://node-2:5672/v"
    cluster.down([])
    assert cluster.open() == [TWO]
    cluster.down([ONE, TWO])
    assert cluster.open() == [TWO, ONE, THREE]


def test_none_that_can_be_reached_is_a_lost_link_which_tells_of_each(cluster):
    cluster.open()
    cluster.down([ONE, TWO, THREE])
    with pytest.raises(LinkLost) as caught:
        cluster.open()
    assert cluster.tried == [ONE, TWO, THREE]
    for number in (1, 2, 3):
        assert f"amqp://node-{number}:5672/v" in str(caught.value)
        assert f"amqp://node-{number}:5672/v" in cluster.transport.address
    assert "pa,ss" not in str(caught.value) + cluster.transport.address


def test_a_refusal_is_an_error_at_once_not_a_reason_to_try_the_next(cluster):
    cluster.fails = {ONE: BrokerError("refused")}
    with pytest.raises(BrokerError, match="refused"):
        cluster.open()
    assert cluster.tried == [ONE]


def test_of_one_broker_the_cause_alone_is_told(unused_tcp_port):
    transport = AmqpTransport(f"amqp://127.0.0.1:{unused_tcp_port}/", "test")
    with pytest.raises(LinkLost) as caught:
        asyncio.run(transport.open())
    assert "amqp://" not in str(caught.value)


async def test_where_the_broker_is_is_asked_again_before_every_attempt(unused_tcp_port):
    nowhere = f"amqp://127.0.0.1:{unused_tcp_port}/"
    found = [nowhere]
    transport = AmqpTransport(lambda: found[-1], "test")
    with pytest.raises(LinkLost):
        await transport.open()
    found.append("amqp://127.0.0.1:1/")
    with pytest.raises(LinkLost):
        await transport.open()
    assert transport.address == "amqp://127.0.0.1:1/"
