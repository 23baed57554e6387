"""When a confirmation is late: while bytes move it is not, and then after a constant time."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import pytest
from uvloop.loop import PseudoSocket

from fluffle_common.transport.rabbitmq import confirms as amqp_confirms
from fluffle_common.transport.rabbitmq.confirms import ConfirmWatch, queued_bytes


class Line:
    """A line whose bytes a test moves, and whose clock it turns."""

    def __init__(self) -> None:
        self.written, self.left, self.come = 0, 0, 0
        self.told = True  # whether the system tells what the other end has
        self.why: list[str] = []
        self.is_blocked = False
        self.watch = ConfirmWatch(self, self.why.append, lambda: self.is_blocked)

    def waiting_bytes(self) -> int:
        return (self.written - self.left) // 2 if self.told else self.written - self.left

    def queued_bytes(self) -> int | None:
        return self.written - self.left - self.waiting_bytes() if self.told else None

    def come_bytes(self) -> int:
        return self.come

    def send(self, nbytes: int) -> amqp_confirms.Awaited:
        one = self.watch.sending(nbytes)
        self.written += nbytes
        return one

    def pass_s(self, seconds: float, rate: float = 0, *, asleep: bool = False) -> None:
        """Let time pass; ``rate`` bytes leave each second."""
        loop = asyncio.get_running_loop()
        real = loop.time
        for _ in range(1 if asleep else round(seconds)):
            self.left = min(self.left + round(rate), self.written)
            now = real() + (seconds if asleep else 1.0)
            self.watch._looked_at -= now - real()
            timer = self.watch._timer
            if timer is None:
                return
            timer.cancel()
            self.watch._look()


@pytest.fixture
async def line() -> Line:
    return Line()


async def test_a_message_on_a_slow_line_is_never_late_while_its_bytes_leave(line):
    line.send(4 * 2**20)
    line.pass_s(205, rate=20_000)
    assert line.why == []
    line.pass_s(25, rate=20_000)  # all of it has left: now its confirmation is due
    assert len(line.why) == 1
    assert "did not confirm a message of 4194304 bytes" in line.why[0]


async def test_a_message_behind_others_begins_to_be_late_when_it_has_left(line):
    first = [line.send(4 * 2**20) for _ in range(4)]
    for one in first:
        line.pass_s(208, rate=20_000)
        assert line.why == []
        line.watch.settled(one)
    assert line.watch.under_way_bytes == 0


async def test_what_does_not_move_is_late(line):
    line.send(1000)
    line.pass_s(19)
    assert line.why == []
    line.pass_s(3)
    assert len(line.why) == 1


async def test_what_others_send_does_not_excuse_a_message_that_has_left(line):
    line.send(1000)
    for _ in range(25):
        line.pass_s(1, rate=2000)
        line.watch.settled(line.send(500))
    assert "a message of 1000 bytes" in line.why[0]


async def test_what_comes_in_may_be_before_the_confirmation(line):
    line.send(1000)
    for _ in range(60):
        line.pass_s(1, rate=1000)
        line.come += 20_000
    assert line.why == []


async def test_time_in_which_the_broker_takes_nothing_or_nobody_looked_does_not_count(line):
    line.send(1000)
    line.is_blocked = True
    line.pass_s(300)
    line.is_blocked = False
    line.pass_s(300, asleep=True)  # as if the process had been stopped
    assert line.why == []
    line.pass_s(25)
    assert len(line.why) == 1


async def test_where_the_system_does_not_tell_its_buffers_get_time(line):
    line.told = False
    line.send(1_000_000)
    line.pass_s(10, rate=100_000)
    line.pass_s(100)
    assert line.why == []
    line.pass_s(30)
    assert len(line.why) == 1


async def test_nobody_looks_while_nothing_is_awaited(line):
    one = line.send(10)
    line.watch.settled(one)
    line.watch.settled(one)
    assert line.watch.under_way_bytes == 0
    line.pass_s(1)
    assert line.watch._timer is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_system_tells_what_the_other_end_has_not():
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
            assert 0 < queued < sent  # the other end's system has taken the rest
            with there.makefile("rb") as taken:
                assert len(taken.read(sent)) == sent
            there.sendall(b"y")
            here.setblocking(True)
            here.recv(1)
            assert queued_bytes(here.fileno()) == 0


def test_a_socket_that_was_closed_meanwhile_tells_nothing():
    closed = PseudoSocket(socket.AF_INET, socket.SOCK_STREAM, 0, -1)
    assert queued_bytes(closed.fileno()) is None
    once_open = os.open(os.devnull, os.O_RDONLY)
    os.close(once_open)
    assert queued_bytes(once_open) is None
