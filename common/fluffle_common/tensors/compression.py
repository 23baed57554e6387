"""Deltas in fewer bytes: narrower floats, 8-bit integers with scales, or only the largest values.

An encoding replaces a large float tensor by one or two others, under names that the ordinary table
of tensors carries (``n`` values, ``name`` such as ``conv1/kernel``):

========  =============================================================================
bf16      ``name`` uint16: the upper half of each float32, rounded to nearest, ties to even
f16       ``name`` float16
int8      ``name#q`` int8, and ``name#scale`` float32, one for each 256 values: q * scale
topk      ``name#index`` int32, strictly increasing, and ``name#value`` float32: the others are 0
========  =============================================================================

Everything else travels as it is: integers, small tensors, and what is not finite, so that it is
refused for what it is. ``int8`` and ``topk`` leave much unsent; what is left goes on top of the
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

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluffle_common.tensors.table import Encoding
from fluffle_common.tensors.weights import (
    BFLOAT16,
    FLOATS,
    Array,
    NotFinite,
    Weights,
    delta_dtype,
    is_float,
    largest,
)

Shape = tuple[int, ...]

BLOCK = 256  # values that share a scale
SMALLEST = 1024  # a tensor of fewer values is not worth it
_INT8_MAX = 127
_LONGEST_NAME = 490  # of the 500 characters that a name may have, a suffix needs some
_LARGEST = 2**31 - 1  # values that an int32 can count
_WIDE_BYTES = 4
_F16_MAX = largest(np.dtype(np.float16))
_F32_MAX = largest(np.dtype(np.float32))
_BF16_MAX = largest(BFLOAT16)


@dataclass(frozen=True)
class _Codec:
    """One encoding.

    Args:
        suffixes: what the names of its tensors end with.
        encode: ``(tensor, fraction) -> tensors``, one for each suffix, of a finite float tensor.
        decode: ``(name, tensors, like) -> tensor`` in the shape and dtype of ``like``; raises
            ``ValueError`` where they are anything else than what ``encode`` may return.
        forms: ``(shape, size) -> dtypes and shapes`` of those tensors for one of this shape; where
            ``fewer``, they may have fewer values, but as many as each other.
        dtypes: of the tensors that it makes smaller.
        feeds_back: whether what it does not send goes into the next delta.
    """

    suffixes: tuple[str, ...]
    encode: Callable[[Array, float], tuple[Array, ...]]
    decode: Callable[[str, tuple[Array, ...], Array], Array]
    forms: Callable[[Shape, int], tuple[tuple[str, Shape], ...]]
    dtypes: tuple[str, ...] = FLOATS
    feeds_back: bool = True
    fewer: bool = False

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names under which a tensor of this name travels."""
        return tuple(name + suffix for suffix in self.suffixes)


def encoding_of(how: str) -> Encoding:
    """Return the encoding that ``compress`` uses.

    >>> encoding_of("topk:0.01")
    'topk'
    """
    encoding: Encoding = how.partition(":")[0]  # type: ignore[assignment]
    return encoding


