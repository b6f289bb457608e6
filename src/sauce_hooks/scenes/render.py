"""Drawing a scene. Pure: equal scenes give equal pixels.

Everything is drawn at `IMAGE_SIZE` pixels; the model's processor shrinks the picture to the tower's resolution, which
also smooths the edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from sauce_hooks.scenes.world import Scene, Thing

IMAGE_SIZE = 144
"""Side of a scene's image, in pixels."""

_U = 100  # shapes are drawn in a square of -_U..+_U units

COLOR_RGB: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (214, 34, 38),
        "orange": (244, 130, 26),
        "yellow": (245, 220, 50),
        "green": (52, 160, 66),
        "blue": (44, 92, 214),
        "purple": (126, 52, 172),
        "pink": (246, 146, 188),
        "brown": (118, 74, 40),
    }
)
_DARK, _WHITE = (38, 38, 42), (240, 240, 238)
_FACE, _COURT = (226, 222, 214), (198, 204, 200)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Rendering:
    """A drawn scene and where its things are."""

    image: Image.Image
    masks: tuple[Float[np.ndarray, "side side"], ...]
    """One per thing: 1 where it covers the pixel."""


class _Pen:
    """Draws in units of the thing's square, onto one picture in "L" or "RGB" mode."""

    def __init__(self, side: int, mode: str) -> None:
        self.image = Image.new(mode, (side, side))
        self._draw, self._scale = ImageDraw.Draw(self.image), side / (2 * _U)

    def _xy(self, points: Points) -> list[tuple[float, float]]:
        return [((x + _U) * self._scale, (y + _U) * self._scale) for x, y in points]

    def polygon(self, points: Points, fill: Any) -> None:
        self._draw.polygon(self._xy(points), fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Any = None, line: Any = None) -> None:
        box = self._xy([(x - rx, y - ry), (x + rx, y + ry)])
        self._draw.ellipse(box, fill=fill, outline=line, width=self._width(9))

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Any = None, line: Any = None) -> None:
        self._draw.rectangle(self._xy([(x0, y0), (x1, y1)]), fill=fill, outline=line, width=self._width(9))

    def line(self, points: Points, fill: Any, width: float = 10) -> None:
        self._draw.line(self._xy(points), fill=fill, width=self._width(width), joint="curve")

    def arc(self, x: float, y: float, rx: float, ry: float, a: float, b: float, fill: Any, width: float = 12) -> None:
        self._draw.arc(self._xy([(x - rx, y - ry), (x + rx, y + ry)]), a, b, fill=fill, width=self._width(width))

    def _width(self, units: float) -> int:
        return max(1, round(units * self._scale))


def _ring(n: int, outer: float, inner: float, turn: float = -math.pi / 2) -> Points:
    radii = [outer, inner] * n
    return [(r * math.cos(turn + i * math.pi / n), r * math.sin(turn + i * math.pi / n)) for i, r in enumerate(radii)]


# Silhouettes: filled with the thing's colour and material. ---------------------------------------------------------


def _feline(pen: _Pen) -> None:
    pen.ellipse(0, 12, 82, 76, fill=255)
    pen.polygon([(-80, -96), (-20, -56), (-76, -6)], 255)
    pen.polygon([(80, -96), (20, -56), (76, -6)], 255)


def _car(pen: _Pen) -> None:
    pen.polygon([(-96, 48), (-96, 0), (-56, -8), (-34, -56), (38, -56), (66, -6), (96, 4), (96, 48)], 255)


def _boat(pen: _Pen) -> None:
    pen.polygon([(-96, 26), (96, 26), (62, 86), (-62, 86)], 255)
    pen.polygon([(-6, -94), (-6, 12), (-78, 12)], 255)
    pen.polygon([(10, -74), (10, 12), (70, 12)], 255)


def _starfish(pen: _Pen) -> None:
    pen.polygon(_ring(5, 98, 40), 255)


def _clock(pen: _Pen) -> None:
    pen.ellipse(0, 0, 92, 92, fill=255)


def _envelope(pen: _Pen) -> None:
    pen.box(-96, -64, 96, 64, fill=255)


def _mug(pen: _Pen) -> None:
    pen.box(-74, -76, 40, 84, fill=255)
    pen.arc(44, 0, 50, 48, -100, 100, 255, 22)


