"""Codecs: the wire format of built-in ones, and the handling of users' ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import numpy as np
import pytest

from fluffle_common.cli.loading import load_codec, load_object
from fluffle_common.errors import TaskError, UsageError
from fluffle_common.protocol.messages import Compression
from fluffle_common.tensors.codecs import registry
from fluffle_common.tensors.codecs.base import CodecError, Part, UnknownCodec
from fluffle_common.tensors.codecs.registry import CODECS, Registry, check_codec
from fluffle_common.tensors.compression import check_announced_signature, compress, decompress
from fluffle_common.tensors.layout import Place
from fluffle_coordinator.cli.plan_options import COMPRESS

DELTA = {"w": (np.arange(3000) * 7919 % 3001 - 1500.25).astype(np.float32).reshape(30, 100) / 7}


@dataclass(frozen=True)
class Signs:
    """A codec that sends the sign of each value and the mean magnitude."""

    name: ClassVar[str] = "signs"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float64")
    feeds_back: ClassVar[bool] = True

    @classmethod
    def parse(cls, text: str) -> Signs:
        return cls()

    def encode(self, tensor: Any, rng: Any) -> tuple[Any, ...]:
        return np.sign(tensor).astype(np.int8), np.abs(tensor).mean(dtype=np.float32)

    @staticmethod
    def parts(shape: Any) -> tuple[Part, ...]:
        return Part("#sign", "int8", shape), Part("#size", "float32", ())

    @staticmethod
    def decode(parts: Any, like: Any) -> Any:
        sign, size = parts
        return (sign * size).astype(like.dtype)


@pytest.fixture
def codecs(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Remove codecs that a test adds to the registry of the process."""
    monkeypatch.setattr(CODECS, "_codecs", dict(CODECS._codecs))
    return CODECS


# Other implementations rely on this format, which docs/protocol.md describes.
@pytest.mark.parametrize(
    ("how", "digest"),
    [
        ("bf16", "272ef45345712db0"),
        ("f16", "a9abe9b3fbbb4dfb"),
        ("int8", "f0e96cadf0a95c0d"),
        ("topk:0.01", "ce3e4c307bf8dfad"),
    ],
)
def test_the_wire_format_of_built_in_codecs_is_unchanged(how, digest):
    encoded, _ = compress(DELTA, how, {})
    found = hashlib.sha256()
    for name, tensor in encoded.items():
        found.update(f"{name} {tensor.dtype.name} {tensor.shape} ".encode() + tensor.tobytes())
    assert found.hexdigest()[:16] == digest


def test_a_users_codec_encodes_and_decodes(codecs):
    codecs.add(Signs, "here")
    encoded, left = compress(DELTA, "signs", {})
    assert {name: (t.dtype.name, t.shape) for name, t in encoded.items()} == {
        "w#sign": ("int8", (30, 100)), "w#size": ("float32", ()),
    }  # fmt: skip
    got = decompress(encoded, "signs", DELTA)
    np.testing.assert_allclose(got["w"] + left["w"], DELTA["w"], atol=1e-4)
    check_announced_signature(encoded, "signs", DELTA)
    too_long = {**encoded, "w#size": Place(np.dtype(np.float32), (10**9,), 0, 10**9)}
    with pytest.raises(ValueError, match="'w#size' is float32"):
        check_announced_signature(too_long, "signs", DELTA)


