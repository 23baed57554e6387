"""The checker itself: a correct federation is clean, and every kind of violation is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fluffle_broker.node import node
from tests.faults.checker import check
from tests.faults.harness import Federation
from tests.faults.hostile import Hostile
from tests.shared import made_once

pytestmark = pytest.mark.rabbit
ROUNDS = 4


@pytest.fixture(scope="module")
def sound(broker_node: node.NodeInfo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a small federation to its end, with one hostile message."""

    def make(folder: Path) -> None:
        made = Federation(folder, broker_node.url, broker_node.ports.management)
        with made as federation:
            flags = ("--quorum", 2, "--rounds", ROUNDS, "--config", "train_s=0.2")
            programs = [
                federation.coordinator(*flags),
                *(federation.worker(n, 2, "--heartbeat", 0.5) for n in range(2)),
            ]
            federation.wait_committed(1)
            federation.inject([Hostile(f"{federation.name}.updates", "noise", b"noise")])
            assert [program.end() for program in programs] == [0] * 3
            federation.gather()
            federation.gather_orphans()

    return made_once(tmp_path_factory, "sound", make)


def test_a_correct_federation_is_clean(sound: Path) -> None:
    verdict = check(sound)
    assert verdict.clean, verdict.text()
    assert verdict.figures["rounds"] == ROUNDS
    assert verdict.figures["updates counted"] == verdict.figures["updates confirmed"] == 2 * ROUNDS
    assert verdict.figures["rejected"] == 1
    assert verdict.figures["quorums known"] == ROUNDS


Line = dict[str, Any]


def edit(path: Path, change: Callable[[list[Line]], list[Line]]) -> None:
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def history(change: Callable[[list[Line]], list[Line]]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "run/history.jsonl", change)


def of_round(lines: list[Line], number: int) -> Line:
    return next(line for line in lines if (line["event"], line["round"]) == ("committed", number))


def doubled(lines: list[Line]) -> list[Line]:
    return [*lines, of_round(lines, 2)]


def left_out(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line is not of_round(lines, 3)]


def counted_twice(lines: list[Line]) -> list[Line]:
    there = of_round(lines, 2)["participants"]
    there.append(there[0])
    return lines


def said_otherwise(lines: list[Line]) -> list[Line]:
    of_round(lines, 2)["participants"][0]["num_examples"] += 1
    return lines


def forgotten(folder: Path) -> None:
    """Remove w0 from round 2 and its model, though its update was confirmed before w1 began."""

    def without(lines: list[Line]) -> list[Line]:
        line = of_round(lines, 2)
        line["participants"] = [one for one in line["participants"] if one["worker"] != "w0"]
        return lines

    edit(folder / "run/history.jsonl", without)
    for path in folder.glob("sent/w1/*.jsonl"):
        edit(path, lambda lines: [line | {"at": line["at"] + 1e6} for line in lines])


def model_changed(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "run/round-0002.safetensors"
        model = load_file(path)
        one = np.array(1e-3 if model[name].dtype.kind == "f" else 1, model[name].dtype)
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
        save_file(model | {name: np.asarray(model[name] + one)}, path, metadata)

    return change


def named_otherwise(lines: list[Line]) -> list[Line]:
    of_round(lines, 2)["base"] = "another"
    return lines


def named_twice(lines: list[Line]) -> list[Line]:
    of_round(lines, 3)["base"] = of_round(lines, 2)["base"]
    return lines


def send_from(folder: Path, worker: str, base: str, *, instead: bool = False) -> str:
    """Add a copy of w1's update of round 2, as sent by a worker and trained from other weights.

    ``instead`` replaces w1's update. Returns the digest of the body.
    """
    (path,) = folder.glob("sent/w1/[0-9]*.jsonl")
    mine, others = [], []
    for line in map(json.loads, path.read_text().splitlines()):
        kind, *_, number, _ = line["message_id"].split("/")
        (mine if (kind, number) == ("update", "2") else others).append(line)
    header, payload = msgpack.unpackb((path.parent / f"{mine[0]['sha256']}.msgpack").read_bytes())
    body = msgpack.packb([header | {"worker": worker, "base": base}, payload])
    name, run = sha256(body).hexdigest(), header["run"]
    made = [line | {"sha256": name, "message_id": f"update/{run}/2/{worker}"} for line in mine]
    (folder / "sent" / worker).mkdir(exist_ok=True)
    (folder / "sent" / worker / f"{name}.msgpack").write_bytes(body)
    (folder / "sent" / worker / "more.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in made)
    )
    if instead:
        edit(path, lambda _: others)
    return name


def counted_from_other_weights(folder: Path) -> None:
    send_from(folder, "w1", "lost", instead=True)


def counted_from_the_weights_of_another_round(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "run/history.jsonl").read_text().splitlines()]
    send_from(folder, "w1", of_round(lines, 3)["base"], instead=True)


