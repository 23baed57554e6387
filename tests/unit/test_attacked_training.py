"""Training on real images with two attackers among ten workers."""

from __future__ import annotations

import pytest

from benchmarks.algorithms import accuracies


@pytest.fixture(scope="module")
def clean():
    """Return the accuracy of FedAvg without an attack."""
    accuracy = accuracies("fedavg", "digits", "iid", rounds=10)[-1]
    assert accuracy > 0.85
    return accuracy


@pytest.mark.parametrize(
    "name", ["median", "trimmed:0.2", "krum:f=2", "multikrum:f=2,m=4", "rfa", "clip:1+median"]
)
def test_two_of_ten_workers_that_send_flipped_updates_are_withstood(clean, name):
    assert accuracies(name, "digits", "attacked", rounds=10)[-1] >= 0.9 * clean


def test_fedavg_does_not_withstand_them(clean):
    assert accuracies("fedavg", "digits", "attacked", rounds=10)[-1] < 0.9 * clean