def test_random_numbers_are_seeded_by_the_plan(codecs):
    class Dithered(Signs):
        name = "dithered"

        def encode(self, tensor, rng):
            return super().encode(tensor + rng.normal(size=tensor.shape), rng)

    codecs.add(Dithered, "here")
    one, two, other = (
        compress(DELTA, "dithered", {}, np.random.default_rng(seed))[0]["w#sign"]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


# --- invalid codecs ------------------------------------------------------------------------------


def changed(**changes: Any) -> type:
    return type("Changed", (Signs,), changes)


@pytest.mark.parametrize(
    ("codec", "reason"),
    [
        (Signs(), "is a Signs, but a codec must be a class"),
        (changed(name="No Name"), "use a name of 1 to 32 characters from a-z"),
        (changed(name=None), "the name None"),
        (changed(name="topk"), "a built-in codec, 'topk'"),
        (changed(encode=None), "no method 'encode'"),
        (changed(decode=lambda self, parts, like: like), "no static method 'decode'"),
        (changed(dtypes="float32"), "must set 'dtypes'"),
        (changed(feeds_back=1), "'feeds_back' to True or False"),
        (changed(parts=staticmethod(lambda shape: 1 / 0)), "fails: ZeroDivisionError"),
        (changed(parts=staticmethod(lambda shape: ())), "expected a tuple of one or two Part"),
        (changed(parts=staticmethod(lambda shape: [Part("", "int8", shape)])), "a tuple of one"),
        (changed(parts=staticmethod(lambda shape: (Part("q", "int8", shape),))), "suffix 'q'"),
        (changed(parts=staticmethod(lambda shape: (Part("", "int4", shape),))), "dtype 'int4'"),
        (changed(parts=staticmethod(lambda s: (Part("", "int8", s),) * 2)), "the same suffix"),
        (
            changed(parts=staticmethod(lambda shape: (Part("", "float32", shape),))),
            "looks like a tensor that is not encoded",
        ),
    ],
)
def test_an_invalid_codec_is_refused_with_a_remedy(codec, reason):
    with pytest.raises(UsageError) as wrong:
        Registry().add(codec, "codec.py:C (--codec)")
    assert reason in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_built_in_codecs_are_valid():
    for name in ("bf16", "f16", "int8", "topk"):
        assert check_codec(CODECS.get(name), name).name == name


# --- failing codecs ------------------------------------------------------------------------------


def fails(*_: Any) -> Any:
    raise RuntimeError("as it\nwas written")


def leaves(*_: Any) -> Any:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("encode", "reason"),
    [
        (fails, "'signs' fails to encode tensor 'w': RuntimeError: as it was written (test_codecs"),
        (leaves, "'signs' fails to encode tensor 'w': SystemExit: 3 (test_codecs"),
        (lambda *_: None, "returned a NoneType for tensor 'w'; expected a tuple of length 2"),
        (lambda *_: (np.zeros(3),), "returned a tuple of length 1 for"),
        (
            lambda self, tensor, rng: tensor.sort(),
            "fails to encode tensor 'w': ValueError: sort array is read-only (test_codecs",
        ),
        (
            lambda self, tensor, rng: (tensor, np.float32(1)),
            "tensor 'w#sign' is float32 (30, 100); expected int8 (30, 100)",
        ),
        (
            lambda self, tensor, rng: (np.zeros(3, np.int8), np.float32(1)),
            "'w#sign' is int8 (3,); expected int8 (30, 100)",
        ),
    ],
)
def test_a_failing_encode_is_reported_in_one_line(codecs, encode, reason):
    codecs.add(changed(encode=encode), "here")
    with pytest.raises(CodecError) as wrong:
        compress(DELTA, "signs", {})
    assert reason in str(wrong.value)
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    ("decode", "reason"),
    [
        (fails, "'signs' fails to decode tensor 'w': RuntimeError: as it was written (test_codecs"),
        (leaves, "'signs' fails to decode tensor 'w': SystemExit: 3 (test_codecs"),
        (lambda parts, like: parts[0], "returned int8 (30, 100) for tensor 'w'; expected float32"),
        (lambda parts, like: None, "returned NoneType  for tensor 'w'"),
    ],
)
def test_a_failing_decode_rejects_the_update(codecs, decode, reason):
    encoded, _ = compress(DELTA, Signs(), {})
    codecs.add(changed(decode=staticmethod(decode)), "here")
    with pytest.raises(ValueError, match="signs") as wrong:
        decompress(encoded, "signs", DELTA)
    assert reason in str(wrong.value)


