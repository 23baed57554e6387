"""Options of the command line: numeric ranges, help texts and parsing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fluffle_common.cli.app import fluffle
from fluffle_common.cli.settings import cache_folder, parse_classes, parse_config
from fluffle_common.errors import UsageError
from fluffle_common.protocol.messages import Plan
from fluffle_common.transport.rabbitmq.transport import HEARTBEAT_S
from fluffle_worker.cli import worker
from fluffle_worker.settings import WorkerSettings

WRONG = ["nan", "NaN", "-nan", "inf", "-inf", "1e999", "-1"]


def numeric_options() -> list[tuple[list[str], str, click.ParamType]]:
    """Return every numeric option of every command, with the command's words."""
    context = click.Context(fluffle)
    options = []

    def look(command: click.Command, words: list[str]) -> None:
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                look(command.get_command(context, name), [*words, name])
        options.extend(
            (words, option.opts[0], option.type)
            for option in command.params
            if isinstance(option.type, click.types.FloatParamType | click.types.IntParamType)
        )

    look(fluffle, [])
    return options


OPTIONS = numeric_options()


def test_the_help_loads_no_heavy_package():
    code = """if True:
        import sys
        from fluffle_common.cli.app import fluffle
        fluffle(["--help"], standalone_mode=False)
        heavy = {"aio_pika", "jax", "msgpack", "numpy", "pydantic", "rich", "uvloop"}
        assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_all_numeric_options_are_found():
    flags = {flag for _, flag, _ in OPTIONS}
    assert {"--deadline", "--grace", "--fraction", "--learning-rate", "--heartbeat"} <= flags
    assert {"--wait-broker", "--wait-id", "--wait-workers", "--seed", "--port"} <= flags


@pytest.mark.parametrize(("words", "flag", "kind"), OPTIONS)
def test_no_number_is_infinite_negative_or_too_large(words, flag, kind):
    # A metric may have any finite value.
    for text in WRONG[:-1] if flag == "--target" else WRONG:
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)
    with pytest.raises(click.BadParameter):
        kind.convert(str(2**63) if kind.max is not None else "1e999", None, None)
    # No limit suits every rate, ratio and metric.
    assert kind.max is not None or flag in ("--learning-rate", "--max-norm-ratio", "--target")


def test_a_worker_waits_for_longer_than_the_broker_keeps_its_broken_connection():
    by_command = next(option.default for option in worker.params if option.name == "wait_id")
    by_settings = WorkerSettings("letters", "north", "task").occupied_s
    assert by_command == by_settings > 3 * HEARTBEAT_S


def test_technical_limits_appear_only_in_errors():
    def rounds(*words):
        return CliRunner().invoke(fluffle, ["coordinator", "--federation", "f", *words]).output

    assert "the maximum is 2,147,483,647" in rounds("--sample", "99999999999")
    assert "the maximum is 1,000,000,000" in rounds("--rounds", "2000000000")  # as on the wire
    assert "0 is not in the range x>=1" in rounds("--rounds", "0")
    assert "the maximum is 1,000,000,000" in rounds("--grace", "1e10")
    shown = rounds("--help")
    assert "--deadline SECONDS" in shown
    assert not {"RANGE", "2147483647", "1000000000", "None"} & set(re.findall(r"\w+", shown))


def test_each_command_is_summarized_within_80_columns():
    for command, above in ((fluffle, None), (fluffle.get_command(None, "broker"), "fluffle")):
        context = click.Context(command, info_name=above or "fluffle", terminal_width=80)
        listed = command.get_help(context).partition("Show this message")[2]
        assert "..." not in listed
        for name in command.list_commands(context):
            assert len(re.findall(rf"^  {name} ", listed, re.MULTILINE)) == 1


@pytest.mark.parametrize("name", ["coordinator", "worker"])
def test_every_option_is_in_the_reference(name):
    text = (Path(__file__).parents[2] / "docs/options.md").read_text()
    flags = {option.opts[0] for option in fluffle.get_command(None, name).params}
    flags -= {"file", "--print-config"}
    assert {flag for flag in flags if not re.search(rf"`{flag}\b(?!-)", text)} == set()


def test_no_line_of_help_is_wider_than_a_terminal():
    def look(command: click.Command, name: str, above: click.Context | None = None) -> None:
        context = click.Context(command, info_name=name, parent=above, terminal_width=80)
        wide = [line for line in command.get_help(context).splitlines() if len(line) > 80]
        assert wide == []
        if isinstance(command, click.Group):
            for each in command.list_commands(context):
                look(command.get_command(context, each), each, context)

    look(fluffle, "fluffle")


def test_an_invalid_number_is_an_error_in_one_line():
    for flags in (["--deadline", "nan"], ["--seed", str(2**63)], ["--fraction", "nan"]):
        result = CliRunner().invoke(fluffle, ["coordinator", "--federation", "f", *flags])
        assert result.exit_code == 2
        assert flags[0] in result.output


def test_a_number_from_the_environment_is_validated(monkeypatch):
    monkeypatch.setenv("FLUFFLE_QUEUE_TYPE", "nan")
    result = CliRunner().invoke(fluffle, ["coordinator", "--federation", "f"])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("x=NaN", "not a finite number"),
        ("x=-Infinity", "not a finite number"),
        ("x=1e999", "not a finite number"),
        (f"x={2**63}", "64 bits"),
        (f"x={-(2**63) - 1}", "64 bits"),
        ("x", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
    ],
)
def test_a_config_value_out_of_range_is_refused(pair, message):
    with pytest.raises(UsageError, match=message):
        parse_config([pair])


def test_a_config_fits_into_a_plan():
    deep = "[" * 100_000
    assert parse_config([f"a={deep}"]) == {"a": deep}
    config = parse_config(["a=1", "b=0.5", "c=true", "d=text", "e=[1]", f"f={2**63 - 1}"])
    assert config == {"a": 1, "b": 0.5, "c": True, "d": "text", "e": "[1]", "f": 2**63 - 1}
    assert Plan(config=config).config == config
    with pytest.raises(UsageError, match="more than once"):
        parse_config(["a=1", "a=2"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train", "a" * 501], "^--train: 'a.* is longer than 500 characters; shorten this"),
        (["--config", f"a={'b' * 2001}"], "^--config: 'b.* is longer than 2000 characters"),
        (["--config", f"{'a' * 101}=1"], "^--config: 'a.* is longer than 100 characters"),
        (["--config", "a=\udcff"], "^--config: .* is not valid UTF-8"),
        (["--train", "\udcff"], "^--train: .* is not valid UTF-8"),
        ([f"--config=a{n}=1" for n in range(101)], "^--config: at most 100 values"),
    ],
)
def test_what_a_plan_cannot_contain_is_refused_with_its_limit(flags, message):
    with pytest.raises(UsageError, match=message) as wrong:
        CliRunner().invoke(
            fluffle, ["coordinator", "--federation", "f", *flags], catch_exceptions=False
        )
    assert len(str(wrong.value)) < 120


@pytest.mark.parametrize(
    "words",
    [
        ["report", "runs/x", "--out", ""],
        ["plot", "--out=", "x"],
        ["coordinator", "--federation", "f", "--run", ""],
        ["worker", "--federation", "f", "--data", ""],
        ["broker", "up", "--state", ""],
        ["predict", ""],
    ],
)
def test_an_empty_argument_is_refused(words):
    result = CliRunner().invoke(fluffle, words)
    assert result.exit_code == 2
    assert "is empty; check whether a shell variable in the command is unset" in result.output


@pytest.mark.parametrize(
    ("command", "name", "meant"),
    [
        ("journal --follow", "comitted", "committed"),
        ("journal --follow", "not_counted", "counted"),  # an event of a worker's log only
        ("tap", "updaet", "update"),
    ],
)
def test_an_unknown_kind_is_refused_before_anything_is_read(command, name, meant):
    words = [*command.split(), "--federation", "f", "--kind", name]
    with pytest.raises(UsageError, match=f"unknown --kind {name}; did you mean '{meant}'"):
        CliRunner().invoke(fluffle, words, catch_exceptions=False)


@pytest.mark.parametrize("name", ["accuracy.svg", "history.jsonl", "round-0001.safetensors"])
@pytest.mark.parametrize(
    ("command", "option", "suffix"),
    [
        ("plot .", "--out", ".png"),
        ("report .", "--out", ".html"),
        ("confusion --model x --data x", "--out", ".png"),
        ("simulate --task x:y", "--plot-partition", ".png"),
    ],
)
def test_a_file_is_not_written_under_the_name_of_another_format(command, option, suffix, name):
    with pytest.raises(UsageError, match=f"{option} {name} must end with {suffix}"):
        CliRunner().invoke(fluffle, [*command.split(), option, name], catch_exceptions=False)


def test_an_invalid_url_from_the_environment_is_named_so(monkeypatch):
    monkeypatch.setenv("FLUFFLE_URL", "xx")
    for words in (["coordinator"], ["worker", "--data", "x"], ["queues"]):
        with pytest.raises(UsageError, match="^the value of --url or FLUFFLE_URL is not the URL"):
            CliRunner().invoke(fluffle, [*words, "--federation", "f"], catch_exceptions=False)


@pytest.mark.parametrize("text", ["", ",", "a,", "a,,b", "a,a"])
def test_class_names_must_differ(text):
    with pytest.raises(UsageError, match="--classes '.*' is not valid"):
        parse_classes(text)
    # The code of the task, which may take long to load, does not run before.
    words = ["--federation", "f", "--data", "x", "--task", "no-such.py:task", "--classes", text]
    with pytest.raises(UsageError, match="--classes '.*' is not valid"):
        CliRunner().invoke(worker, words, catch_exceptions=False)


def test_a_user_without_a_home_gets_the_remedy(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    with pytest.raises(UsageError, match="XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(cache_folder()) == "/cache"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["borker"], "unknown command 'borker'; did you mean 'broker'?"),
        (["broker", "sattus"], "unknown command 'sattus'; did you mean 'status'?"),
        (["broker", "keep"], "unknown command 'keep'; see 'fluffle broker --help'"),
        (["rejected", "purged"], "unknown command 'purged'; did you mean 'purge'?"),
    ],
)
def test_an_unknown_command_is_told_with_a_similar_one_or_the_help(words, hint):
    result = CliRunner().invoke(fluffle, words, prog_name="fluffle")
    assert result.exit_code == 2
    assert hint in result.output
