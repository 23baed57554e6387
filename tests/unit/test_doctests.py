"""The examples in the docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIDES = ("broker", "common", "coordinator", "worker")


def _with_examples() -> list[str]:
    found = []
    for base, folder in ((ROOT, "fluffle"), *((ROOT / side, f"fluffle_{side}") for side in SIDES)):
        for path in sorted((base / folder).rglob("*.py")):
            if ">>> " in path.read_text():
                name = ".".join(path.relative_to(base).with_suffix("").parts)
                found.append(name.removesuffix(".__init__"))
    return found


MODULES = _with_examples()


def test_the_modules_with_examples_are_found():
    assert {
        "fluffle_common.tensors.weights",
        "fluffle_coordinator.storage.round_stats",
        "fluffle_coordinator.machine.rules",
        "fluffle_coordinator.strategy.fedavg",
        "fluffle_worker.cli",
        "fluffle_worker.letters.images",
    } <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