def test_parts_are_checked_for_each_shape(codecs):
    def parts(shape: Any) -> Any:
        return Signs.parts(shape) if shape == (4, 300) else None

    codecs.add(changed(parts=staticmethod(parts)), "here")
    with pytest.raises(CodecError, match="'signs' returned None; expected a tuple of one"):
        compress(DELTA, "signs", {})


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("dtypes", [("float16",), ("float32",)])
def test_exactly_the_dtypes_of_a_codec_are_encoded(codecs, dtypes, dtype):
    codec = codecs.add(changed(name="some", dtypes=dtypes), "here")
    delta = {"w": DELTA["w"].astype(dtype)}
    sent, residual = compress(delta, codec(), {})
    assert ("w#sign" in sent) == (dtype in dtypes)
    decoded = decompress(sent, "some", delta)["w"]
    assert decoded + residual.get("w", 0) == pytest.approx(delta["w"], rel=1e-5, abs=1e-3)


def test_a_residual_that_is_not_finite_is_an_error(codecs):
    def infinite(parts: Any, like: Any) -> Any:
        return np.full(like.shape, np.inf, like.dtype)

    codecs.add(changed(decode=staticmethod(infinite)), "here")
    with pytest.raises(
        CodecError, match="'signs' does not preserve tensor 'w': its values are finite"
    ):
        compress(DELTA, "signs", {})


@pytest.mark.parametrize("feeds_back", [True, False])
@pytest.mark.parametrize(
    "methods",
    [
        {"decode": staticmethod(lambda parts, like: like.copy())},
        {"encode": lambda self, x, rng: (np.zeros(x.shape, np.int8), np.zeros((), np.float32))},
    ],
    ids=["decode", "encode"],
)
def test_a_codec_that_makes_zeros_of_a_whole_delta_is_reported(codecs, methods, feeds_back):
    faults: list[str] = []
    codec = codecs.add(changed(feeds_back=feeds_back, **methods), "here")()
    compress({"w": np.zeros((30, 100), np.float32)}, codec, {}, warn=faults.append)
    assert not faults
    compress({**DELTA, "v": DELTA["w"]}, codec, {}, warn=faults.append)
    (fault,) = faults
    assert fault.startswith("the codec 'signs' decodes all tensors of this update as zeros")


def test_a_codec_may_make_zeros_of_one_tensor(codecs):
    def decode(parts: Any, like: Any) -> Any:
        return Signs.decode(parts, like) if parts[1] > 1e-6 else like.copy()

    codecs.add(changed(decode=staticmethod(decode)), "here")
    faults: list[str] = []
    compress({**DELTA, "v": DELTA["w"] / 2**40}, "signs", {}, warn=faults.append)
    assert not faults


def test_decoding_sees_neither_the_delta_nor_the_model(codecs):
    codecs.add(changed(decode=staticmethod(lambda parts, like: like.copy())), "here")
    sent, residual = compress(DELTA, "signs", {})
    assert np.array_equal(residual["w"], DELTA["w"])
    assert not decompress(sent, "signs", DELTA)["w"].any()


@pytest.mark.parametrize(
    ("parse", "reason"),
    [
        (lambda text: 1 / 0, "fails: ZeroDivisionError: division by zero (test_codecs.py:"),
        (leaves, "fails: SystemExit: 3 (test_codecs.py:"),
        (lambda text: None, "returned a NoneType; return an object of the class Changed"),
    ],
)
def test_a_failing_parse_is_reported_in_one_line(codecs, parse, reason):
    codecs.add(changed(parse=staticmethod(parse)), "here")
    with pytest.raises(CodecError) as wrong:
        codecs.parse("signs:1")
    assert f"parse('signs:1') of the codec 'signs' {reason}" in str(wrong.value)


def test_a_codec_cannot_change_the_model(codecs):
    def changes(parts: Any, like: Any) -> Any:
        like += 1

    encoded, _ = compress(DELTA, Signs(), {})
    codecs.add(changed(decode=staticmethod(changes)), "here")
    with pytest.raises(ValueError, match="read-only"):
        decompress(encoded, "signs", DELTA)


