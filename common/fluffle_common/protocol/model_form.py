"""The form of a model: a digest and a summary of its tensors' names, dtypes and shapes.

Coordinator and worker compare forms to find out, without sending weights, if their models match.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from hashlib import sha256

from fluffle_common.protocol.messages import ModelForm
from fluffle_common.tensors.layout import Weights, signature_of


def model_form(weights: Weights) -> ModelForm:
    """Return the form of these weights.

    Example:
        >>> import numpy as np
        >>> model_form({"w": np.zeros((2, 3), np.float32)}).summary
        '1 tensor, 6 parameters: float32 1'
    """
    return form_from((name, str(dtype), shape) for name, dtype, shape in signature_of(weights))


def form_from(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> ModelForm:
    """Return the form of tensors with these names, dtypes and shapes, in any order."""
    entries = sorted(tensors)
    packed = json.dumps(entries, separators=(",", ":"))
    count, size = len(entries), sum(math.prod(shape) for *_, shape in entries)
    dtypes = Counter(dtype for _, dtype, _ in entries)
    by_dtype = ", ".join(f"{dtype} {n}" for dtype, n in sorted(dtypes.items()))
    summary = f"{count} tensor{'s'[: count != 1]}, {size:,} parameters: {by_dtype}"
    return ModelForm(digest=sha256(packed.encode()).hexdigest()[:16], summary=summary[:300])
