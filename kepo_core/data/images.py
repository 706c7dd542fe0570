"""Images from disk: decoded as RGB, resized, checked before a run needs them, kept for the next epoch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from kepo_core.data.ledger import Ledger, RowError
from kepo_core.data.records import Question
from kepo_core.data.source import Source
from kepo_core.errors import DataError

ReadPicture = Callable[[Path], Image.Image]

#: Largest image that is decoded, in pixels. The benchmark's largest are scans of a few megapixels; a file beyond
#: this is a mistake or a decompression bomb, and 64 million RGB pixels are already 192 MB.
MAX_PIXELS = 64_000_000


def load_image(path: Path, image_size: int = 0, fit: str = "squash") -> Image.Image:
    """The image at ``path`` as RGB, fully decoded.

    ``image_size`` 0 keeps it as stored; with N > 0, ``fit="squash"`` makes it N×N pixels, not keeping the aspect
    ratio (as the paper's authors do with 384), and ``"longest"`` makes its longest side N, keeping it. Grey values of
    more than 8 bits are spread linearly over 0 to 255, since cutting them off would leave most scans white. Raises
    ``DataError`` when the file is missing, too large or not a whole image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"Image {path}: {width}×{height} pixels, expected at most {MAX_PIXELS:,} in all.")
            decoded = _eight_bit(image).convert("RGB")
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"Image {path}: missing, expected an image file.") from error
    # Pillow reports damage as any of these, by format: PNG raises SyntaxError, TIFF ValueError, truncation OSError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"Image {path}: cannot be decoded ({error}), expected a whole image file.") from error
    if not image_size:
        return decoded
    scale = image_size / max(width, height)
    size = (image_size, image_size) if fit == "squash" else (round(width * scale) or 1, round(height * scale) or 1)
    return decoded.resize(size, Image.Resampling.BICUBIC)


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) * (255 / (high - low or 1))).astype(np.uint8))


class Pictures:
    """Reads pictures of one size and keeps them in memory, so that a second epoch decodes nothing.

    Once ``budget`` bytes of pixels are kept, further ones are read anew each time: as every epoch asks for each picture
    once, replacing those that are kept would gain nothing.
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


class Decodable:
    """Whether a question's picture can be fetched and decoded; each is tried once. What cannot goes to the ledger.

    A header alone would not show a truncated file.
    """

    def __init__(self, source: Source, ledger: Ledger) -> None:
        self.source, self.ledger = source, ledger
        self._problem: dict[Path, str] = {}

    def __call__(self, question: Question) -> bool:
        """False after noting it in the ledger, which raises if it is strict."""
        if question.image not in self._problem:
            try:
                self.source.fetch(question.image)
                load_image(question.image)
                self._problem[question.image] = ""
            except DataError as error:
                self._problem[question.image] = str(error)
        if problem := self._problem[question.image]:
            self.ledger.drop(RowError("image cannot be decoded", f"Question {question.id}: {problem}"))
        return not problem
