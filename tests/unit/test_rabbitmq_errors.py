"""Mapping of RabbitMQ's error texts: the cause, the remedy, and whether to try again."""

from __future__ import annotations

import asyncio
import errno
import ssl

import aiormq.exceptions
import pytest
from aiormq.abc import TaskWrapper
from aiormq.connection import FrameReceiver
from pamqp import commands, frame
from yarl import URL

from fluffle_common.errors import BrokerError, LinkLost
from fluffle_common.transport.base import (
    AccessRefused,
    OtherArguments,
    QueueInUse,
    UnknownQueueType,
)
from fluffle_common.transport.rabbitmq.connect_errors import WrongNode, handshake_error, tls_error
from fluffle_common.transport.rabbitmq.connection import Connection
from fluffle_common.transport.rabbitmq.errors import (
    closing_error,
    error_for_reply,
    error_text,
    map_declare_errors,
    map_exceptions,
)
from fluffle_common.transport.rabbitmq.lifetime import Lifetime
from fluffle_common.transport.rabbitmq.transport import AmqpTransport

PATIENCE_S = 60.0
NODE = URL("amqps://w:open-sesame@node.example:5671/v")


@pytest.mark.parametrize(
    "text",
    [
        "ACCESS_REFUSED - queue 'f.inbox.w' in vhost '/' in exclusive use",
        "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'f.lock.inbox.w' in "
        "vhost '/'. It could be originally declared on another connection",
    ],
)
def test_only_exclusive_use_by_another_is_queue_in_use(text):
    assert isinstance(error_for_reply(text, "w", "read"), QueueInUse)


@pytest.mark.parametrize(
    ("text", "right", "expected"),
    [
        (
            "ACCESS_REFUSED - access to queue 'f.updates' in vhost '/' refused for user 'w'",
            "configure",
            "user 'w' configure queue 'f.updates' in vhost '/'",
        ),
        (  # RabbitMQ 4 names the right itself
            "ACCESS_REFUSED - read access to exchange 'f.work' in vhost 'v' refused for user 'w'",
            "bind",
            "user 'w' read exchange 'f.work' in vhost 'v'",
        ),
        (
            "ACCESS_REFUSED - access to queue 'f.inbox.x' in vhost '/' refused for user 'w'",
            "bind",
            "user 'w' write queue 'f.inbox.x'",
        ),
        (
            "ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'w'",
            None,
            "user 'w' write exchange 'amq.default'",
        ),
        (
            "ACCESS_REFUSED - access to topic 'update.x' in exchange 'f.results' in vhost '/' "
            "refused for user 'w'",
            None,
            "user 'w' write the routing key 'update.x' in exchange 'f.results'",
        ),
        ("ACCESS_REFUSED - whatever a broker of another make says", None, "another make says"),
    ],
)
def test_a_missing_permission_names_the_user_the_entity_and_the_action(text, right, expected):
    error = error_for_reply(text, "w", right)
    assert isinstance(error, BrokerError)
    assert expected in str(error)
    assert "fluffle broker permissions" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "PRECONDITION_FAILED - message size 4195000 is larger than configured max size 1048576",
            ["4,195,000", "1,048,576", "max_message_size"],
        ),
        (
            "PRECONDITION_FAILED - message size 4195000 is larger than max size 1048576",
            ["max_message_size"],
        ),
        (
            "PRECONDITION_FAILED - cannot declare queue 'x': queue limit in vhost 'v' (0) is "
            "reached",
            ["queue limit in vhost 'v' (0)", "set_vhost_limits"],
        ),
        (
            "PRECONDITION_FAILED - user_id property set to 'w' but authenticated user was 'CN=w'",
            ["sends messages as user 'w'", "in --url, give the user 'CN=w'"],
        ),
    ],
)
def test_a_limit_is_named_with_the_remedy(text, expected):
    error = error_for_reply(text, "w", "write")
    assert isinstance(error, BrokerError)
    assert all(one in str(error) for one in expected)