def taken_back_without_a_word(folder: Path) -> None:
    send_from(folder, "w2", "lost")


def never_sent(folder: Path) -> None:
    shutil.rmtree(folder / "sent/w1")


def never_trained(folder: Path) -> None:
    next((folder / "trained").glob("w1-*-2.npz")).unlink()


def not_rejected(folder: Path) -> None:
    (folder / "evidence/rejected.jsonl").write_text("")


def without_reason(folder: Path) -> None:
    edit(
        folder / "evidence/rejected.jsonl",
        lambda lines: [line | {"reason": None} for line in lines],
    )


def queue(name: str, ready: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "evidence/queues.json"
        queues = json.loads(path.read_text())
        path.write_text(json.dumps(queues | {name: {"ready": ready, "unacked": 0}}))

    return change


def orphan(folder: Path) -> None:
    (folder / "evidence/orphans.json").write_text('["beam.smp (pid 1)"]')


def wanted_more(folder: Path) -> None:
    (log,) = folder.glob("log/*-coordinator.jsonl")
    edit(log, lambda lines: [x | {"needed": 3} if x["event"] == "opened" else x for x in lines])


def unheard(folder: Path) -> None:
    """Pretend that the coordinator was stopped for the whole run and reported a worker as gone."""
    (log,) = folder.glob("log/*-coordinator.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    first, last = lines[0], lines[-1]
    edit(log, lambda lines: [*lines, last | {"event": "gone", "worker": "w0"}])
    stop = {"began": first["time"], "time": last["time"], "log": log.name, "living": ["w0"]}
    (folder / "evidence/unheard.jsonl").write_text(json.dumps(stop) + "\n")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (history(doubled), "once and in order"),
        (history(left_out), "once and in order"),
        (history(counted_twice), "2 times"),
        (history(said_otherwise), "another num_examples"),
        (forgotten, "lacks w0, whose update was confirmed before w1"),
        (forgotten, "of w0 in round 2 vanished"),
        (model_changed("dense/kernel"), "'dense/kernel' is not the average"),
        (model_changed("scale"), "'scale' is not the average"),
        (model_changed("counts"), "'counts' is not the average"),
        (history(named_otherwise), "round 2 made another, its model is named"),
        (history(named_twice), "2 models are named"),
        (counted_from_other_weights, "counts w1, which trained from the weights lost, and began"),
        (counted_from_the_weights_of_another_round, "w1 answered round 2 with the weights of 4"),
        (taken_back_without_a_word, "of w2 in round 2, from lost, which was taken back, vanished"),
        (never_sent, "counts w1, which never sent it"),
        (never_trained, "w1 never trained this delta"),
        (not_rejected, "not found in rejected: noise"),
        (without_reason, "without a reason"),
        (queue("updates", 1), "updates is not empty"),
        (queue("leaked", 0), "['leaked']"),
        (orphan, "left running: beam.smp"),
        (wanted_more, "the quorum of round 2 fell from 3 to 2, and no event 'quorum' says why"),
        (unheard, "and w0, which lived, counted as gone"),
    ],
)
def test_every_violation_is_found(
    sound: Path, tmp_path: Path, tamper: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "tampered"
    shutil.copytree(sound, folder)
    tamper(folder)
    verdict = check(folder)
    assert not verdict.clean
    assert message in verdict.text()


def test_an_update_from_a_base_that_was_taken_back_is_no_violation(
    sound: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "crashed"
    shutil.copytree(sound, folder)
    send_from(folder, "w1", "lost")  # another one was counted
    digest = send_from(folder, "w2", "lost")
    line = {"id": None, "reason": "the update was trained from the weights lost", "sha256": digest}
    with (folder / "evidence/rejected.jsonl").open("a") as rejected:
        rejected.write(json.dumps(line) + "\n")
    verdict = check(folder)
    assert verdict.clean, verdict.text()
