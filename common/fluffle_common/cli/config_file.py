"""Options of a command from a TOML file or from keyword arguments.

The options that a command declares define the names, types and defaults for all three. A key in a
file is the flag without its dashes; a keyword argument is the same with underscores::

    rounds = 12                 --rounds 12             rounds=12
    min-workers = 3             --min-workers 3         min_workers=3
    config = {momentum = 0.9}   --config momentum=0.9   config={"momentum": 0.9}
"""

from __future__ import annotations

import functools
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import click
from click.core import ParameterSource

from fluffle_common.arguments import nearest
from fluffle_common.cli.console import warn
from fluffle_common.cli.printing import echo
from fluffle_common.cli.settings import parse_config
from fluffle_common.errors import UsageError

_RAW = f"{__name__}.raw"  # key in ctx.meta: the parsed command line, by parameter name
# A password in text in quotes, perhaps of a URL without a scheme. It may contain "@" and white
# space, and also a comma, which separates only before another URL.
_PASSWORD = re.compile(r""":(?!//)(?:(?!,\s*\w+://)(?:\\.|[^"\\]))*@""")
_PRINTABLE = (bool, int, float, str, list, tuple, Mapping, os.PathLike)
_NUMBERS = (click.types.IntParamType, click.types.FloatParamType)
_TEXT_SOURCES = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)  # always give text

_MOST_CHARACTERS = 10**6

TABLES = ("simulation",)
"""The tables that belong to a single command (see ``own_table``)."""

Style: TypeAlias = Literal["key", "keyword"]


class KeyValue(click.types.StringParamType):
    """``KEY=VALUE`` on the command line; a table in a file, a mapping as a keyword argument."""

    name = "KEY=VALUE"


class ConfiguredCommand(click.Command):
    """A command that also takes its options from a TOML file, given as its one argument.

    In order of precedence, a value comes from the flag, the environment variable, the key in the
    file, or the default. ``--print-config`` prints the result as such a file instead of running.

    Several commands may share a file. Options of only one command are in a table of its own, which
    the other commands ignore.
    """

    own_table: str | None = None
    """The name of the table with options of only this command, if any."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Argument(
                ["file"],
                required=False,
                is_eager=True,
                expose_value=False,
                type=click.Path(dir_okay=False, path_type=Path),
                metavar="[FILE.toml]",
                callback=_read,
            ),
            click.Option(
                ["--print-config"],
                is_flag=True,
                expose_value=False,
                help="Print a TOML file of all options, with the origin of each value, and exit.",
            ),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, and keep the raw values for ``--print-config``."""
        ctx.meta[_RAW] = self.make_parser(ctx).parse_args(list(args))[0]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, or print its configuration."""
        if ctx.meta[_RAW].get("print_config") is True:
            echo(*_print_config_lines(self, ctx))
            return None
        return super().invoke(ctx)


def _read(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make the keys of a file the defaults of the command's options."""
    if path is None:
        return
    text = _read_text(path)
    try:
        given = tomllib.loads(text)
    except (ValueError, RecursionError) as why:  # also an integer of thousands of digits
        raise UsageError(f"{path} is not valid TOML: {why}") from None
    table = getattr(ctx.command, "own_table", None)
    own = given.get(table, {}) if table else {}
    if not isinstance(own, Mapping):
        raise UsageError(
            f"{path}: '{table}' must be a table; begin the table with the line [{table}]"
        )
    keys = {name: value for name, value in given.items() if name not in TABLES}
    place = functools.partial(_place_in_file, path, text)
    valid = _validated(ctx, {**keys, **own}, "key", place)
    ctx.default_map = {**(ctx.default_map or {}), **valid}


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors write a byte order mark
            text = file.read(_MOST_CHARACTERS + 1)
    except FileNotFoundError:
        raise UsageError(f"there is no file {_without_password(str(path))}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text; save the file as UTF-8") from None
    except OSError as why:
        raise UsageError(f"cannot read {path} ({why.strerror})") from None
    if len(text) > _MOST_CHARACTERS:  # perhaps a model, or a device without an end
        raise UsageError(
            f"{path} is too large to be a TOML file with options (more than 1 MB); correct the path"
        )
    return text


