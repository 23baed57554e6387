"""The benchmark of whole rounds starts, with the options that today's programs take."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.e2e.programs import PATIENCE_S

pytestmark = pytest.mark.rabbit


def test_rounds_are_measured_beside_the_floor():
    command = "-m benchmarks.rounds --json --size-mb 0.01 --workers 2 --rounds 2 --blocks 1"
    done = subprocess.run(
        [sys.executable, *command.split()],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        check=False,
    )
    assert not done.returncode, done.stderr
    results = json.loads(done.stdout)
    assert len(results["fluffle"]["times_s"]) == len(results["floor"]["times_s"]) == 2
    assert results["workers"] == 2
