"""A codec applied to a delta: which tensors are encoded, what is left over, what is believed.

A codec replaces a large float tensor by one or two others, under names that the ordinary table of
tensors carries (``n`` values, ``name`` such as ``conv1/kernel``):

========  =============================================================================
bf16      ``name`` uint16: the upper half of each float32, rounded to nearest, ties to even
f16       ``name`` float16
int8      ``name#q`` int8, and ``name#scale`` float32, one for each 256 values: q * scale
topk      ``name#index`` int32, strictly increasing, and ``name#value`` float32: the others are 0
========  =============================================================================

Everything else travels as it is: integers, small tensors, and tensors that are not finite, so that
they are refused as such. ``int8`` and ``topk`` leave much unsent; what is left is added to the
next delta: error feedback (Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014;
Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019, section 3).

Example:
    >>> delta = {"w": np.linspace(-1, 1, 1024, dtype=np.float32)}
    >>> tensors, residual = compress(delta, "int8", {})
    >>> {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()}
    {'w#q': ('int8', (1024,)), 'w#scale': ('float32', (4,))}
    >>> sent = decompress(tensors, "int8", delta)
    >>> bool(np.all(sent["w"] + residual["w"] == delta["w"]))
    True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fluffle_common.tensors.codecs.base import (
    MAX_SUFFIX,
    Codec,
    CodecError,
    Part,
    Shape,
    failed,
    where,
)
from fluffle_common.tensors.codecs.int8 import BLOCK
from fluffle_common.tensors.codecs.registry import CODECS, OWN_NAMES, Registry, encoding_of
from fluffle_common.tensors.table import MAX_TENSOR_NAME
from fluffle_common.tensors.weights import Array, NotFinite, Weights, delta_dtype, is_float

__all__ = [
    "BLOCK",
    "SMALLEST",
    "check_announced_signature",
    "compress",
    "decompress",
    "encoding_of",
]

SMALLEST = 1024  # a tensor of fewer values is not worth it
_LONGEST_NAME = MAX_TENSOR_NAME - MAX_SUFFIX
_LARGEST = 2**31 - 1  # values that an int32 can count
_WIDE_BYTES = 4
_Form = tuple[np.dtype[Any], Shape]


def compress(
    delta: Weights,
    how: str | Codec,
    residual: Weights,
    rng: np.random.Generator | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Encode a delta.

    Args:
        delta: what was learnt.
        how: the codec, or its text in a plan.
        residual: what was left of the delta before, in the same shapes; empty where there is none.
        rng: random numbers for the codec.

    Returns:
        The tensors to send, and what is left for the next delta: ``delta + residual - sent``, in
        float32 at least: in fewer bits, what is small would be lost where it is added up.

    Raises:
        CodecError: if the codec's own code fails, or returns something else than its parts.
    """
    codec = CODECS.parse(how) if isinstance(how, str) else how
    rng = rng or np.random.default_rng(0)
    tensors: dict[str, Array] = {}
    left: dict[str, Array] = {}
    for name, learnt in delta.items():
        wanted = _with(learnt, residual.get(name), codec)
        if not _worth_it(name, wanted, codec, delta):
            tensors[name] = wanted.astype(learnt.dtype, copy=False)
            continue
        parts = _parts(type(codec), name, wanted.shape)
        encoded = _encoded(codec, name, wanted, parts, rng)
        tensors.update(zip(_names(name, parts), encoded, strict=True))
        if codec.feeds_back:
            left[name] = wanted - _decoded(type(codec), name, encoded, learnt)
            _check_left(codec, name, left[name])
    return tensors, left


def _check_left(codec: Codec, name: str, left: Array) -> None:
    """Check that what is carried over can be sent some day; fluffle's own codecs see to that."""
    if codec.name not in OWN_NAMES and not np.isfinite(left).all():
        raise CodecError(
            f"the codec '{codec.name}' decodes its own encoding of tensor '{name[:60]}', which is "
            "finite, to values that are NaN or infinite"
        )


