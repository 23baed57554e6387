"""Drawn letters are reproducible, inside the frame, and differ between writers."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluffle_common.errors import UsageError
from fluffle_worker.letters.handwriting import drawing
from fluffle_worker.letters.handwriting.drawing import (
    PENS_PX,
    draw_letter,
    draw_letters,
    writer_style,
)
from fluffle_worker.letters.handwriting.strokes import ALLOGRAPHS, LETTERS, parse_strokes


def _tree(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def _style_of(number: int) -> drawing.Style:
    return writer_style(np.random.default_rng(number), favourite_pen=number % len(PENS_PX))


def test_equal_seeds_draw_equal_bytes_and_others_do_not(tmp_path):
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        draw_letters(tmp_path / name, clients=2, per_client=20, seed=seed)
    first, again, other = (_tree(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert not set(first.values()) & set(other.values())


def test_a_writer_does_not_depend_on_how_many_there_are(tmp_path):
    draw_letters(tmp_path / "one", clients=1, per_client=15)
    draw_letters(tmp_path / "two", clients=2, per_client=15)
    assert _tree(tmp_path / "one/client-1") == _tree(tmp_path / "two/client-1")


def test_every_file_is_a_grey_image_where_the_task_looks_for_it(tmp_path):
    seen = []
    draw_letters(tmp_path, clients=2, per_client=40, progress=lambda: seen.append(1))
    assert len(seen) == 80
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["client-1", "client-2"]
    counts = []
    for client in sorted(tmp_path.iterdir()):
        assert sorted(folder.name for folder in client.iterdir()) == list(LETTERS)
        counts.append([len(list((client / letter).glob("[0-9]*.png"))) for letter in LETTERS])
        for path in client.rglob("*.png"):
            with Image.open(path) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "L", (100, 100))
    assert [sum(row) for row in counts] == [40, 40]
    assert min(map(min, counts)) >= 1
    assert counts[0] != counts[1]


@pytest.mark.parametrize("letter", LETTERS)
def test_ink_is_there_and_inside_the_frame(letter):
    for number in range(12):
        image = draw_letter(letter, _style_of(number), np.random.default_rng(number))
        assert image.shape == (100, 100)
        assert image.dtype == np.uint8
        assert 0.01 < (image > 127).mean() < 0.35
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert not border.any(), f"writer {number} was cut off"


@pytest.mark.parametrize("letter", LETTERS)
def test_one_person_never_draws_a_letter_twice_alike(letter):
    rng = np.random.default_rng(3)
    style = _style_of(1)
    images = {draw_letter(letter, style, rng).tobytes() for _ in range(10)}
    assert len(images) == 10


def test_writers_differ_in_what_they_prefer():
    styles = [_style_of(number) for number in range(3)]
    assert len({int(np.argmax(style.pens)) for style in styles}) == 3
    for letter in LETTERS:
        for style in styles:
            assert sum(style.allographs[letter]) == pytest.approx(1.0)
        assert len({style.allographs[letter] for style in styles}) == 3


def test_a_broad_pen_leaves_more_ink():
    ink = []
    for favourite in range(len(PENS_PX)):
        style = writer_style(np.random.default_rng(5), favourite_pen=favourite)
        rng = np.random.default_rng(6)
        ink.append(np.mean([draw_letter(letter, style, rng).mean() for letter in LETTERS * 3]))
    assert ink == sorted(ink)


def test_every_letter_has_allographs_that_differ():
    for shapes in ALLOGRAPHS.values():
        assert len(shapes) >= 5
        assert len({shape.name for shape in shapes}) == len(shapes)
        assert len({shape.strokes for shape in shapes}) == len(shapes)


def test_a_stroke_turns_at_line_knots_and_at_the_end_of_curves():
    (stroke,) = parse_strokes("M0,0 L0,9 R3,9 6,6 9,0")
    assert stroke.knots == ((0, 0), (0, 9), (3, 9), (6, 6), (9, 0))
    assert stroke.corners == (0, 1, 4)


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="choose a new folder"):
        draw_letters(tmp_path)
    assert _tree(tmp_path) == {"mine.txt": b"keep"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    path = tmp_path / "letters"
    path.write_text("keep")
    with pytest.raises(UsageError, match="not an empty folder"):
        draw_letters(path)


def test_a_run_cut_short_leaves_nothing_half_done(tmp_path):
    drawn = itertools.count(1)

    def stop() -> None:
        if next(drawn) == 19:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_letters(tmp_path / "new", clients=2, per_client=10, progress=stop)
    assert _tree(tmp_path / "new") == {}
    draw_letters(tmp_path / "new", clients=2, per_client=10)
    assert len(_tree(tmp_path / "new")) == 20
