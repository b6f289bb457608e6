"""The page of an SAE's features: one HTML file to look through, that stays quick with 65,536 of them."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sauce_hooks.errors import SAEFileError
from sauce_hooks.report.pictures import is_small_jpeg
from sauce_hooks.report.rendering import render, write_html
from sauce_hooks.sae.gallery import Gallery
from sauce_hooks.sae.vision_sae import DENSE_ABOVE, FeatureStats, VisionSAE

_TEMPLATE = "features.html.j2"
_BINS = 48
LARGEST_SIDE = 256
"""Pixels; a larger thumbnail is not put on the page."""
_NO_PICTURE = 2**16 - 1
"""The entry of a top image whose thumbnail is not on the page; so no more than as many thumbnails are."""


@dataclass(frozen=True)
class Headline:
    """One number of the whole SAE, and how to read it."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Bar:
    """One bin of a histogram."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Histogram:
    """How many features have which value, by log10 of it."""

    name: str
    meaning: str
    bars: tuple[Bar, ...]

    @property
    def tallest(self) -> int:
        """The largest count."""
        return max((bar.count for bar in self.bars), default=0)

    @property
    def ticks(self) -> list[float]:
        """Powers of ten within it, whole ones if there are enough."""
        if not self.bars:
            return []
        low, high = self.bars[0].low, self.bars[-1].high
        step = next(step for step in (1, 0.5, 0.1) if (high - low) / step >= 2 or step == 0.1)
        return [round(i * step, 1) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def histogram(name: str, meaning: str, values_f: Float[Tensor, " d_sae"]) -> Histogram:
    """The distribution of log10 |value| over the features where it is not 0 (the paper's Figure 4)."""
    values = np.abs(values_f.double().numpy())
    logs = np.log10(values[(values > 0) & np.isfinite(values)])
    if not len(logs):
        return Histogram(name, meaning, ())
    low, high = float(logs.min()), float(logs.max())
    counts, edges = np.histogram(logs, _BINS, (low, high) if high > low else (low - 0.5, high + 0.5))
    bars = (Bar(float(a), float(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True))
    return Histogram(name, meaning, tuple(bars))


def headlines(sae: VisionSAE) -> list[Headline]:
    """The numbers at the top of the page.

    Raises:
        SAEFileError: the SAE has no statistics.
    """
    stats = _stats_of(sae)
    found = [
        Headline(
            "Explained variance",
            _percent(stats.explained_variance),
            f"of the variance of {stats.n_rows:,} activations is in their reconstructions. The rest is the SAE's error, "
            "which an eraser keeps by default.",
        ),
        Headline(
            "L0",
            f"{stats.l0:,.1f}",
            f"features fire on a token on average, of {sae.d_sae:,}. Few are easier to read; many reconstruct better.",
        ),
        Headline(
            "Dead",
            _percent(stats.dead_share),
            f"of the features never fired on these {stats.n_rows:,} rows. Other images may wake some of them.",
        ),
        Headline(
            "Dense",
            _percent(stats.dense_share),
            f"of the features fire on more than {DENSE_ABOVE:.0%} of the rows. They hardly tell one row from another, and "
            "erasing one touches almost everything.",
        ),
    ]
    gallery = sae.gallery
    if gallery is not None and not math.isnan(gallery.null_similarity):  # of one image nothing is alike
        scores = gallery.monosemanticity_f[~gallery.monosemanticity_f.isnan()]
        found.append(
            Headline(
                "Monosemanticity",
                f"{float(scores.mean()):.3f}" if len(scores) else "–",
                f"mean over {len(scores):,} features of how alike the images are that one fires on. Any two of the "
                f"{gallery.n_images:,} images have {gallery.null_similarity:.3f}: what lies above that is the features'. "
                f"Likeness is the cosine of this embedding: {gallery.embedding}.",
            )
        )
    loss = stats.loss_added
    if loss is not None:
        found.append(
            Headline(
                "Loss added",
                f"{loss.added:+.4f}".replace("-", "−"),
                f"nats a token [{loss.added_low:+.4f}, {loss.added_high:+.4f}]".replace("-", "−")
                + " that the language model loses when reconstructions take the place of activations, from "
                f"{loss.original:.4f} ({loss.answers} answers, {loss.n_tokens:,} tokens, {loss.n_images:,} images). With "
                f"the mean activation everywhere it would be {loss.ablated:.4f}: of that damage "
                f"{_percent(loss.recovered).replace('-', '−')} is saved.",
            )
        )
    return found


def render_features(sae: VisionSAE, name: str) -> str:
    """The page as HTML, with all it needs inside.

    Args:
        sae: an SAE with statistics; what its gallery holds is shown too.
        name: what to call it.

    Raises:
        SAEFileError: the SAE has no statistics.
    """
    stats, gallery = _stats_of(sae), sae.gallery
    arrays = _scalars(stats, gallery)
    thumbnails, kept = "", 0
    if gallery is not None:
        small = {number: jpeg for number, jpeg in sorted(gallery.thumbnails.items()) if is_small_jpeg(jpeg, LARGEST_SIDE)}
        pictures = dict(list(small.items())[: _NO_PICTURE - 1])
        thumbnails, kept = _joined(list(pictures.values())), len(pictures)
        arrays |= _top(gallery, list(pictures)) | {"starts": _starts(list(pictures.values()))}
    largest = arrays.get("max")
    facts = {
        "features": sae.d_sae,
        "k": 0 if gallery is None else gallery.images_fk.shape[1],
        "dense": DENSE_ABOVE,
        "scored": gallery is not None,
        "largest": largest is not None,
        "concepts": [{"name": concept.name, "features": list(concept.features)} for concept in sae.concepts.values()],
    }
    return render(
        _TEMPLATE,
        name=name,
        sae=sae,
        gallery=gallery,
        wanted=0 if gallery is None else len(gallery.images_fk[gallery.images_fk >= 0].unique()),
        kept=kept,
        headlines=headlines(sae),
        histograms=[
            histogram("log₁₀ FS", "how often a feature fires: its share of the rows", stats.frequency_f),
            histogram(
                "log₁₀ FMAV", "how strongly it does: its mean over the rows on which it fires", stats.mean_when_active_f
            ),
        ],
        facts=facts,
        arrays={key: base64.b64encode(value.tobytes()).decode("ascii") for key, value in arrays.items()},
        thumbnails=thumbnails,
        version=version("sauce-hooks"),
    )


def write_features(sae: VisionSAE, path: str | Path, name: str) -> Path:
    """Write the page, whole or not at all; returns where it lies."""
    return write_html(render_features(sae, name), path)


def _stats_of(sae: VisionSAE) -> FeatureStats:
    if sae.stats is None:
        raise SAEFileError(
            "this SAE holds no statistics of its features: measure them with describe_sae(model, sae, images)"
        )
    return sae.stats


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f}%"


# The data of the page: little-endian arrays as base64, which the page reads in place. ---------------------------------


def _scalars(stats: FeatureStats, gallery: Gallery | None) -> dict[str, np.ndarray]:
    largest = stats.largest_f
    if largest is None and gallery is not None:
        largest = gallery.strengths_fk[:, 0]
    values = {
        "fs": stats.frequency_f,
        "fmav": stats.mean_when_active_f,
        "max": largest,
        "ms": None if gallery is None else gallery.monosemanticity_f,
    }
    return {key: value.float().numpy().astype("<f4") for key, value in values.items() if value is not None}


def _top(gallery: Gallery, kept: list[int]) -> dict[str, np.ndarray]:
    """Top images by their place among the kept thumbnails, and their strengths."""
    images, numbers = gallery.images_fk.numpy(), np.asarray([*kept, -2])  # no image has the number -2
    place = np.searchsorted(numbers[:-1], images)
    return {
        "top": np.where(numbers[place] == images, place, _NO_PICTURE).astype("<u2"),
        "strength": gallery.strengths_fk.float().numpy().astype("<f4"),
        "numbers": numbers[:-1].astype("<u4"),
    }


def _padded(size: int) -> int:
    return -(-size // 3) * 3


def _starts(pictures: list[bytes]) -> np.ndarray:
    """Where each picture begins in `_joined`, in characters; one more for where the last ends."""
    return np.cumsum([0, *(_padded(len(picture)) // 3 * 4 for picture in pictures)], dtype="<u4")


def _joined(pictures: list[bytes]) -> str:
    """All pictures as one base64 text of which each picture's part is base64 itself: each is a multiple of 3 bytes long.

    What follows a JPEG's end is not read.
    """
    padded: list[Any] = [picture.ljust(_padded(len(picture)), b"\0") for picture in pictures]
    return base64.b64encode(b"".join(padded)).decode("ascii")
