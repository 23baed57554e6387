"""Federations in which every user has only the permissions of its role."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import ChannelClosedByBroker

from fluffle_broker.node.node import NodeInfo
from fluffle_broker.node.permissions import NOTHING, Permissions, worker_permissions
from fluffle_common.protocol.topology import Topology
from fluffle_common.transport.rabbitmq.transport import AmqpTransport
from tests.e2e.manage import manage
from tests.e2e.permissions import COORDINATOR, PASSWORD, Narrow
from tests.e2e.programs import FLUFFLE, REGRESSION, ROOT, Federation, Program
from tests.here import fluffle

pytestmark = pytest.mark.rabbit

ME, VICTIM = "mallory", "a.lice"
WAITING = f"{ROOT / 'tests/e2e/waiting_task.py'}:task"
F = "f"
TOPICS_OF_THE_PAGE = r"^(hello|heartbeat|bye)\.#$"  # as docs/permissions.md says
INBOX, OUTBOX = f"{F}.inbox.", f"{F}.outbox."


class Run(Federation):
    """A federation whose coordinator and workers log in as their own users."""

    def __init__(self, narrow: Narrow, folder: Path) -> None:
        super().__init__(F, "", folder)
        self._narrow = narrow
        self.on = narrow.version

    def chief(self, *flags: object) -> Program:
        """Start a coordinator."""
        self.url = self._narrow.url(COORDINATOR)
        return self.coordinator("--verify-users", "--queue-type", "classic", *flags)

    def site(
        self, name: str, shard: int, *, task: str = REGRESSION, env: dict[str, str] | None = None
    ) -> Program:
        """Start a worker."""
        self.url = self._narrow.url(name)
        return self.worker(f"shard:{shard}/2", "--id", name, task=task, env=env)


@pytest.fixture
def narrow(broker_node: NodeInfo) -> Iterator[Narrow]:
    made = Narrow(broker_node, ["a.lice", "bob"])
    yield made
    made.close()


@pytest.fixture
def run(narrow: Narrow, tmp_path: Path) -> Iterator[Run]:
    made = Run(narrow, tmp_path)
    try:
        yield made
    finally:
        made.close()


def committed(run: Run) -> list[list[str]]:
    lines = map(json.loads, (run.run / "history.jsonl").read_text().splitlines())
    return [
        sorted(one["worker"] for one in line["participants"])
        for line in lines
        if line["event"] == "committed"
    ]


@pytest.mark.parametrize("order", ["chief a.lice bob", "a.lice bob chief", "bob chief a.lice"])
def test_a_federation_with_minimal_permissions_starts_in_any_order(run: Run, order: str) -> None:
    programs = []
    # For RabbitMQ 4.3, the exchange for which a lonely worker waits exists already.
    lonely = "connected to the broker" if run.on >= (4, 3) else "waiting for a coordinator"
    for shard, name in enumerate(order.split()):
        if name == "chief":
            programs.append(run.chief("--quorum", 2, "--rounds", 3))
            programs[-1].wait_for("connected to the broker")
        else:
            programs.append(run.site(name, shard % 2))
            alone = order.startswith(name) or "chief" in order.split()[shard:]
            programs[-1].wait_for(lonely if alone else "joined run")
    assert [program.end() for program in programs] == [0, 0, 0]
    assert committed(run) == [["a.lice", "bob"]] * 3


def test_with_minimal_permissions_killed_programs_recover(run: Run, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def alice(waits_from: int) -> Program:
        env = {"WAIT_FOR": str(gate), "WAIT_FROM": str(waits_from)}
        return run.site("a.lice", 0, task=WAITING, env=env)

    rounds = ("--quorum", 2, "--rounds", 20)
    chief = run.chief(*rounds)
    killed, bob = alice(3), run.site("bob", 1)
    chief.wait_for("round 2: committed")
    killed.send(signal.SIGKILL)
    assert killed.end() == -signal.SIGKILL
    again = alice(2)
    again.wait_for("update sent")
    chief.send(signal.SIGKILL)
    assert chief.end() == -signal.SIGKILL
    second = run.chief(*rounds)
    second.wait_for("continuing run")
    gate.touch()
    assert [program.end() for program in (second, again, bob)] == [0, 0, 0]
    assert committed(run) == [["a.lice", "bob"]] * 20


# --- what a user may not do --------------------------------------------------------------------


@pytest.fixture(scope="module")
def besieged(broker_node: NodeInfo) -> Iterator[Narrow]:
    """Yield the vhost of a federation in which an attacker has a worker's user."""
    made = Narrow(broker_node, [ME, VICTIM])

    async def settle() -> None:
        topology = made.topology
        for worker in (ME, VICTIM):
            link = await AmqpTransport(made.url(worker), "test").open()
            await link.declare(topology.queues_of(worker))
            await link.close()
        link = await AmqpTransport(made.url(COORDINATOR), "test").open()
        await link.declare(topology.shared())
        for worker in (ME, VICTIM):
            assert await link.bind(topology.bindings_of(worker))
        await link.close()

    asyncio.run(settle())
    yield made
    made.close()


