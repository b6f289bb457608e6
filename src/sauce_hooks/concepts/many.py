"""Many concepts at once, from one pass over labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sauce_hooks.bank import Concept
from sauce_hooks.concepts.learn import DEFAULT_K, contrast
from sauce_hooks.concepts.scores import Scorer
from sauce_hooks.concepts.statistics import LabelledStatistics
from sauce_hooks.errors import ContrastError, SAEMismatchError
from sauce_hooks.sae import VisionSAE

SPELT_OUT = 5
"""Concepts that cannot be learnt of which an error says why."""


def learn_concepts(
    sae: VisionSAE,
    statistics: LabelledStatistics,
    names: Sequence[str] | None = None,
    *,
    scorer: str | Scorer = "sauce",
    k: int = DEFAULT_K,
    gamma: float | None = None,
) -> tuple[Concept, ...]:
    """`learn_concept` for many names from one pass: all are stored in `sae.concepts`, or none is.

    ```python
    import sauce_hooks as sh

    statistics = sh.labelled_statistics(model, sae, images, labels, processor=processor)
    sh.learn_concepts(sae, statistics)
    ```

    Args:
        sae: the SAE that the statistics were made with.
        statistics: of all concepts, from `labelled_statistics`.
        names: the concepts wanted; by default every one that was counted.
        scorer: a name in `SCORERS`, or a function of two sets' statistics. "auroc" needs statistics with histograms.
        k: how many features a concept at the most.
        gamma: the factor that these concepts want; None leaves it to the eraser.

    Returns:
        The concepts, in the order of the names.

    Raises:
        ContrastError: some concepts cannot be learnt, since all or none of the images show them or no feature tells them
            apart; says which. Also an unknown scorer.
        SAEMismatchError: the statistics were made with another SAE.
        UnknownConceptError: a name that was not counted.
    """
    source = statistics.total.source
    difference = source and source.sae.difference(sae.record())
    if difference:
        raise SAEMismatchError(f"these statistics were made with another SAE: {difference}. Read the images with this one")
    facts = {"pool": source.pool, "tokens": source.tokens} if source else {}
    learnt: dict[str, Concept] = {}
    problems: dict[str, str] = {}
    for name in statistics.positives if names is None else names:
        try:
            concept = contrast(name, *statistics[name], scorer=scorer, k=k)
            learnt[name] = replace(concept, gamma=gamma, provenance={**concept.provenance, **facts})
        except ContrastError as problem:
            problems[name] = str(problem)
    if problems:
        said = "\n".join(problem for problem in list(problems.values())[:SPELT_OUT])
        raise ContrastError(
            f"{len(problems)} of these concepts cannot be learnt, so none was stored: {', '.join(problems)!r:.500}. Leave "
            f"them out of names=[...]. Why:\n{said}"
        )
    record = sae.record()
    for concept in learnt.values():
        sae.concepts.add(concept, sae=record)
    return tuple(learnt.values())
