"""The run folder after a crash, on a full disk, and with a second coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fluffle
from fluffle.run_folder import RunFolder
from fluffle_common.errors import RunError, UsageError
from fluffle_common.protocol.events import RunEvent
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors import checkpoint
from fluffle_common.tensors.checkpoint import checkpoint_name, read_checkpoint, save_checkpoint
from fluffle_common.tensors.layout import layout_for
from fluffle_coordinator.dashboard.report import read_report
from fluffle_coordinator.machine.state import Rules
from fluffle_coordinator.observe.watchers import Watcher, Watchers
from fluffle_coordinator.service.run_opening import (
    _lock,
    begin_with,
    first_state,
    open_run,
    read_first_model,
)
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage import run_checkpoints, run_file
from fluffle_coordinator.storage.history import check_line, read_history
from fluffle_coordinator.storage.round_stats import evaluation_metrics
from fluffle_coordinator.storage.run_file import count_start, read_run_file, write_run_file
from fluffle_coordinator.storage.run_store import RunStore, Saved
from fluffle_coordinator.storage.update_archive import keep_update, update_path
from tests import history_lines
from tests.history_lines import RUN, ended, evaluated, participant


def weights(value: float) -> dict[str, np.ndarray]:
    return {
        "w": np.full((2, 3), value, np.float32),
        "s": np.array(value, np.float64),
        "h": np.array([value], np.float16),
        "n": np.array([int(value)], np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }


def assert_weights(got: Any, value: float) -> None:
    expected = weights(value)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        assert got[name].tobytes() == array.tobytes()


def participants_of(saved: Saved) -> frozenset[str]:
    """The participants of the last committed round."""
    line = next((x for x in reversed(saved.lines) if x["event"] == "committed"), None)
    assert (line["round"] if line else 0) == saved.committed
    return frozenset(who["worker"] for who in line["participants"]) if line else frozenset()


def committed(number: int, *workers: str) -> dict[str, Any]:
    return history_lines.committed(number, *map(participant, workers))


def metadata(number: int) -> dict[str, str]:
    return {"run": RUN, "round": str(number), "base": f"base{number}"}


def commit(store: RunStore, number: int) -> None:
    store.save_weights(number, weights(number), metadata(number))
    store.history.append(committed(number, "a", f"b{number}"))


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = RunStore(tmp_path / "runs" / "letters")
    write_run_file(store.folder, {"run": RUN, "federation": "letters"})
    return store


@pytest.fixture
def three(store: RunStore) -> RunStore:
    """Make a run with first weights and three committed rounds."""
    store.load("letters")
    store.save_weights(0, weights(0), metadata(0))
    for number in (1, 2, 3):
        commit(store, number)
    return store


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextlib.contextmanager
def room(size_bytes: int) -> Iterator[None]:
    """Limit the size of files: the system writes up to it, and then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_fsync(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- checkpoints -------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit_with_its_metadata(tmp_path):
    path = tmp_path / checkpoint_name(7)
    assert path.name == "round-0007.safetensors"
    save_checkpoint(path, weights(2.5), {"round": "7"})
    got, metadata = read_checkpoint(path)
    assert_weights(got, 2.5)
    assert metadata == {"round": "7"}
    assert names(tmp_path) == {path.name}


def test_an_array_of_any_memory_layout_is_saved_by_its_values(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    odd = {
        "T": np.ascontiguousarray(array.T).T,
        "reversed": array[:, ::-1],
        "big": array.astype(">f4"),
        "spread": np.broadcast_to(np.float32(3), (2, 2)),
    }
    save_checkpoint(tmp_path / "m", odd, {})
    got, _ = read_checkpoint(tmp_path / "m")
    assert {name: value.tolist() for name, value in got.items()} == {
        name: value.tolist() for name, value in odd.items()
    }


def test_safetensors_reads_a_checkpoint_with_all_tensors_aligned(tmp_path):
    """Its reader rejects tensors that overlap, leave gaps, or do not fill the file."""
    odd = {
        "bytes": np.arange(3, dtype=np.uint8),
        'a "name"/ü': np.arange(5, dtype=np.float64),
        "none": np.empty((0, 4), np.float32),
        "one": np.float16(1.5).reshape(()),
        "counts": np.array([[1, -2]], np.int64),
    }
    tensors = layout_for(odd).empty()
    for name, value in odd.items():
        tensors[name][...] = value
    for saved in (odd, tensors):  # tensor by tensor, and in one piece
        save_checkpoint(tmp_path / "m", saved, {"task": "ü"})
        got = load_file(tmp_path / "m")
        assert got.keys() == odd.keys()
        for name, value in odd.items():
            assert got[name].dtype == value.dtype
            assert got[name].tolist() == value.tolist()
        data = (tmp_path / "m").read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                start = 8 + size + about["data_offsets"][0]
                assert start % odd[name].dtype.itemsize == 0


@pytest.mark.parametrize("value", [1, 2])
@pytest.mark.parametrize("named_first", [False, True])
@pytest.mark.parametrize("when", ["while writing", "at fsync", "at rename", "interrupted"])
def test_a_disk_that_refuses_leaves_the_old_checkpoint_whole(
    tmp_path, monkeypatch, when, value, named_first
):
    path = tmp_path / "model"
    if value == 2:
        save_checkpoint(path, weights(1), {})
    before = path.read_bytes() if path.exists() else None
    if when == "while writing":
        with room(100), pytest.raises(OSError, match="(?i)too large|space"):
            save_checkpoint(path, weights(9), {}, named_first=named_first)
    elif when == "interrupted":
        monkeypatch.setattr(checkpoint.os, "fsync", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, weights(9), {}, named_first=named_first)
    else:
        if when == "at fsync":
            monkeypatch.setattr(checkpoint.os, "fsync", no_fsync)
        else:
            monkeypatch.setattr(checkpoint.os, "replace", lambda *_: no_fsync(0))
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(path, weights(9), {}, named_first=named_first)
    assert names(tmp_path) == ({"model"} if before else set())
    if before:
        assert path.read_bytes() == before
    monkeypatch.undo()
    save_checkpoint(path, weights(9), {}, named_first=named_first)
    assert_weights(read_checkpoint(path)[0], 9)


def _interrupt(_: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("number", "order_of_it"),
    [
        (0, ["fsync {}.partial", "rename {}.partial {}", "fsync folder"]),
        (1, ["rename {}.partial {}", "fsync {}", "fsync folder"]),
    ],
)
def test_a_checkpoint_and_its_name_are_on_disk_when_it_is_saved(
    tmp_path, monkeypatch, number, order_of_it
):
    store = RunStore(tmp_path / "folder")
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        what = Path(f"/proc/self/fd/{descriptor}").readlink().name
        order.append(f"fsync {what}")
        fsync(descriptor)

    def noted_replace(source: str, target: str) -> None:
        order.append(f"rename {Path(source).name} {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", noted_fsync)
    monkeypatch.setattr(checkpoint.os, "replace", noted_replace)
    path = store.save_weights(number, weights(1), {})
    assert order == [one.format(path.name, path.name) for one in order_of_it]
    order.clear()
    store.save_weights(number, weights(2), {})  # always complete: either the old or the new one
    assert order[:2] == [f"fsync {path.name}.partial", f"rename {path.name}.partial {path.name}"]


@pytest.mark.parametrize("left", [0, 1, 100])
def test_an_incomplete_checkpoint_that_no_line_names_is_ignored(store, left):
    store.save_weights(0, weights(1), metadata(0))
    commit(store, 1)
    path = store.save_weights(2, weights(3), metadata(2))
    path.write_bytes(path.read_bytes()[:left])
    saved = store.load("letters")
    assert (saved.run, saved.committed, saved.repairs) == (RUN, 1, ())
    store.save_weights(2, weights(3), metadata(2))
    assert_weights(read_checkpoint(path)[0], 3)


LARGE = {"a": np.arange(1_100_000, dtype=np.float32), "b": np.ones(3)}


@pytest.mark.parametrize("tensors", [weights(3), LARGE, {}])
def test_a_checkpoint_carries_the_digest_of_its_file(tmp_path, tensors):
    path = tmp_path / "m"
    save_checkpoint(path, tensors, {"round": "3", "classes": '["a"]'})
    data = path.read_bytes()
    with safe_open(path, "numpy") as file:
        digest = file.metadata()["fluffle_blake3"]
    without = data.replace(digest.encode(), b"0" * 64)
    assert blake3(without).hexdigest() == digest
    got, metadata = read_checkpoint(path)
    assert metadata == {"round": "3", "classes": '["a"]'}
    assert {name: t.tobytes() for name, t in got.items()} == {
        name: t.tobytes() for name, t in tensors.items()
    }


def bits(size: int) -> list[int]:
    """Return the positions of a hundred bits of a file, at both ends and in between."""
    return [*range(8 * 8, 8 * 90, 97), *range(8 * 150, 8 * size, 8 * size // 90), 8 * size - 1]


@pytest.mark.parametrize("tensors", [weights(3), LARGE], ids=["small", "large"])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, tensors):
    path = tmp_path / "m"
    save_checkpoint(path, tensors, {"round": "3", "base": "0123456789ab"})
    whole = path.read_bytes()
    start = whole.index(b'"round"')  # the bytes before say that there is a digest
    flips = [at for at in bits(len(whole)) if at >= 8 * start]
    if tensors is not LARGE:
        flips += range(8 * start, 8 * start + 400)
    flips += range(8 * whole.index(b"blake3") + 51, 8 * start - 32, 11)  # the digest itself
    for at in flips:
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="not a complete model file|is not supported"):
            read_checkpoint(path)
    path.write_bytes(whole)
    read_checkpoint(path)


def test_a_checkpoint_of_an_earlier_version_or_another_program_needs_no_digest(tmp_path):
    save_file({"w": np.ones(3)}, tmp_path / "m", {"round": "3"})
    assert read_checkpoint(tmp_path / "m")[1] == {"round": "3"}
    save_file({"w": np.ones(3)}, tmp_path / "m")
    assert read_checkpoint(tmp_path / "m")[1] == {}


def test_the_digest_of_a_large_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced: list[bytes] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        if (tmp_path / "m.partial").exists():
            synced.append((tmp_path / "m.partial").read_bytes())

    monkeypatch.setattr(checkpoint.os, "fsync", noted)
    save_checkpoint(tmp_path / "m", LARGE, {})
    assert synced[-1] == (tmp_path / "m").read_bytes()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_a_model_file_with_unknown_dtypes_is_refused_in_one_line(tmp_path, dtype):
    header = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UsageError, match=f"tensor 'w' of .* is {dtype}, which is not supported"):
        read_checkpoint(tmp_path / "m")


def test_a_missing_or_damaged_model_file_is_reported_in_one_line(tmp_path):
    path = tmp_path / "m"
    with pytest.raises(UsageError, match="there is no model file"):
        read_checkpoint(path)
    save_checkpoint(path, weights(1), {})
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:-1], whole + b"x", b"\xff" * 100, whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="not a complete model file") as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        read_checkpoint(tmp_path)


