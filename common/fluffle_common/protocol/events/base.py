"""The base of all run events: a name, typed fields, a severity, and a sentence for people.

Events may be read from a journal that another version wrote. So every field may be missing (None),
and a value of the wrong type counts as missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from string import Formatter
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

from fluffle_common.plural import listed, plural

Severity = Literal["plain", "good", "odd", "bad"]

# The types of fields. ``_READERS`` has a function for each of these names.
Text = str | None
Integer = int | None
Number = float | None
Names = tuple[str, ...] | None
Numbers = Mapping[str, float] | None


def _is_noun(spec: str) -> bool:
    """Whether a format specification is a noun, and not one of the types such as ``g``."""
    return len(spec) > 1 and spec[-2:].isalpha()


class _Missing:
    """Formats a missing field as a question mark, whatever the format specification."""

    def __format__(self, spec: str) -> str:
        return f"? {spec}s" if _is_noun(spec) else "?"


class _Integer(int):
    """Formats an integer with a noun as the format specification: ``{updates:update}``."""

    def __format__(self, spec: str) -> str:
        return plural(self, spec) if _is_noun(spec) else super().__format__(spec)


_MISSING = _Missing()
_HUGE = 1e9  # from here on, four decimals tell nothing


@dataclass(frozen=True, slots=True)
class RunEvent:
    """Something that happened in a run.

    ``name`` is the name on the wire. ``template`` is the sentence; its placeholders are fields, or
    keys of ``_derived``; ``{updates:update}`` becomes "1 update" or "3 updates". An event that is
    not ``journalled`` appears in the log only. A ``verbatim`` one is written unabridged for people.
    """

    name: ClassVar[str] = ""
    severity: ClassVar[Severity] = "plain"
    template: ClassVar[str] = ""
    journalled: ClassVar[bool] = True
    verbatim: ClassVar[bool] = False
    field_names: ClassVar[tuple[str, ...]] = ()
    template_fields: ClassVar[tuple[str, ...]] = ()  # those that occur in the template

    def fields(self) -> dict[str, Any]:
        """Return the fields that are not missing, as plain data for the log and the wire."""
        present: dict[str, Any] = {}
        for name in self.field_names:
            value = getattr(self, name)
            if isinstance(value, tuple):
                value = [item.fields() if isinstance(item, Doing) else item for item in value]
            if value is not None:
                present[name] = value
        return present

    def sentence(self) -> str:
        """Return the event in words, with a question mark for each missing field."""
        return self._filled(self.template)

    def gist(self) -> object:
        """Return what must change before a periodic report is journalled again; None for others."""
        return None

    def _filled(self, template: str) -> str:
        """Fill in the template, or a part of it."""
        values = {
            name: "nobody" if (value := getattr(self, name)) == () else formatted(value)
            for name in self.template_fields
        }
        return template.format_map(values | self._derived())

    def _derived(self) -> dict[str, str]:
        """Return the parts of the sentence that are computed from the fields."""
        return {}


@dataclass(frozen=True, slots=True)
class Other(RunEvent):
    """An event that this version does not know."""

    name: str = ""  # type: ignore[misc]
    details: Mapping[str, Any] | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields as they are in the journal."""
        return dict(self.details or {})

    def sentence(self) -> str:
        """Return the name and all fields."""
        facts = ", ".join(f"{key} {formatted(value)}" for key, value in self.fields().items())
        return f"{self.name}: {facts}" if facts else self.name


