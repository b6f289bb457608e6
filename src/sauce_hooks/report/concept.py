"""The page of one concept: what it is made of, where that fires, what erasing it writes. One HTML file, no script."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from sauce_hooks.bank import Concept, Rate
from sauce_hooks.erasure import PAPER_GAMMA
from sauce_hooks.errors import EditError
from sauce_hooks.evaluation import METRICS
from sauce_hooks.evaluation.metrics import rate
from sauce_hooks.report.concept_data import MOST_IMAGES, SHOWN_FEATURES, Evidence, Seen, siblings_of
from sauce_hooks.report.features import LARGEST_SIDE
from sauce_hooks.report.figures import AIMS, Figure
from sauce_hooks.report.pictures import is_small_jpeg, jpeg_data_uri, png_data_uri, tint
from sauce_hooks.report.plots import Roc, Values, ordered, roc, setting, tradeoff
from sauce_hooks.report.rendering import figure_text, number, percent, render, short, spoken, write_html
from sauce_hooks.sae import VisionSAE

_TEMPLATE = "concept.html.j2"
_TOP, _FALSE = 6, 3
"""Images of a feature: those on which it is strongest of all, and of those without the concept."""
_MAPS_WITH, _MAPS_WITHOUT = 6, 4
"""Images with the concept whose change is drawn, the first ones; and without it, those that change most."""
_SIBLINGS, _NAMES, _POINTS, _NUMBERS = 12, 8, 300, 200
"""Rows of a list, names in a line, points of a curve, indices in a line: a stranger's bank may hold any number."""
_FINEST = 64
"""Rows and columns of a heat map; finer grids are averaged."""


@dataclass(frozen=True)
class Shown:
    """A picture, perhaps with a map over it."""

    picture: int
    """Its place among the page's pictures."""
    heat: str | None
    """The map as a data URI."""
    label: str
    alt: str
    holds: bool
    """Whether it is one of the images with the concept."""


@dataclass(frozen=True)
class FeatureView:
    """One feature of the concept."""

    index: int
    score: float | None
    facts: tuple[tuple[str, str], ...]
    also_in: tuple[str, ...]
    """Other concepts of the bank that use it; the first few."""
    more: int
    """How many others besides."""
    top: tuple[Shown, ...] = ()
    false: tuple[Shown, ...] = ()
    """The strongest of the images without the concept."""
    detector: Roc | None = None
    fires: tuple[Rate, Rate] | None = None
    """Shares of the images with and without the concept on which it fires at all."""


@dataclass(frozen=True)
class EffectRow:
    """One metric, before and while the concept is erased."""

    name: str
    meaning: str
    aim: str
    before: Figure | None
    after: Figure | None


@dataclass
class Album:
    """The pictures of a page, each once however often it is shown."""

    pictures: list[str] = field(default_factory=list[str])
    _known: dict[Any, int] = field(default_factory=dict[Any, int])

    def add(self, picture: Image.Image | str) -> int:
        """A picture, or the data URI of one; returns its place."""
        key = picture if isinstance(picture, str) else id(picture)
        if key not in self._known:
            self._known[key] = len(self.pictures)
            self.pictures.append(picture if isinstance(picture, str) else jpeg_data_uri(picture))
        return self._known[key]


@dataclass(frozen=True)
class Cell:
    """A number of a table, and how strongly it is tinted."""

    text: str
    share: float


@dataclass(frozen=True)
class MatrixRow:
    """What one feature does on the images of each set."""

    name: str
    cells: tuple[Cell, ...]


