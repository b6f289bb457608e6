"""What a concept's features and its edit do on images, measured for its page. Images go in, plain data comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from sauce_hooks.activations import BrokenImage, read_batch
from sauce_hooks.activations.images import NEEDS_PROCESSOR, Prepare, judge, open_image
from sauce_hooks.activations.sources import Batches, find_source, iter_items
from sauce_hooks.bank import Concept
from sauce_hooks.erasure import PAPER_GAMMA, ConceptEraser, MergedEdit
from sauce_hooks.erasure.edit import confined
from sauce_hooks.errors import ImagesError
from sauce_hooks.hookpoint import TokenLayout, unwrap
from sauce_hooks.report.pictures import thumbnail
from sauce_hooks.sae import VisionSAE
from sauce_hooks.sae.statistics import CHUNK

SHOWN_FEATURES = 12
"""Features that get a card of their own, and maps of where they fire; the best-scored ones."""
MOST_IMAGES = 400
"""Images of each set that are looked at."""
SIDE = 128
"""Pixels of a picture on the page."""

Edit = Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]


@dataclass(frozen=True, eq=False)
class Seen:
    """One image, and what it does to a concept's features. k features, t patches."""

    image: Image.Image
    """As small as the page shows it; as the model is given it (cut, scaled) where that can be told."""
    grid: tuple[int, int] | None
    """Rows and columns of patches that tile the picture; None where that is not known."""
    mean_k: Float[Tensor, " k"] = field(repr=False)
    """Mean |z| of each feature over the patches."""
    z_ts: Float[Tensor, "t shown"] = field(repr=False)
    """|z| of the first `SHOWN_FEATURES` features on every patch."""
    change_t: Float[Tensor, " t"] = field(repr=False)
    """‖x′ − x‖ / ‖x‖ of every patch when the concept is erased."""

    @property
    def summed(self) -> float:
        """Σ z_i over all features of the concept, mean over the patches."""
        return float(self.mean_k.sum())

    @property
    def change(self) -> float:
        """Mean over the patches of ‖x′ − x‖ / ‖x‖."""
        return float(self.change_t.mean())

    @property
    def peak_s(self) -> Float[Tensor, " shown"]:
        """The largest |z| on a patch."""
        return self.z_ts.amax(0)


@dataclass(frozen=True)
class SeenSet:
    """The images of one set."""

    images: tuple[Seen, ...]
    broken: tuple[BrokenImage, ...] = ()
    """Those that could not be read."""
    cut: bool = False
    """Whether there were more than `MOST_IMAGES`."""


@dataclass(frozen=True)
class Evidence:
    """All that was measured on images."""

    positives: SeenSet
    negatives: SeenSet
    siblings: Mapping[str, SeenSet] = field(default_factory=dict[str, SeenSet])
    """Images of other concepts, by name."""
    source: str = "the images given"
    """What images they are, in words."""

    @property
    def everywhere(self) -> dict[str | None, SeenSet]:
        """Every set that lacks the concept: the negatives (None), and the siblings by name."""
        return {None: self.negatives, **self.siblings}


def written_edit(model: nn.Module, sae: VisionSAE, concept: Concept) -> Edit:
    """What erasing the concept does to the tokens of images, [b, t, d] to [b, t, d]."""
    return MergedEdit([ConceptEraser(model, sae, [concept]).edit])


@torch.no_grad()
def look(
    model: nn.Module,
    sae: VisionSAE,
    concept: Concept,
    positives: Any,
    negatives: Any,
    siblings: Mapping[str, Any] | None = None,
    *,
    processor: Any,
    source: str = "the images given",
    batch_size: int = 32,
) -> Evidence:
    """Run images through the tower and see where a concept's features fire and what its edit writes.

    Only patches are looked at, whatever tokens the SAE was trained on. The model is left as it was.

    Args:
        model: the model whose tower the SAE belongs to.
        sae: the SAE.
        concept: the concept; it need not be in the SAE's bank.
        positives: images that show it: a folder, paths, PIL images, a dataset; no batches of model inputs.
        negatives: images that do not, likewise.
        siblings: images of other concepts that do not show this one, by name.
        processor: the model's processor.
        source: what images these are, in words, for the page.
        batch_size: images a forward of the tower.

    Raises:
        EditError: the concept's features are not this SAE's.
        ImagesError: a set is empty or wholly unreadable.
        SAEMismatchError: the SAE belongs to another tower.
    """
    edit = written_edit(model, sae, concept)

    def seen(images: Any) -> SeenSet:
        return _look_at(model, sae, concept, edit, images, processor, batch_size)

    others = {name: seen(images) for name, images in (siblings or {}).items()}
    return Evidence(seen(positives), seen(negatives), others, source)


