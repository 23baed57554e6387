"""Reads folders ``<class>/<image>`` as arrays of 100 by 100 grey pixels, white on black.

``folders.find_classes`` decides what is a class, and ``pixels.read_pixels`` decodes an image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluffle_common.errors import TaskError, UsageError
from fluffle_common.tensors.weights import Array
from fluffle_worker.letters.folders import class_name, find_classes, some
from fluffle_worker.letters.pixels import read_pixels

_HELD_OUT = 0.1
_BRIGHT = 0.5
_NAMED = 5  # unreadable images named one by one; the rest are counted


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
            f"--classes lists the same class more than once ({some(twice)}); list each class once"
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
    notes += _skipped_notes(skipped, len(pictures))
    notes += inverted_note(pictures)
    return Images(
        np.stack(pictures),
        np.asarray(targets, np.int32),
        names,
        tuple(paths),
        tuple(notes),
    )


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


def _skipped_notes(skipped: Sequence[str], read: int) -> Iterable[str]:
    """Yield lines that count the unreadable images and name the first few."""
    if skipped:
        yield f"cannot read {len(skipped)} of {len(skipped) + read} images, so they are left out:"
        yield from (f"  {reason}" for reason in skipped[:_NAMED])
        if len(skipped) > _NAMED:
            yield f"  and {len(skipped) - _NAMED} more"
