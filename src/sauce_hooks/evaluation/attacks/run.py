"""Every attack on every method and concept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from sauce_hooks.errors import AttackError, EvaluationWarning, UnknownConceptError
from sauce_hooks.evaluation.attacks.pixels import AdversarialImages
from sauce_hooks.evaluation.attacks.probing import LinearProbe
from sauce_hooks.evaluation.attacks.quantisation import Quantisation
from sauce_hooks.evaluation.attacks.record import Attacked, Leak
from sauce_hooks.evaluation.attacks.relearning import Relearning
from sauce_hooks.evaluation.attacks.rewording import (
    Instructions,
    Paraphrases,
    SecondLanguage,
    plain_instructions,
    plain_paraphrases,
)
from sauce_hooks.evaluation.attacks.subject import Subject, look
from sauce_hooks.evaluation.probes import ProbeSet, Wording
from sauce_hooks.evaluation.results import ORIGINAL
from sauce_hooks.evaluation.run import Method
from sauce_hooks.hookpoint import evaluating
from sauce_hooks.sae.progress import progress_bar

Attack = Callable[[Subject], list[Leak]]
"""What it gets out of a subject; it leaves the model as it was."""

ATTACKS: Mapping[str, Callable[[Any], Attack]] = MappingProxyType(
    {
        "paraphrases": lambda processor: Paraphrases(plain_paraphrases(processor)),
        "instructions": lambda processor: Instructions(partial(plain_instructions, processor)),
        "quantisation": lambda processor: Quantisation(),
        "adversarial images": lambda processor: AdversarialImages(),
        "relearning": lambda processor: Relearning(),
        "linear probe": lambda processor: LinearProbe(),
    }
)
"""By name, with a processor: the attacks in their usual settings, in plain English. "second language" takes a wording."""


def run_attacks(
    model: nn.Module,
    probes: ProbeSet,
    concepts: Sequence[str],
    *,
    processor: Any,
    methods: Mapping[str, Method],
    attacks: Sequence[str | Attack] | None = None,
    second_language: Mapping[str, Wording] | None = None,
    training: ProbeSet | None = None,
    batch_size: int = 64,
    progress: bool = True,
    found: Callable[[Leak], None] | None = None,
) -> Attacked:
    """Attack each method on each concept; the original model is attacked, too.

    ```python
    from sauce_hooks import ConceptEraser
    from sauce_hooks.evaluation.attacks import run_attacks

    methods = {"SAUCE": lambda concept: ConceptEraser(model, sae, [concept])}
    found = run_attacks(model, probes, ["red"], processor=processor, methods=methods, attacks=["paraphrases"])
    print(found.to_markdown())
    ```

    Args:
        model: the model that the methods work on.
        probes: what is reported on: images that hold each concept, and as many that lack it.
        concepts: what is forgotten, one at a time.
        processor: the model's processor.
        methods: by name, something that makes the model forget a concept for the length of a `with`.
        attacks: names of `ATTACKS`, "second language", or attacks with settings of their own; by default every one that
            has what it needs.
        second_language: by language, how to ask in it.
        training: images that an attacker has: other ones than those reported on.
        batch_size: questions asked at once.
        progress: show a progress bar.
        found: called with each finding as soon as it is there, so that none is lost if the run is ended.

    Raises:
        AttackError: an unknown attack, or one that lacks what it needs.
        UnknownConceptError: a concept the probes do not hold.
    """
    chosen = _chosen(attacks, processor, second_language, training)
    known = [concept for concept, images in probes.positives.items() if images]
    for concept in concepts:
        if concept not in known:
            raise UnknownConceptError(concept, known)
        if not probes.negatives.get(concept):
            raise AttackError(f"no image that lacks {concept!r}: what comes back could not be told from what is made up")
        if training is not None and not (training.positives.get(concept) and training.negatives.get(concept)):
            raise AttackError(f"the images that an attacker has need some with {concept!r} and some without")
    if worded := [name for name, method in methods.items() if getattr(method, "wording", None) is not None]:
        raise AttackError(
            f"{', '.join(worded)} only asks in other words, and an attack asks in its own: there would be nothing to attack"
        )
    every: dict[str, Method] = {ORIGINAL: lambda concept: nullcontext(), **methods}
    leaks: list[Leak] = []
    bar = progress_bar(len(concepts) * len(every) * len(chosen), "attack", "attack", show=progress)
    with evaluating(model), bar:
        for concept in concepts:
            for name, method in every.items():
                with method(concept):
                    before = look(model, probes, concept, processor, batch_size=batch_size)
                subject = Subject(
                    model, processor, probes, training, concept, name, partial(method, concept), before, batch_size
                )
                for attack in chosen:
                    for leak in _leaks(attack, subject, asked_for=attacks is not None):
                        leaks.append(leak)
                        if found is not None:
                            found(leak)
                    bar.update()
    return Attacked(leaks)


def _leaks(attack: Attack, subject: Subject, *, asked_for: bool) -> Sequence[Leak]:
    """What an attack finds. One that nobody asked for by name, and that cannot be made here, is left out with a warning."""
    try:
        return attack(subject)
    except (AttackError, ImportError) as problem:
        if asked_for:
            raise
        warnings.warn(
            f"{getattr(attack, 'name', attack)} on {subject.concept!r} is left out: {problem}",
            EvaluationWarning,
            stacklevel=3,
        )
        return []


def _chosen(
    attacks: Sequence[str | Attack] | None,
    processor: Any,
    second_language: Mapping[str, Wording] | None,
    training: ProbeSet | None,
) -> list[Attack]:
    known: dict[str, Callable[[Any], Attack]] = dict(ATTACKS)
    if second_language:
        languages = second_language
        known = {"second language": lambda processor: SecondLanguage(languages), **known}
    if attacks is None:
        attacks = [name for name in known if training is not None or name not in ("relearning", "linear probe")]
    chosen: list[Attack] = []
    for attack in attacks:
        if isinstance(attack, str):
            if attack not in known:
                extra = " (it takes second_language={...})" if attack == "second language" else ""
                raise AttackError(f"unknown attack {attack!r}{extra}; known: {', '.join(known)}")
            chosen.append(known[attack](processor))
        else:
            chosen.append(attack)
    if not chosen:
        raise AttackError(f"no attack chosen; known: {', '.join(known)}")
    return chosen
