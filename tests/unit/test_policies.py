"""Policies: which queues they limit, and how they are printed and set."""

from __future__ import annotations

import json
import re
import shlex
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from click.testing import CliRunner

from fluffle_broker.cli.broker import broker
from fluffle_broker.inspect.queues import QueueOverview
from fluffle_broker.inspect.queues_table import hints
from fluffle_broker.node import policies
from fluffle_common.cli.settings import management_finder
from fluffle_common.errors import BrokerError, UsageError
from fluffle_common.protocol import topology
from fluffle_common.protocol.topology import Queue, Topology
from fluffle_common.transport.rabbitmq.management import Management, read_queue
from fluffle_coordinator.machine.rules import Rules

LETTERS = Topology("letters")


def queues(names: Topology) -> list[Queue]:
    shared = [one for one in names.shared() if isinstance(one, Queue)]
    return [*shared, *names.queues_of("w.1"), *names.queues_of("updates")]


def bounding(name: str, among: list[topology.Policy]) -> list[dict[str, object]]:
    return [one.definition for one in among if re.search(one.pattern, name)]


@pytest.mark.parametrize("federation", ["letters", None])
def test_each_queue_is_limited_by_exactly_one_policy(federation):
    wanted = topology.policies(federation)
    assert len({one.name for one in wanted}) == len(wanted)
    for queue in queues(LETTERS):
        assert bounding(queue.name, wanted) == [queue.limits]
        assert any(key.startswith("max-") for key in queue.limits)


def test_policies_limit_no_queue_of_others():
    wanted = topology.policies("letters")
    others = [one.name for one in queues(Topology("letters-2"))]
    for name in (*others, "updates", "my.letters.updates", "letters.mine", "letters.updates.x"):
        assert bounding(name, wanted) == []
    assert bounding("some.other.queue", topology.policies()) == []


def test_limits_are_not_queue_arguments():
    for queue in queues(LETTERS):
        assert not any(
            re.match("x-max-length|x-max-age|x-overflow", key) for key in queue.arguments
        )
    for queue in LETTERS.queues_of("w"):
        assert queue.arguments == {"x-queue-type": "classic", "x-expires": 1_800_000}


def test_a_quorum_outbox_outlives_the_longest_upload():
    # Nothing that is done while an upload lasts counts as using a quorum queue.
    _, outbox = Topology("letters", "quorum").queues_of("w")
    assert int(outbox.arguments["x-expires"]) >= 1000 * Rules(rounds=1).max_round_s


def test_policies_of_a_federation_override_the_general_ones():
    of_one, of_all = (topology.policies(name)[0].priority for name in ("letters", None))
    assert of_one > of_all


def test_printed_policies_are_rabbitmqctl_commands():
    wanted = topology.policies("letters")
    lines = policies.shell_lines(wanted, "/my vhost")
    assert len(lines) == len(wanted)
    words = shlex.split(lines[0])
    assert words[:4] == ["rabbitmqctl", "set_policy", "--vhost", "/my vhost"]
    name, pattern, definition = words[-3:]
    assert (name, pattern) == (wanted[0].name, wanted[0].pattern)
    assert json.loads(definition) == wanted[0].definition


class Api:
    """A fake of RabbitMQ's management API."""

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


def test_policies_are_set_in_the_vhost_of_the_url():
    wanted = topology.policies("letters")
    with Api() as api:
        policies.apply(wanted, Management(URL, api.base))
    assert set(api.put) == {f"/api/policies/v/{one.name}" for one in wanted}
    put = api.put["/api/policies/v/fluffle.letters.updates"]
    assert put["apply-to"] == "queues"
    assert put["definition"] == {"max-length-bytes": 16 * 2**30, "overflow": "reject-publish"}


def test_keep_leaves_existing_policies():
    wanted = topology.policies()
    with Api("fluffle.updates", "another") as api:
        policies.apply(wanted, Management(URL, api.base), keep=True)
    assert "/api/policies/v/fluffle.updates" not in api.put
    assert len(api.put) == len(wanted) - 1


@pytest.mark.parametrize(
    ("code", "message"), [(401, "check the password"), (404, "the vhost in --url")]
)
def test_a_refusal_names_the_remedy(code, message):
    with Api(refuses=code) as api, pytest.raises(BrokerError, match=message) as refused:
        policies.apply(topology.policies("letters"), Management(URL, api.base))
    assert "--print" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_an_unreachable_api_is_named():
    with pytest.raises(BrokerError, match="does not answer .* --management"):
        policies.apply(topology.policies("letters"), Management(URL, "http://127.0.0.1:1"))


# --- hints of `fluffle queues` -------------------------------------------------------------------


def description(name: str, policy: object) -> dict[str, object]:
    return {"name": name, "messages": 0, "consumers": 1, "effective_policy_definition": policy}


def hinted(*of: dict[str, object]) -> list[str]:
    return hints(QueueOverview(LETTERS, [read_queue(one, LETTERS, 0.0) for one in of], []))


def test_queues_without_a_limit_share_one_hint():
    lines = hinted(
        description("letters.updates", {}),
        description("letters.presence", []),
        description("letters.inbox.w", {}),
    )
    assert lines == [
        "no policy limits how much these 3 queues may hold (updates, presence, inbox.w); "
        "set limits with 'fluffle broker apply-policy --federation letters'"
    ]


def test_any_policy_that_limits_a_queue_is_enough():
    assert hinted(description("letters.updates", {"max-length": 5})) == []
    assert hinted(description("letters.updates", {"overflow": "drop-head"})) != []
    of_locks = [description(f"letters.{lock}.presence", {}) for lock in ("lock", "lock2")]
    assert hinted(*of_locks, description("letters.tap.a", {})) == []
    assert hinted({"name": "letters.updates", "messages": 0, "consumers": 1}) == []  # unknown


@pytest.mark.parametrize(
    "url", ["amqp://me:se/cret@127.0.0.1:1", "amqp://me:secret@[h", "http://h"]
)
@pytest.mark.parametrize("flag", [["--print"], []])
def test_apply_policy_refuses_an_invalid_url(url, flag):
    refused = CliRunner().invoke(
        broker, ["apply-policy", "--federation", "letters", "--url", url, *flag]
    )
    assert isinstance(refused.exception, UsageError)
    assert "is not the URL of a broker" in str(refused.exception)
    assert "cret" not in f"{refused.exception}{refused.output}"


@pytest.mark.parametrize("base", ["http://me:se cret@h:15672", "me:s@cret@h:15672"])
def test_a_user_in_the_url_of_the_management_api_is_refused_and_not_printed(base):
    with pytest.raises(
        UsageError, match="management API contains a user name; give http://h:15672 instead"
    ) as no:
        management_finder(base)("amqp://h/")
    assert "cret" not in str(no.value)
    assert management_finder("http://h:1/")("amqp://h/").base == "http://h:1"


@pytest.mark.parametrize("base", ["h:15672", "amqp://h:15672", "http:/h:15672", "  "])
def test_text_that_is_no_url_of_the_management_api_is_refused(base):
    with pytest.raises(UsageError, match="^the value of --management or FLUFFLE_MANAGEMENT_URL"):
        management_finder(base)