def test_a_refusal_of_a_codec_names_the_tensor_and_the_line(codecs):
    def refuses(parts: Any, like: Any) -> Any:
        raise ValueError("#size is negative")

    encoded, _ = compress(DELTA, Signs(), {})
    codecs.add(changed(decode=staticmethod(refuses)), "here")
    with pytest.raises(ValueError, match=r"'w', encoded as signs: #size is negative \(test_codecs"):
        decompress(encoded, "signs", DELTA)


# --- origins of codecs ---------------------------------------------------------------------------


def entry_point(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> Registry:
    found = {name: EntryPoint(name, value, registry.GROUP)}
    monkeypatch.setattr(registry, "installed", lambda group: found)
    return Registry()


def test_an_installed_codec_is_found_by_name(monkeypatch):
    assert entry_point(monkeypatch, "signs", f"{__name__}:Signs").parse("signs:1") == Signs()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("signs", "nowhere_to_be_found:Signs", "fails to load: ModuleNotFoundError"),
        (
            "other",
            f"{__name__}:Signs",
            "has the name 'signs', but its entry point has the name 'other'",
        ),
        ("signs", f"{__name__}:fails", "a codec must be a class"),
    ],
)
def test_an_invalid_installed_codec_is_reported(monkeypatch, name, value, reason):
    with pytest.raises(CodecError, match=reason):
        entry_point(monkeypatch, name, value).get(name)


def test_no_message_makes_a_process_import_a_file(tmp_path):
    for name in (f"{tmp_path}/codec.py", "codec"):
        with pytest.raises(UnknownCodec):
            Registry().get(name)
    with pytest.raises(ValueError, match="is not a codec"):
        Compression.parse(f"{tmp_path}/codec.py:Codec")


CODEC = """
from dataclasses import dataclass
import numpy as np
from fluffle_common.tensors.codecs.base import Part

@dataclass(frozen=True)
class Tenths:
    name = "tenths"
    dtypes = ("float32",)
    feeds_back = False
    parse = classmethod(lambda cls, text: cls() if text in ("tenths", "tenths:1") else int(text))
    encode = lambda self, tensor, rng: (np.rint(tensor * 10).astype(np.int16),)
    parts = staticmethod(lambda shape: (Part("", "int16", shape),))
    decode = staticmethod(lambda parts, like: (parts[0] / 10).astype(like.dtype))
"""


@pytest.mark.parametrize("settings", ["", ":1"])
def test_compress_takes_a_codec_from_a_file_and_sends_its_name(codecs, tmp_path, settings):
    (tmp_path / "queue.py").write_text(CODEC)  # does not shadow the standard library's module
    how = COMPRESS.convert(f"{tmp_path}/queue.py:Tenths{settings}", None, None)
    assert str(Compression.parse(how)) == f"tenths{settings}"
    assert decompress(compress(DELTA, how, {})[0], "tenths", DELTA)["w"].shape == (30, 100)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}/none.py:Tenths", "there is no file"),
        ("{}/codec.py:Nothing", "has no 'Nothing'; correct the name in --compress"),
        ("{}/codec.py:np", "is a module, but a codec must be a class"),
        ("{}/codec.py:Tenths:bad", "invalid literal"),
        ("{}/codec.py:Tenths:a b", "is not a codec"),
    ],
)
def test_compress_refuses_an_invalid_codec(codecs, tmp_path, text, reason):
    (tmp_path / "codec.py").write_text(CODEC)
    with pytest.raises(UsageError) as wrong:
        COMPRESS.convert(text.format(tmp_path), None, None)
    assert reason in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_a_failing_file_is_reported_in_one_line_with_the_users_traceback(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("import json\n\njson.loads('{')\n")
    with pytest.raises(TaskError, match=r"JSONDecodeError: .* \(broken\.py:3\)$"):
        load_codec(f"{path}:C", "--codec")
    output = capsys.readouterr().err
    assert "json.loads('{')" in output
    assert "objects.py" not in output
    assert "importlib" not in output


@pytest.mark.parametrize("name", ["codec", "codec:C", ":C", "codec.py", "codec.py:"])
def test_an_object_is_named_by_a_file_and_a_name(name):
    with pytest.raises(UsageError, match=r"--codec expects .*path\.py:name"):
        load_object(name, "--codec")
