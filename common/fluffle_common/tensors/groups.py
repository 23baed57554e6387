"""Groups of tensors: the model, and what travels beside it, in one payload.

Each entry of a table of tensors names its group. The entries of a group follow each other, so that
each group lies in one piece of the payload and has a layout of its own, as if it came alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fluffle_common.tensors.layout import (
    ALIGNMENT,
    Layout,
    Tensors,
    Weights,
    is_float,
    layout_of,
    misfit,
)
from fluffle_common.tensors.table import CACHED_TABLES, MAX_CACHED_TENSORS, MODEL, TensorEntry

EXTRA = "extra"
"""What a strategy sends its workers besides the model, and what they send back besides a delta."""

Groups = Mapping[str, Weights]
"""Tensors by the names of their groups."""
NO_GROUPS: Groups = {}
ExtraForm = Literal["model"] | dict[str, tuple[int, ...]]
"""Which extra tensors a strategy asks for.

Either their names and shapes, all of which are expected; or ``"model"``: for some tensors of the
model, one of the same name and shape, such as a correction of each gradient.
"""


class GroupedLayout:
    """Where the tensors of a table lie, group by group; made by ``groups_of``.

    Args:
        table: the entries, as they are on the wire.

    Raises:
        ValueError: where an entry is not what it says, does not lie behind the entry before it, or
            is apart from the others of its group.
    """

    def __init__(self, table: tuple[TensorEntry, ...]) -> None:
        self.table = table
        self.layouts: dict[str, Layout] = {}
        self._starts: dict[str, int] = {}
        end = 0
        for group, members in itertools.groupby(table, key=lambda entry: entry.group):
            entries = tuple(members)
            if group in self.layouts:
                raise ValueError(f"the tensors of the group '{group}' do not follow each other")
            start = entries[0].offset if self.layouts else 0
            if start < end or start % ALIGNMENT:
                raise ValueError(
                    f"tensor '{entries[0].name}' has the wrong offset {start}: "
                    f"a multiple of {ALIGNMENT} is expected, from {end} on"
                )
            self._starts[group] = start
            self.layouts[group] = layout_of(_moved(entries, -start, MODEL))
            end = start + self.layouts[group].nbytes
        self.nbytes = end
        if MODEL not in self.layouts:
            self.layouts[MODEL], self._starts[MODEL] = layout_of(()), 0

    def over(self, memory: memoryview) -> dict[str, Tensors]:
        """Return the tensors of each group as views of ``memory``; read-only where that is.

        Raises:
            ValueError: where it has not ``nbytes`` bytes.
        """
        if len(memory) != self.nbytes:
            raise ValueError(misfit(self.table, self.nbytes, len(memory)))
        if len(self.layouts) == 1:
            return {MODEL: self.layouts[MODEL].over(memory)}
        return {
            group: layout.over(memory[start : start + layout.nbytes])
            for (group, layout), start in zip(
                self.layouts.items(), self._starts.values(), strict=True
            )
        }


def groups_of(table: tuple[TensorEntry, ...]) -> GroupedLayout:
    """Return the layout that a table describes.

    Raises:
        ValueError: see ``GroupedLayout``.
    """
    return _groups_of(table) if len(table) <= MAX_CACHED_TENSORS else GroupedLayout(table)


@functools.lru_cache(CACHED_TABLES)
def _groups_of(table: tuple[TensorEntry, ...]) -> GroupedLayout:
    return GroupedLayout(table)


def placed(layout: Layout, group: str, start: int) -> tuple[TensorEntry, ...]:
    """Return the entries of a group that begins at byte ``start`` of a payload."""
    return _moved(layout.table, start, group)


def _moved(table: tuple[TensorEntry, ...], by: int, group: str) -> tuple[TensorEntry, ...]:
    if not by and all(entry.group == group for entry in table):
        return table
    return tuple([e._replace(offset=e.offset + by, group=group) for e in table])


def chosen(weights: Weights, train: Sequence[str] | None) -> Weights:
    """Return the tensors that a plan lets workers train.

    Args:
        weights: the model.
        train: names, or beginnings of names with a ``*`` behind them; None chooses all.

    Example:
        >>> model = dict.fromkeys(["head/kernel", "head/bias", "body/kernel"], np.zeros(1))
        >>> sorted(chosen(model, ["head/*"]))
        ['head/bias', 'head/kernel']
    """
    if train is None:
        return weights
    names = {one for one in train if not one.endswith("*")}
    beginnings = tuple(one[:-1] for one in train if one.endswith("*"))
    return {n: w for n, w in weights.items() if n in names or n.startswith(beginnings)}


def forms_of(tensors: Weights) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return the dtype and the shape of each tensor."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def check_extra(
    forms: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    wanted: ExtraForm | None,
    model: Weights,
) -> None:
    """Check that extra tensors of these dtypes and shapes are those that were asked for.

    Args:
        forms: the dtype and the shape of each, as ``forms_of`` returns them.
        wanted: what was asked for; None: nothing.
        model: the weights of the model.

    Raises:
        ValueError: naming the first that differs, and how.
    """
    if wanted is None:
        if forms:
            raise ValueError(f"the extra tensor '{min(forms)[:60]}' was not asked for")
        return
    if wanted == "model":
        shapes = {name: model[name].shape for name in forms.keys() & model.keys()}
        if not forms:
            raise ValueError("the extra tensors that were asked for are missing")
    else:
        shapes = wanted
        missing = sorted(wanted.keys() - forms.keys())
        if missing:
            raise ValueError(f"the extra tensor '{missing[0][:60]}' is missing")
    for name, (dtype, shape) in forms.items():
        if name not in shapes:
            raise ValueError(f"the extra tensor '{name[:60]}' was not asked for")
        if shape != tuple(shapes[name]) or not is_float(dtype):
            raise ValueError(
                f"the extra tensor '{name[:60]}' is {dtype} {shape}, expected floats of shape "
                f"{tuple(shapes[name])}"
            )
