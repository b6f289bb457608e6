"""`evaluate`: ask the model every question of the protocol, with and without each erasure."""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sauce_hooks.errors import EvaluationError, EvaluationWarning, UnknownConceptError
from sauce_hooks.evaluation.answers import Answer, Batch, ask, prepare, read_description
from sauce_hooks.evaluation.eligibility import Eligibility
from sauce_hooks.evaluation.erasing import Erasing
from sauce_hooks.evaluation.metrics import Rate, count, harmonic, nearest_sibling
from sauce_hooks.evaluation.probes import (
    Judge,
    ProbeSet,
    Question,
    WholeWords,
    Wording,
    other_questions,
    own_questions,
    pope_questions,
)
from sauce_hooks.evaluation.results import ORIGINAL, Example, Results
from sauce_hooks.evaluation.statistics import Counts
from sauce_hooks.evaluation.store import Finished, Store, settings_of
from sauce_hooks.hookpoint import evaluating
from sauce_hooks.sae import VisionSAE
from sauce_hooks.sae.progress import progress_bar

Method = Callable[[str], AbstractContextManager[Any]]
"""Given a concept, something that makes the model forget it for the length of a `with`.

A method may have two more attributes. `wording(wording: Wording, concept: str) -> Wording` asks in other words: a method
that only adds "don't mention red" to the prompt. `settings`, a dataclass or anything that JSON can hold, is kept with what
is finished, so that a run is not gone on with after it has changed.
"""

_EXAMPLES = 3
_ELIGIBILITY = Eligibility()


