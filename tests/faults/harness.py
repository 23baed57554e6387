"""A federation of real processes that can be killed, and the evidence of what they did.

The folder of a federation contains::

    run/          the coordinator's run folder
    sent/<worker> the messages that a worker published, and their confirms (see logged_worker)
    trained/      the trainings (see fast_task)
    log/          one file of JSON lines per process
    evidence/     what the harness did and observed

All are plain files, for the checker and for people who investigate a failure.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pika
import pika.exceptions
import psutil

from tests.faults.hostile import Hostile

ROOT = Path(__file__).parents[2]
FLUFFLE = (sys.executable, "-c", "from fluffle_common.cli.app import main; main()")
LOGGED_WORKER = (sys.executable, str(ROOT / "tests/faults/logged_worker.py"))
TASK = f"{ROOT / 'tests/faults/fast_task.py'}:task"
PATIENCE_S = 60.0
_MARK = "FLUFFLE_FAULTS"
_PYTHONPATH = os.environ.get("PYTHONPATH")  # needed if fluffle is not installed
_LOOK_S = 0.05
_COUNTS_NOW = "/api/queues?disable_stats=true&enable_queue_totals=true"  # the others are 5 s old


def wait_until(
    condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S, look_s: float = _LOOK_S
) -> Any:
    """Poll a condition until it is true; return its value.

    Raises:
        AssertionError: if it is not true in time.
    """
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not in {timeout_s:.0f} s: {what}"
        threading.Event().wait(look_s)
    return value


class Program:
    """A process that writes its output to a file, so that a full pipe cannot block it."""

    def __init__(self, name: str, words: list[str], log: Path, env: dict[str, str]) -> None:
        self.name, self.log = name, log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,  # Ctrl-C is for the harness, which ends its processes
            )
        self.pid = self._popen.pid

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._popen.poll() is None

    @property
    def code(self) -> int | None:
        """The exit code; None while the process runs."""
        return self._popen.poll()

    def kill(self) -> None:
        """Kill it with ``kill -9`` and wait until it has ended."""
        self._popen.kill()
        self._popen.wait(PATIENCE_S)

    def interrupt(self) -> None:
        """Interrupt it like Ctrl-C."""
        self.send(signal.SIGINT)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._popen.send_signal(number)

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its end; return its exit code."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end; {self.log}:\n{self.tail()}") from None

    def rss_bytes(self) -> int:
        """Return its resident memory in bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return its events as JSON objects, all or those of one name."""
        lines = whole_lines(self.log, strict=False)
        return [line for line in lines if event is None or line.get("event") == event]

    def wait_for(self, event: str, timeout_s: float = PATIENCE_S, **fields: Any) -> dict[str, Any]:
        """Wait for an event with these fields; return the first."""

        def first_match() -> dict[str, Any] | None:
            for one in self.events(event):
                if all(one.get(key) == value for key, value in fields.items()):
                    return one
            if not self.alive():
                raise AssertionError(f"{self.name} ended with {self.code}:\n{self.tail()}")
            return None

        first: dict[str, Any] = wait_until(
            first_match,
            f"{self.name} emits '{event}' {fields}; {self.log}:\n{self.tail()}",
            timeout_s,
        )
        return first

    def tail(self) -> str:
        """Return the end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


