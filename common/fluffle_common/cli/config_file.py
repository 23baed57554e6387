"""A command's options from elsewhere than its command line: a TOML file, or keyword arguments.

The declarations of a command are the one owner of what its options are called, which values they
take and what they default to. A key of a file is a flag without its dashes, a keyword argument the
same with underscores::

    rounds = 12                 --rounds 12             rounds=12
    min-workers = 3             --min-workers 3         min_workers=3
    config = {momentum = 0.9}   --config momentum=0.9   config={"momentum": 0.9}
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import click
from click.core import ParameterSource

from fluffle_common.cli.printing import echo
from fluffle_common.cli.settings import parse_config
from fluffle_common.errors import UsageError

_RAW = f"{__name__}.raw"  # in a context: what was typed, by the names of the parameters
_PRINTS = f"{__name__}.prints"
_FILE = f"{__name__}.file"
_PASSWORD = re.compile(r"(://[^:/@,\s]*):[^@/,\s]*@")

TABLES = ("simulation",)
"""The tables that some command has for its own."""

Style: TypeAlias = Literal["key", "keyword"]


class KeyValue(click.ParamType[str]):
    """``KEY=VALUE`` on the command line; a table in a file, a mapping as a keyword argument."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Take it as it is."""
        return str(value)


class ConfiguredCommand(click.Command):
    """A command that takes its options from a TOML file as well, named as its one argument.

    A flag overrides its environment variable, that its key in the file, and that the default.
    ``--print-config`` prints what holds, as such a file, instead of running.

    One file may serve several commands: what only some of them know is in a table of its own, which
    the others pass over.
    """

    own_table: str | None = None
    """The table of a file whose keys are options of this command, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Argument(
                ["file"],
                required=False,
                is_eager=True,
                expose_value=False,
                type=click.Path(dir_okay=False, path_type=Path),
                metavar="[FILE.toml]",
                callback=_read,
            )
        )
        self.params.append(
            click.Option(
                ["--print-config"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_remember,
                help="Print every option in effect as a TOML file, with where each comes from.",
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, and keep it as it was typed."""
        ctx.meta[_RAW] = self.make_parser(ctx).parse_args(list(args))[0]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, or print what it would run with."""
        if ctx.meta.get(_PRINTS):
            echo(*_what_holds(self, ctx))
            return None
        return super().invoke(ctx)


def _remember(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    ctx.meta[_PRINTS] = wanted


def _read(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Let the keys of a file be the defaults of a command's options."""
    if path is None:
        return
    ctx.meta[_FILE] = path
    text = _text_of(path)
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as why:
        raise UsageError(f"{path} is not valid TOML: {why}") from None
    given = _of_this_command(ctx.command, given, path)
    ctx.default_map = {**(ctx.default_map or {}), **_checked(ctx, given, _InFile(path, text))}


