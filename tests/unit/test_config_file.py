"""Options from a TOML file and from keyword arguments, and errors in them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from fluffle_common.cli.app import FiniteFloat, count
from fluffle_common.cli.config_file import ConfiguredCommand, KeyValue, options_from
from fluffle_common.errors import UsageError
from fluffle_coordinator.cli.coordinator import coordinator
from fluffle_worker.cli import worker


@click.command(cls=ConfiguredCommand)
@click.option("--name", required=True)
@click.option("--rounds", type=count(), default=6)
@click.option("--grace", type=FiniteFloat(0), default=0.0)
@click.option("--url", envvar="TEST_URL")
@click.option("--fresh", is_flag=True)
@click.option("--data", "where", type=click.Path(path_type=Path))
@click.option("--text", default="")
@click.option("--codec", "codecs", multiple=True)
@click.option("--config", type=KeyValue(), multiple=True)
def command(**options):
    for name, value in options.items():
        click.echo(f"{name}={value!r}")


def invoke(file, *flags, **environment):
    return CliRunner(env=environment).invoke(command, [str(file), *flags])


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "federation.toml"
        path.write_text(text)
        return path

    return write


def test_a_key_is_a_flag_without_its_dashes(written):
    file = written(
        'name = "north"\nrounds = 12\ngrace = 2\nfresh = true\ndata = "a"\ncodec = ["x", "y"]\n'
        '[config]\nmomentum = 0.9\nversion = "0.9"\n'
    )
    assert invoke(file).output.splitlines() == [
        "name='north'",
        "rounds=12",
        "grace=2.0",
        "url=None",
        "fresh=True",
        f"where={Path('a')!r}",
        "text=''",
        "codecs=('x', 'y')",
        "config=('momentum=0.9', 'version=\"0.9\"')",
    ]


def test_precedence_of_flag_environment_file_and_default(written):
    file = written('name = "file"\nrounds = 12\nurl = "file"')
    assert "url='file'" in invoke(file).output
    assert "url='env'" in invoke(file, TEST_URL="env").output
    assert "url='flag'" in invoke(file, "--url", "flag", TEST_URL="env").output
    assert "rounds=3" in invoke(file, "--rounds", "3").output


def test_print_config_prints_an_equivalent_file(written):
    file = written('name = "a\\"b"\ngrace = 2\n[config]\nmomentum = 0.9\n')
    printed = invoke(file, "--rounds", "3", "--print-config", TEST_URL="amqp://me:secret@h/v")
    assert printed.exit_code == 0
    assert tomllib.loads(printed.output) == {
        "name": 'a"b',
        "rounds": 3,
        "grace": 2,
        "url": "amqp://me:***@h/v",
        "fresh": False,
        "config": {"momentum": 0.9},
    }
    origins = dict(line.split("  # ") for line in printed.output.splitlines())
    by_key = {text.split()[0]: origin for text, origin in origins.items()}
    assert by_key["rounds"] == "--rounds"
    assert by_key["grace"] == str(file)
    assert by_key["url"] == "$TEST_URL"
    assert by_key["fresh"] == "default"
    again = invoke(written(printed.output), "--print-config")
    assert tomllib.loads(again.output) == tomllib.loads(printed.output)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ruonds = 1", "unknown key 'ruonds'; did you mean 'rounds'?"),
        ("where = 'a'", "unknown key 'where'; choose from codec, config, data, fresh"),
        ("[privacy]\nepsilon = 1", "unknown table [privacy]; write options as keys at the top of"),
        ("rounds = 2.5", "rounds = 2.5 is not valid (expected a whole number"),
        ("rounds = true", "rounds = true is not valid (expected a whole number"),
        ('rounds = "3"', 'rounds = "3" is not valid (expected a whole number'),
        ("rounds = 0", "rounds = 0 is not valid (0 is not in the range"),
        ("grace = nan", "grace = nan is not valid (nan is not a finite number"),
        ('grace = "1"', "expected a number"),
        ("fresh = 1", "expected true or false"),
        ("url = 7", "expected text in quotes"),
        ('codec = "x"', 'expected a value such as codec = ["…"]'),
        ("config = 3", "expected a value such as config = {"),
        ("url = 2026-03-01", "url = 2026-03-01 is not valid (expected text in quotes"),
        ('url = ""', 'url = "" is not valid (the value is empty'),
        ('data = ""', 'data = "" is not valid (the value is empty'),
        ('codec = ["x", ""]', "the value is empty"),
        (r'data = "a\u0000b"', "the value contains a null character"),
        ('[config]\n"a=b" = 2', "the key 'a=b' contains '='; choose another key"),
        ("config = {a = [1]}", "a must be true, false, a number or text"),
    ],
)
def test_an_error_names_the_line_and_the_remedy(written, line, message):
    file = written(f'# mine\nname = "north"\n{line}\n')
    wrong = invoke(file).exception
    assert isinstance(wrong, UsageError)
    assert str(wrong).startswith(f"{file}:3: ")
    assert message in str(wrong)
    assert "\n" not in str(wrong)


def test_an_option_that_a_table_hides_is_named(written, capsys):
    file = written('name = "north"\n[config]\nmomentum = 0.9\nrounds = 3\n')
    result = invoke(file)
    assert result.exit_code == 0
    assert result.stderr == (
        f"fluffle: {file}:4: 'rounds' is in the table [config], so the option is not set; to set "
        "the option 'rounds', move its line above [config]\n"
    )
    assert not invoke(written('name = "north"\n[config]\nmomentum = 0.9\n')).stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rounds = ", "is not valid TOML: Invalid value"),
        (b"\xff", "is not UTF-8 text"),
        (b"\0" * 1_000_001, "is too large to be a TOML file with options"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, content, message):
    file = tmp_path / "federation.toml"
    file.write_bytes(content)
    assert message in str(invoke(file).exception)
    assert f"there is no file {tmp_path / 'x'}" in str(invoke(tmp_path / "x").exception)
    url_in_its_place = str(invoke(Path("amqp://me:secret@h/")).exception)
    assert "there is no file" in url_in_its_place
    assert "secret" not in url_in_its_place


def test_a_byte_order_mark_is_skipped(tmp_path):
    file = tmp_path / "federation.toml"
    file.write_bytes(b'\xef\xbb\xbfname = "north"')
    assert "name='north'" in invoke(file).output


def test_a_missing_required_option_is_an_error(written):
    assert "Missing option '--name'" in invoke(written("rounds = 1")).output


def test_options_from_keyword_arguments(monkeypatch):
    monkeypatch.setenv("TEST_URL", "not asked for")
    given = {"name": "north", "rounds": 2, "config": {"a": 1}, "data": Path("x"), "grace": None}
    assert options_from(command, given, "fluffle.run") == {
        "name": "north",
        "rounds": 2,
        "grace": 0.0,
        "url": None,
        "fresh": False,
        "text": "",
        "where": Path("x"),
        "codecs": (),
        "config": ("a=1",),
    }
    with pytest.raises(
        UsageError, match=r"^fluffle.run\(\): rounds = 2.5 is not valid \(expected a whole number"
    ):
        options_from(command, {"rounds": 2.5}, "fluffle.run")
    with pytest.raises(UsageError, match="unknown keyword 'ronds'; did you mean 'rounds'"):
        options_from(command, {"ronds": 2}, "fluffle.run")


def test_numbers_of_numpy_are_numbers():
    config = {"a": np.float32(0.5), "b": np.bool_(True), "c": np.array(3)}
    given = {"name": "n", "rounds": np.int64(2), "grace": np.float32(0.5), "config": config}
    options = options_from(command, given, "fluffle.run")
    assert (options["rounds"], options["grace"]) == (2, 0.5)
    assert options["config"] == ("a=0.5", "b=true", "c=3")
    for wrong in (np.float64(2.5), np.arange(2)):
        with pytest.raises(UsageError, match="expected a whole number"):
            options_from(command, {"rounds": wrong}, "fluffle.run")


@pytest.mark.parametrize(
    "value", ["quorum = 2", "quorum = 0.5", 'quorum = "50%"', 'quorum = "all"']
)
def test_a_custom_type_accepts_text_and_numbers(written, value):
    file = written(f'federation = "letters"\nmin-workers = 4\n{value}\n')
    printed = CliRunner().invoke(coordinator, [str(file), "--print-config"])
    assert tomllib.loads(printed.output)["quorum"] == value.removeprefix("quorum = ").strip('"')
    assert tomllib.loads(printed.output)["min-workers"] == 4


def test_a_worker_reads_a_file(written):
    file = written('federation = "letters"\ndata = "data/a"\nid = "a"\ncodec = ["c.py:zip"]\n')
    printed = CliRunner().invoke(worker, [str(file), "--id", "b", "--print-config"])
    options = tomllib.loads(printed.output)
    assert (options["data"], options["id"], options["codec"]) == ("data/a", "b", ["c.py:zip"])


@pytest.mark.parametrize("name", ["\N{ROCKET} é \x7f\x85\u2028", "a\tb\n\\ud83d\\"])
def test_print_config_prints_toml_for_any_text(written, name):
    printed = CliRunner().invoke(command, ["--name", name, "--config", "🚀=1", "--print-config"])
    assert tomllib.loads(printed.output)["name"] == name
    assert tomllib.loads(printed.output)["config"] == {"🚀": 1}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://me:s,ecret@h/v", "amqp://me:***@h/v"),
        ("amqp://me:s@ecret@h/v", "amqp://me:***@h/v"),
        (
            "amqp://m,e:secret@h/v, amqps://you:se,cret@g/v",
            "amqp://m,e:***@h/v, amqps://you:***@g/v",
        ),
        ("amqp://me@h/v,amqp://g:5672/v", "amqp://me@h/v,amqp://g:5672/v"),
        ("amqp://me:se cret@h/v", "amqp://me:***@h/v"),
        ('amqp://me:s"ecret@h/v', "amqp://me:***@h/v"),
        ("me:secret@h", "me:***@h"),  # without a scheme
    ],
)
def test_no_password_is_printed(written, url, shown):
    printed = CliRunner().invoke(command, ["--name", "n", "--url", url, "--print-config"])
    assert tomllib.loads(printed.output)["url"] == shown
    refused = invoke(written(f"name = 'n'\nurl = ['{url}']"))
    assert f'url = ["{shown}"] is not valid (expected text in quotes)' in str(refused.exception)


def test_a_number_of_thousands_of_digits_is_an_error_in_the_file(written):
    refused = invoke(written(f"name = 'n'\nrounds = {'1' * 5000}"))
    assert isinstance(refused.exception, UsageError)
