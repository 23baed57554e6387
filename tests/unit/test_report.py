"""The report of a run: what it shows, and a page that stands alone and trusts nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from fluffle_common.durable_files import replacing
from fluffle_common.errors import RunError, UsageError
from fluffle_common.protocol import events as run_events
from fluffle_common.protocol.messages import Plan
from fluffle_common.protocol.topology import Topology
from fluffle_common.tensors.checkpoint import checkpoint_name
from fluffle_coordinator.cli.history_table import history_tables
from fluffle_coordinator.cli.run_folder import report
from fluffle_coordinator.dashboard.report import page, read_report, snapshot
from fluffle_coordinator.machine.state import Quorum, Rules
from fluffle_coordinator.observe.round_view import PHASES, RoundView, remembered
from fluffle_coordinator.service.settings import CoordinatorSettings
from fluffle_coordinator.storage.replay import strategy_of
from fluffle_coordinator.storage.round_stats import Counts
from fluffle_coordinator.storage.run_store import RunStore
from tests import history_lines
from tests.history_lines import evaluated

TIMINGS = {"waiting_s": 1.0, "open_s": 10.0, "fold_s": 0.5, "average_s": 0.25, "checkpoint_s": 2.0}
EVIL = "<script>alert('x')</script>\"&"


def participant(worker: str, **more: Any) -> dict[str, Any]:
    fields = {"num_examples": 100, "train_loss": 1.0, "seconds": 4.0, "counted_s": 5.0}
    return history_lines.participant(worker, **{**fields, "bytes": 1000, **more})


def committed(number: int, *participants: dict[str, Any], **more: Any) -> dict[str, Any]:
    fields = {
        "run": "abc", "asked": ["a", "b"], "timings": TIMINGS,
        "opened_at": f"2026-03-01T10:0{number % 10}:00.000+00:00",
        "committed_at": f"2026-03-01T10:0{number % 10}:30.000+00:00",
    }  # fmt: skip
    return history_lines.committed(number, *participants, **{**fields, **more})


LATE = {"worker": "b", "round": 1, "num_examples": 40}
REJECTION = {"reason": "tensor 'w' has 3 values that are NaN", "cause": "not_finite",
             "kind": "update", "worker": "b", "round": 2}  # fmt: skip
ROWS: list[dict[str, Any]] = [
    committed(1, participant("a")) | evaluated(1, accuracy=0.5),
    committed(
        2, participant("a", num_examples=300, train_loss=2.0), participant("b"),
        late=1, late_updates=[LATE],
    ),
    committed(3, participant("a"), asked=["a"], rejected=2, rejections=[REJECTION])
    | evaluated(3, accuracy=0.75, temperature=0.9),
]  # fmt: skip
NOW = 1_800_000_000.0


def shown(rows: list[dict[str, Any]] = ROWS, **more: Any) -> dict[str, Any]:
    """Return what the report of a history shows."""
    defaults = {"identity": {"federation": "letters", "run": "abc"}, "checkpoints": [], "end": None}
    return snapshot(rows, now=NOW, **{**defaults, **more})


# --- what it shows -----------------------------------------------------------------------------


def test_who_took_part_in_which_round():
    data = shown()
    a, b = data["workers"]
    assert (a["name"], a["counted"], a["late"], a["bytes"], a["train_s"]) == ("a", 3, 0, 3000, 4.0)
    assert (b["counted"], b["late"], b["rejected"]) == (1, 1, 1)
    one, two, three = data["rounds"]
    # Late in round 1, as the row of round 2 says, counted in round 2, and not asked in round 3.
    assert (one["asked"], one["came_late"], two["came_late"]) == (["b"], ["b"], [])
    assert (two["participants"], two["examples"]) == (["a", "b"], [300, 100])
    assert (three["asked"], three["participants"]) == ([], ["a"])


def test_rounds_carry_their_evaluation_and_their_sums():
    one, two, three = shown()["rounds"]
    assert (one["loss"], one["metrics"], one["evaluated_on"]) == (0.5, {"accuracy": 0.5}, 30)
    assert ("loss" in two, two["num_examples"], two["bytes"]) == (False, 400, 2000)
    assert two["train_loss"] == pytest.approx(1.75)
    assert (two["late"], two["rejected"], three["late"], three["rejected"]) == (1, 0, 0, 2)
    assert shown()["curves"] == {
        "rounds": [1, 2, 3], "loss": [0.5, None, 0.5], "training loss": [1.0, 1.75, 1.0],
        "accuracy": [0.5, None, 0.75], "temperature": [None, None, 0.9],
    }  # fmt: skip


def test_what_was_rejected_is_told_with_the_round_that_was_open_and_all_are_counted():
    rejected = shown()["rejected"]
    [one] = rejected["latest"]
    assert one["during"] == 3
    assert {name: one[name] for name in REJECTION} == REJECTION
    assert (rejected["causes"], rejected["total"]) == ({"not_finite": 1}, 2)


def phases(*participants: dict[str, Any]) -> dict[str, float]:
    result = remembered(committed(1, *participants)).phases
    assert result is not None
    return result


def test_the_phases_of_a_round_add_up_to_all_of_it():
    result = phases(participant("a"), participant("b", counted_s=9.0, seconds=6.0))
    assert tuple(result) == PHASES
    # b was last: after 6 s of training, and half a second of adding up; nothing came in 1 s more.
    assert result == {
        "waiting": 2.0, "training": 6.0, "transfer": 2.5, "aggregation": 0.75, "checkpoint": 2.0,
    }  # fmt: skip
    assert sum(result.values()) == TIMINGS["waiting_s"] + 10.0 + 0.25 + 2.0
    assert RoundView(1).phases is None


@pytest.mark.parametrize(
    "participants",
    [
        [],
        [participant("a", seconds=99.0, counted_s=99.0)],  # trained before a coordinator resumed
        [participant("a", seconds=None, counted_s=0.0)],
    ],
)
def test_no_phase_is_negative_whatever_a_worker_says(participants):
    result = phases(*participants)
    assert min(result.values()) >= 0
    assert sum(result.values()) == pytest.approx(13.25)


def test_a_report_has_every_worker_round_and_metric():
    names = [f"w{number}" for number in range(2100)]
    metrics = {f"metric-{number}": 0.5 for number in range(12)}
    rows = [committed(1, *map(participant, names)) | evaluated(1, **metrics)]
    data = shown(rows + [committed(number) for number in range(2, 61)])
    assert (len(data["rounds"]), len(data["rounds"][0]["participants"])) == (60, 2100)
    assert len(data["workers"]) == 2100 + 2  # "a" and "b" were asked
    assert metrics.keys() <= data["curves"].keys()


def test_the_page_of_a_long_run_has_the_details_of_the_last_rounds(tmp_path):
    rounds = range(9998, 10_002)
    lines = [
        line
        for n in rounds
        for line in (committed(n, participant("a")) | {"event": "committed"}, evaluated(n))
    ]
    (tmp_path / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for number in rounds:
        (tmp_path / checkpoint_name(number)).write_bytes(b"a model")
    data, last = read_report(tmp_path, NOW), read_report(tmp_path, NOW, 2)
    assert [row["round"] for row in data["rounds"]] == list(rounds)
    assert [one["file"] for one in data["checkpoints"]] == list(map(checkpoint_name, rounds))
    assert last["rounds"] == data["rounds"][2:]
    assert last["checkpoints"] == data["checkpoints"][2:]
    others = data.keys() - {"rounds", "checkpoints"}
    assert {name: last[name] for name in others} == {name: data[name] for name in others}
    assert (last["totals"]["updates"], last["totals"]["checkpoints"]) == (4, 4)


def test_how_the_run_stands():
    rules = {"configurations": [{"rules": {"rounds": 9}}]}
    assert "3 of 9 rounds are committed" in shown(identity=rules)["run"]["words"]
    assert shown([])["run"]["committed"] == 0
    ended = {"event": "ended", "outcome": "stopped", "reason": "no quorum"}
    run = shown(end=ended)["run"]
    assert (run["phase"], run["words"]) == ("ended", "stopped: no quorum")


def test_it_shows_only_configurations_that_a_round_was_committed_under():
    def used(*from_rounds: int) -> list[int]:
        configurations = [{"from_round": number} for number in from_rounds]
        report = shown(identity={"configurations": configurations})
        return [each["from_round"] for each in report["configurations"]]

    assert used(1, 7, 7, 7) == [1, 7]
    assert used(1, 4, 7) == [1, 4, 7]
    assert used(1, 5, 8, 4) == [1, 4]  # the rounds from 4 on were lost


# --- the page ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """What is in a page: its tags and what they load, its policy, and its scripts and styles."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.inline: list[str] = []
        self.policy = ""
        self.snapshot: Any = None
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"]
        self.is_snapshot = ("id", "snapshot") in attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"] and self.is_snapshot:
            self.snapshot = json.loads(data)
        elif self.open[-1:] in (["script"], ["style"]):
            self.inline.append(data)