@pytest.mark.parametrize(
    "text",
    [
        "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'",
        "INTERNAL_ERROR - access to vhost '/' refused for user 'w': vhost '/' is down",
        "RESOURCE_ERROR - out of something",
        "PRECONDITION_FAILED - delivery acknowledgement on channel 3 timed out",
        "NOT_FOUND - no exchange 'f.results' in vhost '/'",
    ],
)
def test_a_temporary_error_is_a_lost_link(text):
    assert isinstance(error_for_reply(text, "w", "read"), LinkLost)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("PRECONDITION_FAILED - inequivalent arg 'x-expires' for queue 'q'", OtherArguments),
        (
            "PRECONDITION_FAILED - invalid arg 'x-queue-type' for queue 'q' in vhost '/': "
            "\"unsupported queue type 'stream'\"",
            UnknownQueueType,
        ),
        ("NOT_IMPLEMENTED - queue type stream", UnknownQueueType),
        (
            "INTERNAL_ERROR - Cannot declare a queue 'queue 's' in vhost '/'' of type "
            "'rabbit_stream_queue' on node 'n@h': the corresponding feature flag is disabled",
            UnknownQueueType,
        ),
        ("INTERNAL_ERROR", LinkLost),
    ],
)
def test_declaring_distinguishes_arguments_from_queue_types(text, error):
    with pytest.raises(error), map_declare_errors(), map_exceptions("w", "configure"):
        raise aiormq.exceptions.ChannelClosed(0, text)


@pytest.mark.parametrize(
    ("argument", "what", "expected"),
    [
        ("x-queue-type", "queue", "use the same --queue-type for the"),
        ("type", "exchange", "^exchange 'f.updates' already exists .*; delete the exchange"),
        (
            "x-max-length-bytes",
            "queue",
            "already exists with different arguments.* 'rabbitmqctl delete_queue f.updates'",
        ),
    ],
)
def test_an_entity_with_different_arguments_is_named_with_the_remedy(argument, what, expected):
    text = (
        f"PRECONDITION_FAILED - inequivalent arg '{argument}' for {what} 'f.updates' in vhost '/'"
    )
    with (
        pytest.raises(OtherArguments, match=expected),
        map_declare_errors(),
        map_exceptions("w", "configure"),
    ):
        raise aiormq.exceptions.ChannelClosed(406, text)


def test_our_own_runtime_error_is_not_a_lost_link():
    with pytest.raises(RuntimeError, match="a mistake"), map_exceptions():
        raise RuntimeError("a mistake of ours")
    with pytest.raises(NotImplementedError), map_exceptions():
        raise NotImplementedError


async def test_a_runtime_error_of_a_closed_connection_is_a_lost_link():
    from fluffle_common.transport.rabbitmq.connection import Connection

    connection = Connection(URL("amqp://nowhere/"), "test")
    with pytest.raises(LinkLost, match="not opened"), map_exceptions():
        connection.channel()
    await connection.close()


async def test_a_bare_exception_of_a_closed_connection_is_a_lost_link():
    request = TaskWrapper(asyncio.create_task(asyncio.sleep(PATIENCE_S)))
    await asyncio.sleep(0)
    request.throw(Exception)  # as if the connection closed right after the handshake
    with pytest.raises(LinkLost, match="^the connection was closed$"), map_exceptions():
        await request
    with pytest.raises(Exception, match="a mistake"), map_exceptions():
        raise Exception("a mistake of ours")


async def test_a_connection_that_is_closed_before_the_handshake_is_a_lost_link(monkeypatch):
    async def connect(*_: object) -> None:
        reader = asyncio.StreamReader()
        reader.feed_eof()
        await FrameReceiver(reader).get_frame()

    monkeypatch.setattr(Connection, "connect", connect)
    with pytest.raises(LinkLost, match="^the connection was closed$"):
        await AmqpTransport("amqp://127.0.0.1:1/", "test").open()


async def test_a_permission_that_is_withdrawn_is_named_with_one_remedy():
    lifetime = Lifetime("w", lambda: None)
    text = "ACCESS_REFUSED - access to exchange 'f.work' in vhost '/' refused for user 'w'"
    lifetime.lose(None, aiormq.exceptions.ChannelAccessRefused(text))
    with pytest.raises(AccessRefused) as refused:
        await lifetime.lost()
    assert "user 'w' " in refused.value.lacking
    assert str(refused.value).count("grant the permissions") == 1


def test_missed_heartbeats_are_a_lost_link_in_words():
    why = closing_error(asyncio.CancelledError())  # aiormq gives no other reason
    assert isinstance(why, LinkLost)
    assert str(why) == "the broker does not answer"


