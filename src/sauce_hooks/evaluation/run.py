"""`evaluate`: ask the model every question of the protocol, with and without each erasure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from sauce_hooks.erasure import ConceptEraser
from sauce_hooks.errors import UnknownConceptError
from sauce_hooks.evaluation.answers import Answer, Batch, ask, prepare
from sauce_hooks.evaluation.metrics import Rate, score
from sauce_hooks.evaluation.probes import ProbeSet, Question
from sauce_hooks.evaluation.results import ORIGINAL, Example, Results
from sauce_hooks.hookpoint import evaluating
from sauce_hooks.sae import VisionSAE

Method = Callable[[str], AbstractContextManager[Any]]
"""Given a concept, something that makes the model forget it for the length of a `with`."""

_EXAMPLES = 3


def evaluate(
    model: nn.Module,
    sae: VisionSAE | None,
    probes: ProbeSet,
    concepts: Sequence[str],
    *,
    processor: Any,
    methods: Mapping[str, Method] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Results:
    """Erase each concept in turn and measure what is forgotten and what stays.

    Args:
        model: the vision-language model.
        sae: its SAE with a bank that knows the concepts; may be None if `methods` needs none.
        probes: images and questions; `sauce_hooks.scenes.probes()` for the bundled world.
        concepts: what to erase, one at a time.
        processor: the model's processor.
        methods: rivals by name; by default `ConceptEraser` as the bank has it. The original model always comes first.
        batch_size: questions asked at once.
        progress: show a progress bar.

    Returns:
        Every metric of `evaluation.METRICS` for every method and concept, with intervals and a few examples.

    Raises:
        UnknownConceptError: a concept the probes do not hold.
    """
    known = [concept for names in probes.domains.values() for concept in names]
    for concept in concepts:
        if concept not in known:
            raise UnknownConceptError(concept, known)
    if methods is None:
        if sae is None:
            raise ValueError("without an SAE, say in methods={...} what to evaluate")
        vision_sae = sae
        methods = {"SAUCE": lambda concept: ConceptEraser(model, vision_sae, [concept])}
    every: dict[str, Method] = {ORIGINAL: lambda concept: nullcontext(), **methods}

    def answers(batches: Sequence[Batch]) -> list[Answer]:
        return list(ask(model, batches, probes.wording, processor))

    scores: dict[tuple[str, str], dict[str, Rate]] = {}
    examples: list[Example] = []
    from tqdm.auto import tqdm

    bar = tqdm(total=len(concepts) * len(every), desc="evaluate", unit="erasure", disable=not progress)
    with evaluating(model), bar:
        shared = prepare(other_questions(probes), probes.wording, processor, batch_size)
        original_shared = answers(shared)
        for concept in concepts:
            own = prepare(own_questions(probes, concept), probes.wording, processor, batch_size)
            for name, method in every.items():
                with method(concept):
                    own_answers = answers(own)
                    others = original_shared if name == ORIGINAL else answers(shared)
                scores[name, concept] = score(concept, own_answers, others, probes)
                described = [a for a in own_answers if a.question.kind == "describe"]
                examples += [Example(concept, answer, name) for answer in described[:_EXAMPLES]]
                bar.update()
    return Results(scores, probes.domains, examples)


def own_questions(probes: ProbeSet, concept: str) -> list[Question]:
    """What is asked when a concept is erased: about its own images, and for it in images that lack it."""
    holding = [
        question
        for probe in probes.positives[concept]
        for question in (
            Question(probe, "describe", None),
            *(Question(probe, "yes_no", true) for true in sorted(probe.concepts)),
        )
    ]
    return [*holding, *(Question(probe, "yes_no", concept) for probe in probes.negatives[concept])]


def other_questions(probes: ProbeSet) -> list[Question]:
    """What is asked whatever is erased: for every concept, images that hold it and images that lack it."""
    # As many absent as retained images a concept; the erased concept's own absences are asked in full elsewhere.
    return [
        Question(probe, "yes_no", concept)
        for concept, retained in probes.retained.items()
        for probe in (*retained, *probes.negatives[concept][: len(retained)])
    ]