def _look_at(
    model: nn.Module, sae: VisionSAE, concept: Concept, edit: Edit, images: Any, processor: Any, batch_size: int
) -> SeenSet:
    if processor is None:
        raise ImagesError(NEEDS_PROCESSOR)
    source = find_source(images)
    if isinstance(source, Batches):
        raise ImagesError("a page shows pictures, and batches of model inputs hold none: give the images themselves")
    place, root, prepare = sae.locate(model), unwrap(model), Prepare(processor)
    items = iter(iter_items(source))
    some = islice(items, MOST_IMAGES)
    found, broken = list[Seen](), list[BrokenImage]()
    while chunk := list(islice(some, batch_size if place.layout.fixed else 1)):
        batch = prepare(chunk)
        broken += batch.broken
        if batch.inputs is None:
            continue
        acts_btd = read_batch(root, batch.inputs, place, tokens="patches")
        pictures = as_seen(batch.inputs.get("pixel_values"), processor) if place.layout.fixed else None
        if pictures is None or len(pictures) != len(acts_btd):  # nobody knows how the patches lie in these
            content = {item.index: item.content for item in chunk}
            pictures, size = [open_image(content[int(i)]) for i in batch.indices], None
        else:
            size = pictures[0].size
        grid = None if size is None else patch_grid(place.layout, acts_btd.shape[1], *size)
        measured = _measure(sae, concept, edit, acts_btd)
        found += [Seen(thumbnail(p, SIDE), grid, *tensors) for p, tensors in zip(pictures, measured, strict=True)]
    judge(len(found) + len(broken), len(broken), broken)
    return SeenSet(tuple(found), tuple(broken), cut=next(items, None) is not None)


def _measure(
    sae: VisionSAE, concept: Concept, edit: Edit, acts_btd: Float[Tensor, "b t d"]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each image: mean |z| of every feature, |z| of the shown ones on every patch, and the relative change."""
    features = list(concept.features)
    x_btd = acts_btd.float()
    moved_btd = edit(acts_btd).float() - x_btd
    change_bt = (moved_btd.norm(dim=-1) / x_btd.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)).cpu()
    rows_nd = acts_btd.flatten(0, 1)
    # z of all tokens of a batch could fill the memory.
    parts = (sae.encode(part)[:, features].abs().float().cpu() for part in rows_nd.split(max(1, CHUNK // sae.d_sae)))
    z_btk = torch.cat(list(parts)).view(*acts_btd.shape[:2], len(features))
    for z_tk, change_t in zip(z_btk, change_bt, strict=True):
        yield z_tk.mean(0), z_tk[:, :SHOWN_FEATURES].clone(), change_t


def as_seen(pixels: Any, processor: Any) -> list[Image.Image] | None:
    """Pictures as the model is given them, from its own input: patches lie in these as in no other version of the image.

    None where the input is no plain batch of normalised RGB pictures.
    """
    process = getattr(processor, "image_processor", processor)
    mean, std = getattr(process, "image_mean", None), getattr(process, "image_std", None)
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != 3 or mean is None or std is None:
        return None
    if getattr(process, "do_normalize", True):
        pixels = pixels.float() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    bytes_bhwc = (pixels.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in bytes_bhwc]


def patch_grid(layout: TokenLayout, n_patches: int, width: int, height: int) -> tuple[int, int] | None:
    """Rows and columns of square patches that tile a picture, row by row; None where they can't, or lie otherwise."""
    if not layout.fixed or layout.tiles_in_row is not None:
        return None
    rows = max(1, round(math.sqrt(n_patches * height / width)))
    columns = n_patches // rows
    return (rows, columns) if rows * columns == n_patches and abs(rows * width / height - columns) < 1 else None


# What the bank alone says. --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sibling:
    """Another concept of the bank, and how near it is."""

    name: str
    n_features: int
    shared: tuple[int, ...]
    """Features that both have."""
    cosine: float | None
    """Of the directions that the two erasures write; None where one of them writes none that is known without images."""


def written_direction(sae: VisionSAE, concept: Concept) -> Float[Tensor, " d_in"] | None:
    """Σ (γ − 1) z̄_i W_dec[i], kept to the edit's subspace: what the edit adds to a patch on which the concept is seen.

    z̄ is `Concept.means` where it has them, the features' FMAV where the SAE has statistics, else 1.
    None for a concept without features of this SAE, or if nothing is written.
    """
    gamma = PAPER_GAMMA if concept.gamma is None else concept.gamma
    if not concept.features or max(concept.features) >= sae.d_sae or concept.projection is not None:
        return None
    features_k = torch.tensor(concept.features)
    if concept.means:
        mean_k = torch.tensor(concept.means, dtype=torch.float64)
    elif sae.stats is not None:
        mean_k = sae.stats.mean_when_active_f[features_k].double()
    else:
        mean_k = torch.ones(len(features_k), dtype=torch.float64)
    rows_kd = sae.sae.W_dec.detach()[features_k.to(sae.sae.W_dec.device)].cpu().double()
    direction_d = confined((gamma - 1) * mean_k @ rows_kd, concept.subspace)
    return direction_d if float(direction_d.norm()) > 0 else None


def siblings_of(sae: VisionSAE, concept: Concept, others: Sequence[Concept] | None = None) -> list[Sibling]:
    """The other concepts of the bank, nearest first: those that share features, then by the size of the cosine."""
    here_d = written_direction(sae, concept)
    found: list[Sibling] = []
    for other in sae.concepts.values() if others is None else others:
        if other.name == concept.name:
            continue
        there_d = written_direction(sae, other)
        cosine = None
        if here_d is not None and there_d is not None:
            cosine = float(nn.functional.cosine_similarity(here_d, there_d, dim=0))
        shared = tuple(f for f in concept.features if f in set(other.features))
        found.append(Sibling(other.name, len(other.features), shared, cosine))
    return sorted(found, key=lambda s: (-len(s.shared), -abs(s.cosine or 0.0), s.name))
