"""Decoding of an image file, whatever its mode, depth or orientation, to grey pixels."""

from __future__ import annotations

import stat
import warnings
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
_DIMMEST = 1 / 8  # of white; if no value reaches this, the image has a scale of its own
_FAINT = 64  # of 255; with less contrast than this, no letter is visible


def read_pixels(path: Path) -> Array:
    """Read one image as a viewer shows it, in grey, resized to 100 by 100 pixels.

    - The EXIF orientation is applied, and only the first frame is read.
    - Images deeper than 8 bits keep their contrast: white is the smallest of 1, 255, 1023, 4095,
      16383 and 65535 that no pixel exceeds. If that does not fit (negative values, larger ones, or
      none that reaches an eighth of white), the darkest pixel is black and the brightest white.
    - Transparency is black. If the ink is too dark to be seen on black, opacity is used as grey.

    Returns:
        float32, shape [100, 100, 1], 0 (black) to 1 (white).

    Raises:
        UsageError: if there is no such image, or it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe may block for ever
            raise UsageError(f"{path} is not a regular file; choose an image file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as opened:
                grey = _grey(_upright(opened)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"there is no image {path}") from None
    except UnidentifiedImageError:
        raise UsageError(
            f"{path} cannot be read as an image (it is empty, or not a PNG, JPEG, BMP, GIF, TIFF, "
            "WebP, PBM, PGM or PPM file)"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as why:
        raise UsageError(
            f"{path} is too large to be a letter ({why}); scale the image down"
        ) from None
    except Exception as why:  # untrusted bytes make Pillow raise almost anything
        reason = (isinstance(why, OSError) and why.strerror) or str(why) or type(why).__name__
        raise UsageError(f"{path} cannot be read as an image ({reason})") from None
    return np.asarray(grey, np.float32)[..., None] / np.float32(255)


def _upright(opened: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; damaged EXIF data does not make the pixels unusable."""
    from PIL import ImageOps

    opened.load()  # before: Pillow rotates TIFF files itself, and PNG may have EXIF at its end
    try:
        return ImageOps.exif_transpose(opened)
    except Exception:
        return opened


def _grey(image: Image.Image) -> Image.Image:
    """Return an image in 8-bit grey, on black."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    return _on_black(image) if image.has_transparency_data else image.convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a deep image to 8 bits; Pillow's own conversion makes everything above 255 white."""
    from PIL import Image

    values = np.asarray(image, np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("no pixel has a finite value")
    low, high = finite.min(), finite.max()
    white = next((white for white in _WHITES if high <= white), np.inf)
    if low >= 0 and high >= white * _DIMMEST:
        low, high = 0.0, white
    scaled = np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low
    scaled = np.clip(scaled / ((high - low) or 1.0), 0, 1)
    return Image.fromarray(np.rint(255 * scaled).astype(np.uint8))


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
