"""Images from disk: decoded as an image viewer shows them, resized, cached for the next epoch."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from kepo_core.data.ledger import reason_of
from kepo_core.errors import DataError

_WAYS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ReadPicture = Callable[[Path], Image.Image]

#: Largest image that is decoded, in pixels. The benchmark's largest are scans of a few megapixels; a file beyond
#: this is a mistake or a decompression bomb, and 64 million RGB pixels are already 192 MB.
MAX_PIXELS = 64_000_000
#: Pixels whose red, green and blue are all at least this are invisible on a white background.
NEARLY_WHITE = 240


def load_image(path: Path, image_size: int = 0, fit: str = "squash") -> Image.Image:
    """The image at ``path`` as RGB, fully decoded, as an image viewer shows it.

    Its EXIF orientation is applied. Transparent pixels become white, or black if all visible pixels are nearly white.
    Grey values of more than 8 bits are scaled linearly to 0 to 255, since clipping would leave most scans white;
    pixels that are not finite become black and do not count in the scaling.

    ``image_size`` 0 keeps the stored size. With N > 0, ``fit="squash"`` resizes to N×N pixels and ignores the aspect
    ratio (as the paper's authors do with 384); ``"longest"`` makes the longest side N and keeps the ratio. Raises
    ``DataError`` when the file is missing, too large or not a whole image.
    """
    try:
        with path.open("rb") as file:  # by its name, Pillow would map a plain TIFF into memory and rotate it wrongly
            decoded = decode(file, path)
    except FileNotFoundError as error:
        raise DataError(f"Image {path}: missing, expected an image file.") from error
    except OSError as error:
        raise DataError(f"Image {path}: cannot be read ({error.strerror}), expected an image file.") from error
    if not image_size:
        return decoded
    return decoded.resize(shown_size(decoded.size, image_size, fit), Image.Resampling.BICUBIC)


def shown_size(size: tuple[int, int], image_size: int, fit: str) -> tuple[int, int]:
    """Width and height, in pixels, to which `load_image` resizes an image of ``size``."""
    if not image_size:
        return size
    if fit == "squash":
        return image_size, image_size
    scale = image_size / max(size)
    return round(size[0] * scale) or 1, round(size[1] * scale) or 1


def decode(file: BinaryIO, path: Path) -> Image.Image:
    """The image in ``file``, decoded as by `load_image`, in its own size; ``path`` is for the ``DataError``."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"Image {path}: {width}×{height} pixels, expected at most {MAX_PIXELS:,} in all.")
            image.load()
            return _turned(_without_transparency(_eight_bit(image)), _orientation(image))
    # Pillow reports damage as any of these, by format: PNG raises SyntaxError, TIFF ValueError, truncation OSError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # For an unknown format, Pillow's message names the Python object that it read from.
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else reason_of(error)
        raise DataError(f"Image {path}: cannot be decoded ({reason}), expected a whole image file.") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied to a loaded picture: Pillow has already rotated a TIFF."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, OSError, struct.error):
        return 1  # viewers ignore EXIF that they cannot read


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    way = _WAYS.get(orientation)
    return image if way is None else image.transpose(way)


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("not one of its pixels is a number")
    low, high = values[finite].min(), values[finite].max()
    spread = (np.where(finite, values, low) - low) * (255 / (high - low or 1))
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:  # type: ignore[attr-defined]
        spread = np.where(finite, 255 - spread, 0)  # 0 is white; Pillow inverts such files only up to 8 bits
    return Image.fromarray(spread.astype(np.uint8))


def _without_transparency(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    shown = np.asarray(layer)
    colours = shown[shown[..., 3] > 0][:, :3]
    white_on_white = bool((shown[..., 3] == 0).any()) and bool(colours.size) and colours.min() >= NEARLY_WHITE
    page = Image.new("RGBA", layer.size, "black" if white_on_white else "white")
    return Image.alpha_composite(page, layer).convert("RGB")


class Pictures:
    """Reads pictures of one size and keeps them in memory, so that a second epoch decodes nothing.

    When ``budget`` bytes of pixels are kept, further pictures are read from disk each time: every epoch asks for each
    picture once, so replacing those that are kept would gain nothing.
    """

    def __init__(self, image_size: int = 0, fit: str = "squash", budget: int = 2**30) -> None:
        self.image_size, self.fit = image_size, fit
        self._left = budget
        self._kept: dict[Path, Image.Image] = {}

    def __call__(self, path: Path) -> Image.Image:
        """The picture at ``path``, as `load_image` reads it."""
        if path in self._kept:
            return self._kept[path]
        image = load_image(path, self.image_size, self.fit)
        if (size := 3 * image.width * image.height) <= self._left:
            self._left -= size
            self._kept[path] = image
        return image
