"""Room 4: contrastive statistics, scores, selection, the bank. Two image sets go in, a `Concept` comes out."""

from sauce_hooks.bank import Concept, ConceptBank
from sauce_hooks.concepts.learn import labelled_statistics, learn_concept, select_features, set_statistics
from sauce_hooks.concepts.projections import PROJECTIONS, TokenMoments, learn_projection, token_moments
from sauce_hooks.concepts.scores import SCORERS, Scorer, sauce_score
from sauce_hooks.concepts.statistics import SetStatistics, accumulate, accumulate_labelled, pooled

__all__ = [
    "PROJECTIONS",
    "SCORERS",
    "Concept",
    "ConceptBank",
    "Scorer",
    "SetStatistics",
    "TokenMoments",
    "accumulate",
    "accumulate_labelled",
    "labelled_statistics",
    "learn_concept",
    "learn_projection",
    "pooled",
    "sauce_score",
    "select_features",
    "set_statistics",
    "token_moments",
]
