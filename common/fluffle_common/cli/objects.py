"""Codecs and rules from a user's own file, named on the command line as ``path.py:name``."""

from __future__ import annotations

from typing import Any

from fluffle_common.cli.loading import Place
from fluffle_common.errors import UsageError
from fluffle_common.tensors.codecs.registry import CODECS


def load_object(name: str, option: str) -> Any:
    """Return what ``path.py:name`` names.

    Args:
        name: the file, and the name in it.
        option: the option that names it, such as ``--codec``.

    Raises:
        UsageError: if there is no such file, or nothing of this name in it.
        TaskError: if the file fails to load.
    """
    place = Place.parse(option.removeprefix("--"), name)
    if not place.is_file:
        raise UsageError(f"{option} expects path.py:name, not '{name}'")
    return place.found({__file__})


def load_codec(name: str, option: str) -> str:
    """Let this process use the codec that ``path.py:name`` names; return its own name.

    Raises:
        UsageError: if there is no such codec, or it is none.
        TaskError: if its file fails to load.
    """
    return CODECS.add(load_object(name, option), f"{name} ({option})").name
