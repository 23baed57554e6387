"""The ``Codec`` protocol, and the parts that an encoded tensor travels as."""

from __future__ import annotations

import types
from typing import ClassVar, NamedTuple, Protocol, Self

import numpy as np

from fluffle_common.tensors.weights import Array, largest

Shape = tuple[int, ...]
MAX_SUFFIX = 10  # characters of a name that a suffix may take


class Part(NamedTuple):
    """One tensor that travels in place of an encoded one.

    Args:
        suffix: what its name ends with, such as ``#q``; empty: it has the tensor's own name.
        dtype: the name of its dtype.
        shape: its shape.
        at_most: its one dimension may be shorter; all such parts of a tensor have one length.
    """

    suffix: str
    dtype: str
    shape: Shape
    at_most: bool = False


class Codec(Protocol):
    """One encoding of a float tensor: a frozen class whose instances are its settings.

    Only ``name`` travels with an update, so ``parts`` and ``decode`` are static: what they need
    must be in the parts. The coordinator checks dtypes and shapes against ``parts`` before it
    allocates anything, so ``decode`` never sees others. Values may be anything; ``decode`` raises
    ``ValueError`` for those that it does not accept.
    """

    name: ClassVar[str]
    """The name that travels."""
    dtypes: ClassVar[tuple[str, ...]]
    """The dtypes that it makes smaller; other tensors travel as they are."""
    feeds_back: ClassVar[bool]
    """Whether what it leaves unsent is added to the worker's next update."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the codec that a plan asks for, such as ``topk:0.01``.

        Raises:
            ValueError: saying what is expected instead.
        """
        ...

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        """Return the parts of a finite float tensor, in the order of ``parts``.

        ``rng`` is seeded by the plan, the round, and the worker's id.
        """
        ...

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        """Return the one or two parts that a tensor of this shape travels as."""
        ...

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        """Return the tensor, in the shape and dtype of ``like``; do not use its values."""
        ...


class CodecError(ValueError):
    """A codec's own code failed; ``__cause__`` is its error, with the traceback of that code."""


class UnknownCodec(ValueError):
    """There is no codec of this name here."""


class BrokenCodec(ValueError):
    """The codec of this name is installed and cannot be used."""


def failed(codec: type[Codec], what: str, tensor: str, why: Exception) -> CodecError:
    """Return the error that says in one line what a codec's own code raised, and where."""
    trace = _own(why.__traceback__)
    wrong = CodecError(
        f"the codec '{codec.name}' fails to {what} tensor '{tensor[:60]}': {in_short(why)}"
        f"{where(why)}"
    )
    wrong.__cause__ = why.with_traceback(trace)
    return wrong


def in_short(why: Exception) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(why).__name__}: {why}".split())[:300]


def _own(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Leave out the frame that called the codec, which is ours."""
    return trace.tb_next if trace is not None and trace.tb_next is not None else trace


def where(why: Exception) -> str:
    """Return the last line of the codec's own file that its error went through."""
    trace = _own(why.__traceback__)
    if trace is None:
        return ""
    own, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == own:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" ({own.rpartition('/')[2]}:{line})"


def plain(text: str, name: str) -> None:
    """Check that a plan asks for a codec that takes no settings without any.

    Raises:
        ValueError: if it gives some.
    """
    if text != name:
        raise ValueError(f"'{text}' is not '{name}', which takes no settings")


def clipped(tensor: Array, end: float) -> Array:
    """Bring values that a narrower float cannot hold to the largest that it can."""
    if largest(tensor.dtype) <= end:
        return tensor
    return np.clip(tensor, -end, end)
