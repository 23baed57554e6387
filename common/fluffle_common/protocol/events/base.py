"""What every run event is: a name, typed fields, a severity, and a sentence for people.

Events come from a journal that another version may have written: every field may be missing, which
is None, and whatever has the wrong type counts as missing. Whoever makes an event names its fields.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from string import Formatter
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

Severity = Literal["plain", "good", "odd", "bad"]

# The types of the fields, by the names that ``_READ`` has them under.
Text = str | None
Whole = int | None
Number = float | None
Names = tuple[str, ...] | None
Numbers = Mapping[str, float] | None


class _Unknown:
    """What a sentence says of a field that is not there, whatever its format."""

    def __format__(self, _: str) -> str:
        return "?"


_UNKNOWN = _Unknown()


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened in a run. ``name`` is its name on the wire."""

    name: ClassVar[str] = ""
    severity: ClassVar[Severity] = "plain"
    words: ClassVar[str] = ""
    journalled: ClassVar[bool] = True  # else only the log has it
    field_names: ClassVar[tuple[str, ...]] = ()
    fields_in_words: ClassVar[tuple[str, ...]] = ()  # those that occur in ``words``

    def fields(self) -> dict[str, Any]:
        """Return the known fields as plain data for the log and the wire."""
        known = {}
        for name in self.field_names:
            value = getattr(self, name)
            if value is not None:
                known[name] = _plain(value) if isinstance(value, tuple) else value
        return known

    def sentence(self) -> str:
        """Return the event as a sentence; an unknown field is a question mark."""
        return self.words.format_map(self._spoken())

    def _spoken(self) -> dict[str, Any]:
        return {name: spoken(getattr(self, name)) for name in self.fields_in_words}


@dataclass(frozen=True, slots=True)
class Other(RunEvent):
    """An event that this version does not know."""

    name: str = ""  # type: ignore[misc]
    details: Mapping[str, Any] | None = None

    def fields(self) -> dict[str, Any]:
        """See ``RunEvent``."""
        return dict(self.details or {})

    def sentence(self) -> str:
        """See ``RunEvent``."""
        known = ", ".join(f"{key} {spoken(value)}" for key, value in self.fields().items())
        return f"{self.name}: {known}" if known else self.name


@dataclass(frozen=True, slots=True)
class Doing:
    """What a worker that is waited for does.

    ``state`` is a worker's own word, or ``failed`` or ``gone``. ``round`` is there when it is at
    the work of another round; ``heard_s`` says how long ago an idle one was heard.
    """

    worker: str
    state: str
    step: int | None = None
    steps: int | None = None
    round: int | None = None
    heard_s: float | None = None

    def fields(self) -> dict[str, Any]:
        """Return what is known, as plain data."""
        known = ((one.name, getattr(self, one.name)) for one in fields_of(self))
        return {name: value for name, value in known if value is not None}

    def sentence(self) -> str:
        """Say what it does, without its name.

        >>> Doing("north", "training", 3, 40).sentence(), Doing("north", "gone").sentence()
        ('training 3/40', 'is gone')
        """
        if self.state == "gone":
            return "is gone"
        if self.heard_s is not None:
            return f"{self.state} (heard {self.heard_s:.0f} s ago)"
        if self.round is not None:
            return f"{self.state} for round {self.round}"
        return f"{self.state} {self.step}/{self.steps}" if self.steps else self.state


Doings = tuple[Doing, ...] | None

REGISTRY: dict[str, type[RunEvent]] = {}
_READERS: dict[str, tuple[tuple[str, Callable[[Any], Any]], ...]] = {}
_Event = TypeVar("_Event", bound=RunEvent)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def event(
    name: str, words: str, severity: Severity = "plain"
) -> Callable[[type[_Event]], type[_Event]]:
    """Make a class an event of the vocabulary, under its name on the wire."""

    def enter(cls: type[_Event]) -> type[_Event]:
        made = dataclass(frozen=True, slots=True, kw_only=True)(cls)
        made.name, made.words, made.severity = name, words, severity
        made.field_names = tuple(one.name for one in fields_of(made))
        in_words = {field for _, field, _, _ in Formatter().parse(words)}
        made.fields_in_words = tuple(field for field in made.field_names if field in in_words)
        REGISTRY[name] = made
        _READERS[name] = tuple((one.name, _READ[str(one.type)]) for one in fields_of(made))
        return made

    return enter


def from_fields(name: str, fields: Mapping[str, Any]) -> RunEvent:
    """Return the event that a journal tells of.

    Other versions know other events and fields: those are passed over.

    >>> from_fields("eclipse", {"seen_by": ["north", "south"]}).sentence()
    'eclipse: seen_by north, south'
    """
    known = REGISTRY.get(name)
    if known is None:
        return Other(name, fields)
    return known(**{key: read(fields[key]) for key, read in _READERS[name] if key in fields})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value.fields() if isinstance(value, Doing) else value


def spoken(value: Any) -> Any:
    """Return a field's value as a sentence has it."""
    if value is None:
        return _UNKNOWN
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


# --- fields that may be anything ----------------------------------------------------------------


def text(value: Any) -> Text:
    """Return a text; a number is one, too."""
    return str(value) if isinstance(value, str | int | float) else None


def number(value: Any) -> Number:
    """Return a finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= sys.float_info.max else None


def whole(value: Any) -> Whole:
    """Return a whole number; None for anything else."""
    found = number(value)
    return found if isinstance(found, int) else None


def names(value: Any) -> Names:
    """Return names; None for what is no list."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    return tuple(map(str, value))


def numbers(value: Any) -> Numbers:
    """Return the finite numbers among named values; None where nothing has a name."""
    if not isinstance(value, Mapping):
        return None
    found = {str(name): number(one) for name, one in value.items()}
    return {name: one for name, one in found.items() if one is not None}


def doings(value: Any) -> Doings:
    """Return what workers do; those without a name or a state are passed over."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    return tuple(
        Doing(
            one["worker"],
            one["state"],
            step=whole(one.get("step")),
            steps=whole(one.get("steps")),
            round=whole(one.get("round")),
            heard_s=number(one.get("heard_s")),
        )
        for one in value
        if isinstance(one, Mapping)
        and isinstance(one.get("worker"), str)
        and isinstance(one.get("state"), str)
    )


_READ: dict[str, Callable[[Any], Any]] = {
    "Text": text,
    "Whole": whole,
    "Number": number,
    "Names": names,
    "Numbers": numbers,
    "Doings": doings,
}