def compress(
    delta: Weights, how: str, residual: Weights
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Encode a delta.

    Args:
        delta: what was learnt.
        how: ``plan.compress``: an encoding, or ``topk:`` with the fraction of the values to send.
        residual: what was left of the delta before, in the same shapes; empty where there is none.

    Returns:
        The tensors to send, and what is left for the next delta: ``delta + residual - sent``, in
        float32 at least: in fewer bits, what is small would be lost where it is added up.
    """
    codec, fraction = _CODECS[encoding_of(how)], how.partition(":")[2]
    tensors: dict[str, Array] = {}
    left: dict[str, Array] = {}
    for name, learnt in delta.items():
        wanted = _with(learnt, residual.get(name), codec)
        if not _worth_it(name, wanted, codec, delta):
            tensors[name] = wanted.astype(learnt.dtype, copy=False)
            continue
        encoded = codec.encode(wanted, float(fraction or 1))
        tensors.update(zip(codec.names(name), encoded, strict=True))
        if codec.feeds_back:
            left[name] = wanted - codec.decode(name, encoded, learnt)
    return tensors, left


def _with(learnt: Array, left: Array | None, codec: _Codec) -> Array:
    """Add what was left before."""
    if codec.feeds_back and is_float(learnt.dtype) and learnt.dtype.itemsize < _WIDE_BYTES:
        learnt = learnt.astype(np.float32)
    return learnt if left is None else learnt + left


def _worth_it(name: str, tensor: Array, codec: _Codec, delta: Weights) -> bool:
    return (
        tensor.dtype.name in codec.dtypes
        and SMALLEST <= tensor.size <= _LARGEST
        and len(name) <= _LONGEST_NAME
        # Should the model itself have such a name, there must be no doubt whose tensor it is.
        and not any(other != name and other in delta for other in codec.names(name))
        and bool(np.isfinite(tensor).all())
    )


def decompress(tensors: Weights, encoding: Encoding | None, like: Weights) -> Weights:
    """Decode what ``compress`` made, or anyone else: nothing is taken on trust.

    Nothing is allocated that is larger than a tensor of the model, whatever was sent.

    Args:
        tensors: as they were sent.
        encoding: what the message says of them; None where they are plain.
        like: the model's weights.

    Returns:
        The delta. What is not encoded is passed on as it is, and so is what belongs to no tensor
        of the model; ``check_delta`` has yet to look at all of it.

    Raises:
        NotFinite: where a scale is NaN or infinite.
        ValueError: where encoded tensors have the wrong dtype, shape or contents.
    """
    if encoding is None:
        return tensors
    codec = _CODECS[encoding]
    rest = dict(tensors)
    delta: dict[str, Array] = {}
    for name, base in like.items():
        names = codec.names(name)
        if name in rest and rest[name].dtype == delta_dtype(base.dtype):
            delta[name] = rest.pop(name)
        elif is_float(base.dtype) and all(one in rest for one in names):
            encoded = tuple(rest.pop(one) for one in names)
            # Of numbers that nobody sends who means well; what comes of them is not finite.
            with np.errstate(over="ignore", invalid="ignore"):
                delta[name] = codec.decode(name, encoded, base)
    return delta | rest


def check_announced_signature(
    announced: Mapping[str, tuple[np.dtype[Any], Shape]], encoding: Encoding | None, like: Weights
) -> None:
    """Check that tensors of these dtypes and shapes may be a delta for ``like``, as encoded.

    It is for what is announced and not there yet; ``decompress`` and ``check_delta`` look at the
    rest.

    Raises:
        ValueError: naming what differs from the model, and how.
    """
    codec = None if encoding is None else _CODECS[encoding]
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
        elif codec and is_float(base.dtype) and all(one in rest for one in codec.names(name)):
            _check_encoded(codec, name, [rest.pop(one) for one in codec.names(name)], base)
        else:
            missing.append(name)
    for what, names in (("missing", missing), ("unknown", sorted(rest))):
        if names:
            more = " …" if len(names) > 3 else ""
            told = f"{what} {', '.join(names[:3])}{more}"
            raise ValueError(f"tensor names differ from the model's: {told}"[:500])


def _check_encoded(
    codec: _Codec, name: str, found: list[tuple[np.dtype[Any], Shape]], base: Array
) -> None:
    for number, ((dtype, shape), (expected, most)) in enumerate(
        zip(found, codec.forms(base.shape, base.size), strict=True)
    ):
        called = codec.names(name)[number]
        fits = shape == most
        if codec.fewer:
            fits = len(shape) == 1 and shape == found[0][1] and shape[0] <= most[0]
        if dtype != np.dtype(expected) or not fits:
            bound = "at most " if codec.fewer else ""
            raise ValueError(
                f"tensor '{called}' is {dtype} {shape}, expected {bound}{expected} {most}"
            )


# --- narrower floats ---------------------------------------------------------------------------


def _to_bf16(tensor: Array, _: float) -> tuple[Array, ...]:
    bits = _clipped(tensor, _BF16_MAX).astype(np.float32).view(np.uint32)
    odd = (bits >> 16) & 1  # half a step is added, less one bit where that makes a tie even
    return (((bits + (0x7FFF + odd)) >> 16).astype(np.uint16),)


def _from_bf16(name: str, tensors: tuple[Array, ...], like: Array) -> Array:
    (halves,) = tensors
    _expect(name, halves, np.uint16, like.shape)
    whole: Array = (halves.astype(np.uint32) << 16).view(np.float32)
    return whole.astype(like.dtype, copy=False)


def _to_f16(tensor: Array, _: float) -> tuple[Array, ...]:
    return (_clipped(tensor, _F16_MAX).astype(np.float16),)


def _from_f16(name: str, tensors: tuple[Array, ...], like: Array) -> Array:
    (halves,) = tensors
    _expect(name, halves, np.float16, like.shape)
    return halves.astype(like.dtype)


# --- 8-bit integers, a scale for each block ----------------------------------------------------


def _to_int8(tensor: Array, _: float) -> tuple[Array, ...]:
    padded = np.zeros(_blocks(tensor.size) * BLOCK, np.float32)
    padded[: tensor.size] = _clipped(tensor.reshape(-1), _F32_MAX)
    blocks = padded.reshape(-1, BLOCK)
    scale = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) / np.float32(_INT8_MAX)
    # A block of zeros has scale 0; and a scale too small to be exact must not lead beyond 127.
    blocks /= np.where(scale > 0, scale, np.float32(1))[:, None]
    whole = np.clip(np.rint(blocks, out=blocks), -_INT8_MAX, _INT8_MAX, out=blocks)
    return whole.astype(np.int8).reshape(-1)[: tensor.size].reshape(tensor.shape), scale


def _from_int8(name: str, tensors: tuple[Array, ...], like: Array) -> Array:
    q, scale = tensors
    _expect(f"{name}#q", q, np.int8, like.shape)
    _expect(f"{name}#scale", scale, np.float32, (_blocks(like.size),))
    bad = int(scale.size - np.isfinite(scale).sum())
    if bad:
        raise NotFinite(f"tensor '{name}#scale' has {bad} values that are NaN or infinite")
    if scale.size and scale.min() < 0:
        raise ValueError(f"tensor '{name}#scale' has negative values")
    decoded = np.empty(like.shape, like.dtype)
    flat, into = q.reshape(-1), decoded.reshape(-1)
    whole = like.size - like.size % BLOCK
    np.multiply(
        flat[:whole].reshape(-1, BLOCK),
        scale[: whole // BLOCK, None],
        out=into[:whole].reshape(-1, BLOCK),
        casting="same_kind",
    )
    if whole < like.size:
        np.multiply(flat[whole:], scale[-1], out=into[whole:], casting="same_kind")
    return decoded


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


# --- only the largest --------------------------------------------------------------------------


def _to_topk(tensor: Array, fraction: float) -> tuple[Array, ...]:
    flat = tensor.reshape(-1)
    count = math.ceil(fraction * flat.size)
    index = np.sort(np.argpartition(np.abs(flat), flat.size - count)[flat.size - count :])
    value = _clipped(flat[index], _F32_MAX).astype(np.float32)
    return index.astype(np.int32), value


def _from_topk(name: str, tensors: tuple[Array, ...], like: Array) -> Array:
    index, value = tensors
    count = min(index.size, like.size)  # so that too many are a wrong shape
    _expect(f"{name}#index", index, np.int32, (count,))
    _expect(f"{name}#value", value, np.float32, (count,))
    if count and not (index[0] >= 0 and index[-1] < like.size and (index[1:] > index[:-1]).all()):
        raise ValueError(f"tensor '{name}#index' does not increase from 0 to {like.size - 1}")
    decoded = np.zeros(like.shape, like.dtype)
    decoded.reshape(-1)[index] = value
    return decoded


def _clipped(tensor: Array, end: float) -> Array:
    """Bring what a narrower float cannot hold to the largest that it can."""
    if largest(tensor.dtype) <= end:
        return tensor
    return np.clip(tensor, -end, end)


def _expect(name: str, tensor: Array, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"tensor '{name}' is {tensor.dtype}, expected {np.dtype(dtype)}")
    if tensor.shape != shape:
        raise ValueError(f"tensor '{name}' has shape {tensor.shape}, expected {shape}")


_WIDE = ("float32", "float64")
_CODECS: Mapping[Encoding, _Codec] = {
    "bf16": _Codec(
        ("",),
        _to_bf16,
        _from_bf16,
        lambda shape, _: (("uint16", shape),),
        _WIDE,
        feeds_back=False,
    ),
    "f16": _Codec(
        ("",),
        _to_f16,
        _from_f16,
        lambda shape, _: (("float16", shape),),
        _WIDE,
        feeds_back=False,
    ),
    "int8": _Codec(
        ("#q", "#scale"),
        _to_int8,
        _from_int8,
        lambda shape, size: (("int8", shape), ("float32", (_blocks(size),))),
    ),
    "topk": _Codec(
        ("#index", "#value"),
        _to_topk,
        _from_topk,
        lambda _, size: (("int32", (size,)), ("float32", (size,))),
        fewer=True,
    ),
}