# --- loading a run -----------------------------------------------------------------------------


def test_a_new_run_has_an_id_and_nothing_else(store):
    saved = store.load("letters")
    assert (saved.committed, saved.weights, participants_of(saved)) == (0, None, frozenset())
    assert saved.evaluated
    assert saved.repairs == ()
    assert len(saved.run) == 12
    assert store.load("letters").run == saved.run


def test_runs_have_different_ids(tmp_path):
    assert RunStore(tmp_path / "a").load("f").run != RunStore(tmp_path / "b").load("f").run


def test_a_run_continues_where_it_stopped(three):
    saved = three.load("letters")
    assert (saved.committed, saved.evaluated, saved.repairs) == (3, False, ())
    assert participants_of(saved) == {"a", "b3"}
    assert saved.metadata == metadata(3)
    assert_weights(saved.weights, 3)
    three.history.append(evaluated(2, loss=0.5))
    assert not three.load("letters").evaluated
    three.history.append(evaluated(3, loss=0.25))
    assert three.load("letters").evaluated


def test_a_run_with_only_first_weights_has_not_begun(store):
    store.load("letters")
    store.save_weights(0, weights(5), metadata(0))
    saved = store.load("letters")
    assert saved.committed == 0
    assert_weights(saved.weights, 5)


def test_a_checkpoint_without_its_history_line_is_not_a_commit(three):
    # Killed in between: the checkpoint of round 4 exists, and round 4 is repeated.
    three.save_weights(4, weights(99), {})
    saved = three.load("letters")
    assert saved.committed == 3
    assert_weights(saved.weights, 3)
    commit(three, 4)
    assert_weights(three.load("letters").weights, 4)


