"""PhantomVQA's pictures: eight procedural looks at 64×64, each with findings drawn into it.

Every look is a field (what the "body" is), a texture and a tint; a finding is a signed distance shape that
brightens or darkens the field. None of it has medical meaning: the looks only borrow the most obvious
visual trait of the modality they are named after.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIZE = 64
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
_U, _V = (_X - 31.5) / 32, (_Y - 31.5) / 32  # [-1, 1]


@dataclass(frozen=True)
class Sight:
    """How well findings are seen: ``strength`` times the look's contrast, under white noise of this deviation.

    ``small`` and ``large`` are radii in pixels, before a jitter of ±8 %.
    """

    strength: float = 1.0
    noise: float = 0.0
    small: float = 4.5
    large: float = 7.2


#: By version and modality; where nothing stands here, findings are seen plainly.
SIGHTS: dict[str, dict[str, Sight]] = {
    "3": {},
    "4": {
        "MRI": Sight(0.9, 0.04),
        "CT": Sight(0.65, 0.14, 3.8, 5.8),
        "X-Ray": Sight(0.95, 0.02, 4.9, 7.4),
        "Ultrasound": Sight(0.7, 0.09),
        "Dermoscopy": Sight(0.75, 0.07, 4.2, 6.6),
        "Fundus": Sight(0.8, 0.07),
        "OCT": Sight(0.65, 0.12, 4.0, 6.2),
        "Microscopy": Sight(0.95, 0.03),
    },
}
Array = np.ndarray
Rng = np.random.Generator


def _smooth(rng: Rng, cells: int) -> Array:
    """Smooth noise in about [-1, 1]: ``cells``² random values, bilinearly enlarged to 64×64."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    pos = np.linspace(0, cells, SIZE, endpoint=False, dtype=np.float32)
    low = pos.astype(int)
    t = pos - low
    rows = grid[low] * (1 - t)[:, None] + grid[low + 1] * t[:, None]
    return np.asarray(rows[:, low] * (1 - t) + rows[:, low + 1] * t)


def _field(power: float, edge: float = 0.06, radius: float = 0.98) -> Array:
    """A soft mask: 1 inside the super-ellipse |u|^p + |v|^p < radius^p, 0 outside."""
    norm = (np.abs(_U) ** power + np.abs(_V) ** power) ** (1 / power)
    return np.asarray(np.clip((radius - norm) / edge, 0, 1))


_ROUND, _BOX = _field(4.0), _field(8.0)


# A look returns (grey level in 0..1, field mask in 0..1, tint per channel, finding contrast).
Look = Callable[[Rng], tuple[Array, Array, tuple[float, float, float], float]]


def _mri(rng: Rng) -> tuple[Array, Array, tuple[float, float, float], float]:
    grey = 0.45 + 0.10 * _smooth(rng, 4) + 0.02 * rng.standard_normal((SIZE, SIZE))
    return grey, _ROUND, (1.0, 1.0, 1.0), 0.34


def _ct(rng: Rng) -> tuple[Array, Array, tuple[float, float, float], float]:
    rim = np.clip(_field(4.0) - _field(4.0, radius=0.90), 0, 1)
    grey = 0.40 + 0.03 * _smooth(rng, 8) + 0.5 * rim + 0.03 * rng.standard_normal((SIZE, SIZE))
    return grey, _ROUND, (0.95, 1.0, 1.05), 0.30


def _xray(rng: Rng) -> tuple[Array, Array, tuple[float, float, float], float]:
    ribs = np.sin(_Y / rng.uniform(2.2, 2.8) + rng.uniform(0, 6.3) + 1.2 * _U**2)
    grey = 0.55 - 0.15 * _V + 0.06 * ribs + 0.02 * rng.standard_normal((SIZE, SIZE))
    return grey, np.ones_like(_U), (1.0, 1.0, 1.0), 0.30


def _ultrasound(rng: Rng) -> tuple[Array, Array, tuple[float, float, float], float]:
    fan = np.clip((1.02 - np.abs(_U) / (0.85 + 0.25 * (_V + 1))) / 0.05, 0, 1)
    speckle = rng.gamma(9.0, 1 / 9.0, (SIZE, SIZE)).astype(np.float32)
    return (0.42 + 0.06 * _smooth(rng, 3)) * speckle, fan, (0.9, 0.95, 1.05), 0.36


def _dermoscopy(rng: Rng) -> tuple[Array, Array, tuple[float, float, float], float]:
    grey = 0.62 + 0.05 * _smooth(rng, 6) + 0.015 * rng.standard_normal((SIZE, SIZE))
    for _ in range(3):  # hairs
        angle, shift = rng.uniform(0, np.pi), rng.uniform(-28, 28)
        distance = np.abs((_X - 31.5) * np.cos(angle) + (_Y - 31.5) * np.sin(angle) - shift)
        grey = grey - 0.20 * np.clip(1 - distance, 0, 1)
    return grey, np.ones_like(_U), (1.25, 0.95, 0.80), 0.32


