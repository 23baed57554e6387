from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.federation.harness import Scenario, play


@pytest.fixture
def federated(tmp_path, monkeypatch) -> Callable[[Scenario], None]:
    """Return a function that lets a scenario happen, in time of its own."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is lost here
    return lambda scenario: play(
        scenario, tmp_path, lambda clock: monkeypatch.setattr(time, "monotonic", clock)
    )