def test_leftover_partial_files_are_removed(three):
    for name in ("round-0004.safetensors.partial", "run.json.partial"):
        (three.folder / name).write_bytes(b"half")
    (three.folder / "film.mkv.partial").write_bytes(b"of a download")
    saved = three.load("letters")
    assert saved.committed == 3
    assert [x for x in names(three.folder) if x.endswith(".partial")] == ["film.mkv.partial"]


@pytest.mark.parametrize("keep", [1, 20, -1])
def test_a_torn_last_line_is_cut_off(three, keep):
    line = json.dumps(committed(4, "a")) + "\n"
    whole = three.history.path.read_bytes()
    three.history.path.write_bytes(whole + line.encode()[:keep])
    three.save_weights(4, weights(4), {})
    saved = three.load("letters")
    assert saved.committed == 3
    assert_weights(saved.weights, 3)
    assert any("incomplete last line" in repair for repair in saved.repairs)
    assert three.history.path.read_bytes() == whole
    assert three.load("letters").repairs == ()
    commit(three, 4)
    assert three.load("letters").committed == 4


def test_a_run_with_only_a_torn_history_line_has_not_begun(store):
    store.load("letters")
    store.save_weights(0, weights(0), metadata(0))
    store.history.path.write_bytes(b'{"event":"comm')
    saved = store.load("letters")
    assert saved.committed == 0
    assert_weights(saved.weights, 0)
    assert store.history.path.read_bytes() == b""


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "zeros", "one bit"])
@pytest.mark.parametrize("bad", [{3}, {2, 3}, {1, 2, 3}])
def test_damaged_checkpoints_fall_back_to_the_last_readable_one(three, damage, bad):
    three.history.append(evaluated(3, loss=0.5))
    for number in bad:
        path = three.folder / checkpoint_name(number)
        size = path.stat().st_size
        match damage:
            case "truncated":
                path.write_bytes(path.read_bytes()[: size // 2])
            case "empty":
                path.write_bytes(b"")
            case "missing":
                path.unlink()
            case "zeros":
                path.write_bytes(bytes(size))
            case "one bit":
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(data)
    before = three.history.path.read_text()
    last = min(bad) - 1
    saved = three.load("letters")
    assert saved.committed == last
    assert_weights(saved.weights, last)
    assert participants_of(saved) == ({"a", f"b{last}"} if last else set())
    assert saved.evaluated == (last == 0)
    continuing = f"newest intact checkpoint, which belongs to round {last}"
    assert any(continuing in repair for repair in saved.repairs)
    # The history agrees, the removed lines are archived, and the run continues.
    removed = (three.folder / "history.removed.jsonl").read_text()
    assert three.history.path.read_text() + removed == before
    assert [line["round"] for line in three.history.read()[0]] == list(range(1, last + 1))
    again = three.load("letters")
    assert (again.run, again.committed, again.repairs) == (saved.run, last, ())
    commit(three, last + 1)
    assert_weights(three.load("letters").weights, last + 1)


def test_a_checkpoint_that_cannot_be_opened_is_not_a_damaged_one(three):
    path, before = three.folder / checkpoint_name(3), three.history.path.read_bytes()
    path.unlink()
    path.symlink_to(path.name)  # a loop, since root may open any file
    with pytest.raises(OSError, match=f"Too many levels of symbolic links: '{path}'"):
        three.load("letters")
    assert three.history.path.read_bytes() == before
    with pytest.raises(UsageError, match=f"{path} cannot be read .Too many levels"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"round": "1"}, "round 1 of run {run}, not round 3 of run {run}"),
        ({"round": "3", "run": "other"}, "round 3 of run other, not round 3 of run {run}"),
        (
            {"round": "3", "base": "late"},
            "weights with the base late, but history.jsonl names the base base3 for round 3",
        ),
    ],
)
def test_a_copy_of_another_checkpoint_is_a_damaged_one(store, held, says):
    run = store.load("letters").run
    store.save_weights(0, weights(0), {"run": run, "round": "0", "base": "base0"})
    for number in (1, 2, 3):
        about = {"run": run, "base": f"base{number}"}
        store.save_weights(number, weights(number), {**about, "round": str(number)})
        store.history.append({**committed(number, "a"), **about})
    assert store.load("letters").repairs == ()
    store.save_weights(3, weights(1), {"run": run, "base": "base3", **held})
    saved = store.load("letters")
    assert saved.committed == 2
    assert_weights(saved.weights, 2)
    assert (
        f"round-0003.safetensors holds {says.format(run=run)}; continuing from the newest"
        in saved.repairs[0]
    )


