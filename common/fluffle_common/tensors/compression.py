"""Compression of deltas by a codec, with error feedback, and checked decompression.

A codec replaces a large float tensor with one or two others in the tensor table, its parts.
Integers, small tensors, and tensors with NaN or infinity travel unchanged; the coordinator rejects
the latter. ``int8`` and ``topk`` have large encoding errors, which are added to the next delta:
error feedback (Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et
al., "Error Feedback Fixes SignSGD", ICML 2019, section 3).

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

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np

from fluffle_common.tensors.codecs.base import (
    MAX_SUFFIX,
    Codec,
    CodecError,
    Part,
    Shape,
    codec_error,
    parts_of,
)
from fluffle_common.tensors.codecs.registry import CODECS, OWN_NAMES
from fluffle_common.tensors.layout import Forms, Place
from fluffle_common.tensors.table import MAX_TENSOR_NAME
from fluffle_common.tensors.weights import (
    Array,
    NotFinite,
    Weights,
    check_delta_form,
    delta_dtype,
    is_float,
    read_only,
)
from fluffle_common.user_errors import place_of

SMALLEST = 1024
"""Tensors with fewer values are not encoded."""
_LARGEST = 2**31 - 1  # values, so that indices fit into an int32
_MAX_NAME = MAX_TENSOR_NAME - MAX_SUFFIX
_Form = TypeVar("_Form", Array, Array | Place)


def compress(
    delta: Weights,
    codec: str | Codec,
    residual: Weights,
    rng: np.random.Generator | None = None,
    warn: Callable[[str], object] = lambda _: None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Encode a delta.

    ``delta`` comes from ``weights.delta``. ``residual`` is the second result of the previous call;
    it is empty if there is none. ``warn`` is called with a sentence if a codec of the user's own
    makes zeros of the whole delta.

    Returns:
        The tensors to send, and the residual ``delta + residual - sent`` for the next call. The
        residual is float32 or wider, so that small values can add up.

    Raises:
        CodecError: if the codec's own code fails, or returns something other than its parts.
    """
    if isinstance(codec, str):
        codec = CODECS.parse(codec)
    rng = rng or np.random.default_rng(0)
    tensors: dict[str, Array] = {}
    new_residual: dict[str, Array] = {}
    own, lost = codec.name in OWN_NAMES, list[bool]()  # of each encoded tensor that is not zero
    for name, tensor in delta.items():
        wanted = tensor
        if codec.feeds_back and is_float(tensor.dtype) and tensor.dtype.itemsize < 4:
            wanted = tensor.astype(np.float32)
        if name in residual:
            wanted = wanted + residual[name]
        if not _is_encodable(name, wanted, codec, delta):
            tensors[name] = wanted.astype(tensor.dtype, copy=False)
            continue
        parts = parts_of(type(codec), wanted.shape)
        encoded = _encode(codec, name, wanted, parts, rng)
        tensors.update(zip(_names(name, parts), encoded, strict=True))
        if own and not codec.feeds_back:
            continue
        decoded = _decode(type(codec), name, encoded, tensor)
        if codec.feeds_back:
            new_residual[name] = wanted - decoded
        if not own:
            _check_decoded(codec, name, decoded)
            lost += [not decoded.any()] if wanted.any() else []
    if lost and all(lost):
        warn(
            f"the codec '{codec.name}' decodes all tensors of this update as zeros, although their "
            "values are not zero; check its encode() and decode()"
        )
    return tensors, new_residual


def _check_decoded(codec: Codec, name: str, decoded: Array) -> None:
    if not np.isfinite(decoded).all():
        raise CodecError(
            f"the codec '{codec.name}' does not preserve tensor '{name[:60]}': its values are "
            "finite before encoding, but NaN or infinite after decoding"
        )


def _is_encodable(name: str, tensor: Array, codec: Codec, delta: Weights) -> bool:
    if (
        delta[name].dtype.name not in codec.dtypes
        or not is_float(tensor.dtype)
        or not SMALLEST <= tensor.size <= _LARGEST
        or len(name) > _MAX_NAME
    ):
        return False
    # A tensor of the model itself may have the name of a part.
    names = _names(name, parts_of(type(codec), tensor.shape))
    if any(other != name and other in delta for other in names):
        return False
    return bool(np.isfinite(tensor).all())