def render_concept(sae: VisionSAE, concept: Concept, evidence: Evidence | None = None, *, sae_name: str = "the SAE") -> str:
    """The page as HTML, with all it needs inside; under 5 MB whatever the images.

    Args:
        sae: the SAE whose features the concept names. Its bank says what is near; its statistics and gallery are shown
            where there is no evidence from images.
        concept: the concept.
        evidence: what `look` measured on images; without it the page shows what is known without them.
        sae_name: what to call the SAE.

    Raises:
        EditError: the concept's features are not this SAE's.
    """
    if concept.features and max(concept.features) >= sae.d_sae:
        raise EditError(
            f"{concept.name!r} names feature {max(concept.features)}, but this SAE has only {sae.d_sae}: another SAE's "
            "concept?"
        )
    album = Album()
    effect = concept.effect
    curve = () if effect is None else effect.curve
    panels = [] if effect is None else [tradeoff(m, curve[:_POINTS], effect.original) for m in ("SRA", "IRA")]
    siblings = siblings_of(sae, concept)
    return render(
        _TEMPLATE,
        {"number": number, "figure": figure_text, "percent": percent, "short": short},
        concept=concept,
        name=short(concept.name),
        sae=sae,
        sae_name=short(sae_name),
        facts=_facts(concept),
        provenance=[(short(str(k)), short(spoken(v))) for k, v in list(concept.provenance.items())[:40]],
        effect=effect,
        effect_rows=_effect_rows(concept),
        panels=[panel for panel in panels if panel is not None],
        settings=[(point.chosen, setting(point)) for point in curve[:_POINTS]],
        dropped=max(0, len(curve) - _POINTS),
        evidence=evidence,
        most_images=MOST_IMAGES,
        features=_features(sae, concept, evidence, album),
        hidden=concept.features[SHOWN_FEATURES:][:_NUMBERS],
        separation=[] if evidence is None else _separation(concept, evidence),
        maps=None if evidence is None else _maps(evidence, album),
        siblings=[s for s in siblings if s.shared or s.cosine is not None][:_SIBLINGS],
        n_others=len(siblings),
        weights=_weights(sae, concept),
        columns=[] if evidence is None else ["with it", "without it", *map(short, evidence.siblings)],
        matrix=[] if evidence is None else _matrix(concept, evidence),
        pictures=album.pictures,
        gallery=sae.gallery,
        version=version("sauce-hooks"),
    )


def write_concept(
    sae: VisionSAE, concept: Concept, path: str | Path, evidence: Evidence | None = None, *, sae_name: str = "the SAE"
) -> Path:
    """Write the page, whole or not at all; returns where it lies. The arguments are those of `render_concept`."""
    return write_html(render_concept(sae, concept, evidence, sae_name=sae_name), path)


def _facts(concept: Concept) -> list[tuple[str, str]]:
    """How it wants to be erased."""
    gamma = f"left to the eraser ({number(PAPER_GAMMA)} by default)" if concept.gamma is None else number(concept.gamma)
    space = "anywhere in the residual stream"
    if concept.subspace is not None:
        n = len(concept.subspace.basis_rd)
        directions = "one direction" if n == 1 else f"{n} directions"
        space = f"only along {directions}" if concept.subspace.inside else f"anywhere but along {directions}"
    facts = [
        ("Features (k)", f"{len(concept.features):,}"),
        ("Factor γ", gamma),
        ("Edit", "left to the eraser (scale, Eq. 6, by default)" if concept.edit is None else short(concept.edit)),
        ("Writes", space),
        ("Norm of an edited token", "given back" if concept.keep_norm else "as the edit leaves it"),
    ]
    if concept.edit in ("gated", "clamp", "replace"):
        facts.append(("Gate", f"acts above each feature's mean, in images where more than {percent(concept.share)} pass"))
    if concept.projection is not None:
        facts.append(("Dense projection", f"{len(concept.projection.left_rd)} directions; no feature plays a part"))
    return facts


def _effect_rows(concept: Concept) -> list[EffectRow]:
    effect = concept.effect
    if effect is None:
        return []
    return [
        EffectRow(
            short(name),
            METRICS.get(name, ""),
            {"low": "low is good", "chance": "50 means nothing is left to tell"}.get(AIMS.get(name, ""), "high is good"),
            Figure.of(effect.original[name]) if name in effect.original else None,
            Figure.of(found),
        )
        for name, found in ordered(effect.figures)[: 2 * _SIBLINGS]
    ]


def _weights(sae: VisionSAE, concept: Concept) -> str:
    if concept.means:
        return "the mean activation over the concept's own images"
    return "1, for want of anything better" if sae.stats is None else "its mean activation where it fires (FMAV)"


