"""Reads folders ``<class>/<image>`` as arrays of 100 by 100 grey pixels, white on black."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluffle_common.errors import TaskError, UsageError
from fluffle_common.plural import listed, plural
from fluffle_common.tensors.weights import Array
from fluffle_worker.letters.pixels import read_pixels

_HELD_OUT = 0.1
_BRIGHT = 0.5
_NAMED = 5  # names and unreadable images that are listed before the rest is only counted
# Suffixes of image files, in lower case; matching ignores case.
_SUFFIXES = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
_JUNK = frozenset("#recycle $recycle.bin @eadir desktop.ini ehthumbs.db thumbs.db".split())
_JUNK |= {"icon\r", "lost+found", "system volume information"}


@dataclass(frozen=True)
class Images:
    """A folder of images."""

    inputs: Array  # float32, shape [n, 100, 100, 1], 0 (black) to 1 (white)
    targets: Array  # int32, shape [n], indices into ``classes``
    classes: tuple[str, ...]
    paths: tuple[Path, ...]  # of each image
    notes: tuple[str, ...] = ()  # lines to show to the user


def read_images(
    folder: Path, classes: Sequence[str] | None = None, source: str = "--classes"
) -> Images:
    """Read a folder ``<class>/<image>``, ordered by class, then by file name.

    ``classes``, which ``source`` gives, are in the order of the model's outputs; by default, they
    are those of the folder, whole numbers by value, then the others by code point.

    Raises:
        TaskError: if the folder does not exist, has no readable image, or has another class.
        UsageError: if ``classes`` lists a class twice.
    """
    files, notes = find_classes(folder)
    if not files:
        missing = f"{folder} has no images; put images into {folder}/<class>/<image>.png"
        raise TaskError("; ".join([missing, *notes]))
    names = tuple(map(class_name, files if classes is None else classes))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(
            f"--classes lists the same class more than once ({listed(twice, _NAMED)}); list each "
            "class once"
        )
    unexpected = [name for name in files if name not in names]
    if unexpected:
        or_add = ", or add their names to --classes" if source == "--classes" else ""
        raise TaskError(
            f"{folder} has images of the classes {', '.join(unexpected)}, but {source} has only "
            f"{', '.join(names)}; move the other folders elsewhere{or_add}"
        )
    pictures, targets, paths, skipped = [], [], [], []
    for index, name in enumerate(names):
        for path in files.get(name, ()):
            try:
                pictures.append(read_pixels(path))
            except UsageError as why:
                skipped.append(str(why))
                continue
            targets.append(index)
            paths.append(path)
    if not pictures:
        raise TaskError(
            f"none of the images in {folder} can be read; the first error: {skipped[0]}"
        )
    if skipped:
        total = len(skipped) + len(pictures)
        notes.append(f"cannot read {len(skipped)} of {total} images, so they are left out:")
        notes += [f"  {reason}" for reason in skipped[:_NAMED]]
        if len(skipped) > _NAMED:
            notes.append(f"  and {len(skipped) - _NAMED} more")
    notes += inverted_note(pictures)
    inputs, indices = np.stack(pictures), np.asarray(targets, np.int32)
    return Images(inputs, indices, names, tuple(paths), tuple(notes))


def inverted_note(pictures: Sequence[Array]) -> Iterable[str]:
    """Yield a warning if most pictures look like black ink on white paper."""
    bright = sum(map(_has_bright_border, pictures))
    if bright > len(pictures) / 2:
        yield (
            f"{bright} of {len(pictures)} images have a bright border, like black letters on "
            "white; expected white letters on black, so invert these images"
        )


def _has_bright_border(pixels: Array) -> bool:
    border = [pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]]
    return bool(np.concatenate(border).mean() > _BRIGHT)


def held_out_split(images: Images, seed: int) -> tuple[Array, Array]:
    """Return the indices of the training and of the held-out images of a worker with this seed."""
    count = len(images.targets)
    order = np.random.default_rng(seed).permutation(count)
    held_out = min(max(1, round(_HELD_OUT * count)), count - 1)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def find_classes(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """List the image files of each class of a folder, and lines to show to the user.

    Classes without images are left out; the others are sorted by ``class_order``. Names are
    normalised to Unicode's composed form (NFC), so that a folder from macOS and one from Linux are
    the same class. Files and folders that are junk (``is_junk``) are skipped.

    Raises:
        TaskError: if there is no such folder, it cannot be read, or a class has an unusable name.
    """
    if not folder.is_dir():
        raise TaskError(
            f"there is no folder {folder}; set --data to a folder that contains <class>/<image>"
        )
    spellings: dict[str, list[Path]] = defaultdict(list)
    ignored: Counter[str] = Counter()
    nested: list[Path] = []
    for path in _entries(folder):
        if path.is_dir():
            spellings[class_name(path.name)].append(path)
        else:
            ignored[f"{_kind(path)} outside a class folder"] += 1
    images = {}
    for name in sorted(spellings, key=class_order):
        entries = [file for path in spellings[name] for file in _entries(path)]
        nested += [file for file in entries if file.is_dir()]
        files = [file for file in entries if not file.is_dir()]
        images[name] = [file for file in files if file.suffix.lower() in _SUFFIXES]
        ignored.update(_kind(file) for file in files if file.suffix.lower() not in _SUFFIXES)
    classes = {name: files for name, files in images.items() if files}
    notes = []
    if ignored:
        kinds = listed([f"{kind} {count}" for kind, count in ignored.most_common()], _NAMED)
        notes.append(f"ignored {plural(ignored.total(), 'file')}: {kinds}")
    if nested and classes:
        notes.append(f"ignored {plural(len(nested), 'folder')} inside class folders")
    elif nested:
        notes.append(f"if {nested[0]} is a class, set --data to {nested[0].parent} instead")
    empty = [name for name in images if name not in classes]
    if empty and classes:
        notes.append(f"folders without images: {listed(empty, _NAMED)}")
    return classes, notes


def class_name(name: str) -> str:
    """Return the name of a class in Unicode's composed form.

    Raises:
        TaskError: if it is not valid UTF-8, and so cannot be sent.

    Example:
        >>> len("e\u0301"), len(class_name("e\u0301"))
        (2, 1)
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise TaskError(f"the folder name {name!r} is not valid UTF-8; rename the folder") from None
    return unicodedata.normalize("NFC", name)


def class_order(name: str) -> tuple[bool, int, str]:
    """Return the sort key of a class: whole numbers by value, then the others by code point.

    Example:
        >>> sorted(["b", "10", "9", "B", "a"], key=class_order)
        ['9', '10', 'B', 'a', 'b']
    """
    number = re.fullmatch(r"[0-9]{1,18}", name)
    return not number, int(name) if number else 0, name


def is_junk(name: str) -> bool:
    """Return whether a file or folder was left behind by an operating system or a tool.

    Example:
        >>> [is_junk(name) for name in (".ipynb_checkpoints", "__MACOSX", "Thumbs.db", "a")]
        [True, True, True, False]
    """
    return name.startswith((".", "__", "~$")) or name.lower() in _JUNK


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder, without junk, sorted by name."""
    try:
        return sorted(path for path in folder.iterdir() if not is_junk(path.name))
    except OSError as why:
        raise TaskError(f"the folder {folder} cannot be read ({why.strerror})") from None


def _kind(path: Path) -> str:
    return path.suffix.lower() or "no suffix"
