"""The examples, run as their docstrings say."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.numpy_regression import INTERCEPT, SLOPES
from tests.e2e.programs import ROOT, Federation

pytestmark = pytest.mark.rabbit


def test_numpy_regression_finds_the_slopes(federation: Federation) -> None:
    coordinator = federation.coordinator(
        "--quorum", 3, "--rounds", 10, "--config", "learning_rate=0.3"
    )
    workers = [federation.worker(f"shard:{n}/3") for n in range(3)]
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0, 0]
    found = load_file(federation.run / "round-0010.safetensors")
    np.testing.assert_allclose(found["slopes"], SLOPES, atol=0.05)
    np.testing.assert_allclose(found["intercept"], INTERCEPT, atol=0.05)


def test_digits_are_learnt(federation: Federation) -> None:
    task = f"{ROOT / 'examples/digits.py'}:task"
    coordinator = federation.coordinator("--quorum", 2, "--rounds", 8, "--epochs", 3)
    workers = [federation.worker(f"shard:{n}/2", task=task) for n in range(2)]
    assert [program.end() for program in (coordinator, *workers)] == [0, 0, 0]
    lines = map(json.loads, (federation.run / "history.jsonl").read_text().splitlines())
    last = [line for line in lines if line["event"] == "evaluated"][-1]
    assert last["round"] == 8
    assert last["accuracy"] > 0.85  # of 178 held-out digits; guessing would be right on 0.1
