"""Judges for UA_g: whether a description affirms that the image shows a concept."""

from sauce_hooks.evaluation.judges.agreement import Agreement, Case, agreement, labelled
from sauce_hooks.evaluation.judges.lexicon import Lexicon
from sauce_hooks.evaluation.judges.opinion import Judge, Layered, UnsureJudge, Verdict

__all__ = ["Agreement", "Case", "Judge", "Layered", "Lexicon", "UnsureJudge", "Verdict", "agreement", "labelled"]
