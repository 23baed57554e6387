"""The address of the broker that a process uses."""

from __future__ import annotations

import json

from fluffle_common.cli.settings import DEFAULT_URL, broker_url_finder


def test_the_address_of_a_private_broker_stays_known_while_the_broker_is_down(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("FLUFFLE_STATE", str(tmp_path))
    record = tmp_path / "broker" / "node.json"
    record.parent.mkdir()

    def up(url: str) -> None:
        record.write_text(json.dumps({"url": url}))

    find = broker_url_finder(None)
    assert find() == DEFAULT_URL
    up("amqp://127.0.0.1:5673/")  # it may start later than the process
    assert find() == "amqp://127.0.0.1:5673/"
    for damaged in ("", "null", "[]"):
        record.write_text(damaged)
        assert find() == "amqp://127.0.0.1:5673/"
    record.unlink()
    assert find() == "amqp://127.0.0.1:5673/"
    up("amqp://127.0.0.1:5999/")
    assert find() == "amqp://127.0.0.1:5999/"
    assert broker_url_finder("amqp://elsewhere/")() == "amqp://elsewhere/"
