"""Groups of tensors in one payload: the model (or a delta), and extra tensors.

Every entry of a tensor table names its group. The entries of a group are adjacent, so that each
group occupies one contiguous range of the payload and has a ``Layout`` of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from fluffle_common.tensors.layout import (
    ALIGNMENT,
    Forms,
    Layout,
    Tensors,
    Weights,
    is_float,
    layout_of,
    size_mismatch,
)
from fluffle_common.tensors.table import MODEL, TensorEntry, cached

_NAMES_SHOWN = 8  # of a model's tensors, in an error

EXTRA = "extra"
"""The group of tensors that a strategy adds to the model, and workers add to their delta."""
FROZEN = "frozen"
"""The group of a model's frozen tensors, which each worker is sent once (see ``frozen``)."""

STATISTICS = "statistics"
"""The word for the tensors of a model that are no parameters, such as running means.

They are averaged like parameters, but no server step changes them. It is the key of their names in
a checkpoint's metadata.
"""

Groups = Mapping[str, Weights]
"""Tensors by group name."""
NO_GROUPS: Groups = {}
ExtraForm = Literal["model"] | dict[str, tuple[int, ...]]
"""The extra tensors that a strategy requires.

Either the names and shapes of all of them, or ``"model"`` for one or more tensors that have the
names and shapes of tensors of the model, such as a correction of each gradient.
"""


class GroupedLayout:
    """The layouts of all groups of a table; created by ``groups_of``.

    Raises:
        ValueError: if an entry is inconsistent, overlaps or precedes the entry before it, or is
            separated from others of its group.
    """

    def __init__(self, table: tuple[TensorEntry, ...]) -> None:
        self.table = table
        self.layouts: dict[str, Layout] = {}
        self._starts: dict[str, int] = {}
        end = 0
        for group, members in itertools.groupby(table, key=lambda entry: entry.group):
            entries = tuple(members)
            if group in self.layouts:
                raise ValueError(f"the tensors of the group '{group}' are not contiguous")
            start = entries[0].offset if self.layouts else 0
            if start < end or start % ALIGNMENT:
                raise ValueError(
                    f"tensor '{entries[0].name}' has the wrong offset {start}; expected a "
                    f"multiple of {ALIGNMENT} that is at least {end}"
                )
            self._starts[group] = start
            self.layouts[group] = layout_of(shifted(entries, -start, MODEL))
            end = start + self.layouts[group].nbytes
        self.nbytes = end
        if MODEL not in self.layouts:
            self.layouts[MODEL], self._starts[MODEL] = layout_of(()), 0

    def over(self, memory: memoryview) -> dict[str, Tensors]:
        """Return the tensors of each group as views of ``memory``, read-only if it is read-only.

        Raises:
            ValueError: if ``memory`` does not have ``nbytes`` bytes.
        """
        if len(memory) != self.nbytes:
            raise ValueError(size_mismatch(self.table, self.nbytes, len(memory)))
        if len(self.layouts) == 1:
            return {MODEL: self.layouts[MODEL].over(memory)}
        return {
            group: layout.over(memory[(start := self._starts[group]) : start + layout.nbytes])
            for group, layout in self.layouts.items()
        }


@cached
def groups_of(table: tuple[TensorEntry, ...]) -> GroupedLayout:
    """Return the layout that a table describes; raises what ``GroupedLayout`` does."""
    return GroupedLayout(table)


def shifted(table: tuple[TensorEntry, ...], by: int, group: str) -> tuple[TensorEntry, ...]:
    """Return the entries moved by some bytes and put into a group."""
    if not by and all(entry.group == group for entry in table):
        return table
    return tuple([e._replace(offset=e.offset + by, group=group) for e in table])


def select_tensors(weights: Weights, train: Sequence[str] | None) -> Weights:
    """Return the tensors of a model that a plan lets workers train.

    ``train`` has names, and prefixes of names followed by ``*``; None selects all tensors.

    Example:
        >>> import numpy as np
        >>> model = dict.fromkeys(["head/kernel", "head/bias", "body/kernel"], np.zeros(1))
        >>> sorted(select_tensors(model, ["head/*"]))
        ['head/bias', 'head/kernel']
    """
    if train is None:
        return weights
    names = {pattern for pattern in train if not pattern.endswith("*")}
    prefixes = tuple(pattern[:-1] for pattern in train if pattern.endswith("*"))
    return {n: w for n, w in weights.items() if n in names or n.startswith(prefixes)}


def tensors_of_model(names: Collection[str]) -> str:
    """Return the first names of a model's tensors, as the end of an error message.

    >>> tensors_of_model(["bias", "kernel"])
    '(tensors of the model: bias, kernel)'
    """
    more = ", …" if len(names) > _NAMES_SHOWN else ""
    return f"(tensors of the model: {', '.join([*names][:_NAMES_SHOWN]) or 'none'}{more})"


def untrained(weights: Weights, train: Sequence[str] | None) -> Weights:
    """Return the tensors that ``train`` does not select, which stay as they are in every round.

    A strategy may change them, although no update does: by noise, momentum or weight decay.
    """
    if train is None:
        return {}
    trained = select_tensors(weights, train)
    return {name: tensor for name, tensor in weights.items() if name not in trained}


def check_statistics(names: Collection[str], model: Collection[str]) -> None:
    """Raise ``ValueError`` if one of these names of statistics is no tensor of a model."""
    for name in names:
        if name not in model:
            raise ValueError(
                f"the statistics include '{name[:60]}', which is no tensor of the model "
                f"{tensors_of_model(model)}"
            )


def check_extra(forms: Forms, wanted: ExtraForm | None, model: Weights) -> None:
    """Check that extra tensors of these dtypes and shapes are those that were required.

    There should be none if ``wanted`` is None.

    Raises:
        ValueError: naming the first tensor that is missing, unexpected or different.
    """
    if wanted is None:
        if forms:
            raise ValueError(_unrequested(min(forms)))
        return
    if wanted == "model":
        shapes = {name: model[name].shape for name in forms.keys() & model.keys()}
        if not forms:
            raise ValueError(
                "the update lacks the tensors that the strategy requires in addition to the weights"
            )
    else:
        shapes = wanted
        missing = sorted(wanted.keys() - forms.keys())
        if missing:
            raise ValueError(
                f"the update lacks the tensor '{missing[0][:60]}', which the strategy requires "
                "in addition to the weights"
            )
    for name, form in forms.items():
        if name not in shapes:
            raise ValueError(_unrequested(name))
        if form.shape != tuple(shapes[name]) or not is_float(form.dtype):
            raise ValueError(
                f"the tensor '{name[:60]}', which the strategy requires in addition to the "
                f"weights, is {form.dtype} {form.shape}; expected floats of shape "
                f"{tuple(shapes[name])}"
            )


def _unrequested(name: str) -> str:
    return f"the update has the extra tensor '{name[:60]}', which the strategy did not request"
