"""When a publisher confirm is overdue."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from pamqp import commands, frame
from uvloop.loop import PseudoSocket

from fluffle_common.transport.base import Blocking
from fluffle_common.transport.rabbitmq.channel import ContentChannel
from fluffle_common.transport.rabbitmq.confirms import ConfirmWatch
from fluffle_common.transport.rabbitmq.connection import queued_bytes


class Line:
    """A simulated connection whose bytes and clock the test moves."""

    def __init__(self) -> None:
        self.written, self.left, self.received = 0, 0, 0
        self.reports_queue = True  # whether the system reports queued bytes
        self.why: list[str] = []
        self.blocking = Blocking()
        socket = SimpleNamespace(is_closing=lambda: False, write=len, writelines=len)
        self.channel = ContentChannel(1, socket, 2**20)
        self.watch = ConfirmWatch(self, self.channel, self.why.append)

    def buffered_bytes(self) -> int:
        return (self.written - self.left) // 2 if self.reports_queue else self.written - self.left

    def queued_bytes(self) -> int | None:
        return self.written - self.left - self.buffered_bytes() if self.reports_queue else None

    @property
    def splitter(self) -> SimpleNamespace:
        return SimpleNamespace(received_bytes=self.received)

    def send(self, nbytes: int) -> None:
        self.channel.publish(b"", "", bytes(nbytes))
        self.written += nbytes

    def confirm(self, number: int) -> None:
        self.channel.method(frame.marshal(commands.Basic.Ack(number), 1)[7:-1])

    def pass_s(self, seconds: float, rate: float = 0, *, asleep: bool = False) -> None:
        """Advance the clock while ``rate`` bytes leave per second."""
        loop = asyncio.get_running_loop()
        real = loop.time
        for _ in range(1 if asleep else round(seconds)):
            self.left = min(self.left + round(rate), self.written)
            now = real() + (seconds if asleep else 1.0)
            self.watch._checked_at -= now - real()
            if self.why:
                return
            self.watch._timer.cancel()
            self.watch._check()


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    line = Line()
    yield line
    line.watch.close()


async def test_a_message_is_not_overdue_while_its_bytes_leave(line):
    line.send(4 * 2**20)
    line.pass_s(205, rate=20_000)
    assert line.why == []
    line.pass_s(25, rate=20_000)  # all of it has left: now its confirmation is due
    assert len(line.why) == 1
    assert "did not confirm a message of 4194304 bytes" in line.why[0]


async def test_the_time_limit_starts_when_the_last_byte_has_left(line):
    for _ in range(4):
        line.send(4 * 2**20)
    for number in range(1, 5):
        line.pass_s(208, rate=20_000)
        assert line.why == []
        line.confirm(number)
    assert line.channel.unconfirmed_bytes == 0


async def test_a_message_that_makes_no_progress_is_overdue(line):
    line.send(1000)
    line.pass_s(19)
    assert line.why == []
    line.pass_s(3)
    assert len(line.why) == 1


async def test_progress_of_later_messages_does_not_extend_the_limit(line):
    line.send(1000)
    for number in range(2, 27):
        line.pass_s(1, rate=2000)
        line.send(500)
        line.confirm(number)
    assert "a message of 1000 bytes" in line.why[0]


async def test_incoming_bodies_extend_the_limit(line):
    line.send(1000)
    for _ in range(60):
        line.pass_s(1, rate=1000)
        line.received += 20_000
    assert line.why == []


async def test_blocked_and_stopped_time_does_not_count(line):
    line.send(1000)
    line.blocking.set("low on memory")
    line.pass_s(300)
    line.blocking.set(None)
    line.pass_s(300, asleep=True)  # as if the process had been stopped
    assert line.why == []
    line.pass_s(25)
    assert len(line.why) == 1


async def test_unknown_socket_buffers_get_extra_time(line):
    line.reports_queue = False
    line.send(1_000_000)
    line.pass_s(10, rate=100_000)
    line.pass_s(100)
    assert line.why == []
    line.pass_s(30)
    assert len(line.why) == 1


async def test_a_message_whose_sender_gave_up_is_not_overdue(line):
    line.send(10)
    line.channel.unconfirmed[1].confirmation.cancel()
    line.pass_s(100)
    assert line.why == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_queued_bytes_counts_what_the_peer_has_not_acknowledged():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # soon it takes no more
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with here, there:
            assert queued_bytes(here.fileno()) == 0
            here.setblocking(False)
            sent = 0
            with pytest.raises(BlockingIOError):
                while True:
                    sent += here.send(bytes(2**16))
            queued = queued_bytes(here.fileno())
            assert 0 < queued < sent  # the peer's system has taken the rest
            with there.makefile("rb") as taken:
                assert len(taken.read(sent)) == sent
            there.sendall(b"y")
            here.setblocking(True)
            here.recv(1)
            assert queued_bytes(here.fileno()) == 0


def test_queued_bytes_of_a_closed_socket_are_unknown():
    closed = PseudoSocket(socket.AF_INET, socket.SOCK_STREAM, 0, -1)
    assert queued_bytes(closed.fileno()) is None
    once_open = os.open(os.devnull, os.O_RDONLY)
    os.close(once_open)
    assert queued_bytes(once_open) is None
