"""From two sets of images to a concept: the features that fire on the one and not on the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sauce_hooks.activations import read_tokens
from sauce_hooks.activations.sources import is_inputs
from sauce_hooks.bank import Concept, Subspace
from sauce_hooks.concepts.scores import SCORERS, Scorer
from sauce_hooks.concepts.siblings import ROUNDING, left_out, worst_contrast
from sauce_hooks.concepts.statistics import (
    LabelledStatistics,
    Pool,
    SetStatistics,
    accumulate,
    accumulate_labelled,
    label_names,
    pooled,
)
from sauce_hooks.concepts.statistics_file import Source
from sauce_hooks.concepts.tuning import Tuning, smallest_edit
from sauce_hooks.errors import ContrastError
from sauce_hooks.hookpoint import ReadTokens
from sauce_hooks.sae import VisionSAE
from sauce_hooks.sae.provenance import provenance_of
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
    return accumulate(_encoded(model, sae, images, processor, pool, batch_size), source=_source(sae, pool))


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
    histograms: bool = False,
) -> LabelledStatistics:
    """The two sets of many concepts from one pass over images whose labels are known; `learn_concepts` takes them.

    A part of the images may be read by each of several processes or machines, all with the same `concepts`: what they
    `save` is loaded and added, `sum(parts)`.

    Args:
        model: as in `set_statistics`, like the rest that is not named here.
        sae: the SAE.
        images: every one of them must be readable.
        labels: the concepts that each image shows; a string is a single label.
        concepts: those wanted; by default every label.
        processor: the model's processor.
        pool: how an image's tokens become one activation a feature.
        batch_size: images a forward of the tower.
        histograms: whether to keep the histograms that the score "auroc" needs, in 17 times the memory.

    Returns:
        By concept the statistics of the images that show it, and of the others. Asking for a concept that none of the
        images shows, or all of them, is a `ContrastError`.

    Raises:
        ContrastError: images and labels differ in number.
    """
    batches = _encoded(model, sae, images, processor, pool, batch_size)
    wanted = label_names(labels) if concepts is None else concepts
    return accumulate_labelled(batches, labels, wanted, histograms=histograms, source=_source(sae, pool))


def _source(sae: VisionSAE, pool: Pool) -> Source:
    """What must be alike for statistics to add up."""
    return Source(sae.tokens.read if pool in ("mean", "max") else pool, pool, sae.record())


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
    least = scores_f.topk(min(k, len(scores_f))).values[-1]
    candidates = (scores_f >= least).nonzero()[:, 0]  # sorting them all takes longer than everything else here
    order = candidates[torch.argsort(scores_f[candidates], descending=True, stable=True)][:k]
    chosen = [int(i) for i in order if scores_f[i] > ROUNDING]
    return tuple(chosen), tuple(float(scores_f[i]) for i in chosen)


def contrast(
    name: str,
    positives: SetStatistics,
    negatives: SetStatistics,
    siblings: Mapping[str, SetStatistics] = MappingProxyType({}),
    *,
    scorer: str | Scorer = "sauce",
    k: int = DEFAULT_K,
    subspace: Subspace | None = None,
) -> Concept:
    """The features of a concept from the statistics of its sets; what `learn_concept` does once the images are read.

    Raises:
        ContrastError: no feature tells the sets apart, or the concept from its siblings; an unknown scorer; k below 1.
    """
    if k < 1:
        raise ContrastError(f"k={k}: at least one feature must be chosen")
    score = _scorer(scorer)
    candidates, _ = select_features(score(positives, negatives), k)
    if not candidates:
        raise ContrastError(
            f"no feature fires more for {name!r} than without it ({positives.n} images with, {negatives.n} without). "
            "Are the two sets the same, or swapped? Does the SAE read the tokens that show the concept?"
        )
    features, scores = select_features(worst_contrast(score, positives, negatives, siblings), k)
    shared = left_out(score, positives, negatives, siblings, candidates)
    if not features:
        raise ContrastError(
            f"no feature tells {name!r} from its siblings: each that fires more for it than without it fires as much for "
            f"one of {', '.join(map(repr, siblings))}. Do the images of these show {name!r} too?"
        )
    chosen = list(features)
    of_siblings = {"siblings": {sibling: found.n for sibling, found in siblings.items()}, "left_out": shared}
    return Concept(
        name=name,
        features=features,
        scores=scores,
        means=tuple(positives.mean_f[chosen].tolist()),
        gates=tuple((positives + negatives).mean_f[chosen].tolist()),
        subspace=subspace,
        provenance={
            "scorer": scorer_name(scorer),
            "k": k,
            "positives": positives.n,
            "negatives": negatives.n,
            "digests": [positives.digest(), negatives.digest()],
            **(of_siblings if siblings else {}),
        },
    )


def scorer_name(scorer: str | Scorer) -> str:
    """What a score is called where it is reported."""
    return scorer if isinstance(scorer, str) else getattr(scorer, "__name__", repr(scorer))


def _scorer(scorer: str | Scorer) -> Scorer:
    if not isinstance(scorer, str):
        return scorer
    if scorer not in SCORERS:
        raise ContrastError(
            f"unknown scorer {scorer!r}; known: {', '.join(SCORERS)}. Or give a function of two SetStatistics."
        )
    return SCORERS[scorer]


def learn_concept(
    model: nn.Module,
    sae: VisionSAE,
    name: str,
    positives: Any,
    negatives: Any,
    *,
    processor: Any = None,
    scorer: str | Scorer = "sauce",
    k: int | None = None,
    gamma: float | None = None,
    siblings: Any = None,
    subspace: Subspace | None = None,
    tune: Tuning | None = None,
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
        k: how many features at the most, 32 by default; fewer are taken if fewer score above zero.
        gamma: the factor this concept wants; None leaves it to the eraser.
        siblings: images of other concepts of its domain, none of which shows this one: a set, or sets by name. Features
            that these carry too are left out or count for less (`worst_contrast`).
        subspace: where its edit may write, as `keep_apart` finds it; None: anywhere.
        tune: how to find k, γ and the edit by measuring; neither `k` nor `gamma` may be given then.
            `evaluation.tune_concept` makes one from the images.
        pool: how an image's tokens become one activation a feature: "mean", "max", "class" or "last".
        batch_size: images a forward of the tower.

    Raises:
        ContrastError: no feature tells the sets apart (for example because they are the same); an unknown scorer or pool.
        ImagesError: a set is empty or wholly unreadable.
        ModelBelowGateError: the model has nothing to forget (see `smallest_edit`).
    """
    if tune is not None and (k is not None or gamma is not None):
        raise ContrastError("tuning finds k and gamma: give what is to be tried in tune=Tuning(..., ks=..., gammas=...)")
    _scorer(scorer)  # before images are read for nothing

    def statistics(images: Any) -> SetStatistics:
        if isinstance(images, SetStatistics):
            return images
        return set_statistics(model, sae, images, processor=processor, pool=pool, batch_size=batch_size)

    most = max(tune.ks) if tune is not None else DEFAULT_K if k is None else k
    others = {sibling: statistics(images) for sibling, images in _by_name(siblings).items()}
    sets = statistics(positives), statistics(negatives)
    concept = contrast(name, *sets, others, scorer=scorer, k=most, subspace=subspace)
    source = sets[0].source or _source(sae, pool)
    read = {"pool": source.pool, "tokens": source.tokens, **provenance_of(sae)}
    concept = replace(concept, gamma=gamma, provenance={**concept.provenance, **read})
    if tune is not None:
        concept = smallest_edit(concept, tune)
    sae.concepts.add(concept, sae=sae.record())
    return concept


def _by_name(siblings: Any) -> Mapping[str, Any]:
    """Sets by name; a batch of model inputs is a mapping too, but a single set."""
    if siblings is None:
        return {}
    return siblings if isinstance(siblings, Mapping) and not is_inputs(siblings) else {"siblings": siblings}
