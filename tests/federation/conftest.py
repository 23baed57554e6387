from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from fluffle_common.protocol import wire_format
from fluffle_coordinator.service import outbox
from tests.federation.harness import Scenario, play


@pytest.fixture
def federated(tmp_path, monkeypatch) -> Callable[[Scenario], None]:
    """Return a function that plays a scenario in virtual time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test loses power, and fsync is slow
    return lambda scenario: play(
        scenario, tmp_path, lambda clock: monkeypatch.setattr(time, "monotonic", clock)
    )


@pytest.fixture
def in_parts(monkeypatch, request) -> None:
    """Send the harness's models in parts; tests may be parametrized with False."""
    if getattr(request, "param", True):
        _send_in_parts_of(8, monkeypatch)


@pytest.fixture
def in_small_parts(monkeypatch) -> None:
    """Send models of more than 16 KiB in parts, as larger ones are."""
    _send_in_parts_of(2**14, monkeypatch)


def _send_in_parts_of(size_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (wire_format, outbox):
        monkeypatch.setattr(module, "PART_BYTES", size_bytes)