def _fish(pen: _Pen) -> None:
    pen.ellipse(-16, 0, 78, 52, fill=255)
    pen.polygon([(40, 0), (98, -58), (98, 58)], 255)


def _tree(pen: _Pen) -> None:
    pen.polygon([(0, -98), (74, 8), (-74, 8)], 255)
    pen.polygon([(0, -46), (88, 58), (-88, 58)], 255)
    pen.box(-16, 54, 16, 98, fill=255)


def _blob(rng: np.random.Generator) -> Callable[[_Pen], None]:
    angles = np.arange(18) * (2 * math.pi / 18)
    waves = sum(rng.uniform(4, 11) * np.sin(k * angles + rng.uniform(0, 2 * math.pi)) for k in (2, 3))
    radii = 74 + np.asarray(waves)

    def draw(pen: _Pen) -> None:
        pen.polygon([(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)], 255)

    return draw


# What is drawn over the filled silhouette, in `ink`. ---------------------------------------------------------------


def _cat_face(pen: _Pen, ink: Any) -> None:
    for side in (-1, 1):
        pen.ellipse(32 * side, 0, 11, 15, fill=ink)
        for slope in (-8, 10):
            pen.line([(22 * side, 42), (74 * side, 40 + slope)], ink, 5)
    pen.polygon([(-12, 30), (12, 30), (0, 44)], ink)


def _tiger_face(pen: _Pen, ink: Any) -> None:
    _cat_face(pen, ink)
    for x in (-28, 0, 28):
        pen.line([(x, -62), (x * 0.7, -24)], ink, 16)
    for side in (-1, 1):
        pen.line([(76 * side, -72), (48 * side, -52)], ink, 16)
        for y in (-12, 22, 56):
            pen.line([(84 * side, y - 4), (50 * side, y + 4)], ink, 16)


def _car_parts(pen: _Pen, ink: Any) -> None:
    for x in (-52, 52):
        pen.ellipse(x, 50, 27, 27, fill=ink)
        pen.ellipse(x, 50, 11, 11, fill=_WHITE)
    pen.polygon([(-40, -10), (-26, -44), (2, -44), (2, -10)], _WHITE)
    pen.polygon([(10, -10), (10, -44), (32, -44), (50, -10)], _WHITE)


def _boat_parts(pen: _Pen, ink: Any) -> None:
    pen.line([(2, -96), (2, 26)], ink, 9)
    pen.line([(-82, 46), (82, 46)], ink, 8)


def _star_parts(pen: _Pen, ink: Any) -> None:
    for i in range(5):
        a = -math.pi / 2 + i * 2 * math.pi / 5
        for r in (24, 48, 70):
            pen.ellipse(r * math.cos(a), r * math.sin(a), 6, 6, fill=ink)


def _clock_parts(pen: _Pen, ink: Any) -> None:
    pen.ellipse(0, 0, 68, 68, fill=_WHITE)
    del ink  # the hands lie on the white dial
    pen.line([(0, 0), (0, -54)], _DARK, 13)
    pen.line([(0, 0), (38, 18)], _DARK, 13)


def _envelope_parts(pen: _Pen, ink: Any) -> None:
    pen.line([(-94, -62), (0, 14), (94, -62)], ink, 11)
    pen.box(-96, -64, 96, 64, line=ink)


def _mug_parts(pen: _Pen, ink: Any) -> None:
    pen.ellipse(-17, -74, 57, 15, fill=ink)


def _fish_parts(pen: _Pen, ink: Any) -> None:
    pen.ellipse(-60, -12, 10, 10, fill=ink)
    pen.arc(-44, 0, 26, 44, -70, 70, ink, 9)
    pen.polygon([(-24, -46), (22, -46), (6, -80)], ink)


def _tree_parts(pen: _Pen, ink: Any) -> None:
    pen.box(-16, 58, 16, 98, fill=ink)
    for x, y in ((-18, -14), (16, -34), (-34, 34), (36, 30), (2, 24)):
        pen.ellipse(x, y, 8, 8, fill=ink)


def _nothing(pen: _Pen, ink: Any) -> None:
    del pen, ink


