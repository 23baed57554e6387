"""The report of a run: its numbers, its charts, and a page that trusts nothing."""

from __future__ import annotations

import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from rich.console import Console

from fluffle_common.errors import RunError, UsageError
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.messages import Plan
from fluffle_common.protocol.topology import Topology
from fluffle_coordinator.cli.history_table import history_table
from fluffle_coordinator.cli.run_folder import report
from fluffle_coordinator.dashboard import charts
from fluffle_coordinator.dashboard.report_numbers import PHASES, Cell, numbers, phases, read_numbers
from fluffle_coordinator.dashboard.report_page import page
from fluffle_coordinator.machine.state import Quorum, Rules
from fluffle_coordinator.service.configuration import configuration
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.round_stats import Counts
from fluffle_coordinator.storage.run_store import RunStore

TIMINGS = {"waiting_s": 1.0, "open_s": 10.0, "fold_s": 0.5, "average_s": 0.25, "checkpoint_s": 2.0}
EVIL = "<script>alert('x')</script>\"&"


def participant(worker: str, **more: Any) -> dict[str, Any]:
    return {
        "worker": worker, "num_examples": 100, "train_loss": 1.0, "seconds": 4.0, "counted_s": 5.0,
        "bytes": 1000, **more,
    }  # fmt: skip


def committed(number: int, *participants: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "event": "committed", "run": "abc", "round": number, "participants": list(participants),
        "asked": ["a", "b"], "late": 0, "rejected": 0, "timings": TIMINGS,
        "opened_at": f"2026-03-01T10:0{number}:00.000+00:00",
        "committed_at": f"2026-03-01T10:0{number}:30.000+00:00",
        "checkpoint": f"round-{number:04d}.safetensors", **more,
    }  # fmt: skip


def evaluated(number: int, **metrics: float) -> dict[str, Any]:
    return {
        "event": "evaluated", "round": number, "loss": 0.5, "num_examples": 30,
        "evaluators": ["a"], "evaluated_at": "2026-03-01T10:09:00.000+00:00", **metrics,
    }  # fmt: skip


LATE = {"worker": "b", "round": 1, "num_examples": 40}
REJECTION = {"reason": "tensor 'w' has 3 values that are NaN", "cause": "not_finite",
             "kind": "update", "worker": "b", "round": 2}  # fmt: skip
LINES = [
    committed(1, participant("a")),
    evaluated(1, accuracy=0.5),
    committed(
        2, participant("a", num_examples=300, train_loss=2.0), participant("b"),
        late=1, late_updates=[LATE],
    ),
    committed(3, participant("a"), asked=["a"], rejected=2, rejections=[REJECTION]),
    evaluated(3, accuracy=0.75, temperature=0.9),
]  # fmt: skip


# --- the numbers -------------------------------------------------------------------------------


def test_participation_is_told_by_worker_and_round():
    found = numbers(LINES, {"federation": "letters", "run": "abc"}, [])
    a, b = found.workers
    assert (a.name, a.counted, a.late, a.bytes, a.train_s) == ("a", 3, 0, 3000, 4.0)
    assert a.cells == (Cell("counted", 100), Cell("counted", 300), Cell("counted", 100))
    # Late in round 1, as the line of round 2 says, counted in round 2, and not asked in round 3.
    assert b.cells == (Cell("late", 40), Cell("counted", 100), Cell("absent"))
    assert (b.counted, b.late, b.rejected) == (1, 1, 1)
    without = numbers([committed(1, participant("a"))], {}, []).workers
    assert [row.cells for row in without] == [(Cell("counted", 100),), (Cell("no answer"),)]


def test_rounds_carry_their_evaluation_and_their_sums():
    one, two, three = numbers(LINES, {}, []).rounds
    assert (one.loss, one.metrics, one.evaluated_on) == (0.5, {"accuracy": 0.5}, 30)
    assert (two.loss, two.metrics, two.num_examples, two.bytes) == (None, {}, 400, 2000)
    assert two.train_loss == pytest.approx(1.75)
    assert (two.late, two.rejected, three.late, three.rejected) == (1, 0, 0, 2)
    assert three.metrics == {"accuracy": 0.75, "temperature": 0.9}
    assert numbers(LINES, {}, []).metrics == ("accuracy", "temperature")


def test_what_was_rejected_is_told_with_the_round_that_was_open():
    assert numbers(LINES, {}, []).rejections == ({"during": 3, **REJECTION},)


def test_the_phases_of_a_round_add_up_to_all_of_it():
    line = committed(1, participant("a"), participant("b", counted_s=9.0, seconds=6.0))
    found = phases(line)
    assert found is not None
    assert tuple(found) == PHASES
    # b was last: after 6 s of training, and half a second of adding up; nothing came in 1 s more.
    assert found == {
        "waiting": 2.0, "training": 6.0, "transfer": 2.5, "aggregation": 0.75, "checkpoint": 2.0,
    }  # fmt: skip
    assert sum(found.values()) == TIMINGS["waiting_s"] + 10.0 + 0.25 + 2.0