class Federation:
    """The processes of one federation on one broker, and the evidence about them.

    Args:
        folder: the federation's folder; created if it is missing.
        broker_url: the URL of the broker itself, for the harness.
        url: the URL for the processes, which differs if there is a proxy.
        management_port: the port of the broker's management API.
    """

    def __init__(
        self, folder: Path, broker_url: str, management_port: int, *, url: str | None = None
    ) -> None:
        self.name = f"f{uuid.uuid4().hex[:8]}"
        self.folder, self.run = folder, folder / "run"
        self.broker_url, self.url = broker_url, url or broker_url
        self.programs: list[Program] = []
        self.management_port = management_port
        self._starts = 0
        for name in ("log", "sent", "trained", "evidence"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        """Return the federation; no process runs yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill all processes, so that no test leaves one behind."""
        for program in self.programs:
            program.kill()

    def coordinator(self, *flags: object, **env: str) -> Program:
        """Start a coordinator; a second one becomes the standby."""
        where = ("--federation", self.name, "--url", self.url, "--run", self.run)
        return self._start("coordinator", [*FLUFFLE, "coordinator", *where, *flags], env)

    def worker(self, number: int, workers: int, *flags: object, **env: str) -> Program:
        """Start worker ``w<number>``."""
        name = f"w{number}"
        sent = self.folder / "sent" / name
        sent.mkdir(exist_ok=True)
        words = [
            *LOGGED_WORKER, "worker", "--federation", self.name, "--url", self.url,
            "--task", TASK, "--data", f"shard:{number}/{workers}", "--id", name, *flags,
        ]  # fmt: skip
        return self._start(name, words, {"FAULTS_SENT": str(sent), **env})

    def _start(self, name: str, words: list[object], env: dict[str, str]) -> Program:
        self._starts += 1
        program = Program(
            name,
            [*map(str, words), "--log-format", "json"],
            self.folder / "log" / f"{self._starts:03d}-{name}.jsonl",
            {
                _MARK: str(self.folder),
                "FAULTS_TRAINED": str(self.folder / "trained"),
                "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), _PYTHONPATH))),
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                **env,
            },
        )
        self.programs.append(program)
        self.note("processes", {"started": name, "pid": program.pid})
        return program

    def note(self, what: str, line: dict[str, Any]) -> None:
        """Add a line to the evidence, with the monotonic time and the time of the logs."""
        with (self.folder / "evidence" / f"{what}.jsonl").open("a") as file:
            file.write(json.dumps({"at": time.monotonic(), "time": now(), **line}) + "\n")

    @contextlib.contextmanager
    def unheard(self, why: str, **fields: object) -> Iterator[None]:
        """Note in the evidence when no worker could be heard, and which ones lived throughout."""
        began = now()
        known = [one for one in self.programs if one.alive() and one.events("welcome")]
        try:
            yield
        finally:
            living = [one.name for one in known if one.alive()]
            self.note("unheard", {"why": why, "began": began, "living": living, **fields})

    @contextlib.contextmanager
    def stopped(self, program: Program) -> Iterator[None]:
        """Stop a coordinator with SIGSTOP meanwhile, like one whose machine is suspended."""
        with self.unheard("stop", log=program.log.name):
            program.send(signal.SIGSTOP)
            try:
                yield
            finally:
                program.send(signal.SIGCONT)

    # --- the state of the run ------------------------------------------------------------------

    def committed(self) -> int:
        """Return the last round in the history; 0 if there is none."""
        return max((line["round"] for line in self.history("committed")), default=0)

    def run_id(self) -> str:
        """Return the id of the run."""
        return str(json.loads((self.run / "run.json").read_text())["run"])

    def wait_committed(self, number: int, timeout_s: float = PATIENCE_S) -> None:
        """Wait until a round is in the history."""
        wait_until(
            lambda: self.committed() >= number,
            f"round {number} committed ({self.folder})",
            timeout_s,
        )

    def bodies(self, kind: str) -> list[Path]:
        """Return the bodies of the messages of one kind that the workers sent, in no order."""
        names = {
            line["sha256"]: path.parent
            for path in self.folder.glob("sent/*/*.jsonl")
            for line in whole_lines(path)
            if line["type"] == kind
        }
        return [parent / f"{sha}.msgpack" for sha, parent in sorted(names.items())]

    def orphans(self) -> list[str]:
        """Return the processes of this federation that still run and that nobody will end."""
        known = {program.pid for program in self.programs if program.alive()}
        return [
            f"{process.name()} (pid {process.pid})"
            for process in _processes(str(self.folder))
            if process.pid not in known
        ]

    # --- the broker, seen from outside the federation ------------------------------------------

    @contextlib.contextmanager
    def channel(self, *, confirm: bool = True) -> Iterator[Any]:
        """Yield a channel to the broker that bypasses the proxy."""
        connection = pika.BlockingConnection(pika.URLParameters(self.broker_url))
        try:
            channel = connection.channel()
            if confirm:
                channel.confirm_delivery()
            yield channel
        finally:
            with contextlib.suppress(pika.exceptions.AMQPError):
                connection.close()

    def history(self, event: str) -> list[dict[str, Any]]:
        """Return the history's lines of one event."""
        lines = whole_lines(self.run / "history.jsonl")
        return [line for line in lines if line["event"] == event]

    def inject(self, messages: list[Hostile], *, confirm: bool = True) -> None:
        """Publish messages directly into queues, and note each in the evidence."""
        with self.channel(confirm=confirm) as channel:
            for one in messages:
                self.note(
                    "injected",
                    {
                        "id": one.id,
                        "queue": one.queue.removeprefix(f"{self.name}."),
                        "what": one.what,
                        "rejected": one.rejected,
                        "sha256": hashlib.sha256(one.body).hexdigest(),
                    },
                )
                properties = pika.BasicProperties(
                    headers={"faults_id": one.id}, delivery_mode=2, message_id=one.message_id
                )
                channel.basic_publish("", one.queue, one.body, properties)

    def queues(self) -> dict[str, dict[str, Any]]:
        """Return the queues of this federation and their counts, from the management API."""
        link = http.client.HTTPConnection("127.0.0.1", self.management_port, timeout=60)
        login = base64.b64encode(b"guest:guest").decode()
        try:
            link.request("GET", _COUNTS_NOW, headers={"Authorization": f"Basic {login}"})
            queues = json.load(link.getresponse())
        finally:
            link.close()
        prefix = f"{self.name}."
        return {
            one["name"].removeprefix(prefix): {
                "ready": one.get("messages_ready"),
                "unacked": one.get("messages_unacknowledged"),
            }
            for one in queues
            if one["name"].startswith((prefix, "amq."))
        }

    def take_rejected(self) -> None:
        """Take all messages from the rejected queue and note them."""
        with self.channel() as channel:
            while True:
                method, properties, body = channel.basic_get(f"{self.name}.rejected", auto_ack=True)
                if method is None:
                    break
                self.note_rejected(properties, body)

    def note_rejected(self, properties: Any, body: bytes) -> dict[str, Any]:
        """Note rejected messages in the evidence."""
        headers = properties.headers or {}
        line = {
            "id": headers.get("faults_id"),
            "reason": headers.get("reason"),
            "message_id": properties.message_id,
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        self.note("rejected", line)
        return line

    def gather(self) -> None:
        """After the end, write what is left on the broker into the evidence."""
        with contextlib.suppress(AssertionError):
            wait_until(
                lambda: self.queues().get("updates") == {"ready": 0, "unacked": 0},
                "updates empty",
            )
        queues = json.dumps(self.queues(), indent=1)
        (self.folder / "evidence/queues.json").write_text(queues)
        self.take_rejected()

    def gather_orphans(self) -> None:
        """Write the remaining processes into the evidence, after a moment for the last to end."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.orphans(), "all have ended")
        (self.folder / "evidence/orphans.json").write_text(json.dumps(self.orphans()))


def now() -> str:
    """Return the time in the format of the logs."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def whole_lines(path: Path, *, strict: bool = True) -> list[dict[str, Any]]:
    """Read JSON lines, except a last one that a kill truncated.

    Unless ``strict``, skip lines that are no objects, such as those of a traceback.
    """
    data = path.read_bytes() if path.exists() else b""
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    if strict:
        return [json.loads(line) for line in lines]
    entries = []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def _processes(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process


@contextlib.contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Mark all processes that are started meanwhile as belonging to this folder."""
    os.environ[_MARK] = str(folder)
    try:
        yield
    finally:
        del os.environ[_MARK]