Outline = Callable[[_Pen], None]
Parts = Callable[[_Pen, object], None]
OBJECTS: Mapping[str, tuple[Outline, Parts]] = MappingProxyType(
    {
        "tiger": (_feline, _tiger_face),
        "cat": (_feline, _cat_face),
        "car": (_car, _car_parts),
        "boat": (_boat, _boat_parts),
        "starfish": (_starfish, _star_parts),
        "clock": (_clock, _clock_parts),
        "envelope": (_envelope, _envelope_parts),
        "mug": (_mug, _mug_parts),
        "fish": (_fish, _fish_parts),
        "tree": (_tree, _tree_parts),
    }
)


# Faces and games. ---------------------------------------------------------------------------------------------------


def _eyes(pen: _Pen, rx: float, ry: float) -> None:
    for x in (-36, 36):
        pen.ellipse(x, -20, rx, ry, fill=_DARK)


def _happy(pen: _Pen) -> None:
    _eyes(pen, 11, 14)
    pen.polygon([(-52, 18), (52, 18), (36, 50), (0, 62), (-36, 50)], _DARK)


def _sad(pen: _Pen) -> None:
    _eyes(pen, 11, 14)
    pen.arc(0, 72, 44, 40, 200, 340, _DARK, 15)
    for side in (-1, 1):
        pen.line([(62 * side, -40), (22 * side, -62)], _DARK, 13)


def _angry(pen: _Pen) -> None:
    _eyes(pen, 11, 14)
    pen.box(-44, 36, 44, 58, fill=_DARK)
    for side in (-1, 1):
        pen.line([(68 * side, -66), (12 * side, -34)], _DARK, 17)


def _surprised(pen: _Pen) -> None:
    for x in (-36, 36):
        pen.ellipse(x, -24, 24, 26, fill=_WHITE, line=_DARK)
        pen.ellipse(x, -24, 9, 9, fill=_DARK)
    pen.ellipse(0, 46, 20, 28, fill=_DARK)


def _bored(pen: _Pen) -> None:
    for x in (-36, 36):
        pen.line([(x - 22, -24), (x + 22, -24)], _DARK, 14)
        pen.ellipse(x, -12, 10, 8, fill=_DARK)
    pen.line([(-30, 48), (30, 40)], _DARK, 13)


def _soccer(pen: _Pen) -> None:
    pen.box(-84, -70, 84, 10, line=_WHITE)
    for x in range(-60, 80, 24):
        pen.line([(x, -70), (x, 10)], _WHITE, 4)
    pen.ellipse(0, 42, 40, 40, fill=_WHITE, line=_DARK)
    pen.polygon([(18 * math.cos(a), 42 + 18 * math.sin(a)) for a in np.arange(5) * 2 * math.pi / 5 - 1.57], _DARK)


def _basketball(pen: _Pen) -> None:
    pen.box(-58, -88, 58, -18, fill=_WHITE, line=_DARK)
    pen.arc(0, -14, 34, 12, 0, 360, _DARK, 10)
    pen.polygon([(-30, -6), (30, -6), (18, 34), (-18, 34)], (150, 150, 150))
    pen.ellipse(0, 62, 30, 30, fill=(90, 90, 92))
    pen.line([(-30, 62), (30, 62)], _WHITE, 6)
    pen.line([(0, 32), (0, 92)], _WHITE, 6)


def _tennis(pen: _Pen) -> None:
    pen.ellipse(-20, -26, 54, 62, fill=_WHITE, line=_DARK)
    for t in (-48, -20, 8):
        pen.line([(t, -76), (t, 24)], _DARK, 4)
    for t in (-54, -26, 2):
        pen.line([(-70, t), (30, t)], _DARK, 4)
    pen.line([(-6, 34), (16, 92)], _DARK, 18)
    pen.ellipse(64, 46, 20, 20, fill=_WHITE, line=_DARK)


def _baseball(pen: _Pen) -> None:
    pen.polygon([(-86, 74), (-70, 90), (74, -60), (46, -88)], (96, 94, 92))
    pen.ellipse(52, 50, 36, 36, fill=_WHITE, line=_DARK)
    pen.arc(24, 50, 26, 30, -60, 60, _DARK, 7)
    pen.arc(80, 50, 26, 30, 120, 240, _DARK, 7)


