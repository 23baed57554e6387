"""Settings from options and the environment, which only commands read: URLs, folders, names.

The messages, and with them pydantic, are imported when a name is checked: they take half of the
time in which ``fluffle coordinator --help`` starts.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fluffle_common.errors import UsageError

if TYPE_CHECKING:
    from fluffle_common.transport.rabbitmq.management import Management

DEFAULT_URL = "amqp://guest:guest@127.0.0.1:5672/"


def state_folder() -> Path:
    """Return the folder for persistent state: ``$FLUFFLE_STATE``, else ``.fluffle``."""
    return Path(os.environ.get("FLUFFLE_STATE") or ".fluffle")


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME``, else ``~/.cache``; raise ``UsageError`` without a home folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        raise UsageError(
            "there is no folder for the cache, because this user has no home folder; set the "
            "environment variable XDG_CACHE_HOME to a folder"
        ) from None


def node_record(state: Path) -> dict[str, str | int]:
    """Return the record that ``fluffle broker up`` wrote; empty if there is none."""
    try:
        record = json.loads((state / "broker" / "node.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def broker_url_finder(given: str | None) -> Callable[[], str]:
    """Return a function that returns the broker's URL: the given one, else the private node's.

    The private node may start later than this process, on another port. While the node is down, its
    last URL stays valid; before that, it is the default.
    """
    state, latest = state_folder().absolute(), DEFAULT_URL  # a task may change the current folder

    def find() -> str:
        nonlocal latest
        latest = given or str(node_record(state).get("url") or latest)
        return latest

    return find


def management_finder(given: str | None) -> Callable[[str], Management]:
    """Return a function that returns the management API, at ``given`` if set, of a broker's URL.

    Raises:
        UsageError: if ``given`` has a user, because the API gets that of the broker's URL.
    """
    from fluffle_common.transport.rabbitmq import management as api

    if given:
        api.check_base(given)
        return lambda url: api.Management(url, given)
    state = state_folder().absolute()
    return lambda url: api.Management(url, api.management_base(url, node_record(state)))


def check_federation(name: str) -> str:
    """Return the name of a federation; raise ``UsageError`` if it is invalid."""
    from fluffle_common.protocol.messages import FEDERATION_PATTERN

    if name == "amq" or not re.fullmatch(FEDERATION_PATTERN, name):
        raise UsageError(
            f"'{name}' is not a valid federation name; use at most 64 letters, digits, '-' and "
            "'_', and begin with a letter or digit (RabbitMQ reserves the name 'amq')"
        )
    return name


def check_worker(name: str) -> str:
    """Return the ID of a worker; raise ``UsageError`` if it is invalid."""
    from fluffle_common.protocol.messages import WORKER_PATTERN

    if not re.fullmatch(WORKER_PATTERN, name):
        raise UsageError(
            f"'{name}' is not a valid worker ID; use at most 64 letters, digits, '-', '_' and '.', "
            "and begin with a letter or digit"
        )
    return name


def parse_classes(text: str | None) -> tuple[str, ...] | None:
    """Parse ``A,B,…``; None gives None.

    >>> parse_classes("a,b"), parse_classes(None)
    (('a', 'b'), None)

    Raises:
        UsageError: if a class has no name or appears twice.
    """
    if text is None:
        return None
    classes = tuple(text.split(","))
    if "" in classes or len(set(classes)) < len(classes):
        raise UsageError(
            f"--classes '{text}' is not valid; give different names, separated by commas, such as "
            "a,b,c"
        )
    return classes


def parse_config(pairs: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Parse ``KEY=VALUE`` pairs; a value that is a number, true or false becomes one.

    Text that looks like one of these needs quotes.

    >>> parse_config(["momentum=0.9", "name=a=b", 'version="0.9"'])
    {'momentum': 0.9, 'name': 'a=b', 'version': '0.9'}

    Raises:
        UsageError: if a pair is malformed, a key is repeated, or a number is out of range.
    """
    config: dict[str, bool | int | float | str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise UsageError(f"--config expects KEY=VALUE, not '{pair}'")
        if key in config:
            raise UsageError(f"--config has the key '{key}' more than once; give it once")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # also an integer of thousands of digits
            value = text
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--config {pair}: {text} is not a finite number")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise UsageError(f"--config {pair}: {text} does not fit into 64 bits")
        config[key] = value if isinstance(value, bool | int | float | str) else text
    return config