@dataclass(frozen=True, slots=True)
class Doing:
    """What a worker that the run waits for is doing.

    ``state`` is the worker's own ``state``, or ``failed`` or ``gone``. ``round`` is set if the
    worker is working on another round; ``heard_s`` is the age of an idle worker's last heartbeat.
    """

    worker: str
    state: str
    step: int | None = None
    steps: int | None = None
    round: int | None = None
    heard_s: float | None = None

    def fields(self) -> dict[str, Any]:
        """Return the fields that are not None, as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def sentence(self) -> str:
        """Return the state in words, without the worker's name.

        >>> Doing("north", "training", 3, 40).sentence(), Doing("north", "gone").sentence()
        ('training 3/40', 'is gone')
        """
        if self.state == "gone":
            return "is gone"
        if self.heard_s is not None:
            return f"{self.state} (last heartbeat {self.heard_s:.0f} s ago)"
        if self.round is not None:
            return f"{self.state} for round {self.round}"
        return f"{self.state} {self.step}/{self.steps}" if self.steps else self.state


Doings = tuple[Doing, ...] | None

REGISTRY: dict[str, type[RunEvent]] = {}
"""All event classes by name."""
_field_readers: dict[str, dict[str, Callable[[Any], Any]]] = {}
_Event = TypeVar("_Event", bound=RunEvent)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def event(
    name: str, template: str, severity: Severity = "plain"
) -> Callable[[type[_Event]], type[_Event]]:
    """Make a class an event: a frozen dataclass that is registered under its name."""

    def register(cls: type[_Event]) -> type[_Event]:
        event_class = dataclass(frozen=True, slots=True, kw_only=True)(cls)
        event_class.name, event_class.template, event_class.severity = name, template, severity
        event_class.field_names = tuple(field.name for field in fields_of(event_class))
        in_template = {field for _, field, _, _ in Formatter().parse(template)}
        event_class.template_fields = tuple(n for n in event_class.field_names if n in in_template)
        types = {field.name: str(field.type) for field in fields_of(event_class)}
        REGISTRY[name] = event_class
        _field_readers[name] = {field: _READERS[kind] for field, kind in types.items()}
        return event_class

    return register


def from_fields(name: str, fields: Mapping[str, Any]) -> RunEvent:
    """Return the event with this name and these fields, ignoring unknown fields.

    >>> from_fields("eclipse", {"seen_by": ["north", "south"]}).sentence()
    'eclipse: seen_by north, south'
    """
    event_class = REGISTRY.get(name)
    if event_class is None:
        return Other(name, fields)
    readers = _field_readers[name].items()
    return event_class(**{field: read(fields[field]) for field, read in readers if field in fields})


def formatted(value: Any) -> Any:
    """Return a field's value as a sentence shows it."""
    if value is None:
        return _MISSING
    if isinstance(value, int):
        return _Integer(value)
    return listed(value) if isinstance(value, list | tuple) else value


def decimal(value: float) -> str:
    """Return a loss or metric with four decimals, or in scientific notation if it is huge.

    >>> decimal(0.25), decimal(-1.7e308)
    ('0.2500', '-1.7000e+308')
    """
    return f"{value:.4f}" if abs(value) < _HUGE else f"{value:.4e}"


# --- readers: from untrusted values to fields ---------------------------------------------------


def _read_text(value: Any) -> Text:
    return str(value) if isinstance(value, str | int | float) else None


def _read_number(value: Any) -> Number:
    """Return a finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= sys.float_info.max else None


def _read_integer(value: Any) -> Integer:
    number = _read_number(value)
    return number if isinstance(number, int) else None


def _read_names(value: Any) -> Names:
    return tuple(map(str, value)) if _is_list(value) else None


def _read_numbers(value: Any) -> Numbers:
    """Return the finite numbers of a mapping; None for anything else."""
    if not isinstance(value, Mapping):
        return None
    numbers = {str(name): _read_number(item) for name, item in value.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def _read_doings(value: Any) -> Doings:
    """Return the workers' states, skipping those without a name or a state."""
    if not _is_list(value):
        return None
    return tuple(
        Doing(
            item["worker"],
            item["state"],
            step=_read_integer(item.get("step")),
            steps=_read_integer(item.get("steps")),
            round=_read_integer(item.get("round")),
            heard_s=_read_number(item.get("heard_s")),
        )
        for item in value
        if isinstance(item, Mapping)
        and isinstance(item.get("worker"), str)
        and isinstance(item.get("state"), str)
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


_READERS: dict[str, Callable[[Any], Any]] = {
    "Text": _read_text,
    "Integer": _read_integer,
    "Number": _read_number,
    "Names": _read_names,
    "Numbers": _read_numbers,
    "Doings": _read_doings,
}
