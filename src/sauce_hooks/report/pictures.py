"""Pictures for a page: as data URIs, with a patch marked, with a change laid over."""

from __future__ import annotations

import base64
import io
import warnings

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

CHANGE_RGB = (226, 74, 26)
"""The colour of the strongest change; the page's legend uses it too."""
_OPACITY = (0.15, 0.8)
"""How opaque the weakest change is (enough not to be taken for none) and the strongest (not so much as to hide the
picture)."""


def png_data_uri(image: Image.Image) -> str:
    """A picture as text that an `img` shows without asking anybody for it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def jpeg_data_uri(image: Image.Image, quality: int = 80) -> str:
    """The same as a JPEG: a tenth of the size for photos, and not exact."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def is_small_jpeg(picture: bytes, largest_side: int) -> bool:
    """Whether a browser can show it cheaply; a file of a stranger may hold anything. Reads the header only."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(picture), formats=["JPEG"]) as image:
            warnings.simplefilter("ignore")
            return max(image.size) <= largest_side
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A copy whose longer side is `side` pixels; smaller pictures stay as they are."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def mark_patch(image: Image.Image, patch: tuple[float, float, float, float]) -> Image.Image:
    """A copy with a frame around a patch given in shares of the sides: white edged with black, seen on any ground."""
    marked = image.convert("RGB")
    left, top, right, bottom = (round(share * side) for share, side in zip(patch, (*image.size, *image.size), strict=True))
    draw = ImageDraw.Draw(marked)
    draw.rectangle((left - 1, top - 1, right, bottom), outline=(0, 0, 0), width=4)
    draw.rectangle((left, top, right - 1, bottom - 1), outline=(255, 255, 255), width=2)
    return marked


def overlay_change(image: Image.Image, change: Float[np.ndarray, "rows columns"], strongest: float) -> Image.Image:
    """The picture in grey, each patch tinted by how much it changes; a patch that does not change keeps no tint.

    Args:
        image: the picture, which the patches tile.
        change: the change of each patch, not negative.
        strongest: the change that gets the full colour, so that several pictures share one scale.
    """
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float64)
    alpha = _opacity(change, strongest)
    rows = np.arange(image.height) * change.shape[0] // image.height
    columns = np.arange(image.width) * change.shape[1] // image.width
    alpha_hw1 = alpha[rows][:, columns, None]
    return Image.fromarray((grey * (1 - alpha_hw1) + np.array(CHANGE_RGB) * alpha_hw1).round().astype(np.uint8))


def tint(strength: Float[np.ndarray, "rows columns"], strongest: float) -> Image.Image:
    """What `overlay_change` lays over a picture, by itself: one pixel a patch, transparent where the strength is 0."""
    rgba = np.empty((*strength.shape, 4), dtype=np.uint8)
    rgba[..., :3] = CHANGE_RGB
    rgba[..., 3] = (255 * _opacity(strength, strongest)).round()
    rgba[rgba[..., 3] == 0] = 0
    return Image.fromarray(rgba)


def _opacity(strength: Float[np.ndarray, "rows columns"], strongest: float) -> Float[np.ndarray, "rows columns"]:
    share = np.clip(strength / strongest, 0, 1) if strongest > 0 else np.zeros_like(strength)
    low, high = _OPACITY
    return np.where(strength > 0, low + (high - low) * share, 0.0)
