"""Fixtures: federations of real processes on the session's broker or on their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fluffle_broker.node import node, record
from fluffle_common.errors import BrokerError
from tests.faults.harness import Federation

_TIMEOUT_MS = 5000
_CONF = f"consumer_timeout = {_TIMEOUT_MS}"


@dataclass
class OwnBroker:
    """A broker that a test may kill."""

    state: Path
    info: node.NodeInfo

    def kill(self) -> None:
        """Kill it with ``kill -9``."""
        assert self.info.pid is not None
        os.kill(self.info.pid, signal.SIGKILL)

    def start(self) -> None:
        """Start it again with the same data and ports."""
        self.info = node.up(self.state, ports=self.info.ports, extra_conf=_CONF)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Let channels that are opened meanwhile wait for acknowledgements as long as usual."""
        self._wait_for_acknowledgements(1_800_000)
        try:
            yield
        finally:
            self._wait_for_acknowledgements(_TIMEOUT_MS)

    def _wait_for_acknowledgements(self, milliseconds: int) -> None:
        told = f"application:set_env(rabbit, consumer_timeout, {milliseconds})."
        subprocess.run(
            [self.info.folder / "rabbitmqctl", "eval", told], check=True, capture_output=True
        )


@pytest.fixture(scope="module")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnBroker]:
    """Run a broker with a delivery acknowledgement timeout of 5 s, checked every second."""
    state = tmp_path_factory.mktemp("own")
    etc = record.broker_folder(state) / "etc"
    etc.mkdir(parents=True)
    # The interval of that check, which rabbitmq.conf cannot set.
    (etc / "advanced.config").write_text("[{rabbit, [{channel_tick_interval, 1000}]}].\n")
    try:
        info = node.up(state, ports=node.Ports(0, 0, 0, 0, 0), extra_conf=_CONF)
    except BrokerError as why:
        pytest.skip(f"NOT TESTED against a broker that is killed, none can be started: {why}")
    try:
        yield OwnBroker(state, info)
    finally:
        node.down(state, grace_s=0)


@pytest.fixture
def federation(broker_node: node.NodeInfo, tmp_path: Path) -> Iterator[Federation]:
    """Yield a federation on the session's broker."""
    with Federation(tmp_path, broker_node.url, broker_node.ports.management) as made:
        yield made


@pytest.fixture
def own_federation(own_broker: OwnBroker, tmp_path: Path) -> Iterator[Federation]:
    """Yield a federation on its own broker."""
    info = own_broker.info
    with Federation(tmp_path, info.url, info.ports.management) as made:
        yield made
