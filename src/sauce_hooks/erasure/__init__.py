"""Room 5: the pure tensor edit, its attachment to a model, `ConceptEraser`. Concepts go in, a changed forward comes out."""

from sauce_hooks.erasure.attach import attach, check_effect, check_ran, detach
from sauce_hooks.erasure.eraser import PAPER_GAMMA, ConceptEraser, merge
from sauce_hooks.erasure.merging import FeatureEdit, MergedEdit, ProjectionEdit

__all__ = [
    "PAPER_GAMMA",
    "ConceptEraser",
    "FeatureEdit",
    "MergedEdit",
    "ProjectionEdit",
    "attach",
    "check_effect",
    "check_ran",
    "detach",
    "merge",
]