@pytest.mark.parametrize(
    "participants",
    [
        [],
        [{"worker": "a", "num_examples": 1}],
        [participant("a", seconds=99.0, counted_s=99.0)],  # trained before a coordinator resumed
        [participant("a", seconds=None, counted_s=0.0)],
    ],
)
def test_no_phase_is_negative_whatever_a_worker_says(participants):
    found = phases(committed(1, *participants))
    assert found is not None
    assert min(found.values()) >= 0
    assert sum(found.values()) == pytest.approx(13.25)


def test_an_older_history_tells_less_and_that_is_no_error():
    line = {"event": "committed", "round": 1,
            "participants": [{"worker": "a", "num_examples": 5}]}  # fmt: skip
    found = numbers([line], {"run": "abc", "federation": "old"}, [])
    (one,) = found.rounds
    assert (one.phases, one.seconds, one.train_loss, one.loss, one.late) == (None,) * 4 + (0,)
    told = page(found)
    assert "does not tell where its time went" in told
    assert "did not note how it was configured" in told
    assert "No round has been evaluated yet" in told


def test_a_run_without_a_committed_round_has_a_page():
    assert "0<" in page(numbers([], {}, []))


# --- the page ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """What is in a page: its tags, the attributes that load anything, and its text."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [name for name, _ in attrs if name in ("src", "href", "srcset", "data")]
        self.loads += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def test_a_page_is_well_formed_and_loads_nothing():
    told = page(numbers(LINES, {"federation": "letters", "run": "abc"}, []))
    found = Page(told)
    assert not found.tags & {"script", "link", "img", "iframe", "a"}
    assert found.loads == []
    assert not re.search(r"https?:|url\(|@import", told)
    for drawing in re.findall(r"<svg.*?</svg>", told, re.DOTALL):
        ElementTree.fromstring(drawing)
    text = " ".join(found.text)
    for words in ("75%", "tensor 'w' has 3 values that are NaN", "not_finite",
                  "Of 1 more the history does not tell why", "abc"):  # fmt: skip
        assert words in text