def _encode(
    codec: Codec, name: str, tensor: Array, parts: tuple[Part, ...], rng: np.random.Generator
) -> tuple[Array, ...]:
    try:
        result = codec.encode(read_only(tensor), rng)
    except (Exception, SystemExit) as error:
        raise codec_error(type(codec), "encode", name, error) from error
    if not isinstance(result, tuple) or len(result) != len(parts):
        kind = type(result).__name__
        length = f" of length {len(result)}" if isinstance(result, tuple | list) else ""
        raise CodecError(
            f"encode() of the codec '{codec.name}' returned a {kind}{length} for tensor "
            f"'{name[:60]}'; expected a tuple of length {len(parts)}, with one array for each part"
        )
    encoded = tuple(np.asarray(part) for part in result)
    try:
        _check_parts(name, parts, encoded)
    except ValueError as error:
        raise CodecError(
            f"encode() of the codec '{codec.name}' returned wrong parts: {error}"
        ) from None
    return encoded


def decompress(tensors: Weights, encoding: str | None, like: Weights) -> Weights:
    """Decode an untrusted delta, checking dtypes and shapes before anything is decoded.

    Tensors that are not encoded, or do not belong to the model, are returned unchanged;
    ``check_delta`` has to check the result. ``like`` are the model's weights.

    Raises:
        NotFinite: if a scale is NaN or infinite.
        CodecError: if the codec's own code fails.
        ValueError: if an encoded tensor has the wrong dtype, shape or values, or the codec is
            unknown.
    """
    if encoding is None:
        return tensors
    with np.errstate(over="ignore", invalid="ignore"):  # check_delta finds infinities
        return _replace_parts(tensors, CODECS.get(encoding), like, _decode)


def check_announced_signature(announced: Forms, encoding: str | None, like: Weights) -> None:
    """Check that tensors of these dtypes and shapes can be a delta for ``like``, as encoded.

    This allows a transfer to be rejected before it is fetched. ``decompress`` and ``check_delta``
    check the tensors themselves.

    Raises:
        ValueError: naming the tensors that are missing, unknown or different.
    """
    if encoding is not None:
        announced = _replace_parts(announced, CODECS.get(encoding), like, lambda *_, like: like)
    check_delta_form(announced, like)


def _replace_parts(
    sent: Mapping[str, _Form], codec: type[Codec], like: Weights, decode: Callable[..., _Form]
) -> dict[str, _Form]:
    """Replace the parts of each encoded tensor by the result of ``decode``."""
    rest, delta = dict(sent), {}
    for name, base in like.items():
        if name in rest and rest[name].dtype == delta_dtype(base.dtype):
            delta[name] = rest.pop(name)
            continue
        if not is_float(base.dtype):
            continue
        parts = parts_of(codec, base.shape)
        names = _names(name, parts)
        if all(part in rest for part in names):
            encoded = tuple(rest.pop(part) for part in names)
            _check_parts(name, parts, encoded)
            delta[name] = decode(codec, name, encoded, like=base)
    return delta | rest


def _decode(codec: type[Codec], name: str, encoded: tuple[Array, ...], like: Array) -> Array:
    blank = read_only(np.zeros(like.shape, like.dtype))  # both sides must decode to the same
    try:
        result = codec.decode(encoded, blank)
    except NotFinite as error:
        raise NotFinite(f"tensor '{name}', encoded as {codec.name}: {error}") from None
    except ValueError as error:
        reason = f"tensor '{name}', encoded as {codec.name}: {error}"[:400]
        where = place_of(error)
        raise ValueError(f"{reason} ({where})" if where else reason) from error
    except (Exception, SystemExit) as error:
        raise codec_error(codec, "decode", name, error) from error
    if not isinstance(result, np.ndarray) or (result.dtype, result.shape) != (
        like.dtype,
        like.shape,
    ):
        shape, dtype = getattr(result, "shape", ""), getattr(result, "dtype", type(result).__name__)
        raise CodecError(
            f"decode() of the codec '{codec.name}' returned {dtype} {shape} for tensor "
            f"'{name[:60]}'; expected {like.dtype} {like.shape}"
        )
    return result


def _check_parts(name: str, parts: tuple[Part, ...], encoded: Iterable[Array | Place]) -> None:
    """Check the dtypes and shapes of the encoded parts of the tensor ``name``."""
    length: Shape | None = None  # of the parts that may be shorter
    for part, tensor in zip(parts, encoded, strict=True):
        shape, expected, bound = tensor.shape, part.shape, ""
        if not part.at_most:
            fits = shape == expected
        elif length is None:
            bound, length = " or shorter", shape
            fits = len(shape) == 1 and shape[0] <= part.shape[0]
        else:
            expected = length
            fits = shape == expected
        if tensor.dtype != np.dtype(part.dtype) or not fits:
            raise ValueError(
                f"tensor '{name}{part.suffix}' is {tensor.dtype} {shape}; "
                f"expected {part.dtype} {expected}{bound}"
            )


def _names(name: str, parts: tuple[Part, ...]) -> tuple[str, ...]:
    return tuple(name + part.suffix for part in parts)
