"""Decoding of an image file, whatever its mode, depth or orientation, to grey pixels."""

from __future__ import annotations

import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fluffle_common.errors import UsageError
from fluffle_common.tensors.weights import Array

if TYPE_CHECKING:
    from PIL import Image

SIDE = 100

# Formats that Pillow may detect, whatever the suffix. Some of its others run external programs.
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")
# The value of white in images deeper than 8 bits: floats, and 8, 10, 12, 14 and 16 bits.
_WHITES = (1, 255, 1023, 4095, 16383, 65535)
_OVERSHOOT = 0.05  # resampling takes floats slightly out of their range
_DIMMEST = 1 / 8  # of white; if no value reaches this, the image has a scale of its own
_FAINT = 64  # of 255; with less contrast than this, no letter is visible
_ORIENTATION, _PHOTOMETRIC, _SAMPLE_FORMAT = 274, 262, 339  # tags of EXIF and TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, (1,)
_BRIGHT = 0.5


@dataclass(frozen=True)
class Picture:
    """A decoded image file."""

    pixels: Array  # of the first frame: float32, shape [100, 100, 1], 0 (black) to 1 (white)
    frames: int = 1  # in the file

    @property
    def bright_border(self) -> bool:
        """Whether the outermost pixels are bright, as they are on white paper."""
        grey = self.pixels[..., 0]
        border = np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])
        return bool(border.mean() > _BRIGHT)


def read_picture(path: Path) -> Picture:
    """Read one image as a viewer shows it, in grey, resized to 100 by 100 pixels.

    - The EXIF orientation is applied.
    - Images deeper than 8 bits keep their contrast: white is the smallest of 1, 255, 1023, 4095,
      16383 and 65535 that no pixel exceeds. If that does not fit (negative values, larger ones, or
      none that reaches an eighth of white), the darkest pixel is black and the brightest white.
    - Transparency is black. If the ink is too dark to be seen on black, opacity is used as grey.

    Raises:
        UsageError: if there is no such image, or it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe may block for ever
            raise UsageError(f"{path} is not a regular file; choose an image file")
        if path.stat().st_size == 0:
            raise UsageError(f"{path} cannot be read as an image (the file is empty)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as opened:
                grey = _grey(opened)
                if grey.size != (SIDE, SIDE):
                    grey = grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                frames = _frames(opened)
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"there is no image {path}") from None
    except UnidentifiedImageError:
        raise UsageError(
            f"{path} cannot be read as an image (it is not a PNG, JPEG, BMP, GIF, TIFF, "
            "WebP, PBM, PGM or PPM file)"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as why:
        raise UsageError(
            f"{path} is too large to be a letter ({why}); scale the image down"
        ) from None
    except Exception as why:  # untrusted bytes make Pillow raise almost anything
        reason = (isinstance(why, OSError) and why.strerror) or str(why) or type(why).__name__
        raise UsageError(f"{path} cannot be read as an image ({reason})") from None
    pixels = np.asarray(grey, np.float32)[..., None] / np.float32(255)
    return Picture(pixels, frames)


def _grey(opened: Image.Image) -> Image.Image:
    """Return an open image in 8-bit grey, upright, on black."""
    _scale_transparent_grey(opened)
    opened.load()
    if opened.mode.startswith(("I", "F")):
        grey = _eight_bits(opened)
    elif opened.mode == "LAB":
        grey = opened.getchannel("L")
    elif opened.has_transparency_data:
        grey = _on_black(opened)
    else:
        grey = opened.convert("L")
    return _upright(grey, opened)


def _scale_transparent_grey(opened: Image.Image) -> None:
    """Scale the transparent grey of a PNG of 2 or 4 bits to 8 bits, as Pillow scales the pixels."""
    clear, tiles = opened.info.get("transparency"), getattr(opened, "tile", ())
    raw_mode = tiles[0][3] if tiles else None
    levels = {"L;2": 4, "L;4": 16}.get(raw_mode, 0) if isinstance(raw_mode, str) else 0
    if isinstance(clear, int) and clear < levels:
        opened.info["transparency"] = clear * 255 // (levels - 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a deep image to 8 bits; Pillow's own conversion makes everything above 255 white."""
    from PIL import Image

    values = np.asarray(image)
    floats = values.dtype.kind == "f"
    tags = getattr(image, "tag_v2", {})
    if values.dtype == np.int32 and tags.get(_SAMPLE_FORMAT) == _UNSIGNED:
        values = values.view(np.uint32)
    hidden = image.info.get("transparency")
    clear = values == hidden if isinstance(hidden, int) else None
    values = values.astype(np.float64 if floats else np.float32)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("no pixel has a finite value")
    low, high = float(finite.min()), float(finite.max())
    slack = _OVERSHOOT if floats else 0.0
    white = next((white for white in _WHITES if high <= white * (1 + slack)), 0)
    if low >= -slack * high and (white == 1 or high >= white * _DIMMEST > 0):
        low, high = 0.0, float(white)
    scaled = np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low
    scaled = np.clip(scaled / ((high - low) or 1.0), 0, 1)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts images of 8 bits only
        scaled = 1 - scaled
    grey = Image.fromarray(np.rint(255 * scaled).astype(np.uint8))
    if clear is None:
        return grey
    grey.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return _on_black(grey)


def _on_black(image: Image.Image) -> Image.Image:
    """Put a transparent image on black, or return its opacity if the ink is too dark for that."""
    from PIL import Image

    rgba = image.convert("RGBA")
    black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
    grey = Image.alpha_composite(black, rgba).convert("L")
    opacity = rgba.getchannel("A")
    return opacity if _contrast(grey) < min(_FAINT, _contrast(opacity)) else grey


def _contrast(grey: Image.Image) -> int:
    low, high = map(int, np.asarray(grey.getextrema()))
    return high - low


def _upright(grey: Image.Image, opened: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; damaged EXIF data is ignored."""
    from PIL import Image

    turns = Image.Transpose
    needed = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    try:
        # Only valid after loading: Pillow rotates TIFF files itself; PNG may have EXIF at its end.
        turn = needed.get(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata does not make the pixels unusable
        turn = None
    return grey if turn is None else grey.transpose(turn)


def _frames(opened: Image.Image) -> int:
    """Count the frames; the previews that a phone adds to a photo (MPO) do not count."""
    if opened.format == "MPO":
        return 1
    try:
        return int(getattr(opened, "n_frames", 1))
    except Exception:  # damage after the first frame does not matter
        return 1