def test_the_history_of_another_run_is_refused(three):
    three.history.append({**committed(4, "a"), "run": "other"})
    with pytest.raises(RunError, match=r"belongs to run other, but run\.json belongs to .*--fresh"):
        three.load("letters")


def test_a_private_run_does_not_repeat_rounds_whose_models_were_sent(three):
    three.save_weights(4, weights(4), metadata(4))
    three.history.append({**committed(4, "a"), "epsilon": 0.5, "delta": 1e-5})
    assert three.load("letters").committed == 4
    (three.folder / checkpoint_name(4)).write_bytes(b"rubbish")
    before = {path.name: path.read_bytes() for path in three.folder.iterdir()}
    with pytest.raises(RunError, match=r"round-0004\.safetensors .*; restore the file.*--fresh"):
        three.load("letters")
    assert {path.name: path.read_bytes() for path in three.folder.iterdir()} == before


def test_starts_are_counted_in_the_run_file_and_those_on_a_full_disk_are_not(three, monkeypatch):
    before = read_run_file(three.folder)
    assert [count_start(three.folder) for _ in range(3)] == [0, 1, 2]
    assert read_run_file(three.folder) == {**before, "starts": 3}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_file, "write_run_file", full)
    assert [count_start(three.folder) for _ in range(2)] == [3, 3]


def test_an_older_damaged_checkpoint_does_not_matter(three):
    (three.folder / checkpoint_name(1)).write_bytes(b"")
    assert three.load("letters").committed == 3


def test_a_copy_with_a_date_in_its_name_is_not_searched_for_from_that_number_down(
    three, monkeypatch
):
    (three.folder / "round-20261201.safetensors").write_bytes(
        (three.folder / checkpoint_name(3)).read_bytes()
    )
    looked_for = []

    def read(path: Path) -> checkpoint.Checkpoint:
        looked_for.append(path.name)
        assert len(looked_for) < 10
        return checkpoint.read_whole(path)

    monkeypatch.setattr(run_checkpoints, "read_whole", read)
    assert three.load("letters").committed == 3


def test_a_run_without_a_readable_checkpoint_stops_and_says_so(three):
    for number in range(4):
        (three.folder / checkpoint_name(number)).write_bytes(b"rubbish")
    history = three.history.path.read_bytes()
    with pytest.raises(RunError, match="no checkpoint .* --fresh"):
        three.load("letters")
    assert three.history.path.read_bytes() == history


