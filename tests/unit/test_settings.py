"""The addresses of the broker that a process uses."""

from __future__ import annotations

import json

import pytest

from fluffle_common.cli.settings import DEFAULT_URL, broker_url_finder, management_finder


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


def test_a_private_broker_that_starts_late_is_found_after_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FLUFFLE_STATE", raising=False)
    monkeypatch.chdir(tmp_path)
    find = broker_url_finder(None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # as the file of a task may
    record = tmp_path / ".fluffle" / "broker" / "node.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"url": "amqp://127.0.0.1:5673/"}))
    assert find() == "amqp://127.0.0.1:5673/"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("amqp://127.0.0.1:5673", "http://127.0.0.1:15700"),
        ("amqp://w1:pw@localhost:5673/v", "http://127.0.0.1:15700"),
        ("amqp://127.0.0.1:5672/", "http://127.0.0.1:15672"),
        ("amqp://localhost", "http://localhost:15672"),
        ("amqp://h:5673/", "http://h:15672"),
    ],
)
def test_the_private_broker_has_its_own_management_api(tmp_path, monkeypatch, url, expected):
    monkeypatch.setenv("FLUFFLE_STATE", str(tmp_path))
    assert management_finder(None)("amqp://h:5673/").base == "http://h:15672"
    record = {"url": "amqp://guest:guest@127.0.0.1:5673/"}
    record["management_url"] = "http://127.0.0.1:15700/"
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "node.json").write_text(json.dumps(record))
    assert management_finder(None)(url).base == expected
    assert management_finder("http://m:2/")(url).base == "http://m:2"
