"""The limits of queues: which policy bounds which queue, and how they are printed and set."""

from __future__ import annotations

import json
import re
import shlex
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fluffle_broker.inspect.queues import QueueOverview
from fluffle_broker.inspect.queues_table import hints
from fluffle_broker.node import policies
from fluffle_common.errors import BrokerError
from fluffle_common.protocol import topology
from fluffle_common.protocol.topology import Queue, Topology
from fluffle_common.transport.rabbitmq.management import read_queue

LETTERS = Topology("letters")


def queues(names: Topology) -> list[Queue]:
    shared = [one for one in names.shared() if isinstance(one, Queue)]
    return [*shared, *names.queues_of("w.1"), *names.queues_of("updates")]


def bounding(name: str, among: list[topology.Policy]) -> list[dict[str, object]]:
    return [one.definition for one in among if re.search(one.pattern, name)]


@pytest.mark.parametrize("federation", ["letters", None])
def test_every_queue_is_bounded_by_the_one_policy_that_has_its_limits(federation):
    wanted = topology.policies(federation)
    assert len({one.name for one in wanted}) == len(wanted)
    for queue in queues(LETTERS):
        assert bounding(queue.name, wanted) == [queue.limits]
        assert any(key.startswith("max-") for key in queue.limits)


def test_a_federations_policies_bound_no_queue_of_another_nor_of_another_program():
    wanted = topology.policies("letters")
    others = [one.name for one in queues(Topology("letters-2"))]
    for name in (*others, "updates", "my.letters.updates", "letters.mine", "letters.updates.x"):
        assert bounding(name, wanted) == []
    assert bounding("some.other.queue", topology.policies()) == []


def test_no_limit_is_an_argument_and_what_a_worker_declares_is_little():
    for queue in queues(LETTERS):
        assert not any(
            re.match("x-max-length|x-max-age|x-overflow", key) for key in queue.arguments
        )
    for queue in LETTERS.queues_of("w"):
        assert queue.arguments == {"x-queue-type": "classic", "x-expires": 1_800_000}


def test_a_federations_policies_count_for_more_than_those_of_all():
    of_one, of_all = (topology.policies(name)[0].priority for name in ("letters", None))
    assert of_one > of_all


def test_what_is_printed_is_what_rabbitmqctl_takes():
    wanted = topology.policies("letters")
    lines = policies.shell_lines(wanted, "/my vhost")
    assert len(lines) == len(wanted)
    words = shlex.split(lines[0])
    assert words[:4] == ["rabbitmqctl", "set_policy", "--vhost", "/my vhost"]
    name, pattern, definition = words[-3:]
    assert (name, pattern) == (wanted[0].name, wanted[0].pattern)
    assert json.loads(definition) == wanted[0].definition


class Api:
    """Stands in for RabbitMQ's management API."""

    def __init__(self, *there: str, refuses: int = 0) -> None:
        self.put: dict[str, dict[str, object]] = {}
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(200, json.dumps([{"name": name} for name in there]).encode())

            def do_PUT(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not refuses:
                    api.put[self.path] = json.loads(body)
                self.answer(refuses or 201)

            def answer(self, code, body=b""):
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


URL = "amqp://me:secret@127.0.0.1/v"


def test_they_are_put_where_the_url_says():
    wanted = topology.policies("letters")
    with Api() as api:
        policies.apply(wanted, URL, api.base)
    assert set(api.put) == {f"/api/policies/v/{one.name}" for one in wanted}
    put = api.put["/api/policies/v/fluffle.letters.updates"]
    assert put["apply-to"] == "queues"
    assert put["definition"] == {"max-length-bytes": 16 * 2**30, "overflow": "reject-publish"}


def test_one_that_an_operator_may_have_changed_is_kept():
    wanted = topology.policies()
    with Api("fluffle.updates", "another") as api:
        policies.apply(wanted, URL, api.base, keep=True)
    assert "/api/policies/v/fluffle.updates" not in api.put
    assert len(api.put) == len(wanted) - 1


@pytest.mark.parametrize(
    ("code", "said"), [(401, "user 'me' may not set policies"), (404, "check the vhost")]
)
def test_a_refusal_names_the_remedy(code, said):
    with Api(refuses=code) as api, pytest.raises(BrokerError, match=said) as refused:
        policies.apply(topology.policies("letters"), URL, api.base)
    assert "--print" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_an_api_that_is_not_there_is_named():
    with pytest.raises(BrokerError, match="does not answer .* --management"):
        policies.apply(topology.policies("letters"), URL, "http://127.0.0.1:1")


# --- what `fluffle queues` says ------------------------------------------------------------------


def told(name: str, policy: object) -> dict[str, object]:
    return {"name": name, "messages": 0, "consumers": 1, "effective_policy_definition": policy}


def hinted(*of: dict[str, object]) -> list[str]:
    return hints(QueueOverview(LETTERS, [read_queue(one, LETTERS, 0.0) for one in of], []))


def test_queues_without_a_limit_share_one_line_that_says_how_to_set_one():
    lines = hinted(
        told("letters.updates", {}), told("letters.presence", []), told("letters.inbox.w", {})
    )
    assert lines == [
        "no policy limits how much these 3 queues may hold (updates, presence, inbox.w): "
        "fluffle broker apply-policy --federation letters"
    ]


def test_any_policy_that_bounds_a_queue_will_do():
    assert hinted(told("letters.updates", {"max-length": 5})) == []
    assert hinted(told("letters.updates", {"overflow": "drop-head"})) != []
    assert hinted(told("letters.lock.presence", {}), told("letters.tap.a", {})) == []
    assert hinted({"name": "letters.updates", "messages": 0, "consumers": 1}) == []  # not said
