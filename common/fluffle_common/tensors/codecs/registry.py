"""The codecs that a process knows: fluffle's own, installed ones, and those from a user's file.

Installed packages offer codecs under the entry point group ``fluffle.codecs``. A codec from a file
is known only after whoever runs the process has named it: nothing that arrives over the wire makes
a process import a file.
"""

from __future__ import annotations

import inspect
import re
from importlib.metadata import EntryPoint
from typing import Any

from fluffle_common.errors import UsageError
from fluffle_common.installed import installed
from fluffle_common.tensors.codecs.base import (
    MAX_SUFFIX,
    BrokenCodec,
    Codec,
    Part,
    UnknownCodec,
    in_short,
)
from fluffle_common.tensors.codecs.bf16 import Bf16
from fluffle_common.tensors.codecs.f16 import F16
from fluffle_common.tensors.codecs.int8 import Int8
from fluffle_common.tensors.codecs.topk import TopK
from fluffle_common.tensors.layout import DTYPES
from fluffle_common.tensors.table import ENCODING_PATTERN

GROUP = "fluffle.codecs"
_OWN: tuple[type[Codec], ...] = (Bf16, F16, Int8, TopK)
OWN_NAMES = frozenset(codec.name for codec in _OWN)
_MOST_PARTS = 2  # so many per tensor are reckoned with in the size of a header
_SUFFIX = re.compile(rf"(#[A-Za-z0-9_]{{1,{MAX_SUFFIX - 1}}})?")


class Registry:
    """Codecs by name.

    >>> Registry().parse("topk:0.01")
    TopK(fraction=0.01)
    """

    def __init__(self) -> None:
        self._codecs: dict[str, type[Codec]] = {codec.name: codec for codec in _OWN}

    def add(self, codec: Any, where: str) -> type[Codec]:
        """Add a codec; return it.

        Args:
            codec: its class.
            where: where it comes from, for errors.

        Raises:
            UsageError: saying why it is not a codec, or that fluffle has one of this name.
        """
        checked = check_codec(codec, where)
        if checked.name in OWN_NAMES:
            raise UsageError(
                f"{where} has the name of one of fluffle's own codecs, '{checked.name}'; "
                "choose another name"
            )
        self._codecs[checked.name] = checked
        return checked

    def remove(self, name: str) -> None:
        """Forget a codec that was added."""
        del self._codecs[name]

    def get(self, name: str) -> type[Codec]:
        """Return the codec of this name.

        Raises:
            UnknownCodec: if there is none.
            BrokenCodec: if an installed one cannot be used.
        """
        if name not in self._codecs:
            found = installed(GROUP).get(name)
            if found is None:
                known = ", ".join(sorted({*self._codecs, *installed(GROUP)}))
                raise UnknownCodec(
                    f"the encoding '{name[:40]}' is unknown here; known are {known}; 'fluffle "
                    "coordinator --compress' and 'fluffle replay --codec' take another from a file"
                )
            self._load(found)
        return self._codecs[name]

    def _load(self, found: EntryPoint) -> None:
        where = f"{found.value} (entry point {GROUP})"
        try:
            added = self.add(found.load(), where)
        except UsageError as wrong:
            raise BrokenCodec(str(wrong)) from None
        except Exception as why:
            raise BrokenCodec(
                f"the codec '{found.name}' from {where} fails to load: {in_short(why)}"
            ) from why
        if added.name != found.name:
            raise BrokenCodec(f"{where} has the name '{added.name}', not '{found.name}'")

    def parse(self, how: str) -> Codec:
        """Return the codec with the settings that a plan asks for.

        Raises:
            UnknownCodec: if there is none of its name.
            BrokenCodec: if an installed one cannot be used.
            ValueError: from the codec, about the settings.
        """
        return self.get(encoding_of(how)).parse(how)


def encoding_of(how: str) -> str:
    """Return the name of the codec that a plan asks for.

    >>> encoding_of("topk:0.01")
    'topk'
    """
    return how.partition(":")[0]


def check_codec(codec: Any, where: str) -> type[Codec]:
    """Check that an object is a codec, as far as can be seen before it is used; return it.

    Raises:
        UsageError: naming what is missing or wrong, and the remedy.
    """
    if not isinstance(codec, type):
        raise UsageError(
            f"{where} is a {type(codec).__name__}; a codec is a class (docs/codecs.md)"
        )
    name = getattr(codec, "name", None)
    if not isinstance(name, str) or not re.fullmatch(ENCODING_PATTERN, name):
        raise UsageError(
            f"{where} has the name {name!r:.60}; a codec's name has 1 to 32 of a-z, 0-9, '_', '-'"
        )
    for method in ("parse", "encode"):
        if not callable(getattr(codec, method, None)):
            raise UsageError(f"{where} has no method '{method}' (docs/codecs.md)")
    for method in ("parts", "decode"):
        there = inspect.getattr_static(codec, method, None)
        if not isinstance(there, staticmethod | classmethod):
            raise UsageError(
                f"{where} has no static method '{method}'; settings do not travel with an update, "
                "so mark it @staticmethod"
            )
    dtypes = getattr(codec, "dtypes", None)
    if not isinstance(dtypes, tuple) or not isinstance(getattr(codec, "feeds_back", None), bool):
        raise UsageError(
            f"{where} needs 'dtypes', such as ('float32', 'float64'), and 'feeds_back', True or "
            "False (docs/codecs.md)"
        )
    _check_parts(codec, where)
    return codec


def _check_parts(codec: Any, where: str) -> None:
    """Check the parts of a tensor of some shape."""
    try:
        parts = codec.parts((4, 300))
    except Exception as why:
        raise UsageError(f"{where} fails in parts((4, 300)): {type(why).__name__}: {why}") from why
    sound = isinstance(parts, tuple) and 1 <= len(parts) <= _MOST_PARTS
    if not sound or not all(isinstance(part, Part) for part in parts):
        raise UsageError(f"{where} has parts {parts!r:.80}; a tuple of one or two Part is expected")
    for part in parts:
        if not _SUFFIX.fullmatch(part.suffix):
            raise UsageError(
                f"{where} has a part with the suffix '{part.suffix[:40]}'; expected is '' or '#' "
                f"and 1 to {MAX_SUFFIX - 1} letters or digits"
            )
        if part.dtype not in DTYPES:
            travel = ", ".join(sorted(DTYPES))
            raise UsageError(f"{where} has a part of dtype '{part.dtype!s:.40}'; {travel} travel")
    if len({part.suffix for part in parts}) < len(parts):
        raise UsageError(f"{where} has two parts of one suffix; give each its own")


CODECS = Registry()
"""The codecs of this process; the command line adds to them."""