def test_everything_that_came_from_outside_is_escaped():
    lines = [
        committed(
            1,
            participant(EVIL),
            late=1,
            rejected=1,
            late_updates=[{"worker": EVIL, "round": 1}],
            rejections=[dict.fromkeys(("reason", "cause", "kind", "worker"), EVIL)],
            asked=[EVIL, "b" + EVIL],
            opened_at=EVIL,
            committed_at=EVIL,
        ),
        evaluated(1, **{EVIL: 0.5}),
    ]
    settings = {"rules": {EVIL: EVIL}, "from_round": EVIL, "versions": {EVIL: EVIL}}
    identity = {"federation": EVIL, "run": EVIL, "configurations": [{"rules": {}}, settings]}
    told = page(numbers(lines, identity, []))
    found = Page(told)
    assert "script" not in found.tags
    assert found.loads == []
    assert "<script" not in told
    for drawing in re.findall(r"<svg.*?</svg>", told, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_a_dollar_sign_is_only_a_dollar_sign():
    assert "$title ${tiles}" in page(numbers([], {"federation": "$title ${tiles}"}, []))


def test_what_a_resumed_run_changed_is_told():
    before = {"from_round": 1, "rules": {"rounds": 3, "deadline_s": 600.0}}
    after = {"from_round": 3, "rules": {"rounds": 9, "deadline_s": 600.0}}
    text = " ".join(Page(page(numbers(LINES, {"configurations": [before, after]}, []))).text)
    assert re.search(r"Changes .* 3 rounds 3 9 ", text)
    assert "3 of 9" in text
    assert "10 min" in text


# --- charts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1e-9, 0.3, 1, 7, 99.5, 1e6, 3.3e12])
def test_ticks_reach_the_top_and_are_few(top):
    marks = charts.ticks(top)
    assert marks[0] == 0
    assert marks[-1] >= top * 0.999
    assert marks[-2] < top
    assert 4 <= len(marks) <= 9


def test_a_line_is_broken_where_there_is_no_value():
    series = charts.Series("loss", "two", [1.0, None, 0.5, 0.25])
    drawing = charts.line_chart("loss", [1, 2, 3, 4], [series], str)
    (path,) = re.findall(r'<path d="([^"]*)"', drawing)
    assert re.sub("[^ML]", "", path) == "MML"
    assert drawing.count("<circle") == 3


@pytest.mark.parametrize("rounds", [1, 2, 500])
def test_charts_of_few_and_of_many_rounds_stay_inside(rounds):
    at = list(range(1, rounds + 1))
    values = [1.0 / n for n in at]
    drawings = [
        charts.line_chart("l", at, [charts.Series("l", "one", values)], str),
        charts.stacked_bars("t", at, [{"x": value} for value in values], {"x": "one"}, str),
        charts.matrix("m", at, [("w" * 64, [charts.Square("counted", "9", "t")] * rounds, "9")]),
    ]
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        xs = [float(one.attrib[name]) for one in root.iter() for name in ("x", "cx", "x2")
              if name in one.attrib]  # fmt: skip
        assert 0 <= min(xs)
        assert max(xs) <= width
        assert all(float(one.attrib["height"]) <= height for one in root.iter("rect"))
        names = [one for one in root.iter("text") if (one.text or "").isdigit()]
        assert len(names) <= 12 + 2 * rounds


# --- from a folder -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = RunStore(tmp_path / "run")
    store.load("letters")
    for line in LINES:
        store.append(line)
    (store.folder / "round-0001.safetensors").write_bytes(b"a model")
    return store.folder


def test_checkpoints_are_told_with_size_and_hash(folder):
    (one,) = read_numbers(folder).checkpoints
    digest = hashlib.sha256(b"a model").hexdigest()
    assert (one.file, one.size_bytes, one.sha256) == ("round-0001.safetensors", 7, digest)
    assert digest in page(read_numbers(folder))


def test_the_command_writes_the_page_or_prints_the_numbers(folder, tmp_path):
    done = CliRunner().invoke(report, [str(folder)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "<h1>letters</h1>" in (folder / "report.html").read_text()
    out = tmp_path / "x.html"
    CliRunner().invoke(report, [str(folder), "--out", str(out)], catch_exceptions=False)
    assert "<h1>letters</h1>" in out.read_text()
    told = json.loads(CliRunner().invoke(report, [str(folder), "--json"]).output)
    assert (told["federation"], len(told["rounds"]), len(told["workers"])) == ("letters", 3, 2)
    assert told["workers"][1]["cells"][0] == {"answer": "late", "num_examples": 40}


def test_what_is_missing_or_cannot_be_written_is_told_in_one_line(folder, tmp_path):
    with pytest.raises(UsageError, match="there is no history"):
        CliRunner().invoke(report, [str(tmp_path)], catch_exceptions=False)
    with pytest.raises(RunError, match="cannot write"):
        arguments = [str(folder), "--out", str(tmp_path / "no" / "x.html")]
        CliRunner().invoke(report, arguments, catch_exceptions=False)
    (folder / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"run\.json cannot be read"):
        read_numbers(folder)


# --- what is noted during a run ----------------------------------------------------------------


def settings(**rules: Any) -> CoordinatorSettings:
    return CoordinatorSettings(
        "letters",
        Rules(rounds=3, quorum=Quorum(fraction=0.5), **rules),
        Plan(config={"momentum": 0.9}),
        keep_updates=True,
    )


def test_a_configuration_is_noted_when_it_is_another(tmp_path):
    store = RunStore(tmp_path)
    run = store.load("letters").run

    def noted() -> list[dict[str, Any]]:
        told = json.loads((tmp_path / "run.json").read_text())
        assert (told["run"], told["federation"]) == (run, "letters")
        return told["configurations"]

    store.note_configuration(configuration(settings(), Topology("letters")), 0)
    store.note_configuration(configuration(settings(), Topology("letters")), 1)
    assert [one["from_round"] for one in noted()] == [1]
    store.note_configuration(configuration(settings(grace_s=5.0), Topology("letters")), 2)
    assert [one["from_round"] for one in noted()] == [1, 3]
    first, second = noted()
    assert first["rules"]["quorum"] == {"number": None, "fraction": 0.5}
    assert first["plan"]["config"] == {"momentum": 0.9}
    assert (first["keep_updates"], first["queue_type"]) == (True, "classic")
    assert {"fluffle", "python", "numpy"} <= first["versions"].keys()
    assert second["rules"]["grace_s"] == 5.0
    assert store.load("letters").run == run  # it is still the same run


def test_counts_remember_the_first_of_each_and_count_all():
    counts = Counts()
    for number in range(200):
        counts.note(run_events.from_fields("late", {"worker": f"w{number}", "round": 1}))
        counts.note(run_events.from_fields("rejected", REJECTION))
        counts.note(run_events.from_fields("joined", {"worker": "x"}))
    assert (counts.late, counts.rejected) == (200, 200)
    assert len(counts.late_updates) == len(counts.rejections) == 50
    assert counts.late_updates[0]["worker"] == "w0"


@pytest.mark.parametrize(("width", "names"), [(80, False), (120, True)])
def test_the_history_fits_the_terminal_and_no_cell_is_cut(width, names):
    rounds = [
        {
            "round": number,
            "participants": [
                {"worker": f"client-{n}", "num_examples": 225, "train_loss": 1.5} for n in (1, 2, 3)
            ],
            "loss": 1.25,
            "accuracy": 0.75,
            "temperature": 0.5,
            "late": 0,
            "rejected": 0,
        }
        for number in range(1, 7)
    ]
    out = io.StringIO()
    Console(file=out, width=width).print(history_table(rounds, width))
    lines = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
    assert len(lines) == 2 + 6
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    assert "temperature" in lines[0]
    assert ("client-1, client-2, client-3" in lines[2]) == names
    rounds[0]["late"] = 1
    assert [c.header for c in history_table(rounds, 80).columns][-1] == "late"
