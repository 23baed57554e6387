"""A short chaos run of a whole federation, judged by the independent checker."""

from pathlib import Path

import pytest

from tests.faults.chaos import rain
from tests.faults.fault_sequence import KINDS, fault_sequence

pytestmark = pytest.mark.rabbit


def test_one_fault_of_each_kind(tmp_path: Path) -> None:
    lines: list[str] = []
    verdict = rain(faults=len(KINDS), seed=1666, rounds=8, folder=tmp_path, say=lines.append)
    assert verdict.clean, "\n".join([*lines, verdict.text()])
    assert len(lines) == len(KINDS) == 12
    assert verdict.figures["rounds"] >= 8


def test_the_seed_alone_determines_the_faults() -> None:
    assert sum(KINDS.values()) == 100
    assert fault_sequence(7, 100) == fault_sequence(7, 100) != fault_sequence(8, 100)
    assert {fault.kind for fault in fault_sequence(3, len(KINDS))} == set(KINDS)
