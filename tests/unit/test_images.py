"""A picture is decoded as a viewer shows it, whatever its format, orientation, transparency or depth."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from kepo_core.data.images import load_image
from kepo_core.errors import DataError

#: How a viewer rotates a stored picture, by EXIF orientation (rows, columns as numpy counts them).
SEEN = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(load_image(path))


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize(
    ("mode", "ending"), [("RGB", "png"), ("L", "tif"), ("LA", "png"), ("I;16", "tif"), ("F", "tif")]
)
def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path, mode: str, ending: str, orientation: int) -> None:
    stored = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    kinds = {"I;16": np.uint16, "F": np.float32}
    image = Image.fromarray(stored.astype(kinds[mode])) if mode in kinds else Image.fromarray(stored).convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / f"a.{ending}", exif=exif)
    expected = SEEN[orientation](stored).astype(float) * (255 / 230 if mode in kinds else 1)
    assert np.abs(pixels(tmp_path / f"a.{ending}")[..., 0] - expected).max() <= 1
    height, width = expected.shape
    longest = load_image(tmp_path / f"a.{ending}", 60, "longest")
    assert longest.size == ((60, 40) if width > height else (40, 60))


def test_exif_that_cannot_be_read_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    assert load_image(tmp_path / "a.jpg").size == (4, 6)
    (tmp_path / "a.jpg").write_bytes(content.replace(b"Exif\0\0MM\0*", b"Exif\0\0XX\0*"))
    assert load_image(tmp_path / "a.jpg").size == (6, 4)


def drawing(colour: tuple[int, int, int], alpha: int = 255) -> Image.Image:
    """A shape of one colour on a transparent background; transparent pixels have the colour of the shape."""
    rgba = np.zeros((6, 6, 4), np.uint8)
    rgba[..., :3] = colour
    rgba[2:4, 2:4, 3] = alpha
    return Image.fromarray(rgba)


@pytest.mark.parametrize(
    ("image", "inside", "outside"),
    [
        (drawing((0, 0, 0)), 0, 255),
        (drawing((0, 0, 0)).convert("LA"), 0, 255),
        (drawing((0, 0, 0), 51), 204, 255),
        (drawing((255, 255, 255)), 255, 0),  # invisible on white
        (drawing((250, 250, 250), 255).convert("LA"), 250, 0),
    ],
)
def test_a_drawing_on_transparency_is_seen(tmp_path: Path, image: Image.Image, inside: int, outside: int) -> None:
    image.save(tmp_path / "a.png")
    seen = pixels(tmp_path / "a.png")
    assert (seen[2, 2, 0], seen[0, 0, 0]) == (inside, outside)


def test_a_transparent_colour_of_a_palette_or_of_grey_is_seen(tmp_path: Path) -> None:
    grey = Image.new("L", (4, 4), 0)
    grey.putpixel((1, 1), 90)
    grey.save(tmp_path / "grey.png", transparency=0)
    grey.convert("P").save(tmp_path / "palette.gif", transparency=0)
    for name in ("grey.png", "palette.gif"):
        seen = pixels(tmp_path / name)
        assert seen[0, 0].tolist() == [255] * 3 and seen[1, 1].tolist() == [90] * 3, name


def test_an_opaque_alpha_channel_changes_no_pixel(tmp_path: Path) -> None:
    image = Image.effect_noise((20, 20), 90).convert("RGB")
    image.save(tmp_path / "a.png")
    image.convert("RGBA").save(tmp_path / "b.png")
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_no_number_leaves_the_others_alone(tmp_path: Path, hole: float) -> None:
    values = np.linspace(-3, 5, 12, dtype=np.float32).reshape(3, 4)
    values[1, 1] = hole
    Image.fromarray(values).save(tmp_path / "a.tif")
    seen = pixels(tmp_path / "a.tif")[..., 0]
    assert seen[1, 1] == 0 and seen[0, 0] == 0 and seen[2, 3] == 255 and len(np.unique(seen)) == 11


def test_a_scan_without_any_number_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 3), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: cannot be decoded \(not one of its pixels is a number\)"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_a_scan_in_which_zero_is_white_is_seen_so(tmp_path: Path, kind: str) -> None:
    values = np.array([[0, 100], [200, 255]]).astype(kind)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    seen = pixels(tmp_path / "a.tif")[..., 0]
    assert seen[0, 0] > seen[0, 1] > seen[1, 1]
