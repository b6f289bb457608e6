"""Room 4: contrastive statistics, scores, selection, the bank. Two image sets go in, a `Concept` comes out."""

from sauce_hooks.bank import Concept, ConceptBank
from sauce_hooks.concepts.difference import difference
from sauce_hooks.concepts.learn import contrast, labelled_statistics, learn_concept, select_features, set_statistics
from sauce_hooks.concepts.many import learn_concepts
from sauce_hooks.concepts.overlap import Overlap, SharedPair, overlap
from sauce_hooks.concepts.projections import PROJECTIONS, TokenMoments, learn_projection, token_moments
from sauce_hooks.concepts.readout import keep_apart, read_out_score
from sauce_hooks.concepts.scores import SCORERS, Scorer, sauce_score
from sauce_hooks.concepts.siblings import worst_contrast
from sauce_hooks.concepts.statistics import (
    LabelledStatistics,
    SetStatistics,
    accumulate,
    accumulate_labelled,
    pooled,
)
from sauce_hooks.concepts.tuning import FORGOTTEN, Measure, Target, Tuning, smallest_edit
from sauce_hooks.concepts.words import (
    FeatureEffects,
    FeatureLabels,
    feature_effects,
    label_features,
    learn_concept_from_word,
)

__all__ = [
    "FORGOTTEN",
    "PROJECTIONS",
    "SCORERS",
    "Concept",
    "ConceptBank",
    "FeatureEffects",
    "FeatureLabels",
    "LabelledStatistics",
    "Measure",
    "Overlap",
    "Scorer",
    "SetStatistics",
    "SharedPair",
    "Target",
    "TokenMoments",
    "Tuning",
    "accumulate",
    "accumulate_labelled",
    "contrast",
    "difference",
    "feature_effects",
    "keep_apart",
    "label_features",
    "labelled_statistics",
    "learn_concept",
    "learn_concept_from_word",
    "learn_concepts",
    "learn_projection",
    "overlap",
    "pooled",
    "read_out_score",
    "sauce_score",
    "select_features",
    "set_statistics",
    "smallest_edit",
    "token_moments",
    "worst_contrast",
]
