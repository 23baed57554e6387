from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.federation.harness import Scenario, play


@pytest.fixture
def federated(tmp_path, monkeypatch) -> Callable[[Scenario], None]:
    """Return a function that plays a scenario in virtual time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test loses power, and fsync is slow
    return lambda scenario: play(
        scenario, tmp_path, lambda clock: monkeypatch.setattr(time, "monotonic", clock)
    )
