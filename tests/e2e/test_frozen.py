"""A frozen backbone of 20 MB over a real RabbitMQ: once to each worker, also after restarts."""

import signal
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
        self._channel.exchange_declare(f"{federation.name}.work", "direct", durable=True)
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
    made = Copies(federation)
    try:
        yield made
    finally:
        made.close()


def coordinate(federation: Federation) -> Program:
    return federation.coordinator("--min-workers", 3, "--quorum", 3, "--rounds", 4)


def test_a_backbone_crosses_once_a_worker(
    federation: Federation, copies: Copies, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"

    def worker(number: int, waits_from: int = 1000) -> Program:
        env = {"WAIT_FOR": str(gate), "WAIT_FROM": str(waits_from)}
        return federation.worker(f"shard:{number}/3", task=TASK, env=env)

    coordinator = coordinate(federation)
    first, second, victim = worker(0), worker(1), worker(2, waits_from=2)
    coordinator.wait_for("update of shard-2-3 counted")  # so it has the backbone
    victim.send(signal.SIGKILL)
    victim.end()
    again = worker(2, waits_from=1)
    coordinator.wait_for("shard-2-3 joined")
    coordinator.send(signal.SIGKILL)
    coordinator.end()
    gate.touch()
    resumed = coordinate(federation)
    assert [program.end() for program in (resumed, first, second, again)] == [0, 0, 0, 0]
    assert len(list(Path(federation.run).glob("frozen-*.safetensors"))) == 1
    assert copies.bytes_to(WORKERS[0]) < 500_000  # its own is the federation's
    for name in WORKERS[1:]:
        assert 4 * SIZE < copies.bytes_to(name) < 4 * SIZE + 500_000