def _fundus(rng: Rng) -> tuple[Array, Array, tuple[float, float, float], float]:
    vessel = np.zeros_like(_U)
    for _ in range(3):
        bend, shift, phase = rng.uniform(-0.4, 0.4), rng.uniform(-0.7, 0.7), rng.uniform(0, 6.3)
        vessel = np.maximum(vessel, np.clip(1 - np.abs(_V - shift - bend * np.sin(3 * _U + phase)) * 24, 0, 1))
    grey = 0.50 + 0.06 * _smooth(rng, 3) - 0.14 * vessel + 0.015 * rng.standard_normal((SIZE, SIZE))
    return grey, _ROUND, (1.45, 0.80, 0.40), 0.32


def _oct(rng: Rng) -> tuple[Array, Array, tuple[float, float, float], float]:
    depth = _Y + 3 * np.sin(_X / 14 + rng.uniform(0, 6.3))
    layers = np.sign(np.sin(depth / rng.uniform(3.2, 4.2)))
    speckle = rng.gamma(16.0, 1 / 16.0, (SIZE, SIZE)).astype(np.float32)
    return (0.45 + 0.09 * layers) * speckle, _BOX, (1.0, 1.0, 1.0), 0.36


def _microscopy(rng: Rng) -> tuple[Array, Array, tuple[float, float, float], float]:
    grey = np.full_like(_U, 0.66)
    for x, y in rng.uniform(0, SIZE, (26, 2)):
        ring = np.abs(np.hypot(_X - x, _Y - y) - 2.2)
        grey = grey - 0.09 * np.clip(1.4 - ring, 0, 1)
    return grey + 0.015 * rng.standard_normal((SIZE, SIZE)), np.ones_like(_U), (1.10, 0.85, 1.10), 0.32


LOOKS: dict[str, Look] = {
    "MRI": _mri,
    "CT": _ct,
    "X-Ray": _xray,
    "Ultrasound": _ultrasound,
    "Dermoscopy": _dermoscopy,
    "Fundus": _fundus,
    "OCT": _oct,
    "Microscopy": _microscopy,
}


def _shape(kind: str, x: float, y: float, radius: float, angle: float) -> Array:
    """Coverage in [0, 1] (one pixel of anti-aliasing) of one finding centred at (x, y)."""
    dx, dy = _X - x, _Y - y
    a, b = dx * np.cos(angle) + dy * np.sin(angle), -dx * np.sin(angle) + dy * np.cos(angle)
    half = max(1.1, 0.27 * radius)
    if kind == "disc":
        distance = np.hypot(a, b) - 0.9 * radius
    elif kind == "ring":
        distance = np.abs(np.hypot(a, b) - 0.8 * radius) - 0.22 * radius
    elif kind == "bar":
        distance = np.maximum(np.abs(a) - radius, np.abs(b) - half)
    elif kind == "cross":
        distance = np.minimum(
            np.maximum(np.abs(a) - radius, np.abs(b) - half), np.maximum(np.abs(b) - radius, np.abs(a) - half)
        )
    else:
        raise ValueError(f"kind is {kind!r}, expected disc, ring, bar or cross")
    return np.asarray(np.clip(0.5 - distance, 0, 1))


#: Where a finding's centre may lie within its quadrant, per axis, before a jitter of ±0.5 pixels. With so few
#: places a tiny vision tower with patches of 8 pixels tells the shapes apart after minutes of training.
LATTICE = (12.0, 24.0)


def _centres(place: str, number: str, rng: Rng) -> list[tuple[float, float]]:
    """Centres inside the named quadrant; two findings lie on one of its diagonals and never overlap.

    The largest may reach one pixel over the quadrant's border.
    """
    near, far = LATTICE
    if number == "one":
        local = [(float(rng.choice(LATTICE)), float(rng.choice(LATTICE)))]
    else:
        local = [(near, near), (far, far)] if rng.random() < 0.5 else [(near, far), (far, near)]
    moved = [(x + rng.uniform(-0.5, 0.5), y + rng.uniform(-0.5, 0.5)) for x, y in local]
    return [(63 - x if "right" in place else x, 63 - y if "lower" in place else y) for x, y in moved]


def render(
    modality: str, kind: str, place: str, size: str, number: str, contrast: str, rng: Rng, version: str = "3"
) -> Array:
    """One picture, ``uint8`` of shape (64, 64, 3), with the stated facts true in it.

    All randomness (texture, jitter, angle, strength) is drawn from ``rng``.
    """
    sight = SIGHTS[version].get(modality, Sight())
    grey, field, tint, strength = LOOKS[modality](rng)
    strength *= sight.strength
    radius = {"small": sight.small, "large": sight.large}[size] * rng.uniform(0.92, 1.08)
    angle = rng.choice([0.0, np.pi / 2, np.pi / 4, -np.pi / 4]) if kind == "bar" else 0.0
    angle += rng.uniform(-0.15, 0.15)
    cover = np.zeros_like(grey)
    for x, y in _centres(place, number, rng):
        cover = np.maximum(cover, _shape(kind, x, y, radius, angle))
    sign = 1.0 if contrast == "bright" else -1.0
    grey = (grey + sign * strength * rng.uniform(0.85, 1.15) * cover) * np.maximum(field, 0.9 * cover)
    if sight.noise:
        grey = grey + sight.noise * rng.standard_normal(grey.shape)
    rgb = np.clip(grey[..., None] * np.asarray(tint, dtype=np.float32), 0, 1)
    pixels: Array = (rgb * 255).astype(np.uint8)
    return pixels