@pytest.mark.parametrize(
    ("keep", "says"),
    [(None, "has no committed round"), (0, "has no committed"), (1, "ends at round 1")],
)
def test_a_history_that_lost_its_lines_is_refused_and_nothing_is_overwritten(three, keep, says):
    if keep is None:
        three.history.path.unlink()
    else:
        lines = three.history.path.read_text().splitlines(keepends=True)
        three.history.path.write_text("".join(lines[:keep]))
    before = {path.name: path.read_bytes() for path in three.folder.iterdir()}
    with pytest.raises(
        RunError, match=rf"checkpoint of round 3, but history\.jsonl {says}.*--fresh"
    ):
        three.load("letters")
    assert {path.name: path.read_bytes() for path in three.folder.iterdir()} == before
    three.start_afresh()
    assert three.load("letters").committed == 0


@pytest.mark.parametrize("missing", [1, 2])
def test_a_history_that_lacks_a_round_in_its_middle_is_refused(three, missing):
    lines = three.history.path.read_text().splitlines(keepends=True)
    three.history.path.write_text("".join(x for x in lines if json.loads(x)["round"] != missing))
    before = {path.name: path.read_bytes() for path in three.folder.iterdir()}
    with pytest.raises(RunError, match=f"no line for the commit of round {missing};.*--fresh"):
        three.load("letters")
    assert {path.name: path.read_bytes() for path in three.folder.iterdir()} == before


@pytest.mark.parametrize("also", ["history.jsonl", "round-000*"])
def test_a_run_without_its_run_file_is_refused(three, also):
    """A part of the run is enough: both the history and the checkpoints name another run."""
    for path in [three.folder / "run.json", *three.folder.glob(also)]:
        path.unlink()
    with pytest.raises(RunError, match=r"run\.json is missing; restore run\.json.*--fresh"):
        three.load("letters")
    assert not (three.folder / "run.json").exists()


def test_damaged_first_weights_are_not_treated_as_none(store):
    store.load("letters")
    store.save_weights(0, weights(0), metadata(0))
    (store.folder / checkpoint_name(0)).write_bytes(b"rubbish")
    with pytest.raises(RunError, match="no checkpoint"):
        store.load("letters")


@pytest.mark.parametrize("classes", ["cat,dog", "5", "[1]", "null", "[" * 10_000])
def test_what_another_program_calls_classes_is_passed_over(store, tmp_path, classes):
    save_file(weights(1), tmp_path / "first", {"classes": classes})
    saved = begin_with(
        read_first_model(tmp_path / "first"), store, store.load("letters"), "letters"
    )
    assert saved.metadata["classes"] == "[]"
    saved.metadata["classes"] = classes  # as an earlier version copied them
    settings = CoordinatorSettings("letters", Rules(rounds=1))
    assert first_state(settings, saved, store.folder, "").classes is None


@pytest.mark.parametrize(
    ("given", "classes", "source"),
    [(("a",), ("a",), "--classes"), (None, ("cat",), "this run's first weights")],
)
def test_the_classes_come_from_the_option_or_else_from_the_first_weights(
    store, given, classes, source
):
    saved = replace(store.load("letters"), metadata={"classes": '["cat"]'})
    settings = CoordinatorSettings("letters", Rules(rounds=1), classes=given)
    state = first_state(settings, saved, store.folder, "")
    assert (state.classes, state.classes_by) == (classes, source)