@contextlib.contextmanager
def channel(narrow: Narrow, user: str = ME) -> Iterator[BlockingChannel]:
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(narrow.url(user)))) as one:
        opened = one.channel()
        opened.confirm_delivery()
        yield opened


def publish(exchange: str, key: str, **properties: object) -> Callable[[BlockingChannel], object]:
    told = pika.BasicProperties(**properties)
    return lambda on: on.basic_publish(exchange, key, b"x", told, mandatory=True)


def consume(queue: str, **options: object) -> Callable[[BlockingChannel], object]:
    def attempt(on: BlockingChannel) -> None:
        on.basic_qos(prefetch_count=1)
        on.basic_consume(queue, lambda *_: None, **options)

    return attempt


def bind(queue: str, exchange: str, key: str) -> Callable[[BlockingChannel], object]:
    return lambda on: on.queue_bind(queue, exchange, key)


ATTEMPTS: dict[str, Callable[[BlockingChannel], object]] = {
    # another worker's queues
    "get its mail": lambda on: on.basic_get(INBOX + VICTIM),
    "consume its mail alone": consume(INBOX + VICTIM, exclusive=True),
    "purge its mail": lambda on: on.queue_purge(INBOX + VICTIM),
    "delete its inbox": lambda on: on.queue_delete(INBOX + VICTIM),
    "declare its inbox": lambda on: on.queue_declare(INBOX + VICTIM, durable=True),
    "bind its inbox elsewhere": bind(INBOX + VICTIM, f"{F}.results", "#"),
    "get its parts": lambda on: on.basic_get(OUTBOX + VICTIM),
    "a name that its dot would match": lambda on: on.queue_declare(INBOX + "axlice", durable=True),
    # copies of others' messages
    "copies of its mail": bind(INBOX + ME, f"{F}.work", VICTIM),
    "copies of all updates": bind(OUTBOX + ME, f"{F}.results", "update.#"),
    "copies of all signs of life": bind(OUTBOX + ME, f"{F}.results", "heartbeat.#"),
    "copies of all updates, by an exchange with the name of its inbox": lambda on: (
        on.exchange_declare(INBOX + ME, "fanout"),
        on.exchange_bind(INBOX + ME, f"{F}.results", "update.#"),
    ),
    "a binding of its outbox to an exchange of its own": lambda on: (
        on.exchange_declare(INBOX + ME, "fanout"),
        on.queue_bind(OUTBOX + ME, INBOX + ME, ""),
    ),
    # messages in the name of others
    "work for another": publish(f"{F}.work", VICTIM),
    "mail for another": publish("", INBOX + VICTIM),
    "an event in the journal": publish("", f"{F}.journal"),
    "something rejected, by the queue's name": publish("", f"{F}.rejected"),
    "an update under another's key": publish(f"{F}.results", f"update.{VICTIM}"),
    "an update as another user": publish(f"{F}.results", f"update.{ME}", user_id=VICTIM),
    "parts under another's key": publish(f"{F}.results", f"part.{VICTIM}"),
    "what its queue gives up, to others": lambda on: (
        on.queue_delete(INBOX + ME),
        on.queue_declare(
            INBOX + ME, durable=True, arguments={"x-dead-letter-exchange": f"{F}.work"}
        ),
    ),
    "what its queue gives up, by the name of another queue": lambda on: (
        on.queue_delete(INBOX + ME),
        on.queue_declare(
            INBOX + ME,
            durable=True,
            arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": INBOX + VICTIM},
        ),
    ),
    # shared entities
    "get updates": lambda on: on.basic_get(f"{F}.updates"),
    "consume updates": consume(f"{F}.updates"),
    "purge updates": lambda on: on.queue_purge(f"{F}.updates"),
    "read the journal": consume(f"{F}.journal", arguments={"x-stream-offset": "first"}),
    "get what was rejected": lambda on: on.basic_get(f"{F}.rejected"),
    "be the coordinator": consume(f"{F}.presence", exclusive=True),
    "unbind updates": lambda on: on.queue_unbind(f"{F}.updates", f"{F}.results", "update.#"),
    "unbind signs of life": lambda on: on.queue_unbind(f"{F}.presence", f"{F}.results", "hello.#"),
    "delete updates": lambda on: on.queue_delete(f"{F}.updates"),
    "delete the way out": lambda on: on.exchange_delete(f"{F}.work"),
    "delete the way in": lambda on: on.exchange_delete(f"{F}.results"),
    "declare the way in": lambda on: on.exchange_declare(f"{F}.results", "topic", durable=True),
    # other entities
    "a queue of another name": lambda on: on.queue_declare("evil", durable=True),
    "a queue of no name": lambda on: on.queue_declare("", exclusive=True),
    "an exchange": lambda on: on.exchange_declare("evil", durable=True),
    "the lock of a quorum queue": lambda on: on.queue_declare(f"{F}.lock.presence", exclusive=True),
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_workers_user_is_refused_everything_else(besieged: Narrow, attempt: str) -> None:
    with channel(besieged) as on, pytest.raises(ChannelClosedByBroker) as refused:
        ATTEMPTS[attempt](on)
    assert refused.value.reply_code in (403, 406)
    assert "ACCESS_REFUSED" in refused.value.reply_text or "user_id" in refused.value.reply_text


def test_a_worker_that_is_first_cannot_declare_shared_entities(
    broker_node: NodeInfo,
) -> None:
    made = Narrow(broker_node, [ME])
    try:
        for name in ("journal", "updates", "presence", "rejected"):
            with channel(made) as on, pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"):
                on.queue_declare(f"{F}.{name}", durable=True)
    finally:
        made.close()


def test_a_workers_user_can_only_count_the_messages_of_other_queues(besieged: Narrow) -> None:
    # Before RabbitMQ 4.3, a passive declaration needs no permission. It also returns the counts.
    with channel(besieged) as on:
        if besieged.version >= (4, 3):
            with pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"):
                on.queue_declare(INBOX + VICTIM, passive=True)
            return
        found = on.queue_declare(INBOX + VICTIM, passive=True).method
    assert (found.message_count, found.consumer_count) == (0, 0)


def test_a_workers_user_can_do_its_work(besieged: Narrow) -> None:
    topology = besieged.topology
    with channel(besieged) as on:
        for queue in topology.queues_of(ME):
            on.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))
        for key in (f"hello.{ME}", f"update.{ME}", f"part.{ME}", topology.rejecting(ME)):
            publish(topology.results, key, user_id=ME)(on)
        assert on.basic_get(topology.outbox(ME), auto_ack=True)[2] == b"x"
        consume(topology.inbox(ME), exclusive=True)(on)
    with channel(besieged, COORDINATOR) as on:
        assert on.basic_get(topology.rejected, auto_ack=True)[2] == b"x"