def _of_this_command(command: click.Command, given: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the keys of a file that are a command's, those of its own table among them."""
    ours = getattr(command, "own_table", None)
    keys = {name: value for name, value in given.items() if name not in TABLES}
    own = given.get(ours, {}) if ours else {}
    if not isinstance(own, Mapping):
        raise UsageError(f"{path}: {ours} must be a table, [{ours}]")
    return {**keys, **own}


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    except OSError as why:
        raise UsageError(f"cannot read {path} ({why.strerror})") from None


def options_from(command: click.Command, given: Mapping[str, Any], caller: str) -> dict[str, Any]:
    """Return all options of a command, as its function gets them, from keyword arguments.

    Args:
        command: whose options.
        given: values by the names of flags, with underscores; None leaves an option as it is.
        caller: who was given them, for errors: ``fluffle.run``.

    Raises:
        UsageError: naming a keyword that is no option, or a value that one does not take.
    """
    ctx = click.Context(command)
    stated = {name: value for name, value in given.items() if value is not None}
    values = _checked(ctx, stated, _InCall(caller))
    options: dict[str, Any] = {}
    for option in _options_of(command):
        name = str(option.name)
        # No environment here: what a call does is what it says.
        value = values.get(name, option.get_default(ctx))
        if not isinstance(value, _PRINTABLE):  # None, or click's own word for it
            value = () if option.multiple else None
        options[name] = option.type_cast_value(ctx, value)
    return options


@dataclass(frozen=True)
class _InFile:
    """How the keys of a file are called, and where each is."""

    path: Path
    text: str
    style: Style = "key"

    def at(self, name: str) -> str:
        """Return the file and the line of a key."""
        key = re.compile(rf"""\s*(\[\s*)?["']?{re.escape(name)}["']?\s*[=.\]]""")
        for number, line in enumerate(self.text.splitlines(), start=1):
            if key.match(line):
                return f"{self.path}:{number}"
        return str(self.path)


@dataclass(frozen=True)
class _InCall:
    """How keyword arguments are called."""

    caller: str
    style: Style = "keyword"

    def at(self, _: str) -> str:
        """Return whose arguments they are."""
        return f"{self.caller}()"


def _options_of(command: click.Command) -> list[click.Option]:
    found = [one for one in command.params if isinstance(one, click.Option)]
    return [one for one in found if one.expose_value]


def _called(option: click.Option, style: Style = "key") -> str:
    key = max(option.opts, key=len).removeprefix("--")
    return key if style == "key" else key.replace("-", "_")


def _checked(
    ctx: click.Context, given: Mapping[str, Any], place: _InFile | _InCall
) -> dict[str, Any]:
    """Return values by the names of the command's parameters, each of a type that it takes.

    Raises:
        UsageError: where there is no such option, or it takes no such value.
    """
    known = {_called(one, place.style): one for one in _options_of(ctx.command)}
    values = {}
    for name, value in given.items():
        option = known.get(name)
        if option is None:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
            raise UsageError(f"{place.at(name)}: unknown {place.style} '{name}'; {hint}")
        try:
            values[str(option.name)] = raw = _raw(option, value)
            option.type_cast_value(ctx, raw)
        except (click.BadParameter, _Wrong) as why:
            told = why.message if isinstance(why, click.BadParameter) else str(why)
            raise UsageError(f"{place.at(name)}: {name} = {_toml(value)}: {told}") from None
        except UsageError as why:
            raise UsageError(f"{place.at(name)}: {why}") from None
    return values


class _Wrong(Exception):
    """A value has another type than its option takes."""


def _raw(option: click.Option, value: Any) -> Any:
    """Return a value as the command line would give it, checked for its type.

    Strictly: ``rounds = 2.5`` is a mistake, and not 2.

    Raises:
        _Wrong: saying what is expected.
    """
    if isinstance(option.type, KeyValue) and isinstance(value, Mapping):
        return [f"{key}={_json(key, one)}" for key, one in value.items()]
    if option.multiple:
        if not isinstance(value, list | tuple):
            expected = "a table" if isinstance(option.type, KeyValue) else "a list"
            raise _Wrong(f"{expected} is expected, as {_example(option)}")
        return [_single(option, one) for one in value]
    return _single(option, value)


def _json(key: str, value: Any) -> str:
    if not isinstance(value, bool | int | float | str):
        raise _Wrong(f"{key} must be true, false, a number or text")
    return json.dumps(value)


def _example(option: click.Option) -> str:
    key = _called(option)
    if isinstance(option.type, KeyValue):
        return f"{key} = {{momentum = 0.9}}"
    return f'{key} = ["…"]'


def _single(option: click.Option, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = option.type
    if option.is_flag:
        fits, expected = isinstance(value, bool), "true or false is expected"
    elif isinstance(kind, click.types.IntParamType):
        fits, expected = is_number and isinstance(value, int), "a whole number is expected"
    elif isinstance(kind, click.types.FloatParamType):
        fits, expected = is_number, "a number is expected"
    elif isinstance(kind, click.types.StringParamType | click.Choice | click.Path):
        fits, expected = isinstance(value, str), "text in quotes is expected"
    else:  # a type of our own, whose values look like text or like numbers
        fits, expected = isinstance(value, str) or is_number, "text or a number is expected"
        value = str(value) if is_number else value
    if not fits:
        raise _Wrong(expected)
    return value


# --- printing what holds -----------------------------------------------------------------------


def _what_holds(command: click.Command, ctx: click.Context) -> Iterable[str]:
    """Return the lines of a TOML file of every option of a command, with where each comes from."""
    typed, rows = ctx.meta[_RAW], []
    for option in _options_of(command):
        value, source = option.consume_value(ctx, typed)
        if source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT):
            value = _as_given_in_a_file(option, option.value_from_envvar(ctx), value, source)
        key = _called(option)
        if not isinstance(value, _PRINTABLE) or value in ((), []):
            rows.append((f"# {key}", "not set"))
        else:
            if isinstance(option.type, KeyValue) and isinstance(value, list | tuple):
                value = parse_config(value)
            rows.append((f"{key} = {_toml(value)}", _origin(option, source, ctx)))
    width = min(max(len(text) for text, _ in rows), 40)
    return [f"{_without_password(text):<{width}}  # {origin}" for text, origin in rows]


_PRINTABLE = (bool, int, float, str, list, tuple, Mapping, os.PathLike)


def _without_password(text: str) -> str:
    return _PASSWORD.sub(r"\1:***@", text)


def _as_given_in_a_file(
    option: click.Option, of_environment: Any, value: Any, source: ParameterSource
) -> Any:
    if source is ParameterSource.ENVIRONMENT:
        value = of_environment
    number = isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
    return option.type.convert(value, option, None) if number and not option.multiple else value


def _origin(option: click.Option, source: ParameterSource, ctx: click.Context) -> str:
    if source is ParameterSource.COMMANDLINE:
        return max(option.opts, key=len)
    if source is ParameterSource.ENVIRONMENT:
        return f"${option.envvar}"
    return str(ctx.meta[_FILE]) if source is ParameterSource.DEFAULT_MAP else "default"


def _toml(value: Any) -> str:
    """Return a value as TOML has it.

    >>> _toml([1, 2.5, True, "a\\n"]), _toml({"momentum": 0.9})
    ('[1, 2.5, true, "a\\\\n"]', '{momentum = 0.9}')
    """
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {_toml(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return json.dumps(os.fspath(value) if isinstance(value, os.PathLike) else str(value))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
