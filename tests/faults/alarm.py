"""Raises a broker's memory alarm, during which it reads nothing from publishers."""

from __future__ import annotations

import base64
import contextlib
import http.client
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator

from fluffle_broker.node import node
from tests.faults.harness import PATIENCE_S, wait_until

_TINY, _USUAL = "0.0001", "0.4"  # memory watermarks; the usual one as in broker/rabbitmq.conf


@contextlib.contextmanager
def memory_alarm(broker: node.NodeInfo) -> Iterator[None]:
    """Keep a broker on this machine in a memory alarm."""
    try:
        _allow(broker, _TINY)
        wait_until(lambda: _is_alarmed(broker), "the broker raises its memory alarm")
        yield
    finally:
        _allow(broker, _USUAL)
    wait_until(lambda: not _is_alarmed(broker), "the broker clears its memory alarm")


def _allow(broker: node.NodeInfo, share: str) -> None:
    words = [str(broker.folder / "rabbitmqctl"), "set_vm_memory_high_watermark", share]
    subprocess.run(words, check=True, capture_output=True, timeout=PATIENCE_S)


def _is_alarmed(broker: node.NodeInfo) -> bool:
    login = base64.b64encode(b"guest:guest").decode()
    asked = urllib.request.Request(
        f"{broker.management_url}api/health/checks/alarms",
        headers={"Authorization": f"Basic {login}"},
    )
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE_S):
            return False
    except urllib.error.HTTPError as answer:
        with answer:  # else Python 3.14 warns
            if answer.code != http.client.SERVICE_UNAVAILABLE:
                raise
        return True