def test_another_federations_folder_is_refused_and_not_changed(three):
    before = {path.name: path.read_bytes() for path in three.folder.iterdir()}
    with pytest.raises(RunError, match="federation letters, not digits"):
        three.load("digits")
    assert {path.name: path.read_bytes() for path in three.folder.iterdir()} == before


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"run": 1}', '{"federation": "letters"}'])
def test_a_damaged_run_file_is_reported_in_one_line(three, text):
    (three.folder / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json.*--fresh"):
        three.load("letters")


def counting(num_examples: str, field: str = '"late": 0') -> str:
    who = f'{json.dumps(participant("a"))[:-1]}, "num_examples": {num_examples}}}'
    line = json.dumps(committed(2)).replace('"participants": []', f'"participants": [{who}]')
    return f"{line[:-1]}, {field}}}"


@pytest.mark.parametrize(
    "line",
    [
        "{", "rubbish", "\x00\x00", "[]", "{}", '{"event": "committed"}',
        json.dumps(committed(2) | {"participants": 1}),
        counting("-1e999"), counting("0"), counting("null"), counting("1.5"),
        counting('5, "train_loss": NaN'), counting('5, "train_loss": -Infinity'),
        json.dumps(evaluated(2)).replace('"loss": 0.5', '"loss": 1e999'), "[" * 100_000,
        counting("5", '"opened_at": "yesterday"'),
        counting("5", '"asked": 1'), counting("5", '"asked": [1]'), counting("5", '"rejected": {}'),
        counting("5", '"late_updates": [[]]'), counting("5", '"timings": {"open_s": "x"}'),
        counting("5", '"checkpoint": {}'), counting('5, "bytes": []'), counting('5, "norm": "x"'),
        json.dumps(evaluated(2, evaluations=[{"worker": [], "num_examples": 1, "loss": 1}])),
        json.dumps(ended(-1)), json.dumps(ended(2, rejections="x")),
    ],
)  # fmt: skip
def test_a_damaged_line_within_the_history_is_reported_in_one_line(three, line):
    lines = three.history.path.read_text().splitlines()
    three.history.path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    before = three.history.path.read_bytes()
    with pytest.raises(RunError, match=r"history\.jsonl: line 2 is damaged.*--fresh"):
        three.load("letters")
    with pytest.raises(UsageError, match=r"history\.jsonl: line 2 is damaged"):
        read_history(three.folder)
    assert three.history.path.read_bytes() == before


@pytest.mark.parametrize("line", [counting("5"), *map(json.dumps, (evaluated(2), ended(2)))])
def test_lines_like_those_are_sound_without_what_is_damaged(line):
    check_line(json.loads(line))


def test_the_fields_of_a_later_version_are_no_damage(three):
    later = {"level": {"deep": [1]}, "level/b": "x"}
    three.history.append({**evaluated(3, loss=0.5, accuracy=0.5), **later})
    three.history.append({**ended(3), **later})
    assert evaluation_metrics({**evaluated(3, loss=0.5), **later}) == {"loss": 0.5}
    assert three.load("letters").committed == 3
    assert fluffle.Run(three.folder).reason == ""
    three.history.append({**committed(4, "a"), **later})
    assert fluffle.Run(three.folder).history[-1].number == 4


def test_a_last_line_that_no_crash_leaves_is_damaged_and_not_cut_off(three):
    with three.history.path.open("a") as history:
        history.write(counting("5", '"asked": 1') + "\n")
    before = three.history.path.read_bytes()
    with pytest.raises(RunError, match=r"line 4 is damaged \(asked\); repair the file"):
        three.load("letters")
    assert three.history.path.read_bytes() == before


@pytest.mark.parametrize("kept", [b"", b'{"event"'])
def test_a_refused_history_keeps_its_incomplete_last_line(three, kept):
    three.history.path.write_bytes(kept)
    with pytest.raises(RunError, match="no committed round; restore history"):
        three.load("letters")
    assert three.history.path.read_bytes() == kept
    with pytest.raises(UsageError, match="holds the checkpoint of round 3, but history"):
        fluffle.Run(three.folder)
    (three.folder / "run.json").unlink()
    with pytest.raises(UsageError, match="restore history.jsonl"):
        read_history(three.folder)


def test_a_first_checkpoint_without_a_history_is_what_a_crash_leaves(three):
    three.history.path.unlink()
    for number in (2, 3):
        (three.folder / checkpoint_name(number)).unlink()
    with pytest.raises(UsageError, match="has not committed any rounds yet"):
        fluffle.Run(three.folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize(
    "name", ["history.jsonl", "run.json", "round-0002.safetensors", "sampling.secret"]
)
def test_what_is_no_regular_file_is_named_and_blocks_nobody(three, name, make):
    (three.folder / name).unlink(missing_ok=True)
    make(three.folder / name)
    with pytest.raises(RunError, match=f"{name} is not a regular file; move it elsewhere"):
        three.load("letters")
    if name == "run.json":
        with pytest.raises(UsageError, match=r"run\.json cannot be read"):
            _ = fluffle.Run(three.folder).id
    if name == "round-0002.safetensors":
        with pytest.raises(UsageError, match="cannot be read"):
            _ = fluffle.Run(three.folder).history[1].weights
        with pytest.raises(UsageError, match="cannot be read"):
            read_report(three.folder, 0.0)
    if name == "history.jsonl":
        with pytest.raises(UsageError, match="cannot be read"):
            fluffle.Run(three.folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_regular_file_is_named(three, make):
    make(three.folder / "lock")
    with pytest.raises(RunError, match="lock is not a regular file"):
        three.try_lock()


def test_a_lock_that_the_system_refuses_is_an_error_of_one_line_from_python(three, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match=r"cannot use the run folder .* \(No locks available\); ch"):
        RunFolder(three.folder).__enter__()


def test_a_history_that_cannot_be_opened_is_reported_in_one_line(three):
    three.history.path.unlink()
    three.history.path.mkdir()
    with pytest.raises(UsageError, match=r"history\.jsonl cannot be read \(Is a directory\)"):
        read_history(three.folder)


@pytest.mark.parametrize("length", [1, 10, None])
def test_a_last_line_with_a_hole_in_it_is_cut_off(three, length):
    """A power failure may leave the end of a line of several blocks without its beginning."""
    before = three.history.path.read_bytes()
    three.history.append(committed(4, *(f"worker-{n}" for n in range(500))))
    lines = three.history.path.read_bytes()
    last = lines[len(before) :]
    hole = len(last) - 1 if length is None else length
    damaged = before + bytes(hole) + last[hole:]
    three.history.path.write_bytes(damaged)
    assert [row["round"] for row in read_history(three.folder)] == [1, 2, 3]
    saved = three.load("letters")
    assert (saved.committed, saved.repairs) == (
        3,
        ("removed an incomplete last line from history.jsonl",),
    )
    assert three.history.path.read_bytes() == before
    assert (three.folder / "history.removed.jsonl").read_bytes() == damaged[len(before) :]
    assert three.load("letters").repairs == ()


# --- synced files, for power failures ----------------------------------------------------------


@pytest.fixture
def synced(monkeypatch) -> list[Path]:
    """Return the list of files that are synced, in order."""
    paths: list[Path] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", noted)
    return paths


def test_a_new_run_folder_is_on_disk_under_every_name(tmp_path, synced):
    folder = tmp_path / "runs" / "of" / "letters"
    RunStore(folder)
    assert synced == [tmp_path, tmp_path / "runs", tmp_path / "runs" / "of"]
    del synced[:]
    RunStore(folder)
    assert synced == []


def test_the_first_line_of_a_history_is_on_disk_with_its_name(store, synced):
    store.load("letters")
    del synced[:]
    store.history.append(committed(1, "a"))
    assert synced == [store.history.path, store.folder]
    store.history.append(committed(2, "a"))
    assert synced[2:] == [store.history.path]


def test_the_name_of_a_history_is_synced_even_after_its_first_line_failed(store, monkeypatch):
    store.load("letters")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_fsync)
        with pytest.raises(OSError, match="No space"):
            store.history.append(committed(1, "a"))
    order: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        order.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", noted)
    store.history.append(committed(1, "a"))
    assert order == [str(store.history.path), str(store.folder)]


def test_removed_lines_are_on_disk_before_they_leave_the_history(three, synced):
    (three.folder / checkpoint_name(3)).write_bytes(b"")
    three.load("letters")
    removed = synced.index(three.folder / "history.removed.jsonl")
    assert removed < synced.index(three.folder / "history.jsonl.partial")


def test_archived_updates_are_on_disk_under_every_name(store, synced):
    store.load("letters")
    del synced[:]
    keep_update(update_path(store.folder, 1, 1, "a"), b"body", None)
    round_1 = store.folder / "updates" / "round-0001"
    assert synced == [
        store.folder, store.folder / "updates", round_1 / "0001-a.msgpack.partial", round_1,
    ]  # fmt: skip


def test_an_earlier_run_that_was_moved_aside_is_on_disk_there(three, synced):
    aside = three.start_afresh()
    assert synced == [aside, three.folder.parent, three.folder]


def test_a_folder_that_cannot_be_created_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot make the run folder.*--run"):
        RunStore(tmp_path / "file" / "run")


@pytest.mark.parametrize("folder", ["~/run", "~", "runs/~/run"])
def test_no_folder_is_made_that_is_called_like_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path(folder), Path(folder).absolute()):  # as of --run=~/run and folder="~/run"
        with pytest.raises(RunError, match=r"\(~ does not stand for the home folder here\)"):
            RunStore(path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "~").mkdir()
    RunStore(Path("~/run"))  # whoever has such a folder may use it


# --- the history -------------------------------------------------------------------------------


def test_a_line_is_on_disk_when_append_returns(store, monkeypatch):
    synced: list[bytes] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(store.history.path.read_bytes())

    monkeypatch.setattr(os, "fsync", noted)
    store.history.append({"event": "committed", "round": 1, "name": "w-ä\n"})
    assert synced == [store.history.path.read_bytes()] * 2  # the file, and its folder
    assert synced[0].count(b"\n") == 1
    assert json.loads(synced[0]) == {"event": "committed", "round": 1, "name": "w-ä\n"}


@pytest.mark.parametrize("left", [0, 1, 10])
def test_a_line_on_a_full_disk_leaves_nothing(three, left):
    before = three.history.path.read_bytes()
    with room(len(before) + left), pytest.raises(OSError, match=r"space|large"):
        three.history.append(committed(4, "a"))
    assert three.history.path.read_bytes() == before
    three.history.append(committed(4, "a"))
    assert read_history(three.folder)[-1]["round"] == 4


def test_a_line_that_cannot_be_synced_leaves_nothing(three, monkeypatch):
    before = three.history.path.read_bytes()
    monkeypatch.setattr(os, "fsync", no_fsync)
    with pytest.raises(OSError, match="No space"):
        three.history.append(committed(4, "a"))
    assert three.history.path.read_bytes() == before


def test_the_history_is_read_as_one_merged_row_per_round_in_order(store):
    store.history.append({**committed(1, "a"), "seconds": 2.0})
    store.history.append({**committed(2, "a", "b"), "seconds": 3.0})
    store.history.append(evaluated(1, loss=0.5, accuracy=0.8))
    store.history.append(evaluated(2, loss=0.25))
    store.history.append(evaluated(1, loss=0.75))  # the last line counts
    rows = read_history(store.folder)
    assert [row["round"] for row in rows] == [1, 2]
    assert (rows[0]["loss"], rows[0]["accuracy"], rows[0]["seconds"]) == (0.75, 0.8, 2.0)
    assert (rows[1]["loss"], len(rows[1]["participants"])) == (0.25, 2)
    assert "event" not in rows[0]


def test_a_line_is_standard_json(store):
    nan, inf = float("nan"), float("inf")
    who = [{"worker": "a", "train_loss": nan, "metrics": {"auc": -inf, "ok": 1.5}}]
    store.history.append({"event": "committed", "round": 1, "name": "NaN", "participants": who})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(store.history.path.read_text(), parse_constant=refuse)
    assert line["participants"] == [
        {"worker": "a", "train_loss": None, "metrics": {"auc": None, "ok": 1.5}}
    ]
    assert line["name"] == "NaN"


def test_history_can_be_read_while_a_line_is_being_written(three):
    with three.history.path.open("a") as history:
        history.write('{"event":"committed","rou')
    before = three.history.path.read_bytes()
    assert [row["round"] for row in read_history(three.folder)] == [1, 2, 3]
    assert three.history.path.read_bytes() == before


def test_a_missing_history_is_reported_in_one_line(tmp_path):
    with pytest.raises(UsageError, match="no history.*such as runs/letters"):
        read_history(tmp_path)


# --- locks and fresh starts --------------------------------------------------------------------

_HOLD = """
import sys
from pathlib import Path
from fluffle_coordinator.storage.run_store import RunStore
store = RunStore(Path(sys.argv[1]))
print(store.try_lock(), flush=True)
sys.stdin.read()
"""


def release(store: RunStore) -> None:
    assert store._lock is not None
    store._lock.close()


def test_two_stores_in_one_process_exclude_each_other(store):
    assert store.try_lock()
    other = RunStore(store.folder)
    assert not other.try_lock()
    release(store)
    assert other.try_lock()
    release(other)


def test_a_lock_is_held_by_a_process_and_ends_with_it(store):
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(store.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "True\n"
        assert not store.try_lock()
        assert store.holder() == f"process {other.pid} on {platform.node()}"
        other.kill()  # like a crash, without unlocking
        other.wait()
        assert store.try_lock()
    assert store.holder() == f"process {os.getpid()} on {platform.node()}"
    release(store)


def test_a_child_process_that_has_the_lock_open_does_not_keep_it(store):
    assert store.try_lock()
    other = RunStore(store.folder)
    # As a fork does it, of a data loader of PyTorch, say, whose processes outlive a run.
    inherits = {"pass_fds": (store._lock.fileno(),), "stdin": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", "input()"], **inherits) as child:
        store.unlock()
        assert other.try_lock()
        child.kill()
    other.unlock()


def test_a_standby_names_the_process_that_holds_the_folder(store):
    other, said = RunStore(store.folder), []
    assert other.try_lock()

    class Told(Watcher):
        def record(self, event: RunEvent) -> None:
            said.append(event.sentence())
            if other._lock is not None:
                other.unlock()

    asyncio.run(_lock(store, Told()))
    holder = f"process {os.getpid()} on {platform.node()}"
    assert said[0] == (f"another coordinator ({holder}) holds {store.shown}; waiting as a standby")
    assert said[1].endswith("taking over")
    release(store)


def test_a_full_disk_takes_a_lock_but_no_name(store):
    with room(0):
        assert store.try_lock()
    assert not RunStore(store.folder).try_lock()
    assert store.holder() == ""
    release(store)


def test_a_fresh_start_moves_the_old_run_aside_whole(three):
    assert three.try_lock()
    old = {path.name: path.read_bytes() for path in three.folder.iterdir() if path.name != "lock"}
    before = three.load("letters").run
    aside = three.start_afresh()
    assert aside == three.folder.with_name("letters.1")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == old
    assert names(three.folder) == {"lock"}
    assert not RunStore(three.folder).try_lock()  # still locked
    saved = three.load("digits")
    assert saved.committed == 0
    assert saved.run != before
    assert three.start_afresh() == three.folder.with_name("letters.2")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == old
    release(three)


async def test_a_fresh_start_may_begin_with_a_model_of_the_run_that_it_moves(three):
    async def start(init: str) -> Saved:
        settings = CoordinatorSettings("letters", Rules(rounds=9), init=three.folder / init)
        return await open_run(settings, Topology("letters"), three, Watchers(), fresh=True)

    before = names(three.folder)
    with pytest.raises(UsageError, match="no model file"):
        await start("round-0004.safetensors")
    assert names(three.folder) >= before  # and a lock
    saved = await start("round-0003.safetensors")
    assert saved.committed == 0
    assert_weights(saved.weights, 3)
    release(three)


def test_a_fresh_start_in_an_empty_folder_moves_nothing(tmp_path):
    store = RunStore(tmp_path / "runs" / "letters")
    assert store.start_afresh() is None
    assert store.try_lock()
    assert store.start_afresh() is None
    assert names(store.folder.parent) == {"letters"}
    release(store)


def test_only_the_files_of_a_run_are_moved_aside(three):
    (three.folder / "lock").touch()
    mine = three.folder / "thesis.txt"
    mine.write_text("mine")
    run = {path.name for path in three.folder.iterdir()} - {"thesis.txt", "lock"}
    aside = three.start_afresh()
    assert aside is not None
    assert {path.name for path in aside.iterdir()} == run
    assert {path.name for path in three.folder.iterdir()} == {"thesis.txt", "lock"}
    assert three.start_afresh() is None