# Features. ------------------------------------------------------------------------------------------------------------


def _features(sae: VisionSAE, concept: Concept, evidence: Evidence | None, album: Album) -> list[FeatureView]:
    scores = dict(zip(concept.features, concept.scores, strict=False))
    users: dict[int, list[str]] = {}
    for other in sae.concepts.values():
        for feature in other.features if other.name != concept.name else ():
            users.setdefault(feature, []).append(short(other.name))
    views: list[FeatureView] = []
    for place, index in enumerate(concept.features[:SHOWN_FEATURES]):
        others = users.get(index, [])
        known = (index, scores.get(index), _feature_facts(sae, concept, place), tuple(others[:_NAMES]))
        more = max(0, len(others) - _NAMES)
        if evidence is None:
            views.append(FeatureView(*known, more, top=_from_gallery(sae, index, album)))
        else:
            views.append(FeatureView(*known, more, *_on_images(concept, evidence, place, album)))
    return views


def _feature_facts(sae: VisionSAE, concept: Concept, place: int) -> tuple[tuple[str, str], ...]:
    index, facts = concept.features[place], list[tuple[str, str]]()
    if sae.stats is not None:
        facts.append(("fires on", f"{percent(float(sae.stats.frequency_f[index]))} of training rows"))
        facts.append(("FMAV", number(float(sae.stats.mean_when_active_f[index]))))
    if sae.gallery is not None and not math.isnan(score := float(sae.gallery.monosemanticity_f[index])):
        null = number(sae.gallery.null_similarity)
        facts.append(("monosemanticity", f"{number(score)} (any two images: {null})"))
    if concept.gates:
        facts.append(("gate", number(concept.gates[place])))
    return tuple(facts)


def _from_gallery(sae: VisionSAE, index: int, album: Album) -> tuple[Shown, ...]:
    """The feature's top images as the SAE's folder holds them."""
    gallery, found = sae.gallery, list[Shown]()
    if gallery is None:
        return ()
    strengths = zip(gallery.images_fk[index].tolist(), gallery.strengths_fk[index].tolist(), strict=True)
    for image, strength in list(strengths)[:_TOP]:
        jpeg = gallery.thumbnails.get(image)
        if jpeg is not None and is_small_jpeg(jpeg, LARGEST_SIDE) and len(jpeg) < 2**14:
            place = album.add("data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii"))
            found.append(Shown(place, None, number(strength), f"Image {image}, activation {number(strength)}.", holds=False))
    return tuple(found)


def _on_images(concept: Concept, evidence: Evidence, place: int, album: Album) -> tuple[Any, ...]:
    """`top`, `false`, `detector` and `fires` of a `FeatureView`."""
    with_it = [(seen, None, True) for seen in evidence.positives.images]
    without = [(seen, name, False) for name, s in evidence.everywhere.items() for seen in s.images]

    def strongest(images: list[tuple[Seen, str | None, bool]], n: int) -> list[tuple[Seen, str | None, bool]]:
        firing = [entry for entry in images if entry[0].peak_s[place] > 0]
        return sorted(firing, key=lambda entry: -float(entry[0].peak_s[place]))[:n]

    top, false = strongest([*with_it, *without], _TOP), strongest(without, _FALSE)
    scale = max((float(seen.peak_s[place]) for seen, *_ in (*top, *false)), default=0.0)

    def shown(seen: Seen, set_name: str | None, holds: bool) -> Shown:
        strength = number(float(seen.peak_s[place]))
        kind = f"with {concept.name}" if holds else f"of {set_name}" if set_name else f"without {concept.name}"
        alt = short(f"An image {kind}; activation {strength} on its strongest patch.")
        label = strength if holds or set_name is None else f"{strength} {short(set_name)}"
        heat = _heat(seen, seen.z_ts[:, place].numpy(), scale)
        return Shown(album.add(seen.image), heat, label, alt, holds)

    means = [
        np.array([float(s.mean_k[place]) for s in images.images]) for images in (evidence.positives, evidence.negatives)
    ]
    detector = roc("its mean activation", "", *means)
    fires = tuple(rate((values > 0).tolist()) for values in means)
    return tuple(shown(*entry) for entry in top), tuple(shown(*entry) for entry in false), detector, fires