def _golf(pen: _Pen) -> None:
    pen.ellipse(0, 66, 78, 22, fill=(150, 156, 152))
    pen.ellipse(-10, 66, 20, 7, fill=_DARK)
    pen.line([(-10, 66), (-10, -90)], _DARK, 9)
    pen.polygon([(-8, -92), (66, -64), (-8, -34)], _WHITE)
    pen.ellipse(48, 62, 12, 12, fill=_WHITE, line=_DARK)


def _hockey(pen: _Pen) -> None:
    pen.line([(-64, -90), (-4, 66), (66, 72)], _DARK, 18)
    pen.line([(64, -90), (4, 66), (-66, 72)], (110, 110, 114), 18)
    pen.ellipse(0, -60, 26, 14, fill=_DARK)


FACES: Mapping[str | None, Callable[[_Pen], None]] = MappingProxyType(
    {
        "happy": _happy,
        "sad": _sad,
        "angry": _angry,
        "surprised": _surprised,
        "bored": _bored,
        None: lambda pen: _eyes(pen, 8, 8),
    }
)
GAMES: Mapping[str | None, Callable[[_Pen], None]] = MappingProxyType(
    {
        "soccer": _soccer,
        "basketball": _basketball,
        "tennis": _tennis,
        "baseball": _baseball,
        "golf": _golf,
        "hockey": _hockey,
        None: lambda pen: pen.line([(-90, 0), (90, 0)], _WHITE, 8),
    }
)


# Materials: a pattern of light and shade that any colour can carry. --------------------------------------------------


def _grid(side: int) -> tuple[Float[np.ndarray, "s s"], Float[np.ndarray, "s s"]]:
    axis = np.linspace(-1, 1, side)
    return np.meshgrid(axis, axis)


def _wood(rng: np.random.Generator, side: int) -> np.ndarray:
    x, y = _grid(side)
    rings = np.sin(15 * y + 2.2 * np.sin(2.4 * x + rng.uniform(0, 6)) + rng.uniform(0, 6))
    return 0.93 + 0.34 * np.sign(rings) * np.abs(rings) ** 0.6


def _metal(rng: np.random.Generator, side: int) -> np.ndarray:
    x, y = _grid(side)
    sheen = np.sin(4.2 * (x + y) + rng.uniform(-0.6, 0.6))
    return 0.85 + 0.75 * np.clip(sheen, 0, 1) ** 2 - 0.35 * np.clip(-sheen, 0, 1)


def _glass(rng: np.random.Generator, side: int) -> np.ndarray:
    x, y = _grid(side)
    across = x - y + rng.uniform(-0.15, 0.15)
    return 0.95 + 1.0 * ((np.abs(across - 0.3) < 0.16) | (np.abs(across + 0.35) < 0.09))


def _stone(rng: np.random.Generator, side: int) -> np.ndarray:
    # A wall: rows of stones of different brightness, with dark joints.
    x, y = _grid(side)
    row = np.floor((y + 1) * 2.5).astype(int)
    along = (x + 1) * 1.6 + 0.5 * (row % 2) + rng.uniform(0, 1)
    stones = rng.choice((0.75, 1.0, 1.3), size=(8, 8))
    joint = ((y + 1) * 2.5 % 1 < 0.2) | (along % 1 < 0.12)
    return np.where(joint, 0.3, stones[row, np.floor(along).astype(int)])


def _fabric(rng: np.random.Generator, side: int) -> np.ndarray:
    x, y = _grid(side)
    phase = rng.uniform(0, 6)
    return 0.95 + 0.38 * np.sign(np.sin(13 * (x + y) + phase) * np.sin(13 * (x - y) + phase))


MATERIALS: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]] = MappingProxyType(
    {"wood": _wood, "metal": _metal, "glass": _glass, "stone": _stone, "fabric": _fabric}
)
_OPACITY = {"glass": 0.5}
"""Share of the thing's own look where the background shines through; 1 where not named."""


# Putting it together. -----------------------------------------------------------------------------------------------


