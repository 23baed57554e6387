"""The form of a model: a digest and a summary of its tensors' names, dtypes and shapes.

Coordinator and worker compare forms to find out, without sending weights, if their models match.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from hashlib import sha256
from types import MappingProxyType
from typing import Any

from fluffle_common.plural import plural
from fluffle_common.protocol.messages import ModelForm
from fluffle_common.tensors.groups import FROZEN, STATISTICS
from fluffle_common.tensors.layout import Array, Signature, Weights, signature_of

_NOTHING: Weights = MappingProxyType[str, Array]({})


def model_form(
    weights: Weights, frozen: Weights = _NOTHING, statistics: Collection[str] = ()
) -> ModelForm:
    """Return the form of these weights and frozen tensors; see ``form_from``.

    Example:
        >>> import numpy as np
        >>> model_form({"w": np.zeros((2, 3), np.float32)}).summary
        '1 tensor, 6 parameters: float32 1'
    """
    return form_from(signature_of(weights), signature_of(frozen), statistics)


def form_from(
    signature: Signature, frozen: Signature = (), statistics: Collection[str] = ()
) -> ModelForm:
    """Return the form of a model's tensors and its frozen tensors, in any order.

    ``statistics`` names the tensors that are not parameters. In the digest, the entry of such a
    tensor ends with the word for it, and that of a frozen tensor with the name of its group.
    """
    statistics = frozenset(statistics)  # there may be thousands
    entries: list[tuple[Any, ...]] = [
        (name, dtype.name, shape, *([STATISTICS] if name in statistics else ()))
        for name, dtype, shape in signature
    ]
    entries += [(name, dtype.name, shape, FROZEN) for name, dtype, shape in frozen]
    packed = json.dumps(sorted(entries), separators=(",", ":"))
    summary = _summary(signature) + (f"; frozen: {_summary(frozen)}" if frozen else "")
    if statistics:
        summary += f"; statistics: {plural(len(statistics), 'tensor')}"
    return ModelForm(digest=sha256(packed.encode()).hexdigest()[:16], summary=summary[:300])


def _summary(signature: Signature) -> str:
    count, size = len(signature), sum(math.prod(shape) for *_, shape in signature)
    dtypes = Counter(dtype.name for _, dtype, _ in signature)
    by_dtype = ", ".join(f"{dtype} {n}" for dtype, n in sorted(dtypes.items()))
    return f"{plural(count, 'tensor')}, {plural(size, 'parameter')}: {by_dtype}"
