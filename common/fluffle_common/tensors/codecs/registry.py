"""The codecs of a process: built-in ones, installed ones, and those from a user's file.

Installed packages offer codecs under the entry point group ``fluffle.codecs``. A codec in a file
must be named by the person who starts the process (``--codec``); no message can make a process
import a file.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import EntryPoint
from typing import Any

from fluffle_common.errors import UsageError
from fluffle_common.installed import installed
from fluffle_common.tensors.codecs.base import Codec, CodecError, UnknownCodec, parts_of
from fluffle_common.tensors.codecs.bf16 import Bf16
from fluffle_common.tensors.codecs.f16 import F16
from fluffle_common.tensors.codecs.int8 import Int8
from fluffle_common.tensors.codecs.topk import TopK
from fluffle_common.tensors.table import ENCODING_PATTERN
from fluffle_common.user_errors import one_line

GROUP = "fluffle.codecs"
_BUILT_IN: tuple[type[Codec], ...] = (Bf16, F16, Int8, TopK)
OWN_NAMES = frozenset(codec.name for codec in _BUILT_IN)
"""The names of the built-in codecs."""


class Registry:
    """Codecs by name.

    >>> Registry().parse("topk:0.01")
    TopK(fraction=0.01)
    """

    def __init__(self) -> None:
        self._codecs: dict[str, type[Codec]] = {codec.name: codec for codec in _BUILT_IN}

    def add(self, codec: Any, where: str) -> type[Codec]:
        """Add and return a codec from ``where``, or raise ``UsageError`` if it is not a new one."""
        checked = check_codec(codec, where)
        if checked.name in OWN_NAMES:
            raise UsageError(
                f"the codec {where} has the name of a built-in codec, '{checked.name}'; choose "
                "another name"
            )
        self._codecs[checked.name] = checked
        return checked

    def get(self, name: str) -> type[Codec]:
        """Return the codec of this name, loading an installed one on first use.

        Raises:
            UnknownCodec: if no codec has this name.
            CodecError: if the installed codec cannot be used.
        """
        if name not in self._codecs:
            entry_point = installed(GROUP).get(name)
            if entry_point is None:
                known = ", ".join(sorted({*self._codecs, *installed(GROUP)}))
                raise UnknownCodec(
                    f"unknown codec '{name[:40]}'; choose from {known}, or load your own codec "
                    "with 'fluffle coordinator --compress' or 'fluffle replay --codec'"
                )
            self._load(entry_point)
        return self._codecs[name]

    def _load(self, entry_point: EntryPoint) -> None:
        where = f"{entry_point.value} (entry point {GROUP})"
        try:
            codec = self.add(entry_point.load(), where)
        except UsageError as error:
            raise CodecError(str(error)) from None
        except (Exception, SystemExit) as error:
            raise CodecError(
                f"the codec '{entry_point.name}' from {where} fails to load: {one_line(error)}"
            ) from error
        if codec.name != entry_point.name:
            raise CodecError(
                f"the codec {where} has the name '{codec.name}', but its entry point has the name "
                f"'{entry_point.name}'; use the same name for both"
            )

    def parse(self, spec: str) -> Codec:
        """Return the codec for a text such as ``topk:0.01``, with its settings.

        Raises:
            UnknownCodec: if no codec has this name.
            CodecError: if the installed codec cannot be used, or its ``parse`` fails.
            ValueError: if the codec does not accept the settings.
        """
        codec = self.get(encoding_of(spec))
        try:
            parsed = codec.parse(spec)
        except ValueError:
            raise
        except (Exception, SystemExit) as error:
            raise CodecError(
                f"parse('{spec[:60]}') of the codec '{codec.name}' fails: {one_line(error)}"
            ) from error
        if not isinstance(parsed, codec):
            raise CodecError(
                f"parse('{spec[:60]}') of the codec '{codec.name}' returned a "
                f"{type(parsed).__name__}; return an object of the class {codec.__name__}"
            )
        return parsed


def encoding_of(spec: str) -> str:
    """Return the codec's name in a text such as ``topk:0.01``.

    >>> encoding_of("topk:0.01")
    'topk'
    """
    return spec.partition(":")[0]


def check_codec(codec: Any, where: str) -> type[Codec]:
    """Return a codec; raise ``UsageError`` that names what it lacks, and the remedy."""
    if not isinstance(codec, type):
        raise UsageError(
            f"the object {where} is a {type(codec).__name__}, but a codec must be a class; see "
            "docs/codecs.md"
        )
    name = getattr(codec, "name", None)
    if not isinstance(name, str) or not re.fullmatch(ENCODING_PATTERN, name):
        raise UsageError(
            f"the codec {where} has the name {name!r:.60}; use a name of 1 to 32 characters from "
            "a-z, 0-9, '_' and '-'"
        )
    for method in ("parse", "encode"):
        if not callable(getattr(codec, method, None)):
            raise UsageError(f"the codec {where} has no method '{method}'; see docs/codecs.md")
    for method in ("parts", "decode"):
        attribute = inspect.getattr_static(codec, method, None)
        if not isinstance(attribute, staticmethod | classmethod):
            raise UsageError(
                f"the codec {where} has no static method '{method}'; define it with "
                "@staticmethod, because fluffle calls it on the class, not on an object"
            )
    dtypes = getattr(codec, "dtypes", None)
    if not isinstance(dtypes, tuple) or not isinstance(getattr(codec, "feeds_back", None), bool):
        raise UsageError(
            f"the codec {where} must set 'dtypes' to a tuple, such as ('float32', 'float64'), and "
            "'feeds_back' to True or False; see docs/codecs.md"
        )
    try:
        parts_of(codec, (4, 300))  # an example
    except CodecError as error:
        raise UsageError(f"the codec {where} is not valid: {error}") from error
    return codec


CODECS = Registry()
"""The codecs of this process; ``--codec`` adds to them."""
