"""Reading of image files of every mode, depth and orientation, and of class folders."""

import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluffle_common.errors import TaskError, UsageError
from fluffle_worker.letters.images import class_order, find_classes, read_images
from fluffle_worker.letters.pixels import read_pixels


def _letter(size: int = 100) -> np.ndarray:
    """Return an L, uint8, white on black, a shape without symmetry."""
    grey = np.zeros((size, size), np.uint8)
    edge = size // 10
    grey[2 * edge : 8 * edge, 3 * edge : 4 * edge] = 255
    grey[7 * edge : 8 * edge, 3 * edge : 7 * edge] = 200
    return grey


LETTER = _letter()
WANTED = (LETTER / 255).astype(np.float32)[..., None]


def _assert_letter(path: Path, atol: float = 1 / 255) -> None:
    found = read_pixels(path)
    assert (found.shape, found.dtype) == ((100, 100, 1), np.float32)
    np.testing.assert_allclose(found, WANTED, atol=atol)


def _save(folder: Path, *names: str, letter: np.ndarray = LETTER) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(letter).save(path, "PNG")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_the_orientation_that_a_camera_noted_is_applied(tmp_path, orientation, suffix):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = Image.fromarray(LETTER)
    if orientation > 1:
        image = image.transpose(undo[orientation])
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / f"a{suffix}", exif=exif, quality=100)
    _assert_letter(tmp_path / f"a{suffix}", atol=0.1)


def test_damaged_notes_do_not_spoil_an_image(tmp_path):
    Image.fromarray(LETTER).save(
        tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=99
    )
    _assert_letter(tmp_path / "a.jpg", atol=0.1)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("white", [255, 1023, 4095, 65535])
def test_sixteen_bits_keep_their_contrast(tmp_path, white, suffix):
    deep = np.round(LETTER / 255 * white).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as opened:
        assert opened.mode == "I;16"
    _assert_letter(tmp_path / f"a{suffix}")


