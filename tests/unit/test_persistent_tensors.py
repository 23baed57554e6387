"""Tensors kept between rounds, in memory and on disk."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import numpy as np
import pytest

from fluffle_common.errors import TaskError
from fluffle_worker.local import persistent_tensors
from fluffle_worker.local.bound import BoundRule
from fluffle_worker.local.persistent_tensors import PersistentTensors, keep_in


@pytest.mark.parametrize("restarts", [False, True])
def test_each_round_begins_with_what_the_one_before_it_kept(tmp_path, restarts):
    folder = tmp_path / "letters" / "a"
    known = PersistentTensors(folder)

    def keep(run: str, number: int) -> float | None:
        nonlocal known
        if restarts:
            known = PersistentTensors(folder)
        before = known.before((run, number, number))
        known.keep(
            (run, number, number), {"c": np.array(float(number)), "d": np.ones((2, 3), np.float32)}
        )
        return float(before["c"]) if before else None

    assert keep("r", 1) is None
    assert keep("r", 2) == 1
    assert keep("r", 2) == 1  # trained again
    assert keep("r", 5) == 2
    assert keep("r", 4) == 2  # the run went back
    assert keep("r", 6) == 4
    assert keep("r", 7) == 6
    assert keep("r", 6) == 4  # the run went back while round 7 was open
    assert keep("r", 7) == 6
    assert len(list(folder.iterdir())) == 3
    assert keep("another", 6) is None
    assert [one.name for one in folder.iterdir()] == ["local-rule-0006.safetensors"]


def test_a_run_restored_from_an_old_backup_goes_on_with_the_oldest_tensors_that_are_left(
    tmp_path, capsys
):
    known = PersistentTensors(tmp_path)
    known.keep(("r", 4, 4), {"c": np.array(4.0)})
    assert known.before(("r", 3, 3)) == known.before(("r", 4, 4)) == {}  # 4 was the first
    for number in (5, 6):
        known.keep(("r", number, number), {"c": np.array(float(number))})
    assert not capsys.readouterr().err
    assert known.before(("r", 2, 2)) == {"c": 4.0}
    assert "went back to round 2" in (said := capsys.readouterr().err)
    assert "continues with its oldest state, of round 4" in " ".join(said.split())
    assert known.before(("another", 2, 2)) == {}


def test_rounds_of_more_digits_come_after_those_of_fewer(tmp_path):
    for number in (9999, 10000, 10001):
        PersistentTensors(tmp_path).keep(("r", number, number), {"c": np.array(float(number))})
    assert PersistentTensors(tmp_path).before(("r", 10001, 10001)) == {"c": 10000.0}


def test_a_rule_that_keeps_nothing_makes_no_folder(tmp_path):
    known = PersistentTensors(tmp_path / "a")
    assert known.before(("r", 1, 1)) == {}
    known.keep(("r", 1, 1), {})
    assert not (tmp_path / "a").exists()


def test_a_round_that_keeps_nothing_is_not_taken_for_the_one_before(tmp_path):
    PersistentTensors(tmp_path).keep(("r", 1, 1), {"c": np.ones(1)})
    known = PersistentTensors(tmp_path)
    known.keep(("r", 2, 2), {})
    assert known.before(("r", 3, 3)) == {}


def test_a_damaged_file_is_named_with_the_remedy(tmp_path):
    PersistentTensors(tmp_path).keep(("r", 1, 1), {"c": np.ones(100)})
    (path,) = tmp_path.iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(TaskError, match=f"is damaged: .*; remove {path} to continue") as wrong:
        PersistentTensors(tmp_path).before(("r", 2, 2))
    assert "\n" not in str(wrong.value)


def test_a_full_disk_is_a_task_error_with_the_remedy(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(persistent_tensors, "save_checkpoint", full)
    with pytest.raises(TaskError, match=r"\(No space left on device\).*--state-dir"):
        PersistentTensors(tmp_path).keep(("r", 1, 1), {"c": np.ones(1)})


def test_what_no_file_can_hold_is_refused_in_memory_too():
    class Keeps:
        def begin(self, *_):
            return None

        def gradient(self, gradient, weights, state):
            return gradient, state

        def end(self, trained, state):
            return {"seen": np.array([True])}

    with pytest.raises(TaskError, match=r"end\(\) of .* cannot be kept: tensor 'seen' is bool"):
        BoundRule(Keeps()).end({}, None)


def test_a_task_that_cannot_keep_its_state_is_named_with_the_place(tmp_path):
    def fails(folder):
        raise OSError("full")

    message = r"^keep_in\(\) of the task t fails: OSError: full \(test_persistent_tensors.py:"
    with pytest.raises(TaskError, match=message):
        keep_in(tmp_path, "t", SimpleNamespace(keep_in=fails))


@pytest.mark.parametrize("restarts", [False, True])
def test_an_asynchronous_run_that_becomes_synchronous_goes_on_with_what_was_kept(
    tmp_path, restarts
):
    known = PersistentTensors(tmp_path)

    def keep(number: int, sequence: int) -> float | None:
        nonlocal known
        if restarts:
            known = PersistentTensors(tmp_path)
        before = known.before(("r", number, sequence))
        known.keep(("r", number, sequence), {"c": np.array(float(sequence))})
        assert known.latest("r") == {"c": float(sequence)}
        return float(before["c"]) if before else None

    assert keep(3, 10_005) is None
    assert keep(3, 10_006) == 10_005
    assert keep(4, 4) == 10_006
    assert keep(4, 4) == 10_006  # trained again
    assert keep(5, 20_001) == 4  # asynchronous again
    assert keep(5, 20_002) == 20_001
    assert keep(4, 30_001) == 20_002  # the run went back a round
    assert [keep(4, 30_001 + more) for more in (1, 2)] == [30_001, 30_002]
    assert keep(4, 4) == 30_003  # synchronous again, in the same round
    assert keep(4, 4) == 30_003
    assert keep(5, 5) == 4
