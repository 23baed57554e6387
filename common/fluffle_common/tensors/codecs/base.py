"""The ``Codec`` protocol, the parts of an encoded tensor, and errors of codecs."""

from __future__ import annotations

import re
from typing import ClassVar, NamedTuple, Protocol, Self

import numpy as np

from fluffle_common.tensors.weights import DTYPES, Array, largest
from fluffle_common.user_errors import one_line

Shape = tuple[int, ...]
MAX_SUFFIX = 10  # characters
_SUFFIX = re.compile(rf"(#[A-Za-z0-9_]{{1,{MAX_SUFFIX - 1}}})?")
_MAX_PARTS = 2  # wire_format.header_room relies on it


class Part(NamedTuple):
    """A tensor that travels in place of an encoded one.

    Args:
        suffix: appended to the tensor's name, such as ``#q``; may be empty if ``dtype`` is none of
            the codec's ``dtypes``.
        dtype: the name of the dtype.
        shape: the shape.
        at_most: whether the part may be shorter than ``shape``, which then has one dimension. All
            such parts of a tensor have the same length.
    """

    suffix: str
    dtype: str
    shape: Shape
    at_most: bool = False


class Codec(Protocol):
    """An encoding of float tensors: a frozen class whose instances hold the settings.

    Only ``name`` travels with an update, so ``parts`` and ``decode`` are static: the parts must
    contain everything that decoding needs. The coordinator checks dtypes and shapes against
    ``parts`` before it decodes. The values are untrusted: ``decode`` raises ``ValueError`` for
    values that it does not accept.
    """

    name: ClassVar[str]
    """The name on the wire."""
    dtypes: ClassVar[tuple[str, ...]]
    """The dtypes to encode; other tensors travel unchanged."""
    feeds_back: ClassVar[bool]
    """Whether the encoding error is added to the worker's next update (error feedback)."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the codec with the settings in a text such as ``topk:0.01``; here, it has none.

        Raises:
            ValueError: if the text is invalid; the message says what is expected.
        """
        if text != cls.name:
            raise ValueError(
                f"the codec '{cls.name}' takes no settings; write '{cls.name}' instead of '{text}'"
            )
        return cls()

    def encode(self, tensor: Array, rng: np.random.Generator) -> tuple[Array, ...]:
        """Return the encoded parts of a finite float tensor, in the order of ``parts``.

        If the codec ``feeds_back``, a tensor of less than 32 bits comes as float32.
        ``rng`` is seeded with the plan's seed, the round and the worker's id.
        """
        ...

    @staticmethod
    def parts(shape: Shape) -> tuple[Part, ...]:
        """Return the one or two parts of a tensor of this shape."""
        ...

    @staticmethod
    def decode(parts: tuple[Array, ...], like: Array) -> Array:
        """Return the decoded tensor in the shape and dtype of ``like``, which has only zeros."""
        ...


class CodecError(ValueError):
    """A codec cannot be used, or its code failed; ``__cause__`` is the exception of that code."""


class UnknownCodec(ValueError):
    """No codec has this name."""


def codec_error(codec: type[Codec], action: str, tensor: str, error: BaseException) -> CodecError:
    """Return a ``CodecError`` that says in one line what a codec's code raised, and where."""
    return CodecError(
        f"the codec '{codec.name}' fails to {action} tensor '{tensor[:60]}': {one_line(error)}"
    )


def parts_of(codec: type[Codec], shape: Shape) -> tuple[Part, ...]:
    """Return the parts of a tensor of this shape; raise ``CodecError`` unless they are valid."""
    call = f"parts({shape}) of the codec '{codec.name}'"
    try:
        parts = codec.parts(shape)
    except (Exception, SystemExit) as error:
        raise CodecError(f"{call} fails: {one_line(error)}") from error
    valid = isinstance(parts, tuple) and 1 <= len(parts) <= _MAX_PARTS
    if not valid or not all(isinstance(part, Part) for part in parts):
        raise CodecError(
            f"{call} returned {parts!r:.80}; expected a tuple of one or two Part objects"
        )
    for suffix, dtype, *_ in parts:
        if not _SUFFIX.fullmatch(suffix):
            raise CodecError(
                f"{call} returned the suffix '{suffix[:40]}'; expected an empty suffix, or '#' "
                f"followed by 1 to {MAX_SUFFIX - 1} letters, digits or '_'"
            )
        if dtype not in DTYPES:
            raise CodecError(
                f"{call} returned the dtype '{dtype!s:.40}'; use one of {', '.join(sorted(DTYPES))}"
            )
        if not suffix and dtype in codec.dtypes:
            raise CodecError(
                f"{call} returned the dtype '{dtype}' with an empty suffix, so the part looks like "
                "a tensor that is not encoded; give the part a suffix such as '#q'"
            )
    if len({part.suffix for part in parts}) < len(parts):
        raise CodecError(f"{call} returned the same suffix twice; give each part its own suffix")
    return parts


def clip_to(tensor: Array, limit: float) -> Array:
    """Clip values to [-limit, limit], where ``limit`` is the largest value of a narrower dtype."""
    return tensor if largest(tensor.dtype) <= limit else np.clip(tensor, -limit, limit)