def test_a_dim_image_is_as_dim_in_sixteen_bits_as_in_eight(tmp_path):
    dim = (LETTER // 2).astype(np.uint8)
    Image.fromarray(dim).save(tmp_path / "8.png")
    Image.fromarray(dim.astype(np.uint16) * 257).save(tmp_path / "16.png")
    np.testing.assert_allclose(
        read_pixels(tmp_path / "16.png"), read_pixels(tmp_path / "8.png"), atol=1 / 255
    )


@pytest.mark.parametrize(
    "values",
    [
        LETTER.astype(np.int32),
        LETTER.astype(np.int32) * 257,
        LETTER.astype(np.int32) * 2**22,
        LETTER.astype(np.int32) - 1000,
        (LETTER / 255).astype(np.float32),
        LETTER.astype(np.float32),
        (LETTER / 255 * 1.03 - 0.02).astype(np.float32),
        (LETTER / 255 * 4 - 1.5).astype(np.float32),
        (LETTER / 255 * 3).astype(np.float32),
        (LETTER * 1e30).astype(np.float32),
    ],
    ids=[
        "i8",
        "i16",
        "i31",
        "negative",
        "unit",
        "f8",
        "overshoot",
        "standardised",
        "three",
        "huge",
    ],
)
def test_thirty_two_bits_keep_their_contrast(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    _assert_letter(tmp_path / "a.tif", atol=0.03)


def test_pixels_that_are_no_numbers_are_black_and_infinite_ones_white(tmp_path):
    values = (LETTER / 255).astype(np.float32)
    values[0, 0], values[0, 1] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    found = read_pixels(tmp_path / "a.tif")
    assert (found[0, 0, 0], found[0, 1, 0]) == (0, 1)
    np.testing.assert_allclose(found[1:], WANTED[1:], atol=1 / 255)
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(UsageError, match="no pixel has a finite value"):
        read_pixels(tmp_path / "b.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr"])
def test_every_mode_is_read_alike(tmp_path, mode):
    two = np.where(LETTER > 0, 255, 0).astype(np.uint8)
    suffix = ".tif" if mode in {"CMYK", "YCbCr", "PA"} else ".png"
    image = Image.fromarray(two)
    image = image.convert("P" if mode == "PA" else mode)
    if mode == "PA":
        image = image.convert("RGBA").convert("LA").convert("PA")
    image.save(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(read_pixels(tmp_path / f"a{suffix}")[..., 0], two / 255, atol=0.02)


def _transparent(ink: int) -> Image.Image:
    """Return the letter as opaque ink of one grey on a transparent background."""
    return Image.merge("LA", [Image.new("L", (100, 100), ink), Image.fromarray(LETTER)])


@pytest.mark.parametrize("ink", [0, 40, 128, 255])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_ink_on_nothing_can_be_seen_whatever_its_grey(tmp_path, ink, mode):
    _transparent(ink).convert(mode).save(tmp_path / "a.png")
    found = read_pixels(tmp_path / "a.png")[..., 0]
    assert found[0, 0] == 0
    assert found[50, 35] == (ink / 255 if ink > 100 else 1)


def test_a_transparent_palette_colour_is_black(tmp_path):
    image = Image.fromarray(LETTER).convert("P")
    image.save(tmp_path / "a.gif", transparency=image.getpixel((0, 0)))
    _assert_letter(tmp_path / "a.gif")


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_the_first_of_several_frames_is_read(tmp_path, suffix):
    others = [Image.fromarray(LETTER.T.copy()), Image.fromarray(255 - LETTER)]
    path = tmp_path / f"a{suffix}"
    more = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(LETTER).save(path, save_all=True, append_images=others, **more)
    _assert_letter(path)


def test_what_cannot_be_read_is_counted_and_named_and_the_rest_is_used(tmp_path):
    _save(tmp_path, "a/good.png", "a/cut.png", "b/good.png")
    whole = (tmp_path / "a/cut.png").read_bytes()
    (tmp_path / "a/cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "a/empty.png").touch()
    (tmp_path / "a/text.jpg").write_text("no image")
    (tmp_path / "a/gone.png").symlink_to("nowhere.png")
    (tmp_path / "a/loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "a/pipe.png")
    (tmp_path / "b/program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    images = read_images(tmp_path)
    assert [path.name for path in images.paths] == ["good.png", "good.png"]
    assert images.targets.tolist() == [0, 1]
    assert "cannot read 7 of 9 images, so they are left out:" in images.notes
    notes = "\n".join(images.notes)
    for name in ("cut.png", "empty.png", "gone.png", "loop.png", "pipe.png"):
        assert str(tmp_path / "a" / name) in notes
    assert "  and 2 more" in images.notes


def test_every_way_of_cutting_an_image_ends_in_a_reason(tmp_path):
    for suffix in (".png", ".jpg", ".gif", ".tif", ".webp", ".bmp", ".pgm"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(LETTER).save(path)
        whole = path.read_bytes()
        for length in range(0, min(len(whole), 120), 3):
            path.write_bytes(whole[:length])
            with pytest.raises(UsageError, match="cannot be read as an image"):
                read_pixels(path)


@pytest.mark.parametrize("limit", [5_000, 9_000])  # an error of Pillow's, and a mere warning
def test_a_decompression_bomb_is_refused_with_its_size(tmp_path, monkeypatch, limit):
    _save(tmp_path, "a/1.png", "a/2.png")
    Image.fromarray(_letter(150)).save(tmp_path / "a/2.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2 * limit)
    images = read_images(tmp_path)
    assert len(images.paths) == 1
    _, reason = images.notes
    assert "too large" in reason
    assert "22500 pixels" in reason


JUNK = [
    ".ipynb_checkpoints",
    ".git",
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
    "~$a",
]


def test_what_systems_and_tools_leave_behind_is_no_class_and_no_image(tmp_path):
    _save(tmp_path, "a/1.png", "b/2.PNG", *(f"{name}/1.png" for name in JUNK))
    _save(tmp_path, "a/._1.png", "a/.hidden.png", "a/~$1.png", "a/@eaDir/1.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "a/.DS_Store", "a/Thumbs.db"):
        (tmp_path / name).touch()
    images = read_images(tmp_path)
    assert images.classes == ("a", "b")
    assert [path.name for path in images.paths] == ["1.png", "2.PNG"]
    assert images.notes == ()


def test_files_that_are_ignored_are_counted_by_suffix(tmp_path):
    _save(tmp_path, "a/1.png", "stray.png", "a/deeper/2.png")
    for number in range(11):
        (tmp_path / f"a/{number}.HEIC").touch()
    (tmp_path / "a/notes.txt").touch()
    (tmp_path / "a/README").touch()
    images = read_images(tmp_path)
    note, nested = images.notes
    assert nested == "ignored 1 folder inside class folders"
    assert note.startswith("ignored 14 files: .heic 11, ")
    for one in (".txt", "no suffix", ".png outside a class folder"):
        assert f", {one} 1" in note


def test_the_parent_of_data_folders_names_the_likely_folder(tmp_path):
    _save(tmp_path, "client-1/a/1.png", "client-1/b/1.png", "client-2/a/1.png")
    first = tmp_path / "client-1"
    expected = f".png; if {first / 'a'} is a class, set --data to {first} instead"
    with pytest.raises(TaskError, match=re.escape(expected)):
        read_images(tmp_path)


def test_only_files_that_are_ignored_are_the_reason_for_no_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.heic").touch()
    with pytest.raises(TaskError, match=r"has no images.*\.heic 1$"):
        read_images(tmp_path)


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    composed, decomposed = "é", unicodedata.normalize("NFD", "é")
    assert composed != decomposed
    _save(tmp_path, f"{decomposed}/1.png", f"{composed}/2.png", "z/3.png")
    images = read_images(tmp_path)
    assert images.classes == ("z", composed)
    assert images.targets.tolist() == [0, 1, 1]
    assert images.notes == ()
    # Whoever asks for the class may spell it either way.
    for asked in (composed, decomposed):
        assert read_images(tmp_path, ["z", asked]).classes == ("z", composed)


def test_one_spelling_alone_is_the_composed_class(tmp_path):
    _save(tmp_path, f"{unicodedata.normalize('NFD', 'ö')}/1.png")
    images = read_images(tmp_path)
    assert (images.classes, images.notes) == (("ö",), ())


def test_a_class_asked_for_twice_is_refused(tmp_path):
    _save(tmp_path, "é/1.png")
    with pytest.raises(UsageError, match=r"lists the same class more than once \(é\)"):
        read_images(tmp_path, ["é", unicodedata.normalize("NFD", "é")])


def test_classes_that_differ_in_case_are_two(tmp_path):
    _save(tmp_path, "A/1.png", "a/1.png", "b/1.png")
    assert read_images(tmp_path).classes == ("A", "a", "b")


def test_numbers_are_in_order_of_value_and_before_names(tmp_path):
    _save(tmp_path, *(f"{name}/1.png" for name in ("10", "9", "b", "0", "09", "B")))
    assert read_images(tmp_path).classes == ("0", "09", "9", "10", "B", "b")
    assert sorted(["²", "1", "1" * 5000, "²"], key=class_order)[0] == "1"


def test_links_that_go_round_in_circles_are_no_trouble(tmp_path):
    _save(tmp_path, "a/1.png")
    (tmp_path / "a/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "loop").symlink_to("loop")
    images = read_images(tmp_path)
    assert (images.classes, len(images.paths)) == (("a",), 1)


def test_a_folder_without_images_is_no_class_and_is_said(tmp_path):
    _save(tmp_path, "a/1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "A").mkdir()
    images = read_images(tmp_path)
    assert images.classes == ("a",)
    assert images.notes == ("folders without images: A, b",)
    assert read_images(tmp_path, ["a", "b"]).classes == ("a", "b")


def test_a_folder_that_cannot_be_read_ends_in_one_line(tmp_path, monkeypatch):
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(TaskError, match="not valid UTF-8; rename the folder"):
        read_images(tmp_path)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(TaskError, match=r"cannot be read \(Permission denied\)"):
        find_classes(tmp_path)


def test_black_on_white_is_noticed_once_and_left_as_it_is(tmp_path):
    _save(tmp_path, "a/1.png", "a/2.png", letter=255 - LETTER)
    _save(tmp_path, "a/3.png")
    images = read_images(tmp_path)
    assert [note for note in images.notes if "invert" in note] == [
        "2 of 3 images have a bright border, like black letters on white; expected white letters "
        "on black, so invert these images"
    ]
    np.testing.assert_allclose(images.inputs[0], 1 - WANTED, atol=1e-6)
    _save(tmp_path, "a/4.png")
    assert read_images(tmp_path).notes == ()


@pytest.mark.parametrize(
    ("source", "remedy"),
    [("--classes", "elsewhere, or add their names"), ("the model", "elsewhere$")],
)
def test_an_unexpected_class_is_named_with_a_remedy_that_is_possible(tmp_path, source, remedy):
    _save(tmp_path, "a/1.png", "c/1.png")
    with pytest.raises(TaskError, match=rf"the classes c, but {source} has only a, b; .* {remedy}"):
        read_images(tmp_path, ("a", "b"), source)