def _with(learnt: Array, left: Array | None, codec: Codec) -> Array:
    """Add what was left before."""
    if codec.feeds_back and is_float(learnt.dtype) and learnt.dtype.itemsize < _WIDE_BYTES:
        learnt = learnt.astype(np.float32)
    return learnt if left is None else learnt + left


def _worth_it(name: str, tensor: Array, codec: Codec, delta: Weights) -> bool:
    if (
        tensor.dtype.name not in codec.dtypes
        or not is_float(tensor.dtype)
        or not SMALLEST <= tensor.size <= _LARGEST
        or len(name) > _LONGEST_NAME
    ):
        return False
    # Should the model itself have such a name, there must be no doubt whose tensor it is.
    names = _names(name, _parts(type(codec), name, tensor.shape))
    if any(other != name and other in delta for other in names):
        return False
    return bool(np.isfinite(tensor).all())


def _encoded(
    codec: Codec, name: str, tensor: Array, parts: tuple[Part, ...], rng: np.random.Generator
) -> tuple[Array, ...]:
    try:
        found = codec.encode(_read_only(tensor), rng)
    except Exception as why:
        raise failed(type(codec), "encode", name, why) from why
    if not isinstance(found, tuple) or len(found) != len(parts):
        raise CodecError(
            f"encode() of the codec '{codec.name}' returned {_count(found)} for tensor "
            f"'{name[:60]}'; a tuple of {len(parts)} is expected, one for each of its parts"
        )
    encoded = tuple(np.asarray(part) for part in found)
    try:
        _check(name, parts, encoded)
    except ValueError as wrong:
        raise CodecError(f"encode() of the codec '{codec.name}' is wrong: {wrong}") from None
    return encoded


def _count(found: object) -> str:
    kind = type(found).__name__
    return f"a {kind} of {len(found)}" if isinstance(found, tuple | list) else f"a {kind}"


def decompress(
    tensors: Weights, encoding: str | None, like: Weights, codecs: Registry = CODECS
) -> Weights:
    """Decode what ``compress`` made, or anyone else: nothing is taken on trust.

    Dtypes and shapes are checked before anything is decoded, whatever was sent.

    Args:
        tensors: as they were sent.
        encoding: the codec's name, as the message has it; None where they are plain.
        like: the model's weights.
        codecs: the codecs that may be used.

    Returns:
        The delta. What is not encoded is passed on as it is, and so is what belongs to no tensor
        of the model; ``check_delta`` has yet to look at all of it.

    Raises:
        NotFinite: where a scale is NaN or infinite.
        CodecError: if the codec's own code fails.
        ValueError: where encoded tensors have the wrong dtype, shape or contents, or the codec is
            unknown.
    """
    if encoding is None:
        return tensors
    codec = codecs.get(encoding)
    rest = dict(tensors)
    delta: dict[str, Array] = {}
    for name, base in like.items():
        if name in rest and rest[name].dtype == delta_dtype(base.dtype):
            delta[name] = rest.pop(name)
            continue
        if not is_float(base.dtype):
            continue
        parts = _parts(codec, name, base.shape)
        names = _names(name, parts)
        if all(one in rest for one in names):
            encoded = tuple(rest.pop(one) for one in names)
            _check(name, parts, encoded)
            # Of numbers that nobody sends who means well; what comes of them is not finite.
            with np.errstate(over="ignore", invalid="ignore"):
                delta[name] = _decoded(codec, name, encoded, base)
    return delta | rest