def options_from(command: click.Command, given: Mapping[str, Any], caller: str) -> dict[str, Any]:
    """Return the values of all options of a command, as its function receives them.

    ``given`` has keyword arguments, named like flags with underscores; None stands for the default.
    ``caller`` is the function that received them, for error messages.

    Raises:
        UsageError: if a keyword is not an option, its value is invalid, or it is required and
            absent.
    """
    ctx = click.Context(command)
    stated = {name: value for name, value in given.items() if value is not None}
    values = _validated(ctx, stated, "keyword", lambda _: f"{caller}()")
    options: dict[str, Any] = {}
    for option in _options_of(command):
        name = str(option.name)
        # The environment is ignored, so that a call depends only on its arguments.
        value = values.get(name, option.get_default(ctx))
        if not isinstance(value, _PRINTABLE):  # None, or click's sentinel for it
            if option.required:
                key = _key_of(option, "keyword")
                raise UsageError(f"{caller}(): {key} = None, but a value is required")
            value = () if option.multiple else None
        options[name] = option.type_cast_value(ctx, value)
    return options


def _place_in_file(path: Path, text: str, key: str) -> str:
    """Return the file and line of a key."""
    pattern = re.compile(rf"""\s*(\[\s*)?["']?{re.escape(key)}["']?\s*[=.\]]""")
    for number, line in enumerate(text.splitlines(), start=1):
        if pattern.match(line):
            return f"{path}:{number}"
    return str(path)


def _options_of(command: click.Command) -> list[click.Option]:
    return [one for one in command.params if isinstance(one, click.Option) and one.expose_value]


def _key_of(option: click.Option, style: Style = "key") -> str:
    key = max(option.opts, key=len).removeprefix("--")
    return key if style == "key" else key.replace("-", "_")


def _validated(
    ctx: click.Context, given: Mapping[str, Any], style: Style, place: Callable[[str], str]
) -> dict[str, Any]:
    """Return valid values by parameter; ``place`` tells where one was given, for ``UsageError``."""
    known = {_key_of(one, style): one for one in _options_of(ctx.command)}
    values = {}
    for name, given_value in given.items():
        option, value = known.get(name), _without_numpy(given_value)
        if option is None:
            if style == "key" and isinstance(value, Mapping):
                raise UsageError(
                    f"{place(name)}: unknown table [{name}]; write options as keys at the top of "
                    "the file, before the first table"
                )
            raise UsageError(f"{place(name)}: unknown {style} '{name}'; {nearest(name, known)}")
        if style == "key" and isinstance(option.type, KeyValue) and isinstance(value, Mapping):
            for hidden in sorted(value.keys() & known.keys()):
                warn(
                    f"{place(hidden)}: '{hidden}' is in the table [{name}], so the option is not "
                    f"set; to set the option '{hidden}', move its line above [{name}]"
                )
        try:
            values[str(option.name)] = raw = _raw(option, value)
            option.type_cast_value(ctx, raw)
        except click.BadParameter as why:
            shown, text = _without_password(_toml(value)), why.message.rstrip(".")
            raise UsageError(f"{place(name)}: {name} = {shown} is not valid ({text})") from None
        except UsageError as why:
            raise UsageError(f"{place(name)}: {why}") from None
    return values


