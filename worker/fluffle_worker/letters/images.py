"""Images of letters on disk: a folder a class, of any size and mode, read as grey 100 by 100."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluffle_common.errors import TaskError, UsageError
from fluffle_common.weights import Array

SIDE = 100
_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Images:
    """A folder of images.

    Args:
        inputs: float32, shape [n, 100, 100, 1], 0 (black) to 1 (white).
        targets: int32, shape [n], indices into ``classes``.
        classes: the names of the classes.
        paths: where each image came from.
        skipped: images that could not be read, each with the reason.
    """

    inputs: Array
    targets: Array
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    skipped: tuple[str, ...]


def read_image(path: Path) -> Array:
    """Read one image as float32, shape [100, 100, 1], 0 to 1; transparency is black.

    Raises:
        UsageError: where there is none, or it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            # Pillow says what it dislikes in many ways; all of them mean the same to us.
            rgba = opened.convert("RGBA")
            black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
            grey = Image.alpha_composite(black, rgba).convert("L")
            if grey.size != (SIDE, SIDE):
                grey = grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise UsageError(f"there is no image {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as why:
        raise UsageError(f"{path} cannot be read as an image ({why})") from None
    return np.asarray(grey, np.float32)[..., None] / np.float32(255)


def read_images(folder: Path, classes: Sequence[str] | None = None) -> Images:
    """Read a folder ``<class>/<image>``, in the order of the names.

    Args:
        folder: where the classes' folders are.
        classes: the classes, in the order of the model's outputs; None takes those that are there.

    Raises:
        TaskError: where there is no such folder, no image in it, or a class that is not asked for.
    """
    if not folder.is_dir():
        raise TaskError(f"there is no folder {folder}; --data names one with <class>/<image> in it")
    there = sorted(path.name for path in folder.iterdir() if path.is_dir() and _files(path))
    if not there:
        raise TaskError(f"{folder} has no images; they belong into {folder}/<class>/<image>.png")
    names = tuple(classes) if classes is not None else tuple(there)
    strange = sorted(set(there) - set(names))
    if strange:
        raise TaskError(
            f"{folder} has the classes {', '.join(strange)}, which are not among {', '.join(names)}"
        )
    inputs, targets, paths, skipped = [], [], [], []
    for index, name in enumerate(names):
        for path in _files(folder / name):
            try:
                inputs.append(read_image(path))
            except UsageError as why:
                skipped.append(str(why))
                continue
            targets.append(index)
            paths.append(path)
    if not inputs:
        raise TaskError(f"none of the images in {folder} can be read: {skipped[0]}")
    return Images(
        np.stack(inputs), np.asarray(targets, np.int32), names, tuple(paths), tuple(skipped)
    )


def split(count: int, part: float, seed: int) -> tuple[Array, Array]:
    """Split indices 0…count-1 into those to train on and those to hold out, the same for a seed.

    Example:
        >>> train, held_out = split(10, 0.1, seed=0)
        >>> len(train), len(held_out)
        (9, 1)
    """
    order = np.random.default_rng(seed).permutation(count)
    held_out = min(max(1, round(part * count)), count - 1) if count > 1 else 0
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