def test_texts_of_errors_are_one_line_without_credentials():
    error = RuntimeError("<Connection: 'amqp://me:open-se@same@node/v'>\n closed")
    assert error_text(error) == "<Connection: 'amqp://node/v'> closed"
    assert error_text(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize(
    "form", ["{0} {1}", "Multiple exceptions: [Errno {0}] {1}, [Errno {0}] {1}"]
)
def test_a_refused_connection_is_told_in_the_words_of_the_system(form):
    text = form.format(errno.ECONNREFUSED, "Connect call failed ('::1', 5672, 0, 0)")
    assert error_text(OSError(text)) == f"{errno.ECONNREFUSED} Connection refused"


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (403, "ACCESS_REFUSED - Login was refused", ["user 'w'", "password", "--url"]),
        (530, "NOT_ALLOWED - vhost v not found", ["no vhost 'v'", "add_vhost"]),
        (530, "NOT_ALLOWED - access to vhost 'v' refused for user 'w'", ["access to vhost 'v'"]),
        (
            530,
            "NOT_ALLOWED - access to vhost 'v' refused for user 'w': connection limit (1) is "
            "reached",
            ["connection limit (1)", "set_vhost_limits"],
        ),
    ],
)
def test_a_refused_connection_names_the_remedy(code, text, expected):
    error = handshake_error(code, text, NODE, was_connected=False)
    assert isinstance(error, BrokerError)
    assert all(one in str(error) for one in expected)
    assert "open-sesame" not in str(error)


def test_a_refused_certificate_is_not_called_a_wrong_password():
    url = NODE.with_user(None).update_query(auth="external")
    error = handshake_error(403, "ACCESS_REFUSED - Login was refused", url, was_connected=False)
    assert isinstance(error, BrokerError)
    assert "no user for this client certificate" in str(error)
    assert "password" not in str(error)


def test_a_connection_limit_after_a_reconnect_is_retried():
    text = "NOT_ALLOWED - access to vhost 'v' refused for user 'w': connection limit (2) is reached"
    assert isinstance(handshake_error(530, text, NODE, was_connected=True), LinkLost)


def test_a_starting_broker_is_retried():
    text = "INTERNAL_ERROR - access to vhost 'v' refused for user 'w': vhost 'v' is down"
    assert isinstance(handshake_error(541, text, NODE, was_connected=False), LinkLost)


def ssl_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL: {reason}] something (_ssl.c:1)")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("WRONG_VERSION_NUMBER", "amqp://"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "certfile"),
        ("TLSV1_ALERT_UNKNOWN_CA", "certfile"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "certfile"),  # TLS 1.2 without the client's certificate
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "TLS 1.2"),
        ("TLSV1_ALERT_PROTOCOL_VERSION", "TLS 1.2"),
    ],
)
def test_a_failed_tls_handshake_names_the_cause(reason, expected):
    wrapped = ConnectionError("Server communication error")
    wrapped.__cause__ = ssl_error(reason)
    for error in (ssl_error(reason), wrapped):
        refusal = tls_error(error, NODE)
        assert isinstance(refusal, WrongNode)
        assert expected in str(refusal)
        assert "open-sesame" not in str(refusal)


def test_a_certificate_that_cannot_be_verified_is_reported_in_the_words_of_openssl():
    refused = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED]")
    refused.verify_code = 92
    refused.verify_message = "CA cert does not include key usage extension"
    said = str(tls_error(refused, URL("amqps://host/")))
    assert "cannot be verified (CA cert does not include key usage extension)" in said


@pytest.mark.parametrize("error", [OSError("no route"), ssl_error("UNEXPECTED_EOF_WHILE_READING")])
def test_a_broken_connection_is_not_a_tls_error(error):
    assert tls_error(error, NODE) is None


async def test_a_broker_without_the_login_mechanism_is_an_error_at_once():
    async def serve(reader, writer):
        await reader.readexactly(8)
        writer.write(frame.marshal(commands.Connection.Start(mechanisms="EXTERNAL SCRAM"), 0))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BrokerError, match="it offers EXTERNAL SCRAM"):
            async with asyncio.timeout(PATIENCE_S):
                await AmqpTransport(f"amqp://127.0.0.1:{port}", "w").open()
