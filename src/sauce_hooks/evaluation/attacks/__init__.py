"""Attacks on an erasure: ways to get the concept back, each with what it recovers and what it merely forges."""

from sauce_hooks.evaluation.attacks.pixels import AdversarialImages, pgd
from sauce_hooks.evaluation.attacks.probing import LinearProbe
from sauce_hooks.evaluation.attacks.quantisation import Quantisation, quantised
from sauce_hooks.evaluation.attacks.record import GOALS, LEAKS, Attacked, Leak
from sauce_hooks.evaluation.attacks.relearning import Relearning
from sauce_hooks.evaluation.attacks.rewording import (
    Instructions,
    Paraphrases,
    SecondLanguage,
    plain_instructions,
    plain_paraphrases,
)
from sauce_hooks.evaluation.attacks.run import ATTACKS, Attack, run_attacks
from sauce_hooks.evaluation.attacks.subject import Seen, Subject, compare, look

__all__ = [
    "ATTACKS",
    "GOALS",
    "LEAKS",
    "AdversarialImages",
    "Attack",
    "Attacked",
    "Instructions",
    "Leak",
    "LinearProbe",
    "Paraphrases",
    "Quantisation",
    "Relearning",
    "SecondLanguage",
    "Seen",
    "Subject",
    "compare",
    "look",
    "pgd",
    "plain_instructions",
    "plain_paraphrases",
    "quantised",
    "run_attacks",
]