def test_a_page_loads_nothing_and_runs_nothing_but_its_own_scripts():
    html = page(shown())
    parsed = Page(html)
    assert all(one.startswith(("data:image/svg+xml;base64,", "#")) for one in parsed.loads)
    assert not re.search(r"https?:|url\(|@import", html.replace("http://www.w3.org/2000/svg", ""))
    assert "unsafe" not in parsed.policy
    assert parsed.policy.startswith("default-src 'none'; ")
    assert len(parsed.inline) == 3
    for text in parsed.inline:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in parsed.policy
    assert parsed.snapshot == json.loads(json.dumps(shown()))


def test_the_scripts_are_one_in_which_no_name_is_taken_twice():
    script = max(Page(page(shown())).inline, key=len)
    assert not re.search(r"^(import|export)\b", script, re.MULTILINE)
    names = re.findall(r"^(?:async )?(?:function|const|let|class) (\w+)", script, re.MULTILINE)
    assert len(names) > 40
    assert sorted(set(names)) == sorted(names)


def test_a_live_page_and_its_report_have_the_same_panels():
    live = (files("fluffle_coordinator.dashboard") / "static" / "page.html").read_text()
    html = page(shown())
    ids = [set(re.findall(r' id="([\w-]+)"', text)) for text in (live, html)]
    assert ids[1] - ids[0] == {"snapshot"}
    assert {"queues", "journal", "open", "answers"} <= ids[0] - ids[1]
    assert {"chart", "history", "workers", "rejected", "participation", "time"} <= ids[1]