def test_a_user_without_permissions_gets_the_remedy(besieged: Narrow, tmp_path: Path) -> None:
    # Without topic permissions, which RabbitMQ 4.3 refuses for an exchange that does not exist.
    besieged.grant(dataclasses.replace(worker_permissions(Topology("other"), "eve"), topics={}))
    run = Run(besieged, tmp_path)
    try:
        worker = run.site("eve", 0)
        assert worker.end() == 3
    finally:
        run.close()
    said = worker.lines[-1]
    assert re.search(r"user 'eve' configure queue 'f\.(inbox|outbox)\.eve'", said)
    assert "fluffle broker permissions" in said
    assert PASSWORD not in "\n".join(worker.lines)
    assert not any("another worker" in line for line in worker.lines)


def test_a_reader_sees_the_page_and_copies_no_updates(
    besieged: Narrow, broker_node: NodeInfo, tmp_path: Path
) -> None:
    tap = re.escape(f"{F}.tap.") + ".*"
    read = f"^({tap}|{re.escape(F)}\\.(results|journal))$"
    besieged.grant(Permissions("reader", f"^{tap}$", f"^{tap}$", read))
    topic = {"exchange": f"{F}.results", "write": NOTHING, "read": TOPICS_OF_THE_PAGE}
    manage(broker_node, "PUT", f"topic-permissions/{besieged.vhost}/reader", topic)
    run = Run(besieged, tmp_path)
    try:
        where = ("--federation", F, "--url", besieged.url("reader"), "--listen", "127.0.0.1:0")
        page = run.start(FLUFFLE, "dashboard", *where)
        page.wait_for("connected to the broker")
        for key in ("hello.#", "heartbeat.#", "bye.#", "update.#", "#", "part.a.lice"):
            with channel(besieged, "reader") as on:
                on.queue_declare(f"{F}.tap.mine", exclusive=True)
                if re.search(TOPICS_OF_THE_PAGE, key):
                    on.queue_bind(f"{F}.tap.mine", f"{F}.results", key)
                    continue
                with pytest.raises(ChannelClosedByBroker, match="ACCESS_REFUSED"):
                    on.queue_bind(f"{F}.tap.mine", f"{F}.results", key)
        assert page.process.poll() is None
    finally:
        run.close()


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (["peek", "updates"], "; in --url, give a user with all permissions in the vhost"),
        (["rejected"], "; in --url, give a user with all permissions in the vhost"),
        (["tap"], "; in --url, give a user with all permissions in the vhost"),
        (["journal"], "; grant the user permission to read f.journal"),
        (["explain"], "; grant the user permission to read f.journal"),
        (["dashboard", "--listen", "127.0.0.1:0"], "; the page needs the permissions 'configure'"),
    ],
)
def test_commands_that_inspect_name_the_permissions_that_they_need(
    besieged: Narrow, command: list[str], remedy: str
) -> None:
    # Not those that `fluffle broker permissions` prints, which are of coordinators and workers.
    code, _, stderr = fluffle(*command, "--federation", F, "--url", besieged.url(ME))
    assert code == 3
    assert remedy in stderr
    assert "fluffle broker permissions" not in stderr


def test_a_user_without_a_tag_learns_that_the_management_api_refuses_it(
    besieged: Narrow, broker_node: NodeInfo
) -> None:
    _, _, stderr = fluffle(
        *("queues", "--federation", F, "--url", besieged.url(ME)),
        *("--management", broker_node.management_url),
    )
    assert "give the user" in stderr
    assert "the tag 'monitoring'" in stderr