def evaluate(
    model: nn.Module,
    sae: VisionSAE | None,
    probes: ProbeSet,
    concepts: Sequence[str],
    *,
    processor: Any,
    methods: Mapping[str, Method] | None = None,
    judge: Judge | None = None,
    eligibility: Eligibility | None = _ELIGIBILITY,
    out: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> Results:
    """Erase each concept in turn and measure what is forgotten and what stays.

    A method that fails at a concept loses nothing else: the error is in `Results.failures` and under the tables, and a
    warning at the end names it.

    Args:
        model: the vision-language model.
        sae: its SAE with a bank that knows the concepts; may be None if `methods` needs none.
        probes: images and questions; `sauce_hooks.scenes.probes()` for the bundled world.
        concepts: what to erase, one at a time.
        processor: the model's processor.
        methods: rivals by name; by default `ConceptEraser` as the bank has it. The original model always comes first.
        judge: decides whether a description names a concept; `Wording.mentions` by default.
        eligibility: what the original model must know of a concept for it to count in means; None counts all.
        out: a folder in which every method and concept is kept as it is finished. Called again, `evaluate` goes on there.
            Methods are known by their names, and by `settings` where they have any.
        batch_size: questions asked at once.
        progress: show a progress bar.

    Returns:
        Every metric of `evaluation.METRICS` for every method and concept, with intervals and a few examples.

    Raises:
        UnknownConceptError: a concept the probes do not hold.
        ProbeError: no image holds a concept.
        ResumeError: `out` holds an evaluation of another model, of other images, words, judge or method settings.
        EvaluationError: every erasure failed.
        ValueError: a method called as the original model is, or neither an SAE nor methods.
        TypeError: a judge that is none.
    """
    for concept in concepts:
        if concept not in probes.concepts:
            raise UnknownConceptError(concept, probes.concepts)
        probes.require(concept)
    if methods is None:
        if sae is None:
            raise ValueError("without an SAE, say in methods={...} what to evaluate")
        methods = {"SAUCE": Erasing(model, sae)}
    if ORIGINAL in methods:
        raise ValueError(f"{ORIGINAL!r} is what the model without any method is called: give the method another name")
    every: dict[str, Method] = {ORIGINAL: lambda concept: nullcontext(), **methods}
    judge = judge or WholeWords(probes.wording)
    if not isinstance(judge, Judge):  # pyright: ignore[reportUnnecessaryIsInstance] - users have no type checker
        raise TypeError(f"{judge!r} is no judge: it must be callable and have a `name`, see evaluation.Judge")
    store = Store(Path(out), settings_of(model, probes, judge.name)) if out is not None else Store(None, {})
    interview = _Interview(model, probes, processor, batch_size)
    done: dict[tuple[str, str], Finished] = {}
    failures: dict[tuple[str, str], str] = {}
    first: Exception | None = None
    bar = progress_bar(len(concepts) * len(every), "evaluate", "erasure", show=progress)
    with evaluating(model), bar:
        for concept in concepts:
            interview.about(concept)
            for name, method in every.items():
                settings = known_by(method)
                found = store.load(name, concept, settings)
                if found is None:
                    try:
                        own, others = interview.of(name, method)
                    except Exception as problem:
                        if name == ORIGINAL:
                            raise
                        failures[name, concept] = f"{type(problem).__name__}: {problem}"
                        first = first or problem
                        bar.update()
                        continue
                    near = nearest_sibling(concept, own, probes) if name == ORIGINAL else done[ORIGINAL, concept].near
                    scored = count(concept, own, others, probes, judge=judge, near=near)
                    texts = [a.text for a in own if a.question.kind == "describe"]
                    foreign = _foreign(name, concept, [*own, *others], probes.wording)
                    found = Finished(scored.rates, scored.counts, near, texts, foreign)
                    store.save(name, concept, settings, found)
                done[name, concept] = found
                bar.update()
    if first is not None and all(method == ORIGINAL for method, _ in done):
        raise EvaluationError(f"every erasure failed; the first: {next(iter(failures.values()))}") from first
    if failures:
        listing = "; ".join(f"{method}, {concept}: {error}" for (method, concept), error in failures.items())
        warnings.warn(f"{len(failures)} erasures failed and are left out: {listing}", EvaluationWarning, stacklevel=2)
    return _results(done, failures, probes, judge, eligibility)


class _Interview:
    """Puts the questions, and processes them no oftener than needed."""

    def __init__(self, model: nn.Module, probes: ProbeSet, processor: Any, batch_size: int) -> None:
        self._model, self._probes, self._processor, self._batch_size = model, probes, processor, batch_size
        self._others = [*other_questions(probes), *pope_questions(probes)]
        self._shared = self._batches(self._others, probes.wording)
        self._original: list[Answer] | None = None
        self._concept = ""
        self._own: list[Batch] = []

    def about(self, concept: str) -> None:
        """Turn to a concept."""
        self._concept = concept
        self._own = self._batches(own_questions(self._probes, concept), self._probes.wording)

    def of(self, name: str, method: Method) -> tuple[list[Answer], list[Answer]]:
        """The answers about the concept's own images, and to all other questions, while it is erased."""
        change: Callable[[Wording, str], Wording] | None = getattr(method, "wording", None)
        if change is None:
            wording, own, shared = self._probes.wording, self._own, self._shared
        else:
            wording = change(self._probes.wording, self._concept)
            own = self._batches(own_questions(self._probes, self._concept), wording)
            shared = self._batches(self._others, wording)
        with method(self._concept):
            about_own = self._answers(own, wording)
            if name != ORIGINAL:
                return about_own, self._answers(shared, wording)
        if self._original is None:  # nothing is erased: the same for every concept
            self._original = self._answers(shared, wording)
        return about_own, self._original

    def _batches(self, questions: Sequence[Question], wording: Wording) -> list[Batch]:
        return prepare(questions, wording, self._processor, self._batch_size)

    def _answers(self, batches: Sequence[Batch], wording: Wording) -> list[Answer]:
        return list(ask(self._model, batches, wording, self._processor))


def _results(
    done: Mapping[tuple[str, str], Finished],
    failures: Mapping[tuple[str, str], str],
    probes: ProbeSet,
    judge: Judge,
    eligibility: Eligibility | None,
) -> Results:
    scores: dict[tuple[str, str], dict[str, Rate]] = {}
    counts: dict[tuple[str, str], Mapping[str, Counts]] = {}
    left_out: dict[str, str] = {}
    examples: list[Example] = []
    for (method, concept), found in done.items():
        original = done[ORIGINAL, concept].rates
        h = harmonic(found.rates, original)
        scores[method, concept] = {**found.rates, "H": Rate(h, found.rates["UA_d"].n if h == h else 0, h, h)}
        counts[method, concept] = found.counts
        reason = eligibility.reason(original) if eligibility and method == ORIGINAL else None
        if reason:
            left_out[concept] = reason
        for probe, text in list(zip(probes.positives[concept], found.descriptions, strict=False))[:_EXAMPLES]:
            said = Answer(Question(probe, "describe", None), text, read_description(text), float("nan"))
            examples.append(Example(concept, said, method))
    nearest = {concept: found.near for (method, concept), found in done.items() if method == ORIGINAL and found.near}
    results = Results(scores, probes.domains, examples, counts, left_out, failures, nearest, _notes(done, judge), judge.name)
    for (method, concept), rates in scores.items():  # H has an interval of its own only once all else is known
        low, high = results.interval(method, concept, "H")
        rates["H"] = replace(rates["H"], low=low, high=high)
    return results


def known_by(method: Method) -> Any:
    """What a method's `settings` are once they have been written and read; None if it has none."""
    settings = getattr(method, "settings", None)
    plain = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
    return json.loads(json.dumps(plain, default=str))  # as it will be when it is read again


def _notes(done: Mapping[tuple[str, str], Finished], judge: Judge) -> list[str]:
    about_judge = [f"Descriptions were judged by {judge.name}."] if not isinstance(judge, WholeWords) else []
    note = str(getattr(judge, "note", "") or "")
    return [*about_judge, *([note] if note else []), *(note for found in done.values() for note in found.notes)]


def _foreign(method: str, concept: str, answers: Sequence[Answer], wording: Wording) -> list[str]:
    """A note if yes/no answers are written in another script than the words for yes and no."""
    scripts = {script for word in (*wording.yes, *wording.no) for script in _scripts(word)}
    strange = [a.text for a in answers if a.status == "invalid" and a.question.concept and _scripts(a.text[:20]) - scripts]
    if not strange:
        return []
    like = " ".join(strange[0].split())[:40]
    return [
        f"{method}, {concept}: {len(strange)} of {len(answers)} answers are in another script than the words for yes and no "
        f"({', '.join((*wording.yes, *wording.no))}), such as {like!r}; they count as invalid."
    ]


def _scripts(text: str) -> set[str]:
    """The scripts of a text's letters: LATIN, CJK, CYRILLIC."""
    return {unicodedata.name(sign, "OTHER").split()[0] for sign in text if sign.isalpha()}
