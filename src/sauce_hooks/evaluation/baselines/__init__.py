"""Rivals to compare with: weight-updating unlearning, and rows that train nothing. Each is a `Method` for `evaluate`."""

from sauce_hooks.evaluation.baselines.data import REFUSALS, Describe, ForgetRetain, forget_retain, own_descriptions
from sauce_hooks.evaluation.baselines.losses import OBJECTIVES, Objective, Said
from sauce_hooks.evaluation.baselines.rows import (
    INSTRUCTION,
    ContrastSets,
    PromptOnly,
    projected,
    random_features,
    reconstruction_only,
)
from sauce_hooks.evaluation.baselines.sweep import CRITERION, Point, Sweep, sweep
from sauce_hooks.evaluation.baselines.table import METHODS, Materials, Rival, make_methods
from sauce_hooks.evaluation.baselines.training import Retrained, Settings, train
from sauce_hooks.evaluation.baselines.weights import Student

__all__ = [
    "CRITERION",
    "INSTRUCTION",
    "METHODS",
    "OBJECTIVES",
    "REFUSALS",
    "ContrastSets",
    "Describe",
    "ForgetRetain",
    "Materials",
    "Objective",
    "Point",
    "PromptOnly",
    "Retrained",
    "Rival",
    "Said",
    "Settings",
    "Student",
    "Sweep",
    "forget_retain",
    "make_methods",
    "own_descriptions",
    "projected",
    "random_features",
    "reconstruction_only",
    "sweep",
    "train",
]
