"""From two sets of images to a concept: the features that fire on the one and not on the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.activations import read_tokens
from sauce_hooks.bank import Concept
from sauce_hooks.concepts.scores import SCORERS, Scorer
from sauce_hooks.concepts.statistics import Pool, SetStatistics, accumulate, accumulate_labelled, pooled
from sauce_hooks.errors import ContrastError
from sauce_hooks.hookpoint import ReadTokens
from sauce_hooks.sae import VisionSAE
from sauce_hooks.sae.statistics import CHUNK

DEFAULT_K = 32


def set_statistics(
    model: nn.Module, sae: VisionSAE, images: Any, *, processor: Any = None, pool: Pool = "mean", batch_size: int = 64
) -> SetStatistics:
    """One streaming pass over a set of images; statistics of parts of a set add up with `+`.

    Args:
        model: the model whose tower the SAE belongs to.
        sae: the SAE; its `tokens.read` says which tokens of an image count.
        images: a folder, paths, PIL images, a dataset, shards, or batches of model inputs.
        processor: the model's processor.
        pool: how an image's tokens become one activation a feature: their "mean" or "max", or the "class" or "last" token
            alone.
        batch_size: images a forward of the tower.

    Raises:
        ContrastError: an unknown way of pooling.
        ImagesError: no image can be read.
        TokenPolicyError: this tower has no class token.
    """
    return accumulate(_encoded(model, sae, images, processor, pool, batch_size))


def labelled_statistics(
    model: nn.Module,
    sae: VisionSAE,
    images: Any,
    labels: Sequence[Collection[str]],
    concepts: Sequence[str] | None = None,
    *,
    processor: Any = None,
    pool: Pool = "mean",
    batch_size: int = 64,
) -> dict[str, tuple[SetStatistics, SetStatistics]]:
    """The two sets of many concepts from one pass over images whose labels are known; `learn_concept` takes them.

    Args:
        model: as in `set_statistics`, like the rest that is not named here.
        sae: the SAE.
        images: every one of them must be readable.
        labels: the concepts that each image shows.
        concepts: those wanted; by default every label.
        processor: the model's processor.
        pool: how an image's tokens become one activation a feature.
        batch_size: images a forward of the tower.

    Returns:
        Of each concept the statistics of the images that show it, and of the others.

    Raises:
        ContrastError: images and labels differ in number, or all or none of the images show a concept.
    """
    wanted = sorted({name for names in labels for name in names}) if concepts is None else concepts
    return accumulate_labelled(_encoded(model, sae, images, processor, pool, batch_size), labels, wanted)


def _encoded(
    model: nn.Module, sae: VisionSAE, images: Any, processor: Any, pool: Pool, batch_size: int
) -> Iterator[Float[Tensor, "batch d_sae"]]:
    """The pooled activations of images, a batch at a time."""
    if pool not in get_args(Pool):
        raise ContrastError(f"unknown pool {pool!r}; it is one of {', '.join(get_args(Pool))}")
    place = sae.locate(model)
    tokens = sae.tokens.read if pool in ("mean", "max") else cast(ReadTokens, pool)
    for acts_btd in read_tokens(model, images, place, tokens=tokens, processor=processor, batch_size=batch_size):
        some = max(1, CHUNK // (acts_btd.shape[1] * sae.d_sae))  # z of all tokens of a batch could fill the memory
        yield torch.cat([pooled(sae.encode(part), pool).cpu() for part in acts_btd.split(some)])


def select_features(scores_f: Float[Tensor, " d_sae"], k: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The `k` best features with a positive score, best first (Eq. 5); ties go to the lower index."""
    order = torch.argsort(scores_f, descending=True, stable=True)[:k]
    chosen = [int(i) for i in order if scores_f[i] > 0]
    return tuple(chosen), tuple(float(scores_f[i]) for i in chosen)


def learn_concept(
    model: nn.Module,
    sae: VisionSAE,
    name: str,
    positives: Any,
    negatives: Any,
    *,
    processor: Any = None,
    scorer: str | Scorer = "sauce",
    k: int = DEFAULT_K,
    gamma: float | None = None,
    pool: Pool = "mean",
    batch_size: int = 64,
) -> Concept:
    """Select the features of a concept by contrast, and store them in `sae.concepts`.

    Args:
        model: the model whose tower the SAE belongs to.
        sae: the SAE; its `tokens.read` says which tokens of an image count.
        name: the concept's name, as it will be given to `ConceptEraser`.
        positives: images that show the concept; a folder, paths, PIL images, ... or their `SetStatistics`, so that one
            set can serve many concepts.
        negatives: images that do not, likewise.
        processor: the model's processor.
        scorer: a name in `SCORERS` ("sauce": Eq. 4), or a function of the two sets' statistics: a score for every feature.
        k: how many features at the most; fewer are taken if fewer score above zero.
        gamma: the factor this concept wants; None leaves it to the eraser.
        pool: how an image's tokens become one activation a feature: "mean", "max", "class" or "last".
        batch_size: images a forward of the tower.

    Raises:
        ContrastError: no feature tells the sets apart (for example because they are the same); an unknown scorer or pool.
        ImagesError: a set is empty or wholly unreadable.
    """
    if k < 1:
        raise ContrastError(f"k={k}: at least one feature must be chosen")
    if isinstance(scorer, str) and scorer not in SCORERS:
        raise ContrastError(
            f"unknown scorer {scorer!r}; known: {', '.join(SCORERS)}. Or give a function of two SetStatistics."
        )
    stats = [
        images
        if isinstance(images, SetStatistics)
        else set_statistics(model, sae, images, processor=processor, pool=pool, batch_size=batch_size)
        for images in (positives, negatives)
    ]
    score = SCORERS[scorer] if isinstance(scorer, str) else scorer
    features, scores = select_features(score(*stats), k)
    if not features:
        raise ContrastError(
            f"no feature fires more for {name!r} than without it ({stats[0].n} images with, {stats[1].n} without). "
            "Are the two sets the same, or swapped? Does the SAE read the tokens that show the concept?"
        )
    concept = Concept(
        name=name,
        features=features,
        scores=scores,
        gamma=gamma,
        provenance={
            "scorer": scorer if isinstance(scorer, str) else getattr(scorer, "__name__", repr(scorer)),
            "k": k,
            "pool": pool,
            "positives": stats[0].n,
            "negatives": stats[1].n,
            "tokens": sae.tokens.read,
        },
    )
    sae.concepts.add(concept)
    return concept
