"""Room 4: contrastive statistics, scores, selection, the bank. Two image sets go in, a `Concept` comes out."""

from sauce_hooks.bank import Concept, ConceptBank
from sauce_hooks.concepts.learn import SCORERS, learn_concept, select_features, set_statistics
from sauce_hooks.concepts.statistics import SetStatistics, accumulate, sauce_score

__all__ = [
    "SCORERS",
    "Concept",
    "ConceptBank",
    "SetStatistics",
    "accumulate",
    "learn_concept",
    "sauce_score",
    "select_features",
    "set_statistics",
]
