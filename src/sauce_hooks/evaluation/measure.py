"""What erasing a concept does, asked for as often as tuning needs it: only the questions that the figures wanted take."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import reduce
from operator import add
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from sauce_hooks.activations import iter_images
from sauce_hooks.activations.sources import Batches, find_source, iter_items
from sauce_hooks.bank import Concept
from sauce_hooks.concepts.learn import set_statistics
from sauce_hooks.concepts.projections import TokenMoments, token_moments
from sauce_hooks.concepts.scores import Scorer
from sauce_hooks.concepts.statistics import Pool, SetStatistics
from sauce_hooks.concepts.tuning import (
    DEFAULT_KS,
    FORGOTTEN,
    Figures,
    Measure,
    Target,
    Tuning,
    first_features,
    smallest_edit,
)
from sauce_hooks.concepts.ways import Sets, ways
from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.errors import ContrastError, ImagesError
from sauce_hooks.evaluation.answers import Answer, Batch, ask, prepare
from sauce_hooks.evaluation.metrics import score
from sauce_hooks.evaluation.probes import Probe, ProbeSet, Question, Wording, other_questions, own_questions
from sauce_hooks.hookpoint import evaluating
from sauce_hooks.sae import VisionSAE
from sauce_hooks.sae.provenance import provenance_of

FOLDS = 4
"""Parts of a set: features that are chosen from the other parts are measured on each."""
MOST_ASKED = 48
"""Images of a set that the model is asked about: each takes two questions for every setting that is tried."""
FEW_ASKED = 10
"""Below this a warning says that the figures are rough."""

_Wanted = Callable[[Question, str, Sequence[str]], bool]


def _holds(question: Question, erased: str) -> bool:
    return erased in question.probe.concepts


_ASKED: Mapping[str, _Wanted] = MappingProxyType(
    {
        "UA_d": lambda q, c, domain: q.concept == c and _holds(q, c),
        "UA_g": lambda q, c, domain: q.kind == "describe" and _holds(q, c),
        "IRA": lambda q, c, domain: q.truth and not _holds(q, c) and q.concept in domain,
        "CRA": lambda q, c, domain: q.truth and not _holds(q, c) and q.concept not in domain and q.concept is not None,
        "SRA": lambda q, c, domain: q.concept != c and _holds(q, c),
        "TNR": lambda q, c, domain: q.concept is not None and not q.truth and not _holds(q, c),
        "AUROC": lambda q, c, domain: q.concept == c,
    }
)
"""Of each figure that can be tuned for, the questions it is counted from (question, erased concept, its domain)."""


def measure_probes(
    model: nn.Module,
    sae: VisionSAE,
    probes: ProbeSet,
    name: str,
    *,
    processor: Any,
    metrics: Sequence[str] = ("UA_d", "UA_g", "SRA"),
    images: str = "validation images with known concepts",
    batch_size: int = 64,
) -> Measure:
    """A measure of what erasing one concept does, for `Tuning`: the model is asked about images whose concepts are known.

    Args:
        model: the vision-language model.
        sae: its SAE.
        probes: images and wording. They must be none that the features are chosen from, nor those reported on later.
        name: the concept.
        processor: the model's processor.
        metrics: what to measure, of `evaluation.METRICS`; fewer take fewer questions.
        images: which images these are, in words.
        batch_size: questions asked at once.

    Raises:
        ContrastError: a figure that no question is known for.
    """
    return _pooled_measure(model, sae, [probes], name, processor, metrics, images, batch_size, lambda _, concept: concept)


def _pooled_measure(
    model: nn.Module,
    sae: VisionSAE,
    folds: Sequence[ProbeSet],
    name: str,
    processor: Any,
    metrics: Sequence[str],
    images: str,
    batch_size: int,
    for_fold: Callable[[int, Concept], Concept],
) -> Measure:
    """One measure of the answers about all folds together, each erased with the concept that is made for it."""
    unknown = [metric for metric in metrics if metric not in _ASKED]
    if unknown:
        raise ContrastError(f"cannot measure {', '.join(unknown)} here; known: {', '.join(_ASKED)}")
    wording, domain = folds[0].wording, folds[0].domains[folds[0].domain_of(name)]

    def prepared(questions: Sequence[Question]) -> list[Batch]:
        asked = [q for q in questions if any(_ASKED[metric](q, name, domain) for metric in metrics)]
        return prepare(asked, wording, processor, batch_size)

    batches = [(prepared(own_questions(fold, name)), prepared(other_questions(fold))) for fold in folds]

    def figures(concept: Concept | None) -> Figures:
        own, others = list[Answer](), list[Answer]()
        for i, (of_own, of_others) in enumerate(batches):
            eraser = nullcontext() if concept is None else ConceptEraser(model, sae, [for_fold(i, concept)])
            with evaluating(model), eraser:
                own += ask(model, of_own, wording, processor)
                others += ask(model, of_others, wording, processor)
        found = score(name, own, others, folds[0])
        return {metric: found[metric] for metric in metrics}

    return Measure(of=figures, original=figures(None), images=images)


def measure_images(
    model: nn.Module,
    sae: VisionSAE,
    name: str,
    positives: Any,
    *,
    processor: Any,
    siblings: Mapping[str, Any] | None = None,
    wording: Wording | None = None,
    batch_size: int = 64,
) -> Measure:
    """The same from images without labels: of the positives it is known only that they show the concept.

    Yes/no questions about the concept in them give UA_d, their descriptions UA_g. Images of siblings, asked for the sibling
    that they show, give IRA. What else is in the images is not known, so SRA is not measured.

    Args:
        model: the vision-language model.
        sae: its SAE.
        name: the concept, in the words that the model is asked in.
        positives: images that show it, none of them used for selection; a folder, paths, PIL images, a dataset.
        processor: the model's processor.
        siblings: by name, images that show another concept of its domain, and not this one.
        wording: how to ask; `default_wording` by default.
        batch_size: questions asked at once.

    Raises:
        ImagesError: no image can be read.
    """
    probes = _unlabelled(name, positives, siblings or {}, wording or default_wording(processor))
    said = _counted(name, [probes])
    metrics = ("UA_d", "UA_g", "IRA") if siblings else ("UA_d", "UA_g")
    return measure_probes(model, sae, probes, name, processor=processor, metrics=metrics, images=said, batch_size=batch_size)


def _unlabelled(name: str, positives: Any, siblings: Mapping[str, Any], wording: Wording) -> ProbeSet:
    """Images of which only that is known what they were given for."""

    def shown(images: Any, concept: str) -> list[Probe]:
        known = frozenset((name, concept))  # siblings are given as not showing this concept
        return [Probe(picture, frozenset((concept,)), known) for picture in iter_images(images)]

    return ProbeSet(
        domains={"": (name, *siblings)},
        positives={name: shown(positives, name)},
        retained={sibling: shown(images, sibling) for sibling, images in siblings.items()},
        negatives=dict.fromkeys((name, *siblings), ()),
        wording=wording,
    )


def _counted(name: str, folds: Sequence[ProbeSet]) -> str:
    """Which images these are, in words, and a warning if they are few."""
    n = sum(len(fold.positives[name]) for fold in folds)
    if n < FEW_ASKED:
        warnings.warn(
            f"{name!r} is tuned on {n} images: one image is {100 / n:.0f} points. More positive images give surer figures.",
            stacklevel=3,
        )
    siblings = folds[0].retained
    of_siblings = sum(len(fold.retained[sibling]) for fold in folds for sibling in siblings)
    return f"{n} images of {name}" + (f", {of_siblings} of {', '.join(siblings)}" if siblings else "")


def tune_concept(
    model: nn.Module,
    sae: VisionSAE,
    name: str,
    positives: Any,
    negatives: Any,
    *,
    processor: Any,
    siblings: Mapping[str, Any] | None = None,
    target: Target | Sequence[Target] = FORGOTTEN,
    wording: Wording | None = None,
    tuning: Mapping[str, Any] = MappingProxyType({}),
    scorers: Sequence[str | Scorer] = ("sauce", "cohens_d"),
    pool: Pool = "mean",
    batch_size: int = 64,
) -> Concept:
    """From folders of photos to a tuned concept in `sae.concepts`, in one call.

    ```python
    import sauce_hooks as sh

    sh.tune_concept(model, sae, "tiger", "photos/tiger", "photos/other", processor=processor, siblings={"cat": "photos/cat"})
    ```

    Nothing is measured on an image with features that it has helped to choose, and yet no image is lost. This is
    cross-validation: every setting is measured on each quarter of the images with the features that the other three quarters
    give. The concept's own features then come from all images.

    All `ways` to see the concept are tried: its features by each of `scorers` written anywhere, or apart from the siblings
    and from whatever the bank keeps apart already.

    Args:
        model: the vision-language model.
        sae: its SAE.
        name: the concept, in the words that the model is asked in.
        positives: images that show it.
        negatives: images that do not.
        processor: the model's processor.
        siblings: by name, images of other concepts of its domain that do not show this one.
        target: what to reach; see `Target`.
        wording: how the model is asked; `default_wording` by default.
        tuning: what to try, as `Tuning` takes it: ks, gammas, edits, whole.
        batch_size: images, or questions, at once.
        scorers: for features that are written anywhere: each is tried. Names or functions, as in `learn_concept`.
        pool: how an image's tokens become one activation a feature.

    Raises:
        ContrastError: no feature tells the sets apart, or the target asks for what is not measured.
        ImagesError: a set is empty, has fewer than two images, or is none of pictures.
        ModelBelowGateError: the model does not affirm and name the concept in the first place.
    """
    sets = {name: listed(positives), **{sibling: listed(images) for sibling, images in (siblings or {}).items()}}
    n_folds = min(FOLDS, *map(len, sets.values()))
    # Every fourth, so that in a sorted folder each part has its share of everything.
    parts = {shown: [images[i::n_folds] for i in range(n_folds)] for shown, images in sets.items()}

    def read(images: Any) -> _Read:
        return _Read(
            set_statistics(model, sae, images, processor=processor, pool=pool, batch_size=batch_size),
            token_moments(model, sae, images, processor=processor, batch_size=batch_size),
        )

    found = {shown: [read(part) for part in of_set] for shown, of_set in parts.items()}
    without = read(negatives)
    settings = dict(tuning)
    known = [
        c.subspace for c in sae.concepts.values() if c.name not in found and c.subspace is not None and c.subspace.inside
    ]

    def seen(left_out: int | None) -> list[Concept]:
        """The ways to see the concept in all parts but one."""
        of = {
            shown: reduce(add, [part for i, part in enumerate(of_set) if i != left_out]) for shown, of_set in found.items()
        }
        sets = Sets(
            of[name].statistics,
            without.statistics,
            {sibling: of[sibling].statistics for sibling in siblings or {}},
            {shown: (images.moments, without.moments) for shown, images in of.items()},
        )
        return ways(sae, name, sets, k=max(settings.get("ks", DEFAULT_KS)), scorers=scorers, others=known)

    rankings = [{way.provenance["written"]: way for way in seen(i)} for i in range(n_folds)]

    def for_fold(i: int, candidate: Concept) -> Concept:
        way = rankings[i].get(candidate.provenance["written"])
        if way is None:  # in these parts no feature is seen in that way: nothing is erased
            return replace(candidate, gamma=1.0)
        ours = first_features(way, len(candidate.features))
        return replace(ours, gamma=candidate.gamma, edit=candidate.edit)

    words = wording or default_wording(processor)
    asked = {shown: [_some(part, MOST_ASKED // n_folds) for part in of_set] for shown, of_set in parts.items()}
    folds = [
        _unlabelled(name, asked[name][i], {sibling: asked[sibling][i] for sibling in siblings or {}}, words)
        for i in range(n_folds)
    ]
    said = f"{_counted(name, folds)}, in {n_folds} parts, each with features chosen from the others"
    metrics = ("UA_d", "UA_g", "IRA") if siblings else ("UA_d", "UA_g")
    measure = _pooled_measure(model, sae, folds, name, processor, metrics, said, batch_size, for_fold)
    concept = smallest_edit(seen(None), Tuning(measure, target, **settings))
    facts = {"pool": pool, "tokens": sae.tokens.read, **provenance_of(sae)}
    concept = replace(concept, provenance={**concept.provenance, **facts})
    sae.concepts.add(concept, sae=sae.record())
    return concept


class _Read(NamedTuple):
    """What one pass each says of a set of images."""

    statistics: SetStatistics
    moments: TokenMoments

    def __add__(self, other: Any) -> Any:
        return _Read(self.statistics + other.statistics, self.moments + other.moments)


def listed(images: Any) -> list[Any]:
    """The images of a set, not opened, in order.

    Raises:
        ImagesError: fewer than two images, or batches of model inputs: the model cannot be asked about those.
    """
    source = find_source(images)
    if isinstance(source, Batches):
        raise ImagesError("measuring asks the model about pictures: give a folder, paths or PIL images, not model inputs")
    contents = [item.content for item in iter_items(source)]
    if len(contents) < 2:
        raise ImagesError(f"{len(contents)} image is too few to choose features from some and measure on others")
    return contents


def _some(images: Sequence[Any], most: int) -> Sequence[Any]:
    """At most so many, from all over."""
    return images[:: math.ceil(len(images) / most)]


def default_wording(processor: Any) -> Wording:
    """Plain English questions in the model's own chat format; descriptions are read by `mentions`."""
    return Wording(
        yes_no=lambda concept: chat_prompt(processor, f"Does this image show {concept}? Answer yes or no."),
        describe=lambda: chat_prompt(processor, "Describe this image."),
    )


def chat_prompt(processor: Any, question: str) -> str:
    """A question as the model wants it: by its chat template, or in LLaVA's plain form where it has none."""
    placeholder = getattr(processor, "image_token", "")  # some models want none
    if not placeholder or placeholder in question:
        return question
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"user: {placeholder} {question} assistant:"