@pytest.mark.parametrize("evil", [EVIL, "</script><!--<script>", "\u2028\u2029", "$title ${tiles}"])
def test_what_came_from_outside_is_text(evil):
    rows = [
        committed(
            1,
            participant(evil),
            late=1,
            rejected=1,
            late_updates=[{"worker": evil, "round": 1}],
            rejections=[dict.fromkeys(("reason", "cause", "kind", "worker"), evil)],
            asked=[evil, "b" + evil],
        )
        | evaluated(1, **{evil: 0.5})
    ]
    settings = {"rules": {evil: evil}, "from_round": 1, "since": evil, "versions": {evil: evil}}
    identity = {"federation": evil, "run": evil, "configurations": [{"rules": {}}, settings]}
    data = shown(rows, identity=identity)
    html = page(data)
    parsed = Page(html)
    assert parsed.tags == Page(page(shown())).tags
    assert parsed.snapshot == json.loads(json.dumps(data))
    assert "\u2028" not in html[html.index("<script") : html.rindex("</script>")]
    assert parsed.snapshot["run"]["federation"] == evil


# --- from a folder -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = RunStore(tmp_path / "run")
    store.load("letters")
    for number, row in enumerate(ROWS, start=1):
        metrics = {name: row[name] for name in ("accuracy", "temperature") if name in row}
        store.history.append({**row, "event": "committed"})
        if metrics:
            store.history.append(evaluated(number, **metrics))
    (store.folder / "round-0001.safetensors").write_bytes(b"a model")
    return store.folder


def test_checkpoints_are_told_with_size_and_hash(folder):
    (one,) = read_report(folder, NOW)["checkpoints"]
    digest = hashlib.sha256(b"a model").hexdigest()
    assert one == {"file": "round-0001.safetensors", "size_bytes": 7, "sha256": digest}


def test_a_checkpoint_that_a_running_coordinator_removes_is_left_out(folder, monkeypatch):
    files = {1: folder / "round-0001.safetensors", 2: folder / "round-0002.safetensors"}
    monkeypatch.setattr("fluffle_coordinator.dashboard.report.checkpoint_files", lambda _: files)
    data = read_report(folder, NOW)
    assert [one["file"] for one in data["checkpoints"]] == ["round-0001.safetensors"]
    assert data["totals"]["checkpoints"] == 1


def test_the_page_of_a_large_run_has_what_it_draws():
    names = [f"w{number:04}" for number in range(1000)]
    rejections = [dict.fromkeys(("reason", "cause", "kind", "worker"), "x")] * 50
    rows = [
        committed(n, *map(participant, names), rejected=50, rejections=rejections)
        for n in range(1, 101)
    ]
    data = shown(rows)
    drawn = Page(page(data)).snapshot
    assert (drawn["unlisted"], len(drawn["rounds"][0]["participants"])) == (902, 98)
    assert (len(drawn["rejected"]["latest"]), drawn["rejected"]["total"]) == (1000, 5000)
    assert (len(data["rounds"][0]["participants"]), len(data["rejected"]["latest"])) == (1000, 5000)