def _without_numpy(value: Any) -> Any:
    """Return a value with Python's numbers for the scalars of NumPy and JAX in it."""
    if isinstance(value, Mapping):
        return {key: _without_numpy(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_numpy(one) for one in value]
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _raw(option: click.Option, value: Any) -> Any:
    """Return a value as from the command line, checked strictly: ``rounds = 2.5`` is an error."""
    if isinstance(option.type, KeyValue) and isinstance(value, Mapping):
        return [f"{key}={_json(key, one)}" for key, one in value.items()]
    if option.multiple:
        if not isinstance(value, list | tuple):
            example = "{momentum = 0.9}" if isinstance(option.type, KeyValue) else '["…"]'
            raise click.BadParameter(f"expected a value such as {_key_of(option)} = {example}")
        return [_single(option, one) for one in value]
    return _single(option, value)


def _json(key: str, value: Any) -> str:
    if "=" in str(key):  # KEY=VALUE is split at the first one
        raise click.BadParameter(f"the key '{key}' contains '='; choose another key")
    if not isinstance(value, bool | int | float | str):
        raise click.BadParameter(f"{key} must be true, false, a number or text")
    return json.dumps(value)


def _single(option: click.Option, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and not value:
        raise click.BadParameter(
            "the value is empty; give a value, or omit this option to use its default"
        )
    if isinstance(value, str) and "\0" in value:
        raise click.BadParameter("the value contains a null character; remove this character")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = option.type
    if option.is_flag:
        fits, expected = isinstance(value, bool), "true or false"
    elif isinstance(kind, click.types.IntParamType):
        fits, expected = is_number and isinstance(value, int), "a whole number"
    elif isinstance(kind, click.types.FloatParamType):
        fits, expected = is_number, "a number"
    elif isinstance(kind, click.Path):
        fits, expected = isinstance(value, str), "a path in quotes"
    elif isinstance(kind, click.types.StringParamType | click.Choice):
        fits, expected = isinstance(value, str), "text in quotes"
    else:  # a type of our own, whose values look like text or like numbers
        fits, expected = isinstance(value, str) or is_number, "text or a number"
        value = str(value) if is_number else value
    if not fits:
        raise click.BadParameter(f"expected {expected}")
    return value


# --- --print-config ----------------------------------------------------------------------------


def _print_config_lines(command: click.Command, ctx: click.Context) -> Iterable[str]:
    """Return the lines of a TOML file with every option's value and source."""
    typed, rows = ctx.meta[_RAW], []
    for option in _options_of(command):
        value, source = option.consume_value(ctx, typed)
        if source is ParameterSource.ENVIRONMENT:
            value = option.value_from_envvar(ctx)
        if source in _TEXT_SOURCES and isinstance(option.type, _NUMBERS) and not option.multiple:
            value = option.type.convert(value, option, None)
        key = _key_of(option)
        if not isinstance(value, _PRINTABLE) or value in ((), [], ""):
            rows.append((f"# {key}", "not set"))
        else:
            if isinstance(option.type, KeyValue) and isinstance(value, list | tuple):
                value = parse_config(value)
            rows.append((f"{key} = {_toml(value)}", _source_of(option, source, ctx)))
    width = min(max(len(text) for text, _ in rows), 40)
    return [f"{_without_password(text):<{width}}  # {origin}" for text, origin in rows]


def _without_password(text: str) -> str:
    return _PASSWORD.sub(":***@", text)


def _source_of(option: click.Option, source: ParameterSource, ctx: click.Context) -> str:
    if source is ParameterSource.COMMANDLINE:
        return max(option.opts, key=len)
    if source is ParameterSource.ENVIRONMENT:
        return f"${option.envvar}"
    return str(Path(ctx.meta[_RAW]["file"])) if source is ParameterSource.DEFAULT_MAP else "default"


def _toml(value: Any) -> str:
    """Return a value in TOML syntax.

    >>> _toml([1, 2.5, True, "a\\n"]), _toml({"momentum": 0.9})
    ('[1, 2.5, true, "a\\\\n"]', '{momentum = 0.9}')
    """
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(key)} = {_toml(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if isinstance(value, str | os.PathLike):
        return _quoted(os.fspath(value))
    return str(value)  # a date, or an object that no option accepts


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)


def _quoted(text: str) -> str:
    """Quote a text as JSON does, but escape an emoji as one character, not as two halves of one."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda match: _escaped(ord(match[0])), quoted)


def _escaped(code: int) -> str:
    return f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"
