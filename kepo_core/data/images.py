"""Images from disk: decoded as RGB, checked before a run needs them."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from kepo_core.data.errors import DataError
from kepo_core.data.records import Question

#: Largest image that is decoded, in pixels. The benchmark's largest are scans of a few megapixels; a file beyond
#: this is a mistake or a decompression bomb, and 64 million RGB pixels are already 192 MB.
MAX_PIXELS = 64_000_000


def load_image(path: Path, image_size: int = 0) -> Image.Image:
    """The image at ``path`` as RGB, fully decoded.

    ``image_size`` 0 keeps it as stored; N > 0 squashes it to N×N pixels, not keeping the aspect ratio (as the
    paper's authors do with 384). Raises ``DataError`` when the file is missing, too large or not a whole image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"Image {path}: {width}×{height} pixels, expected at most {MAX_PIXELS:,} in all.")
            decoded = image.convert("RGB")
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"Image {path}: missing, expected an image file.") from error
    # Pillow reports damage as any of these, by format: PNG raises SyntaxError, TIFF ValueError, truncation OSError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"Image {path}: cannot be decoded ({error}), expected a whole image file.") from error
    if image_size:
        decoded = decoded.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return decoded


def check_images(questions: Iterable[Question]) -> int:
    """Decode every distinct image of ``questions`` once and return how many there are.

    Meant for the rows a run has sampled, before it starts: a header alone would not show a truncated file.
    Raises ``DataError`` for the first that cannot be decoded, naming the question that asks about it.
    """
    first_asked: dict[Path, str] = {}
    for question in questions:
        first_asked.setdefault(question.image, question.id)
    for path, question_id in first_asked.items():
        try:
            load_image(path)
        except DataError as error:
            raise DataError(f"Question {question_id}: {error}") from error
    return len(first_asked)
