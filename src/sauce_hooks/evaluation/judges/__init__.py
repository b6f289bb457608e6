"""Judges for UA_g: whether a description affirms that the image shows a concept."""

from sauce_hooks.evaluation.judges.agreement import Agreement, Case, agreement, labelled
from sauce_hooks.evaluation.judges.budget import Budget
from sauce_hooks.evaluation.judges.endpoint import Endpoint
from sauce_hooks.evaluation.judges.lexicon import Lexicon
from sauce_hooks.evaluation.judges.nli import NLI
from sauce_hooks.evaluation.judges.opinion import Judge, Layered, UnsureJudge, Verdict

__all__ = [
    "NLI",
    "Agreement",
    "Budget",
    "Case",
    "Endpoint",
    "Judge",
    "Layered",
    "Lexicon",
    "UnsureJudge",
    "Verdict",
    "agreement",
    "labelled",
]