def _decoded(codec: type[Codec], name: str, encoded: tuple[Array, ...], like: Array) -> Array:
    try:
        found = codec.decode(encoded, _read_only(like))
    except NotFinite as wrong:
        raise NotFinite(f"tensor '{name}', encoded as {codec.name}: {wrong}") from None
    except ValueError as wrong:
        place = "" if codec.name in OWN_NAMES else where(wrong)
        told = f"tensor '{name}', encoded as {codec.name}: {wrong}"
        raise ValueError(f"{told[:400]}{place}") from wrong
    except Exception as why:
        raise failed(codec, "decode", name, why) from why
    if not isinstance(found, np.ndarray) or (found.dtype, found.shape) != (like.dtype, like.shape):
        shape, dtype = getattr(found, "shape", ""), getattr(found, "dtype", type(found).__name__)
        raise CodecError(
            f"decode() of the codec '{codec.name}' returned {dtype} {shape} for tensor "
            f"'{name[:60]}', expected {like.dtype} {like.shape}"
        )
    return found


def check_announced_signature(
    announced: Mapping[str, _Form],
    encoding: str | None,
    like: Weights,
    codecs: Registry = CODECS,
) -> None:
    """Check that tensors of these dtypes and shapes may be a delta for ``like``, as encoded.

    It is for what is announced and not there yet; ``decompress`` and ``check_delta`` look at the
    rest.

    Raises:
        ValueError: naming what differs from the model, and how.
    """
    codec = None if encoding is None else codecs.get(encoding)
    rest, missing = dict(announced), []
    for name, base in like.items():
        plain = rest.get(name)
        if plain is not None and (codec is None or plain[0] == delta_dtype(base.dtype)):
            del rest[name]
            if plain != (delta_dtype(base.dtype), base.shape):
                raise ValueError(
                    f"tensor '{name}' is {plain[0]} {plain[1]}, "
                    f"expected {delta_dtype(base.dtype)} {base.shape}"
                )
            continue
        parts = _parts(codec, name, base.shape) if codec and is_float(base.dtype) else ()
        names = _names(name, parts)
        if parts and all(one in rest for one in names):
            _check_announced(names, parts, [rest.pop(one) for one in names])
        else:
            missing.append(name)
    for what, wrong in (("missing", missing), ("unknown", sorted(rest))):
        if wrong:
            more = " …" if len(wrong) > 3 else ""
            told = f"{what} {', '.join(wrong[:3])}{more}"
            raise ValueError(f"tensor names differ from the model's: {told}"[:500])


def _check_announced(names: Sequence[str], parts: tuple[Part, ...], found: Sequence[_Form]) -> None:
    length: Shape | None = None  # of those that may be shorter
    for name, part, (dtype, shape) in zip(names, parts, found, strict=True):
        fits = shape == part.shape
        if part.at_most:
            length = shape if length is None else length
            fits = len(shape) == 1 and shape == length and shape[0] <= part.shape[0]
        if dtype != np.dtype(part.dtype) or not fits:
            bound = "at most " if part.at_most else ""
            raise ValueError(
                f"tensor '{name}' is {dtype} {shape}, expected {bound}{part.dtype} {part.shape}"
            )


def _check(name: str, parts: tuple[Part, ...], found: tuple[Array, ...]) -> None:
    """Check that encoded tensors are what their codec says."""
    length: int | None = None  # of those that may be shorter
    for part, tensor in zip(parts, found, strict=True):
        shape = part.shape
        if part.at_most:  # so that too many are a wrong shape
            length = min(tensor.size, part.shape[0]) if length is None else length
            shape = (length,)
        if tensor.dtype != np.dtype(part.dtype):
            raise ValueError(
                f"tensor '{name}{part.suffix}' is {tensor.dtype}, expected {part.dtype}"
            )
        if tensor.shape != shape:
            raise ValueError(
                f"tensor '{name}{part.suffix}' has shape {tensor.shape}, expected {shape}"
            )


def _read_only(tensor: Array) -> Array:
    """Return a view that a codec cannot write to: the values are still needed."""
    view = tensor.view()
    view.flags.writeable = False
    return view


def _parts(codec: type[Codec], name: str, shape: Shape) -> tuple[Part, ...]:
    try:
        return codec.parts(shape)
    except Exception as why:
        raise failed(codec, "lay out", name, why) from why


def _names(name: str, parts: tuple[Part, ...]) -> tuple[str, ...]:
    return tuple(name + part.suffix for part in parts)