def _heat(seen: Seen, strength_t: Float[np.ndarray, " t"], strongest: float) -> str | None:
    if seen.grid is None:
        return None
    strength = strength_t.reshape(seen.grid)
    if max(seen.grid) > _FINEST:
        rows, columns = (min(_FINEST, side) for side in seen.grid)
        strength = np.asarray(Image.fromarray(strength.astype(np.float32)).resize((columns, rows), Image.Resampling.BOX))
    return png_data_uri(tint(strength, strongest))


# The edit, and the two sets. ------------------------------------------------------------------------------------------


def _separation(concept: Concept, evidence: Evidence) -> list[Roc]:
    def values(what: str) -> tuple[Values, Values]:
        with_it, without = (
            np.array([getattr(seen, what) for seen in images.images]) for images in (evidence.positives, evidence.negatives)
        )
        return with_it, without

    change = roc("What the edit writes", "‖x′ − x‖ / ‖x‖, the mean over the image's patches", *values("change"))
    if not concept.features:
        return [change]
    summed = "Σ z, all its features together, the mean over the image's patches"
    return [roc("How strongly the concept fires", summed, *values("summed")), change]


@dataclass(frozen=True)
class ChangeMaps:
    """Where the edit writes, on images with the concept and without it."""

    with_it: tuple[Shown, ...]
    without: tuple[Shown, ...]
    strongest: float
    """The change that gets the full colour."""
    means: tuple[float, float]
    """Mean change of a patch on all images with it, and without it."""
    touched: tuple[float, float]
    """Share of the patches that change at all."""


def _maps(evidence: Evidence, album: Album) -> ChangeMaps:
    first = evidence.positives.images[:_MAPS_WITH]
    elsewhere = [(seen, name) for name, images in evidence.everywhere.items() for seen in images.images]
    worst = sorted(elsewhere, key=lambda entry: -entry[0].change)[:_MAPS_WITHOUT]
    strongest = max(float(seen.change_t.max()) for seen in (*first, *(seen for seen, _ in worst)))

    def shown(seen: Seen, name: str | None, holds: bool) -> Shown:
        label = f"{percent(seen.change)} {short(name or '')}".strip()
        alt = f"Change of {percent(seen.change)} on average, {percent(float(seen.change_t.max()))} where it is largest."
        return Shown(album.add(seen.image), _heat(seen, seen.change_t.numpy(), strongest), label, alt, holds)

    sets = (evidence.positives.images, evidence.negatives.images)
    mean_with, mean_without = (float(np.mean([seen.change for seen in images])) for images in sets)
    touched_with, touched_without = (
        float(np.mean([float((seen.change_t > 0).float().mean()) for seen in images])) for images in sets
    )
    return ChangeMaps(
        tuple(shown(seen, None, True) for seen in first),
        tuple(shown(seen, name, False) for seen, name in worst),
        strongest,
        (mean_with, mean_without),
        (touched_with, touched_without),
    )


def _matrix(concept: Concept, evidence: Evidence) -> list[MatrixRow]:
    """Mean activation of each shown feature on each set of images, then what the edit writes there."""
    sets = [evidence.positives.images, *(images.images for images in evidence.everywhere.values())]

    def row(name: str, values: list[float], texts: list[str]) -> MatrixRow:
        largest = max(values)
        return MatrixRow(
            name,
            tuple(Cell(t, round(v / largest, 3) if largest > 0 else 0.0) for t, v in zip(texts, values, strict=True)),
        )

    rows: list[MatrixRow] = []
    for place, index in enumerate(concept.features[:SHOWN_FEATURES]):
        means = [float(np.mean([float(seen.mean_k[place]) for seen in images])) for images in sets]
        rows.append(row(f"feature {index}", means, [number(value) for value in means]))
    changes = [float(np.mean([seen.change for seen in images])) for images in sets]
    return [*rows, row("what the edit writes", changes, [percent(value) for value in changes])]
