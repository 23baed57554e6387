"""A frozen backbone of 20 MB over a real RabbitMQ: once to each worker, also after restarts."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pika
import pytest

from tests.e2e.backbone_task import SIZE
from tests.e2e.programs import ROOT, Federation, Program

pytestmark = pytest.mark.rabbit
TASK = f"{ROOT / 'tests/e2e/backbone_task.py'}:task"
WORKERS = [f"shard-{number}-3" for number in range(3)]


class Copies:
    """Counts the bytes of all work that is sent to each worker, from queues of its own."""

    def __init__(self, federation: Federation) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(federation.url))
        self._channel = self._connection.channel()
        self._queues = {name: f"{federation.name}.copies.{name}" for name in WORKERS}
        for name, queue in self._queues.items():
            self._channel.queue_declare(queue, durable=True)
            self._channel.queue_bind(queue, f"{federation.name}.work", name)

    def bytes_to(self, worker: str) -> int:
        """Return how many bytes were sent to a worker."""
        nbytes = 0
        while (body := self._channel.basic_get(self._queues[worker], auto_ack=True)[2]) is not None:
            nbytes += len(body)
        return nbytes

    def close(self) -> None:
        """Delete the queues."""
        for queue in self._queues.values():
            self._channel.queue_delete(queue)
        self._connection.close()


@pytest.fixture
def copies(federation: Federation) -> Iterator[Copies]:
    """Yield the copies of a federation whose coordinator has made the exchange."""
    coordinator = coordinate(federation)
    coordinator.wait_for("connected")
    time.sleep(0.5)
    made = Copies(federation)
    try:
        yield made
    finally:
        made.close()


def coordinate(federation: Federation) -> Program:
    return federation.coordinator("--min-workers", 3, "--quorum", 2, "--rounds", 60)


def worker(federation: Federation, number: int) -> Program:
    return federation.worker(f"shard:{number}/3", task=TASK)


def test_a_backbone_crosses_once_a_worker(federation: Federation, copies: Copies) -> None:
    (coordinator,) = federation.programs
    first, second, victim = (worker(federation, number) for number in range(3))
    coordinator.wait_for("update of shard-2-3 counted")  # so it has the backbone
    victim.send(signal.SIGKILL)
    victim.end()
    again = worker(federation, 2)
    coordinator.wait_for("shard-2-3 joined")
    coordinator.send(signal.SIGKILL)
    coordinator.end()
    resumed = coordinate(federation)
    assert [program.end() for program in (resumed, first, second, again)] == [0, 0, 0, 0]
    assert len(list(Path(federation.run).glob("frozen-*.safetensors"))) == 1
    assert copies.bytes_to(WORKERS[0]) < 500_000  # its own is the federation's
    for name in WORKERS[1:]:
        assert 4 * SIZE < copies.bytes_to(name) < 4 * SIZE + 500_000
