"""Room 6: probes, judges, metrics, baselines. A model and an eraser go in, a table comes out."""

from sauce_hooks.evaluation.answers import Answer, ask, prepare
from sauce_hooks.evaluation.metrics import METRICS, Rate
from sauce_hooks.evaluation.probes import Probe, ProbeSet, Question, Wording, mentions
from sauce_hooks.evaluation.results import ORIGINAL, Results
from sauce_hooks.evaluation.run import Method, evaluate

__all__ = [
    "METRICS",
    "ORIGINAL",
    "Answer",
    "Method",
    "Probe",
    "ProbeSet",
    "Question",
    "Rate",
    "Results",
    "Wording",
    "ask",
    "evaluate",
    "mentions",
    "prepare",
]
