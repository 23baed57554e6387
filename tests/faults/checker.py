"""Judges a federation from the files that it left, without using fluffle's code.

    python -m tests.faults.checker FOLDER

The folder is one of `harness.Federation`. The rules:

1.  *Rounds*: the history has every round of one run from 1 to the last, once and in order. Each
    line gives the round's model a unique base name, which the model's file contains too.
2.  *Averages*: each committed model is, to 1e-6, base + sum(n * delta) / sum(n) in float64 over
    exactly the updates that its history line names, as they were sent (integers are rounded to
    the nearest), and the named worker trained each such delta from the base. In an asynchronous
    run, an update of staleness s was trained from the model s versions earlier and has the
    weight n / sqrt(1 + s).
3.  *Once*: no ticket counts twice, so no worker counts twice in a synchronous round. Every worker
    in the history sent that update, and named in it the base that the round begins with. An
    update that was sent for a round names that base, or one that no history has, because a
    coordinator died before it was on disk (such a base was *taken back*).
4.  *None missing*: a synchronous round with the quorum ``all`` has every confirmed update of the
    workers that were present. The files do not prove who was present, but they prove the order:
    the queue is first in, first out, also across redeliveries, and a round is committed with
    everything that was read before. So if the update of worker w for round r was confirmed at time
    t, and round r was committed without it, then no participant of r began to send its own first
    copy after t. In other words, an update may be missing only if it arrived after the last
    counted one, when its worker counted as gone. All times are from one machine's monotonic clock.
    Updates from a base that was taken back belong to no round and are not missing.
5.  *Accounted for*: every confirmed update was counted, was reported as late or as a duplicate, is
    in the rejected queue with a reason, or belongs to the round that was open at the end. An update
    from a base that was taken back is never counted; if a newer update of its worker is counted, it
    may have arrived too late to be reported. At the end, the queue `updates` is empty.
6.  *Garbage*: every hostile message is in the rejected queue with a reason, unless it was put into
    the inbox or outbox of a worker that restarted afterwards, which empties both, or the length
    limit of the queue dropped it.
7.  *Nothing left*: no process is left, and no queue except the declared ones.
8.  *Quorum*: no round has fewer updates than its coordinator announced to need (``opened``,
    ``reopened``), reduced by ``quorum`` events; no quorum shrinks without such an event; and no
    round has fewer updates than ``--quorum`` of ``--min-workers``. See `fairness`.
9.  *Silence*: while a coordinator is stopped, or a memory alarm blocks every publisher, no worker
    can be heard. No worker that lives throughout counts as gone because of that, each is asked in
    the next round, and no standby takes over from a coordinator that is only stopped.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.faults import fairness
from tests.faults.harness import whole_lines

Tensors = dict[str, np.ndarray[Any, Any]]
# An update's sequence (in synchronous rounds, the round), its worker, and its base.
Identity = tuple[int, str, str]

_TOLERANCE = 1e-6
_REJECTED_BOUND = 1000
_SHARED = {"updates", "presence", "rejected", "unrouted", "journal"}


@dataclass
class Sent:
    """What is known of one update, over all attempts to publish it."""

    began: float = float("inf")
    confirmed: float = float("inf")
    bodies: set[Path] = field(default_factory=set)
    round: int = 0

    @property
    def is_confirmed(self) -> bool:
        return self.confirmed < float("inf")


@dataclass
class Verdict:
    """The violations found, and the numbers of things checked."""

    faults: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        return not self.faults

    def text(self) -> str:
        """Return the verdict as text."""
        seen = ", ".join(f"{number} {what}" for what, number in self.figures.items())
        if self.clean:
            return f"clean: {seen}"
        listing = "\n".join(f"  {fault}" for fault in self.faults[:20])
        return f"NOT CLEAN, {len(self.faults)} findings ({seen}):\n{listing}"


def check(folder: Path) -> Verdict:
    """Check all rules for a federation that has ended."""
    verdict = Verdict()
    history = [
        json.loads(line) for line in (folder / "run/history.jsonl").read_bytes().splitlines()
    ]
    commits = [line for line in history if line["event"] == "committed"]
    bases = _bases(folder, commits)
    run = json.loads((folder / "run/run.json").read_text())["run"]
    sent = _sent(folder, run)
    logs = fairness.coordinator_logs(folder)
    uncounted = _uncounted(logs)
    rejected = whole_lines(folder / "evidence/rejected.jsonl")
    verdict.figures = {
        "rounds": len(commits),
        "updates counted": sum(len(line["participants"]) for line in commits),
        "updates confirmed": sum(one.is_confirmed for one in sent.values()),
        "late": sum(uncounted["late"].values()),
        "duplicates": sum(uncounted["duplicate"].values()),
        "rejected": len(rejected),
        "quorums known": fairness.judged(logs),
        "silences judged": fairness.silences_judged(folder),
    }
    verdict.faults += [
        *_rounds(folder, commits, run),
        *_averages(folder, commits, bases, sent),
        *_once(commits, bases, sent),
        *_none_missing(commits, bases, sent),
        *_accounted(commits, bases, sent, uncounted, rejected, folder),
        *_garbage(folder, rejected),
        *_nothing_left(folder),
        *fairness.quorums(folder, logs, commits),
        *fairness.silences(folder, logs),
    ]
    return verdict


# --- rules 1 to 7; `fairness` has the others ------------------------------------------------------


def _rounds(folder: Path, commits: list[dict[str, Any]], run: str) -> Iterator[str]:
    numbers = [line["round"] for line in commits]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"rounds are not committed once and in order: {numbers}"
    for line in commits:
        if line["run"] != run:
            yield f"round {line['round']} is of run {line['run']}, not {run}"
        name = _name(folder / "run" / line["checkpoint"])
        if name != line["base"]:
            yield f"round {line['round']} made {line['base']}, its model is named {name}"
    names = Counter([line["base"] for line in commits])
    names[_name(folder / "run/round-0000.safetensors")] += 1
    for name, times in names.items():
        if times > 1:
            yield f"{times} models are named {name}"


def _averages(
    folder: Path,
    commits: list[dict[str, Any]],
    bases: dict[int, str],
    sent: dict[Identity, Sent],
) -> Iterator[str]:
    trained = _trained(folder)
    base = load_file(folder / "run/round-0000.safetensors")
    digests = {bases[1]: digest(base)}
    for line in commits:
        number = line["round"]
        model = load_file(folder / "run" / line["checkpoint"])
        totals = {name: np.zeros(tensor.shape, np.float64) for name, tensor in base.items()}
        examples, weights = 0, 0.0
        for one in line["participants"]:
            identity, staleness = _identity(line, one, bases), one.get("staleness", 0)
            copies = list(_contents(sent[identity])) if identity in sent else []
            if not copies:
                yield f"round {number} counts {one['worker']}, which sent nothing for it"
                continue
            header, delta = copies[0]
            if any(not _same(delta, other) for _, other in copies[1:]):
                yield f"round {number}: {one['worker']} sent updates that differ"
            if header["num_examples"] != one["num_examples"]:
                yield f"round {number}: {one['worker']} sent another num_examples than the line has"
            if (one["worker"], digests.get(identity[2], ""), digest(delta)) not in trained:
                yield f"round {number}: {one['worker']} never trained this delta from this base"
            weight = header["num_examples"] / (1 + staleness) ** 0.5
            examples, weights = examples + header["num_examples"], weights + weight
            for name, tensor in base.items():
                exact = tensor.dtype.kind in "iu"  # the average of integers ignores staleness
                part = header["num_examples"] if exact else weight
                totals[name] += part * delta[name].astype(np.float64)
        for name, tensor in base.items():
            exact = tensor.dtype.kind in "iu"
            mean = tensor.astype(np.float64) + totals[name] / max(examples if exact else weights, 1)
            if exact:
                mean = np.rint(mean)
            got = model[name]
            if got.dtype != tensor.dtype or got.shape != tensor.shape:
                yield f"round {number}: '{name}' changed its form"
            elif not np.allclose(got.astype(np.float64), mean, rtol=_TOLERANCE, atol=_TOLERANCE):
                yield f"round {number}: '{name}' is not the average of the updates it names"
        base = model
        digests[line["base"]] = digest(base)


def _identity(line: dict[str, Any], one: dict[str, Any], bases: dict[int, str]) -> Identity:
    """Return the identity of the update of a participant in a history line."""
    number = line["round"]
    began_with = bases.get(number - one.get("staleness", 0), "")
    return one.get("sequence", number), one["worker"], began_with


def _once(
    commits: list[dict[str, Any]], bases: dict[int, str], sent: dict[Identity, Sent]
) -> Iterator[str]:
    counted: dict[tuple[int, str], list[tuple[int, str]]] = defaultdict(list)
    for line in commits:
        for one in line["participants"]:
            sequence, worker, begins = _identity(line, one, bases)
            counted[sequence, worker].append((line["round"], begins))
    for (sequence, worker), times in counted.items():
        number, begins = times[-1]
        if len(times) > 1:
            yield f"round {number} counts {worker} {len(times)} times"
        named = sorted(base for at, who, base in sent if (at, who) == (sequence, worker))
        if not named:
            yield f"round {number} counts {worker}, which never sent it"
        elif begins not in named:
            yield (
                f"round {number} counts {worker}, which trained from the weights "
                f"{', '.join(named)}, and began with {begins}"
            )
    rounds = {base: number for number, base in bases.items()}
    for (_, worker, base), update in sent.items():
        if rounds.get(base, update.round) != update.round:
            yield f"{worker} answered round {update.round} with the weights of {rounds[base]}"


def _none_missing(
    commits: list[dict[str, Any]], bases: dict[int, str], sent: dict[Identity, Sent]
) -> Iterator[str]:
    there = _participants(commits)
    if any(one.round != sequence for (sequence, _, _), one in sent.items()):
        return  # asynchronous
    for (number, worker, base), one in sent.items():
        if number not in there or worker in there[number] or not one.is_confirmed:
            continue
        if base != bases.get(number):
            continue
        after = [
            other
            for other in there[number]
            if (number, other, base) in sent and sent[number, other, base].began > one.confirmed
        ]
        if after:
            yield (
                f"round {number} lacks {worker}, whose update was confirmed before "
                f"{', '.join(sorted(after))}, which it has, began to send"
            )


def _accounted(
    commits: list[dict[str, Any]],
    bases: dict[int, str],
    sent: dict[Identity, Sent],
    uncounted: dict[str, Counter[tuple[int, str]]],
    rejected: list[dict[str, Any]],
    folder: Path,
) -> Iterator[str]:
    there = {_identity(line, one, bases)[:2] for line in commits for one in line["participants"]}
    open_at_the_end = len(commits) + 1
    refused = {line["sha256"] for line in rejected if line["reason"]}
    for (sequence, worker, base), one in sent.items():
        number = one.round
        # A participant is counted with this update, or with another of the right base: see `_once`.
        if not one.is_confirmed or (sequence, worker) in there or number == open_at_the_end:
            continue
        reported = uncounted["late"][number, worker] + uncounted["duplicate"][number, worker]
        if not reported and not refused & {path.stem for path in one.bodies}:
            taken_back = "" if base in bases.values() else f", from {base}, which was taken back,"
            yield (
                f"the confirmed update of {worker} in round {number}{taken_back} "
                "vanished without a word"
            )
    updates = json.loads((folder / "evidence/queues.json").read_text()).get("updates")
    if updates != {"ready": 0, "unacked": 0}:
        yield f"the queue updates is not empty at the end: {updates}"


def _garbage(folder: Path, rejected: list[dict[str, Any]]) -> Iterator[str]:
    by_id = {line["id"]: line for line in rejected}
    starts = defaultdict(list)
    for line in whole_lines(folder / "evidence/processes.jsonl"):
        starts[line["started"]].append(line["at"])
    for one in whole_lines(folder / "evidence/injected.jsonl"):
        if not one["rejected"]:
            continue
        kind, _, worker = one["queue"].partition(".")
        rejection = by_id.get(one["id"])
        if rejection is not None:
            if not rejection["reason"]:
                yield f"{one['what']} was rejected without a reason"
        elif kind in ("inbox", "outbox") and any(at > one["at"] for at in starts[worker]):
            continue
        elif len(rejected) < _REJECTED_BOUND:
            yield f"put into {one['queue']} and not found in rejected: {one['what']}"


def _nothing_left(folder: Path) -> Iterator[str]:
    workers = {line["started"] for line in whole_lines(folder / "evidence/processes.jsonl")}
    workers.discard("coordinator")
    declared = _SHARED | {f"{kind}.{w}" for w in workers for kind in ("inbox", "outbox")}
    queues = set(json.loads((folder / "evidence/queues.json").read_text()))
    if queues != declared:
        yield f"queues differ from the declared ones: {sorted(queues ^ declared)}"
    for process in json.loads((folder / "evidence/orphans.json").read_text()):
        yield f"left running: {process}"


# --- reading the files --------------------------------------------------------------------------


def _sent(folder: Path, run: str) -> dict[Identity, Sent]:
    """Read the updates that the workers published; replays are later copies of them."""
    sent: dict[Identity, Sent] = defaultdict(Sent)
    headers: dict[Path, dict[str, Any]] = {}
    for path in sorted(folder.glob("sent/*/*.jsonl")):
        for line in whole_lines(path):
            if line["type"] != "update":
                continue
            kind, of_run, number, worker, *_ = line["message_id"].split("/")
            assert (kind, of_run) == ("update", run), line
            body = path.parent / f"{line['sha256']}.msgpack"
            if body not in headers:
                headers[body] = _unpacked(body)[0]
            header = headers[body]
            one = sent[header.get("sequence", int(number)), worker, header["base"]]
            one.bodies.add(body)
            one.round = int(number)
            if line["event"] == "began":
                one.began = min(one.began, line["at"])
            elif line["event"] == "confirmed":
                one.confirmed = min(one.confirmed, line["at"])
    return dict(sent)


def _contents(one: Sent) -> Iterator[tuple[dict[str, Any], Tensors]]:
    for path in sorted(one.bodies):
        header, payload = _unpacked(path)
        if "transfer" in header:
            payload = b"".join(_parts(path.parent, header["transfer"]))
        yield (
            header,
            {
                entry["name"]: np.frombuffer(
                    payload, entry["dtype"], int(np.prod(entry["shape"])), entry["offset"]
                ).reshape(entry["shape"])
                for entry in header["tensors"]
            },
        )


def _parts(folder: Path, transfer: dict[str, Any]) -> Iterator[bytes]:
    """Return the parts of a large payload, in order."""
    named = {
        line["message_id"]: folder / f"{line['sha256']}.msgpack"
        for path in folder.glob("*.jsonl")
        for line in whole_lines(path)
        if line["type"] == "part"
    }
    for number in range(transfer["parts"]):
        header, piece = _unpacked(named[f"{transfer['id']}/{number}"])
        assert (header["transfer"], header["part"]) == (transfer["id"], number)
        yield piece


def _unpacked(path: Path) -> tuple[dict[str, Any], bytes]:
    body = path.read_bytes()
    assert sha256(body).hexdigest() == path.stem, path
    header, payload = msgpack.unpackb(body)
    return header, payload


def _trained(folder: Path) -> set[tuple[str, str, str]]:
    """Read the trainings: worker, digest of the base, digest of the delta."""
    trainings = set()
    for path in folder.glob("trained/*.npz"):
        with np.load(path) as record:
            delta = {
                name.removeprefix("delta:"): record[name]
                for name in record.files
                if name.startswith("delta:")
            }
            trainings.add((str(record["worker"]), str(record["received"]), digest(delta)))
    return trainings


def _uncounted(logs: fairness.Logs) -> dict[str, Counter[tuple[int, str]]]:
    """Read the round and worker of each update that a coordinator reported as not counted."""
    uncounted: dict[str, Counter[tuple[int, str]]] = defaultdict(Counter)
    for log in logs.values():
        for line in log:
            if line["event"] in ("late", "duplicate"):
                uncounted[line["event"]][line["round"], line["worker"]] += 1
    return uncounted


def _bases(folder: Path, commits: list[dict[str, Any]]) -> dict[int, str]:
    """Read the base that each round begins with, including the one after the last commit."""
    first = _name(folder / "run/round-0000.safetensors")
    return {1: first} | {line["round"] + 1: line["base"] for line in commits}


def _name(model: Path) -> str:
    with safe_open(model, "numpy") as file:
        return str((file.metadata() or {}).get("base"))


def _participants(commits: list[dict[str, Any]]) -> dict[int, set[str]]:
    return {line["round"]: {one["worker"] for one in line["participants"]} for line in commits}


def _same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def digest(weights: Tensors) -> str:
    """Return a digest of tensors, computed as in `fast_task`."""
    hashed = sha256()
    for name in sorted(weights):
        tensor = np.asarray(weights[name])
        hashed.update(f"{name} {tensor.dtype.name} {tensor.shape} ".encode())
        hashed.update(np.ascontiguousarray(tensor).tobytes())
    return hashed.hexdigest()


if __name__ == "__main__":
    verdict = check(Path(sys.argv[1]))
    print(verdict.text())
    sys.exit(not verdict.clean)
