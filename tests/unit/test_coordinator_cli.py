"""The coordinator's options as settings and as the training plan."""

import os
import platform
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from fluffle.simulation.cli import simulate
from fluffle_common.errors import UsageError
from fluffle_common.protocol.messages import Compression
from fluffle_coordinator.cli.coordinator import coordinator
from fluffle_coordinator.cli.plan_options import COMPRESS
from fluffle_coordinator.service import app as main
from fluffle_coordinator.service.app import settings_of


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("int8", "int8"),
        ("topk:0.01", "topk:0.01"),
        ("topk:.1", "topk:0.1"),
        ("topk:0.10", "topk:0.1"),
        ("topk:1e-3", "topk:0.001"),
        ("topk:0.5", "topk:0.5"),
        ("topk:0.000001", "topk:0.000001"),
        ("topk:0.0000125", "topk:0.0000125"),
        ("topk:0.3333333", "topk:0.3333333"),
    ],
)
def test_every_accepted_encoding_is_valid_in_a_plan(text, how):
    assert COMPRESS.convert(text, None, None) == how
    assert str(Compression.parse(how)) == how


@pytest.mark.parametrize(
    "text", ["", "int4", "bf16", "topk", "topk:", "topk:x", "topk:0", "topk:0.6", "topk:nan"]
)
def test_invalid_encodings_are_refused_with_the_valid_ones(text):
    with pytest.raises(click.BadParameter, match="unknown compression .*; give int8, topk"):
        COMPRESS.convert(text, None, None)


@pytest.mark.parametrize(
    ("flags", "compress"),
    [
        ([], None),
        (["--upload-dtype", "float32"], None),
        (["--upload-dtype", "bf16"], "bf16"),
        (["--upload-dtype", "f16"], "f16"),
        (["--compress", "int8"], "int8"),
        (["--compress", "topk:0.02"], "topk:0.02"),
    ],
)
def test_the_plan_contains_the_options(monkeypatch, flags, compress):
    settings = []
    monkeypatch.setattr(main, "run_coordinator", lambda asked: settings.append(settings_of(asked)))
    CliRunner().invoke(coordinator, ["--federation", "f", *flags], catch_exceptions=False)
    assert str(settings[0].plan.compress) == str(compress)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--upload-dtype bf16 --compress int8", "--upload-dtype conflicts with --compress"),
        ("--epochs 2 --steps 3", "--epochs conflicts with --steps"),
        ("--fraction 0.5 --sample 3", "--fraction conflicts with --sample"),
        ("--max-round 60", "--max-round 60 is less than --deadline 600, .*; raise .* or lower --d"),
    ],
)
def test_options_that_exclude_each_other_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(
            coordinator, ["--federation", "f", *flags.split()], catch_exceptions=False
        )


@pytest.mark.parametrize("flags", [["--quorum"], ["--on-deadline", "close", "--min-updates"]])
def test_more_updates_than_a_sample_can_send_are_refused(flags):
    wrong = f"{flags[-1]} 3 needs more updates than --sample 2 asks for; lower {flags[-1]} or raise"
    with pytest.raises(UsageError, match=wrong):
        CliRunner().invoke(
            coordinator, ["--federation", "f", *flags, "3", "--sample", "2"], catch_exceptions=False
        )


@pytest.mark.parametrize("command", [coordinator, simulate])
@pytest.mark.parametrize(
    "flags", [("--quorum", "2"), ("--grace", "1"), ("--fraction", "1"), ("--over-provision", "1")]
)
def test_what_the_buffered_schedule_would_ignore_is_refused(command, flags):
    words = ["--federation", "f", "--schedule", "buffered", *flags]
    if command is simulate:
        words += ["--task", f"{Path(__file__).parents[1] / 'e2e/waiting_task.py'}:task"]
        words += ["--data", "shard:{client}/{clients}", "--clients", "2"]
    with pytest.raises(UsageError, match=f"{flags[0]} has no effect with --schedule buffered"):
        CliRunner().invoke(command, words, catch_exceptions=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--over-provision", "1.3"),
            "--over-provision 1.3 has no effect, .*; add --sample or --fraction",
        ),
        (
            ("--select", "round-robin"),
            "--select round-robin has no effect, .*; add --sample or --fraction, or remove --sel",
        ),
        (
            ("--min-updates", "2"),
            "--min-updates 2 has no effect with --on-deadline reopen; add --on-deadline close",
        ),
        (
            ("--select", "weighted", "--schedule", "buffered"),
            "--select weighted has no effect with --schedule buffered, .*; add --concurrency",
        ),
        (
            ("--monitor", "test/accuracy", "--target", "0.9"),
            "--monitor test/accuracy is .*; add --evaluate, or monitor .* such as accuracy$",
        ),
    ],
)
def test_an_option_that_lacks_its_other_half_is_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(coordinator, ["--federation", "f", *flags], catch_exceptions=False)


def test_the_connections_of_a_coordinator_name_its_process(monkeypatch):
    names: list[str] = []

    def transport(_: Any, name: str) -> None:
        names.append(name)
        raise UsageError("stop here")

    monkeypatch.setattr(main, "AmqpTransport", transport)
    CliRunner().invoke(coordinator, ["--federation", "f"])
    assert names == [f"fluffle coordinator of f, process {os.getpid()} on {platform.node()}"]