def _smooth(rng: np.random.Generator, cells: int, side: int) -> np.ndarray:
    coarse = Image.fromarray(rng.uniform(0, 255, (cells, cells)).astype(np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255 - 0.5


def _background(rng: np.random.Generator) -> Float[np.ndarray, "h w 3"]:
    # Grey, barely tinted: colours belong to things, so that the ground truth stays exact.
    level = rng.uniform(70, 215)
    tint = level + rng.uniform(-7, 7, 3)
    relief = rng.uniform(0, 60) * _smooth(rng, int(rng.integers(2, 7)), IMAGE_SIZE)
    if rng.random() < 0.3:
        x, y = _grid(IMAGE_SIZE)
        a = rng.uniform(0, math.pi)
        relief = relief + rng.uniform(6, 16) * np.sign(np.sin(rng.uniform(6, 16) * (x * math.cos(a) + y * math.sin(a))))
    return (tint + relief[..., None]).astype(np.float32)


def _fill(thing: Thing, rng: np.random.Generator, side: int) -> Float[np.ndarray, "s s 3"]:
    if thing.color is not None:
        base = np.asarray(COLOR_RGB[thing.color], dtype=np.float32) * rng.uniform(0.9, 1.08) + rng.uniform(-9, 9, 3)
    else:
        base = np.full(3, rng.uniform(105, 190)) + rng.uniform(-5, 5, 3)
    pattern = np.ones((side, side)) if thing.material is None else MATERIALS[thing.material](rng, side)
    return (base * pattern[..., None]).astype(np.float32)


def _turned(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BILINEAR)


def _draw_thing(thing: Thing, side: int) -> tuple[Float[np.ndarray, "s s 3"], Float[np.ndarray, "s s"]]:
    """The thing's pixels and how much each covers the background."""
    rng = np.random.default_rng(thing.seed)
    angle = float(rng.uniform(-14, 14))
    mask_pen, parts_pen = _Pen(side, "L"), _Pen(side, "RGBA")
    parts_pen.image.paste((0, 0, 0, 0), (0, 0, side, side))
    if thing.kind == "object":
        outline, parts = (_blob(rng), _nothing) if thing.shape is None else OBJECTS[thing.shape]
        fill = _fill(thing, rng, side)
        outline(mask_pen)
        # Ink must show on any fill: dark on bright ones, white on dark ones.
        parts(parts_pen, _DARK if fill.mean() > 62 else _WHITE)
    else:
        face = thing.kind == "face"
        base = np.asarray(_FACE if face else _COURT, dtype=np.float32) * rng.uniform(0.86, 1.04)
        fill = np.broadcast_to(base.astype(np.float32), (side, side, 3))
        (mask_pen.ellipse(0, 0, 96, 96, fill=255) if face else mask_pen.box(-98, -98, 98, 98, fill=255))
        (FACES if face else GAMES)[thing.shape](parts_pen)
    mask = np.asarray(_turned(mask_pen.image, angle), dtype=np.float32) / 255
    over = np.asarray(_turned(parts_pen.image, angle), dtype=np.float32)
    ink = over[..., 3:] / 255
    pixels = fill * (1 - ink) + over[..., :3] * ink
    opacity = _OPACITY.get(thing.material or "", 1.0)
    cover = np.maximum(mask * opacity, ink[..., 0])
    return pixels, cover


def render(scene: Scene) -> Rendering:
    """Draw a scene; the same scene always gives the same pixels."""
    rng = np.random.default_rng(scene.seed)
    canvas = _background(rng)
    masks: list[np.ndarray] = []
    for thing in scene.things:
        side = round(thing.size * IMAGE_SIZE)
        left, top = (round(c * IMAGE_SIZE - side / 2) for c in thing.center)
        left, top = (int(np.clip(v, 0, IMAGE_SIZE - side)) for v in (left, top))
        pixels, cover = _draw_thing(thing, side)
        window = canvas[top : top + side, left : left + side]
        window += cover[..., None] * (pixels - window)
        mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
        mask[top : top + side, left : left + side] = cover > 0.3
        masks.append(mask)
    x, y = _grid(IMAGE_SIZE)
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.16)
    light = rng.uniform(0.82, 1.12) * (1 + slope * (x * math.cos(angle) + y * math.sin(angle)))
    warmth = 1 + rng.uniform(-0.03, 0.03) * np.array([1.0, 0.0, -1.0])
    grain = np.kron(rng.normal(0, rng.uniform(2, 9), (IMAGE_SIZE // 4, IMAGE_SIZE // 4)), np.ones((4, 4)))
    canvas = canvas * light[..., None] * warmth + grain[..., None]
    return Rendering(Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)), tuple(masks))