def test_the_command_writes_the_page_or_prints_what_it_draws(folder, tmp_path):
    done = CliRunner().invoke(report, [str(folder)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "<title>letters: report</title>" in (folder / "report.html").read_text()
    out = tmp_path / "x.html"
    CliRunner().invoke(report, [str(folder), "--out", str(out)], catch_exceptions=False)
    data = json.loads(CliRunner().invoke(report, [str(folder), "--json"]).output)
    drawn = Page(out.read_text()).snapshot
    assert {**drawn, "now": 0} == {**data, "now": 0}
    assert (data["run"]["federation"], len(data["rounds"]), len(data["workers"])) == (
        "letters", 3, 2,
    )  # fmt: skip


def test_a_folder_named_without_its_parent_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no run folder 'letters'; give one such as runs/letters"):
        CliRunner().invoke(report, ["letters"], catch_exceptions=False)
    (tmp_path / "runs/letters").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no run folder 'letters'; did you mean 'runs/letters'\?"):
        CliRunner().invoke(report, ["letters"], catch_exceptions=False)


def test_a_link_to_the_page_stays_a_link(folder, tmp_path):
    page_file, link = tmp_path / "page.html", tmp_path / "link.html"
    link.symlink_to("page.html")
    for _ in range(2):  # the file is new, then replaced
        CliRunner().invoke(report, [str(folder), "--out", str(link)], catch_exceptions=False)
        assert link.is_symlink()
        assert "<title>" in page_file.read_text()
        page_file.write_text("")
    assert sorted(tmp_path.glob("*.html")) == [link, page_file]
    assert not list(tmp_path.glob("*.partial"))


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(pipe) as file:
        file.write(b"a page")
    assert os.read(reading, 100) == b"a page"
    assert pipe.is_fifo()
    os.close(reading)


def test_what_is_missing_or_cannot_be_written_is_told_in_one_line(folder, tmp_path):
    with pytest.raises(UsageError, match="there is no history"):
        CliRunner().invoke(report, [str(tmp_path)], catch_exceptions=False)
    with pytest.raises(UsageError, match=r"cannot write .*; choose another file with --out"):
        arguments = [str(folder), "--out", str(tmp_path / "no" / "x.html")]
        CliRunner().invoke(report, arguments, catch_exceptions=False)
    with pytest.raises(UsageError, match="--out conflicts with --json"):
        arguments = [str(folder), "--out", str(tmp_path / "x.html"), "--json"]
        CliRunner().invoke(report, arguments, catch_exceptions=False)


@pytest.mark.parametrize("event", ["tested", "of a later version", "evaluated"])
def test_a_line_cannot_change_the_fields_of_another_kind_of_line(folder, event):
    odd = {"participants": 7, "opened_at": {}, "timings": "x", "loss": "low", "late": None}
    if event == "evaluated":
        odd = {**evaluated(1), **odd, "loss": 0.5}
    before = read_report(folder, NOW)["rounds"]
    with (folder / "history.jsonl").open("a") as history:
        history.write(json.dumps({"round": 1, **odd, "event": event}) + "\n")
    assert read_report(folder, NOW)["rounds"][0]["participants"] == before[0]["participants"]


@pytest.mark.parametrize(
    "text",
    [
        "{", "\udcff", "[1,2]", "null", '{"configurations": 1}', '{"configurations": [1]}',
        '{"configurations": [{"from_round": "1"}]}',
        '{"configurations": [{"from_round": 1, "rules": []}]}',
        '{"configurations": [{"from_round": 1, "plan": null}]}', "[" * 100_000,
        '{"configurations": [{"from_round": 1, "plan": {"train": 1}}]}', '{"starts": -1}',
    ],
)  # fmt: skip
def test_a_damaged_run_file_is_reported_in_one_line(folder, text):
    (folder / "run.json").write_text(text, errors="surrogateescape")
    for read in (lambda: read_report(folder, NOW), lambda: strategy_of(folder, 1)):
        with pytest.raises(UsageError, match=r"run\.json cannot be read"):
            read()
    with pytest.raises(RunError, match=r"run\.json cannot be read; .* --fresh"):
        RunStore(folder).load("letters")


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
        identity = json.loads((tmp_path / "run.json").read_text())
        assert (identity["run"], identity["federation"]) == (run, "letters")
        return identity["configurations"]

    store.note_configuration(settings().configuration(Topology("letters")), 0)
    store.note_configuration(settings().configuration(Topology("letters")), 1)
    assert [one["from_round"] for one in noted()] == [1]
    store.note_configuration(settings(grace_s=5.0).configuration(Topology("letters")), 2)
    assert [one["from_round"] for one in noted()] == [1, 3]
    first, second = noted()
    assert first["rules"]["quorum"] == {"number": None, "fraction": 0.5}
    assert first["plan"]["config"] == {"momentum": 0.9}
    assert (first["keep_updates"], first["queue_type"]) == (True, "classic")
    assert {"fluffle", "python", "numpy"} <= first["versions"].keys()
    assert second["rules"]["grace_s"] == 5.0
    assert store.load("letters").run == run  # it is still the same run


def test_a_configuration_that_lacks_a_hook_is_another_one(tmp_path):
    store = RunStore(tmp_path)
    store.load("letters")
    for hooks in ({"on_round": "plot"}, {}, {}):
        store.note_configuration({"rules": {"rounds": 3}, **hooks}, 0)
    assert ["on_round" in each for each in _configurations(tmp_path)] == [True, False]


def test_a_configuration_holds_from_the_round_that_a_run_goes_back_to(tmp_path):
    store = RunStore(tmp_path)
    store.load("letters")
    store.note_configuration({"strategy": "mean"}, 0)
    store.note_configuration({"strategy": "median"}, 5)
    store.note_configuration({"strategy": "median"}, 2)  # the checkpoints from 3 on are damaged
    assert [each["from_round"] for each in _configurations(tmp_path)] == [1, 6, 3]


def test_a_configuration_is_json_even_without_limits(tmp_path):
    store = RunStore(tmp_path)
    store.load("letters")
    for _ in range(2):
        store.note_configuration({"rules": {"stall_s": math.inf, "rounds": 3}}, 0)
    (noted,) = _configurations(tmp_path)
    assert noted["rules"] == {"stall_s": None, "rounds": 3}


def _configurations(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    text = (folder / "run.json").read_text()
    return list(json.loads(text, parse_constant=refuse)["configurations"])


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
    (lines,) = history_tables(rounds, width)
    assert len(lines) == 1 + 6
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    assert "temperature" in lines[0]
    assert ("client-1, client-2, client-3" in lines[1]) == names
    rounds[0]["late"] = 1
    assert history_tables(rounds, 80)[-1][0].split()[-1] == "late"


def test_metrics_that_do_not_fit_the_terminal_are_in_tables_of_their_own():
    metrics = {f"label_{n}_auc": 0.9 + n / 1000 for n in range(8)}
    rounds = [{"round": 1, "participants": [], "loss": 0.5, **metrics}]
    tables = history_tables(rounds, 80)
    shown = " ".join(line for lines in tables for line in lines).split()
    for name, value in metrics.items():
        assert name in shown
        assert f"{value:.4f}" in shown
    assert all(len(line) <= 80 for lines in tables for line in lines)
    assert [lines[0].split()[0] for lines in tables] == ["round"] * len(tables)
    assert len(tables) == 3


def test_the_history_has_one_line_per_round_however_long_and_wide_names_are():
    worker, metric = "病院\x1b[2J", "m" * 100
    rounds = [committed(n, participant(worker, num_examples=n), **{metric: 0.5}) for n in (9, 10)]
    named, measured = history_tables(rounds, 60)
    assert [line.split() for line in named[1:]] == [
        ["9", "1", "9", "1.0000"],
        ["10", "1", "10", "1.0000"],
    ]
    assert measured[1:] == [f"    9  {'0.5000':>100}", f"   10  {'0.5000':>100}"]
    (full,) = history_tables(rounds, 200)
    assert {cell_len(line) for line in full} == {cell_len(full[0])}
    assert full[1].startswith(f"    9  病院\\x1b[2J {'9':>10}  ")


def test_the_history_of_an_asynchronous_run_says_how_old_updates_were():
    slow, quick = participant("slow", staleness=6, weight=3.8), participant("quick")
    rounds = [committed(1, quick, quick), committed(2, quick, slow, quick)]
    (lines,) = history_tables(rounds, 80)
    assert lines[0].split()[:3] == ["round", "updates", "stalest"]
    assert [line.split()[:3] for line in lines[1:]] == [["1", "2", "0"], ["2", "3", "6"]]
    assert "stalest" not in history_tables(rounds[:1], 80)[0][0]
